"""`similarity_lse` of rows that are spread over ranks: q is this rank's, and its keys are those of all ranks.

A rank computes blocks of S, each of its own rows and the keys of some ranks, by the primitive of one process; what
comes out is merged in the order of the ranks. Sums over a column end at the rank whose key it is.

    q with k        every rank all of its rows; dk goes back to the ranks whose keys they are
    q with itself   S is symmetric: a block gives the rows of both of its ranks, and every pair of ranks is computed
                    once. In the backward the row sums of both and their gradients are known, and
                        dz_i = scale sum_j (g_i exp(s_ij - row_i) + g_j exp(s_ij - row_j)) z_j
                    is a sum over the keys that belongs to the own row: either every rank computes all of its rows,
                    and no gradient travels, or every pair of ranks is computed once, and dz_j goes back to its rank;
                    which of them the cost model says.
    frozen keys     with the rows the mean of their keys is accumulated, of which the gradient is made

With a bias or a limit S of q with itself is not symmetric, and goes the first way.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import chosen, load, resolve, use_backend
from ..backends.problem import Problem, full_scale_of, keys_of, tensors_of
from ..common.arguments import check_flags
from ..common.autocast import cat, stack
from ..common.node import Node, Operator, once
from ..common.tensors import TensorOrTuple, accumulator, needed, transformed, zeros_needed
from ..ops.problem import SCHEMA, checked_problem, empty_gradients, gradients_of, options
from ..ops.similarity_lse import frozen_backward, frozen_save
from .blocks import PLACE, Place, blocks, by_triangle, gathered, keys_for_all, place_of, shared, strategy_of
from .contract import gathered_rows
from .ranks import Ranks
from .schedule import ring, triangle


def similarity_lse(
    q: Tensor,
    k: Tensor | None = None,
    scale: float | Tensor = 1.0,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    pairs: str = "different",
    k_bias: Tensor | None = None,
    q_limit: Tensor | None = None,
    columns: bool = False,
    best: bool = False,
    ranks: Ranks | None = None,
) -> TensorOrTuple:
    """`ops.similarity_lse` over the keys of all ranks.

    Args:
        q, k, scale, q_ids, k_ids, pairs, k_bias, q_limit, columns, best: as there, each with this rank's rows, as have
            the results. Ids are compared over all ranks.
        ranks: how the keys (of k=None the rows) are spread. None: this process has all.
    """
    if ranks is None:
        given: dict[str, Any] = dict(q_ids=q_ids, k_ids=k_ids, pairs=pairs, k_bias=k_bias, q_limit=q_limit)
        return ops.similarity_lse(q, k, scale, **given, columns=columns, best=best)
    problem = checked_problem(q, k, scale, q_ids, k_ids, pairs, k_bias, q_limit)
    check_flags(columns=columns, best=best)
    if columns and k is None:
        raise ValueError("columns=True needs k: for q with itself the columns are the rows")
    keys_learn = any(x is not None and x.requires_grad for x in (k, k_bias)) or transformed()
    learns = keys_learn or any(x is not None and x.requires_grad for x in (q, problem.scale_tensor))
    learns = learns and (torch.is_grad_enabled() or transformed())
    place = *place_of(ranks, strategy_of(ranks, keys_of(problem), k is None)), chosen()
    col = None
    if learns and not (columns or keys_learn or k is None):
        row, _, best_scores = _frozen.way(True, *tensors_of(problem))(*problem, best, *place)
    else:
        row, col, best_scores, *_ = _lse.way(learns, *tensors_of(problem))(*problem, columns, best, learns, *place)
    found = (row, *(col,) * columns, *(best_scores,) * best)
    if len(found) == 1:
        return row
    return found


def _is_symmetric(problem: Problem) -> bool:
    return problem.k is None and problem.k_bias is None and problem.q_limit is None


def _given(problem: Problem) -> dict[str, Any]:
    """What a block has in common with all others."""
    pairs = "same" if problem.same else "different"
    return dict(scale=full_scale_of(problem), q_ids=problem.q_ids, pairs=pairs, q_limit=problem.q_limit)


# ---- the log-sum-exps ------------------------------------------------------------------------------------------------


def _forward(*inputs: Any) -> tuple[Tensor | None, ...]:
    *problem, columns, need_best, keep, group, counts, strategy, backend = inputs
    problem = Problem(*problem)
    q, keys, symmetric, itself = problem.q, keys_of(problem), _is_symmetric(problem), problem.k is None
    place = Place.of(keys, group, counts, strategy)
    N, columns = q.shape[-2], columns or symmetric
    order = ring(place.rank, place.size, results=columns)
    if symmetric:
        order = triangle(place.rank, place.size)
    everyones = shared(keys_for_all(problem), place)
    kept = (None,) * 3
    if keep and strategy != "ring":
        kept = everyones
    of_key = keys.new_empty(keys.shape[:-1], dtype=accumulator(q))
    results = columns * (1 + need_best) * [of_key]
    own: dict[int, Sequence[Tensor]] = {}  # by rank: of the rows over its keys
    theirs: dict[int, Sequence[Tensor]] = {}  # and of the keys over its rows

    with torch.no_grad(), use_backend(backend):
        for block in blocks(place, order, everyones, itself, results, theirs.__setitem__):
            k, k_ids, k_bias = block.tensors
            if itself and block.first == place.rank:
                k = k_ids = None
            both = columns and k is not None
            out = ops.similarity_lse(q, k, **_given(problem), k_ids=k_ids, k_bias=k_bias, columns=both, best=need_best)
            sums, best = parts(out, need_best)
            own[block.first] = (sums[0], *(x[..., :N] for x in best))
            if both:
                block.results = (sums[1], *(x[..., N:] for x in best))
        if symmetric:  # what others computed for these keys belongs to the same rows
            own |= theirs
        row, best = merged(own, need_best)
        if not columns or symmetric:
            return row, None, best, *kept
        col, col_best = merged(theirs, need_best)
        if best is not None and col_best is not None:
            best = cat((best, col_best), -1)
        return row, col, best, *kept


def parts(out: Tensor | tuple[Tensor, ...], need_best: bool) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The log-sum-exps, and the best scores, of what the primitive returned."""
    if not isinstance(out, tuple):
        return [out], []
    if not need_best:
        return out, []
    return out[:-1], out[-1:]


