"""Chunked torch: any device, any floating dtype. Ground truth, fallback and documentation of the other backends."""

DEVICES = None  # any
DTYPES = None  # any
PRIMITIVES = ("similarity_lse", "similarity_softplus", "queue_push", "unit_pairs")
KEEPS = 0  # scores that similarity_lse keeps from the forward for the backward: it recomputes all
MISSING = None
