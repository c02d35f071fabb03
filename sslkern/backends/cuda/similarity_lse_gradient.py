"""The gradient of `similarity_lse` by owners of rows, up to 256 features: S is computed once more for each side."""

import functools

import torch
from torch import Tensor

from .launch import THREADS, WARP, Call
from .pairs import Pairs
from .similarity_lse_sides import PAST, Columns, fold_of

MOST_FEATURES = 256
ROWS, THREADS_OF_ROWS = 128, 384  # as in kernels/gradient.h
START = 3  # tiles that a block could do while it starts and ends
ADDED = 30  # blocks whose parts are written and added in the time of a tile


def gradient_of(
    pairs: Pairs,
    row: Tensor | None,
    g: Tensor | None,
    col: Tensor | None,
    h: Tensor | None,
    transposed: bool,
    need_x: bool = True,
    need_scale: bool = False,
    need_bias: bool = False,
) -> tuple[Tensor | None, ...]:
    """Of the queries, or transposed of the keys: dx [N, D], dscale [], and of what has a bias dbias [N], in fp32, None
    where not needed. Of q with itself all of dZ, without col and h.

    row, g: [N] fp32, the log-sum-exps of the rows and what arrived for them; or None. col, h: [M], of the columns.
    The bias is that of the keys: it is of what is asked for where that is transposed, or q with itself.
    """
    bias = pairs.bias
    if pairs.itself:
        col, h = row, g
    elif transposed:
        row, g, col, h = col, h, row, g
        pairs = pairs.turned()
    row, g, col, h = (None if x is None else x.contiguous() for x in (row, g, col, h))
    (N, M, D), q = pairs.sizes, pairs.q
    features, width, stages = next(shape for shape in SHAPES if D <= shape[0])
    call = Call("similarity_lse_gradient", q.device, q.dtype, features)
    blocks, tiles = -(-N // ROWS), -(-M // width)
    each, splits = split_of(blocks, tiles, call.processors)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    def address(name: str, x: Tensor | None) -> int:
        return call.address(name, x, torch.float32, 0 if x is None else x.numel())

    rows = address("row", row), address("g", g)
    fold = fold_of(q, row, g, col, h)
    near, apart = Columns.of(M, width, col, h, None if transposed else bias, pairs.itself, fold, q.device)

    dx = new(splits, N, -(-D // 8) * 8) if need_x else None
    dscale = new(blocks * splits, 8) if need_scale else None
    dbias = new(splits, N) if need_bias else None
    own_bias = address("bias", bias) if transposed else 0
    other_bias = address("bias", bias) if transposed or pairs.itself else 0
    out = (address(name, x) for name, x in (("dx", dx), ("dscale", dscale), ("dbias", dbias)))
    maps = call.matrix("x", q, ROWS), call.matrix("y", pairs.k, width)
    call.launch(
        "gradient_rows<{0}, {1}>", blocks * splits, *maps, call.vector("near", near, near.numel(), width + PAST),
        *pairs.words(), *rows, own_bias, other_bias, address("apart", apart), address("fold", fold), *out,
        tiles, each, col is not None, bias is not None,
        threads=THREADS_OF_ROWS, shared=shared_of(features, width, stages, width + PAST),
    )  # fmt: skip

    def added(parts: Tensor | None) -> Tensor | None:
        if parts is None or splits == 1:
            return parts if parts is None else parts[0]
        to = new(*parts.shape[1:])
        blocks = -(-to.numel() // THREADS)
        call.launch("gradient_of_parts", blocks, to.numel(), splits, address("parts", parts), address("sum", to))
        return to

    dx, dbias = added(dx), added(dbias)
    if dx is not None and dx.shape[1] != D:
        dx = dx[:, :D].contiguous()
    if need_scale:
        parts, dscale = dscale, new()
        half = 0.5 if pairs.itself else 1.0  # there each pair came as (i, j) and as (j, i)
        addresses = address("parts", parts), half, address("dscale", dscale)
        call.launch("gradient_of_scale", 1, parts.numel(), *addresses, threads=WARP)
    return dx, dscale, dbias


# Features of an instance, columns of its tiles, and how many of these are under way.
SHAPES = (64, 128, 8), (128, 128, 5), (256, 64, 4)


def shared_of(features: int, width: int, stages: int, near: int) -> int:
    """Bytes of shared memory: Stages in the kernel, which begins on 1024 bytes. near: numbers beside a tile."""
    near = -(-4 * near // 128) * 128
    return ROWS * features * 2 + stages * (width * features * 2 + near + 16) + 8 + 1024 - 16


@functools.lru_cache(maxsize=1024)
def split_of(blocks: int, tiles: int, processors: int) -> tuple[int, int]:
    """How many tiles of columns a block takes of those of its rows, and into how many splits they are cut: so many that
    the chip is full, but parts cost time where they are written and added."""

    def time(each: int) -> float:
        splits = -(-tiles // each)
        waves = -(-blocks * splits // processors)
        return waves * (each + START) + (blocks * splits / ADDED if splits > 1 else 0)

    most = min(tiles, max(1, 2 * processors // blocks))
    each = min((-(-tiles // splits) for splits in range(1, most + 1)), key=time)
    return each, -(-tiles // each)
