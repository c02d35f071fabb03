"""Chunked torch: any device, any floating dtype. Ground truth, fallback and documentation of the other backends."""

DEVICES = None  # any
DTYPES = None  # any
PRIMITIVES = (
    "similarity_lse",
    "similarity_softplus",
    "similarity_topk",
    "sampled_similarity",
    "queue_push",
    "bank_update",
    "unit_pairs",
    "pair_losses",
)
KEEPS = 0, 0  # scores of similarity_lse kept for the backward: it recomputes all
LACKS: dict = {}
MISSING = None
