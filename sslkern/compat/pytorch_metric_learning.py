"""Stand-ins for the contrastive losses of pytorch-metric-learning 2.9, and for what is put around them.

    from sslkern.compat import pytorch_metric_learning as losses   # was: from pytorch_metric_learning import losses
    loss = losses.CrossBatchMemory(losses.NTXentLoss(temperature=0.07), embedding_size=128, memory_size=4096)

They are subclasses of the package's, so that distances, reducers, regularizers and miners are its own, and so is what
is computed with a distance that is no dot product. `DistributedLossWrapper`, which the package has elsewhere, is found
here as well, and so are all of its other losses, as they are.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.arguments import FLOATS
from ..common.autocast import autocast_active
from ..common.rows import unit
from ..common.sums import softplus
from ..common.tensors import wide
from ..ops import logsumexp, sampled_similarity, similarity_lse
from ._dense import few, warn_once

try:
    from pytorch_metric_learning import losses as peer
    from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
    from pytorch_metric_learning.utils import distributed as peer_distributed
except ImportError as error:
    raise ImportError(
        "sslkern.compat.pytorch_metric_learning needs pytorch-metric-learning >= 2.9, whose losses it stands in for; "
        "pip install 'pytorch-metric-learning>=2.9'"
    ) from error


# Similarities of a CPU up to which storing them is quicker, forward and backward; four times as many where their pairs
# are named one by one, which the fused losses would have to look through.
SMALL = 2**14


def __getattr__(name: str) -> Any:
    """The other losses."""
    if name.startswith("_") or not hasattr(peer, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(peer, name)


# ---- the pairs of a batch --------------------------------------------------------------------------------------------


class AllPairs(NamedTuple):
    """In the place of an `indices_tuple`: the pairs of all rows with all rows of a memory. Those of one label are
    positives, but for each row with itself, which stands in the memory at `own` [N] (None: nowhere)."""

    own: Tensor | None


def _is_all(indices_tuple: Any) -> bool:
    return indices_tuple is None or isinstance(indices_tuple, AllPairs)


class _Pairs(NamedTuple):
    """What the fused losses are made of: the scores of each row with its positives, and all of its negatives as one."""

    scores: Tensor  # [N, K], of what is a positive
    positive: Tensor  # bool [N, K]
    rows: Tensor  # [N, K], which row of the others that is
    negative: Tensor  # [N], the log-sum-exp over the negatives
    best: Tensor  # [N], the largest score with anything, the row itself included
    dtype: torch.dtype  # in which the package computes


def _pairs(
    loss: Any, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor | None
) -> _Pairs | str:
    """The pairs of a batch, or why the package's own code has to find them; "" where it has no positives or no
    negatives, and its loss is 0."""
    distance = loss.distance
    if type(distance) not in (CosineSimilarity, DotProductSimilarity) or distance.p != 2 or distance.power != 1:
        return f"{type(distance).__name__} is no dot product; take CosineSimilarity or DotProductSimilarity"
    if distance.collect_stats:
        return "collect_stats asks for the norms of all rows; turn it off"
    if ref_labels is None:
        ref_labels = labels  # as the package has it
    fits = embeddings.ndim == ref_emb.ndim == 2 and len(ref_labels) == len(ref_emb)
    if not fits or embeddings.dtype not in FLOATS or ref_emb.dtype not in FLOATS or len(embeddings) == 0:
        return "embeddings are no floating-point tensors [N, D] with a label for each row; convert them"
    dtype = embeddings.dtype
    if autocast_active(embeddings.device.type):
        dtype = torch.get_autocast_dtype(embeddings.device.type)
    elif ref_emb.dtype != dtype:
        return "ref_emb is of another type than embeddings; convert it"

    ids, key_ids = _ids(labels, ref_labels)
    listed = None
    if not _is_all(indices_tuple):
        listed = _positives_beside_all_negatives(indices_tuple, ids, key_ids)
        if listed is None:
            return "indices_tuple, or a miner, names pairs one by one, and not all negatives; leave it out if all count"
    index, same, others = _of_one_label(ids, key_ids)
    if listed is not None:
        positive = same & listed.gather(1, index)
    else:
        if indices_tuple is not None:
            own = indices_tuple.own
        else:  # the package takes one tensor for both labels as a sign that rows are the same
            own = torch.arange(len(labels), device=labels.device) if ref_labels is labels else None
        positive = same if own is None else same & (index != own.unsqueeze(1))
    positives, negatives = torch.stack((positive.sum(), others)).tolist()
    if positives == 0 or negatives == 0 or max(positives, negatives) == 1:
        return ""

    scale = 1 / loss.temperature
    q = k = _rows(embeddings, distance).to(dtype)
    if ref_emb is embeddings:
        negative, best = similarity_lse(q, None, scale, q_ids=ids, best=True)
    else:
        k = _rows(ref_emb, distance).to(dtype)
        negative, best = similarity_lse(q, k, scale, q_ids=ids, k_ids=key_ids, best=True)
    scores = sampled_similarity(q, k, index) * scale
    with torch.no_grad():
        best = torch.maximum(best, scores.masked_fill(~same, -math.inf).amax(1))
    return _Pairs(scores, positive, index, negative, best, dtype)


def _rows(x: Tensor, distance: Any) -> Tensor:
    return unit(x) if distance.normalize_embeddings else x


def _ids(labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of any type as int64."""
    if not labels.is_floating_point() and not ref_labels.is_floating_point():
        return labels.long(), ref_labels.long()
    _, ids = torch.cat((labels, ref_labels)).unique(return_inverse=True)
    return ids[: len(labels)], ids[len(labels) :]


