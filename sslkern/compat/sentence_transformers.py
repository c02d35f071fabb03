"""Stand-ins for the losses of sentence-transformers 6.2 that contrast within a batch.

    from sslkern.compat import sentence_transformers as losses   # was: from sentence_transformers import losses
    loss = losses.MatryoshkaLoss(model, losses.CachedMultipleNegativesRankingLoss(model, scale=20.0), [64, 32])

They are subclasses of the package's: constructors, checks, `get_config_dict`, the embedding of columns and mini-batches
are its own code. What is computed of the embeddings, and their gradient, is ours. All other losses of the package are
found here, too, as they are.
"""

import warnings
from collections.abc import Iterable, Sequence
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.arguments import FLOATS
from ..common.autocast import autocast_active, cat, product
from ..common.rows import dots, unit
from ..common.sums import pair_loss
from ..common.tensors import wide
from ..functional import mnrl
from ..functional.formulas import logaddexp
from ..functional.mnrl import masked_lse
from ..ops import similarity_lse
from ._dense import few, warn_once
from ._types import typed_as

try:
    from sentence_transformers.base.losses.merged_forward import embed_columns
    from sentence_transformers.sentence_transformer import losses as peer
    from sentence_transformers.util import all_gather_with_grad, batch_to_device, cos_sim, dot_score, get_rank
    from typing_extensions import deprecated
except ImportError as error:
    raise ImportError(
        "sslkern.compat.sentence_transformers needs sentence-transformers >= 6.2, whose losses it stands in for; "
        "pip install 'sentence-transformers>=6.2'"
    ) from error


# Similarities of one process on a CPU up to which the package's own code is quicker, forward and backward: of queries
# and documents with hard negatives, and of more than one direction; with a guide those of the queries with each other.
FEW_ONE_WAY, FEW, FEW_GUIDED = 2**16, 2**13, 2**7


def __getattr__(name: str) -> Any:
    """The other losses."""
    if name not in peer.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(peer, name)


# ---- multiple negatives ranking --------------------------------------------------------------------------------------


