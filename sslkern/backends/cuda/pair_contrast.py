"""The loss of few pairs as a whole: two kernels make it and its gradients, a third one multiplies them by what arrives
in the backward. Over a bank that does not learn these are two others (kernels/pair_contrast_bank.cu)."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import driver
from .launch import PIECE, Call, at_most, missing, teams, width

FP32 = torch.float32
ROWS, WARPS, THREADS = 16, 8, 256  # as in kernels/pair_contrast.h
MODES = "views", "one_way", "two_way", "sigmoid"
MOST_ROWS = 1024  # that have negatives; more keep a GPU busy in kernels of their own
MOST_PRODUCTS, MOST_KEYS = 2**31, 2**24  # of numbers of the rows and of a bank, 256 x 65,536 x 128, and its keys


class Shape(NamedTuple):
    """Of a block: sixteens of own rows, and of a warp eights of the keys of a pass, and then eights of the features."""

    tiles: int
    keys: int
    features: int

    @property
    def rows(self) -> int:
        return ROWS * self.tiles

    @property
    def of_pass(self) -> int:
        return WARPS * 8 * self.keys

    def shared(self, D: int, dtype: torch.dtype) -> int:
        """Bytes of shared memory: the keys of a pass, and as factors their weights and the own rows."""
        units = self.of_pass * (dtype.itemsize * WARPS * 8 * self.features + 16)
        return units + _factors(self.rows * (self.of_pass + 8 + _pitch(D)), dtype)


def _factors(numbers: int, dtype: torch.dtype) -> int:
    """Bytes of so many numbers as factors of products."""
    return 2 * (3 if dtype == FP32 else 1) * numbers


def _pitch(D: int) -> int:
    """Factors from an own row to the next."""
    return (D + 63) // 64 * 64 + 32


# By bytes of a number: up to how many features.
PAIRS = {
    2: ((128, Shape(1, 4, 2)), (512, Shape(1, 1, 8)), (1024, Shape(1, 1, 16))),
    4: ((128, Shape(1, 2, 2)), (512, Shape(1, 1, 8))),
}
BANK = {2: ((128, Shape(4, 4, 2)), (512, Shape(4, 1, 8))), 4: ((128, Shape(2, 2, 2)), (512, Shape(1, 1, 8)))}


def lacks(x: Tensor, sizes: tuple[int, ...], bank: bool, sigmoid: bool) -> str | None:
    """Why it is none of its own, or None."""
    _, rows, keys, D = sizes
    most = (BANK if bank else PAIRS)[x.dtype.itemsize][-1][0]
    if rows > MOST_ROWS or rows == 0 or D == 0 or D > most:
        return f"it takes {MOST_ROWS} rows of {most} features, and not none"
    if bank and (rows * keys * D > MOST_PRODUCTS or keys > MOST_KEYS):
        return "so many keys of a bank keep a GPU busy in kernels of their own"
    return _missing(x.dtype, D, bank, sigmoid, x.device.index or 0)


@torch.compiler.assume_constant_result
def _missing(dtype: torch.dtype, D: int, bank: bool, sigmoid: bool, index: int) -> str | None:
    plan = _plan(dtype, D, bank, sigmoid)
    if plan.shared > driver.shared_memory(index):
        return "this GPU has too little shared memory for so many features"
    return missing(plan.program, plan.arguments, index) or missing("scaled_gradients", (dtype,), index)


class Plan(NamedTuple):
    """The kernels of a call, their shape, and bytes of shared memory: of all, and of own rows of `pair_scores`."""

    program: str
    arguments: tuple
    shape: Shape
    shared: int
    own: int


@functools.lru_cache(maxsize=1024)
def _plan(dtype: torch.dtype, D: int, bank: bool, sigmoid: bool) -> Plan:
    shape = next(shape for most, shape in (BANK if bank else PAIRS)[dtype.itemsize] if D <= most)
    kernels = ("pair_contrast_bank", (dtype, *shape)) if bank else ("pair_contrast", (dtype, *shape[1:], sigmoid))
    return Plan(*kernels, shape, shape.shared(D, dtype), _factors(ROWS * _pitch(D), dtype))


def pair_contrast_fwd(
    x: Tensor,
    y: Tensor,
    bank: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    bias_tensor: Tensor | None,
    bias: float,
    ids: Tensor | None,
    ptr: Tensor | None,
    mode: str,
    normalize: bool,
    unit_bank: bool,
    best: bool,
    share: float,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor | None, ...]:
    """loss [] = share * the sum of the losses; positive [N] and best [sides, N] if asked for; and kept, for an upstream
    gradient of 1 that of x, y or both, [N, D] each, and then those of scale_tensor and bias_tensor in parts. With a ptr
    y is pushed onto the bank, which is contiguous then and shares no memory with x and y."""
    (N, D), dtype, learn, over_bank = x.shape, x.dtype, need_x + need_y, bank is not None
    x, y, plan = x.contiguous(), y.contiguous(), _plan(dtype, D, over_bank, mode == "sigmoid")
    loss, parts, numbers = x.new_empty((), dtype=FP32), _scale_parts(N, over_bank), need_scale + need_bias
    kept = x.new_empty(learn * N * D + parts * numbers, dtype=FP32) if learn or numbers else None
    positive, top = (x.new_empty(N, dtype=FP32), x.new_empty(_sides(mode), N, dtype=FP32)) if best else (None, None)
    call = Call(plan.program, x.device, *plan.arguments)
    from_x, from_y = call.address("x", x, dtype, N * D), call.address("y", y, dtype, N * D)
    from_ids = 0 if ids is None else call.address("ids", ids.contiguous(), torch.int64, N)
    by = 0 if scale_tensor is None else call.address("scale", scale_tensor, FP32, 1)
    above = 0 if bias_tensor is None else call.address("bias", bias_tensor, FP32, 1)
    from_bank, keys = 0, 0
    if over_bank:
        bank, keys = bank.contiguous(), bank.shape[0]
        from_bank = call.address("bank", bank, dtype, keys * D)
    whole = D % PIECE == 0 and (from_x | from_y | from_bank) % 16 == 0
    given = from_x, from_y, from_bank, from_ids, by, above, scale, bias, N, keys, D, MODES.index(mode)
    given += normalize, unit_bank, whole
    grad, shared = _start(kept), plan.shared
    statistics, dscale = (_start(top), _start(positive)), grad + 4 * learn * N * D
    gradients = share, need_x + 2 * need_y, loss.data_ptr(), grad, dscale if need_scale else 0
    if not over_bank:
        blocks, scratch = _blocks(N), x.new_empty(5 * N, dtype=FP32)
        lse = scratch.data_ptr()
        given += lse, lse + 4 * 2 * N, lse + 4 * 3 * N  # and cosines and lengths
        call.launch("pair_scores<{0}, {3}>", _sides(mode) * blocks, *given, *statistics, shared=plan.own)
        blocks, dbias = 1 if kept is None else 2 * blocks, dscale + 4 * parts * need_scale if need_bias else 0
        call.launch("pair_gradients<{0}, {1}, {2}, {3}>", blocks, *given, *gradients, dbias, shared=shared)
        return loss, positive, top, kept

    groups, passes = -(-N // plan.shape.rows), max(1, -(-keys // plan.shape.of_pass))
    each = -(-passes // max(1, call.processors // groups))
    parts = -(-passes // each)
    scratch = x.new_empty(2 + N * (3 + parts * (3 + D)), dtype=FP32)  # where the queue begins, and what is found
    start, pointer = scratch.data_ptr(), call.address("ptr", ptr, torch.int64, 1)
    cosine = start + 4 * 2
    sums = cosine + 4 * 3 * N
    found = cosine, cosine + 4 * N, *(sums + 4 * N * parts * kind for kind in range(4))
    kernel = "bank_scores<{0}, {1}, {2}, {3}>"
    call.launch(kernel, groups * parts, *given, each, *found, pointer, start, shared=shared)
    by = teams(D, width(dtype), THREADS, from_y, from_bank)
    writers = 0 if ptr is None else by.blocks(min(N, keys))
    ring = *by, from_bank, pointer, start, writers
    blocks = 1 + (0 if kept is None else N) + writers
    call.launch("bank_gradients<{0}>", blocks, *given, *found, parts, *gradients, *statistics, *ring)
    if ptr is not None and not bank.is_inference():  # the kernel's write is invisible to autograd otherwise
        torch.autograd.graph.increment_version((bank, ptr))
    return loss, positive, top, kept


def pair_contrast_fake(
    x,
    y,
    bank,
    scale_tensor,
    scale,
    bias_tensor,
    bias,
    ids,
    ptr,
    mode,
    normalize,
    unit_bank,
    best,
    reduction,
    need_x,
    need_y,
    need_scale,
    need_bias,
) -> tuple[Tensor, ...]:
    (N, D), new = x.shape, functools.partial(x.new_empty, dtype=FP32)
    top = new((_sides(mode), N) if best else 0)
    parts = _scale_parts(N, bank is not None)
    return new(()), new(N if best else 0), top, new((need_x + need_y) * N * D + parts * (need_scale + need_bias))


def pair_contrast_bwd(
    g: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    scale_tensor: Tensor | None,
    bias_tensor: Tensor | None,
    kept: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """The gradients of those of x, y (of this type) and the scalars that are given, from g [] and what was kept."""
    dx, dy, dscale, dbias = _like(x), _like(y), _like(scale_tensor), _like(bias_tensor)
    one = dy if dx is None else dx
    numbers = 0 if one is None else one.numel()
    before = numbers * ((dx is not None) + (dy is not None))
    grad = kept.data_ptr()
    call = Call("scaled_gradients", g.device, dtype)
    from_g = call.address("g", g.contiguous(), FP32, 1)
    blocks = max(1, at_most(-(-numbers // (4 * THREADS))))
    parts = (kept.numel() - before) // max(1, (dscale is not None) + (dbias is not None))
    given = numbers, parts, from_g, grad, grad + 4 * before
    call.launch("scaled_gradients<{0}>", blocks, *given, _start(dx), _start(dy), _start(dscale), _start(dbias))
    return dx, dy, dscale, dbias


def _like(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)


def _start(x: Tensor | None) -> int:
    """Where a tensor that was made here lies."""
    return 0 if x is None else x.data_ptr()


def _blocks(rows: int) -> int:
    return (rows + ROWS - 1) // ROWS


def _scale_parts(N: int, over_bank: bool) -> int:
    """Numbers whose sum is the gradient of the scale: of blocks, or of rows."""
    return N if over_bank else 2 * _blocks(N)


def _sides(mode: str) -> int:
    return 2 if mode in ("views", "two_way") else 1
