"""The machine code of the CUDA kernels for each architecture, by NVRTC, without nvcc and a GPU: how long it takes,
registers, shared memory, spills, how wide loads are, and where arguments lie.

`make cuda-offline` runs it as a script, which writes the table benchmarks/results/offline/cuda.{json,md}.
"""

import importlib.util
import itertools
import json
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections import Counter
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import pytest

from sslkern.backends.cuda import compile, launch, nvrtc

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/offline"
ARCHITECTURES = "sm_80", "sm_90a", "sm_100"
pytestmark = pytest.mark.slow
SMALL = ("forget", "claim", "add_parts", "id_extents")  # kernels that touch little memory


def find_cuobjdump() -> str | None:
    """On the PATH, where a toolkit is by default, or in triton's wheel, which has one."""
    places = [Path("cuobjdump"), Path("/usr/local/cuda/bin/cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    return next(filter(None, (shutil.which(place) for place in places)), None)


def output_of(*command) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def kernels_of(cuobjdump: str, unit: compile.Unit, target: str, image: compile.Image, folder: Path) -> list[dict]:
    file = folder / "code.cubin"
    file.write_bytes(image.code)
    expressions = unit.expressions()
    shown = {name: expressions[kernel] for kernel, name in image.names.items()}
    instructions, rows, kernel = {}, [], None
    for line in output_of(cuobjdump, "--dump-sass", file).splitlines():
        if found := re.match(r"\s*Function : (\w+)", line):
            kernel = instructions[found[1]] = Counter()
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?\s*([A-Z][\w.]*)", line):
            kernel[found[1]] += 1
    for line in output_of(cuobjdump, "--dump-resource-usage", file).splitlines():
        if found := re.match(r"\s*Function (\w+):", line):
            name = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            counts = instructions[name]

            def wide(kind, counts=counts):
                return sum(n for name, n in counts.items() if name.startswith(kind) and ".128" in name)

            rows.append(
                {
                    "architecture": target,
                    "program": unit.program,
                    "kernel": shown[name],
                    "registers": registers,
                    "stack": stack,
                    "shared": shared,
                    "spills": local + sum(n for name, n in counts.items() if name.startswith(("LDL", "STL"))),
                    "loads_of_16_bytes": wide("LDG"),
                    "stores_of_16_bytes": wide("STG"),
                    "instructions": counts.total(),
                }
            )
    return rows


def arguments_of(cuobjdump: str, image: compile.Image, folder: Path) -> dict[str, list[int]]:
    """The sizes of the arguments of each kernel."""
    file = folder / "code.cubin"
    file.write_bytes(image.code)
    kernels, found = {name: kernel for kernel, name in image.names.items()}, {}
    for line in output_of(cuobjdump, "--dump-elf", file).splitlines():
        if section := re.match(r"\.nv\.info\.(\w+)", line):
            places = found.setdefault(kernels[section[1]], {})
        elif place := re.search(r"Ordinal : (\w+)\s+Offset  : \w+\s+Size    : (\w+)", line):
            ordinal, size = (int(number, 16) for number in place.groups())
            places[ordinal] = size
    return {kernel: [size for _, size in sorted(places.items())] for kernel, places in found.items()}


def write(measured: "Measured") -> None:
    compiler, rows = measured.compiler, measured.rows
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "cuda.json").write_text(json.dumps({"compiler": compiler, "kernels": rows}, indent=1) + "\n")
    slowest = max(measured.seconds, key=measured.seconds.get)
    total, largest = sum(measured.seconds.values()) / len(ARCHITECTURES), max(measured.sizes.values())
    names = list(rows[0])
    lines = [
        "# Machine code of the CUDA kernels",
        "",
        f"By {compiler}; `make cuda-offline` writes this table. Blocks have 256 threads. Kernels of a primitive and",
        f"its types are compiled together, {len(compile.UNITS)} times in all for an architecture: {total:.0f} s on",
        f"one core, at most {measured.seconds[slowest]:.1f} s ({', '.join(slowest)}) and {largest >> 10} KB each.",
        "",
        "| " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "| " + " | ".join("---" if isinstance(rows[0][name], str) else "---:" for name in names) + " |",
        *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows),
    ]
    (RESULTS / "cuda.md").write_text("\n".join(lines) + "\n")


class Missing(Exception):
    """Something that this machine lacks."""


