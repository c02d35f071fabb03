"""`similarity_topk` of rows that are spread over ranks: q is this rank's, and its keys are those of all ranks.

The n best of each block are merged into those so far. In the backward each block gives what is among its own keys.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import chosen, use_backend
from ..backends.problem import Problem, full_scale_of, keys_of, tensors_of
from ..common.autocast import cat
from ..common.node import Node, Operator, once
from ..common.numbers import check_size
from ..common.sums import total
from ..common.tensors import accumulator, map_given, needed, transformed
from ..ops.problem import SCHEMA, checked_problem, empty_gradients
from ..ops.similarity_topk import sum_by_key, sum_by_row
from .blocks import PLACE, Place, blocks, keys_for_all, place_of, shared, strategy_of
from .ranks import Ranks
from .schedule import ring


def similarity_topk(
    q: Tensor,
    k: Tensor | None,
    n: int,
    *,
    scale: float | Tensor = 1.0,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    pairs: str = "different",
    q_limit: Tensor | None = None,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.similarity_topk` over the keys of all ranks, of q [N, D].

    Args:
        q, k, n, scale, q_ids, k_ids, pairs, q_limit: as there, each with this rank's rows, as have the results. Indices
            are those of the key among all.
        ranks: how the keys (of k=None the rows) are spread. None: this process has all.
    """
    given: dict[str, Any] = dict(q_ids=q_ids, k_ids=k_ids, pairs=pairs, q_limit=q_limit)
    if ranks is None:
        return ops.similarity_topk(q, k, n, scale=scale, **given)
    problem, n = checked_problem(q, k, scale, k_bias=None, **given), check_size("n", n)
    if q.ndim != 2:
        raise ValueError(f"q must be [N, D] over ranks, not {list(q.shape)}; call it for each group")
    learns = (q, k, problem.scale_tensor)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learns) or transformed()
    place = place_of(ranks, strategy_of(ranks, keys_of(problem), itself=False))
    return _topk.way(learns, *tensors_of(problem))(*problem, n, *place, chosen())


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    *problem, n, group, counts, strategy, backend = inputs
    problem = Problem(*problem)
    q, itself = problem.q, problem.k is None
    place = Place.of(keys_of(problem), group, counts, strategy)
    everyones = shared(keys_for_all(problem)[:2], place)
    values = q.new_empty(len(q), 0, dtype=accumulator(q))
    index = torch.empty_like(values, dtype=torch.int64)
    pairs = "same" if problem.same else "different"
    given: dict[str, Any] = dict(scale=full_scale_of(problem), q_ids=problem.q_ids, q_limit=problem.q_limit)
    with torch.no_grad(), use_backend(backend):
        for block in blocks(place, ring(place.rank, place.size), everyones, itself):
            k, k_ids = block.tensors
            if itself and block.first == place.rank:
                k = k_ids = None
            value, at = ops.similarity_topk(q, k, n, **given, k_ids=k_ids, pairs=pairs)
            at = torch.where(at < 0, at, at + sum(place.counts[: block.first]))
            values, index = _best(cat((values, value), 1), torch.cat((index, at), 1), n)
    return values, index


def _best(values: Tensor, index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each row, of equal ones those of lower index; blocks come in no order of theirs."""
    index, order = index.sort(1)
    values, by_value = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values[:, :n], index.gather(1, by_value)[:, :n]


def _fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    q, n = inputs[0], inputs[9]
    values = q.new_empty((*q.shape[:-1], n), dtype=accumulator(q))
    return values, torch.empty_like(values, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    q, k, scale_tensor, ctx.scale, *_ = inputs
    _, ctx.group, ctx.counts, ctx.strategy, _ = inputs[9:]
    ctx.save_for_backward(q, k, scale_tensor, outputs[1])


def _backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 14
    q, k, scale_tensor, index = ctx.saved_tensors
    need_q, need_k, need_scale, *_ = ctx.needs_input_grad
    with torch.no_grad():
        inputs = q, k, index, g, need_q, need_k, need_scale, ctx.group, ctx.counts, ctx.strategy
        dq, dk, dscale = _gradients.way_back(ctx, g)(*inputs)
        scale = ctx.scale
        if scale_tensor is not None:
            scale = scale * scale_tensor
        dq, dk, dscale = needed((need_q, need_k, need_scale), dq, dk, dscale)
        dq, dk = map_given(lambda x: (x * scale).to(q.dtype), dq, dk)
        (dscale,) = map_given(lambda x: x * ctx.scale, dscale)
    dq, dk, dscale = once((g, q, k, scale_tensor), dq, dk, dscale)
    return dq, dk, dscale, *(None,) * 11


def _gradients_of(
    q: Tensor,
    k: Tensor | None,
    index: Tensor,
    g: Tensor,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
    group: str,
    counts: Sequence[int],
    strategy: str,
) -> tuple[Tensor | None, ...]:
    rows = q.to(accumulator(q))
    dq, dscale = torch.zeros_like(rows), rows.new_zeros(())
    if k is None:  # dk belongs to the same rows
        keys, dk, need_k = q, dq, need_q
    else:
        keys, dk = k, torch.zeros_like(k, dtype=rows.dtype)
    place = Place.of(keys, group, counts, strategy, backward=True)

    def arrive(_: int, theirs: Sequence[Tensor]) -> None:
        dk.add_(theirs[0])

    order = ring(place.rank, place.size, results=need_k)
    for block in blocks(place, order, shared([keys], place), False, need_k * [dk], arrive):
        of_block = block.tensors[0].to(rows.dtype)
        at = index - sum(place.counts[: block.first])
        # What is left out of this block comes last in a row, as it does in all.
        order_in_row = ((at < 0) | (at >= len(of_block))).sort(dim=1, stable=True)
        elsewhere, at = order_in_row.values, at.gather(1, order_in_row.indices)
        weight = g.gather(1, order_in_row.indices).masked_fill(elsewhere, 0)
        at = at.masked_fill(elsewhere, -1)
        if need_q or need_scale:
            by_row = sum_by_row(weight, at, elsewhere, of_block)
            dscale += total(by_row * rows)
        if need_k:
            block.results = [sum_by_key(weight, at, elsewhere, rows, of_block)]
        if need_q:
            dq += by_row
    return tuple(needed((need_q, need_k and k is not None, need_scale), dq, dk, dscale))


def _gradients_fake(
    q: Tensor, k: Tensor | None, index: Tensor, g: Tensor, need_q: bool, need_k: bool, need_scale: bool, *_: Any
) -> tuple[Tensor, ...]:
    keys = keys_of(Problem(q, k))
    return empty_gradients(q, (need_q, q.shape), (need_k, keys.shape), (need_scale, ()))


_topk = Node(
    Operator(
        f"similarity_topk_over_ranks({SCHEMA}, SymInt n, {PLACE}, str backend) -> (Tensor values, Tensor indices)",
        _forward,
        _fake,
    ),
    _save,
    _backward,
    outputs=1,
)
_gradients = Operator(
    f"similarity_topk_over_ranks_bwd(Tensor q, Tensor? k, Tensor index, Tensor g, bool need_q, bool need_k,"
    f" bool need_scale, {PLACE}) -> (Tensor dq, Tensor dk, Tensor dscale)",
    _gradients_of,
    _gradients_fake,
)
