"""The primitive `similarity_softplus` in the loss of SigLIP, against dense and chunked torch and open_clip.

python -m pytest benchmarks/bench_similarity_softplus.py -k goals
"""

import pytest
from baselines import siglip
from harness import DTYPES, OURS, add_peak_memory, checked_steps


def floor_flops(n: int, d: int) -> float:
    return 3 * 2 * n * n * d  # S and both gradients, all in the forward


def bench_goals(race, goal, benchmark):
    n, d = 8192, 512
    steps = checked_steps(siglip, n, d, "fp32")
    result = race(steps, seconds=60, floor_flops=floor_flops(n, d), problem="siglip", n=n, d=d, dtype="fp32")
    add_peak_memory(benchmark, siglip, n, d, "fp32", list(steps))
    case = f"SigLIP, {n} rows x {d}"
    faster = result.times_faster
    goal(f"{case}: times faster than dense logsigmoid", faster["dense logsigmoid"], at_least=2.3)
    goal(f"{case}: times faster than open_clip", faster["open_clip"], at_least=2.3)
    goal(f"{case}: times faster than chunked torch", faster["chunked torch"], at_least=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [128, 512])
@pytest.mark.parametrize("n", [512, 4096])
def bench_sizes(race, n, d, dtype):
    steps = checked_steps(siglip, n, d, dtype, [OURS, "chunked torch", "dense logsigmoid", "dense softplus"])
    race(steps, seconds=3, floor_flops=floor_flops(n, d), problem="siglip", n=n, d=d, dtype=dtype)
