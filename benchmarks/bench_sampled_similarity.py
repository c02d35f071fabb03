"""The primitive `sampled_similarity` in NCE with a memory bank: 256 queries, 16,384 negatives each, 128 features.

python -m pytest benchmarks/bench_sampled_similarity.py
"""

import pytest
from harness import OURS
from problems import CHUNKED, memory_bank, memory_bank_large

N, D, K = 256, 128, 16_384
PUBLISHED, PRODUCT = "gather + bmm (CMC)", "dense product"


@pytest.mark.parametrize(
    "problem, others, at_least",
    [(memory_bank, [PRODUCT], 15), (memory_bank_large, [], 4)],  # all scores of the larger bank would take gigabytes
    ids=["50_000 rows", "1_280_000 rows"],
)
def bench_goals(race, goal, problem, others, at_least):
    """Scores and gradient of the named rows; at least a read of them each time, or a product with the bank."""
    result = race(problem, N, D, [OURS, CHUNKED, PUBLISHED, *others], seconds=20, memory=True, negatives=K)
    case = f"NCE, {N} x {K} x {D}, {problem.__name__}"
    goal(f"{case}: times faster than gather + bmm", result.times_faster[PUBLISHED], at_least=at_least)
    share = result.peak_bytes[OURS] / result.peak_bytes[PUBLISHED]
    goal(f"{case}: peak extra memory over gather + bmm's", share, at_most=0.05)


def bench_small_batch(race):
    """Where a product with the whole bank is a serious rival. Not in bf16, which gather + bmm round too much."""
    race(memory_bank, 64, D, [OURS, CHUNKED, PUBLISHED, PRODUCT], seconds=5, negatives=K)
