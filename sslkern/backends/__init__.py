"""Which implementation of a primitive runs.

A backend is a folder here with one file per primitive. Its `__init__` names the DEVICES and DTYPES it takes (None:
any), its PRIMITIVES, in KEEPS how many scores of a small and of a large problem it keeps for a backward, and in
MISSING why it cannot run here (None: it can). LACKS has a function for each primitive that it cannot always run: with
the arguments of `resolve` it says why not, or None. What is empty, or lies in memory in an odd way, a file may hand to
the reference.
"""

import contextvars
import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import cpu, cuda, reference, triton

BACKENDS = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "reference": reference,
}  # the fastest first: the order in which `auto` tries

_process_choices: list["use_backend"] = []  # the last one counts
_context_choice: contextvars.ContextVar[str | None] = contextvars.ContextVar("sslkern_backend", default=None)


class use_backend:
    """Chooses the backend: `with use_backend("reference"):` for the block and its context (thread, async task),
    `use_backend("reference")` alone for the process.

    `"auto"` takes the fastest backend that has the primitive for the device and dtype. A backend asked for by name
    never falls back: what it lacks raises. The environment variable `SSLKERN_BACKEND` sets the initial choice. A
    backward always runs on the backend of its forward; compiled code follows the last choice made in any thread.

    Args:
        name: "auto", or one of `sslkern.backends.BACKENDS`.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend cannot run on this machine.

    Example:
        >>> z0, z1 = torch.randn(256, 128), torch.randn(256, 128)
        >>> with sslkern.use_backend("reference"):
        ...     loss = sslkern.functional.nt_xent(z0, z1)
    """

    def __init__(self, name: str):
        _known(name)
        if name != "auto" and BACKENDS[name].MISSING:
            raise RuntimeError(f"backend {name!r} cannot be used: {BACKENDS[name].MISSING}")
        self.name = name
        _process_choices.append(self)
        _publish()

    def __enter__(self) -> "use_backend":
        if self in _process_choices:
            _process_choices.remove(self)  # it was not meant for the process
        self._token = _context_choice.set(self.name)
        _publish()
        return self

    def __exit__(self, *exc: object) -> None:
        _context_choice.reset(self._token)
        _publish()


def _known(name: str) -> str:
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        given = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, not {given}")
    return name


def current() -> str:
    """The name chosen here and now, "auto" included."""
    return _context_choice.get() or _of_process


def _publish() -> None:
    global _of_process, _latest
    _of_process = _process_choices[-1].name if _process_choices else _from_environment
    _latest = current()


_from_environment = _known(os.environ.get("SSLKERN_BACKEND") or "auto")
_of_process = _from_environment
_latest = _from_environment  # for torch.compile, which guards on a global but cannot read a ContextVar


# What `find` found, as a small batch feels each question: to be cleared by whoever changes what a backend has or lacks.
_found: dict[tuple, str | None] = {}

# The backends that have a primitive, the fastest first.
_OFFERED: dict[str, list[str]] = {}
for _name, _backend in BACKENDS.items():
    for _primitive in _backend.PRIMITIVES:
        _OFFERED.setdefault(_primitive, []).append(_name)


def chosen() -> str:
    """The name that counts here and now; in compiled code the last one chosen anywhere."""
    return _latest if torch.compiler.is_compiling() else _context_choice.get() or _of_process


def find(primitive: str, x: Tensor, **options: Any) -> str | None:
    """The backend that runs `primitive` on features x: under "auto" the fastest that can, else the one asked for by
    name; None if it cannot. options: what else a backend may decide by, see `resolve`."""
    if is_dynamo_compiling():
        return _find(primitive, _latest, x.device.type, x.dtype, x, options)
    choice = _context_choice.get() or _of_process
    key = primitive, choice, x.device, x.dtype, *options.values()
    try:
        return _found[key]
    except TypeError:  # traced sizes have no hash
        return _find(primitive, choice, x.device.type, x.dtype, x, options)
    except KeyError:
        if len(_found) >= 1024:
            _found.clear()
        found = _found[key] = _find(primitive, choice, x.device.type, x.dtype, x, options)
        return found


def resolve(primitive: str, x: Tensor, **options: Any) -> str:
    """As `find`, where there is no other way. It is asked once, in the forward: a backward, also of compiled code, runs
    where its forward ran.

    Args:
        x: features, of which a backend may ask the type, the sizes, and the device, with its compute capability.
        options: for the similarity family `sizes` (G, N, M, D), whether there are a `bias` and a `limit`, `n` of
            similarity_topk, and of similarity_lse whether keys are `frozen`; for a whole `pair_contrast` the sizes of
            its similarities, whether there is a `bank`, and its `mode`; for sampled_similarity the sizes, and `n` rows
            of the bank for each query; for queue_push and bank_update `other`, the type of what they write there. The
            others are asked for the features alone.

    Raises:
        RuntimeError: the backend was asked for by name, and lacks the primitive, the device, the type, or something
            that this problem needs; it never falls back to another.
    """
    return resolve_each((primitive,), x, options)[0]


def resolve_each(primitives: Sequence[str], x: Tensor, options: dict[str, Any]) -> list[str]:
    """`resolve`, of several primitives."""
    choice, device, dtype, names = chosen(), x.device.type, x.dtype, []
    for primitive in primitives:
        name = _find(primitive, choice, device, dtype, x, options)
        if name is None:
            if choice == "auto":
                raise RuntimeError(f"no backend can run {primitive} of {dtype} on {device}")
            reason = _lacks(choice, primitive, device, dtype, x, options)
            raise RuntimeError(f"backend {choice!r} cannot run {primitive}: {reason}; use_backend('auto') finds one")
        names.append(name)
    return names


def _find(
    primitive: str, choice: str, device: str, dtype: torch.dtype, x: Tensor, options: dict[str, Any]
) -> str | None:
    for name in _OFFERED.get(primitive, ()):
        if (choice == "auto" or choice == name) and _lacks(name, primitive, device, dtype, x, options) is None:
            return name
    return None


def _lacks(
    name: str, primitive: str, device: str, dtype: torch.dtype, x: Tensor, options: dict[str, Any]
) -> str | None:
    """What the backend cannot do, or None."""
    backend = BACKENDS[name]
    if backend.MISSING is not None:
        return backend.MISSING
    if primitive not in backend.PRIMITIVES:
        return f"it has no {primitive}"
    if backend.DEVICES is not None and device not in backend.DEVICES:
        return f"it has no {device} kernels"
    if backend.DTYPES is not None and dtype not in backend.DTYPES:
        return f"it has no {dtype} kernels"
    lacks = backend.LACKS.get(primitive)
    return None if lacks is None else lacks(x, **options)


def rows_to_keep(backend: str, N: int, M: int, D: int, groups: int = 1, *, itself: bool = False) -> int:
    """Of how many rows a forward of `similarity_lse` keeps the scores, which saves the backward a product of them.

    All of a small problem, where features are so many that reading a score back costs less than its product. A part
    of a large one with queries and keys of many features: dense code takes three products there where ours takes four
    (of q with `itself` two).
    """
    few, most = BACKENDS[backend].KEEPS
    scores = groups * N * M
    if D >= 64 and scores <= few:
        return N
    if itself or D <= 256 or most == 0:
        return 0
    return min(N, N * (D - 256) // 768, most * N // scores)


@functools.cache
def load(backend: str, primitive: str) -> ModuleType:
    """The module that implements `primitive`."""
    return importlib.import_module(f"{__name__}.{backend}.{primitive}")
