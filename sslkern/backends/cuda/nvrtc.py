"""NVRTC, NVIDIA's compiler as a library, called by ctypes. Every CUDA build of torch brings it; it needs no toolkit, no
header and no GPU."""

import ctypes
import functools
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch


class CompileError(RuntimeError):
    """Why something does not compile, in one sentence."""


def find() -> Path | None:
    """The library: of torch's version of CUDA if that is here, else the newest. Nothing is loaded."""
    folders = [found for entry in sys.path for found in Path(entry).glob("nvidia/*/lib")]
    folders += [Path(torch.__file__).parent / "lib", Path(sys.prefix) / "lib"]
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders += [Path(home) / "lib64" for home in [*homes, "/usr/local/cuda"]]
    # In a torch that has its libraries inside a number follows the name.
    names = "libnvrtc.so*", "libnvrtc-[0-9a-f]*.so*"
    found = [path for folder in folders for name in names for path in folder.glob(name) if "builtins" not in path.name]
    wanted = major(torch.version.cuda or "0")

    def rank(path: Path) -> tuple[bool, int]:
        version = re.search(r"\.so\.(\d+)", path.name)
        version = int(version[1]) if version else 0
        return version == wanted, version

    return max(found, key=rank, default=None)


def major(version: str) -> int:
    return int(version.partition(".")[0])


@functools.cache
def load() -> "Nvrtc":
    path = find()
    if path is None:
        raise CompileError("there is no libnvrtc")
    return Nvrtc(path)


class Nvrtc:
    """The library at a path: its version as (major, minor), and the architectures it knows, 90 for sm_90."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise CompileError(f"libnvrtc cannot be loaded ({error})") from None
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        numbers = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", *map(ctypes.byref, numbers))
        self.version = tuple(number.value for number in numbers)
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", known)
        self.architectures = tuple(known)

    def compile(
        self, name: str, source: str, headers: dict[str, str], options: list[str], expressions: list[str]
    ) -> tuple[bytes, list[str], str]:
        """Machine code (PTX for an architecture compute_..), in it the names of the kernels that the expressions name
        in C++, and what the compiler warned of.

        Args:
            headers: text by the name under which the source includes it.
        """
        program, count = ctypes.c_void_p(), len(headers)
        texts = (ctypes.c_char_p * count)(*(text.encode() for text in headers.values()))
        names = (ctypes.c_char_p * count)(*(header.encode() for header in headers))
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), count, texts, names)
        try:
            for expression in expressions:
                self._call("nvrtcAddNameExpression", program, expression.encode())
            arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), arguments)
            log = self._text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").decode(errors="replace")
            log = log.strip("\0").strip()
            if status != 0:
                raise CompileError(_first_error(log))
            lowered = []
            for expression in expressions:
                found = ctypes.c_char_p()
                self._call("nvrtcGetLoweredName", program, expression.encode(), ctypes.byref(found))
                lowered.append(found.value.decode())
            kind = "PTX" if any("=compute_" in option for option in options) else "CUBIN"
            return self._text(program, f"nvrtcGet{kind}Size", f"nvrtcGet{kind}"), lowered, log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, size_of: str, get: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(size_of, program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(get, program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: Any) -> None:
        try:
            status = getattr(self._library, function)(*arguments)
        except AttributeError:
            raise CompileError(f"{self.path} is too old, it has no {function}") from None
        if status != 0:
            raise CompileError(f"{function} said {self._library.nvrtcGetErrorString(status).decode()}")


def _first_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "it does not compile")
