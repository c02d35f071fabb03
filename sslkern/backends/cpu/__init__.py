"""The hand-written CPU kernels (`csrc/cpu`), through the native module `sslkern._cpu`."""

import torch

DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRIMITIVES = ("similarity_lse", "similarity_softplus", "queue_push", "unit_pairs")
KEEPS = 2**22  # most scores that similarity_lse keeps from the forward for the backward: 16 MB

try:
    from sslkern import _cpu

    MISSING = None
except ImportError as error:
    _cpu = None
    MISSING = f"the native module is not built ({error}); build it with `make setup` or `pip install -e .`"
