"""Multiple negatives ranking: Henderson et al., "Efficient Natural Language Response Suggestion", 2017."""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from functools import reduce as fold
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.arguments import FLOATS, check_choice, check_dense, describe
from ..common.autocast import cat, product, stack
from ..common.numbers import check_finite, shown
from ..common.rows import dots, unit
from ..common.sums import pair_loss, times
from ..common.tensors import TensorOrTuple, accumulator, transformed, wide
from ..distributed import Group, Ranks, copies, gather, pair_contrast_over, ranks_of, similarity_lse
from ..ops import logsumexp
from ..ops.pair_contrast import pair_contrast
from ._pairs import own_ids, row_and_best
from .checks import check_alike, check_features, check_ids, check_options, promoted, scale_of
from .formulas import beaten, logaddexp, reduce, tie

BLOCK = 2**20  # scores that a guide decides on at a time

# Who is contrasted with whom: 0 anchors, 1 positives, 2 hard negatives, which may be missing.
_DIRECTIONS = {
    "query_to_doc": ((0, 1), (0, 2)),
    "query_to_query": ((0, 0),),
    "doc_to_query": ((1, 0),),
    "doc_to_doc": ((1, 1), (1, 2)),
}
_TWO_WAY = {"query_to_doc", "doc_to_query"}


