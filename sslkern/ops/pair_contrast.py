"""`pair_contrast`: the losses of pairs against `similarity_lse` negatives, as one node of the graph.

A loss of 32 rows spends its time between the kernels: normalisation, positives and softplus come to twenty autograd
nodes. Here they are one: an autograd.Function in eager code, which costs less than an op's own, and an op in compiled
code.
"""

import functools

import torch
from torch import Tensor

from ..backends import kept_rows, load, resolve
from ..backends.reference.sums import dot
from ._library import Once, define, library
from ._tensors import plain
from .similarity_lse import _accumulator, scale_parts


def pair_contrast(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    ids: Tensor | None,
    mode: str,
    normalize: bool,
    best: bool,
    bank: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """softplus(negatives_i - positive_i), with positive_i = scale * <x_i, y_i>.

    Args:
        x, y: [N, D], normalised first where `normalize` says so.
        scale: a float or a 0-d tensor.
        ids: int64 [N]; rows with equal ids are not contrasted. None: all differ.
        mode: "views": the negatives of a row of x or y are rows of both (NT-Xent); "one_way": rows of y for each of x;
            "two_way": also rows of x for each of y.
        best: also return the largest negative score.
        bank: [M, D], the negatives of "one_way" instead, as they are and without gradient; ids must be None.

    Returns:
        losses [2, N], those of x first ("one_way": [1, N]); positive [N] and best, of the shape of losses, both without
        gradient, or None unless `best`. All in fp32 (fp64).
    """
    views = mode == "views"
    if bank is not None:
        if ids is not None:
            raise ValueError("ids must be None with a bank: its rows have none to compare them with")
        bank = bank.detach()
    elif ids is None:
        ids = row_numbers(x.shape[0], 1 + views, x.device)
    elif views:
        ids = ids.repeat(2)
    scale_tensor, scale = scale_parts(scale, x)
    backend, pairs_backend = resolve("similarity_lse", x), resolve("unit_pairs", x)
    N = x.shape[0]
    scale_learns = scale_tensor is not None and scale_tensor.requires_grad
    learns = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or scale_learns)
    frozen = learns and mode == "one_way" and (bank is not None or not y.requires_grad)
    frozen = frozen and (x.requires_grad or scale_learns)  # the mean of the negatives serves nothing else
    rows = 2 * N if views else N
    keep = kept_rows(backend, rows, rows, x.shape[1], itself=views) if learns and not frozen else 0
    eager = not torch.compiler.is_compiling() and plain(x, y, bank, scale_tensor, ids)
    call = _PairContrast.apply if eager else torch.ops.sslkern.pair_contrast.default
    losses, positive, top, *_ = call(
        x, y, bank, scale_tensor, scale, ids, mode, normalize, best, frozen, keep, backend, pairs_backend
    )
    return losses, positive, top if best else None


def row_numbers(n: int, copies: int, device: torch.device) -> Tensor:
    """`copies` times 0 to n - 1; kept, as for a small batch making them would cost as much as a kernel."""
    # What a CUDA graph or a trace holds on to must be its own, and a fake tensor must not stay.
    once = torch.compiler.is_compiling() or not plain()
    once = once or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    return (_row_numbers.__wrapped__ if once else _row_numbers)(n, copies, device)


@functools.lru_cache(maxsize=8)
def _row_numbers(n: int, copies: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # tensors made in inference mode could not be saved for a later backward
        return torch.arange(n, device=device).repeat(copies)


def _pair_losses(backend: str):
    """Launches count on a GPU only, and torch is as fast elsewhere."""
    return load("triton" if backend == "triton" else "reference", "pair_losses")


def _kernel(x, y, bank, scale_tensor, scale, ids, mode, normalize, best, frozen, keep, backend, pairs_backend):
    N = x.shape[0]
    z, norm, cosine = load(pairs_backend, "unit_pairs").unit_pairs_fwd(x, y, normalize)
    q, k, k_ids = (z, None, None) if mode == "views" else (z[:N], z[N:] if bank is None else bank, ids)
    problem = (scale_tensor, scale, ids, k_ids, False, None, None)
    primitive = load(backend, "similarity_lse")
    if frozen:  # what the gradient needs of the negatives comes with the forward
        (row, kept, top), col = primitive.similarity_lse_frozen_fwd(q, k, *problem, best), None
    else:
        row, col, top, kept = primitive.similarity_lse_fwd(q, k, *problem, mode == "two_way", best, keep)
    bounded = normalize and bank is None and scale_tensor is None and abs(scale) < 1e30  # rows of length 1, or NaN
    losses, positive, gap = _pair_losses(backend).pair_losses_fwd(row, col, cosine, scale_tensor, scale, bounded)
    top = top.view(-1, N) if best else row.new_empty(0)
    col, kept, norm = (row.new_empty(0) if saved is None else saved for saved in (col, kept, norm))
    return losses, positive, top, z, norm, cosine, gap, row, col, kept


def _fake(x, y, bank, scale_tensor, scale, ids, mode, normalize, best, frozen, keep, backend, pairs_backend):
    (N, D), wide = x.shape, _accumulator(x)
    views, sides = mode == "views", 1 if mode == "one_way" else 2

    def new(*shape):
        return x.new_empty(shape, dtype=wide)

    z, norm, cosine = x.new_empty(2 * N, D), new(2 * N if normalize else 0), new(N)
    row, col = new(N * (1 + views)), new(N if mode == "two_way" else 0)
    kept = new(N, D) if frozen else new(keep, N * (1 + views)) if keep else new(0)
    return new(sides, N), new(N), new(sides, N) if best else new(0), z, norm, cosine, new(sides, N), row, col, kept


def _setup(ctx, inputs, output) -> None:
    x, y, _, scale_tensor, ctx.scale, ids, ctx.mode, ctx.normalize, _, ctx.frozen, _, *ctx.backends = inputs
    _, *rest = output
    anchor = next((side for side in (x, y, scale_tensor) if side is not None and side.requires_grad), None)
    ctx.save_for_backward(anchor, scale_tensor, ids, *rest[2:])
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)