def _of_one_label(ids: Tensor, key_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row those of its label, in their order: index [N, K], which of these count, bool [N, K], and how many
    pairs of different labels there are, 0-d."""
    in_order, order = key_ids.sort(stable=True)
    first, end = torch.searchsorted(in_order, ids), torch.searchsorted(in_order, ids, right=True)
    count = end - first
    place = first.unsqueeze(1) + torch.arange(int(count.max()), device=ids.device)
    return order[place.clamp_max(len(order) - 1)], place < end.unsqueeze(1), len(ids) * len(key_ids) - count.sum()


def _positives_beside_all_negatives(indices_tuple: Any, ids: Tensor, key_ids: Tensor) -> Tensor | None:
    """The positives of pairs that are named one by one, bool [N, M]. None unless they are of one label, in order and
    each once, and the negatives are all pairs of different labels: the package's own wrappers name such pairs."""
    if len(indices_tuple) != 4 or any(x.dtype != torch.int64 for x in indices_tuple):
        return None
    rows, positives, of_negatives, negatives = indices_tuple
    seen = ids.unsqueeze(1) == key_ids
    if len(negatives) != seen.numel() - int(seen.sum()):
        return None
    in_order = (rows * len(key_ids) + positives).diff() > 0
    fit = seen[rows, positives].all() & in_order.all()
    seen[of_negatives, negatives] = True  # no more than there are, so each of them once
    if not fit & seen.all():
        return None
    listed = torch.zeros_like(seen)
    listed[rows, positives] = True
    return listed


class _Fused(peer.BaseMetricLossFunction):
    """A loss that takes all pairs, or pairs one by one."""

    def _of_pairs(self, pairs: _Pairs) -> dict[str, Any]:
        raise NotImplementedError

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, Any]:
        most = SMALL if _is_all(indices_tuple) else 4 * SMALL
        if labels is not None and not few(embeddings, len(embeddings) * len(ref_emb), most):
            pairs = _pairs(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
            if isinstance(pairs, _Pairs):
                return {"loss": self._of_pairs(pairs)}
            if pairs == "":
                return self.zero_losses()
            warn_once(self, pairs)
        if isinstance(indices_tuple, AllPairs):
            indices_tuple = _listed(labels, labels if ref_labels is None else ref_labels, indices_tuple.own)
        return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)


