"""Contrastive losses that never store the similarity matrix.

loss = sslkern.functional.nt_xent(z0, z1, temperature=0.5)   # or sslkern.NTXentLoss(temperature=0.5)(z0, z1)
"""

from . import functional, ops
from .backends import use_backend
from .losses import DeepInfoMaxLoss, InfoNCELoss, NTXentLoss, SigLIPLoss
from .memory import FeatureQueue

__version__ = "0.1.0"
__all__ = [
    "DeepInfoMaxLoss",
    "FeatureQueue",
    "InfoNCELoss",
    "NTXentLoss",
    "SigLIPLoss",
    "functional",
    "ops",
    "use_backend",
]
