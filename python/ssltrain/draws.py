"""Random draws that belong to a sample: the same whichever other samples are in the batch, and in whichever process."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws(TorchFunctionMode):
    """While it is on, `torch.rand` draws for each sample from a stream of that sample, epoch and seed.

    The leading size of a draw is a multiple of `rows`, the numbers of the samples, as the views follow one another: the
    first of all samples, then the second ones. Each view has a stream of its own. `torch.randperm`, which draws one
    order for all, has the stream of `batch`. What else torch draws is drawn as ever.

    >>> with Draws(seed=0, epoch=3, batch=0, rows=torch.tensor([5, 7, 2])):
    ...     both = torch.rand(6, 4)
    >>> with Draws(seed=0, epoch=3, batch=0, rows=torch.tensor([7])):
    ...     assert torch.equal(torch.rand(2, 4), both[[1, 4]])
    """

    def __init__(self, seed: int, epoch: int, batch: int, rows: Tensor):
        super().__init__()
        self.samples = key(seed, epoch, 0, rows.numpy())
        self.batch = key(seed, epoch, 1, batch)
        self.views: dict[int, np.ndarray] = {}  # the streams of that many views of each sample
        self.drawn = 0  # of each stream

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.rand:
            return self._rand(*args, **kwargs or {})
        if func is torch.randperm:
            return self._randperm(*args, **kwargs or {})
        return func(*args, **kwargs or {})

    def _rand(self, *size, dtype: torch.dtype | None = None, device=None) -> Tensor:
        first, *rest = size if isinstance(size[0], int) else size[0]
        views, over = divmod(first, len(self.samples))
        if over:
            raise RuntimeError(
                f"torch.rand draws {first} rows for {len(self.samples)} samples; draw as many for each of them."
            )
        if views not in self.views:
            self.views[views] = np.concatenate([key(self.samples, view) for view in range(views)])
        bits = self._next(self.views[views], math.prod(rest))
        dtype = dtype or torch.get_default_dtype()
        if dtype == torch.float64:
            uniform = torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)
        else:
            uniform = torch.from_numpy((bits >> np.uint64(40)).astype(np.float32)) * 2.0**-24
        return _to(uniform.view(first, *rest).to(dtype), device)

    def _randperm(self, n: int, dtype: torch.dtype = torch.int64, device=None) -> Tensor:
        order = self._next(self.batch, n)[0].argsort()
        return _to(torch.from_numpy(order).to(dtype), device)

    def _next(self, streams: np.ndarray, count: int) -> np.ndarray:
        """uint64 [streams, count]: SplitMix64 (Steele, Lea and Flood 2014), each stream from its own start."""
        places = np.arange(self.drawn + 1, self.drawn + 1 + count, dtype=np.uint64)
        self.drawn += count
        return _mix(streams[:, None] + GOLDEN * places)


def key(*parts: int | np.ndarray) -> np.ndarray:
    """uint64 [N]: a start for a stream of its own, for each of the numbers of a part that has N."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix(key + GOLDEN + np.asarray(part).astype(np.uint64))
    return key


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _to(drawn: Tensor, device) -> Tensor:
    """On the device, without waiting for the work that is queued there."""
    device = torch.device(device or "cpu")
    if device.type == "cuda":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)
