"""What a launcher must know of the chip to cut a problem into programs."""

import functools
from typing import NamedTuple

import torch

from . import INTERPRETED


class Hardware(NamedTuple):
    architecture: int  # CUDA compute capability, 90 for 9.0; 0: another maker's, or the interpreter
    processors: int  # programs that run side by side, one on each
    name: str = ""  # under which measured choices are kept


@functools.cache
def of(device: torch.device) -> Hardware:
    if INTERPRETED:
        return Hardware(0, 3)  # few, so that small problems are cut in every way that large ones are
    properties = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    architecture = 10 * properties.major + properties.minor if nvidia else 0
    return Hardware(architecture, properties.multi_processor_count, properties.name)
