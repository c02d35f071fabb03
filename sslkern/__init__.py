"""Contrastive losses that never store the similarity matrix.

loss = sslkern.functional.nt_xent(z0, z1, temperature=0.5)   # or sslkern.NTXentLoss(temperature=0.5)(z0, z1)
"""

from . import functional, ops
from .backends import use_backend
from .losses import CPCLoss, InfoNCELoss, MultipleNegativesRankingLoss, NTXentLoss
from .memory import FeatureQueue

__version__ = "0.1.0"
__all__ = [
    "CPCLoss",
    "FeatureQueue",
    "InfoNCELoss",
    "MultipleNegativesRankingLoss",
    "NTXentLoss",
    "functional",
    "ops",
    "use_backend",
]
