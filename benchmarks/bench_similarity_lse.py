"""The primitive `similarity_lse` in its four forms, against dense and chunked torch.

python -m pytest benchmarks/bench_similarity_lse.py -k 'frozen and fp32'
"""

import pytest
from baselines import LSE_PROBLEMS
from harness import DTYPES, OURS, add_peak_memory, checked_steps

# In passes of 2 n^2 d flop, forward and backward.
FLOOR_PASSES = {"lse_self": (0.5, 1.5), "lse_rows": (1, 3), "lse_rows_and_columns": (1, 3), "lse_frozen_keys": (2, 0)}


def floor_flops(problem, n: int, d: int, phase: str) -> float:
    forward, backward = FLOOR_PASSES[problem.__name__]
    return {"forward": forward, "backward": backward, "both": forward + backward}[phase] * 2 * n * n * d


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [128, 512])
@pytest.mark.parametrize("n", [512, 4096])
@pytest.mark.parametrize("phase", ["forward", "backward", "both"])
@pytest.mark.parametrize("problem", LSE_PROBLEMS, ids=lambda problem: problem.__name__)
def bench_forms(race, benchmark, problem, phase, n, d, dtype):
    names = [OURS, "chunked torch", "dense logsumexp"]
    steps = checked_steps(problem, n, d, dtype, names, phase)
    case = dict(problem=problem.__name__, n=n, d=d, dtype=dtype, phase=phase)
    race(steps, seconds=2, floor_flops=floor_flops(problem, n, d, phase), **case)
    if (phase, dtype) == ("both", "fp32"):
        add_peak_memory(benchmark, problem, n, d, dtype, names)
