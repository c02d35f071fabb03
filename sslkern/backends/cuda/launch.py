"""What the primitives' files share: is there a kernel for this, may it have this tensor, how many blocks, and go."""

import functools
import threading
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import NAMES, compile, driver

THREADS, WARP, PIECES = 256, 32, 2  # as in kernels/device.h and kernels/rows.h
PIECE = 8  # numbers of 16 bits in 16 bytes
LINE = 8  # pieces of 16 bytes in a cache line
MOST_BLOCKS = 1 << 16  # which take further rows in turn
OLDEST, HOPPER = 80, 90  # compute capabilities

# What compile.PROGRAMS calls its arguments, as `struct` does; a struct of C ends on a multiple of 8 bytes.
LAYOUTS = {"int64": "q", "int": "i", "pointer": "P", "float": "f", "bool": "?", "map": "128s"}
LAYOUTS |= {"teams": "qii?0q", "problem": "6Pf4i??0q", "parts": "5P2i", "weights": "7Pii??0q"}
LAYOUTS |= {"pairs": "6P2f4i???0q", "found": "6Pi0q", "ring": LAYOUTS["teams"] + "3Pi0q"}
LAYOUTS |= {"sides": 2 * (LAYOUTS["problem"] + "4P2i"), "parts_of_sides": 2 * LAYOUTS["parts"]}
LAYOUTS |= {"softplus_weights": "3Pfi4P2i?0q", "softplus_gradient": "3Pfi4P2i?0q"}
LAYOUTS |= {"gradient": "9P4i", "plan": "10i", "partials": "4P"}

# By program, its arguments and GPU: the kernels, or why there are none.
_loaded: dict[tuple, dict[str, driver.Kernel] | str] = {}
_loading = threading.Lock()
_told: set[str] = set()


@torch.compiler.assume_constant_result
def missing(program: str, arguments: tuple, index: int) -> str | None:
    """Why a program cannot run with these arguments on the GPU of this number, or None. The first to ask compiles.

    arguments: types of torch, numbers and truth values, as compile.PROGRAMS lists them.
    """
    found = _loaded.get((program, arguments, index)) or _kernels(program, arguments, index)
    return found if isinstance(found, str) else None


def _kernels(program: str, arguments: tuple, index: int) -> dict[str, driver.Kernel] | str:
    key = program, arguments, index
    found = _loaded.get(key)
    if found is None:
        with _loading:
            found = _loaded.get(key)
            if found is None:
                found = _loaded[key] = _load(compile.Unit(program, tuple(map(_word, arguments))), index)
    return found


def _word(argument: torch.dtype | int | str) -> str:
    return NAMES[argument] if isinstance(argument, torch.dtype) else str(argument).lower()


def _load(unit: compile.Unit, index: int) -> dict[str, driver.Kernel] | str:
    program = compile.PROGRAMS[unit.program]
    try:
        if wants := _other_chip(program, index):
            return wants
        image = compile.image(unit, compile.target(driver.capability(index)))
        module = driver.Module(driver.Context(index), image.code)
        layouts = program.kernels
        return {name: module.kernel(image.names[name], layout_of(layouts[name]), str(unit)) for name in layouts}
    except (compile.CompileError, driver.DriverError) as error:
        reason = f"its kernels cannot be made here: {error}"
        if reason not in _told:
            _told.add(reason)
            said = f"sslkern: {unit.program} goes on without CUDA kernels; {reason}"
            warnings.warn(said, RuntimeWarning, stacklevel=2)
        return reason


def _other_chip(program: compile.Program, index: int) -> str | None:
    capability = driver.capability(index)
    if program.hopper and capability != HOPPER:
        return f"it needs a GPU of compute capability {HOPPER / 10}, and this one has {capability / 10}"
    if capability < OLDEST:
        return f"it needs a GPU of compute capability {OLDEST / 10} or newer, and this one has {capability / 10}"
    if program.hopper and compile.target(capability) == "sm_90":
        return "it needs NVRTC of CUDA 12 or newer"
    return None


def layout_of(arguments: str) -> list[str]:
    """Each of `teams int64*2 pointer` as `struct` has it."""
    words = (word.partition("*") for word in arguments.split())
    return [layout for name, _, times in words for layout in [LAYOUTS[name]] * int(times or 1)]


