"""What the launchers of the similarity family share: a problem on its chip, and how it is cut into programs."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..problem import Problem
from . import hardware
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
    chip: hardware.Hardware

    @classmethod
    def of(cls, problem: Problem) -> "Launch":
        sizes = _, N, M, _ = problem.sizes
        chip = hardware.of(problem.q.device)
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

    def features(self, x: Tensor, y: Tensor, config: Config) -> tuple:
        """x and y as a kernel loads tiles of them, and whether that is through tensor descriptors (TMA)."""
        if not self.has_tma(x, y):
            return x, y, False
        sides = (side.view(-1, side.shape[-1]) for side in (x, y))
        blocks = [config.BM, config.BD], [config.BN, config.BD]
        return *(TensorDescriptor.from_tensor(side, block) for side, block in zip(sides, blocks, strict=True)), True

    def with_extents(self, x_side: Side, y_side: Side, config: Config, lse: bool = False) -> tuple[Side, Side]:
        """The sides with what tells a tile at a glance that it holds no equal ids, and with `lse` that its log-sum-exps
        are close."""
        ids, sides = self.large and not self.problem.same, []
        for side, block in ((x_side, config.BM), (y_side, config.BN)):
            ids_extent, lse_extent = extent(side.ids, block) if ids else None, extent(side.lse, block) if lse else None
            sides.append(side._replace(ids_extent=ids_extent, lse_extent=lse_extent))
        return tuple(sides)

    def split(self, blocks: int, programs: int, waves: int = 2) -> tuple[int, int]:
        """Blocks for each of how many splits, so that programs fill the chip about so often."""
        splits = min(blocks, max(1, (waves * self.chip.processors + programs // 2) // programs))
        each = triton.cdiv(blocks, splits)
        return each, triton.cdiv(blocks, each)


def precision(dtype: torch.dtype) -> str:
    """How fp32 features are multiplied: as torch.set_float32_matmul_precision says."""
    return "tf32" if hardware.tf32(dtype) else "ieee"


def allocator(like: Tensor):
    """Makes fp32 tensors of a shape on the device of `like`."""
    return lambda *shape: torch.empty(shape, dtype=torch.float32, device=like.device)