def merged(partials: Mapping[int, Sequence[Tensor]], need_best: bool) -> tuple[Tensor, Tensor | None]:
    """The log-sum-exps and best scores over all keys from those over the keys of some ranks, in the order of these."""
    lse, *bests = zip(*(partials[rank] for rank in sorted(partials)), strict=True)
    best = None
    if need_best:
        best = stack(bests[0]).amax(0)
    if len(lse) == 1:
        return lse[0], best
    return stack(lse).logsumexp(0), best


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    *problem, columns, need_best, keep, group, counts, strategy, backend = inputs
    problem = Problem(*problem)
    q, keys = problem.q, keys_of(problem)
    row = q.new_empty(q.shape[:-1], dtype=accumulator(q))
    of_both = (*q.shape[:-2], q.shape[-2] + columns * keys.shape[-2])
    col, best = empty_gradients(q, (columns, keys.shape[:-1]), (need_best, of_both))
    M = gathered_rows(keys.shape[-2], counts, group)
    kept = []
    for x in keys_for_all(problem):
        if x is None or not keep or strategy == "ring":
            kept.append(row.new_empty(0))
        else:
            kept.append(x.new_empty(*keys.shape[:-2], M, *x.shape[keys.ndim - 1 :]))
    return row, col, best, *kept


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...]) -> None:
    *problem, ctx.columns, _, _, ctx.group, ctx.counts, ctx.strategy, ctx.backend = inputs
    row, col, _, *everyones = outputs
    problem = Problem(*problem)
    ctx.scale, ctx.same = problem.scale, problem.same
    there = [own is not None and ctx.strategy != "ring" for own in keys_for_all(problem)]
    ctx.save_for_backward(*tensors_of(problem), row, *needed([ctx.columns, *there], col, *everyones))


