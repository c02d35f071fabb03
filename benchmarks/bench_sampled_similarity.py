"""The primitive `sampled_similarity` in NCE with a memory bank: 256 queries, 16,384 negatives each, 128 features.

python -m pytest benchmarks/bench_sampled_similarity.py
"""

import pytest
from baselines import memory_bank, memory_bank_large
from harness import OURS, add_peak_memory, checked_steps

N, D, K = 256, 128, 16_384
PUBLISHED = "gather + bmm (CMC)"


@pytest.mark.parametrize(
    "problem, at_least", [(memory_bank, 15), (memory_bank_large, 4)], ids=["50_000 rows", "1_280_000 rows"]
)
def bench_goals(race, goal, benchmark, problem, at_least):
    """Scores and gradient of the named rows; at least a read of them each time, or a product with the bank."""
    steps = checked_steps(problem, N, D, "fp32")
    result = race(steps, seconds=20, problem=problem.__name__, n=N, d=D, dtype="fp32", negatives=K)
    add_peak_memory(benchmark, problem, N, D, "fp32", list(steps))
    case = f"NCE, {N} x {K} x {D}, {problem.__name__}"
    goal(f"{case}: times faster than gather + bmm", result.times_faster[PUBLISHED], at_least=at_least)
    peak = benchmark.extra_info["peak_bytes"]
    goal(f"{case}: peak extra memory over gather + bmm's", peak[OURS] / peak[PUBLISHED], at_most=0.05)


def bench_small_batch(race):
    """Where a product with the whole bank is a serious rival. Not in bf16, which gather + bmm round too much."""
    steps = checked_steps(memory_bank, 64, D, "fp32")
    race(steps, seconds=5, problem="memory_bank", n=64, d=D, dtype="fp32", negatives=K)
