"""The machine code of the memory-bound CUDA kernels for each architecture, by NVRTC, without nvcc and a GPU: how long
it takes, registers, shared memory, spills, how wide loads are, and what arguments are.

`make cuda-offline` runs it as a script, which writes the table benchmarks/results/offline/cuda.{json,md}.
"""

import json
import re
import struct
from operator import itemgetter

import pytest

from sslkern.backends.cuda import compile, launch

from . import machine_code
from .machine_code import RESULTS, Compiled, count

OLDEST = "sm_80"
ARCHITECTURES = OLDEST, "sm_90a", "sm_100"
pytestmark = pytest.mark.slow
# Kernels that touch little memory.
SMALL = "forget", "claim", "add_parts", *(f"scaled_gradients<{name}>" for name in compile.TYPES)


def rows_of(measured: list[Compiled]) -> list[dict]:
    """One for each kernel and architecture; what several units have, once."""
    rows = {}
    for unit, target, _, _, functions in measured:
        for kernel, shown in unit.expressions().items():
            one = functions[kernel]
            rows[target, unit.program, shown] = {
                "architecture": target,
                "program": unit.program,
                "kernel": shown,
                "registers": one.registers,
                "stack": one.stack,
                "shared": one.shared,
                "spills": one.spills,
                "loads_of_16_bytes": count(one.instructions, "LDG", having=".128"),
                "stores_of_16_bytes": count(one.instructions, "STG", having=".128"),
                "instructions": len(one.instructions),
            }

    def order(row: dict) -> tuple:
        return row["program"], row["kernel"], int(re.search(r"\d+", row["architecture"])[0])

    return sorted(rows.values(), key=order)


def write(measured: list[Compiled]) -> None:
    seconds, largest = [one.seconds for one in measured], max(len(one.image.code) for one in measured)
    slowest = max(measured, key=lambda one: one.seconds)
    words = [
        "Blocks have 256 threads. Kernels of a program and its types are compiled together,",
        f"{len(measured) // len(ARCHITECTURES)} times in all for an architecture: {sum(seconds) / 3:.0f} s on one",
        f"core, at most {slowest.seconds:.1f} s ({slowest.unit}, {slowest.target}) and {largest >> 10} KB each.",
    ]
    machine_code.write("cuda", "Machine code of the CUDA kernels", words, rows_of(measured))


@pytest.fixture(scope="module", params=[OLDEST, *(pytest.param(x, marks=pytest.mark.long) for x in ARCHITECTURES[1:])])
def target(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def measured(target) -> list[Compiled]:
    try:
        return machine_code.compiled([target], hopper=False)
    except machine_code.Missing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def kernels(measured) -> list[dict]:
    return rows_of(measured)


def test_each_compiles_in_less_than_five_seconds(measured):
    for one in measured:
        assert one.seconds < 5 and len(one.image.code) < 200 << 10 and not one.image.log, one[:4]


def test_arguments_are_as_the_kernels_expect_them(measured):
    """By the machine code, against what launch.py packs."""
    for one in measured:
        for kernel, arguments in compile.PROGRAMS[one.unit.program].kernels.items():
            sizes = [struct.calcsize(layout) for layout in launch.layout_of(arguments)]
            assert one.functions[kernel].arguments == sizes, (one.unit, kernel)


def test_all_kernels(kernels, target):
    wanted = {(unit.program, kernel) for unit in compile.units(OLDEST) for kernel in unit.expressions().values()}
    assert {(row["program"], row["kernel"]) for row in kernels} == wanted
    assert {row["architecture"] for row in kernels} == {target} and len(kernels) == len(wanted) > 50


def test_the_table_is_of_these_kernels(kernels, target):
    table = json.loads((RESULTS / "cuda.json").read_text())["kernels"]
    kernel = itemgetter("program", "kernel")
    of_target = (row for row in table if row["architecture"] == target)
    assert set(map(kernel, kernels)) == set(map(kernel, of_target)), "`make cuda-offline` renews it"


def test_no_spills(kernels):
    spilled = [row for row in kernels if row["spills"] or row["stack"]]
    assert not spilled, spilled


def test_two_blocks_or_more_fit_a_processor(kernels):
    """But for those with a processor's shared memory to themselves, where all registers are one block's."""
    for row in kernels:
        alone = row["kernel"].startswith(("pair_gradients", "bank_scores"))
        assert row["registers"] <= (255 if alone else 128) and row["shared"] <= 48 << 10, row


def test_rows_are_read_or_written_by_16_bytes(kernels):
    """Where one side has 16 bits and the other 32, the wider one is."""
    for row in kernels:
        one_by_one = row["kernel"].endswith(" false>")
        if not one_by_one and row["kernel"] not in SMALL:
            assert row["loads_of_16_bytes"] + row["stores_of_16_bytes"] > 0, row
        if row["program"] in ("sampled_similarity", "unit_pairs") and not one_by_one and row["kernel"] not in SMALL:
            assert row["loads_of_16_bytes"] >= 4, row


if __name__ == "__main__":
    write(machine_code.compiled(ARCHITECTURES, hopper=False))
