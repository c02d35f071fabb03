"""What the calls into the native module share: it takes dense tensors, and writes into tensors that are there."""

import torch
from torch import Tensor

from ..problem import Problem

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/dtype.h


def native(problem: Problem, sizes: tuple[int, ...], kept: Tensor | None = None) -> tuple:
    """The problem and its sizes as the native functions take them. kept: [G, kept_rows, M], scores for the backward."""
    q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit = problem
    kept_rows = 0
    if kept is not None:
        kept_rows = kept.shape[-2]
    return (
        CODES[q.dtype],
        *sizes,
        q.contiguous(),
        k if k is None else k.contiguous(),
        scale_tensor if scale_tensor is None else scale_tensor.contiguous(),
        scale,
        q_ids if q_ids is None else q_ids.contiguous(),
        k_ids if k_ids is None else k_ids.contiguous(),
        same,
        k_bias if k_bias is None else k_bias.contiguous(),
        q_limit if q_limit is None else q_limit.contiguous(),
        kept,
        kept_rows,
    )


def new(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(*shape or ((),), dtype=torch.float32)  # numbers cost half of what a tuple does


def new_needed(like: Tensor, *results: tuple[bool, tuple[int, ...]]) -> list[Tensor | None]:
    """Of each (needed, shape) a tensor for the result, None where it is not needed."""
    return [new(like, *shape) if needed else None for needed, shape in results]
