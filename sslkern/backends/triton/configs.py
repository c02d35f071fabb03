"""Sizes of tiles by architecture and number of features.

They are chosen so that nothing spills and what a tile needs fits in the shared memory of an architecture
(benchmarks/results/offline/triton.md).
"""

from typing import NamedTuple

import torch
import triton

from . import INTERPRETED
from .hardware import Hardware, tf32
from .strategies import key
from .tuning import tuned


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

    def __exit__(self, *exc) -> None:
        del _forced[self.name]


def candidates(kind: str, D: int, default: Config, hardware: Hardware) -> list[Config]:
    """The default and what may be faster, the likeliest first."""
    near = [default]
    if hardware.large and hardware.architecture != 90 and not (kind == "backward" and default.DV > 128):
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


def choose(kind: str, dtype: torch.dtype, D: int, hardware: Hardware, crowded: bool = False) -> Config:
    """kind: "forward", "topk"; with a second product "frozen", "softplus", "backward"; "weights" that go to memory, or
    what is made of products "given" there. crowded: what else a tile needs takes registers, too."""
    width = max(16, triton.next_power_of_2(D))
    if INTERPRETED:  # a step costs the same whatever its size
        return Config(64, 64, min(width, 128), min(width, 256 if width > 128 else 128), 4, 1)
    name = f"{kind} {key(dtype, D)}"
    if name in _forced:
        return _forced[name]
    if not crowded and name in tuned(hardware).get("config", {}):
        config = Config(*tuned(hardware)["config"][name])
        if config.BM in SIDES and config.BN in SIDES:
            return config
    large, hopper = hardware.large, hardware.architecture == 90
    blackwell = large and not hopper
    if kind == "given":
        return Config(32, 32, 16, 16, 4, 1)
    full = dtype == torch.float32 and not tf32(dtype)  # no matrix units
    if kind == "topk":
        return Config(64, 64, min(width, 16 if dtype == torch.float32 else 64), 64, 8 if full else 4, 2)
    if full:  # the same for all: features at a time decide bits (`dot_products`), in which forward and backward agree
        return Config(32, 32, min(width, 64), min(width, 64), 8, 1)
    if dtype == torch.float32:
        few = crowded or kind == "softplus"
        return Config(64, 32, min(width, 16 if few and large else 32), min(width, 64), 8 if few else 4, 2)
    stages = 3 if large else 2
    if kind == "weights" or kind == "forward" and width > 128 and not crowded:
        # Tiles of both sides come from the second-level cache: 64 flop a byte, where 128 x 64 would have 43.
        few = blackwell or kind == "weights" and (crowded or not hopper)
        return Config(128, 64 if few else 128, 64, 64, 8, stages)
    if kind == "forward":
        BD = width if width <= 128 else 64
        if not large:
            return Config(128, 64, BD, BD, 8, stages)
        if crowded and blackwell:
            return Config(64, 64, min(BD, 32), BD, 8, 2)
        return Config(128, 32 if crowded else 64, BD, BD, 4 if hopper and not crowded else 8, 3 if hopper else 2)
    if width <= 128:
        if not large:
            return Config(64, 32, width, width, 8, stages)
        if crowded and blackwell:
            return Config(64, 32, width, width, 8, 2)
        few = crowded or blackwell or kind != "backward"
        return Config(128, 32 if few else 64, width, width, 8, 2 if blackwell and kind == "backward" else stages)
    if width == 256 and kind != "softplus":
        return Config(128 if large else 64, 32, 256, 256, 8, stages)
    # Of 512 at a time the accumulators would leave too few registers: ptxas then waits for each product.
    return Config(64, 64, 64, 256, 8, stages)
