"""The machine code of the kernels for Hopper, by NVRTC, without nvcc and a GPU: registers and what warpgroups give each
other, spills, products (HGMMA) in loops and what would hold them up.

`make cuda-offline` runs it as a script, which writes the table benchmarks/results/offline/hopper.{json,md}.
"""

import json
import struct
from operator import itemgetter

import pytest

from sslkern.backends.cuda import compile, launch

from . import machine_code
from .machine_code import RESULTS, Compiled, Function, count

pytestmark = pytest.mark.slow
REGISTERS, WARPGROUP, MOST_INSTANCES = 65536, 128, 36

# Products of 16 features each in every loop that has some, inner loops first; what a loop holds its outer one does too.
PRODUCTS: dict[str, list[int]] = {
    f"{kernel}<{words}>": loops
    for dtype in compile.HALF_TYPES
    for kernel, words, loops in (
        ("gradient_rows", f"{dtype}, 64", [12]),
        ("gradient_rows", f"{dtype}, 128", [16]),
        ("gradient_rows", f"{dtype}, 256", [20]),
        ("frozen", f"{dtype}, 64", [12]),
        ("frozen", f"{dtype}, 128", [16]),
        ("frozen", f"{dtype}, 256", [20]),
        ("running", dtype, [4, 4, 4]),
        ("forward", f"{dtype}, 64", [8, 16]),
        ("forward", f"{dtype}, 128", [16, 32]),
        ("forward", f"{dtype}, 704", [4] * 17 + [72, 80]),
        ("forward", f"{dtype}, 0", [4, 8, 8]),
        # a chunk before each part of two tiles, both tiles, a block of keys
        ("weights_chunks", dtype, [4] * 17 + [72, 80]),
        ("weights_stream", dtype, [4, 4]),
        ("softplus_rows", dtype, [12]),
        ("softplus_chunks", dtype, [4] * 17 + [72, 80]),
        ("softplus_stream", dtype, [4, 4]),
    )
}


def budgets_of(function: Function) -> list[int]:
    """Registers of a thread, as warpgroups set them."""
    return [int(one.operands.split()[-1], 16) for one in function.instructions if one.name.startswith("USETMAXREG")]


def products_of(function: Function) -> list[int]:
    found = (count(loop, "HGMMA") for loop in function.loops())
    return sorted(products for products in found if products)


def rows_of(measured: list[Compiled]) -> list[dict]:
    rows = {}
    for unit, _, seconds, image, functions in measured:
        for kernel, shown in unit.expressions().items():
            one = functions[kernel]
            rows[unit.program, shown] = {
                "program": unit.program,
                "kernel": shown,
                "threads": one.threads,
                "registers": one.registers,
                "set_to": " ".join(map(str, budgets_of(one))),
                "spills": one.spills + one.stack,
                "shared": one.shared,
                "products_in_loops": " ".join(map(str, products_of(one))),
                "instructions": len(one.instructions),
                "KB": len(image.code) >> 10,
                "seconds": round(seconds, 1),
            }
    return [rows[key] for key in sorted(rows)]


def write(measured: list[Compiled]) -> None:
    words = ["Each instance is compiled by itself. Dynamic shared memory, most of theirs, is not counted."]
    machine_code.write("hopper", "Machine code of the kernels for Hopper", words, rows_of(measured))


@pytest.fixture(scope="module")
def measured() -> list[Compiled]:
    try:
        return machine_code.compiled([compile.HOPPER], hopper=True)
    except machine_code.Missing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def functions(measured) -> dict[str, Function]:
    return {shown: one.functions[kernel] for one in measured for kernel, shown in one.unit.expressions().items()}


def test_few_instances_that_compile_in_less_than_five_seconds_without_a_warning(measured):
    assert len([one for one in measured if one.unit.arguments]) <= MOST_INSTANCES
    for one in measured:
        assert one.seconds < 5 and len(one.image.code) < 400 << 10, (one.unit, one.seconds, len(one.image.code))
        assert not one.image.log, (one.unit, one.image.log)  # spills, products that wait for each other, setmaxnreg


def test_arguments_are_as_the_kernels_expect_them(measured):
    for one in measured:
        for kernel, arguments in compile.PROGRAMS[one.unit.program].kernels.items():
            sizes = [struct.calcsize(layout) for layout in launch.layout_of(arguments)]
            assert one.functions[kernel].arguments == sizes, (one.unit, kernel)


def test_the_table_is_of_these_kernels(measured):
    table, kernel = json.loads((RESULTS / "hopper.json").read_text())["kernels"], itemgetter("program", "kernel")
    assert set(map(kernel, rows_of(measured))) == set(map(kernel, table)), "`make cuda-offline` renews it"


def test_no_spills(functions):
    assert not {shown: one[1:] for shown, one in functions.items() if one.spills or one.stack}


def test_registers_suffice(functions):
    for shown, one in functions.items():
        budgets = budgets_of(one)
        assert one.threads * one.registers <= REGISTERS, shown
        if not budgets:
            assert 2 * one.threads * one.registers <= REGISTERS and one.shared <= 48 << 10, shown
            continue
        fewest, most = min(budgets), max(budgets)
        others = one.threads // WARPGROUP - 1
        assert fewest < one.registers < most and all(n % 8 == 0 for n in budgets), (shown, budgets)
        assert (fewest + others * most) * WARPGROUP <= REGISTERS, (shown, budgets)


def test_products_in_loops(functions):
    found = {shown: products_of(one) for shown, one in functions.items() if products_of(one)}
    assert found == PRODUCTS


def test_no_loop_with_products_waits_for_memory(functions):
    for shown, one in functions.items():
        for loop in one.loops():
            if count(loop, "HGMMA"):
                assert count(loop, "MEMBAR") == count(loop, "FENCE.VIEW.ASYNC"), shown  # both are publish_shared
                assert count(loop, "ERRBAR", "CCTL") == 0, shown


if __name__ == "__main__":
    write(machine_code.compiled([compile.HOPPER], hopper=True))