def _listed(labels: Any, ref_labels: Any, own: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs one by one."""
    same = labels.unsqueeze(1) == ref_labels
    different = ~same
    if own is not None:
        same.scatter_(1, own.unsqueeze(1), False)
    (anchors, positives), (rows, negatives) = same.nonzero(as_tuple=True), different.nonzero(as_tuple=True)
    return anchors, positives, rows, negatives


# ---- losses ----------------------------------------------------------------------------------------------------------


class NTXentLoss(_Fused, peer.NTXentLoss):
    """The loss of each positive pair: -log(exp(s_p) / (exp(s_p) + sum over negatives exp(s_n)) + tiny).

    The tiny number, which is theirs, is the smallest of the type: the loss ends at 87 in fp32. Where pairs are named
    one by one, or the distance is no dot product, similarities are stored, but not once for each positive.
    """

    def _of_pairs(self, pairs: _Pairs) -> dict[str, Any]:
        losses = softplus(pairs.negative.unsqueeze(1) - pairs.scores)[pairs.positive]
        anchors, _ = pairs.positive.nonzero(as_tuple=True)
        return self._losses(losses, pairs.dtype, (anchors, pairs.rows[pairs.positive]))

    def _compute_loss(self, pos_pairs: Tensor, neg_pairs: Tensor, indices_tuple: tuple[Tensor, ...]) -> dict[str, Any]:
        anchors, positives, of_negatives, _ = indices_tuple
        if len(anchors) == 0 or len(of_negatives) == 0:
            return self.zero_losses()
        if len(anchors) * len(of_negatives) <= 2 * SMALL:
            return super()._compute_loss(pos_pairs, neg_pairs, indices_tuple)
        scale = (1 if self.distance.is_inverted else -1) / self.temperature
        rows = 1 + torch.stack((anchors.max(), of_negatives.max())).max()
        negative = _lse_of_rows(wide(neg_pairs) * scale, of_negatives, rows)
        losses = softplus(negative[anchors] - wide(pos_pairs) * scale)
        return {"loss": self._losses(losses, neg_pairs.dtype, (anchors, positives))}

    def _losses(self, losses: Tensor, dtype: torch.dtype, indices: tuple[Tensor, Tensor]) -> dict[str, Any]:
        losses = -((-losses).exp() + torch.finfo(dtype).tiny).log()
        return {"losses": _typed(losses, dtype), "indices": indices, "reduction_type": "pos_pair"}


def _lse_of_rows(x: Tensor, row: Tensor, rows: Tensor) -> Tensor:
    """The log-sum-exp of the x [P] of each row; -inf of those that have none."""
    most = x.new_full((int(rows),), -math.inf).scatter_reduce(0, row, x.detach(), "amax")
    total = torch.zeros_like(most).index_add(0, row, (x - most[row]).exp())
    return total.clamp_min(1).log() + most  # a row that has any has at least exp(0)


class SupConLoss(_Fused, peer.SupConLoss):
    """The loss of each row, of which the reducer averages those that are not 0.

    A row whose loss is smaller than the rounding of its scores is 0 for the package, and so it is here.
    """

    def _of_pairs(self, pairs: _Pairs) -> dict[str, Any]:
        count = pairs.positive.sum(1)
        alone = count == 0
        positive = logsumexp(pairs.scores.masked_fill(~pairs.positive, -math.inf))
        mean = pairs.scores.masked_fill(~pairs.positive, 0).sum(1) / count.clamp_min(1)
        losses = softplus((pairs.negative - positive).masked_fill(alone, -math.inf))
        losses = losses + (positive - mean).masked_fill(alone | (count == 1), 0)
        # A score below the largest and log(1 + ..), between which the package's loss is rounded.
        near = (mean - pairs.best).detach().masked_fill(alone, 0) - 1
        losses = _typed((near + losses) - near, pairs.dtype)
        indices = torch.arange(len(losses), device=losses.device)
        return {"losses": losses, "indices": indices, "reduction_type": "element"}


def _typed(losses: Tensor, dtype: torch.dtype) -> Tensor:
    """In the type in which the package has them; inside autocast, which has exponentials in fp32, that of the sums."""
    return losses if autocast_active(losses.device.type) else losses.to(dtype)


# ---- around them -----------------------------------------------------------------------------------------------------


class CrossBatchMemory(peer.CrossBatchMemory):
    """Without a miner and an `indices_tuple` the pairs of a batch and the memory are not listed."""

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,
        L_mem: Tensor,
        input_indices_tuple: Any,
        do_remove_self_comparisons: bool,
    ) -> Any:
        if self.miner or input_indices_tuple is not None or not isinstance(self.loss, _Fused):
            return super().create_indices_tuple(
                embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
            )
        return AllPairs(_left_out(self.curr_batch_idx) if do_remove_self_comparisons else None)


class DistributedLossWrapper(peer_distributed.DistributedLossWrapper):
    """With `efficient` the pairs of this process's rows and those of all are not listed."""

    def forward_regular_loss(
        self,
        emb: Tensor,
        labels: Tensor | None,
        indices_tuple: Any,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        world_size: int,
    ) -> Tensor:
        all_pairs = self.efficient and world_size > 1 and indices_tuple is None
        if all_pairs and labels is not None and isinstance(self.loss, _Fused):
            indices_tuple = AllPairs(_left_out(torch.arange(len(labels), device=emb.device)))
        return super().forward_regular_loss(emb, labels, indices_tuple, ref_emb, ref_labels, world_size)


def _left_out(own: Tensor) -> Tensor | None:
    """Where each row stands in the memory; the package keeps the pair of a single row with itself."""
    return own if len(own) > 1 else None
