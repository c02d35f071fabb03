"""InfoNCE: in both directions as CLIP trains with, and in one direction.

python -m pytest benchmarks/bench_info_nce.py -k goals
"""

import pytest
from harness import CPU_DTYPES, OURS
from problems import CHUNKED, DENSE, FORMS, one_way, two_way


@pytest.mark.parametrize("d", [128, 512])
def bench_goals(race, goal, d):
    n = 8192
    faster = race(two_way, n, d, [*FORMS, "open_clip"], seconds=30, memory=True).times_faster
    case = f"two-way InfoNCE, {n} rows x {d}"
    goal(f"{case}: times faster than open_clip", faster["open_clip"], at_least={128: 3.5, 512: 2.2}[d])
    goal(f"{case}: times faster than chunked torch", faster[CHUNKED], at_least=1)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("d", [128, 512])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def bench_phase(race, phase, d, dtype):
    race(two_way, 8192, d, [OURS, CHUNKED, "dense cross_entropy"], dtype, phase, seconds=10)


@pytest.mark.parametrize("n", [2**p for p in range(8, 15)])
def bench_curve(race, n):
    """Time and memory against n, for the plots."""
    race(two_way, n, 128, [OURS, CHUNKED, *DENSE, "open_clip"], seconds=5, memory=True)


def bench_one_way(race):
    race(one_way, 8192, 128, [*FORMS, "info-nce-pytorch"], seconds=20, memory=True)
