"""The primitive `similarity_topk`: the 200 nearest of 50,000 keys for 10,000 queries, as in kNN evaluation.

python -m pytest benchmarks/bench_similarity_topk.py

Of equal scores torch.topk takes any, similarity_topk the lower index.
"""

from harness import OURS
from problems import CHUNKED, nearest

N, D, COUNT = 10_000, 128, 200


def bench_goals(race, goal):
    """One pass over the pairs, and no more memory than the results take."""
    result = race(nearest, N, D, [OURS, CHUNKED, "dense matmul + topk"], seconds=20, memory=True, count=COUNT)
    case = f"top {COUNT} of {N} x {5 * N} x {D}"
    goal(f"{case}: times faster than dense", result.over_dense(), at_least=2)
    goal(f"{case}: times faster than chunked torch", result.times_faster[CHUNKED], at_least=1)
    results = N * COUNT * 12  # a score and a place
    goal(f"{case}: peak extra memory over the results'", result.peak_bytes[OURS] / results, at_most=2)
