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
# Features up to which: blocks of 8 keys of a warp, blocks of 8 features of a warp.
CLASSES = (128, (4, 2)), (512, (1, 8)), (1024, (1, 16))
MOST_ROWS = 1024  # that have negatives; more keep a GPU busy in kernels of their own


def lacks(x: Tensor, sizes: tuple[int, ...], mode: str, bank: bool, **_) -> str | None:
    """Why it is none of its own, or None."""
    _, rows, _, D = sizes
    if bank:
        return "it contrasts pairs with each other only"
    if rows > MOST_ROWS or rows == 0 or D == 0 or D > CLASSES[-1][0]:
        return f"it takes {MOST_ROWS} rows of {CLASSES[-1][0]} features, and not none"
    if x.dtype == FP32:
        return "it takes numbers of 16 bits"
    return _missing(x.dtype, _class_of(D), x.device.index or 0)


@torch.compiler.assume_constant_result
def _missing(dtype: torch.dtype, shape: tuple[int, int], index: int) -> str | None:
    if SHARED[shape] > driver.shared_memory(index):
        return "this GPU has too little shared memory for so many features"
    return missing("pair_contrast", (dtype, *shape), index) or missing("scaled_gradients", (dtype,), index)


def _class_of(D: int) -> tuple[int, int]:
    for most, shape in CLASSES:
        if D <= most:
            return shape


def _shared(blocks: int, slice: int) -> int:
    """Bytes of shared memory: the keys of a pass, and their weights."""
    keys = WARPS * 8 * blocks
    return 2 * (keys * (WARPS * slice * 8 + 8) + ROWS * (keys + 8))


SHARED = {shape: _shared(*shape) for _, shape in CLASSES}


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
    """loss [] = share * the sum of the losses; positive [N] and best [sides, N] if asked for; and kept, for an upstream
    gradient of 1 that of x, y or both, [N, D] each, and then that of scale_tensor in parts."""
    (N, D), dtype, shape, learn = x.shape, x.dtype, _class_of(x.shape[1]), need_x + need_y
    x, y, blocks = x.contiguous(), y.contiguous(), _blocks(N)
    loss, scratch = x.new_empty((), dtype=FP32), x.new_empty(5 * N, dtype=FP32)
    kept = x.new_empty(learn * N * D + 2 * blocks * need_scale, dtype=FP32) if learn or need_scale else None
    positive, top = (x.new_empty(N, dtype=FP32), x.new_empty(_sides(mode), N, dtype=FP32)) if best else (None, None)
    call = Call("pair_contrast", x.device, dtype, *shape)
    from_x, from_y = call.address("x", x, dtype, N * D), call.address("y", y, dtype, N * D)
    from_ids = 0 if ids is None else call.address("ids", ids.contiguous(), torch.int64, N)
    by = 0 if scale_tensor is None else call.address("scale", scale_tensor, FP32, 1)
    whole = D % PIECE == 0 and (from_x | from_y) % 16 == 0
    lse, grad = scratch.data_ptr(), _start(kept)
    cosine, lengths = lse + 4 * 2 * N, lse + 4 * 3 * N
    given = from_x, from_y, from_ids, by, scale, N, D, MODES.index(mode), normalize, whole, lse, cosine, lengths
    call.launch("pair_scores<{0}>", _sides(mode) * blocks, *given, _start(top), _start(positive))
    call.launch(
        "pair_gradients<{0}, {1}, {2}>",
        1 if kept is None else 2 * blocks,
        *(*given, share, need_x + 2 * need_y, loss.data_ptr(), grad, grad + 4 * learn * N * D if need_scale else 0),
        shared=SHARED[shape],
    )
    return loss, positive, top, kept


def pair_contrast_fake(
    x, y, scale_tensor, scale, ids, mode, normalize, best, reduction, need_x, need_y, need_scale
) -> tuple[Tensor, ...]:
    (N, D), new = x.shape, functools.partial(x.new_empty, dtype=FP32)
    top = new((_sides(mode), N) if best else 0)
    return new(()), new(N if best else 0), top, new((need_x + need_y) * N * D + 2 * _blocks(N) * need_scale)


def pair_contrast_bwd(
    g: Tensor, x: Tensor | None, y: Tensor | None, scale_tensor: Tensor | None, kept: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """The gradients of those of x, y (of this type) and scale_tensor that are given, from g [] and what was kept."""
    dx, dy, dscale = _like(x), _like(y), _like(scale_tensor)
    one = dy if dx is None else dx
    numbers = 0 if one is None else one.numel()
    before = numbers * ((dx is not None) + (dy is not None))
    grad = kept.data_ptr()
    call = Call("scaled_gradients", g.device, dtype)
    from_g = call.address("g", g.contiguous(), FP32, 1)
    blocks = max(1, at_most(-(-numbers // (4 * THREADS))))
    given = numbers, kept.numel() - before, from_g, grad, grad + 4 * before
    call.launch("scaled_gradients<{0}>", blocks, *given, _start(dx), _start(dy), _start(dscale))
    return dx, dy, dscale


def _like(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)


def _start(x: Tensor | None) -> int:
    """Where a tensor that was made here lies."""
    return 0 if x is None else x.data_ptr()


def _blocks(rows: int) -> int:
    return (rows + ROWS - 1) // ROWS


def _sides(mode: str) -> int:
    return 1 if mode == "one_way" else 2
