"""Contrastive losses that never store the similarity matrix.

loss = sslkern.functional.nt_xent(z0, z1, temperature=0.5)   # or sslkern.NTXentLoss(temperature=0.5)(z0, z1)
"""

from . import distributed, functional, ops
from .backends import use_backend
from .cached import CachedLoss
from .losses import (
    AlignmentUniformityLoss,
    CLIPLoss,
    CMCLoss,
    CPCLoss,
    DCLLoss,
    DCLWLoss,
    DebiasedLoss,
    DeepInfoMaxLoss,
    HardNegativeLoss,
    InfoNCELoss,
    MatryoshkaLoss,
    MILNCELoss,
    MoCoLoss,
    MoCoV3Loss,
    MultipleNegativesRankingLoss,
    NCELoss,
    NNCLRLoss,
    NTXentLoss,
    NTXentMultiViewLoss,
    SigLIPLoss,
    SupConLoss,
)
from .memory import CrossBatchMemory, FeatureQueue, MemoryBank

__version__ = "0.1.0"
__all__ = [
    "AlignmentUniformityLoss",
    "CLIPLoss",
    "CMCLoss",
    "CPCLoss",
    "CachedLoss",
    "CrossBatchMemory",
    "DCLLoss",
    "DCLWLoss",
    "DebiasedLoss",
    "DeepInfoMaxLoss",
    "FeatureQueue",
    "HardNegativeLoss",
    "InfoNCELoss",
    "MILNCELoss",
    "MatryoshkaLoss",
    "MemoryBank",
    "MoCoLoss",
    "MoCoV3Loss",
    "MultipleNegativesRankingLoss",
    "NCELoss",
    "NNCLRLoss",
    "NTXentLoss",
    "NTXentMultiViewLoss",
    "SigLIPLoss",
    "SupConLoss",
    "distributed",
    "functional",
    "ops",
    "use_backend",
]
