"""`similarity_lse` of 16-bit features on Hopper: which kernels take which part.

The forward sums with a shift for each segment (similarity_lse_forward.py), and what that cannot represent a row owner
with a running maximum computes again, which also finds the best scores and serves frozen keys (similarity_lse_rows.py).
In the backward an owner of rows holds its gradient in registers as long as that fits (similarity_lse_gradient.py); of
more features a kernel writes the weights of a strip of rows for two products by BLAS
(similarity_lse_weights.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem import Problem
from ..reference import similarity_lse as reference
from . import similarity_lse_forward as forward
from . import similarity_lse_gradient as gradient
from . import similarity_lse_rows as rows
from . import similarity_lse_weights as weights
from .pairs import Pairs
from .pairs import lacks as lacks_of

BOTH_SIDES = 128  # features up to which two gradients come from owners of rows, which compute S for each of them


def lacks(x: Tensor, sizes: tuple[int, ...], limit: bool = False, frozen: bool = False, **_: object) -> str | None:
    """Why it cannot run for features x, or None. The first to ask compiles what it then needs."""
    return lacks_of(x, sizes, limit, _programs(x.dtype, sizes[-1], frozen))


def _programs(dtype: torch.dtype, D: int, frozen: bool) -> list[tuple]:
    """What a forward and its backward need of compile.PROGRAMS, with their arguments."""
    if frozen and D <= rows.FROZEN_FEATURES[-1]:
        return [("similarity_extents",), ("similarity_lse_frozen", dtype, least(rows.FROZEN_FEATURES, D))]
    needed = [
        ("similarity_extents",),
        ("similarity_lse_forward", dtype, least(forward.FEATURES, D)),
        ("similarity_lse_merge",),
        ("similarity_lse_running", dtype),
        ("similarity_lse_sides",),
    ]
    if D <= gradient.MOST_FEATURES and not frozen:
        needed.append(("similarity_lse_gradient", dtype, least([shape[0] for shape in gradient.SHAPES], D)))
    if D > BOTH_SIDES:
        needed.append(("similarity_lse_weights", dtype, "chunks" if D <= weights.CHUNKED else "stream"))
    return needed


def least(classes: Sequence[int], D: int) -> int:
    """The class of kernels for D features, 0 beyond the largest."""
    for features in classes:  # not next(), which the compiler of torch 2.6 does not know
        if D <= features:
            return features
    return 0


def similarity_lse_fwd(problem: Problem, columns: bool, need_best: bool, kept_rows: int) -> tuple[Tensor | None, ...]:
    """Returns row [N], col [M] or None, best [N + M or N] or None, and no scores: it does not keep them."""
    if 0 in problem.sizes:
        return reference.similarity_lse_fwd(problem, columns, need_best, 0)
    pairs = Pairs.of(problem)
    if need_best:
        return *rows.with_best(pairs, columns), None
    row, row_flags, col, col_flags = forward.log_sum_exps(pairs, columns)
    rows.redo(pairs, row, row_flags, col, col_flags)
    return row, col, None, None


def similarity_lse_frozen_fwd(problem: Problem, need_best: bool) -> tuple[Tensor | None, ...]:
    """Returns row [N], mean [N, D] = sum_j softmax_ij k_j (0 for an empty row), best [N] or None."""
    if 0 in problem.sizes:
        return reference.similarity_lse_frozen_fwd(problem, need_best)
    pairs = Pairs.of(problem)
    if pairs.sizes[-1] <= rows.FROZEN_FEATURES[-1]:
        return rows.frozen(pairs, need_best)
    row, _, best, _ = similarity_lse_fwd(problem, False, need_best, 0)
    return row, weights.means_of(pairs, row), best


def similarity_lse_bwd(
    problem: Problem, row: Tensor | None, col: Tensor | None, g: Tensor | None, h: Tensor | None, kept: Tensor | None,
    need_q: bool, need_k: bool, need_scale: bool, need_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns dq [N, D], dk [M, D], dscale [], dbias [M], None where not needed; k=None: all of dZ in dq."""
    if 0 in problem.sizes:
        return reference.similarity_lse_bwd(problem, row, col, g, h, kept, need_q, need_k, need_scale, need_bias)
    pairs, needs = Pairs.of(problem), (need_q, need_k, need_scale, need_bias)
    row, col, g, h = (None if x is None else x.contiguous() for x in (row, col, g, h))
    if pairs.sizes[-1] > (BOTH_SIDES if need_q and need_k else gradient.MOST_FEATURES):
        return weights.gradients_of(pairs, row, col, g, h, *needs)
    of_side = pairs, row, g, col, h
    if pairs.itself:
        dq, dscale, dbias = gradient.gradient_of(*of_side, False, need_q, need_scale, need_bias)
        return dq, None, dscale, dbias
    # One pass for each side, of which the first brings the gradient of the scale.
    dq = dk = dscale = dbias = None
    if need_q or not (need_k or need_bias):
        dq, dscale, _ = gradient.gradient_of(*of_side, False, need_q, need_scale, False)
    if need_k or need_bias:
        need_scale = need_scale and dscale is None
        dk, of_scale, dbias = gradient.gradient_of(*of_side, True, need_k, need_scale, need_bias)
        dscale = of_scale if dscale is None else dscale
    return dq, dk, dscale, dbias