class Measured(NamedTuple):
    compiler: str
    rows: list[dict]  # one for each kernel and architecture; what several units have, once
    seconds: dict[tuple[str, str], float]  # by unit and architecture
    sizes: dict[tuple[str, str], int]  # of the machine code
    arguments: dict[tuple[str, str], list[int]]  # their sizes, by program and kernel


def measure() -> Measured:
    if nvrtc.find() is None:
        raise Missing("there is no libnvrtc; `pip install nvidia-cuda-nvrtc` brings it")
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise Missing("there is no cuobjdump; the CUDA toolkit and triton have one")
    version = "NVRTC " + ".".join(map(str, nvrtc.load().version))
    measured = Measured(version, [], {}, {}, {})
    seen = set()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSLKERN_CACHE", folder)
        patch.setenv("PATH", "/nowhere")  # no nvcc
        for target in ARCHITECTURES:
            for unit in compile.units(target):
                begun = time.process_time()
                image = compile.image(unit, target)
                measured.seconds[str(unit), target] = time.process_time() - begun
                measured.sizes[str(unit), target] = len(image.code)
                if target == "sm_90a":  # elsewhere the same
                    found = arguments_of(cuobjdump, image, Path(folder))
                    measured.arguments.update({(unit.program, kernel): places for kernel, places in found.items()})
                for row in kernels_of(cuobjdump, unit, target, image, Path(folder)):
                    if (key := (target, unit.program, row["kernel"])) not in seen:
                        seen.add(key)
                        measured.rows.append(row)
    measured.rows.sort(key=lambda row: (row["program"], row["kernel"], int(re.search(r"\d+", row["architecture"])[0])))
    return measured


@pytest.fixture(scope="module")
def measured() -> Measured:
    try:
        return measure()
    except Missing as error:
        pytest.skip(str(error))


@pytest.fixture
def kernels(measured) -> list[dict]:
    return measured.rows


def test_each_compiles_in_less_than_five_seconds(measured):
    assert len(measured.seconds) == sum(len(compile.units(target)) for target in ARCHITECTURES)
    assert max(measured.seconds.values()) < 5, measured.seconds
    assert max(measured.sizes.values()) < 200 << 10, measured.sizes


def test_arguments_are_as_the_kernels_expect_them(measured):
    """By the machine code, against what launch.py packs."""
    for program, (_, kernels, *_) in compile.PROGRAMS.items():
        for kernel, arguments in kernels.items():
            sizes = [struct.calcsize(one) for one in launch.layout_of(arguments)]
            assert measured.arguments[program, kernel] == sizes, (program, kernel)


def test_all_kernels_for_all_architectures(kernels):
    assert {row["program"] for row in kernels} == set(compile.PROGRAMS)
    for name, program in compile.PROGRAMS.items():
        found = [(row["kernel"], row["architecture"]) for row in kernels if row["program"] == name]
        wanted = {kernel for unit in compile.UNITS if unit.program == name for kernel in unit.expressions().values()}
        targets = [compile.HOPPER] if program.hopper else ARCHITECTURES
        assert sorted(found) == sorted(itertools.product(wanted, targets))


def test_the_table_is_of_these_kernels(kernels):
    table = json.loads((RESULTS / "cuda.json").read_text())["kernels"]
    kernel = itemgetter("architecture", "program", "kernel")
    assert set(map(kernel, kernels)) == set(map(kernel, table)), "`make cuda-offline` renews it"


def test_no_spills(kernels):
    spilled = [row for row in kernels if row["spills"] or row["stack"]]
    assert not spilled, spilled


def test_two_blocks_or_more_fit_a_processor(kernels):
    for row in kernels:
        assert row["registers"] <= 128 and row["shared"] <= 48 << 10, row


def test_rows_are_read_or_written_by_16_bytes(kernels):
    """Where one side has 16 bits and the other 32, the wider one is."""
    for row in kernels:
        one_by_one = row["kernel"].endswith(" false>")
        if not one_by_one and row["kernel"] not in SMALL:
            assert row["loads_of_16_bytes"] + row["stores_of_16_bytes"] > 0, row
        if row["program"] in ("sampled_similarity", "unit_pairs") and not one_by_one and row["kernel"] not in SMALL:
            assert row["loads_of_16_bytes"] >= 4, row


if __name__ == "__main__":
    write(measure())
