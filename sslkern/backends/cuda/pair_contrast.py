"""The loss of few pairs as a whole: two kernels make it and its gradients, a third one multiplies them by what arrives
in the backward. Over a bank that does not learn these are two others (kernels/pair_contrast_bank.cu)."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...common.tensors import apart
from . import driver
from .launch import PIECE, Call, at_most, missing, teams, width

FP32, CONTIGUOUS = torch.float32, torch.contiguous_format
ROWS, WARPS, THREADS = 16, 8, 256  # as in kernels/pair_contrast.h
MODES = "views", "one_way", "two_way", "sigmoid", "labels"
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
LABELS = {2: ((512, Shape(1, 1, 8)),), 4: ((512, Shape(1, 1, 8)),)}
BANK = {2: ((128, Shape(4, 4, 2)), (512, Shape(4, 1, 8))), 4: ((128, Shape(2, 2, 2)), (512, Shape(1, 1, 8)))}


def lacks(x: Tensor, sizes: tuple[int, ...], bank: bool, mode: str) -> str | None:
    """Why it is none of its own, or None."""
    _, rows, keys, D = sizes
    most = _shapes(x.dtype, bank, _kernels_of(mode))[-1][0]
    if rows > MOST_ROWS or rows == 0 or D == 0 or D > most:
        return f"it takes {MOST_ROWS} rows of {most} features, and not none"
    if bank and (rows * keys * D > MOST_PRODUCTS or keys > MOST_KEYS):
        return "so many keys of a bank keep a GPU busy in kernels of their own"
    return _missing(x.dtype, D, bank, _kernels_of(mode), x.device.index or 0)


@torch.compiler.assume_constant_result
def _missing(dtype: torch.dtype, D: int, bank: bool, of: int, index: int) -> str | None:
    plan = _plan(dtype, D, bank, of)
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
def _plan(dtype: torch.dtype, D: int, bank: bool, of: int) -> Plan:
    shape = next(shape for most, shape in _shapes(dtype, bank, of) if D <= most)
    kernels = ("pair_contrast_bank", (dtype, *shape)) if bank else ("pair_contrast", (dtype, *shape[1:], of))
    return Plan(*kernels, shape, shape.shared(D, dtype), _factors(ROWS * _pitch(D), dtype))


def _kernels_of(mode: str) -> int:
    """The mode that those for this one are compiled for: the three that have negatives share them."""
    return MODES.index(mode) if mode in ("sigmoid", "labels") else 0


def _shapes(dtype: torch.dtype, bank: bool, of: int) -> tuple[tuple[int, Shape], ...]:
    if bank:
        return BANK[dtype.itemsize]
    return (LABELS if MODES[of] == "labels" else PAIRS)[dtype.itemsize]


class Sizes(NamedTuple):
    """Of a call: blocks of rows of a side, sides that have negatives, parts of the gradient of a scalar, and what the
    loss of a row is multiplied by."""

    blocks: int
    sides: int
    parts: int
    share: float


@functools.lru_cache(maxsize=1024)
def _sizes(N: int, mode: str, reduction: str, over_bank: bool) -> Sizes:
    share = 1 / (N if reduction == "mean" else 1)
    if mode == "two_way" or (mode == "views" and reduction == "mean"):
        share /= 2
    return Sizes(_blocks(N), _sides(mode), _scale_parts(N, over_bank), share)


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
    need_best: bool,
    reduction: str,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor | None, ...]:
    """loss []; positive [N] and best [sides, N] if asked for; and kept, for an upstream gradient of 1 that of x, y or
    both, [N, D] each, and then those of scale_tensor and bias_tensor in parts. With a ptr y is pushed onto the bank,
    which is contiguous then."""
    if ptr is not None:
        x, y = apart(x, bank), apart(y, bank)
    (N, D), dtype, over_bank = x.shape, x.dtype, bank is not None
    program, arguments, shape, shared, own = _plan(dtype, D, over_bank, _kernels_of(mode))
    blocks, sides, parts, share = _sizes(N, mode, reduction, over_bank)
    call = Call(program, x.device, *arguments)
    x, y = x.contiguous(), y.contiguous()
    from_x, from_y = x.data_ptr(), call.address("y", y, dtype, N * D)
    from_bank = keys = from_ids = by = above = grad = dscale = dbias = to_positive = to_best = 0
    kept = positive = best = None
    if over_bank:
        bank, keys = bank.contiguous(), bank.shape[0]
        from_bank = call.address("bank", bank, dtype, keys * D)
    if ids is not None:
        ids = ids.contiguous()
        from_ids = call.address("ids", ids, torch.int64, N)
    if scale_tensor is not None:
        by = call.address("scale", scale_tensor, FP32, 1)
    if bias_tensor is not None:
        above = call.address("bias", bias_tensor, FP32, 1)
    loss = x.new_empty((), dtype=FP32)
    features = N * D * (need_x + need_y)
    numbers = features + parts * (need_scale + need_bias)
    if numbers > 0:
        kept = x.new_empty(numbers, dtype=FP32)
        grad = kept.data_ptr()
        if need_scale:
            dscale = grad + 4 * features
        if need_bias:
            dbias = grad + 4 * (numbers - parts)
    if need_best:
        positive, best = x.new_empty(N, dtype=FP32), x.new_empty(sides, N, dtype=FP32)
        to_positive, to_best = positive.data_ptr(), best.data_ptr()
    whole = D % PIECE == 0 and (from_x | from_y | from_bank) % 16 == 0
    mode = MODES.index(mode)
    given = from_x, from_y, from_bank, from_ids, by, above, scale, bias, N, keys, D, mode, normalize, unit_bank, whole
    to_gradients = share, need_x + 2 * need_y, loss.data_ptr(), grad, dscale
    if over_bank:
        to_results = *to_gradients, to_best, to_positive
        _over_bank(call, shape, shared, y, bank, ptr, given, to_results, 1 if kept is None else 1 + N)
        return loss, positive, best, kept
    scratch = x.new_empty(5 * N, dtype=FP32)
    lse = scratch.data_ptr()
    given += lse, lse + 8 * N, lse + 12 * N  # and cosines and lengths
    scores, gradients = call.kernels["pair_scores<{0}, {3}>"], call.kernels["pair_gradients<{0}, {1}, {2}, {3}>"]
    scores(sides * blocks, THREADS, call.stream, (*given, to_best, to_positive), own)
    gradients(1 if kept is None else 2 * blocks, THREADS, call.stream, (*given, *to_gradients, dbias), shared)
    return loss, positive, best, kept


def _over_bank(
    call: Call,
    shape: Shape,
    shared: int,
    y: Tensor,
    bank: Tensor,
    ptr: Tensor | None,
    given: tuple,
    to_results: tuple,
    blocks: int,
) -> None:
    """The launches over a bank: parts of it by themselves, then, in so many blocks, what they give together; others
    of the same launch push y."""
    _, from_y, from_bank, _, _, _, _, _, N, keys, D, _, _, _, _ = given
    groups, passes = -(-N // shape.rows), max(1, -(-keys // shape.of_pass))
    each = -(-passes // max(1, call.processors // groups))
    parts = -(-passes // each)
    scratch = y.new_empty(2 + N * (3 + parts * (3 + D)), dtype=FP32)  # where the queue begins, and what is found
    start, pointer = scratch.data_ptr(), call.address("ptr", ptr, torch.int64, 1)
    cosine = start + 4 * 2
    sums = cosine + 4 * 3 * N
    found = cosine, cosine + 4 * N, *(sums + 4 * N * parts * kind for kind in range(4))
    kernel = "bank_scores<{0}, {1}, {2}, {3}>"
    call.launch(kernel, groups * parts, *given, each, *found, pointer, start, shared=shared)
    by = teams(D, width(y.dtype), THREADS, from_y, from_bank)
    writers = 0 if ptr is None else by.blocks(min(N, keys))
    ring = *by, from_bank, pointer, start, writers
    call.launch("bank_gradients<{0}>", blocks + writers, *given, *found, parts, *to_results, *ring)
    if ptr is not None and not bank.is_inference():  # the kernel's write is invisible to autograd otherwise
        torch.autograd.graph.increment_version((bank, ptr))


def pair_contrast_fake(
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
    need_best: bool,
    reduction: str,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    (N, D), new = x.shape, functools.partial(x.new_empty, dtype=FP32)
    best = new((_sides(mode), N) if need_best else 0)
    parts = _scale_parts(N, bank is not None)
    return new(()), new(N if need_best else 0), best, new((need_x + need_y) * N * D + parts * (need_scale + need_bias))


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
    dx = dy = dscale = dbias = None
    to_x = to_y = to_scale = to_bias = numbers = sides = scalars = 0
    if x is not None:
        dx = torch.empty_like(x, memory_format=CONTIGUOUS)
        to_x, numbers, sides = dx.data_ptr(), dx.numel(), 1
    if y is not None:
        dy = torch.empty_like(y, memory_format=CONTIGUOUS)
        to_y, numbers, sides = dy.data_ptr(), dy.numel(), sides + 1
    if scale_tensor is not None:
        dscale = torch.empty_like(scale_tensor)
        to_scale, scalars = dscale.data_ptr(), 1
    if bias_tensor is not None:
        dbias = torch.empty_like(bias_tensor)
        to_bias, scalars = dbias.data_ptr(), scalars + 1
    before = numbers * sides
    parts = (kept.numel() - before) // scalars if scalars else 0
    grad = kept.data_ptr()
    call = Call("scaled_gradients", g.device, dtype)
    from_g = call.address("g", g.contiguous(), FP32, 1)
    blocks = at_most(-(-numbers // (4 * THREADS)) or 1)
    given = numbers, parts, from_g, grad, grad + 4 * before, to_x, to_y, to_scale, to_bias
    call.kernels["scaled_gradients<{0}>"](blocks, THREADS, call.stream, given)
    return dx, dy, dscale, dbias


def _blocks(rows: int) -> int:
    return (rows + ROWS - 1) // ROWS


def _scale_parts(N: int, over_bank: bool) -> int:
    """Numbers whose sum is the gradient of the scale: of blocks, or of rows."""
    return N if over_bank else 2 * _blocks(N)


def _sides(mode: str) -> int:
    return 2 if mode in ("views", "two_way") else 1
