"""The machine code of csrc/cuda for each architecture: registers, shared memory, spills, and how wide its loads are.

`make cuda-offline` runs it as a script, which writes the table benchmarks/results/offline/cuda.{json,md}.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from operator import itemgetter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/offline"
SMALL = ("forget", "claim", "add_parts")  # kernels that touch little memory


def find_cuobjdump(nvcc: str) -> str | None:
    """Beside nvcc, on the PATH, or in triton's wheel, which has one."""
    places = [Path(nvcc).resolve().parent / "cuobjdump", Path("cuobjdump"), Path("/usr/local/cuda/bin/cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    return next(filter(None, (shutil.which(place) for place in places)), None)


def output_of(*command) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def short(name: str) -> str:
    """`push<bf16, float>` of a demangled kernel."""
    name = re.sub(r"sslkern::cuda::|\(anonymous namespace\)::|^void ", "", name)
    return name.partition("(")[0]


def kernels_of(cuobjdump: str, file: Path) -> list[dict]:
    used = output_of(cuobjdump, "--dump-resource-usage", file)
    code = output_of(cuobjdump, "--dump-sass", file)
    instructions, architecture, kernel = {}, None, None
    for line in code.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function : (\w+)", line):
            kernel = architecture, found[1]
            instructions[kernel] = Counter()
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?\s*([A-Z][\w.]*)", line):
            instructions[kernel][found[1]] += 1
    rows = []
    for line in used.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            kernel = architecture, found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            counts = instructions[kernel]

            def wide(kind, counts=counts):
                return sum(n for name, n in counts.items() if name.startswith(kind) and ".128" in name)

            rows.append(
                {
                    "architecture": kernel[0],
                    "primitive": file.stem,
                    "kernel": short(output_of("c++filt", kernel[1]).strip()),
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


def write(compiler: str, rows: list[dict]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "cuda.json").write_text(json.dumps({"compiler": compiler, "kernels": rows}, indent=1) + "\n")
    names = list(rows[0])
    lines = [
        "# Machine code of the CUDA kernels",
        "",
        f"Of csrc/cuda by {compiler}; `make cuda-offline` writes this table. Blocks have 256 threads.",
        "",
        "| " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "| " + " | ".join("---" if isinstance(rows[0][name], str) else "---:" for name in names) + " |",
        *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows),
    ]
    (RESULTS / "cuda.md").write_text("\n".join(lines) + "\n")


class Missing(Exception):
    """Something that this machine lacks."""


def measure() -> tuple[str, list[dict]]:
    """The compiler's version, and a row for each kernel and architecture."""
    for needed in ("ninja", "pybind11"):
        if importlib.util.find_spec(needed) is None:
            raise Missing(f"{needed} is not installed")
    sys.path.insert(0, str(ROOT / "csrc"))
    import native_build

    nvcc = native_build.find_nvcc()
    if nvcc is None:
        raise Missing("there is no nvcc")
    cuobjdump = find_cuobjdump(nvcc)
    if cuobjdump is None or shutil.which("c++filt") is None:
        raise Missing("there is no cuobjdump or no c++filt; the first comes with the CUDA toolkit and with triton")
    if native_build.supported_architectures(nvcc) != list(native_build.CUDA_ARCHITECTURES):
        raise Missing(f"{nvcc} does not know all architectures")
    module = ROOT / "build" / sys.implementation.cache_tag / "_cuda.so"  # as setup.py has it: nothing to do if it ran
    native_build.build_cuda_module(module, nvcc)
    files = [path for path in sorted((module.parent / "_cuda.objects").rglob("*.o")) if path.stem != "runtime"]
    rows = [row for file in files if file.parent.name == "cuda" for row in kernels_of(cuobjdump, file)]
    rows.sort(key=lambda row: (row["primitive"], row["kernel"], int(re.search(r"\d+", row["architecture"])[0])))
    release = re.search(r"release (\S+), V(\S+)", output_of(nvcc, "--version"))
    return f"nvcc {release[2]}", rows


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    try:
        return measure()[1]
    except Missing as error:
        pytest.skip(str(error))


def test_all_kernels_for_all_architectures(kernels):
    assert {row["architecture"] for row in kernels} == {"sm_80", "sm_90a", "sm_100"}
    assert {row["primitive"] for row in kernels} == {"bank_update", "queue_push", "sampled_similarity", "unit_pairs"}
    assert len(kernels) == 3 * len({(row["primitive"], row["kernel"]) for row in kernels})


def test_the_table_is_of_these_kernels(kernels):
    table = json.loads((RESULTS / "cuda.json").read_text())["kernels"]
    kernel = itemgetter("architecture", "primitive", "kernel")
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
        if row["primitive"] in ("sampled_similarity", "unit_pairs") and not one_by_one and row["kernel"] not in SMALL:
            assert row["loads_of_16_bytes"] >= 4, row


if __name__ == "__main__":
    write(*measure())
