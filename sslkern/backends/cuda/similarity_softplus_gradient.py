"""`similarity_softplus` on Hopper by owners of rows, for few features: S is computed once more for the second side."""

import torch
from torch import Tensor

from .launch import Call
from .pairs import Pairs
from .similarity_lse_gradient import ROWS, THREADS_OF_ROWS, shared_of, split_of
from .similarity_lse_sides import addresses_of
from .similarity_softplus_weights import Terms

# At most, columns of a tile, and how many of these are under way: as in kernels/similarity_softplus_gradient.cu.
FEATURES, WIDTH, STAGES = 128, 64, 8


def sums_of(
    pairs: Pairs, terms: Terms, need_q: bool, need_k: bool, need_scale: bool, need_bias: bool, need_k_bias: bool
) -> tuple[Tensor | None, ...]:
    """As similarity_softplus_weights.sums_of."""
    row, dq, dscale, dbias = _of_side(pairs, terms, False, need_q, need_scale, need_bias)
    dk = dk_bias = None
    if need_k or need_k_bias:
        _, dk, _, dk_bias = _of_side(pairs, terms, True, need_k, False, need_k_bias)
    return row, dq, dk, dscale, dbias, dk_bias


def _of_side(
    pairs: Pairs, terms: Terms, transposed: bool, need_x: bool, need_scale: bool, need_bias: bool
) -> list[Tensor | None]:
    """Of the queries, or transposed of the keys: sums of softplus of the queries, dx, dscale, and what belongs to the
    bias of this side."""
    if transposed:
        pairs = pairs.turned()
    (N, M, D), q = pairs.sizes, pairs.q
    call = Call("similarity_softplus_gradient", q.device, q.dtype)
    blocks, tiles = -(-N // ROWS), -(-M // WIDTH)
    each, splits = split_of(blocks, tiles, call.processors)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    rows, dx = None if transposed else new(splits, N), new(splits, N, -(-D // 8) * 8) if need_x else None
    dscale, dbias = new(blocks * splits, 8) if need_scale else None, new(splits, N) if need_bias else None
    call.launch(
        "softplus_rows<{0}>", blocks * splits, call.matrix("x", q, ROWS), call.matrix("y", pairs.k, WIDTH),
        *pairs.words(), *terms.words(), *addresses_of(rows, dx, dscale, dbias), tiles, each, transposed,
        threads=THREADS_OF_ROWS, shared=shared_of(FEATURES, WIDTH, STAGES, 0),
    )  # fmt: skip
    rows, dx, dbias = (None if x is None else x[0] if splits == 1 else x.sum(0) for x in (rows, dx, dbias))
    if dx is not None and dx.shape[1] != D:
        dx = dx[:, :D].contiguous()
    return [rows, dx, None if dscale is None else dscale.sum(), dbias]
