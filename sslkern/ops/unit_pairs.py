"""`unit_pairs`: two sides of a loss divided by their norms, and the cosines of their pairs, as one autograd node."""

import torch
from torch import Tensor

from ..backends import load
from ._library import Once
from ._tensors import plain


class UnitPairs(torch.autograd.Function):
    """`UnitPairs.apply(x, y, backend)`: x and y [N, D] divided by their norms, and their cosine [N] in fp32.

    Of `plain` tensors."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, backend: str):
        z, norm, cosine = load(backend, "unit_pairs").unit_pairs_fwd(x, y, True)
        ctx.backend = backend
        ctx.save_for_backward(x if x.requires_grad else y, z, norm)
        ctx.set_materialize_grads(False)
        return *z.split(x.shape[0]), cosine

    @staticmethod
    def backward(ctx, da, db, dcosine):
        anchor, z, norm = ctx.saved_tensors
        need_x, need_y, _ = ctx.needs_input_grad
        N, D = anchor.shape
        with torch.no_grad():
            backend = ctx.backend if plain(da, db, dcosine) else "reference"  # which goes through the dispatcher
            pull = norm.new_zeros(N) if dcosine is None else -dcosine
            # In fp32, as the kernels of all backends take them.
            da, db = (norm.new_zeros(N, D) if du is None else du.to(norm.dtype) for du in (da, db))
            dx, dy = load(backend, "unit_pairs").unit_pairs_bwd(z, norm, pull, da, db, need_x, need_y)
        if torch.is_grad_enabled():  # create_graph=True
            dx, dy = Once.apply(anchor, dx, dy)
        return dx, dy, None
