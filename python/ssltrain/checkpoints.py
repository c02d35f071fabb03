"""The checkpoint of a run: checkpoint.pt, and the weights in a file beside it, which it names."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ssltrain import UsageError

CHECKPOINT = "checkpoint.pt"
KEYS = ("optimizer", "state", "config", "shape", "rng")  # and "about", which earlier versions had not


def save(out: Path, method: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Write a checkpoint into the folder `out`; a kill at any moment leaves the old one or the new one.

    The weights come first, in a file of a new name; replacing checkpoint.pt, which names it, makes them count.
    """
    weights = f"weights-{secrets.token_hex(4)}.safetensors"
    with replacing(out / weights) as file:
        file.write(safetensors.torch.save({name: x.contiguous() for name, x in method.items()}))
    with replacing(out / CHECKPOINT) as file:
        torch.save({"weights": weights, **content}, file)
    for old in out.glob("weights-*.safetensors*"):
        if old.name != weights:
            old.unlink()


def load(out: Path) -> dict[str, Any] | None:
    """The checkpoint in the folder `out`, on the CPU, or None; raises `UsageError` if it cannot be read.

    Its keys are "method", the weights, and those of the content.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        method = safetensors.torch.load_file(out / Path(checkpoint["weights"]).name)
        about = {"about": checkpoint.get("about", {})}
        return {"method": method} | {key: checkpoint[key] for key in KEYS} | about
    except Exception as error:  # unpickling a foreign or damaged file may raise nearly anything
        raise UsageError(
            f"--out {out}: {path.name} is no checkpoint that can be read; choose another folder."
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """A file that takes the place of `path` once it is written whole and lies on the disk."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
