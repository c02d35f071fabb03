"""A problem of the similarity family as the kernels for Hopper take it: kernels/similarity.h."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem
from . import launch
from .launch import THREADS, Call, aligned, padded

EXTENT = 64  # as in kernels/similarity.h
MOST = 2**28  # rows: with those, kernels count partial sums in 32 bits


def lacks(x: Tensor, sizes: tuple[int, ...], limit: bool, programs: Iterable[tuple]) -> str | None:
    """Why features x cannot be served here by these of compile.PROGRAMS with their arguments, or None. The first to ask
    compiles them."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it has {x.dtype} kernels for other primitives only"
    if x.ndim == 3:
        return "it takes no groups"
    if limit:
        return "it takes no q_limit"
    if max(sizes) >= MOST:
        return f"it counts fewer than {MOST} rows"
    for program, *arguments in programs:
        reason = launch.missing(program, tuple(arguments), x.device.index or 0)
        if reason is not None:
            return reason
    return None


class Pairs(NamedTuple):
    """Queries and keys, and which pairs of them count; tensors that kernels may be told the addresses of."""

    q: Tensor  # [N, D], as `padded` makes it
    k: Tensor  # [M, D]; of q with itself q
    itself: bool
    scale_tensor: Tensor | None
    scale: float
    q_ids: Tensor | None
    k_ids: Tensor | None
    q_extents: Tensor | None  # [ceil(N / EXTENT), 2]
    k_extents: Tensor | None
    same: bool
    bias: Tensor | None
    diagonal: int = 0  # of q with itself query i is key i + diagonal

    @classmethod
    def of(cls, problem: Problem) -> "Pairs":
        """Of a problem without groups and limits, whose sizes are not 0."""
        itself, q = problem.k is None, padded(problem.q)
        k = q if itself else padded(problem.k)
        q_ids, k_ids = (None if x is None else x.contiguous() for x in (problem.q_ids, problem.k_ids))
        bias = None if problem.k_bias is None else aligned(problem.k_bias)
        q_extents, k_extents = _extents(q_ids, k_ids)
        if itself:
            k_ids, k_extents = q_ids, q_extents
        scale = problem.scale_tensor, problem.scale
        return cls(q, k, itself, *scale, q_ids, k_ids, q_extents, k_extents, problem.same, bias)

    @property
    def full_scale(self) -> float | Tensor:
        return self.scale if self.scale_tensor is None else self.scale * self.scale_tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, M, D."""
        return *self.q.shape[:1], *self.k.shape

    def words(self) -> tuple:
        """What launch.LAYOUTS calls a problem."""
        tensors = self.q_ids, self.k_ids, self.q_extents, self.k_extents, self.bias, self.scale_tensor
        addresses = (0 if x is None else x.data_ptr() for x in tensors)
        return *addresses, self.scale, *self.sizes, self.diagonal, self.itself, self.same

    def turned(self) -> "Pairs":
        """With keys for queries and queries for keys; a bias stays that of the former keys."""
        return self._replace(
            q=self.k, k=self.q, q_ids=self.k_ids, k_ids=self.q_ids,
            q_extents=self.k_extents, k_extents=self.q_extents,
        )  # fmt: skip

    def cut(self, first: int, stop: int, begin: int = 0) -> "Pairs":
        """The pairs of the queries from `first` to `stop`, multiples of EXTENT but for the last, with the keys from
        `begin` on, another."""
        rows, columns = slice(first, stop), slice(begin, None)
        blocks, others = slice(first // EXTENT, -(-stop // EXTENT)), slice(begin // EXTENT, None)

        def part(x: Tensor | None, where: slice) -> Tensor | None:
            return None if x is None else x[where]

        return self._replace(
            q=self.q[rows],
            k=self.k[columns],
            q_ids=part(self.q_ids, rows),
            k_ids=part(self.k_ids, columns),
            q_extents=part(self.q_extents, blocks),
            k_extents=part(self.k_extents, others),
            bias=part(self.bias, columns),
            diagonal=self.diagonal + first - begin,
        )


def _extents(q_ids: Tensor | None, k_ids: Tensor | None) -> tuple[Tensor | None, ...]:
    if q_ids is None:
        return None, None
    sizes = [0 if ids is None else len(ids) for ids in (q_ids, k_ids)]
    extents = [None if ids is None else ids.new_empty((-(-len(ids) // EXTENT), 2)) for ids in (q_ids, k_ids)]
    call = Call("similarity_extents", q_ids.device)
    addresses = (0 if x is None else x.data_ptr() for x in (q_ids, k_ids, *extents))
    call.launch("id_extents", sum(-(-size // THREADS) for size in sizes), *addresses, *sizes)
    return tuple(extents)
