"""`sampled_similarity`: the scores of each query with some rows of a bank, which are never gathered.

With j = index_it and g = dL/dout:

    out_it = <q_i, bank_j>      dq_i = sum_t g_it bank_j      dbank_j = sum_{it: index_it = j} g_it q_i
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import load, resolve
from ..backends.problem import Problem, sizes_of
from ..common.arguments import FLOATS, check_dense, check_devices, check_flags, describe
from ..common.node import Node, Operator, once, outside_autograd
from ..common.tensors import accumulator, map_given, needed
from .problem import empty_gradients


def sampled_similarity(q: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """<q_i, bank[index_it]> for the rows of a bank that each query names; `[N, K, D]` is never built.

    Features are used as they are, not normalised. A row may be named more than once. On the CPU the bank is either
    read where it is named or streamed once as a product of which the named scores are picked, whichever is cheaper.

    Args:
        q: [N, D] or [G, N, D], fp32, bf16, fp16 or fp64. G problems are independent.
        bank: [M, D] or [G, M, D], the type of q.
        index: int64 [N, K] or [G, N, K], rows of bank. K is any, 0 too.

    Returns:
        The scores, of the shape of index, in fp32 (fp64).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        IndexError: an index is no row of bank (on the CPU; elsewhere as torch's own indexing).
        RuntimeError: the backend asked for by name cannot run this.
        NotImplementedError: on a second derivative.

    Example:
        >>> q, bank, index = torch.randn(8, 16), torch.randn(1000, 16), torch.randint(1000, (8, 50))
        >>> scores = sslkern.ops.sampled_similarity(q, bank, index)
        >>> torch.allclose(scores, (bank[index] @ q.unsqueeze(2)).squeeze(2), atol=1e-5)
        True
    """
    _check(q, bank, index)
    learns = torch.is_grad_enabled() and (q.requires_grad or bank.requires_grad)
    return _scores.way(learns, q, bank, index)(q, bank, index, _backend(q, bank, index))


def sampled_similarity_bwd(
    q: Tensor, bank: Tensor, index: Tensor, g: Tensor, *, need_q: bool = True, need_bank: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `sampled_similarity`, from the gradient g of its result: of q and of bank, in fp32 (fp64).

    A loss whose weights are known in the forward takes its gradient there with this, and keeps no bank for later.

    Raises:
        As `sampled_similarity`.

    Example:
        >>> q, bank, index = torch.randn(8, 16), torch.randn(1000, 16), torch.randint(1000, (8, 50))
        >>> dq, _ = sslkern.ops.sampled_similarity_bwd(q, bank, index, torch.ones(8, 50), need_bank=False)
        >>> torch.allclose(dq, bank[index].sum(1), atol=1e-4)
        True
    """
    _check(q, bank, index)
    check_dense("g", g)
    if not isinstance(g, Tensor) or g.shape != index.shape:
        raise ValueError(f"g must be a tensor {list(index.shape)} like index, not {describe(g)}")
    if g.dtype not in FLOATS:
        raise TypeError(f"g must be floating point, not {g.dtype}; convert it with .float()")
    check_devices("q", q, g=g)
    check_flags(need_q=need_q, need_bank=need_bank)
    q, bank, g = q.detach(), bank.detach(), g.detach().to(accumulator(q))
    inputs = q, bank, index, g
    dq, dbank = _gradients.way(*inputs)(*inputs, need_q, need_bank, _backend(q, bank, index))
    dq, dbank = needed((need_q, need_bank), dq, dbank)
    return dq, dbank


def _backend(q: Tensor, bank: Tensor, index: Tensor) -> str:
    sizes = sizes_of(Problem(q, bank))
    return resolve("sampled_similarity", q, sizes=sizes, n=index.shape[-1])


def _check(q: Tensor, bank: Tensor, index: Tensor) -> None:
    for name, x in (("q", q), ("bank", bank)):
        check_dense(name, x)
    if not isinstance(q, Tensor) or q.ndim not in (2, 3):
        raise ValueError(f"q must be a tensor [N, D] or [G, N, D], not {describe(q)}")
    if not isinstance(bank, Tensor) or bank.ndim != q.ndim or bank.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"bank must be a tensor [.., M, {q.shape[-1]}] to go with q {list(q.shape)}, not {describe(bank)}"
        )
    if bank.shape[:-2] != q.shape[:-2]:
        raise ValueError(f"bank must have the groups of q {list(q.shape)}, not {describe(bank)}")
    if q.dtype not in FLOATS:
        raise TypeError(f"q must be fp32, bf16, fp16 or fp64, not {q.dtype}; convert it with .float()")
    if bank.dtype != q.dtype:
        raise TypeError(f"bank must have the dtype of q, {q.dtype}, not {bank.dtype}; convert one")
    check_dense("index", index)
    if not isinstance(index, Tensor) or index.ndim != q.ndim or index.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"index must be an int64 tensor {[*q.shape[:-1], 'K']}, not {describe(index)}")
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, not {index.dtype}; convert it with .long()")
    check_devices("q", q, bank=bank, index=index)


def _forward(q: Tensor, bank: Tensor, index: Tensor, backend: str) -> Tensor:
    return load(backend, "sampled_similarity").sampled_similarity_fwd(q, bank, index)


def _fake(q: Tensor, bank: Tensor, index: Tensor, backend: str) -> Tensor:
    return q.new_empty(index.shape, dtype=accumulator(q))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, bank, index, ctx.backend = inputs
    ctx.save_for_backward(q, bank, index)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    q, bank, index = ctx.saved_tensors
    need_q, need_bank, *_ = ctx.needs_input_grad
    with outside_autograd():
        dq, dbank = _gradients.way_back(ctx, g)(q, bank, index, g, need_q, need_bank, ctx.backend)
        dq, dbank = map_given(lambda x: x.to(q.dtype), *needed((need_q, need_bank), dq, dbank))
    return *once((g, q, bank), dq, dbank), None, None


def _gradients_of(*inputs: Any) -> tuple[Tensor | None, ...]:
    *inputs, backend = inputs
    return load(backend, "sampled_similarity").sampled_similarity_bwd(*inputs)


def _gradients_fake(
    q: Tensor, bank: Tensor, index: Tensor, g: Tensor, need_q: bool, need_bank: bool, backend: str
) -> tuple[Tensor, ...]:
    return empty_gradients(q, (need_q, q.shape), (need_bank, bank.shape))


_scores = Node(
    Operator("sampled_similarity(Tensor q, Tensor bank, Tensor index, str backend) -> Tensor", _forward, _fake),
    _save,
    _backward,
)
_gradients = Operator(
    "sampled_similarity_bwd(Tensor q, Tensor bank, Tensor index, Tensor g, bool need_q, bool need_bank, str backend)"
    " -> (Tensor dq, Tensor dbank)",
    _gradients_of,
    _gradients_fake,
)
