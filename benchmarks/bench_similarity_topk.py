"""The primitive `similarity_topk`: the 200 nearest of 50,000 keys for 10,000 queries, as in kNN evaluation.

python -m pytest benchmarks/bench_similarity_topk.py

Of equal scores torch.topk takes any, similarity_topk the lower index.
"""

from baselines import nearest
from harness import OURS, add_peak_memory, checked_steps

N, D, COUNT = 10_000, 128, 200


def bench_goals(race, goal, benchmark):
    """One pass over the pairs, and no more memory than the results take."""
    steps = checked_steps(nearest, N, D, "fp32")
    flops = 2 * N * 5 * N * D
    result = race(steps, seconds=20, floor_flops=flops, problem="nearest", n=N, d=D, dtype="fp32", count=COUNT)
    add_peak_memory(benchmark, nearest, N, D, "fp32", list(steps))
    case = f"top {COUNT} of {N} x {5 * N} x {D}"
    goal(f"{case}: times faster than dense", result.over_dense(), at_least=2)
    goal(f"{case}: times faster than chunked torch", result.times_faster["chunked torch"], at_least=1)
    results = N * COUNT * 12  # a score and a place
    peak = benchmark.extra_info["peak_bytes"][OURS]
    goal(f"{case}: peak extra memory over the results'", peak / results, at_most=2)
