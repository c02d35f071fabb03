"""What the calls into the native module share: it takes dense tensors, and writes into tensors that are there."""

import torch
from torch import Tensor

from ..problem import Problem

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/dtype.h


def native(problem: Problem, sizes: tuple[int, ...], kept: Tensor | None = None) -> tuple:
    """The problem and its sizes as the native functions take them. kept: [G, kept_rows, M], scores for the backward."""
    rows = 0 if kept is None else kept.shape[-2]
    return CODES[problem.q.dtype], *sizes, *problem.contiguous(), kept, rows


def new(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(*shape or ((),), dtype=torch.float32)  # numbers cost half of what a tuple does
