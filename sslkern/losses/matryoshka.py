"""Matryoshka as a module: around another loss, whose options stay with it."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..common.tensors import TensorOrTuple
from ..functional.matryoshka import checked_prefixes, loss_of_prefixes
from ..memory import FeatureQueue, MemoryBank


class MatryoshkaLoss(nn.Module):
    """A loss that also holds for prefixes of the features. Arguments and formula: `sslkern.functional.matryoshka`.

    Example:
        >>> criterion = sslkern.MatryoshkaLoss(sslkern.NTXentLoss(0.1), dims=[16, 32, 64])
        >>> loss = criterion(torch.randn(32, 64), torch.randn(32, 64))
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
        normalize: bool = True,
    ):
        super().__init__()
        self.dims, self.weights = checked_prefixes(loss, dims, weights, normalize)
        self.loss, self.normalize = loss, normalize
        if isinstance(loss, nn.Module) and any(isinstance(m, (FeatureQueue, MemoryBank)) for m in loss.modules()):
            raise TypeError("loss must not keep features of its own, which are not cut; give them to it as an argument")

    def forward(self, *features: Tensor | Sequence[Tensor], **options: Any) -> TensorOrTuple:
        return loss_of_prefixes(self.loss, self.dims, self.weights, self.normalize, *features, **options)

    def extra_repr(self) -> str:
        return f"dims={self.dims}"
