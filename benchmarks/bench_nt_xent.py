"""NT-Xent, the loss of SimCLR; n counts views, two per image.

python -m pytest benchmarks/bench_nt_xent.py -k goals
"""

import pytest
from baselines import bare_products, nt_xent
from harness import DTYPES, OURS, add_peak_memory, checked_steps, has_amx, peak_memory

# In passes of 2 n^2 d flop: S is symmetric, so each product is needed for half of it only.
FLOOR_PASSES = {"forward": 0.5, "backward": 1.5, "both": 2.0}


def floor_flops(n: int, d: int, phase: str = "both") -> float:
    return FLOOR_PASSES[phase] * 2 * n * n * d


@pytest.mark.parametrize("d", [128, 512])
def bench_goals(race, goal, benchmark, d):
    n = 8192
    steps = checked_steps(nt_xent, n, d, "fp32")
    steps["three bare products"] = bare_products(n, d, DTYPES["fp32"])
    result = race(steps, seconds=30, floor_flops=floor_flops(n, d), problem="nt_xent", n=n, d=d, dtype="fp32")
    add_peak_memory(benchmark, nt_xent, n, d, "fp32", [name for name in steps if "bare" not in name])
    case = f"NT-Xent, {n} views x {d}"
    share = 1 / result.times_faster["three bare products"]
    goal(f"{case}: share of the three bare products' time", share, at_most={128: 0.80, 512: 0.75}[d])
    faster = result.times_faster
    goal(f"{case}: times faster than chunked torch", faster["chunked torch"], at_least={128: 1.5, 512: 1.35}[d])
    goal(f"{case}: times faster than lightly", faster["lightly"], at_least={128: 10, 512: 4}[d])
    if d == 128:
        goal(f"{case}: times faster than dense", result.over_dense(), at_least=5)


def bench_goals_bf16(race, goal):
    n, d = 8192, 512
    steps = checked_steps(nt_xent, n, d, "bf16")
    steps["sslkern in fp32"] = checked_steps(nt_xent, n, d, "fp32", [OURS])[OURS]
    steps["three bare products"] = bare_products(n, d, DTYPES["bf16"])
    result = race(steps, seconds=30, floor_flops=floor_flops(n, d), problem="nt_xent", n=n, d=d, dtype="bf16")
    if has_amx():
        goal(f"NT-Xent, {n} views x {d}: bf16 over our fp32", result.times_faster["sslkern in fp32"], at_least=2.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [128, 512])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def bench_phase(race, phase, d, dtype):
    n = 8192
    steps = checked_steps(nt_xent, n, d, dtype, [OURS, "chunked torch", "dense cross_entropy"], phase)
    case = dict(problem="nt_xent", n=n, d=d, dtype=dtype, phase=phase)
    race(steps, seconds=10, floor_flops=floor_flops(n, d, phase), **case)


@pytest.mark.parametrize("n", [2**p for p in range(8, 16)])
def bench_curve(race, benchmark, n):
    """Time and memory against n, for the plots; each rival as far as its memory goes."""
    names = [OURS, "chunked torch"]
    names += ["dense cross_entropy", "dense logsumexp"] if n <= 16384 else []
    names += ["lightly"] if n <= 8192 else []
    names += ["pytorch-metric-learning"] if n <= 256 else []
    steps = checked_steps(nt_xent, n, 128, "fp32", names)
    race(steps, seconds=5, floor_flops=floor_flops(n, 128), problem="nt_xent", n=n, d=128, dtype="fp32")
    add_peak_memory(benchmark, nt_xent, n, 128, "fp32", names)


@pytest.mark.parametrize("threads", [1, 2, 8])
def bench_goals_memory(goal, benchmark, threads):
    """Features of 131,072 views and nothing near their similarity matrix, which would take 64 GiB."""
    n, d = 131_072, 128
    peak = benchmark.pedantic(peak_memory, (nt_xent, OURS, n, d, "fp32", threads))
    benchmark.extra_info |= {"problem": "nt_xent", "n": n, "d": d, "dtype": "fp32", "peak_bytes": {OURS: peak}}
    case = f"NT-Xent, {n} views x {d}, {threads} threads"
    goal(f"{case}: peak extra memory over the input's size", peak / (n * d * 4), at_most=4)