def _backward(eager, ctx, g, *_):
    if g is None:
        return (None,) * 13
    anchor, scale_tensor, ids, *saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    options = ctx.mode, ctx.normalize, ctx.frozen, *needs, *ctx.backends
    gradients = _gradients if eager and plain(g) else torch.ops.sslkern.pair_contrast_bwd.default
    with torch.no_grad():
        grads = gradients(g, *saved, scale_tensor, ctx.scale, ids, *options)
    dx, dy, dscale = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    if torch.is_grad_enabled():  # create_graph=True
        dx, dy, dscale = Once.apply(anchor, dx, dy, dscale)
    return dx, dy, None, dscale, *(None,) * 9


def _gradients(
    g,
    z,
    norm,
    cosine,
    gap,
    row,
    col,
    kept,
    scale_tensor,
    scale,
    ids,
    mode,
    normalize,
    frozen,
    need_x,
    need_y,
    need_scale,
    backend,
    pairs_backend,
):
    N, views = cosine.shape[0], mode == "views"
    col, norm = col if mode == "two_way" else None, norm if normalize else None
    weight, toward, pull = _pair_losses(backend).pair_losses_bwd(gap, g, scale_tensor, scale)
    mean, kept = kept, kept if kept.numel() else None
    problem = (scale_tensor, scale, ids, None if views else ids, False, None, None, kept)
    backward = load(backend, "similarity_lse").similarity_lse_bwd
    dscale = row.new_empty(0)
    if frozen or ids is None:  # keys that do not learn, or a bank
        # d negatives / dx = scale * mean, the mean of the keys as the softmax weighs them
        da = pull.unsqueeze(1) * mean if need_x else None
        db = cosine.new_zeros(N, z.shape[1]) if need_y else None
        if need_scale:
            dscale = dot(toward, (z[:N] * mean).sum(1) - cosine)
    elif views:
        grads = backward(z, None, row, None, weight.view(-1), None, *problem, True, False, need_scale, False)
        da, db = grads[0][:N], grads[0][N:]
    else:
        h = None if col is None else weight[1]
        grads = backward(z[:N], z[N:], row, col, weight[0], h, *problem, need_x, need_y, need_scale, False)
        da, db = grads[:2]
    if need_scale:
        dscale = (dscale if frozen else grads[2] - dot(toward, cosine)).to(scale_tensor.dtype)
    dx, dy = load(pairs_backend, "unit_pairs").unit_pairs_bwd(z, norm, pull, da, db, need_x, need_y)
    return *(z.new_empty(0) if grad is None else grad for grad in (dx, dy)), dscale


def _gradients_fake(g, z, *args):
    *_, scale_tensor, _, _, _, _, _, need_x, need_y, need_scale, _, _ = args
    cosine, half = args[1], (z.shape[0] // 2, z.shape[1])
    dscale = torch.empty_like(scale_tensor) if need_scale else cosine.new_empty(0)
    return z.new_empty(half if need_x else 0), z.new_empty(half if need_y else 0), dscale


define(
    "pair_contrast(Tensor x, Tensor y, Tensor? bank, Tensor? scale_tensor, float scale, Tensor? ids, str mode,"
    " bool normalize, bool best, bool frozen, int keep, str backend, str pairs_backend) -> (Tensor losses,"
    " Tensor positive, Tensor best, Tensor z, Tensor norm, Tensor cosine, Tensor gap, Tensor row, Tensor col,"
    " Tensor kept)",
    _kernel,
    _fake,
)
define(
    "pair_contrast_bwd(Tensor g, Tensor z, Tensor norm, Tensor cosine, Tensor gap, Tensor row, Tensor col, Tensor kept,"
    " Tensor? scale_tensor, float scale, Tensor? ids, str mode, bool normalize, bool frozen, bool need_x, bool need_y,"
    " bool need_scale, str backend, str pairs_backend) -> (Tensor dx, Tensor dy, Tensor dscale)",
    _gradients,
    _gradients_fake,
)
torch.library.register_autograd(
    "sslkern::pair_contrast",
    functools.partial(_backward, False),
    setup_context=_setup,
    lib=library,
)


class _PairContrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _kernel(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(functools.partial(_backward, True))
