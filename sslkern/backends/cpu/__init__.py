"""The hand-written CPU kernels (`csrc/cpu`), through the native module `sslkern._cpu`."""

import torch

DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
COLUMNS = 2**31  # that similarity_topk counts
KEEPS = 2**22, 2**27  # scores of a small and of a large similarity_lse kept for the backward: 16 and 512 MB

try:
    from sslkern import _cpu

    MISSING = None
except ImportError as error:
    _cpu = None
    MISSING = f"the native module is not built ({error}); build it with `make setup` or `pip install -e .`"


def _lacks_topk(x: torch.Tensor, sizes: tuple[int, ...], **_: object) -> str | None:
    return f"it counts fewer than {COLUMNS} columns" if sizes[2] >= COLUMNS else None


LACKS = {"similarity_topk": _lacks_topk}
