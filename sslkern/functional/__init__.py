"""The losses as functions: check the arguments, compose primitives."""

from .info_nce import info_nce
from .nnclr import nearest_neighbors, nnclr
from .nt_xent import nt_xent

__all__ = ["info_nce", "nearest_neighbors", "nnclr", "nt_xent"]