def mnrl(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | Sequence[Tensor] | None = None,
    temperature: float | Tensor = 0.05,
    *,
    logit_scale: float | Tensor | None = None,
    directions: Sequence[str] = ("query_to_doc",),
    partition: str = "joint",
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    margin: float | None = None,
    margin_strategy: str = "absolute",
    guide: Sequence[Tensor] | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    stats: bool = False,
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
) -> TensorOrTuple:
    """Multiple negatives ranking (section 4.4 of https://arxiv.org/abs/1705.00652), the loss of text retrieval.

    Each anchor (a query) has to find its positive (a document) among the documents of the batch: the positives of
    other anchors, and the hard negatives of all. N = 3, one hard negative each, `+` positive, `-` negative:

                  p0 p1 p2 | n0 n1 n2      a0 a1 a2        and with further directions:
               a0  +  -  - |  -  -  -          -  -        query_to_query
               a1  -  +  - |  -  -  -       -     -
               a2  -  -  + |  -  -  -       -  -
               p0     -  - |     -  -       +  -  -        doc_to_doc, doc_to_query
               p1  -     - |  -     -       -  +  -
               p2  -  -    |  -  -          -  -  +

    Row i is the loss of pair i: -log(exp(s_ii) / Z_i), where Z_i sums exp(s) of the positive and of all negatives in
    rows a_i and p_i of the directions asked for. All four are GTE's loss (https://arxiv.org/abs/2308.03281), without
    doc_to_query it is Qwen3-Embedding's (https://arxiv.org/abs/2506.05176, there with margin=0.1), and that with a
    `guide` and temperature=0.01 is GISTEmbed's (https://arxiv.org/abs/2402.16829).

    Args:
        anchor, positive: [N, D], row i of both belong together. fp32, bf16, fp16 or fp64.
        negatives: hard negatives, [N, H, D] or H tensors [N, D].
        temperature: divides the similarities: a nonzero number, or a tensor with one element that gets a gradient.
        logit_scale: multiplies the similarities instead and replaces `temperature`; already exponentiated.
        directions: of "query_to_doc" (always), "query_to_query", "doc_to_query", "doc_to_doc".
        partition: "joint", one Z_i over all directions; with doc_to_query the positive is in two of them and counts
            twice, as published. "per_direction": the mean of a loss for query_to_doc and one for doc_to_query.
        ids: int64 [N]; pairs with equal ids are not negatives of each other (a document's hash). Default: all differ.
        negative_ids: int64 [N, H]; a hard negative is none for the anchors with its id. Needs `ids`.
        margin: negatives more similar than the positive by over `margin` are taken for false ones and drop out:
            those with sim > sim_ii + margin, before the temperature. None: no filter, or 0 where there is a guide.
        margin_strategy: "absolute", or "relative": sim > sim_ii + margin * |sim_ii|.
        guide: features of anchors, positives and, if given, negatives from another model, of the same layout and any
            width. Their cosine similarity then decides which negatives drop out. It gets no gradient.
        normalize: divide all rows by their norm first (cosine similarity).
        reduction: "mean" or "sum" over the N pairs, or "none".
        stats: also return the share of pairs whose positive beats every negative; a tie is no win, as in `info_nce`.
        group, strategy, grad_reduce: the processes that share a batch, as in `nt_xent`. With a guide all features come
            together, whatever the strategy.

    Returns:
        The loss, 0-d, or for "none" [N], in fp32 (fp64). With `stats` a pair of it and the share, 0-d without
        gradient. A pair without negatives adds 0 and counts in the mean.

        Similarities are never stored; with a guide, which no kernel knows, blocks of 2^20 of them are, in plain
        torch, and computed anew in the backward where there is more than one.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> queries, documents = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32)
        >>> sslkern.functional.mnrl(queries, documents, negatives=torch.randn(64, 3, 32)).backward()
        >>> both = ("query_to_doc", "doc_to_query")
        >>> loss = sslkern.functional.mnrl(queries, documents, directions=both, partition="per_direction")
    """
    ranks = None
    if group is not None:
        given: dict[str, Any] = dict(anchor=anchor, positive=positive, negatives=negatives, temperature=temperature)
        given |= dict(logit_scale=logit_scale, directions=directions, partition=partition, ids=ids)
        given |= dict(negative_ids=negative_ids, margin=margin, margin_strategy=margin_strategy, guide=guide)
        options = dict(normalize=normalize, reduction=reduction, stats=stats)
        ranks = ranks_of(group, strategy, grad_reduce, "mnrl", **given, **options)
    if negatives is not None:
        negatives = _stacked("negatives", negatives)
    anchor, positive, negatives = promoted(anchor, positive, negatives)
    check_features("anchor", anchor, ranks)
    check_alike("positive", positive, "anchor", anchor)
    check_options(reduction, group, strategy, grad_reduce, normalize=normalize, stats=stats)
    scale = scale_of(temperature, logit_scale, anchor, ranks)
    check_directions(directions, partition)
    directions = [name for name in _DIRECTIONS if name in directions]  # a set has another order in each process
    _check_negatives(anchor, negatives, ids, negative_ids, directions)
    if guide is not None:
        guide = _checked_guide(guide, anchor, negatives)
    margin = checked_margin(margin, margin_strategy, scale, guide)

    two_way = _TWO_WAY <= set(directions)
    if negatives is None and margin is None and (partition == "per_direction" or len(directions) == 1):
        mode = "two_way" if two_way else "one_way"
        contrast = pair_contrast if ranks is None else pair_contrast_over(ranks)
        losses, toward, best = contrast(anchor, positive, scale, ids, mode, normalize, stats)
    else:
        features, hard = [anchor, positive], 0
        if negatives is not None:
            features, hard = [anchor, positive, negatives.flatten(0, 1)], negatives.shape[1]
        if normalize:
            features = [unit(x) for x in features]
        cosine = dots(*features[:2])
        toward = times(cosine, scale)
        limit = _limit(cosine, guide, margin, margin_strategy)
        batch = _Batch(features, hard, scale, ids, negative_ids, guide, limit, stats, ranks)
        terms = _terms(batch, directions)
        if partition == "joint":
            terms = {"all": [term for of_direction in terms.values() for term in of_direction]}
        negative = stack([fold(logaddexp, [row for row, _ in of_one]) for of_one in terms.values()])
        if partition == "joint" and two_way:  # the second positive, in rows with any negative
            negative = torch.where(negative == -math.inf, negative, logaddexp(negative, toward.expand_as(negative)))
        losses, best = pair_loss(negative, toward), None
        if stats:
            scores = ([top for _, top in of_one if top is not None] for of_one in terms.values())
            best = stack([fold(torch.maximum, of_one) for of_one in scores])
    loss = reduce(losses.mean(0), reduction, ranks=ranks)
    if best is not None:
        return loss, beaten(best, toward, tie(scale, anchor, positive, normalize), ranks)
    return loss


def _limit(cosine: Tensor, guide: list[Tensor] | None, margin: float | None, margin_strategy: str) -> Tensor | None:
    """What the similarities of a row's negatives must not exceed [N]."""
    if margin is None:
        return None
    similarity = cosine.detach() if guide is None else dots(*guide[:2])
    if margin_strategy == "relative":
        return similarity + margin * similarity.abs()
    return similarity + margin


class _Batch(NamedTuple):
    """What is contrasted, and how."""

    features: list[Tensor]  # [N, D] anchors, positives and, [N H, D], hard negatives
    hard: int  # H
    scale: float | Tensor
    ids: Tensor | None
    negative_ids: Tensor | None
    guide: list[Tensor] | None  # as features
    limit: Tensor | None
    stats: bool
    ranks: Ranks | None


