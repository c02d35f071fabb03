"""NVIDIA's driver (libcuda), called by ctypes: machine code is loaded and kernels are launched in torch's context."""

import ctypes
import functools
import struct
import threading

_CAPABILITY = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_POINTER, _SIZE, _END = 1, 2, 0  # CU_LAUNCH_PARAM_BUFFER_POINTER, ..


class DriverError(RuntimeError):
    """What the driver refuses, in one sentence."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """libcuda, or None where there is no driver. Loading it starts nothing."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def call(function: str, *arguments, doing: str | None = None) -> None:
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
    device, numbers = _device(index), []
    for attribute in _CAPABILITY:
        number = ctypes.c_int()
        call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        numbers.append(number.value)
    return 10 * numbers[0] + numbers[1]


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

    def __exit__(self, *exc) -> None:
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

    def kernel(self, name: str, layout: str, shown: str) -> "Kernel":
        function = ctypes.c_void_p()
        with self._context:
            call("cuModuleGetFunction", ctypes.byref(function), self._handle, name.encode(), doing=f"to find {shown}")
        return Kernel(self._context, function, layout, shown)


class Kernel:
    """A kernel with the bytes of its arguments, in the layout of `struct`, which are written anew for each launch."""

    def __init__(self, context: Context, function: ctypes.c_void_p, layout: str, shown: str):
        self._context, self._function, self._shown = context, function, shown
        self._layout = struct.Struct(layout)
        self._arguments = ctypes.create_string_buffer(self._layout.size)
        self._size = ctypes.c_size_t(self._layout.size)
        places = _POINTER, ctypes.addressof(self._arguments), _SIZE, ctypes.addressof(self._size), _END
        self._extra = (ctypes.c_void_p * 5)(*places)
        self._lock = threading.Lock()  # the arguments are read before a launch returns
        self._current, self._current_of_thread = ctypes.c_void_p(), library().cuCtxGetCurrent
        self._launch = library().cuLaunchKernel

    def __call__(self, blocks: int, threads: int, stream: int, *arguments) -> None:
        """Puts the kernel on a stream, the address that torch.cuda.Stream.cuda_stream gives."""
        with self._lock:
            self._layout.pack_into(self._arguments, 0, *arguments)
            launch = self._function, blocks, 1, 1, threads, 1, 1, 0, ctypes.c_void_p(stream), None, self._extra
            status = self._current_of_thread(ctypes.byref(self._current))
            if status == 0 and self._current.value == self._context.handle:
                status = self._launch(*launch)
            else:  # a thread in which torch has not been at work, or another GPU
                with self._context:
                    status = self._launch(*launch)
        if status != 0:
            raise DriverError(_sentence(status, f"to launch {self._shown}"))
