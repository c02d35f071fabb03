"""The losses as functions: check the arguments, compose primitives.

A loss is computed in the type of its features, with sums in fp32, and returned in fp32 (of fp64 both are fp64).
Features of several types, as queries in bf16 and a queue in fp32, are a TypeError that names one to convert; inside
`torch.autocast`, where an encoder returns such queries, they are computed in the widest of their types, as torch does
with what it does not round, and each gets its gradient in its own.
"""

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
