"""The packages that sslkern.compat stands in for, in the versions whose numbers it gives."""

import importlib.metadata

import pytest

from ..functional.agreement import peer as imported

PINNED = {
    "info_nce": ("info-nce-pytorch", "0.1.4"),
    "lightly": ("lightly", "1.6.0"),
    "open_clip": ("open-clip-torch", "3.3.0"),
    "pytorch_metric_learning": ("pytorch-metric-learning", "2.9.0"),
    "sentence_transformers": ("sentence-transformers", "6.2.0"),
}


def peer(module: str):
    """A module of one of these packages; skips the tests of a file where it is missing, or another version of it."""
    distribution, version = PINNED[module.partition(".")[0]]
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} {version} is not installed", allow_module_level=True)
    if found != version:
        pytest.skip(f"of {distribution} {version} is wanted, not {found}", allow_module_level=True)
    return imported(module)
