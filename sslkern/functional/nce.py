"""Losses against a memory bank: instance discrimination (Wu et al. 2018) and contrastive multiview coding (Tian 2019).

Of a query's logits l_0 (positive), l_1 ... l_K (negatives) over a bank of M rows, with u_k = l_k - log Z - log(K / M):

    "nce"       loss = softplus(-u_0) + sum_k softplus(u_k)     dl_0 = -sigmoid(-u_0)     dl_k = sigmoid(u_k)
    "softmax"   loss = softplus(logsumexp_k l_k - l_0)          dl_0 = exp(-loss) - 1     dl_k = exp(l_k - l_0 - loss)
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.arguments import check_choice, check_dense, check_devices, describe
from ..common.autocast import stack
from ..common.node import Node, once
from ..common.numbers import check_size, log
from ..common.rows import unit
from ..common.sums import pair_loss, pieces, softplus, times, total
from ..common.tensors import TensorOrTuple, transformed
from ..distributed import (
    Group,
    Ranks,
    Shard,
    all_rows,
    ranks_of,
    replicated,
    rows_and_shard,
    sampled_similarity,
    sampled_similarity_bwd,
    with_rows,
)
from .checks import check_alike, check_features, check_options, check_weights, promoted, scalar, scale_of
from .formulas import beaten, log_total_of, reduce, rows_of_views

FORMS = ("nce", "softmax")
GRAPHS = ("core", "full")


def nce(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    form: str = "nce",
    log_z: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    stats: bool = False,
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
) -> TensorOrTuple:
    """Instance discrimination with a memory bank (https://arxiv.org/abs/1805.01978): which row of the bank is mine?

    With logits `l_k = <query_i, bank[index_ik]> / temperature`, the positive at k = 0, and K sampled negatives:

        "nce"       loss_i = -log h_0 - sum_k log(1 - h_k),   h_k = P_k / (P_k + K / M),   P_k = exp(l_k) / Z  (eq. 4-7)
        "softmax"   loss_i = -log(exp(l_0) / sum_k exp(l_k))

                  bank 0  1  2  3  4  5
        query 0        +     -        -     + positive, - negative; the others were not sampled
        query 1           -  -  +

    The bank may be updated before the backward: the gradient is computed in the forward.

    Args:
        query: [N, D], fp32, bf16, fp16 or fp64.
        bank: [M, D], in the type of query, inside autocast in any. A gradient is computed where it is wanted.
        index: int64 [N, 1 + K], rows of bank, the positive first. `MemoryBank.sample` draws it.
        temperature: divides the similarities: a nonzero number, or a tensor with one element that gets a gradient.
        form: "nce" or "softmax".
        log_z: log Z of the form "nce", a number or a 0-d tensor without gradient. None: estimated from this batch as
            log(M mean exp(l)), eq. 8; the paper keeps the estimate of the first one, as `NCELoss` does.
        logit_scale: multiplies the similarities instead and replaces `temperature`; already exponentiated.
        weights: [N], of the samples; the mean is sum w l / sum w.
        normalize: divide the queries by their norm first. Rows of the bank are used as they are.
        reduction: "mean" or "sum" over the N queries, or "none".
        stats: also return the share of queries whose positive beats every sampled negative; a tie is no win.
        group, strategy, grad_reduce: the processes that share a batch, as in `nt_xent`. The bank is the same on all of
            them, as `MemoryBank(..., group=...)` keeps it, and nothing but sums is exchanged; or each has a part of
            it, of `MemoryBank(..., group=..., sharded=True)`, and queries are, with the scores of the named rows.

    Returns:
        The loss, 0-d, or for "none" [N], in fp32 (fp64). With `stats` a pair of it and the share, 0-d without gradient.
        Without negatives (K = 0) the loss is 0.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.
        IndexError: an index is no row of bank.

    Example:
        >>> bank = torch.nn.functional.normalize(torch.randn(1000, 32), dim=1)
        >>> query, index = torch.randn(8, 32, requires_grad=True), torch.randint(1000, (8, 1 + 100))
        >>> sslkern.functional.nce(query, bank, index).backward()
    """
    loss, share, _ = nce_and_log_z(
        query,
        bank,
        index,
        temperature,
        form=form,
        log_z=log_z,
        logit_scale=logit_scale,
        weights=weights,
        normalize=normalize,
        reduction=reduction,
        stats=stats,
        group=group,
        strategy=strategy,
        grad_reduce=grad_reduce,
    )
    if stats:
        return loss, share
    return loss


def nce_and_log_z(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    temperature: float | Tensor,
    *,
    form: str,
    log_z: float | Tensor | None,
    logit_scale: float | Tensor | None,
    weights: Tensor | None,
    normalize: bool,
    reduction: str,
    stats: bool,
    group: Group,
    strategy: str,
    grad_reduce: str,
) -> tuple[Tensor, Tensor | None, float | Tensor | None]:
    """`nce`, the share or None, and the log Z that was used, for a module to keep."""
    ranks = None
    if group is not None:
        given = dict(query=query, bank=bank, index=index, temperature=temperature, form=form, log_z=log_z)
        options = dict(weights=weights, normalize=normalize, reduction=reduction, stats=stats)
        ranks = ranks_of(group, strategy, grad_reduce, "nce", **given, logit_scale=logit_scale, **options)
    check_options(reduction, group, strategy, grad_reduce, normalize=normalize, stats=stats)
    scale = scale_of(temperature, logit_scale, query, ranks)
    bank, shard = rows_and_shard("bank", bank, ranks)
    query, bank = promoted(query, bank)
    _check(query, bank, index, scale, form, log_z, weights, ranks)
    if log_z is not None:
        log_z = scalar("log_z", log_z, query)
    if normalize:
        query = unit(query)
    bank = with_rows(shard, replicated(bank, ranks))
    losses, share, log_z = _losses_over(bank, query, index, scale, form, log_z, stats, ranks)
    return reduce(losses, reduction, weights, ranks), share, log_z


def _check(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    scale: float | Tensor,
    form: str,
    log_z: float | Tensor | None,
    weights: Tensor | None,
    ranks: Ranks | None,
) -> None:
    check_features("query", query, ranks)
    check_features("bank", bank)
    check_alike("bank", bank, "query", query, "[M, D]")
    check_dense("index", index)
    if not isinstance(index, Tensor) or index.ndim != 2 or index.shape[0] != query.shape[0] or index.shape[1] == 0:
        wanted = f"[{query.shape[0]}, 1 + K], the positive first"
        raise ValueError(f"index must be an int64 tensor {wanted}, not {describe(index)}")
    check_devices("query", query, index=index, temperature=scale)
    check_choice("form", form, *FORMS)
    if form == "softmax" and log_z is not None:
        raise ValueError("log_z belongs to the form 'nce'; leave it out for 'softmax'")
    check_weights(weights, query.shape[0], query)


def _losses_over(
    bank: Tensor | Shard,
    query: Tensor,
    index: Tensor,
    scale: float | Tensor,
    form: str,
    log_z: float | Tensor | None,
    stats: bool,
    ranks: Ranks | None,
) -> tuple[Tensor, Tensor | None, float | Tensor | None]:
    """The losses [N], the share if asked for, and the log Z that was used.

    The gradient of a frozen bank's losses is computed here, so that the bank may be updated before the backward.
    """
    frozen = not bank.requires_grad and not transformed()
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        dots = sampled_similarity(query, bank, index, ranks)
        logits = times(dots, scale)
        share = _share(logits, ranks) if stats else None
        if form == "nce":
            M, K = bank.shape[0], index.shape[1] - 1
            if log_z is None:
                log_z = _estimated_log_z(logits, M, ranks)
            noise = -math.inf
            if K > 0:
                noise = log(K / M, logits)
            logits = logits - (log_z + noise)
            losses = softplus(-logits[:, 0]) + softplus(logits[:, 1:]).sum(1)
        else:
            losses = pair_loss(logits[:, 1:].logsumexp(1), logits[:, 0])
    if frozen and torch.is_grad_enabled():
        losses = _with_gradients(losses, logits, dots, bank, query, index, scale, form, ranks)
    return losses, share, log_z


def _share(logits: Tensor, ranks: Ranks | None) -> Tensor:
    """The share of rows whose positive beats every negative: all of them where there is no negative."""
    if logits.shape[1] == 1:
        return logits.new_ones(())
    return beaten(logits[:, 1:].amax(1), logits[:, 0], 0.0, ranks)  # all of them are summed in one order


def _estimated_log_z(logits: Tensor, M: int, ranks: Ranks | None) -> Tensor:
    """log(M mean exp(l)), eq. 8 of https://arxiv.org/abs/1805.01978."""
    count = all_rows(logits.shape[0], ranks) * logits.shape[1]
    return log_total_of(logits.detach(), ranks) + log(M / count, logits)


def _with_gradients(
    losses: Tensor,
    logits: Tensor,
    dots: Tensor,
    bank: Tensor | Shard,
    query: Tensor,
    index: Tensor,
    scale: float | Tensor,
    form: str,
    ranks: Ranks | None,
) -> Tensor:
    """The losses as a function of query and scale, whose gradients are computed now; logits are overwritten."""
    learned = scale if isinstance(scale, Tensor) and scale.requires_grad else None
    if not query.requires_grad and learned is None:
        return losses
    with torch.no_grad():
        slopes = _slopes(logits, losses, form)
        dq = sampled_similarity_bwd(query, bank, index, slopes, ranks)
        dscale = None if learned is None else (slopes * dots).sum(1)
        dq = dq * scale
    inputs = losses, query, dq, learned, dscale
    return _known.way(True, *inputs)(*inputs)


def _slopes(logits: Tensor, losses: Tensor, form: str) -> Tensor:
    """The gradients of the losses by the logits, which are overwritten."""
    if form == "nce":
        of_positive = -torch.sigmoid(-logits[:, 0])
        for part in pieces(logits):
            part.sigmoid_()
    else:
        of_positive = torch.expm1(-losses)
        # The share of the negatives, and how they share it: exact for scores of any size. A share of 0 leaves nothing.
        share = -of_positive.unsqueeze(1)
        logits[:, 1:] = torch.softmax(logits[:, 1:], 1).mul_(share).masked_fill_(share == 0, 0)
    logits[:, 0] = of_positive
    return logits


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    q, dq, scale, dscale = ctx.saved_tensors
    with torch.no_grad():
        dq = (g.unsqueeze(1) * dq).to(q.dtype) if ctx.needs_input_grad[1] else None
        dscale = total(g * dscale) if ctx.needs_input_grad[3] else None
    dq, dscale = once((g, q, scale), dq, dscale)
    return None, dq, None, dscale, None


# Losses [N], whose gradients came with them: by q [N, D], by the scale [N].
_known = Node(lambda losses, q, dq, scale, dscale: losses.clone(), _save, _backward, name="nce")


def cmc(
    views: Sequence[Tensor],
    banks: Sequence[Tensor],
    index: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    graph: str = "full",
    form: str = "nce",
    log_z: Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
) -> Tensor:
    """Contrastive multiview coding (https://arxiv.org/abs/1906.05849) of V views, each with a memory bank.

    A pair of views (a, b) contrasts each row of view a with the bank of b and each row of view b with the bank of a
    (eq. 6): L(a, b) = nce(view_a, bank_b) + nce(view_b, bank_a). The loss is the sum over the pairs of the graph:

        "core"   the first view with each other     V0 - V1, V0 - V2, V0 - V3                  (eq. 7)
        "full"   every two of them                  V0 - V1, V0 - V2, V0 - V3, V1 - V2, ...    (eq. 8)

                   bank_b 0  1  2  3  4  5
        view_a 0          +     -        -     + positive, - negative; the others were not sampled
        view_a 1             -  -  +

    Args:
        views: V tensors [N, D], 2 or more, of one type: the same N samples.
        banks: V tensors [M, D]: row j of each belongs to sample j of the data.
        index: int64 [N, 1 + K], rows of the banks, the positive first; for all pairs.
        graph: "core" or "full".
        log_z: [P] for the P ordered pairs in the order of `cmc_pairs`, or None: estimated from this batch.
        temperature, form, logit_scale, weights, normalize, reduction, group, strategy, grad_reduce: as in `nce`.

    Returns:
        The loss, 0-d, or for "none" [N], in fp32 (fp64).

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.
        IndexError: an index is no row of the banks.

    Example:
        >>> banks = torch.nn.functional.normalize(torch.randn(3, 1000, 32), dim=2)
        >>> views = [torch.randn(8, 32, requires_grad=True) for _ in range(3)]
        >>> sslkern.functional.cmc(views, banks, torch.randint(1000, (8, 1 + 100)), graph="core").backward()
    """
    loss, _ = cmc_and_log_z(
        views,
        banks,
        index,
        temperature,
        graph=graph,
        form=form,
        log_z=log_z,
        logit_scale=logit_scale,
        weights=weights,
        normalize=normalize,
        reduction=reduction,
        group=group,
        strategy=strategy,
        grad_reduce=grad_reduce,
    )
    return loss


def cmc_pairs(views: int, graph: str) -> list[tuple[int, int]]:
    """The ordered pairs (view, bank) that `cmc` contrasts."""
    check_choice("graph", graph, *GRAPHS)
    views = check_size("views", views, 2)
    pairs = itertools.combinations(range(views), 2)
    return [pair for a, b in pairs if graph == "full" or a == 0 for pair in ((a, b), (b, a))]


def checked_views(views: Sequence[Tensor], ranks: Ranks | None = None) -> Sequence[Tensor]:
    """Two views or more, of one shape and type."""
    if not isinstance(views, (Sequence, Tensor)) or isinstance(views, str) or _count(views) < 2:
        raise ValueError(f"views must be two tensors [N, D] or more, not {describe(views)}")
    if not isinstance(views, Tensor):
        views = promoted(*views)
    for i, view in enumerate(views):
        check_features(f"views[{i}]", view, ranks)
        check_alike(f"views[{i}]", view, "views[0]", views[0])
    return views


def cmc_and_log_z(
    views: Sequence[Tensor],
    banks: Sequence[Tensor],
    index: Tensor,
    temperature: float | Tensor,
    *,
    graph: str,
    form: str,
    log_z: Tensor | None,
    logit_scale: float | Tensor | None,
    weights: Tensor | None,
    normalize: bool,
    reduction: str,
    group: Group,
    strategy: str,
    grad_reduce: str,
) -> tuple[Tensor, Tensor | None]:
    """`cmc` and the log Z [P] that was used, for a module to keep."""
    ranks = None
    if group is not None:
        given = dict(views=views, banks=banks, index=index, temperature=temperature, graph=graph, form=form)
        options = dict(log_z=log_z, logit_scale=logit_scale, weights=weights, normalize=normalize, reduction=reduction)
        ranks = ranks_of(group, strategy, grad_reduce, "cmc", rows=rows_of_views(views), **given, **options)
    check_options(reduction, group, strategy, grad_reduce, normalize=normalize)
    scale = scale_of(temperature, logit_scale, None, ranks)
    views = checked_views(views, ranks)
    banks, shards = _checked_banks(banks, len(views), ranks)
    pairs = cmc_pairs(len(views), graph)
    if log_z is not None:
        if not isinstance(log_z, Tensor) or log_z.shape != (len(pairs),):
            raise ValueError(f"log_z must be a tensor [{len(pairs)}], one for each ordered pair, not {describe(log_z)}")
        check_dense("log_z", log_z)
    _check(views[0], banks[0], index, scale, form, log_z, weights, ranks)
    if normalize:
        views = [unit(view) for view in views]
    banks = [with_rows(shard, replicated(bank, ranks)) for shard, bank in zip(shards, banks, strict=True)]
    losses, used = [], []
    for number, (view, bank) in enumerate(pairs):
        known = None if log_z is None else scalar("log_z", log_z[number], views[0])
        of_pair, _, of_z = _losses_over(banks[bank], views[view], index, scale, form, known, False, ranks)
        losses.append(reduce(of_pair, reduction, weights, ranks))
        used.append(of_z)
    loss = stack(losses).sum(0)
    if form == "nce":
        return loss, stack(used)  # type: ignore[arg-type]  # tensors, in this form
    return loss, None


def _checked_banks(
    banks: Sequence[Tensor], count: int, ranks: Ranks | None
) -> tuple[Sequence[Tensor], Sequence[Shard | None]]:
    """As many banks as views, of one shape and type; of sharded ones the rows here, and the shards."""
    if not isinstance(banks, (Sequence, Tensor)) or _count(banks) != count:
        raise ValueError(f"banks must be {count} tensors [M, D], one for each view")
    parts = [rows_and_shard(f"banks[{i}]", bank, ranks) for i, bank in enumerate(banks)]
    banks, shards = zip(*parts, strict=True)
    banks = promoted(*banks)
    check_features("banks[0]", banks[0])
    for i, bank in enumerate(banks):
        check_alike(f"banks[{i}]", bank, "banks[0]", banks[0])
    return banks, shards


def _count(tensors: Sequence[Tensor] | Tensor) -> int:
    """How many there are: none in a 0-d tensor, which has no length."""
    return 0 if isinstance(tensors, Tensor) and tensors.ndim == 0 else len(tensors)
