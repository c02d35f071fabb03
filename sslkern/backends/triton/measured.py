"""What `tuning` found on a kind of GPU, in a file below $SSLKERN_CACHE (default: ~/.cache/sslkern)."""

import functools
import json
import os
import re
from pathlib import Path

import torch

from .chips import Chip, tf32


def path(chip: Chip) -> Path:
    folder = Path(os.environ.get("SSLKERN_CACHE") or Path.home() / ".cache/sslkern")
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', chip.name) or 'unknown'}.json"


def key(dtype: torch.dtype, D: int) -> str:
    """What a choice is kept under: the type, and features to the next power of two."""
    name = "tf32" if tf32(dtype) else str(dtype).removeprefix("torch.")
    return f"{name} {1 << max(4, (D - 1).bit_length())}"


@functools.cache
def on(chip: Chip) -> dict[str, dict]:
    """{"scheme": {"bfloat16 128": "fused"}, "config": {"forward bfloat16 128": [..]}}, without entries where nothing
    was measured or the file cannot be read."""
    nothing: dict[str, dict] = {"scheme": {}, "config": {}}
    if not chip.name:
        return nothing
    try:
        found = json.loads(path(chip).read_text())
        return {name: dict(found.get(name, {})) for name in nothing}
    except (OSError, ValueError, AttributeError, TypeError):  # there is no file, or it is not of this form
        return nothing


def write(chip: Chip, found: dict[str, dict]) -> None:
    """Replaces the file in one step: who reads it at this moment gets the old or the new one."""
    file = path(chip)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1))
    part.replace(file)
    on.cache_clear()