def _terms(batch: _Batch, directions: Sequence[str]) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
    """Of each direction the log-sum-exps [N] over its negatives, and the best of them [N] with `stats`."""
    sides = {name: [side for side in _DIRECTIONS[name] if side[1] < len(batch.features)] for name in directions}
    terms: dict[str, list[tuple[Tensor, Tensor | None]]] = {name: [] for name in directions}
    if _TWO_WAY <= set(directions) and batch.limit is None:  # one pass for both
        row, column = _over_both(batch)
        terms["query_to_doc"].append(row)
        terms["doc_to_query"].append(column)
        sides["query_to_doc"].remove((0, 1))
        sides["doc_to_query"].remove((1, 0))
    for name in directions:
        terms[name] += [_over(batch, a, b) for a, b in sides[name]]
    return terms


def _over_both(batch: _Batch) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """Anchors over positives, and positives over anchors."""
    (q, k, *_), (q_ids, k_ids) = batch.features, _ids_of(batch, 0, 1)
    options: dict[str, Any] = dict(q_ids=q_ids, k_ids=k_ids, columns=True, best=batch.stats, ranks=batch.ranks)
    row, column, *best = similarity_lse(q, k, batch.scale, **options)
    if not batch.stats:
        return (row, None), (column, None)
    of_row, of_column = best[0].chunk(2)
    return (row, of_row), (column, of_column)


def _over(batch: _Batch, a: int, b: int) -> tuple[Tensor, Tensor | None]:
    """Rows a over rows b."""
    q, k, ranks = batch.features[a], batch.features[b], batch.ranks
    if b == 2:
        ranks = copies(ranks, batch.hard)
    q_ids, k_ids = _ids_of(batch, a, b)
    if batch.guide is not None:
        guide_q, guide_k = batch.guide[a], gather(batch.guide[b], ranks)
        if k_ids is not None:
            k_ids = gather(k_ids, ranks)
        left_out = partial(_above_limit, guide_k=guide_k, k_ids=k_ids)
        return masked_lse(q, gather(k, ranks), batch.scale, left_out, guide_q, batch.limit, q_ids)
    limit = batch.limit
    if limit is not None:
        limit = limit * (batch.scale.detach() if isinstance(batch.scale, Tensor) else batch.scale)
    if a == b:  # rows among themselves
        k = k_ids = None
    options = dict(q_ids=q_ids, k_ids=k_ids, q_limit=limit, ranks=ranks)
    return row_and_best(q, k, batch.scale, need_best=batch.stats, **options)


def _ids_of(batch: _Batch, a: int, b: int) -> tuple[Tensor | None, Tensor | None]:
    """The ids of rows a and rows b, equal where they are not negatives of each other."""
    if b < 2:
        ids = own_ids(batch.ids, batch.features[0], batch.ranks)
        return ids, ids
    if a == 1:  # all but its own hard negatives
        rows = own_ids(None, batch.features[0], batch.ranks)
        return rows, rows.repeat_interleave(batch.hard)
    if batch.negative_ids is None:
        return None, None
    return batch.ids, batch.negative_ids.flatten()


def _above_limit(guide_q: Tensor, limit: Tensor, q_ids: Tensor | None, guide_k: Tensor, k_ids: Tensor | None) -> Tensor:
    """Which pairs do not count: those that the guide finds more similar than `limit`, and those with equal ids."""
    out = product(guide_q, guide_k.T) > limit.unsqueeze(1)
    if q_ids is not None:
        out = out | (q_ids.unsqueeze(1) == k_ids)
    return out


