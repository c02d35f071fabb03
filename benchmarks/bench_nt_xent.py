"""NT-Xent, the loss of SimCLR; n counts views, two per image.

python -m pytest benchmarks/bench_nt_xent.py -k goals
"""

import pytest
from harness import CPU_DTYPES, DTYPES, OURS, checked_steps, has_amx, peak_memory
from problems import CHUNKED, DENSE, FORMS, bare_products, nt_xent

BARE = "three bare products"


@pytest.mark.parametrize("d", [128, 512])
def bench_goals(race, goal, d):
    n = 8192
    beside = {BARE: bare_products(n, d, DTYPES["fp32"])}
    result = race(nt_xent, n, d, [*FORMS, "lightly"], seconds=30, beside=beside, memory=True)
    case, faster = f"NT-Xent, {n} views x {d}", result.times_faster
    goal(f"{case}: share of the three bare products' time", 1 / faster[BARE], at_most={128: 0.80, 512: 0.75}[d])
    goal(f"{case}: times faster than chunked torch", faster[CHUNKED], at_least={128: 1.5, 512: 1.35}[d])
    goal(f"{case}: times faster than lightly", faster["lightly"], at_least={128: 10, 512: 4}[d])
    if d == 128:
        goal(f"{case}: times faster than dense", result.over_dense(), at_least=5)


def bench_goals_bf16(race, goal):
    n, d = 8192, 512
    _, in_fp32 = checked_steps(nt_xent, n, d, "fp32", [OURS])
    beside = {"sslkern in fp32": in_fp32[OURS], BARE: bare_products(n, d, DTYPES["bf16"])}
    result = race(nt_xent, n, d, FORMS, "bf16", seconds=30, beside=beside)
    if has_amx():
        goal(f"NT-Xent, {n} views x {d}: bf16 over our fp32", result.times_faster["sslkern in fp32"], at_least=2.5)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("d", [128, 512])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def bench_phase(race, phase, d, dtype):
    race(nt_xent, 8192, d, [OURS, CHUNKED, "dense cross_entropy"], dtype, phase, seconds=10)


@pytest.mark.parametrize("n", [2**p for p in range(8, 16)])
def bench_curve(race, n):
    """Time and memory against n, for the plots; each rival as far as its memory goes."""
    names = [OURS, CHUNKED]
    names += DENSE if n <= 16384 else []
    names += ["lightly"] if n <= 8192 else []
    race(nt_xent, n, 128, [*names, "pytorch-metric-learning"], seconds=5, memory=True)


@pytest.mark.parametrize("threads", [1, 2, 8])
def bench_goals_memory(goal, benchmark, threads):
    """Features of 131,072 views and nothing near their similarity matrix, which would take 64 GiB."""
    n, d = 131_072, 128
    peak = benchmark.pedantic(peak_memory, (nt_xent, OURS, n, d, "fp32", threads))
    benchmark.extra_info |= {"problem": "nt_xent", "n": n, "d": d, "dtype": "fp32", "peak_bytes": {OURS: peak}}
    case = f"NT-Xent, {n} views x {d}, {threads} threads"
    goal(f"{case}: peak extra memory over the input's size", peak / (n * d * 4), at_most=4)
