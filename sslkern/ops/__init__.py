"""The primitives: one file each, with its schema, its shapes for `torch.compile` and its derivative."""

from .queue_push import queue_push_
from .similarity_lse import similarity_lse, similarity_lse_bwd
from .similarity_softplus import similarity_softplus
from .similarity_topk import similarity_topk

__all__ = [
    "queue_push_",
    "similarity_lse",
    "similarity_lse_bwd",
    "similarity_softplus",
    "similarity_topk",
]
