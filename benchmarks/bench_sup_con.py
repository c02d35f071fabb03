"""The supervised contrastive loss; n counts rows, of 100 classes.

python -m pytest benchmarks/bench_sup_con.py -k goals
"""

import pytest
from baselines import sup_con
from harness import DTYPES, OURS, add_peak_memory, checked_steps


def floor_flops(n: int, d: int) -> float:
    """As NT-Xent: half a pass of 2 n^2 d flop forward, one and a half backward; the positives are a sum per class."""
    return 2 * 2 * n * n * d


def bench_goals(race, goal, benchmark):
    n, d = 8192, 128
    steps = checked_steps(sup_con, n, d, "fp32", [OURS, "chunked torch", "SupContrast"])
    result = race(steps, seconds=30, floor_flops=floor_flops(n, d), problem="sup_con", n=n, d=d, dtype="fp32")
    add_peak_memory(benchmark, sup_con, n, d, "fp32", list(steps))
    case = f"SupCon, {n} rows x {d}, 100 classes"
    goal(f"{case}: times faster than SupContrast", result.times_faster["SupContrast"], at_least=8)
    goal(f"{case}: times faster than chunked torch", result.times_faster["chunked torch"], at_least=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [256, 2048, 8192])
def bench_sizes(race, n, dtype):
    steps = checked_steps(sup_con, n, 128, dtype)
    race(steps, seconds=5, floor_flops=floor_flops(n, 128), problem="sup_con", n=n, d=128, dtype=dtype)