class Teams(NamedTuple):
    """As in kernels/rows.h, where it says how threads share rows."""

    d: int
    pieces: int
    size: int
    whole: bool

    def blocks(self, rows: int) -> int:
        each = THREADS // self.size
        return max(1, at_most((rows + each - 1) // each))


def width(*types: torch.dtype) -> int:
    """Numbers of a piece of rows of these types: the wider fills 16 bytes."""
    return 16 // max(dtype.itemsize for dtype in types)


def teams(d: int, width: int, most: int, *addresses: int) -> Teams:
    """For rows of d numbers in arrays at these addresses; a team has up to `most` threads."""
    pieces, size = _shares(d, width, most)
    whole = d % width == 0 and all(address % 16 == 0 for address in addresses)
    return Teams(d, pieces, size, whole)


@functools.lru_cache(maxsize=1024)
def _shares(d: int, width: int, most: int) -> tuple[int, int]:
    pieces, size = (d + width - 1) // width, 1
    while size < most and (size * PIECES < pieces or size < min(pieces, LINE)):
        size *= 2
    return pieces, size


def at_most(blocks: int) -> int:
    return min(blocks, MOST_BLOCKS)


def padded(x: Tensor) -> Tensor:
    """x [N, D] of 16-bit numbers as `Call.matrix` takes it: itself, or a copy whose rows begin on 16 bytes."""
    if x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) % PIECE == 0 and x.data_ptr() % 16 == 0:
        return x
    rows, d = x.shape
    return x.new_empty((rows, (d + PIECE - 1) // PIECE * PIECE))[:, :d].copy_(x)


def aligned(x: Tensor) -> Tensor:
    """x without gaps as `Call.vector` takes it: on 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


class Call:
    """The launches of one call of a primitive, by a program with these arguments (see `missing`), on a device and
    torch's `stream` there. kernels: by their names in compile.PROGRAMS."""

    __slots__ = "_device", "_index", "stream", "kernels"

    def __init__(self, program: str, device: torch.device, *arguments: torch.dtype | int | str):
        self._device = device
        self._index, self.stream = place(device)
        kernels = _loaded.get((program, arguments, self._index)) or _kernels(program, arguments, self._index)
        if isinstance(kernels, str):
            raise RuntimeError(f"backend 'cuda' cannot run {program}: {kernels}")
        self.kernels = kernels

    @property
    def processors(self) -> int:
        return driver.processors(self._index)

    @property
    def _context(self) -> driver.Context:
        return next(iter(self.kernels.values())).context

    def launch(
        self, kernel: str, blocks: int, *arguments: float | bytes, threads: int = THREADS, shared: int = 0,
        cluster: int = 1,
    ) -> None:  # fmt: skip
        """kernel: its name in compile.PROGRAMS. Arguments are numbers; a tensor is what `address`, `matrix` or `vector`
        says of it. shared: bytes of dynamic shared memory; cluster: blocks that run together."""
        self.kernels[kernel](blocks, threads, self.stream, arguments, shared, cluster)

    def matrix(self, name: str, x: Tensor, box_rows: int) -> bytes:
        """A tensor map of x [N, D], bf16 or fp16, in boxes [box_rows, 64] with the swizzle of 128 bytes. Boxes may
        reach beyond x: there lie zeros, and nothing is written.

        Raises:
            ValueError: the rows of x do not begin on 16 bytes; `padded` makes that so.
        """
        rows, d = x.shape
        start = x.data_ptr()
        if x.stride(1) != 1 or x.stride(0) % PIECE or start % 16 or x.device != self._device or x.is_neg():
            raise ValueError(f"{name} must have rows without gaps that begin on 16 bytes on {self._device}")
        return driver.matrix_map(self._context, start, NAMES[x.dtype], rows, d, x.stride(0), box_rows)

    def vector(self, name: str, x: Tensor, size: int, box: int) -> bytes:
        """A tensor map of x, so many numbers of fp32, in boxes of `box`."""
        return driver.vector_map(self._context, self.address(name, x, torch.float32, size), size, box)

    def address(self, name: str, x: Tensor | None, dtype: torch.dtype, size: int) -> int:
        """Where x lies in memory, if that is as the kernel reads or writes it: `size` numbers of a type without gaps.
        Of None 0.

        Raises:
            ValueError: it is not, or x has no memory of its own.
        """
        if x is None:
            return 0
        try:
            if x.dtype is dtype and x.numel() == size and x.is_contiguous() and x.device == self._device:
                start = x.data_ptr()
                if not x.is_neg() and (start or size == 0):
                    return start
        except (RuntimeError, AttributeError, TypeError):
            pass
        raise ValueError(f"{name} must {_must(x, dtype, size, self._device)}")


def _must(x: Tensor, dtype: torch.dtype, size: int, device: torch.device) -> str:
    try:
        found, plain = (x.dtype, x.numel() if x.is_contiguous() else None, x.device), not x.is_neg()
    except (RuntimeError, AttributeError, TypeError):
        found, plain = None, False
    if not plain or found == (dtype, size, device):
        return f"have plain memory of its own, which this {type(x).__name__} has not; call .clone() or unwrap it"
    return f"be {_words(dtype, size, device)}, not {_words(*found)}"


def _words(dtype: torch.dtype, size: int | None, device: torch.device) -> str:
    return f"{'a tensor with gaps' if size is None else f'{size} numbers'} of {dtype} on {device}"


def place(device: torch.device) -> tuple[int, int]:
    """Where a kernel runs: the number of the GPU, and the address of torch's stream there."""
    if device.type != "cuda":
        return 0, 0  # emulated
    return device.index, torch._C._cuda_getCurrentRawStream(device.index)
