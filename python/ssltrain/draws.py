"""Random draws that belong to a sample: the same whichever other samples are in the batch, and in whichever process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
BLOCK = 32  # numbers of each stream that are made at once, as calls cost more than numbers


class Draws:
    """While they are current, `rand` draws for each sample from a stream of that sample, epoch and seed.

    The leading size of a draw is a multiple of `rows`, the numbers of the samples, as the views follow one another: the
    first of all samples, then the second ones. Each view has a stream of its own. What is drawn once for all has the
    stream of `batch`.

    >>> with Draws(seed=0, epoch=3, batch=0, rows=torch.tensor([5, 7, 2])):
    ...     both = rand(6, 4)
    >>> with Draws(seed=0, epoch=3, batch=0, rows=torch.tensor([7])):
    ...     assert torch.equal(rand(2, 4), both[[1, 4]])
    """

    current: ClassVar[Draws | None] = None

    def __init__(self, seed: int, epoch: int, batch: int, rows: Tensor):
        self.rows = rows
        self.samples = key(seed, epoch, 0, rows.numpy())
        self.batch = _Streams(key(seed, epoch, 1, batch))
        self.views: dict[int, _Streams] = {}  # of that many views of each sample

    def __enter__(self) -> Draws:
        self.before, Draws.current = Draws.current, self
        return self

    def __exit__(self, *exception: object) -> None:
        Draws.current = self.before

    def rand(self, *size: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        first, *rest = size if isinstance(size[0], int) else size[0]
        views, over = divmod(first, len(self.samples))
        if over:
            raise RuntimeError(
                f"{first} rows are drawn for {len(self.samples)} samples; draw as many for each of them."
            )
        if views not in self.views:
            starts = [key(self.samples, views, view) for view in range(views)]
            self.views[views] = _Streams(np.concatenate(starts or [self.samples[:0]]))
        bits = self.views[views].next(math.prod(rest))
        dtype = dtype or torch.get_default_dtype()
        if dtype == torch.float64:
            uniform = torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)
        else:
            uniform = torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))
        return _to(uniform.view(first, *rest).to(dtype), device)

    def randperm(self, n: int, dtype: torch.dtype = torch.int64, device: torch.device | str | None = None) -> Tensor:
        return _to(torch.from_numpy(self.batch.next(n)[0].argsort()).to(dtype), device)


def rand(*size: int, device: torch.device | str | None = None) -> Tensor:
    """As `torch.rand`, by the current draws if there are some."""
    return (Draws.current or torch).rand(*size, device=device)


def rows(device: torch.device | str | None = None) -> Tensor:
    """int64 [B]: which rows of the training set the samples of the current batch are, of this process its own.

    With it a memory finds the place of a sample, and a method with labels its label.
    """
    if Draws.current is None:
        raise RuntimeError("no batch is current, so no rows are known; ask inside of `with Draws(...)`, as a step is.")
    return _to(Draws.current.rows, device)


def others(count: int, device: torch.device | str | None = None) -> Tensor:
    """int64 [count]: for each of so many images another one, drawn once for the batch; none is drawn twice.

    >>> (others(7) == torch.arange(7)).any()
    tensor(False)
    """
    around = (Draws.current or torch).randperm(count)
    return _to(torch.empty_like(around).scatter_(0, around, around.roll(1)), device)


def sampled(own: Tensor, size: int, count: int) -> Tensor:
    """int64 [B, 1 + count]: of a memory of `size` rows its `own` [B] for each sample, then others, with repetition.

    As `sslkern.MemoryBank.sample`, and the same whichever process has the sample.

    >>> sampled(torch.tensor([0, 1]), 2, 3)
    tensor([[0, 1, 1, 1],
            [1, 0, 0, 0]])
    """
    own = own.unsqueeze(1)
    other = (rand(len(own), count, device=own.device) * (size - 1)).long().clamp_max_(size - 2)
    return torch.cat([own, other.add_(other >= own)], 1)


def of_batch() -> int:
    """A number, 0 to 2^63, that is drawn once for the batch, in every process the same; 0 without current draws."""
    return int(Draws.current.batch.next(1)[0, 0] >> np.uint64(1)) if Draws.current else 0


def drawing() -> AbstractContextManager:
    """While this is on, `torch.rand` and `torch.randperm` draw by the current draws, too; all else costs 2 us more."""
    return _Drawing(Draws.current) if Draws.current else nullcontext()


class _Drawing(TorchFunctionMode):
    def __init__(self, draws: Draws):
        super().__init__()
        self.draws = draws

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.rand:
            func = self.draws.rand
        elif func is torch.randperm:
            func = self.draws.randperm
        return func(*args, **kwargs or {})


class _Streams:
    """SplitMix64 (Steele, Lea and Flood 2014), uint64, each stream from a start of its own."""

    def __init__(self, starts: np.ndarray):
        self.starts, self.used = starts, 0
        self.made = np.empty((len(starts), 0), np.uint64)

    def next(self, count: int) -> np.ndarray:
        """The next numbers of each, [streams, count]."""
        first, self.used = self.used, self.used + count
        made = self.made.shape[1]
        if self.used > made:
            places = np.arange(made + 1, max(self.used, made + BLOCK) + 1, dtype=np.uint64)
            self.made = np.concatenate([self.made, _mix(self.starts[:, None] + GOLDEN * places)], 1)
        return self.made[:, first : self.used]


def key(*parts: int | np.ndarray) -> np.ndarray:
    """uint64 [N]: a start for a stream of its own, for each of the numbers of a part that has N."""
    mixed = np.zeros(1, np.uint64)
    for part in parts:
        mixed = _mix(mixed + GOLDEN + np.asarray(part).astype(np.uint64))
    return mixed


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _to(drawn: Tensor, device: torch.device | str | None) -> Tensor:
    """On the device, without waiting for the work that is queued there."""
    device = torch.device(device or "cpu")
    if device.type == "cuda":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)
