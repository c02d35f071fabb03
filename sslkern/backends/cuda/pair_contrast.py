"""The loss of few pairs as a whole: two kernels make it and its gradients, a third one multiplies them by what arrives
in the backward."""

import functools

import torch
from torch import Tensor

from . import driver
from .launch import PIECE, Call, at_most, missing

FP32 = torch.float32
ROWS, WARPS, THREADS = 16, 8, 256  # as in kernels/pair_contrast.cu
MODES = "views", "one_way", "two_way"
# Features up to which, blocks of 8 keys of a warp, blocks of 8 features of a warp.
CLASSES = (128, 4, 2), (512, 1, 8), (1024, 1, 16)
MOST_ROWS = 1024  # that have negatives; more keep a GPU busy in kernels of their own


def lacks(x: Tensor, sizes: tuple[int, ...], mode: str, bank: bool, **_) -> str | None:
    """Why it is none of its own, or None."""
    rows, (N, D) = sizes[1], x.shape
    if bank:
        return "it contrasts pairs with each other only"
    if rows > MOST_ROWS or N == 0 or D == 0 or D > CLASSES[-1][0]:
        return f"it takes {MOST_ROWS} rows of {CLASSES[-1][0]} features, and not none"
    if x.dtype == FP32:
        return "it takes numbers of 16 bits"
    return _missing(x.dtype, *_class_of(D), x.device.index or 0)


@torch.compiler.assume_constant_result
def _missing(dtype: torch.dtype, blocks: int, slice: int, index: int) -> str | None:
    if _shared(blocks, slice) > driver.shared_memory(index):
        return "this GPU has too little shared memory for so many features"
    return missing("pair_contrast", (dtype,), index) or missing("pair_gradients", (dtype, blocks, slice), index)


def _class_of(D: int) -> tuple[int, int]:
    return next((blocks, slice) for most, blocks, slice in CLASSES if most >= D)


def _shared(blocks: int, slice: int) -> int:
    """Bytes: the keys of a pass, and their weights."""
    keys = WARPS * 8 * blocks
    return 2 * (keys * (WARPS * slice * 8 + 8) + ROWS * (keys + 8))


def pair_contrast_fwd(
    x: Tensor,
    y: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    ids: Tensor | None,
    mode: str,
    normalize: bool,
    best: bool,
    share: float,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
) -> tuple[Tensor | None, ...]:
    """loss [] = share * the sum of the losses; positive [N] and best [sides, N] if asked for; and for an upstream
    gradient of 1 grad [1 or 2, N, D] of x, y or both and parts of that of scale_tensor."""
    (N, D), dtype, sides, blocks = x.shape, x.dtype, _sides(mode), -(-x.shape[0] // ROWS)
    x, y = x.contiguous(), y.contiguous()
    ids = None if ids is None else ids.contiguous()
    new, grads = functools.partial(x.new_empty, dtype=FP32), need_x + 2 * need_y
    loss, scratch = new(()), new(5 * N)
    positive, top = (new(N), new((sides, N))) if best else (None, None)
    grad = new((need_x + need_y, N, D)) if grads else None
    dscale = new(2 * blocks) if need_scale else None
    call, shape = Call("pair_contrast", x.device, dtype), _class_of(D)
    from_x, from_y = call.address("x", x, dtype, N * D), call.address("y", y, dtype, N * D)
    whole = D % PIECE == 0 and from_x % 16 == 0 and from_y % 16 == 0
    given = from_x, from_y, call.address("ids", ids, torch.int64, N), call.address("scale", scale_tensor, FP32, 1)
    pairs = *given, scale, N, D, MODES.index(mode), normalize, whole
    lse = scratch.data_ptr()
    between = lse, lse + 4 * 2 * N, lse + 4 * 3 * N  # the log-sum-exps, cosines and lengths
    call.launch("pair_scores<{0}>", sides * blocks, *pairs, *between, _start(top), _start(positive))
    Call("pair_gradients", x.device, dtype, *shape).launch(
        "pair_gradients<{0}, {1}, {2}>",
        2 * blocks if grads or need_scale else 1,
        *(*pairs, *between, share, grads, loss.data_ptr(), _start(grad), _start(dscale)),
        shared=_shared(*shape),
    )
    return loss, positive, top, grad, dscale


def _start(x: Tensor | None) -> int:
    """Where a tensor that was made here lies."""
    return 0 if x is None else x.data_ptr()


def pair_contrast_fake(
    x, y, scale_tensor, scale, ids, mode, normalize, best, reduction, need_x, need_y, need_scale
) -> tuple[Tensor, ...]:
    (N, D), sides, new = x.shape, _sides(mode), functools.partial(x.new_empty, dtype=FP32)
    grad = new((need_x + need_y, N, D) if need_x or need_y else 0)
    dscale = new(2 * ((N + ROWS - 1) // ROWS) if need_scale else 0)
    return new(()), new(N if best else 0), new((sides, N) if best else 0), grad, dscale


def pair_contrast_bwd(
    g: Tensor,
    grad: Tensor | None,
    dscale: Tensor | None,
    dtype: torch.dtype,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
) -> tuple[Tensor | None, ...]:
    """dx, dy [N, D] in the type of x, dscale [], from g [] and what the forward kept."""
    numbers = grad[0].numel() if need_x or need_y else 0
    dx, dy = (grad.new_empty(grad.shape[1:], dtype=dtype) if need else None for need in (need_x, need_y))
    of_scale, parts = (dscale.new_empty(()), dscale.numel()) if need_scale else (None, 0)
    call = Call("pair_contrast", g.device, dtype)
    given = call.address("g", g.contiguous(), FP32, 1), _start(grad), _start(dscale)
    blocks = max(1, at_most(-(-numbers // (4 * THREADS))))
    call.launch("scaled_gradients<{0}>", blocks, numbers, parts, *given, _start(dx), _start(dy), _start(of_scale))
    return dx, dy, of_scale


def _sides(mode: str) -> int:
    return 1 if mode == "one_way" else 2
