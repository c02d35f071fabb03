"""`unit_pairs`: two sides of a loss divided by their norms, and the cosines of their pairs.

    u = x / |x|      cosine_i = <u_i, v_i>

With du the gradient of u, to which cosine adds dcosine_i v_i:      dx = (du - u <u, du>) / |x|
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import load, resolve
from ..common.node import Node, once, past_dispatcher_in
from ..common.rows import dots, unit
from ..common.tensors import plain, transformed


def unit_pairs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x and y [N, D] divided by their norms, and their cosine [N], in fp32 (fp64)."""
    # The compiler fuses the formula with its surroundings.
    if torch.compiler.is_compiling() or transformed() or not plain(x, y):
        x, y = unit(x), unit(y)
        return x, y, dots(x, y)
    learns = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    a, b, cosine, *_ = _node.way(learns)(x, y, resolve("unit_pairs", x))
    return a, b, cosine


def _forward(x: Tensor, y: Tensor, backend: str) -> tuple[Tensor, ...]:
    z, norm, cosine = load(backend, "unit_pairs").unit_pairs_fwd(x, y, True)
    return *z.split([len(x), len(y)]), cosine, z, norm  # also of no rows


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, y, ctx.backend = inputs
    *_, z, norm = outputs
    ctx.save_for_backward(x, y, z, norm)


def _backward(
    ctx: Any, da: Tensor | None, db: Tensor | None, dcosine: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, y, z, norm = ctx.saved_tensors
    need_x, need_y, _ = ctx.needs_input_grad
    upstream = da, db, dcosine
    with torch.no_grad():
        # The reference goes through the dispatcher.
        backend = ctx.backend if past_dispatcher_in(ctx, *upstream) else "reference"
        pull = norm.new_zeros(len(x)) if dcosine is None else -dcosine
        # In fp32, as the kernels of all backends take them.
        da, db = (norm.new_zeros(x.shape) if du is None else du.to(norm.dtype) for du in (da, db))
        dx, dy = load(backend, "unit_pairs").unit_pairs_bwd(z, norm, pull, da, db, need_x, need_y)
    return *once((*upstream, x, y), dx, dy), None


_node = Node(_forward, _save, _backward, name="unit_pairs", outputs=3)
