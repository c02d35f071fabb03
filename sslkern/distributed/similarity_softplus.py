"""`similarity_softplus` of rows that are spread over ranks: q is this rank's, and its keys are those of all ranks.

Sums over a row's keys are added up over the blocks. What the gradients weigh is known in the backward only, where S is
computed again: two passes forward and back over what one process does in three, but nothing of all keys is held, and
what ranks make of their sums may differ.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import chosen, load, resolve, use_backend
from ..backends.problem import Problem, keys_of, tensors_of
from ..common.arguments import check_flags
from ..common.node import Node, Operator, once
from ..common.sums import total
from ..common.tensors import accumulator, needed, transformed, zeros_needed
from ..ops.problem import SCHEMA, checked_problem, checked_sign, empty_gradients, gradients_of, options, per_row
from .blocks import PLACE, Arrive, Block, Place, blocks, keys_for_all, none_arrive, place_of, shared, strategy_of
from .ranks import Ranks
from .schedule import ring


def similarity_softplus(
    q: Tensor,
    k: Tensor | None = None,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    weights: Tensor | None = None,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    pairs: str = "different",
    k_bias: Tensor | None = None,
    q_limit: Tensor | None = None,
    sign: int = 1,
    rows: bool = False,
    ranks: Ranks | None = None,
) -> Tensor:
    """`ops.similarity_softplus` over the keys of all ranks.

    Args:
        q, k, scale, bias, weights, q_ids, k_ids, pairs, k_bias, q_limit, sign, rows: as there, each with this rank's
            rows, as have the results: the sum is over this rank's q and everyone's k.
        ranks: how the keys (of k=None the rows) are spread. None: this process has all.
    """
    given: dict[str, Any] = dict(q_ids=q_ids, k_ids=k_ids, pairs=pairs, k_bias=k_bias, q_limit=q_limit)
    if ranks is None:
        return ops.similarity_softplus(q, k, scale, bias, weights, **given, sign=sign, rows=rows)
    problem = checked_problem(q, k, scale, **given)
    check_flags(rows=rows)
    sign, weights, bias = checked_sign(sign), per_row("weights", weights, q), per_row("bias", bias, q)
    if rows and weights is not None:
        raise ValueError("weights must be None with rows=True: multiply the rows that come back")
    learns = (q, k, problem.scale_tensor, bias, k_bias)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learns) or transformed()
    place = place_of(ranks, strategy_of(ranks, keys_of(problem), itself=False))
    sums = _rows.way(learns, *tensors_of(problem), bias)(*problem, bias, sign, *place, chosen())
    if rows:
        return sums
    if weights is not None:
        sums = sums * weights
    if q.ndim == 2:
        return total(sums)
    return sums.sum(-1)


def _of_blocks(
    problem: Problem,
    bias: Tensor | None,
    weights: Tensor | None,
    sign: float,
    needs: Sequence[bool],
    place: Place,
    results: Sequence[Tensor] = (),
    arrive: Arrive = none_arrive,
) -> Iterator[tuple[Block, tuple[Any, ...]]]:
    """The block of keys, and what the primitive makes of it."""
    itself, order = problem.k is None, ring(place.rank, place.size, results=bool(results))
    for block in blocks(place, order, shared(keys_for_all(problem), place), itself, results, arrive):
        k, k_ids, k_bias = block.tensors
        if itself and block.first == place.rank:
            k = k_ids = None
        part = problem._replace(k=k, k_ids=k_ids, k_bias=k_bias)
        backend = resolve("similarity_softplus", problem.q, **options(part))
        yield block, load(backend, "similarity_softplus").similarity_softplus_fwd(part, bias, weights, sign, *needs)


def _forward(*inputs: Any) -> Tensor:
    *problem, bias, sign, group, counts, strategy, backend = inputs
    problem = Problem(*problem)
    place = Place.of(keys_of(problem), group, counts, strategy)
    row = problem.q.new_zeros(problem.q.shape[:-1], dtype=accumulator(problem.q))
    with torch.no_grad(), use_backend(backend):
        for _, (_, of_block, *_) in _of_blocks(problem, bias, None, sign, (False,) * 5, place):
            row += of_block
    return row


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=accumulator(q))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *problem, bias, ctx.sign, ctx.group, ctx.counts, ctx.strategy, ctx.backend = inputs
    problem = Problem(*problem)
    ctx.scale, ctx.same = problem.scale, problem.same
    ctx.save_for_backward(*tensors_of(problem), bias)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, bias = ctx.saved_tensors
    problem = Problem.of(tensors, ctx.scale, ctx.same)
    needs = need_q, need_k, need_scale, need_bias, need_k_bias = [ctx.needs_input_grad[i] for i in (0, 1, 2, 9, 7)]
    with torch.no_grad():
        inputs = *problem, bias, g, ctx.sign, *needs, ctx.group, ctx.counts, ctx.strategy, ctx.backend
        dq, dk, dscale, dbias, dk_bias = _gradients.way_back(ctx, g)(*inputs)
        dq, dk, dscale = gradients_of(problem, dq, dk, dscale, need_q, need_k, need_scale)
        dk_bias, dbias = needed([need_k_bias, need_bias], dk_bias, dbias)
    dq, dk, dscale, dk_bias, dbias = once((g, *tensors, bias), dq, dk, dscale, dk_bias, dbias)
    return dq, dk, dscale, *(None,) * 4, dk_bias, None, dbias, *(None,) * 5


def _gradients_of(*inputs: Any) -> tuple[Tensor | None, ...]:
    *problem, bias, g, sign = inputs[:-9]
    need_q, need_k, need_scale, need_bias, need_k_bias, group, counts, strategy, backend = inputs[-9:]
    problem = Problem(*problem)
    q, keys, itself, dtype = problem.q, keys_of(problem), problem.k is None, accumulator(problem.q)
    place = Place.of(keys, group, counts, strategy, backward=True)
    dscale = q.new_zeros((), dtype=dtype)
    dq, dk = zeros_needed(dtype, (need_q, q), (need_k and not itself, keys))
    dbias, dk_bias = zeros_needed(dtype, (need_bias, bias), (need_k_bias, problem.k_bias))
    if itself:  # dk belongs to the same rows
        dk, need_k = dq, need_q
    results = [x for x, need in ((dk, need_k), (dk_bias, need_k_bias)) if need and x is not None]

    def arrive(_: int, theirs: Sequence[Tensor]) -> None:
        for x, their in zip(results, theirs, strict=True):
            x += their

    with use_backend(backend):
        needs = need_q, need_k, need_scale, need_bias, need_k_bias
        for block, (_, _, of_q, of_k, of_scale, of_bias, of_k_bias) in _of_blocks(
            problem, bias, g, sign, needs, place, results, arrive
        ):
            if need_q:
                dq += of_q
            if need_scale:
                dscale += total(of_scale)
            if need_bias:
                dbias += of_bias
            if need_k_bias and itself and block.first == place.rank:
                dk_bias += of_k_bias
            block.results = [x for x, need in ((of_k, need_k), (of_k_bias, need_k_bias)) if need]
            del of_q, of_k
    dk, dscale = needed([not itself, need_scale], dk, dscale)
    return dq, dk, dscale, dbias, dk_bias


def _gradients_fake(*inputs: Any) -> tuple[Tensor, ...]:
    problem, q = Problem(*inputs[:9]), inputs[0]
    keys, needs = keys_of(problem), inputs[-9:-4]
    shapes = q.shape, keys.shape, (), q.shape[:-1], keys.shape[:-1]
    return empty_gradients(q, *zip(needs, shapes, strict=True))


_rows = Node(
    Operator(
        f"similarity_softplus_over_ranks({SCHEMA}, Tensor? bias, float sign, {PLACE}, str backend) -> Tensor",
        _forward,
        _fake,
    ),
    _save,
    _backward,
)
_gradients = Operator(
    f"similarity_softplus_over_ranks_bwd({SCHEMA}, Tensor? bias, Tensor g, float sign, bool need_q, bool need_k,"
    f" bool need_scale, bool need_bias, bool need_k_bias, {PLACE}, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dscale, Tensor dbias, Tensor dk_bias)",
    _gradients_of,
    _gradients_fake,
)
