"""What the primitives of the similarity family are asked about, as `Similarity` in csrc/cpu/similarity.h."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..common.tensors import map_given


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

    @property
    def keys(self) -> Tensor:
        """k, or q itself."""
        return self.q if self.k is None else self.k

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """G (1 without groups), N, M, D."""
        G, N, D = self.q.shape if self.q.ndim == 3 else (1, *self.q.shape)
        return G, N, N if self.k is None else self.k.shape[-2], D

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd saves: all but `scale` and `same`."""
        q, k, scale_tensor, _, q_ids, k_ids, _, k_bias, q_limit = self
        return q, k, scale_tensor, q_ids, k_ids, k_bias, q_limit

    @property
    def full_scale(self) -> float | Tensor:
        return self.scale if self.scale_tensor is None else self.scale * self.scale_tensor

    @classmethod
    def of(cls, tensors: Sequence[Any], scale: float, same: bool) -> "Problem":
        q, k, scale_tensor, q_ids, k_ids, k_bias, q_limit = tensors
        return cls(q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit)

    def contiguous(self) -> "Problem":
        """With every tensor dense and row-major."""
        return Problem.of(map_given(Tensor.contiguous, *self.tensors), self.scale, self.same)


def _function(of: Any) -> Callable[[Problem], Any]:
    return of.fget


# The same as functions, as the compiler of torch 2.6 knows no properties of a named tuple.
keys_of: Callable[[Problem], Tensor] = _function(Problem.keys)
sizes_of: Callable[[Problem], tuple[int, int, int, int]] = _function(Problem.sizes)
tensors_of: Callable[[Problem], tuple[Tensor | None, ...]] = _function(Problem.tensors)
full_scale_of: Callable[[Problem], float | Tensor] = _function(Problem.full_scale)
