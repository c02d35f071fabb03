"""Compiles the CUDA kernels of sslkern before they are needed, for the GPUs of this machine or those that --arch names.

Nobody has to: what a call needs is compiled when it is first needed, in about a second, and kept in a folder. Where
that folder is thrown away or cannot be written (a container, a shared cluster), compile once and keep it:

    SSLKERN_CACHE=/opt/sslkern python -m sslkern.backends.cuda.compile --arch 80 90a

and set SSLKERN_CACHE=/opt/sslkern wherever that is used; it may be read-only there. Without it the folder is
~/.cache/sslkern. What is kept is for one version of sslkern and one of NVRTC: another compiles anew.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import driver, nvrtc
from .nvrtc import CompileError

SOURCES = Path(__file__).resolve().parent / "kernels"
TYPES = "float", "bf16", "fp16"  # in kernels/device.h
HOPPER = "sm_90a"  # with wgmma and what goes with it


class Program(NamedTuple):
    """Kernels of one file that are compiled together, anew for each tuple of arguments of their templates, which are
    {0}, {1}, .. in their names. Beside each stands what it takes, as launch.py packs it."""

    source: str
    kernels: dict[str, str]
    arguments: Sequence[tuple[str, ...]]
    hopper: bool = False  # they run on compute capability 9.0 alone


ONE_TYPE = [(name,) for name in TYPES]
HALF_TYPES = "bf16", "fp16"
TWO_TYPES = list(itertools.product(TYPES, TYPES))  # of what is written and of what is read

PROGRAMS = {
    "sampled_similarity": Program(
        "sampled_similarity.cu",
        {
            "sampled_forward<{0}, true>": "teams int64*4 pointer*4",
            "sampled_forward<{0}, false>": "teams int64*4 pointer*4",
            "sampled_backward<{0}, true>": "teams int64*5 pointer*4",
            "sampled_backward<{0}, false>": "teams int64*5 pointer*4",
            "add_parts": "int64*3 pointer*2",
        },
        ONE_TYPE,
    ),
    "queue_push": Program("queue_push.cu", {"push<{0}, {1}>": "teams int64*3 pointer*3 bool"}, TWO_TYPES),
    "bank_update": Program(
        "bank_update.cu",
        {
            "forget": "int64*2 pointer*2",
            "claim": "int64 pointer*2",
            "update<{0}, {1}>": "teams int64*2 pointer*3 float pointer",
        },
        TWO_TYPES,
    ),
    "unit_pairs": Program(
        "unit_pairs.cu",
        {"pair_forward<{0}>": "teams int64 pointer*5", "pair_backward<{0}>": "teams int64 pointer*7"},
        ONE_TYPE,
    ),
    "pair_contrast": Program(
        "pair_contrast.cu",
        {
            "pair_scores<{0}, {3}>": "pairs pointer*5",
            "pair_gradients<{0}, {1}, {2}, {3}>": "pairs pointer*3 float int pointer*4",
        },
        [
            (name, *shape, of)
            for name, shapes in (
                *((name, [("4", "2"), ("1", "8"), ("1", "16")]) for name in HALF_TYPES),
                ("float", [("2", "2"), ("1", "8")]),
            )
            for shape in shapes
            for of in ("0", "3")  # the Mode of kernels/pair_contrast.h; 0 is for 1 and 2, too
        ]
        + [(name, "1", "8", "4") for name in TYPES],
    ),
    "scaled_gradients": Program("pair_contrast.cu", {"scaled_gradients<{0}>": "int64 int pointer*7"}, ONE_TYPE),
    "pair_contrast_bank": Program(
        "pair_contrast_bank.cu",
        {
            "bank_scores<{0}, {1}, {2}, {3}>": "pairs int pointer*8",
            "bank_gradients<{0}>": "pairs found float int pointer*5 ring",
        },
        [(name, *shape) for name in HALF_TYPES for shape in (("4", "4", "2"), ("4", "1", "8"))]
        + [("float", "2", "2", "2"), ("float", "1", "1", "8")],
    ),
    "similarity_lse_gradient": Program(
        "similarity_lse_gradient.cu",
        {
            "gradient_rows<{0}, {1}>": "map*3 problem gradient",
            "gradient_of_parts": "int64 int pointer*2",
            "gradient_of_scale": "int64 pointer float pointer",
        },
        [(name, features) for name in HALF_TYPES for features in ("64", "128", "256")],
        hopper=True,
    ),
    "similarity_lse_forward": Program(
        "similarity_lse_forward.cu",
        {"forward<{0}, {1}>": "map*2 problem plan partials int"},
        [(name, features) for name in HALF_TYPES for features in ("64", "128", "704", "0")],
        hopper=True,
    ),
    "similarity_lse_merge": Program(
        "similarity_lse_merge.cu", {"merge": "plan partials int*2 pointer*5"}, [()], hopper=True
    ),
    "similarity_extents": Program("similarity_extents.cu", {"id_extents": "pointer*4 int64*2"}, [()], hopper=True),
    "similarity_lse_frozen": Program(
        "similarity_lse_rows.cu",
        {
            "frozen<{0}, {1}>": "map*3 problem int pointer*2 int pointer",
            "merge_means": "parts int pointer*2",
        },
        [(name, features) for name in HALF_TYPES for features in ("64", "128", "256")],
        hopper=True,
    ),
    "similarity_lse_running": Program(
        "similarity_lse_rows.cu",
        {
            "running<{0}>": "map*3 sides",
            "merge_rows": "parts_of_sides",
        },
        [(name,) for name in HALF_TYPES],
        hopper=True,
    ),
    "similarity_lse_sides": Program(
        "similarity_lse_sides.cu",
        {"sides_fold": "int pointer*2 int pointer*3", "sides_columns": "int*3 pointer*3 bool pointer*3"},
        [()],
        hopper=True,
    ),
    "similarity_lse_weights": Program(
        "similarity_lse_weights.cu",
        {"weights_{1}<{0}>": "map*3 problem weights"},
        list(itertools.product(HALF_TYPES, ("chunks", "stream"))),
        hopper=True,
    ),
    "similarity_softplus_gradient": Program(
        "similarity_softplus_gradient.cu",
        {"softplus_rows<{0}>": "map*2 problem softplus_gradient"},
        [(name,) for name in HALF_TYPES],
        hopper=True,
    ),
    "similarity_softplus_weights": Program(
        "similarity_softplus_weights.cu",
        {"softplus_{1}<{0}>": "map*3 problem softplus_weights"},
        list(itertools.product(HALF_TYPES, ("chunks", "stream"))),
        hopper=True,
    ),
}


class Unit(NamedTuple):
    """What is compiled at once: a program for some arguments, types of TYPES and numbers."""

    program: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.program}<{', '.join(self.arguments)}>" if self.arguments else self.program

    def expressions(self) -> dict[str, str]:
        """The kernels of the program, with their arguments."""
        return {kernel: kernel.format(*self.arguments) for kernel in PROGRAMS[self.program].kernels}

    def file_name(self) -> str:
        return "-".join((self.program, *self.arguments))


UNITS = [Unit(name, arguments) for name, program in PROGRAMS.items() for arguments in program.arguments]


def units(target: str) -> list[Unit]:
    """All that runs there."""
    return [unit for unit in UNITS if target == HOPPER or not PROGRAMS[unit.program].hopper]


class Image(NamedTuple):
    """A compiled unit: machine code (or PTX), the names of the kernels in it, and what the compiler warned of."""

    code: bytes
    names: dict[str, str]
    log: str = ""


def target(capability: int) -> str:
    """What to compile for on a chip of this compute capability, 90 for 9.0: its own machine code, or PTX where it is
    newer than NVRTC, which the driver translates."""
    known, version = nvrtc.load().architectures, nvrtc.load().version
    if capability in known:
        return HOPPER if capability == 90 and version >= (12, 0) else f"sm_{capability}"
    older = [architecture for architecture in known if architecture < capability]
    if not older:
        raise CompileError(f"this NVRTC knows no GPU of compute capability {capability / 10} or older")
    return f"compute_{max(older)}"


def image(unit: Unit, target: str) -> Image:
    """The unit compiled, or as it was kept. Of processes that need the same at once one compiles it.

    Raises:
        CompileError: it does not compile.
    """
    path = _path(unit, target)
    if kept := _read(path):
        return kept
    if path is None:
        return _compiled(unit, target)
    with _alone(path):
        kept = _read(path)  # another process may have been faster
        if kept is None:
            kept = _compiled(unit, target)
            _write(path, kept)
    return kept


def _compiled(unit: Unit, target: str) -> Image:
    sources = _sources()
    name = PROGRAMS[unit.program].source
    headers = {header: text for header, text in sources.items() if header.endswith(".h")}
    expressions = unit.expressions()
    full = [_qualified(expression) for expression in expressions.values()]
    code, names, log = nvrtc.load().compile(name, sources[name], headers, _options(target), full)
    return Image(code, dict(zip(expressions, names, strict=True)), log)


def _qualified(expression: str) -> str:
    """`push<bf16, float>` as it is named from outside of its namespace."""
    return "sslkern::cuda::" + re.sub(r"\b(bf16|fp16)\b", r"sslkern::cuda::\1", expression)


def _options(target: str) -> list[str]:
    return [f"--gpu-architecture={target}", "--std=c++17", "--ptxas-options=--warn-on-spills"]


@functools.cache
def _sources() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cu", ".h")}


def _key(unit: Unit, target: str) -> str:
    """Changes with everything that the machine code depends on."""
    facts = unit, unit.expressions(), _options(target), nvrtc.load().version, _sources()
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# ---- What is kept: a file for each unit, whose first line says whether the rest is whole ----------------------------


def _path(unit: Unit, target: str) -> Path | None:
    folder = _folder()
    return folder and folder / f"{unit.file_name()}-{target}-{_key(unit, target)}"


def _folder() -> Path | None:
    try:
        return Path(os.environ.get("SSLKERN_CACHE") or Path.home() / ".cache/sslkern") / "cuda"
    except RuntimeError:  # nobody's home
        return None


def _read(path: Path | None) -> Image | None:
    if path is None:
        return None
    try:
        check, facts, code = path.read_bytes().split(b"\n", 2)
        if check.decode() == _check(facts, code):
            return Image(code, *json.loads(facts))
    except (OSError, ValueError):
        pass
    return None


def _write(path: Path, image: Image) -> None:
    """All of it or nothing; a folder that takes nothing is no error."""
    facts, temporary = json.dumps((image.names, image.log)).encode(), None
    with contextlib.suppress(OSError):
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                temporary = Path(file.name)
                file.write(b"\n".join((_check(facts, image.code).encode(), facts, image.code)))
            temporary.replace(path)
            temporary = None
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)


def _check(facts: bytes, code: bytes) -> str:
    return hashlib.sha256(facts + b"\n" + code).hexdigest()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time, where the folder has locks. A lock goes with the process that holds it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(f"{path}.lock", "w")), fcntl.LOCK_EX)
        yield


# ---- The command ----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sslkern.backends.cuda.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch", nargs="+", metavar="ARCH", help="80 for the A100, 90a for the H100, 100 for the B200; several at once"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the machine code there, to be looked at")
    options = parser.parse_args(arguments)
    try:
        compiler = nvrtc.load()
        shown = f"NVRTC {'.'.join(map(str, compiler.version))} of {compiler.path}"
        if options.arch:
            targets = [f"sm_{name.removeprefix('sm_')}" for name in options.arch]
        else:
            targets = sorted({target(driver.capability(index)) for index in range(driver.count())})
        for name in targets:
            if not any(re.fullmatch(rf"(sm|compute)_{known}[af]?", name) for known in compiler.architectures):
                parser.error(f"{shown} knows no {name}, but {', '.join(map(str, compiler.architectures))}")
        print(f"{shown}, into {_folder()}")
        for name in targets:
            _prepare(name, options.out)
    except (CompileError, driver.DriverError) as error:
        sys.exit(f"sslkern: {error}")
    if not targets:
        sys.exit("sslkern: there is no GPU here; say with --arch what to compile for")
    if any(_read(_path(unit, name)) is None for name in targets for unit in units(name)):
        sys.exit(f"sslkern: nothing can be kept in {_folder()}; name a folder with SSLKERN_CACHE")


def _prepare(target: str, out: Path | None) -> None:
    for unit in units(target):
        begun = time.perf_counter()
        code, _, log = image(unit, target)
        seconds = time.perf_counter() - begun
        print(f"{str(unit):44} {target:8} {len(code) / 1024:6.1f} KB {seconds:6.2f} s", flush=True)
        if log:
            print(log, flush=True)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{unit.file_name()}.{target}.cubin").write_bytes(code)


if __name__ == "__main__":
    main()
