"""Which of three ways `similarity_lse` and `similarity_softplus` take: "fused" kernels; those that write weights for
products of the library, "shared" by both gradients; or those that also read products of the "library".

The rule below is a prediction from flop and bytes until `python -m sslkern.backends.triton.tuning` has measured all on
a chip; what it found is kept on disk and goes first.
"""

import torch
from torch import Tensor

from .hardware import Hardware, tf32
from .tuning import tuned

STRATEGIES = ("fused", "shared", "library")
WIDEST = 2**23  # columns; places within a tile of weights are 32 bits
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


def strategy(q: Tensor, N: int, M: int, q_limit: Tensor | None, one_sided: bool, chip: Hardware) -> str:
    """Which one the problem takes. Not "library" with limits, on which forward and backward must agree to the bit, and
    where rows and columns of q with itself differ."""
    if q.ndim == 3 or M >= WIDEST:
        return "fused"
    name = _forced[-1] if _forced else _rule(q, N, M, chip)
    return "shared" if name == "library" and (q_limit is not None or one_sided) else name


def _rule(q: Tensor, N: int, M: int, chip: Hardware) -> str:
    D = q.shape[-1]
    if N * M < LEAST:
        return "fused"
    found = tuned(chip).get("strategy", {}).get(key(q.dtype, D))
    if found in STRATEGIES:
        return found
    if q.dtype == torch.float32 and not tf32(q.dtype):  # no matrix units
        return "library"
    # The accumulators of a gradient fit in the registers for 256 features, so that more need S once more.
    return "shared" if D > 256 else "fused"


def key(dtype: torch.dtype, D: int) -> str:
    """What a measured choice is kept under: features to the next power of two."""
    return f"{'tf32' if tf32(dtype) else str(dtype).removeprefix('torch.')} {1 << max(4, (D - 1).bit_length())}"
