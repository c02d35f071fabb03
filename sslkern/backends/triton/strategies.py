"""Which of two ways `similarity_lse` is computed: fused kernels, or library products and kernels that read them.

The rule below is a prediction from flop and bytes until `python -m sslkern.backends.triton.tuning` has measured both on
a chip; what it found is kept on disk and goes first.
"""

import torch
from torch import Tensor

from .hardware import Hardware, tf32
from .tuning import tuned

STRATEGIES = ("fused", "library")
LEAST = 2**22  # scores; below, the fused kernels' few launches are all that counts

_forced: list[str] = []


class use_strategy:
    """`with use_strategy("library"):` for measurements; for the process, as a backward has threads of its own."""

    def __init__(self, name: str):
        if name not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, not {name!r}")
        self.name = name

    def __enter__(self) -> None:
        _forced.append(self.name)

    def __exit__(self, *exc) -> None:
        _forced.pop()


def by_library(q: Tensor, N: int, M: int, q_limit: Tensor | None, one_sided: bool, chip: Hardware) -> bool:
    """Whether the problem goes to the library. Not with limits, on which forward and backward must agree to the bit,
    and not where rows and columns of q with itself differ."""
    if q.ndim == 3 or q_limit is not None or one_sided:
        return False
    if _forced:
        return _forced[-1] == "library"
    if N * M < LEAST:
        return False
    D = q.shape[-1]
    found = tuned(chip).get("strategy", {}).get(key(q.dtype, D))
    if found is not None:
        return found == "library"
    # A score costs some 14 bytes of memory traffic there. Fused: fp32 has no matrix units, and of gradients 256
    # features fit in the registers, so that S is computed once more for each part of them.
    return D > 512 or q.dtype == torch.float32 and not tf32(q.dtype)


def key(dtype: torch.dtype, D: int) -> str:
    """What a measured choice is kept under: features to the next power of two."""
    return f"{'tf32' if tf32(dtype) else str(dtype).removeprefix('torch.')} {1 << max(4, (D - 1).bit_length())}"
