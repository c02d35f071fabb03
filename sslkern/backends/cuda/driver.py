"""NVIDIA's driver (libcuda), called by ctypes: machine code is loaded and kernels are launched in torch's context. The
native module, where there is one, launches faster."""

import ctypes
import functools
import struct
import threading
from typing import Any

try:
    from sslkern import _cpu
except ImportError:
    _cpu = None

_CAPABILITY = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_PROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_SHARED_MEMORY = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_DYNAMIC_SHARED, _WITHOUT_ASKING = 8, 48 << 10  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_MOST_BYTES = 4096  # of the arguments of a kernel
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class DriverError(RuntimeError):
    """What the driver refuses, in one sentence."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """libcuda, or None where there is no driver. Loading it starts nothing."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def call(function: str, *arguments: Any, doing: str | None = None) -> None:
    """Calls a function of the driver; what it refuses is raised as a sentence."""
    cuda = library()
    if cuda is None:
        raise DriverError("there is no NVIDIA driver")
    status = getattr(cuda, function)(*arguments)
    if status != 0:
        raise DriverError(_sentence(status, doing or function))


def _sentence(status: int, doing: str) -> str:
    texts = ctypes.c_char_p(), ctypes.c_char_p()
    for function, text in zip(("cuGetErrorString", "cuGetErrorName"), texts, strict=True):
        getattr(library(), function)(status, ctypes.byref(text))
    words, name = ((text.value or b"unknown error").decode() for text in texts)
    return f"the CUDA driver refused {doing}: {words} ({name}, {status})"


def count() -> int:
    """GPUs of this machine that the process may use; 0 where there is no driver."""
    if library() is None:
        return 0
    number = ctypes.c_int()
    call("cuInit", 0)
    call("cuDeviceGetCount", ctypes.byref(number))
    return number.value


def capability(index: int) -> int:
    """The compute capability of a GPU by its number, that of torch: 90 for 9.0."""
    major, minor = (_attribute(index, name) for name in _CAPABILITY)
    return 10 * major + minor


@functools.cache
def processors(index: int) -> int:
    """Multiprocessors of a GPU."""
    return _attribute(index, _PROCESSORS)


@functools.cache
def shared_memory(index: int) -> int:
    """Bytes that a block of a GPU may ask for."""
    return _attribute(index, _SHARED_MEMORY)


def _attribute(index: int, name: int) -> int:
    number = ctypes.c_int()
    call("cuDeviceGetAttribute", ctypes.byref(number), name, _device(index))
    return number.value


def _device(index: int) -> ctypes.c_int:
    device = ctypes.c_int()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), index)
    return device


class Context:
    """The primary context of a GPU, which is torch's: `with context:` makes it this thread's for a while."""

    def __init__(self, index: int):
        handle = ctypes.c_void_p()
        call("cuDevicePrimaryCtxRetain", ctypes.byref(handle), _device(index))
        self.handle = handle.value

    def __enter__(self) -> None:
        call("cuCtxPushCurrent_v2", ctypes.c_void_p(self.handle))

    def __exit__(self, *exc: object) -> None:
        call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


class Module:
    """Machine code, loaded into a context; also while a CUDA graph is captured."""

    def __init__(self, context: Context, code: bytes):
        self._context, self._handle = context, ctypes.c_void_p()
        mode = ctypes.c_int(_RELAXED)
        with context:
            call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
            try:
                call("cuModuleLoadData", ctypes.byref(self._handle), code, doing="the compiled kernels")
            finally:
                call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def kernel(self, name: str, layout: list[str], shown: str) -> "Kernel":
        function = ctypes.c_void_p()
        with self._context:
            call("cuModuleGetFunction", ctypes.byref(function), self._handle, name.encode(), doing=f"to find {shown}")
        return Kernel(self._context, function.value, layout, shown)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of a cluster."""

    _fields_ = [("name", ctypes.c_int), ("value", ctypes.c_uint * 17)]  # the value on a multiple of 8 bytes


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class ByCtypes:
    """Puts a kernel on a stream, in its context. `sslkern._cpu.Launcher` does so in a tenth of the time."""

    def __init__(self, library: ctypes.CDLL, context: Context, function: int, starts: list[int]):
        self._library, self._context, self._function = library, context, ctypes.c_void_p(function)
        room, self._current = ctypes.create_string_buffer(_MOST_BYTES), ctypes.c_void_p()
        self._arguments, memory = memoryview(room).cast("B"), ctypes.addressof(room)
        self._places = (ctypes.c_void_p * len(starts))(*(memory + start for start in starts))
        self._lock = threading.Lock()  # the arguments are read before a launch returns

    def __call__(self, blocks: int, threads: int, stream: int, arguments: bytes, shared: int, cluster: int) -> int:
        """What the driver says, 0 if it did. Each argument is at its start among these bytes: where it lies in the
        kernel's own memory the driver knows."""
        with self._lock:
            self._arguments[: len(arguments)] = arguments
            status = self._library.cuCtxGetCurrent(ctypes.byref(self._current))
            if status == 0 and self._current.value == self._context.handle:
                return self._launch(blocks, threads, stream, shared, cluster)
            with self._context:  # a thread in which torch has not been at work, or another GPU
                return self._launch(blocks, threads, stream, shared, cluster)

    def _launch(self, blocks: int, threads: int, stream: int, shared: int, cluster: int) -> int:
        stream = ctypes.c_void_p(stream)
        if cluster == 1:
            grid = blocks, 1, 1, threads, 1, 1, shared
            return self._library.cuLaunchKernel(self._function, *grid, stream, self._places, None)
        attribute = _Attribute(_CLUSTER_DIMENSION, (0, cluster, 1, 1))
        launch = _Launch((blocks, 1, 1), (threads, 1, 1), shared, stream, ctypes.pointer(attribute), 1)
        return self._library.cuLaunchKernelEx(ctypes.byref(launch), self._function, self._places, None)


