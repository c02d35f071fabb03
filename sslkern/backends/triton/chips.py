"""What a launcher must know of the chip to cut a problem into programs."""

import contextlib
import functools
from typing import NamedTuple

import torch

from . import INTERPRETED


class Chip(NamedTuple):
    architecture: int  # CUDA compute capability, 90 for 9.0; 0: another maker's, or the interpreter
    processors: int  # programs that run side by side, one on each
    name: str = ""  # under which measured choices are kept

    @property
    def large(self) -> bool:
        """Whether it is of a data centre of Hopper's generation or later: 227 KB of shared memory for a program, matrix
        units that read it by themselves, tensor descriptors."""
        return self.hopper or self.blackwell

    @property
    def hopper(self) -> bool:
        return self.architecture == 90

    @property
    def blackwell(self) -> bool:
        return self.architecture in (100, 103)

    @property
    def stages(self) -> int:
        """Tiles on their way from memory, where shared memory decides."""
        return 3 if self.large else 2


@functools.cache
def of(device: torch.device) -> Chip:
    if INTERPRETED:
        return Chip(0, 3)  # few, so that small problems are cut in every way that large ones are
    properties = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    architecture = 10 * properties.major + properties.minor if nvidia else 0
    return Chip(architecture, properties.multi_processor_count, properties.name)


def tf32(dtype: torch.dtype) -> bool:
    """Whether features are fp32 but multiplied in tf32, as torch's settings say, asked in the way they were set."""
    if dtype != torch.float32:
        return False
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # they were set by torch.backends.cuda.matmul.fp32_precision, and torch refuses to mix
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def matrix_units(dtype: torch.dtype) -> bool:
    """Whether those multiply features of this type: all but true fp32."""
    return dtype != torch.float32 or tf32(dtype)


_HERE = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """`with on(x.device):` Triton launches on the current device: makes that of x the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
