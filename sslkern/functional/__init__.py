"""The losses as functions: check the arguments, compose primitives."""

from .alignment_uniformity import alignment, alignment_uniformity, uniformity
from .clip import clamp_logit_scale_, clip
from .cpc import cpc
from .dcl import dcl, dclw
from .debiased import debiased, hard_negative
from .deep_infomax import deep_infomax
from .info_nce import info_nce
from .matryoshka import matryoshka
from .mil_nce import mil_nce
from .mnrl import mnrl
from .moco import moco, moco_v3
from .nce import cmc, cmc_pairs, nce
from .nnclr import nearest_neighbors, nnclr
from .nt_xent import nt_xent, nt_xent_multi_view
from .siglip import siglip
from .sup_con import sup_con

__all__ = [
    "alignment",
    "alignment_uniformity",
    "clamp_logit_scale_",
    "clip",
    "cmc",
    "cmc_pairs",
    "cpc",
    "dcl",
    "dclw",
    "debiased",
    "deep_infomax",
    "hard_negative",
    "info_nce",
    "matryoshka",
    "mil_nce",
    "mnrl",
    "moco",
    "moco_v3",
    "nce",
    "nearest_neighbors",
    "nnclr",
    "nt_xent",
    "nt_xent_multi_view",
    "siglip",
    "sup_con",
    "uniformity",
]
