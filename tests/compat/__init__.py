"""The packages that sslkern.compat and docs/recipes.md are for, in the versions whose numbers they give."""

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from ..functional.agreement import peer as imported

PINNED = {
    "info_nce": ("info-nce-pytorch", "0.1.4"),
    "lightly": ("lightly", "1.6.0"),
    "open_clip": ("open-clip-torch", "3.3.0"),
    "pytorch_metric_learning": ("pytorch-metric-learning", "2.9.0"),
    "pytorch_lightning": ("pytorch-lightning", "2.6.6"),
    "sentence_transformers": ("sentence-transformers", "6.2.0"),
    "transformers": ("transformers", "5.24.0"),
}


# Modules of a checkout, found by PYTHONPATH: where from, and the beginning of the SHA-256 of their text without blanks.
CHECKED_OUT = {
    "grad_cache.context_managers": ("luyug/GradCache", "e9da315cc31fbd5d"),
    "grad_cache.functional": ("luyug/GradCache", "e9287548455fe020"),
    "grad_cache.grad_cache": ("luyug/GradCache", "61bdc563bfe13229"),
    "grad_cache.loss": ("luyug/GradCache", "14437106f5df8665"),
    "losses": ("HobbitLong/SupContrast", "720cac0cbe927f82"),
    "moco.builder": ("facebookresearch/moco", "de495ac39fa549af"),
}


def peer(module: str):
    """A module of one of these packages; skips the tests of a file where it is missing, or another version of it."""
    if module in CHECKED_OUT:
        reason = _why_not_checked_out(module)
    else:
        reason = _why_not_installed(*PINNED[module.partition(".")[0]])
    if reason:
        pytest.skip(reason, allow_module_level=True)
    return imported(module)


def _why_not_installed(distribution: str, version: str) -> str | None:
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"{distribution} {version} is not installed"
    return None if found == version else f"of {distribution} {version} is wanted, not {found}"


def _why_not_checked_out(module: str) -> str | None:
    repository, digest = CHECKED_OUT[module]
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return f"no checkout of {repository} is on PYTHONPATH"
    text = "".join(Path(spec.origin).read_text().split())
    found = hashlib.sha256(text.encode()).hexdigest()
    return None if found.startswith(digest) else f"{spec.origin} is not that of {repository} at its last version"
