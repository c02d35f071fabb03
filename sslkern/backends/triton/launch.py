"""What the launchers of the similarity family share: a problem on its chip, and how it is cut into programs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..problem import Problem
from . import chips
from .configs import Config
from .tiles import Side, extent

LARGE = 2**22  # scores; from so many on it pays to know beforehand which tiles hold equal ids
TMA_FROM = 2**20  # scores; making a descriptor costs the host some microseconds


class Launch(NamedTuple):
    """A problem, and what all launches for it must know."""

    problem: Problem  # contiguous
    sizes: tuple[int, int, int, int]  # G, N, M, D
    itself: bool  # q with itself
    large: bool
    chip: chips.Chip

    @classmethod
    def of(cls, problem: Problem) -> "Launch":
        sizes = _, N, M, _ = problem.sizes
        chip = chips.of(problem.q.device)
        return cls(problem.contiguous(), sizes, problem.k is None, N * M >= LARGE, chip)

    @property
    def crowded(self) -> bool:
        """Whether a tile needs registers for more than products and exponentials."""
        problem = self.problem
        return problem.k_bias is not None or problem.q_limit is not None or not self.has_tma(problem.q, problem.keys)

    def has_tma(self, x: Tensor, y: Tensor) -> bool:
        """Whether tiles come through tensor descriptors, which take the addresses off the registers: on chips that have
        them, of one group with whole rows of 16 bytes, and in launches that hide the time the host takes to make
        them."""
        if not self.chip.large or self.sizes[0] > 1 or x.shape[-2] * y.shape[-2] < TMA_FROM:
            return False
        return all(side.data_ptr() % 16 == 0 and side.shape[-1] * side.element_size() % 16 == 0 for side in (x, y))

    def features(
        self, x: Tensor, y: Tensor, config: Config, products: Tensor | None = None
    ) -> tuple[Tensor | TensorDescriptor | None, ...]:
        """x and y as a kernel loads tiles of them; None where it reads their products."""
        if products is not None:
            return None, None
        if not self.has_tma(x, y):
            return x, y
        return _descriptor(x, config.BM, config.BD), _descriptor(y, config.BN, config.BD)

    def with_extents(self, x_side: Side, y_side: Side, config: Config, lse: bool = False) -> tuple[Side, ...]:
        """The sides with what tells a tile at a glance that it holds no equal ids, and with `lse` that its log-sum-exps
        are close."""
        return self._with_extents(x_side, config.BM, lse), self._with_extents(y_side, config.BN, lse)

    def _with_extents(self, side: Side, block: int, lse: bool) -> Side:
        if self.large and not self.problem.same:
            side = side._replace(ids_extent=extent(side.ids, block))
        if lse:
            side = side._replace(lse_extent=extent(side.lse, block))
        return side

    def split(self, blocks: int, programs: int, waves: int = 2) -> tuple[int, int]:
        """Blocks for each of how many splits, so that programs fill the chip about so often."""
        splits = min(blocks, max(1, (waves * self.chip.processors + programs // 2) // programs))
        each = triton.cdiv(blocks, splits)
        return each, triton.cdiv(blocks, each)


def _descriptor(x: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), list(block))


def precision(dtype: torch.dtype) -> str:
    """How fp32 features are multiplied: as torch.set_float32_matmul_precision says."""
    return "tf32" if chips.tf32(dtype) else "ieee"


def allocator(like: Tensor) -> Callable[..., Tensor | None]:
    """Makes fp32 tensors of a shape on the device of `like`, None where they are not needed."""

    def new(*shape: int, needed: bool = True) -> Tensor | None:
        if needed:
            return torch.empty(shape, dtype=torch.float32, device=like.device)
        return None

    return new


def width_of(matrix: Tensor | None) -> int:
    """How far apart the rows are in a matrix with a number for each pair; 0 without one."""
    return 0 if matrix is None else matrix.stride(0)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def viewed(x: Tensor | None, *shape: int) -> Tensor | None:
    return None if x is None else x.view(shape)


def sum_of_splits(parts: Tensor | None) -> Tensor | None:
    """The sum of the parts that splits have written, [splits, ..]."""
    if parts is None:
        return None
    if len(parts) == 1:
        return parts[0]
    return parts.sum(0)
