"""The table of sizes at which nobody may be worse off with us than with the fastest dense form.

python -m pytest benchmarks/bench_never_worse.py -k 'nt_xent and fp32 and eager'
"""

import functools

import pytest
from harness import CPU, CPU_DTYPES, OURS, checked_steps
from problems import DENSE, all_compiled, nt_xent, one_way, two_way

LARGE = 2048  # from here on the dense forms differ little, and only the one that is faster at this size runs


@functools.cache
def faster_dense_form(build, d: int, dtype: str) -> list[str]:
    _, steps = checked_steps(build, LARGE, d, dtype, [OURS, *DENSE])
    return [min(DENSE, key=lambda name: min(CPU.seconds_per_call(steps[name]) for _ in range(3)))]


@pytest.mark.parametrize("n", [2**p for p in range(5, 15)])
@pytest.mark.parametrize("d", [32, 64, 128, 512, 1024])
@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("problem", [nt_xent, two_way, one_way], ids=lambda problem: problem.__name__)
def bench_never_worse(race, goal, problem, mode, dtype, d, n):
    build = all_compiled(problem) if mode == "compiled" else problem
    dense = DENSE if n <= LARGE else faster_dense_form(build, d, dtype)
    result = race(build, n, d, [OURS, *dense], dtype, seconds=1.5, mode=mode)
    goal(f"{problem.__name__} {n} x {d}, {dtype}, {mode}: time over dense's", 1 / result.over_dense(), at_most=1.05)
