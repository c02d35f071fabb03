"""The losses as functions: check the arguments, compose primitives."""

from .deep_infomax import deep_infomax
from .info_nce import info_nce
from .nt_xent import nt_xent
from .siglip import siglip

__all__ = ["deep_infomax", "info_nce", "nt_xent", "siglip"]
