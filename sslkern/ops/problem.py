"""The arguments that the primitives of the similarity family share: their checks, and their part of a schema."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..backends.problem import Problem, sizes_of
from ..common.arguments import FLOATS, check_choice, check_dense, check_devices, describe
from ..common.numbers import check_finite, constant, number, shown
from ..common.tensors import accumulator

# The fields of Problem, flat, as the dispatcher takes no others.
SCHEMA = (
    "Tensor q, Tensor? k, Tensor? scale_tensor, float scale, Tensor? q_ids, Tensor? k_ids, bool same, Tensor? k_bias,"
    " Tensor? q_limit"
)
FIELDS = len(Problem._fields)


def checked_problem(
    q: Tensor,
    k: Tensor | None,
    scale: float | Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    pairs: str,
    k_bias: Tensor | None,
    q_limit: Tensor | None,
) -> Problem:
    """The arguments of a primitive, as `similarity_lse` describes them, in the form that backends take."""
    check_dense("q", q)
    if not isinstance(q, Tensor) or q.ndim not in (2, 3):
        raise ValueError(f"q must be a tensor [N, D] or [G, N, D], not {describe(q)}")
    if q.dtype not in FLOATS:
        raise TypeError(f"q must be fp32, bf16, fp16 or fp64, not {q.dtype}; convert it with .float()")
    if k is None:
        keys = q
        if k_ids is not None:
            raise ValueError("k_ids must be None for k=None: q_ids serves both sides")
    else:
        keys = k
        check_dense("k", k)
        if not isinstance(k, Tensor) or k.ndim != q.ndim or k.shape[-1] != q.shape[-1] or k.shape[:-2] != q.shape[:-2]:
            wanted = (*q.shape[:-2], "M", q.shape[-1])
            raise ValueError(f"k must be a tensor {list(wanted)} to go with q {list(q.shape)}, not {describe(k)}")
        if k.dtype != q.dtype:
            raise TypeError(f"k must have the dtype of q, {q.dtype}, not {k.dtype}; convert one of them")
        if (q_ids is None) != (k_ids is None):
            raise ValueError("q_ids and k_ids go together: give both or neither")
    if isinstance(scale, Tensor):
        if scale.ndim != 0:
            raise ValueError(f"scale must be a number or a 0-d tensor, not {describe(scale)}")
        check_dense("scale", scale)
        if scale.dtype not in FLOATS:
            raise TypeError(f"scale must be floating point, not {scale.dtype}; convert it with .float()")
    else:
        check_finite("scale", scale, " or a 0-d tensor")
    check_choice("pairs", pairs, "different", "same")
    if pairs == "same" and q_ids is None:
        raise ValueError("pairs='same' needs q_ids: give the ids that pairs must share")
    vectors = ("q_ids", q_ids, q), ("k_ids", k_ids, keys), ("k_bias", k_bias, keys), ("q_limit", q_limit, q)
    for name, x, side in vectors:
        if x is None:
            continue
        check_dense(name, x)
        if not isinstance(x, Tensor) or (x.shape != side.shape[:-1] and x.shape != side.shape[-2:-1]):
            raise ValueError(f"{name} must be a tensor {list(side.shape[:-1])}, not {describe(x)}")
        if "ids" in name:
            if x.dtype != torch.int64:
                raise TypeError(f"{name} must be int64, not {x.dtype}; convert it with .long()")
        elif x.dtype not in FLOATS:
            raise TypeError(f"{name} must be floating point, not {x.dtype}; convert it with .float()")
    check_devices("q", q, k=k, scale=scale, q_ids=q_ids, k_ids=k_ids, k_bias=k_bias, q_limit=q_limit)
    if q_limit is not None and q_limit.requires_grad:
        raise ValueError("q_limit gets no gradient; pass q_limit.detach()")
    return _problem(q, k, scale, q_ids, k_ids, pairs == "same", k_bias, q_limit)


def checked_sign(sign: int) -> float:
    if number(sign) not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, not {shown(sign)}")
    return float(sign)


def per_row(name: str, x: float | Tensor | None, q: Tensor) -> Tensor | None:
    """x with the shape of q's rows and the type of the accumulators; None where it is 0."""
    shape = q.shape[:-1]
    if isinstance(x, Tensor):
        check_dense(name, x)
        if x.shape not in ((), shape, shape[-1:]) or (name == "weights" and x.ndim == 0):
            raise ValueError(f"{name} must be a tensor {list(shape)}, not {describe(x)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be floating point, not {x.dtype}; convert it with .float()")
        check_devices("q", q, **{name: x})
        return x.to(accumulator(q)).expand(shape)
    if x is None:
        return None
    x = check_finite(name, x, " or a tensor [N]")
    if torch.compiler.is_compiling():
        return constant(x, q, accumulator(q)).expand(shape)
    if x == 0:
        return None
    return torch.full(shape, x, dtype=accumulator(q), device=q.device)


def options(problem: Problem) -> dict[str, Any]:
    """What a backend is asked about it by `resolve`."""
    return dict(sizes=sizes_of(problem), bias=problem.k_bias is not None, limit=problem.q_limit is not None)


def scale_parts(scale: float | Tensor, q: Tensor) -> tuple[Tensor | None, float]:
    """A 0-d tensor in the type of the sums, or None, and a number, whose product is the scale."""
    if isinstance(scale, Tensor):
        return scale.to(accumulator(q)), 1.0
    if is_dynamo_compiling():
        return constant(scale, q, accumulator(q)), 1.0
    return None, float(scale)


def gradients_of(
    problem: Problem, dq: Tensor | Any, dk: Tensor | Any, dscale: Tensor | Any,
    need_q: bool, need_k: bool, need_scale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """What autograd takes of gradients in the type of the sums, dscale that of scale * scale_tensor, of which those
    that are needed are tensors; None for the others."""
    dtype = problem.q.dtype
    of_q = of_k = of_scale = None
    if need_q:
        of_q = dq.to(dtype)
    if need_k:
        of_k = dk.to(dtype)
    if need_scale:
        of_scale = dscale * problem.scale
    return of_q, of_k, of_scale


def empty_gradients(like: Tensor, *wanted: tuple[bool, tuple[int, ...]]) -> tuple[Tensor, ...]:
    """For the compiler: of each (needed, shape) a tensor in the type of the sums, empty where not needed."""
    return tuple(like.new_empty(shape if needed else 0, dtype=accumulator(like)) for needed, shape in wanted)


def _problem(
    q: Tensor, k: Tensor | None, scale: float | Tensor, q_ids: Tensor | None, k_ids: Tensor | None, same: bool,
    k_bias: Tensor | None, q_limit: Tensor | None,
) -> Problem:  # fmt: skip
    scale_tensor, scale = scale_parts(scale, q)
    if q_ids is None and k_bias is None and q_limit is None:
        return Problem(q, k, scale_tensor, scale)
    rows, columns = q.shape[:-1], q.shape[:-1]
    if k is not None:
        columns = k.shape[:-1]
    if q_ids is not None:
        q_ids = q_ids.expand(rows)
    if k_ids is not None:
        k_ids = k_ids.expand(columns)
    if k_bias is not None:
        k_bias = k_bias.to(accumulator(q)).expand(columns)
    if q_limit is not None:
        q_limit = q_limit.to(accumulator(q)).expand(rows)
    return Problem(q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit)
