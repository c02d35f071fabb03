"""Sizes of tiles by architecture and number of features.

They are chosen so that nothing spills and what a tile needs fits in the shared memory of an architecture
(benchmarks/results/offline/triton.md).
"""

from typing import NamedTuple

import torch
import triton

from . import INTERPRETED
from .hardware import Hardware


class Config(NamedTuple):
    BM: int  # rows of a tile
    BN: int  # columns of a tile
    BD: int  # features multiplied at a time; a side of so few stays in shared memory
    DV: int  # features of the accumulator of a gradient
    warps: int
    stages: int  # tiles on their way from memory

    def launch(self) -> dict:
        return {"num_warps": self.warps, "num_stages": self.stages}


def choose(kind: str, dtype: torch.dtype, D: int, hardware: Hardware) -> Config:
    """kind: "forward", or "backward" of a kernel with a second product."""
    width = max(16, triton.next_power_of_2(D))
    if INTERPRETED:  # a step costs the same whatever its size
        return Config(64, 32, min(width, 128), min(width, 256 if width > 128 else 128), 4, 1)
    large = hardware.architecture in (90, 100, 103)
    if dtype == torch.float32:
        BD = min(width, 32)
        return Config(64, 64, BD, min(width, 64), 4, 2)
    if kind == "forward":
        if width <= 128:
            return Config(128, 128, width, width, 8, 3 if large else 2)
        return Config(128, 128, 64, 64, 8, 4 if large else 3)
    if width <= 128:
        return Config(128, 64, width, width, 8, 3 if large else 2)
    if width == 256:
        return Config(64, 64, width, width, 4, 2)
    return Config(64, 64, 64, 256, 8, 2)