Launcher = getattr(_cpu, "Launcher", ByCtypes)


class Kernel:
    """A kernel of a context.

    layout: of each argument, as `struct` has it.
    """

    def __init__(self, context: Context, function: int, layout: list[str], shown: str):
        self.context, self._function, self._shown = context, function, shown
        starts, whole = [], "@0q"
        for one in layout:
            starts.append(struct.calcsize(whole))
            whole += f"{one}0q"  # the next on a multiple of 8 bytes
        self._pack = struct.Struct(whole).pack
        self._launch = Launcher(library(), context, function, starts)
        self._shared = _WITHOUT_ASKING

    def __call__(
        self, blocks: int, threads: int, stream: int, arguments: tuple, shared: int = 0, cluster: int = 1
    ) -> None:
        """Puts it on a stream, the address that torch.cuda.Stream.cuda_stream gives.

        Args:
            shared: bytes of dynamic shared memory of each block.
            cluster: blocks that run together.
        """
        if shared > self._shared:
            with self.context:
                function = ctypes.c_void_p(self._function)
                call("cuFuncSetAttribute", function, _DYNAMIC_SHARED, shared, doing=f"to launch {self._shown}")
            self._shared = shared
        status = self._launch(blocks, threads, stream, self._pack(*arguments), shared, cluster)
        if status != 0:
            raise DriverError(_sentence(status, f"to launch {self._shown}"))


# ---- Tensor maps: how a kernel for Hopper finds boxes of a tensor ---------------------------------------------------

MAP_BYTES = 128
COLUMNS = 64  # of a box of 16-bit numbers, which are a row of 128 bytes for the swizzle
_FLOAT, _SWIZZLE_NONE, _SWIZZLE_128B, _L2_128B, _L2_256B = 7, 0, 3, 2, 3  # CUtensorMapDataType and others
TYPES = {"fp16": 6, "bf16": 9}
_Room, _Longs, _Ints = ctypes.c_char * (MAP_BYTES + 64), ctypes.c_uint64 * 2, ctypes.c_uint32 * 2
_ONES = _Ints(1, 1)


def matrix_map(context: Context, address: int, type: str, rows: int, columns: int, stride: int, box_rows: int) -> bytes:
    """Of a matrix of "bf16" or "fp16" whose rows lie `stride` numbers apart: boxes [box_rows, COLUMNS] with the swizzle
    of 128 bytes."""
    sizes, box = (columns, rows), (COLUMNS, box_rows)
    return _map(context, TYPES[type], address, sizes, 2 * stride, box, _SWIZZLE_128B, _L2_256B)


def vector_map(context: Context, address: int, size: int, box: int) -> bytes:
    """Of fp32 numbers: boxes of so many, as they lie."""
    return _map(context, _FLOAT, address, (size,), 4 * size, (box,), _SWIZZLE_NONE, _L2_128B)


def _map(
    context: Context, type: int, address: int, sizes: tuple, stride: int, box: tuple, swizzle: int, promotion: int
) -> bytes:
    """Sizes and boxes with the inner dimension first."""
    room = _Room()
    start = -ctypes.addressof(room) % 64
    arguments = (
        ctypes.byref(room, start), type, len(sizes), ctypes.c_void_p(address), _Longs(*sizes), _Longs(stride),
        _Ints(*box), _ONES, 0, swizzle, promotion, 0,
    )  # fmt: skip
    encode = library().cuTensorMapEncodeTiled
    status = encode(*arguments)
    if status != 0:  # a thread in which torch has not been at work has no context, for which the driver may ask
        with context:
            status = encode(*arguments)
    if status != 0:
        shown = "x".join(map(str, reversed(sizes)))
        raise DriverError(_sentence(status, f"a tensor map of {shown} numbers in boxes of {list(reversed(box))}"))
    return room.raw[start : start + MAP_BYTES]
