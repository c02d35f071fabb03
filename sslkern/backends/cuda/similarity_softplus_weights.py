"""`similarity_softplus` on Hopper for many features: kernels sum up a strip of rows at a time and write its weights,
which products by BLAS turn into gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import strips
from ..strips import Strip
from .launch import Call
from .pairs import Pairs
from .similarity_lse_sides import addresses_of
from .similarity_lse_weights import BLOCK, CHUNKED, COLUMNS, TILE, plan_of, rows_of_strip


class Terms(NamedTuple):
    """t_ij = sign (s_ij + bias_i), and weights of rows: kernels/softplus.h."""

    bias: Tensor | None  # [N] fp32, without gaps or one number for all
    weights: Tensor | None  # [N] fp32
    fold: Tensor | None  # [] fp32, by what weights are multiplied on their way through fp16
    sign: float

    def words(self, first: int = 0) -> tuple:
        """Of the rows from `first` on."""
        rows = (None if x is None else x[first:] for x in (self.bias, self.weights))
        return *addresses_of(*rows, self.fold), self.sign, 0 if self.bias is None else self.bias.stride(0)


def sums_of(
    pairs: Pairs, terms: Terms, need_q: bool, need_k: bool, need_scale: bool, need_bias: bool, need_k_bias: bool
) -> tuple[Tensor | None, ...]:
    """Returns row [N], and the gradients of the weighted sum of rows: dq [N, D], dk [M, D], dscale [], dbias [N],
    dk_bias [M] in fp32, None where not needed."""
    N, M, _ = pairs.sizes
    row = torch.empty(N, dtype=torch.float32, device=pairs.q.device)
    dbias = torch.empty_like(row) if need_bias else None
    dscale, dk_bias = [] if need_scale else None, [] if need_k_bias else None

    def write(strip: Strip, weights: Tensor | None) -> None:
        part = pairs.cut(*strip)
        n, M, D = part.sizes

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=row.device)

        call = Call("similarity_softplus_weights", row.device, part.q.dtype, "chunks" if D <= CHUNKED else "stream")
        plan, tiles = plan_of(n, M, D, call.processors), -(-M // COLUMNS)
        rows, of_bias = new(tiles, n), new(tiles, n) if need_bias else None
        of_columns = new(-(-n // 16), M) if need_k_bias else None
        of_scale = new(plan.sums) if need_scale else None
        to = call.matrix("q", part.q, 16) if weights is None else call.matrix("weights", weights, 16)
        call.launch(
            "softplus_{1}<{0}>", plan.blocks, call.matrix("q", part.q, TILE), call.matrix("k", part.k, TILE), to,
            *part.words(), *terms.words(strip.first), *addresses_of(rows, of_bias, of_columns, of_scale),
            plan.slots, plan.stages, weights is not None,
            threads=BLOCK, shared=plan.shared, cluster=plan.cluster,
        )  # fmt: skip
        here = slice(strip.first, strip.stop)
        torch.sum(rows, 0, out=row[here])
        if need_bias:
            torch.sum(of_bias, 0, out=dbias[here])
        if need_k_bias:
            dk_bias.append(of_columns.sum(0))
        if need_scale:
            dscale.append(of_scale.sum())

    cut = strips.cut(N, M, rows_of_strip(M, need_k), False)
    if need_q or need_k:
        dq, dk = strips.gradients(write, pairs.q, pairs.k, cut, False, need_q, need_k)
        dq, dk = strips.scaled(dq, dk, pairs.full_scale, terms.fold)
    else:
        dq = dk = None
        for strip in cut:
            write(strip, None)
    dscale, dk_bias = (None if parts is None else torch.stack(parts).sum(0) for parts in (dscale, dk_bias))
    if terms.fold is not None:
        dscale, dbias, dk_bias = (None if x is None else x / terms.fold for x in (dscale, dbias, dk_bias))
    return row, dq, dk, dscale, dbias, dk_bias
