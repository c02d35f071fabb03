"""The hand-written CUDA kernels (`kernels/`), compiled when they are first needed: of the memory-bound primitives, of
losses of few pairs as a whole, and for Hopper (compute capability 9.0) of `similarity_lse` and
`similarity_softplus`.

    nvrtc.py     the compiler that every CUDA build of torch brings
    compile.py   what is compiled for which types, and where it is kept
    driver.py    the driver, which loads and launches it
    launch.py    what the primitives' files share: checks, how rows are cut into blocks, launches
    pairs.py     a problem of the similarity family, as the kernels for Hopper take it

They run beside a CUDA build of torch only. SSLKERN_CUDA in the environment: "auto" (use them where they run), "0"
(never), or "1" (the import of sslkern fails where they do not run). No call makes the host wait, all can be captured in
a CUDA graph.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import driver, nvrtc

DEVICES = ("cuda",)
NAMES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}  # as kernels/device.h has them
DTYPES = tuple(NAMES)
PRIMITIVES = ("similarity_lse", "similarity_softplus", "sampled_similarity", "queue_push", "bank_update", "unit_pairs")
PRIMITIVES += ("pair_contrast",)
KEEPS = 0, 0


def _missing() -> str | None:
    wanted = os.environ.get("SSLKERN_CUDA") or "auto"
    if wanted not in ("0", "1", "auto"):
        raise ImportError(f"SSLKERN_CUDA must be 0, 1 or auto, not {wanted!r}")
    if wanted == "0":
        return "SSLKERN_CUDA=0 switches it off"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA; a CUDA build of torch brings it"
    if driver.library() is None:
        return "there is no NVIDIA driver"
    if nvrtc.find() is None:
        package = "nvidia-cuda-nvrtc-cu12" if nvrtc.major(torch.version.cuda) == 12 else "nvidia-cuda-nvrtc"
        return f"there is no libnvrtc, which compiles its kernels; `pip install {package}` brings it"
    return None


MISSING = _missing()
if MISSING is not None and os.environ.get("SSLKERN_CUDA") == "1":
    raise ImportError(f"SSLKERN_CUDA=1, but the cuda backend cannot be used: {MISSING}")


def _lacks(primitive: str) -> Callable[..., str | None]:
    def lacks(x: Tensor, other: torch.dtype | None = None, **_: object) -> str | None:
        from . import launch

        if other is None:
            return launch.missing(primitive, (x.dtype,), x.device.index or 0)
        if other not in NAMES:
            return None  # the reference has it
        return launch.missing(primitive, (x.dtype, other), x.device.index or 0)

    return lacks


def _lacks_pair_contrast(x: Tensor, **options: Any) -> str | None:
    from . import pair_contrast

    return pair_contrast.lacks(x, **options)


def _lacks_similarity_lse(x: Tensor, **options: Any) -> str | None:
    from . import similarity_lse

    return similarity_lse.lacks(x, **options)


def _lacks_similarity_softplus(x: Tensor, **options: Any) -> str | None:
    from . import similarity_softplus

    return similarity_softplus.lacks(x, **options)


LACKS = {primitive: _lacks(primitive) for primitive in PRIMITIVES}
LACKS |= {"pair_contrast": _lacks_pair_contrast, "similarity_lse": _lacks_similarity_lse}
LACKS |= {"similarity_softplus": _lacks_similarity_softplus}
