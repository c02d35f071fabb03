"""Chunked torch: any device, any floating dtype. Ground truth, fallback and documentation of the other backends."""

DEVICES = None  # any
DTYPES = None  # any
PRIMITIVES = ("similarity_lse", "queue_push", "unit_pairs")
MISSING = None
