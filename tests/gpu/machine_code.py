"""What NVRTC makes of the CUDA kernels, without nvcc and a GPU, as cuobjdump shows it."""

import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from sslkern.backends.cuda import compile, nvrtc

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/offline"


class Missing(Exception):
    """Something that this machine lacks."""


class Instruction(NamedTuple):
    address: int
    conditional: bool
    name: str  # as LDG.E.128
    operands: str


class Function(NamedTuple):
    """A kernel."""

    instructions: list[Instruction]
    registers: int
    stack: int
    shared: int
    local: int
    threads: int  # at most, of a block
    arguments: list[int]  # their sizes

    @property
    def spills(self) -> int:
        return self.local + count(self.instructions, "LDL", "STL")

    def loops(self) -> list[list[Instruction]]:
        """Each with all that stands in it, loops within loops included."""
        return _loops(self.instructions)


def count(instructions: list[Instruction], *names: str, having: str = "") -> int:
    return sum(one.name.startswith(names) and having in one.name for one in instructions)


class Compiled(NamedTuple):
    unit: compile.Unit
    target: str
    seconds: float
    image: compile.Image
    functions: dict[str, Function]  # by the names of the kernels in compile.PROGRAMS


def compiled(targets: Iterable[str], hopper: bool) -> list[Compiled]:
    """The units of programs that are for Hopper alone, or not.

    Raises:
        Missing: this machine has no compiler, or nothing that shows machine code.
    """
    cuobjdump, found = _cuobjdump(), []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSLKERN_CACHE", folder)
        patch.setenv("PATH", "/nowhere")  # no nvcc
        for target in targets:
            for unit in compile.units(target):
                if compile.PROGRAMS[unit.program].hopper != hopper:
                    continue
                begun = time.process_time()
                image = compile.image(unit, target)
                seconds = time.process_time() - begun
                found.append(Compiled(unit, target, seconds, image, functions(cuobjdump, image)))
    return found


def version() -> str:
    return "NVRTC " + ".".join(map(str, nvrtc.load().version))


def write(name: str, title: str, words: list[str], rows: list[dict]) -> None:
    """RESULTS/name.json and .md."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"compiler": version(), "kernels": rows}, indent=1) + "\n")
    names = list(rows[0])
    lines = [
        f"# {title}",
        "",
        f"By {version()}; `make cuda-offline` writes this table.",
        *words,
        "",
        "| " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "| " + " | ".join("---" if isinstance(rows[0][name], str) else "---:" for name in names) + " |",
        *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows),
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


def _cuobjdump() -> Path:
    if nvrtc.find() is None:
        raise Missing("there is no libnvrtc; `pip install nvidia-cuda-nvrtc` brings it")
    # On the PATH, where a toolkit is by default, or in triton's wheel, which has one.
    places = [Path("cuobjdump"), Path("/usr/local/cuda/bin/cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    found = next(filter(None, (shutil.which(place) for place in places)), None)
    if found is None:
        raise Missing("there is no cuobjdump; the CUDA toolkit and triton have one")
    return Path(found)


def functions(cuobjdump: Path, image: compile.Image) -> dict[str, Function]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image.code)
        file.flush()

        def lines(what: str) -> list[str]:
            command = cuobjdump, what, file.name
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

        code, usage, facts = lines("--dump-sass"), lines("--dump-resource-usage"), lines("--dump-elf")
    instructions, resources, threads, arguments = {}, {}, {}, {}
    for line in code:
        if found := re.match(r"\s*Function : (\w+)", line):
            here = instructions[found[1]] = []
        elif found := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(@!?\w+ )?\s*([A-Z][\w.]*)\s*(.*?)\s*;", line):
            here.append(Instruction(int(found[1], 16), found[2] is not None, found[3], found[4]))
    for line in usage:
        if found := re.match(r"\s*Function (\w+):", line):
            name = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            resources[name] = map(int, found.groups())
    before = ""
    for line in facts:
        if section := re.match(r"\.nv\.info\.(\w+)", line):
            name, arguments[section[1]] = section[1], {}
        elif place := re.search(r"Ordinal : (\w+)\s+Offset  : \w+\s+Size    : (\w+)", line):
            ordinal, size = (int(number, 16) for number in place.groups())
            arguments[name][ordinal] = size
        elif "MAX_THREADS" in before and (value := re.search(r"Value:\s+(\w+)", line)):
            threads[name] = int(value[1], 16)
        before = line if "Format:" not in line else before
    return {
        kernel: Function(
            instructions[name],
            *resources[name],
            threads.get(name, 0),
            [size for _, size in sorted(arguments[name].items())],
        )
        for kernel, name in image.names.items()
    }


def _loops(code: list[Instruction]) -> list[list[Instruction]]:
    place = {instruction.address: n for n, instruction in enumerate(code)}
    after: list[list[int]] = []
    meet: dict[str, int] = {}  # where threads that went apart come together, by the register that says so
    for n, one in enumerate(code):
        target = re.search(r"\b0x([0-9a-f]+)$", one.operands)
        target = place.get(int(target[1], 16)) if target else None
        following = [n + 1] if n + 1 < len(code) else []
        if one.name.startswith("BSSY"):
            meet[one.operands.split(",")[0]] = target
        if one.name.startswith("BRA") and target is not None:
            always = not one.conditional and one.operands.startswith("0x")
            after.append([target] if always else [*following, target])
        elif one.name.startswith("BSYNC"):
            after.append([meet[one.operands.split(",")[0]], *(following if one.conditional else [])])
        elif one.name.startswith(("EXIT", "RET", "BRX", "JMP")):
            after.append(following if one.conditional else [])
        else:
            after.append(following)
    starts = sorted({0, *(t for n, to in enumerate(after) for t in to if t != n + 1 or len(to) != 1)})
    starts = sorted({*starts, *(n + 1 for n, to in enumerate(after) if to != [n + 1] and n + 1 < len(code))})
    block_of = {start: b for b, start in enumerate(starts)}
    ends = [*starts[1:], len(code)]
    successors = [[block_of[t] for t in after[end - 1]] for end in ends]
    return [[code[n] for b in sorted(body) for n in range(starts[b], ends[b])] for body in _bodies(successors)]


def _bodies(successors: list[list[int]]) -> list[set[int]]:
    """The blocks of each natural loop."""
    order, seen, stack = [], {0}, [(0, iter(successors[0]))]
    while stack:
        block, rest = stack[-1]
        new = next((b for b in rest if b not in seen), None)
        if new is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(new)
            stack.append((new, iter(successors[new])))
    order.reverse()
    number = {block: n for n, block in enumerate(order)}
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for to in successors[block]:
            before[to].append(block)
    # The block that all ways to a block pass last: Cooper, Harvey and Kennedy.
    above, changed = {0: 0}, True
    while changed:
        changed = False
        for block in order[1:]:
            known = [b for b in before[block] if b in above]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    while number[new] > number[other]:
                        new = above[new]
                    while number[other] > number[new]:
                        other = above[other]
            if above.get(block) != new:
                above[block], changed = new, True
    bodies: dict[int, set[int]] = {}
    for block in order:
        for head in successors[block]:
            over = block
            while over != head and over != 0:
                over = above[over]
            if over != head:
                continue
            body = bodies.setdefault(head, {head})
            waiting = [block]
            while waiting:
                b = waiting.pop()
                if b not in body:
                    body.add(b)
                    waiting.extend(before[b])
    return list(bodies.values())
