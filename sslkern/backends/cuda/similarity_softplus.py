"""`similarity_softplus` of 16-bit features on Hopper: which kernels take which part.

Each pass over S sums up softplus and computes the weights of the gradients from the same exponential. An owner of rows
holds the gradient of its side in registers as long as that fits (similarity_softplus_gradient.py); of more features
weights are written, a strip of rows at a time, for two products by BLAS (similarity_softplus_weights.py).
"""

from torch import Tensor

from .. import strips
from ..problem import Problem
from ..reference import similarity_softplus as reference
from . import similarity_softplus_gradient as gradient
from . import similarity_softplus_weights as weighing
from .pairs import Pairs
from .pairs import lacks as lacks_of


def lacks(x: Tensor, sizes: tuple[int, ...], limit: bool = False, **_: object) -> str | None:
    """Why it cannot run for features x, or None. The first to ask compiles what it then needs."""
    if sizes[-1] <= gradient.FEATURES:
        program = "similarity_softplus_gradient", x.dtype
    else:
        program = "similarity_softplus_weights", x.dtype, "chunks" if sizes[-1] <= weighing.CHUNKED else "stream"
    return lacks_of(x, sizes, limit, [("similarity_extents",), program])


def similarity_softplus_fwd(
    problem: Problem, bias: Tensor | None, weights: Tensor | None, sign: float,
    need_q: bool, need_k: bool, need_scale: bool, need_bias: bool, need_k_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns total [], row [N], and the gradients of total, None where not needed: dq [N, D], dk [M, D], dscale [],
    dbias [N], dk_bias [M]; k=None: all of the gradient in dq."""
    needs = need_q, need_k, need_scale, need_bias, need_k_bias
    if 0 in problem.sizes:
        return reference.similarity_softplus_fwd(problem, bias, weights, sign, *needs)
    pairs = Pairs.of(problem)
    weights = None if weights is None else weights.contiguous()
    if bias is not None and bias.stride(0) != 0:
        bias = bias.contiguous()
    terms = weighing.Terms(bias, weights, strips.fold_of(pairs.q, (weights,)), sign)
    needs = need_q, need_q if pairs.itself else need_k, need_scale, need_bias, need_k_bias
    kernels = gradient if pairs.sizes[-1] <= gradient.FEATURES else weighing
    row, dq, dk, dscale, dbias, dk_bias = kernels.sums_of(pairs, terms, *needs)
    if pairs.itself and need_q:
        dq, dk = dq.add_(dk), None
    total = (row if weights is None else row * weights).sum()
    return total, row, dq, dk, dscale, dbias, dk_bias