class MultipleNegativesRankingLoss(peer.MultipleNegativesRankingLoss):
    """Multiple negatives ranking; the fused loss is `sslkern.functional.mnrl`.

    Two quirks stay: in partition_mode "joint" with "doc_to_query" the positive counts twice, so that a batch of one
    pair has the loss ln 2; and with `gather_across_devices` each process returns the mean over its own rows.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        loss = _ranking(self, embeddings)
        if loss is None:
            return super().compute_loss_from_embeddings(embeddings, labels)
        return loss


class CachedMultipleNegativesRankingLoss(peer.CachedMultipleNegativesRankingLoss):
    """The same with a gradient cache. Mini-batches are those of the model only: the loss needs none."""

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        loss = _ranking(self, [torch.cat(of_column) for of_column in reps])
        if loss is None:
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        return _backward(loss) if with_backward else loss


def _ranking(loss: Any, columns: Sequence[Tensor]) -> Tensor | None:
    """The fused loss of the columns [N, D], with the options that `loss` has now; None where the package's own code has
    to compute it."""
    if len(columns) < 2 or len(columns[0]) < 2:
        return None  # an error, or a batch in which the positive may be the only negative
    columns = [wide(x) if x.dtype in FLOATS else x for x in columns]
    reason = _unfit(loss, columns)
    if reason is not None:
        warn_once(loss, reason)
        return None
    if _are_few(loss, columns):
        return None
    device = columns[0].device.type
    if autocast_active(device):  # as its product would be
        columns = [x.to(torch.get_autocast_dtype(device)) for x in columns]
    if _hardens(loss):
        return _hardened(loss, columns)
    options: dict[str, Any] = dict(directions=set(loss.directions), partition=loss.partition_mode)
    options |= dict(normalize=_normalizes(loss.similarity_fct), logit_scale=loss.scale, negatives=columns[2:] or None)
    if loss.gather_across_devices:
        return mnrl(*columns[:2], group="world", grad_reduce="sum", reduction="none", **options).mean()
    return mnrl(*columns[:2], group="self", **options)


def _unfit(loss: Any, columns: Sequence[Tensor]) -> str | None:
    """Why the fused loss cannot take them."""
    first = columns[0]
    if _normalizes(loss.similarity_fct) is None:
        return "similarity_fct is neither cos_sim nor dot_score; take one of them"
    if _hardens(loss) and (isinstance(loss.scale, Tensor) or loss.scale <= 0 or loss.gather_across_devices):
        return "hardness_mode is for one process and a positive number as scale; leave it None"
    if any(x.shape != first.shape or x.dtype != first.dtype or x.layout is not torch.strided for x in columns):
        return "the columns differ in shape or layout; make them tensors [N, D] of one size"
    if first.ndim != 2 or first.dtype not in FLOATS:
        return "embeddings are no floating-point tensors [N, D]; convert them"
    return None


def _are_few(loss: Any, columns: Sequence[Tensor]) -> bool:
    """Whether the package's own code is quicker, and as good: it has bf16 inside autocast, and may have a NaN for the
    gradient of a scale."""
    one_way, device = len(loss.directions) == 1, columns[0].device.type
    if loss.gather_across_devices or isinstance(loss.scale, Tensor) or autocast_active(device):
        return False
    if len(columns) == 2 and (one_way or loss.partition_mode == "per_direction") and not _hardens(loss):
        return False  # one quick kernel
    blocks = sum(len(columns) - 1 if name.endswith("_to_doc") else 1 for name in loss.directions)
    return few(columns[0], len(columns[0]) ** 2 * blocks, FEW_ONE_WAY if one_way else FEW)


def _hardens(loss: Any) -> bool:
    return loss.hardness_mode is not None and loss.hardness_strength > 0


def _hardened(loss: Any, columns: Sequence[Tensor]) -> Tensor:
    """The loss with some of the negatives for the queries harder: in the softmax `hardness_strength` is added to their
    scale, but not in the gradient."""
    scale, strength, mode = loss.scale, loss.hardness_strength, loss.hardness_mode
    query, positive, *hard = (unit(x) for x in columns) if _normalizes(loss.similarity_fct) else columns
    documents, own = cat([positive, *hard]), torch.arange(len(query), device=query.device)
    of_documents = own.repeat(1 + len(hard))
    toward = dots(query, positive) * scale

    in_batch = strength if mode != "hard_negatives" else 0
    row = similarity_lse(query, documents, scale + in_batch, q_ids=own, k_ids=of_documents)
    row = row.detach() + (row - row.detach()) * (scale / (scale + in_batch))
    of_own = strength if mode != "in_batch_negatives" else 0
    similarities = [dots(query, x) for x in hard]
    scores = [x * scale + x.detach() * of_own for x in similarities]
    terms = {"query_to_doc": reduce(logaddexp, scores, logaddexp(row, toward))}
    if "query_to_query" in loss.directions:
        terms["query_to_query"] = similarity_lse(query, None, scale)
    if "doc_to_query" in loss.directions:
        terms["doc_to_query"] = similarity_lse(positive, query, scale)
    if "doc_to_doc" in loss.directions:
        terms["doc_to_doc"] = similarity_lse(positive, documents, scale, q_ids=own, k_ids=of_documents)
    of_all = reduce(logaddexp if loss.partition_mode == "joint" else torch.add, terms.values())
    if loss.partition_mode != "joint":
        of_all = of_all / len(terms)
    return (of_all - toward).mean()


def _normalizes(similarity_fct: Any) -> bool | None:
    """Whether this is the cosine, or the dot product, of rows; None if neither."""
    owner = getattr(similarity_fct, "__self__", None)
    if owner is not None and getattr(similarity_fct, "__name__", "") == "similarity":  # of a model
        return {"cosine": True, "dot": False}.get(getattr(owner, "similarity_fn_name", ""))
    if similarity_fct is cos_sim:
        return True
    return False if similarity_fct is dot_score else None


def _backward(loss: Tensor) -> Tensor:
    """What a gradient cache asks for: the gradients of the leaves, and the value alone."""
    loss.backward()
    return loss.detach()


with warnings.catch_warnings():  # that the classes are deprecated is said to who makes one
    warnings.simplefilter("ignore", DeprecationWarning)

    @deprecated(peer.MultipleNegativesSymmetricRankingLoss.__deprecated__)
    class MultipleNegativesSymmetricRankingLoss(
        MultipleNegativesRankingLoss, peer.MultipleNegativesSymmetricRankingLoss
    ):
        """Both directions, each with a softmax of its own."""

    @deprecated(peer.CachedMultipleNegativesSymmetricRankingLoss.__deprecated__)
    class CachedMultipleNegativesSymmetricRankingLoss(
        CachedMultipleNegativesRankingLoss, peer.CachedMultipleNegativesSymmetricRankingLoss
    ):
        """The same with a gradient cache."""


# ---- with a guide ----------------------------------------------------------------------------------------------------


class GISTEmbedLoss(peer.GISTEmbedLoss):
    """Multiple negatives ranking with a guide that finds false negatives. Of similarities a block of rows is stored at
    a time, where the package stores [N, N, D]."""

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        features = list(sentence_features)
        if not _is_as_made(self, peer.GISTEmbedLoss) or self._has_few(features):
            return super().forward(features, labels)
        for_guide = [dict(of_column) for of_column in features]  # a model writes into what it is given
        columns = embed_columns(self.model, features)
        if len(columns) not in (2, 3):
            raise ValueError(f"sentence_features must have 2 or 3 columns, not {len(columns)}")
        with torch.no_grad():
            if self.must_retokenize:
                for_guide = [self._for_guide(of_column) for of_column in features]
            guides = embed_columns(self.guide, for_guide)
        return _guided(self, columns, guides)

    def _has_few(self, features: list[dict[str, Tensor]]) -> bool:
        """Whether the package's own code is quicker; of texts that are all in one row it is not known how many."""
        if self.gather_across_devices or any("cu_seq_lens_q" in of_column for of_column in features):
            return False
        tensors = [x for of_column in features for x in of_column.values() if isinstance(x, Tensor) and x.ndim]
        return bool(tensors) and all(few(x, len(x) ** 2, FEW_GUIDED) for x in tensors)

    def _for_guide(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The texts as the guide's tokenizer has them."""
        ids: Any = features["input_ids"]
        if "cu_seq_lens_q" in features:  # all texts in one row
            ids = [part.tolist() for part in ids[0].tensor_split(features["cu_seq_lens_q"][1:-1].cpu())]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return batch_to_device(self.guide.preprocess(texts), self.guide.device)


class CachedGISTEmbedLoss(peer.CachedGISTEmbedLoss):
    """The same with a gradient cache."""

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        if len(reps) != len(reps_guided):
            raise ValueError(f"reps_guided must have the {len(reps)} columns of reps, not {len(reps_guided)}")
        if not _is_as_made(self, peer.CachedGISTEmbedLoss):
            return super().calculate_loss(reps, reps_guided, with_backward=with_backward)
        columns, guides = ([torch.cat(of_column) for of_column in of_model] for of_model in (reps, reps_guided))
        loss = _guided(self, columns, guides)
        return _backward(loss) if with_backward else loss


def _is_as_made(loss: Any, by: Any) -> bool:
    """Whether what computes similarities and losses is still what the constructor made."""
    plain = type(loss.similarity_fct) is nn.CosineSimilarity and type(loss).sim_matrix is by.sim_matrix
    if plain and type(loss.cross_entropy_loss) is nn.CrossEntropyLoss:
        return True
    warn_once(loss, "similarity_fct, sim_matrix or cross_entropy_loss was replaced; leave them as they are")
    return False


def _guided(loss: Any, columns: Sequence[Tensor], guides: Sequence[Tensor]) -> Tensor:
    """The loss of anchors, positives and hard negatives, with what the guide makes of them.

    A pair is a false negative if the guide finds it more similar than anchor and positive, less a margin. That holds
    for a row with itself as well: it drops out as it is more similar than any other, and where the positive is the same
    text, it does not. Over processes positives and negatives come together, anchors do not.
    """
    anchor, *documents = columns
    of_anchor, *of_documents = map(wide, guides)
    N, offset = anchor.shape[0], 0
    if loss.gather_across_devices:
        documents, of_documents = (list(map(_gathered, x)) for x in (documents, of_documents))
        offset = get_rank() * N
    own = slice(offset, offset + N)
    limit = F.cosine_similarity(of_anchor, of_documents[0][own])
    limit = limit - (loss.margin if loss.margin_strategy == "absolute" else limit.abs() * loss.margin)

    rows = [_unit(x) for x in (anchor, *documents)]
    anchor, positive, scale = rows[0], rows[1][own], 1 / loss.temperature
    keys, of_keys = [rows[1], *rows[2:]], [*of_documents]
    if loss.contrast_anchors:
        keys, of_keys = [*keys, anchor], [*of_keys, of_anchor]
    positives = torch.arange(offset, offset + N, device=anchor.device)
    left_out = partial(_false_negatives, of_keys=cat(of_keys))
    negative, _ = masked_lse(anchor, cat(keys), scale, left_out, of_anchor, limit, positives)
    if loss.contrast_positives:
        left_out = partial(_false_negatives, of_keys=of_documents[0])
        more, _ = masked_lse(positive, rows[1], scale, left_out, of_documents[0][own], limit, None)
        negative = logaddexp(negative, more)
    losses = pair_loss(negative, dots(anchor, positive) * scale).mean()
    return typed_as(losses, columns[0])


def _gathered(x: Tensor) -> Tensor:
    """Those of all processes, with a gradient in rows: torch mixes up that of any other layout over gloo."""
    together = all_gather_with_grad(x)
    if together.requires_grad:
        together.register_hook(Tensor.contiguous)
    return together


def _unit(x: Tensor) -> Tensor:
    """Rows by their norm, as `cosine_similarity` has it."""
    return F.normalize(wide(x), dim=-1, eps=1e-8)


def _false_negatives(of_rows: Tensor, limit: Tensor, positives: Tensor | None, of_keys: Tensor) -> Tensor:
    """Which pairs of rows and keys [n, M] the guide finds more similar than `limit` [n], and the `positives` [n].

    Equal texts have equal similarities, which are not above each other, but for their rounding in a product. So what is
    as near to the limit as that is computed pair by pair, as the package does it.
    """
    limit = limit.unsqueeze(1)
    similarity = product(_unit(of_rows), _unit(of_keys).T)
    out = similarity > limit
    i, j = ((similarity - limit).abs() <= 64 * torch.finfo(limit.dtype).eps).nonzero(as_tuple=True)
    out[i, j] = F.cosine_similarity(of_rows[i], of_keys[j]) > limit[i, 0]
    return out if positives is None else out.scatter(1, positives.unsqueeze(1), True)
