"""The losses of pairs in torch, which is as fast here as a kernel would be."""

from ..reference.pair_losses import pair_losses_bwd, pair_losses_fwd

__all__ = ["pair_losses_bwd", "pair_losses_fwd"]