def masked_lse(
    q: Tensor, k: Tensor, scale: float | Tensor, left_out: Callable[..., Tensor], *of_rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp [N] over the keys that count, and their best score [N], where no kernel can tell which do.

    left_out: a function of a block of the rows of `of_rows`, each [N, ..] or None, which returns a bool tensor of these
    rows by all keys. Of more than one block it is asked anew in the backward.
    """
    from torch.utils.checkpoint import checkpoint  # late: with it torch 2.6 imports sympy

    N, size = q.shape[0], max(1, BLOCK // max(1, k.shape[0]))
    block: Callable = _masked_block
    if N > size and not transformed():  # torch.func has no checkpoints
        block = partial(checkpoint, _masked_block, use_reentrant=False, preserve_rng_state=False)
    blocks = []
    for i in range(0, N, size) if N > size else (0,):  # a range ties compiled code to N
        rows = [None if x is None else x[i : i + size] for x in of_rows]
        blocks.append(block(q[i : i + size], k, scale, left_out, *rows))
    row, best = zip(*blocks, strict=True)
    return cat(row), cat(best)


def _masked_block(
    q: Tensor, k: Tensor, scale: float | Tensor, left_out: Callable[..., Tensor], *of_rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    s = (product(wide(q), wide(k).T) * scale).masked_fill(left_out(*of_rows), -math.inf)
    row = logsumexp(s)
    if s.shape[1] == 0:
        return row, row.detach()
    return row, s.detach().amax(1)


def _stacked(name: str, x: Tensor | Sequence[Tensor]) -> Tensor:
    """[N, H, D] of H tensors [N, D]."""
    if isinstance(x, Tensor):
        return x
    for i, y in enumerate(x if isinstance(x, Sequence) else ()):
        check_dense(f"{name}[{i}]", y)
    if not isinstance(x, Sequence) or not x or any(not isinstance(y, Tensor) or y.shape != x[0].shape for y in x):
        raise ValueError(f"{name} must be a tensor [N, H, D] or tensors [N, D], one for each hard negative of a row")
    x = promoted(*x)
    for i, y in enumerate(x):
        check_alike(f"{name}[{i}]", y, f"{name}[0]", x[0])
    return stack(x, 1)


def _check_negatives(
    anchor: Tensor,
    negatives: Tensor | None,
    ids: Tensor | None,
    negative_ids: Tensor | None,
    directions: Sequence[str],
) -> None:
    N, D = anchor.shape
    if negatives is not None:
        check_alike("negatives", negatives, "anchor", anchor, "[N, H, D]")
        if negatives.shape[:-2] != (N,):
            raise ValueError(f"negatives must be [{N}, H, {D}] or H tensors [{N}, {D}], not {describe(negatives)}")
    if ids is not None:
        check_ids("ids", ids, (N,), anchor)
    if negative_ids is not None:
        if ids is None or negatives is None:
            raise ValueError("negative_ids needs negatives and ids: the ids of the anchors to compare them with")
        if "doc_to_doc" in directions:
            raise ValueError("negative_ids cannot go with doc_to_doc, which leaves out negatives by their row")
        check_ids("negative_ids", negative_ids, tuple(negatives.shape[:2]), anchor)


def check_directions(directions: Sequence[str], partition: str) -> None:
    listed = isinstance(directions, Collection) and not isinstance(directions, (str, Tensor))
    named = listed and all(isinstance(name, str) for name in directions)
    known = named and set(directions) <= set(_DIRECTIONS)
    if not known or "query_to_doc" not in directions or len(set(directions)) < len(directions):
        names = ", ".join(map(repr, _DIRECTIONS))
        given = repr(list(directions)) if named else shown(directions)
        raise ValueError(f"directions must be some of {names}, 'query_to_doc' among them, not {given}")
    check_choice("partition", partition, "joint", "per_direction")
    if partition == "per_direction" and not set(directions) <= _TWO_WAY:
        raise ValueError(
            "partition='per_direction' needs directions that hold the positive: query_to_doc, doc_to_query"
        )


def checked_margin(
    margin: float | None, margin_strategy: str, scale: float | Tensor, guide: Sequence[Tensor] | None
) -> float | None:
    check_choice("margin_strategy", margin_strategy, "absolute", "relative")
    if margin is None:
        return None if guide is None else 0.0
    margin = check_finite("margin", margin, " or None")
    if guide is None and not isinstance(scale, Tensor) and scale < 0:
        raise ValueError("margin needs a positive temperature: with a negative one the most similar score lowest")
    return margin


def _checked_guide(guide: Sequence[Any], anchor: Tensor, negatives: Tensor | None) -> list[Tensor]:
    """The guide's features as unit rows in fp32 (fp64)."""
    names = ["anchors", "positives"] if negatives is None else ["anchors", "positives", "negatives"]
    if isinstance(guide, Tensor) or not isinstance(guide, Sequence) or len(guide) != len(names):
        raise ValueError(f"guide must be a sequence of the guide's features of {', '.join(names)}")
    guide = [_stacked("the guide's features of negatives", x) if i == 2 else x for i, x in enumerate(guide)]
    for name, x in zip(names, guide, strict=True):
        rows = negatives.shape[:2] if negatives is not None and name == "negatives" else anchor.shape[:1]
        check_dense("guide", x)
        if not isinstance(x, Tensor) or x.shape[:-1] != rows or x.shape[-1] != guide[0].shape[-1]:
            raise ValueError(f"guide must have features {[*rows, 'Dg']} for the {name}, not {describe(x)}")
        if x.dtype not in FLOATS or x.device != anchor.device:
            raise ValueError(f"guide must be floating point and on {anchor.device}, not {x.dtype} on {x.device}")
    return [unit(x.detach().to(accumulator(anchor))).flatten(0, -2) for x in guide]
