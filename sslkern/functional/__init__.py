"""The losses as functions: check the arguments, compose primitives."""

from .cpc import cpc
from .info_nce import info_nce
from .mnrl import mnrl
from .nt_xent import nt_xent

__all__ = ["cpc", "info_nce", "mnrl", "nt_xent"]
