"""The losses as modules: `NTXentLoss(temperature=0.1)(z0, z1)` is `functional.nt_xent(z0, z1, temperature=0.1)`."""

from .alignment_uniformity import AlignmentUniformityLoss
from .clip import CLIPLoss
from .cpc import CPCLoss
from .dcl import DCLLoss, DCLWLoss
from .debiased import DebiasedLoss, HardNegativeLoss
from .deep_infomax import DeepInfoMaxLoss
from .info_nce import InfoNCELoss
from .matryoshka import MatryoshkaLoss
from .mil_nce import MILNCELoss
from .mnrl import MultipleNegativesRankingLoss
from .moco import MoCoLoss, MoCoV3Loss
from .nce import CMCLoss, NCELoss
from .nnclr import NNCLRLoss
from .nt_xent import NTXentLoss, NTXentMultiViewLoss
from .siglip import SigLIPLoss
from .sup_con import SupConLoss

__all__ = [
    "AlignmentUniformityLoss",
    "CLIPLoss",
    "CMCLoss",
    "CPCLoss",
    "DCLLoss",
    "DCLWLoss",
    "DebiasedLoss",
    "DeepInfoMaxLoss",
    "HardNegativeLoss",
    "InfoNCELoss",
    "MILNCELoss",
    "MatryoshkaLoss",
    "MoCoLoss",
    "MoCoV3Loss",
    "MultipleNegativesRankingLoss",
    "NCELoss",
    "NNCLRLoss",
    "NTXentLoss",
    "NTXentMultiViewLoss",
    "SigLIPLoss",
    "SupConLoss",
]
