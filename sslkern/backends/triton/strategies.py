"""Which of two ways `similarity_lse` and `similarity_softplus` take: "fused" kernels, or those that write weights for
products of the library, which are "shared" by both gradients.

The rule below is a prediction from flop and bytes until `python -m sslkern.backends.triton.tuning` has measured both on
a chip; what it found is kept on disk and goes first.
"""

import torch
from torch import Tensor

from .hardware import Hardware, tf32
from .tuning import tuned

STRATEGIES = ("fused", "shared")
WIDEST = 2**23  # columns; places within a tile of weights are 32 bits
LEAST = 2**22  # scores; below, the fused kernels' few launches are all that counts

_forced: list[str] = []


class use_strategy:
    """`with use_strategy("shared"):` for measurements; for the process, as a backward has threads of its own."""

    def __init__(self, name: str):
        if name not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, not {name!r}")
        self.name = name

    def __enter__(self) -> None:
        _forced.append(self.name)

    def __exit__(self, *exc) -> None:
        _forced.pop()


def strategy(q: Tensor, N: int, M: int, chip: Hardware) -> str:
    """Which one the problem takes."""
    if q.ndim == 3 or M >= WIDEST:
        return "fused"
    return _forced[-1] if _forced else _rule(q, N, M, chip)


def _rule(q: Tensor, N: int, M: int, chip: Hardware) -> str:
    D = q.shape[-1]
    if N * M < LEAST:
        return "fused"
    found = tuned(chip).get("strategy", {}).get(key(q.dtype, D))
    if found in STRATEGIES:
        return found
    # The accumulators of a gradient fit in the registers for 256 features, so that more need S once more. Without
    # matrix units the library multiplies faster than a kernel.
    return "shared" if D > 256 or _no_matrix_units(q) else "fused"


def scores_by_library(q: Tensor, q_limit: Tensor | None, one_sided: bool) -> bool:
    """Whether, where products are "shared", S is one as well, which the kernels read: for fp32 without matrix units.

    Not with limits, on which forward and backward must agree to the bit, and where rows and columns of q with itself
    differ. In bf16 it took 1.2 to 6.9 times as long as the better of the two other ways (H100).
    """
    return _no_matrix_units(q) and q_limit is None and not one_sided


def _no_matrix_units(q: Tensor) -> bool:
    return q.dtype == torch.float32 and not tf32(q.dtype)


def key(dtype: torch.dtype, D: int) -> str:
    """What a measured choice is kept under: features to the next power of two."""
    return f"{'tf32' if tf32(dtype) else str(dtype).removeprefix('torch.')} {1 << max(4, (D - 1).bit_length())}"
