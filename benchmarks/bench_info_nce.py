"""InfoNCE: in both directions as CLIP trains with, and in one direction.

python -m pytest benchmarks/bench_info_nce.py -k goals
"""

import pytest
from baselines import one_way, two_way
from harness import DTYPES, OURS, add_peak_memory, checked_steps

# In passes of 2 n^2 d flop: rows and columns come from the same pass, both gradients from one recomputed S.
FLOOR_PASSES = {"forward": 1.0, "backward": 3.0, "both": 4.0}


def floor_flops(n: int, d: int, phase: str = "both") -> float:
    return FLOOR_PASSES[phase] * 2 * n * n * d


@pytest.mark.parametrize("d", [128, 512])
def bench_goals(race, goal, benchmark, d):
    n = 8192
    steps = checked_steps(two_way, n, d, "fp32")
    result = race(steps, seconds=30, floor_flops=floor_flops(n, d), problem="two_way", n=n, d=d, dtype="fp32")
    add_peak_memory(benchmark, two_way, n, d, "fp32", list(steps))
    case = f"two-way InfoNCE, {n} rows x {d}"
    faster = result.times_faster
    goal(f"{case}: times faster than open_clip", faster["open_clip"], at_least={128: 3.5, 512: 2.2}[d])
    goal(f"{case}: times faster than chunked torch", faster["chunked torch"], at_least=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [128, 512])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def bench_phase(race, phase, d, dtype):
    n = 8192
    steps = checked_steps(two_way, n, d, dtype, [OURS, "chunked torch", "dense cross_entropy"], phase)
    case = dict(problem="two_way", n=n, d=d, dtype=dtype, phase=phase)
    race(steps, seconds=10, floor_flops=floor_flops(n, d, phase), **case)


@pytest.mark.parametrize("n", [2**p for p in range(8, 15)])
def bench_curve(race, benchmark, n):
    """Time and memory against n, for the plots."""
    names = [OURS, "chunked torch", "dense cross_entropy", "dense logsumexp", "open_clip"]
    steps = checked_steps(two_way, n, 128, "fp32", names)
    race(steps, seconds=5, floor_flops=floor_flops(n, 128), problem="two_way", n=n, d=128, dtype="fp32")
    add_peak_memory(benchmark, two_way, n, 128, "fp32", names)


def bench_one_way(race, benchmark):
    n, d = 8192, 128
    steps = checked_steps(one_way, n, d, "fp32")
    race(steps, seconds=20, floor_flops=floor_flops(n, d), problem="one_way", n=n, d=d, dtype="fp32")
    add_peak_memory(benchmark, one_way, n, d, "fp32", list(steps))