def _backward(ctx: Any, g: Tensor | None, h: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if not ctx.columns:
        h = None
    if g is None and h is None:
        return (None,) * 16
    *tensors, row, col, keys, ids, bias = ctx.saved_tensors
    problem = Problem.of(tensors, ctx.scale, ctx.same)
    need_q, need_k, need_scale, _, _, _, _, need_bias, *_ = ctx.needs_input_grad
    row, col = needed([g is not None, h is not None], row, col)
    with torch.no_grad():
        place = ctx.group, ctx.counts, ctx.strategy
        inputs = *problem, row, col, g, h, keys, ids, bias, need_q, need_k, need_scale, need_bias, *place, ctx.backend
        dq, dk, dscale, dbias = _gradients.way_back(ctx, g, h)(*inputs)
        dq, dk, dscale = gradients_of(problem, dq, dk, dscale, need_q, need_k, need_scale)
        (dbias,) = needed([need_bias], dbias)
    dq, dk, dscale, dbias = once((g, h, *tensors), dq, dk, dscale, dbias)
    return dq, dk, dscale, None, None, None, None, dbias, *(None,) * 8


def _gradients_of(*inputs: Any) -> tuple[Tensor | None, ...]:
    *problem, row, col, g, h, keys, ids, bias = inputs[:-8]
    need_q, need_k, need_scale, need_bias, group, counts, strategy, backend = inputs[-8:]
    problem = Problem(*problem)
    q, symmetric, itself = problem.q, _is_symmetric(problem), problem.k is None
    place = Place.of(keys_of(problem), group, counts, strategy, backward=True)
    of_keys = [col, h]
    if symmetric:
        of_keys = [row, g]
    if strategy == "ring":
        everyones = [*keys_for_all(problem), *of_keys]
    else:  # the keys of all are there since the forward
        everyones = [keys, ids, bias, *gathered(of_keys, place)]
    dtype = accumulator(q)
    dscale = q.new_zeros((), dtype=dtype)
    dq, dk, dbias = zeros_needed(dtype, (need_q, q), (need_k and not itself, problem.k), (need_bias, problem.k_bias))
    met_once = symmetric and need_q and by_triangle(q, place)
    if itself:  # dk belongs to the same rows; where both of two ranks compute all of theirs, dq has all of it
        dk, need_k = dq, need_q and (met_once or not symmetric)
    results = [x for x, need in ((dk, need_k), (dbias, need_bias)) if need and x is not None]

    def arrive(_: int, theirs: Sequence[Tensor]) -> None:
        for x, their in zip(results, theirs, strict=True):
            x += their

    order = ring(place.rank, place.size, results=bool(results))
    if met_once:
        order = triangle(place.rank, place.size)
    with use_backend(backend):
        for block in blocks(place, order, everyones, itself, results, arrive):
            k, k_ids, k_bias, col, h = block.tensors
            if itself and block.first == place.rank:
                k = k_ids = col = h = None
            needs = dict(need_q=need_q, need_k=need_k, need_scale=need_scale, need_bias=need_bias)
            given = _given(problem) | dict(k_ids=k_ids, k_bias=k_bias)
            of_q, of_k, of_scale, of_bias = ops.similarity_lse_bwd(q, k, row, col, g, h, **given, **needs)
            if dq is not None and of_q is not None:
                dq += of_q
            if need_scale and of_scale is not None:
                twice = symmetric and not met_once and k is not None  # both of two ranks have all of it
                dscale.add_(of_scale, alpha=0.5 if twice else 1)
            block.results = [x for x, need in ((of_k, need_k), (of_bias, need_bias)) if need and x is not None]
            if k is None and dbias is not None and of_bias is not None:
                dbias += of_bias
            del of_q, of_k  # or two of each are held while the next block is computed
    dk, dscale = needed([not itself, need_scale], dk, dscale)
    return dq, dk, dscale, dbias


def _gradients_fake(*inputs: Any) -> tuple[Tensor, ...]:
    *problem, _, _, _, _, _, _, _, need_q, need_k, need_scale, need_bias, _, _, _, _ = inputs
    q, keys = inputs[0], keys_of(Problem(*problem))
    return empty_gradients(q, (need_q, q.shape), (need_k, keys.shape), (need_scale, ()), (need_bias, keys.shape[:-1]))


_lse = Node(
    Operator(
        f"similarity_lse_over_ranks({SCHEMA}, bool columns, bool need_best, bool keep, {PLACE}, str backend)"
        " -> (Tensor row, Tensor col, Tensor best, Tensor keys, Tensor ids, Tensor bias)",
        _forward,
        _fake,
    ),
    _save,
    _backward,
    outputs=2,
)
_gradients = Operator(
    f"similarity_lse_over_ranks_bwd({SCHEMA}, Tensor? row, Tensor? col, Tensor? g, Tensor? h, Tensor? keys,"
    f" Tensor? ids, Tensor? bias, bool need_q, bool need_k, bool need_scale, bool need_bias, {PLACE}, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)",
    _gradients_of,
    _gradients_fake,
)


# ---- rows only, with keys that need no gradient ----------------------------------------------------------------------


def _frozen_forward(*inputs: Any) -> tuple[Tensor | None, ...]:
    *problem, need_best, group, counts, strategy, backend = inputs
    problem = Problem(*problem)
    q, place = problem.q, Place.of(keys_of(problem), group, counts, strategy)
    everyones = shared(keys_for_all(problem), place)
    rows, row, mean = {}, None, None
    with torch.no_grad(), use_backend(backend):
        for block in blocks(place, ring(place.rank, place.size), everyones, False):
            k, k_ids, k_bias = block.tensors
            part = problem._replace(k=k, k_ids=k_ids, k_bias=k_bias)
            of = load(resolve("similarity_lse", q, frozen=True, **options(part)), "similarity_lse")
            lse, of_block, *best = of.similarity_lse_frozen_fwd(part, need_best)
            rows[block.first] = (lse, *best * need_best)
            row, mean = mean_of_both(row, mean, lse, of_block)
            del of_block
    return merged(rows, need_best)[0], mean, merged(rows, need_best)[1]


def mean_of_both(row: Tensor | None, mean: Tensor | None, lse: Tensor, of_block: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and the mean, which is overwritten, of the keys so far and those of a block, which has its share
    of it."""
    if row is None or mean is None:
        return lse, of_block
    both = torch.logaddexp(row, lse)
    share = (lse - both.masked_fill(both == -math.inf, 0)).exp().unsqueeze(-1)
    return both, mean.lerp_(of_block, share)


def _frozen_fake(*inputs: Any) -> tuple[Tensor, ...]:
    *_, need_best, _, _, _, _ = inputs
    q = inputs[0]
    row, mean = q.new_empty(q.shape[:-1], dtype=accumulator(q)), torch.empty_like(q, dtype=accumulator(q))
    return row, mean.contiguous(), *empty_gradients(q, (need_best, q.shape[:-1]))


def _backward_of_frozen(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads = frozen_backward(ctx, g)
    return *grads, *(None,) * 3


_frozen = Node(
    Operator(
        f"similarity_lse_frozen_over_ranks({SCHEMA}, bool need_best, {PLACE}, str backend)"
        " -> (Tensor row, Tensor mean, Tensor best)",
        _frozen_forward,
        _frozen_fake,
    ),
    frozen_save,
    _backward_of_frozen,
    outputs=1,
)
