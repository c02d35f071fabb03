"""What the primitives of the similarity family are asked about, as `Similarity` in csrc/cpu/similarity.h."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..common.tensors import map_given

# Functions, as the compiler of torch 2.6 knows no properties of a named tuple.


def keys_of(problem: "Problem") -> Tensor:
    """k, or q itself."""
    return problem.q if problem.k is None else problem.k


def sizes_of(problem: "Problem") -> tuple[int, int, int, int]:
    """G (1 without groups), N, M, D."""
    q, k = problem.q, problem.k
    G, N, D = q.shape if q.ndim == 3 else (1, *q.shape)
    M = N if k is None else k.shape[-2]
    return G, N, M, D


def full_scale_of(problem: "Problem") -> float | Tensor:
    return problem.scale if problem.scale_tensor is None else problem.scale * problem.scale_tensor


def tensors_of(problem: "Problem") -> tuple[Tensor | None, ...]:
    """What autograd saves: all but `scale` and `same`."""
    q, k, scale_tensor, _, q_ids, k_ids, _, k_bias, q_limit = problem
    return q, k, scale_tensor, q_ids, k_ids, k_bias, q_limit


class Problem(NamedTuple):
    """The scores s_ij = scale * scale_tensor * <q_i, k_j> + k_bias_j, and which of them count.

    G groups are problems of their own; without them the first dimension of everything is missing. Scales, biases and
    limits are in the type of the sums, fp32 (fp64).
    """

    q: Tensor  # [G, N, D]
    k: Tensor | None = None  # [G, M, D]; None: the rows of q with each other
    scale_tensor: Tensor | None = None  # 0-d; None: 1
    scale: float = 1.0
    q_ids: Tensor | None = None  # int64 [G, N]; pairs with equal ids are left out
    k_ids: Tensor | None = None  # int64 [G, M]; None where there is no k: q_ids
    same: bool = False  # those with different ids are left out instead
    k_bias: Tensor | None = None  # [G, M]; -inf takes a column out
    q_limit: Tensor | None = None  # [G, N]; pairs with s_ij > q_limit_i are left out

    keys = property(keys_of)
    sizes = property(sizes_of)
    tensors = property(tensors_of)
    full_scale = property(full_scale_of)

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], scale: float, same: bool) -> "Problem":
        q, k, scale_tensor, q_ids, k_ids, k_bias, q_limit = tensors
        return cls(q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit)

    def contiguous(self) -> "Problem":
        """With every tensor dense and row-major."""
        return Problem.of(map_given(Tensor.contiguous, *self.tensors), self.scale, self.same)
