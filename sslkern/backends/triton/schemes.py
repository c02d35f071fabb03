"""By which of two schemes gradients of `similarity_lse` and `similarity_softplus` are made: "fused", a kernel for each
side, which computes S again; or "shared", weights that a kernel writes once, for products by BLAS for both sides.

The rule below is a prediction from flop and bytes until `python -m sslkern.backends.triton.tuning` has measured both on
a chip, which goes first then.
"""

from torch import Tensor

from . import measured
from .chips import Chip, matrix_units

SCHEMES = ("fused", "shared")
WIDEST = 2**23  # columns; places within a tile of weights are 32 bits
LEAST = 2**22  # scores; below, the fused kernels' few launches are all that counts

_forced: list[str] = []


class use_scheme:
    """`with use_scheme("shared"):` for measurements; for the process, as a backward has threads of its own."""

    def __init__(self, name: str):
        if name not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, not {name!r}")
        self.name = name

    def __enter__(self) -> None:
        _forced.append(self.name)

    def __exit__(self, *exc: object) -> None:
        _forced.pop()


def is_shared(q: Tensor, N: int, M: int, chip: Chip) -> bool:
    """Whether the problem takes that scheme."""
    if q.ndim == 3 or M >= WIDEST:
        return False
    if _forced:
        return _forced[-1] == "shared"
    return _rule(q, N, M, chip) == "shared"


def _rule(q: Tensor, N: int, M: int, chip: Chip) -> str:
    if N * M < LEAST:
        return "fused"
    D = q.shape[-1]
    found = measured.on(chip)["scheme"].get(measured.key(q.dtype, D))
    if found in SCHEMES:
        return found
    # The accumulators of a gradient fit in the registers for 256 features, so that more need S once more. Without
    # matrix units BLAS multiplies faster than a kernel.
    return "shared" if D > 256 or not matrix_units(q.dtype) else "fused"


def scores_by_blas(q: Tensor, q_limit: Tensor | None, one_sided: bool) -> bool:
    """Whether in the scheme "shared" S is a product by BLAS as well, which the kernels read: for true fp32.

    Not with limits, on which forward and backward must agree to the bit, and where rows and columns of q with itself
    differ. In bf16 it took 1.2 to 6.9 times as long as the better of the two schemes (H100).
    """
    return not matrix_units(q.dtype) and q_limit is None and not one_sided
