"""GPU kernels written in Triton, one file per primitive: kernel and launcher, read from top to bottom.

With `TRITON_INTERPRET=1` in the environment they also run on CPU tensors, slowly, which is how they are tested where
there is no GPU. Triton itself is imported with the first kernel.
"""

import importlib.metadata
import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
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
OLDEST = 3, 4  # of triton: tensor descriptors, named tuples as arguments
MOST = 128  # that similarity_topk keeps of a row: more do not fit in the registers
COLUMNS = 2**31  # that it counts
KEEPS = 0, 0  # scores of similarity_lse kept for the backward: the chip recomputes them faster than it reads them


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` brings it (a CUDA build of torch has it already)"
    try:
        version = importlib.metadata.version("triton")
        if tuple(map(int, version.split(".")[:2])) < OLDEST:
            return f"triton {version} is too old; 3.4 or newer is needed, which torch 2.8 and newer bring"
    except (importlib.metadata.PackageNotFoundError, ValueError):
        pass  # under another name, as builds for AMD's GPUs have it
    if torch.version.cuda is None and torch.version.hip is None and not INTERPRETED:
        return f"torch {torch.__version__} is a CPU build; a CUDA build brings it"
    return None


MISSING = _missing()


def _lacks_topk(x: torch.Tensor, sizes: tuple[int, ...], n: int, **_: object) -> str | None:
    if n > MOST:
        return f"it finds at most {MOST} for each row"
    return f"it counts fewer than {COLUMNS} columns" if sizes[2] >= COLUMNS else None


LACKS = {"similarity_topk": _lacks_topk}
