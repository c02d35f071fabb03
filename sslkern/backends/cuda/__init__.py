"""The hand-written CUDA kernels of the memory-bound primitives (`csrc/cuda`), through the module `sslkern._cuda`.

It is loaded beside a CUDA build of torch only. SSLKERN_CUDA in the environment: "auto" (use it if it is there), "0"
(never), or "1" (the import of sslkern fails without it). No call makes the host wait, all can be captured in a CUDA
graph.
"""

import importlib.util
import os

import torch
from torch import Tensor

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/dtype.h
PRIMITIVES = ("sampled_similarity", "queue_push", "bank_update", "unit_pairs")
KEEPS = 0, 0
LACKS = {}

_cuda = None


def _missing() -> str | None:
    global _cuda
    wanted = os.environ.get("SSLKERN_CUDA") or "auto"
    if wanted not in ("0", "1", "auto"):
        raise ImportError(f"SSLKERN_CUDA must be 0, 1 or auto, not {wanted!r}")
    if wanted == "0":
        return "SSLKERN_CUDA=0 switches it off"
    if importlib.util.find_spec("sslkern._cuda") is None:
        return "its module is not built; an install with nvcc on the PATH or in CUDA_HOME builds it"
    if torch.version.cuda is None:
        return f"its module is built, but torch {torch.__version__} has no CUDA; a CUDA build of torch brings it"
    try:
        from sslkern import _cuda as module
    except ImportError as error:
        return f"its module cannot be loaded ({error}); build it again with `make build`"
    built, driver = module.versions()
    if driver == 0:
        return "there is no NVIDIA driver"
    if driver // 1000 < built // 1000:
        needs, has = (f"{version // 1000}.{version % 1000 // 10}" for version in (built, driver))
        return f"its module was built with CUDA {needs}, but the driver only knows {has}; build it with an older nvcc"
    _cuda = module
    return None


MISSING = _missing()
if MISSING is not None and os.environ.get("SSLKERN_CUDA") == "1":
    raise ImportError(f"SSLKERN_CUDA=1, but the cuda backend cannot be used: {MISSING}")


def place(x: Tensor) -> tuple[int, int]:
    """Where a kernel on x runs: the device's number, and the address of its stream."""
    if x.device.type != "cuda":
        return 0, 0  # emulated
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream
