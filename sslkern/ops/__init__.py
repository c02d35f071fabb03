"""The primitives: one file each, with its schema, its shapes for `torch.compile`, its derivative; and `logsumexp`."""

from .bank_update import bank_update_
from .logsumexp import logsumexp
from .queue_push import queue_push_
from .sampled_similarity import sampled_similarity, sampled_similarity_bwd
from .similarity_lse import similarity_lse, similarity_lse_bwd
from .similarity_softplus import similarity_softplus
from .similarity_topk import similarity_topk

__all__ = [
    "bank_update_",
    "logsumexp",
    "queue_push_",
    "sampled_similarity",
    "sampled_similarity_bwd",
    "similarity_lse",
    "similarity_lse_bwd",
    "similarity_softplus",
    "similarity_topk",
]
