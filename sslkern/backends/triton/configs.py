"""Sizes of tiles by architecture and number of features.

They are chosen so that nothing spills and what a tile needs fits in the shared memory of an architecture
(benchmarks/results/offline/triton.md).
"""

from typing import NamedTuple

import torch
import triton

from . import INTERPRETED, measured
from .chips import Chip, matrix_units


class Config(NamedTuple):
    BM: int  # rows of a tile
    BN: int  # columns of a tile
    BD: int  # features multiplied at a time; a side of so few stays in shared memory
    DV: int  # features of the accumulator of a gradient
    warps: int
    stages: int  # tiles on their way from memory
    specialised: bool = False  # warps of their own for loads and products; Blackwell, as far as Triton has it

    def launch(self) -> dict:
        return {"num_warps": self.warps, "num_stages": self.stages, "WS": self.specialised}


SIDES = (16, 32, 64, 128, 256)  # of tiles; those of weights must divide `strips.TILE`
_forced: dict[str, Config] = {}


class force:
    """`with force("forward bfloat16 128", config):` while it is measured."""

    def __init__(self, name: str, config: Config):
        self.name, self.config = name, config

    def __enter__(self) -> None:
        _forced[self.name] = self.config

    def __exit__(self, *exc: object) -> None:
        del _forced[self.name]


def candidates(kind: str, D: int, default: Config, chip: Chip) -> list[Config]:
    """The default and what may be faster, the likeliest first."""
    near = [default]
    if chip.blackwell and not (kind == "backward" and default.DV > 128):
        near += [default._replace(specialised=True), default._replace(specialised=True, BN=2 * default.BN)]
    if kind in ("forward", "weights") and D > 128:
        near.append(default._replace(BN=256))
    if kind == "forward" and D <= 256:
        near += [default._replace(BM=64, BN=64, BD=256, warps=4, stages=2), default._replace(BN=128, warps=8)]
    for BN in (32, 64, 128):
        for warps in (4, 8):
            for stages in (2, 3, 4):
                near.append(default._replace(BN=BN, warps=warps, stages=stages))
    return list(dict.fromkeys(near))


def choose(kind: str, dtype: torch.dtype, D: int, chip: Chip, crowded: bool = False) -> Config:
    """kind: "forward", "topk"; with a second product "frozen", "softplus", "backward"; "weights" that go to memory, or
    what reads "products" from there. crowded: what else a tile needs takes registers, too."""
    width = max(16, triton.next_power_of_2(D))
    if INTERPRETED:  # a step costs the same whatever its size
        return Config(64, 64, min(width, 128), min(width, 256), 4, 1)
    name = f"{kind} {measured.key(dtype, D)}"
    if name in _forced:
        return _forced[name]
    found = measured.on(chip)["config"].get(name)
    if found and not crowded:
        config = Config(*found)
        if config.BM in SIDES and config.BN in SIDES:
            return config
    if kind == "products":
        return Config(32, 32, 16, 16, 4, 1)
    if kind == "topk":
        return _topk(dtype, width)
    if not matrix_units(dtype):
        # The same for all: features at a time decide bits (`dot_products`), in which forward and backward agree.
        return Config(32, 32, min(width, 64), min(width, 64), 8, 1)
    if dtype == torch.float32:
        return _tf32(kind, width, chip, crowded)
    if kind == "weights" or (kind == "forward" and width > 128 and not crowded):
        return _two_streams(kind, chip, crowded)
    if kind == "forward":
        return _forward(width, chip, crowded)
    return _two_products(kind, width, chip, crowded)


def _topk(dtype: torch.dtype, width: int) -> Config:
    if not matrix_units(dtype):
        return Config(64, 64, 16, 64, 8, 2)
    if dtype == torch.float32:
        return Config(64, 64, 16, 64, 4, 2)
    return Config(64, 64, min(width, 64), 64, 4, 2)


def _tf32(kind: str, width: int, chip: Chip, crowded: bool) -> Config:
    if not crowded and kind != "softplus":
        return Config(64, 32, min(width, 32), min(width, 64), 4, 2)
    if chip.large:
        return Config(64, 32, 16, min(width, 64), 8, 2)
    return Config(64, 32, min(width, 32), min(width, 64), 8, 2)


# What follows is for features of 16 bits.


def _two_streams(kind: str, chip: Chip, crowded: bool) -> Config:
    """Tiles of both sides come from the second-level cache: 64 flop a byte with 128 x 128, 43 with 128 x 64."""
    if kind == "weights":
        square = chip.hopper and not crowded
    else:
        square = not chip.blackwell
    return Config(128, 128 if square else 64, 64, 64, 8, chip.stages)


def _forward(width: int, chip: Chip, crowded: bool) -> Config:
    BD = width if width <= 128 else 64
    if chip.hopper and not crowded:
        return Config(128, 64, BD, BD, 4, 3)
    if chip.hopper:
        return Config(128, 32, BD, BD, 8, 3)
    if chip.blackwell and crowded:
        return Config(64, 64, min(BD, 32), BD, 8, 2)
    return Config(128, 64, BD, BD, 8, 2)


def _two_products(kind: str, width: int, chip: Chip, crowded: bool) -> Config:
    if width > 256 or (width == 256 and kind == "softplus"):
        # Of 512 at a time the accumulators would leave too few registers: ptxas then waits for each product.
        return Config(64, 64, 64, 256, 8, chip.stages)
    if not chip.large:
        return Config(64, 32, width, width, 8, 2)
    if width == 256:
        return Config(128, 32, 256, 256, 8, 3)
    if chip.blackwell and crowded:
        return Config(64, 32, width, width, 8, 2)
    if chip.blackwell and kind == "backward":
        return Config(128, 32, width, width, 8, 2)
    if crowded or kind != "backward" or chip.blackwell:
        return Config(128, 32, width, width, 8, 3)
    return Config(128, 64, width, width, 8, 3)
