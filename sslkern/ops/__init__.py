"""The primitives: one file each, with its schema, its shapes for `torch.compile` and its derivative."""

from .similarity_lse import similarity_lse, similarity_lse_bwd

__all__ = ["similarity_lse", "similarity_lse_bwd"]
