"""`logsumexp`: what joins the results of `similarity_lse`, plain PyTorch.

y = log sum_j exp(x_j)      dx_j = g exp(x_j - y)      where every x_j is -inf: y = -inf, dx_j = 0
"""

import math

from torch import Tensor

from ..common.arguments import FLOATS, check_dense
from ..common.numbers import check_size, shown


def logsumexp(x: Tensor, dim: int = -1) -> Tensor:
    """`torch.logsumexp` that is safe where nothing is left: of -inf alone it is -inf, with gradient 0 instead of NaN.

    A row without a pair is -inf in `similarity_lse`; this joins the rows of several calls (other keys or groups),
    or those of a batch, and lets the loss train where some, or all, are such.

    Args:
        x: of any shape, fp32, bf16, fp16 or fp64; -inf is what was left out.
        dim: the dimension that is summed over; it may be empty.

    Returns:
        x without that dimension, in its type.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> q, near, far = torch.randn(8, 16), torch.randn(0, 16), torch.randn(100, 16)
        >>> rows = [sslkern.ops.similarity_lse(q, k) for k in (near, far)]  # of near nothing is left
        >>> torch.allclose(sslkern.ops.logsumexp(torch.stack(rows), 0), rows[1])
        True
    """
    check_dense("x", x)
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"x must be a tensor of fp32, bf16, fp16 or fp64, not {shown(x)}")
    dim = check_size("dim", dim, -x.ndim)
    if dim >= x.ndim:
        raise ValueError(f"dim must be a dimension of x {list(x.shape)}, not {dim}")
    empty = (x == -math.inf).all(dim, keepdim=True)
    return x.masked_fill(empty, 0).logsumexp(dim).masked_fill(empty.squeeze(dim), -math.inf)
