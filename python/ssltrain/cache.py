"""Figures that depend on a data set alone, kept on disk from run to run.

The folder is $SSLTRAIN_CACHE, else ssltrain in $XDG_CACHE_HOME or ~/.cache; it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from torch import Tensor

Figures = dict[str, float]


def kept(
    name: str, keys: Collection[str], of: Sequence[Tensor], version: str, compute: Callable[[], Figures]
) -> Figures:
    """What `compute` gives, figures by these keys, or gave for tensors that are the same to the bit."""
    folder = _folder()
    path = folder and folder / f"{name}-{_checksum(version, of)}.json"
    found = _read(path)
    if found is None or found.keys() != set(keys):
        _write(path, found := compute())
    return found


def _folder() -> Path | None:
    if named := os.environ.get("SSLTRAIN_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssltrain"
    except RuntimeError:  # nobody's home
        return None


def _checksum(version: str, of: Sequence[Tensor]) -> str:
    check = hashlib.sha256(version.encode())
    for x in of:
        check.update(f"{x.dtype} {tuple(x.shape)}".encode())
        check.update(x.cpu().contiguous().numpy().data)
    return check.hexdigest()[:32]


def _read(path: Path | None) -> Figures | None:
    """None where there is no such file, or none that is whole."""
    if path is not None:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text("utf-8"))
            if isinstance(found, dict) and all(isinstance(figure, float) for figure in found.values()):
                return found
    return None


def _write(path: Path | None, figures: Figures) -> None:
    """All of it or nothing; a folder that takes nothing is no error."""
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            part.write_text(json.dumps(figures), "utf-8")
            part.replace(path)
