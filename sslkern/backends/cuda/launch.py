"""What the primitives' files share: is there a kernel for this, may it have this tensor, how many blocks, and go."""

import functools
import threading
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import NAMES, compile, driver

THREADS, WARP, PIECES = 256, 32, 2  # as in kernels/device.h and kernels/rows.h
LINE = 8  # pieces of 16 bytes in a cache line
MOST_BLOCKS = 1 << 16  # which take further rows in turn
OLDEST = 80  # of compute capabilities

# What compile.KERNELS calls its arguments, as `struct` does; a struct of C ends on a multiple of 8 bytes.
LAYOUTS = {"teams": "qii?0q", "int64": "q", "pointer": "P", "float": "f", "bool": "?"}

# By primitive, types and GPU: the kernels, or why there are none.
_loaded: dict[tuple, dict[str, driver.Kernel] | str] = {}
_loading = threading.Lock()
_told: set[str] = set()


@torch.compiler.assume_constant_result
def missing(primitive: str, types: tuple[torch.dtype, ...], index: int) -> str | None:
    """Why the primitive cannot run for these types on the GPU of this number, or None. The first to ask compiles."""
    found = _kernels(primitive, types, index)
    return found if isinstance(found, str) else None


def _kernels(primitive: str, types: tuple[torch.dtype, ...], index: int) -> dict[str, driver.Kernel] | str:
    key = primitive, types, index
    found = _loaded.get(key)
    if found is None:
        with _loading:
            found = _loaded.get(key)
            if found is None:
                found = _loaded[key] = _load(compile.Unit(primitive, tuple(NAMES[dtype] for dtype in types)), index)
    return found


def _load(unit: compile.Unit, index: int) -> dict[str, driver.Kernel] | str:
    try:
        capability = driver.capability(index)
        if capability < OLDEST:
            return f"it needs a GPU of compute capability {OLDEST / 10} or newer, and this one has {capability / 10}"
        image = compile.image(unit, compile.target(capability))
        module = driver.Module(driver.Context(index), image.code)
        layouts = compile.KERNELS[unit.primitive]
        return {name: module.kernel(image.names[name], layout_of(layouts[name]), str(unit)) for name in layouts}
    except (compile.CompileError, driver.DriverError) as error:
        reason = f"its kernels cannot be made here: {error}"
        if reason not in _told:
            _told.add(reason)
            said = f"sslkern: {unit.primitive} goes on without CUDA kernels; {reason}"
            warnings.warn(said, RuntimeWarning, stacklevel=2)
        return reason


def layout_of(arguments: str) -> str:
    """`teams int64*2 pointer` as `struct` has it."""
    words = (word.partition("*") for word in arguments.split())
    return "@" + "".join(LAYOUTS[name] * int(times or 1) for name, _, times in words)


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


class Call:
    """The launches of one call of a primitive, for these types, on a device and torch's stream there."""

    def __init__(self, primitive: str, device: torch.device, *types: torch.dtype):
        index, self._stream = place(device)
        self._device = device
        self._kernels = _kernels(primitive, types, index)
        if isinstance(self._kernels, str):
            raise RuntimeError(f"backend 'cuda' cannot run {primitive}: {self._kernels}")

    def launch(self, kernel: str, blocks: int, *arguments) -> None:
        """kernel: its name in compile.KERNELS. Arguments are numbers; a tensor is what `address` says of it."""
        self._kernels[kernel](blocks, THREADS, self._stream, *arguments)

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
