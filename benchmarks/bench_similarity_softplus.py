"""The primitive `similarity_softplus` in the loss of SigLIP, against dense and chunked torch and open_clip.

python -m pytest benchmarks/bench_similarity_softplus.py -k goals
"""

import pytest
from harness import CPU_DTYPES, OURS
from problems import CHUNKED, siglip

NAMES = OURS, CHUNKED, "dense logsigmoid", "dense softplus"


def bench_goals(race, goal):
    n, d = 8192, 512
    names = [*NAMES, "compiled dense logsigmoid", "open_clip"]
    faster = race(siglip, n, d, names, seconds=60, memory=True).times_faster
    case = f"SigLIP, {n} rows x {d}"
    goal(f"{case}: times faster than dense logsigmoid", faster["dense logsigmoid"], at_least=2.3)
    goal(f"{case}: times faster than open_clip", faster["open_clip"], at_least=2.3)
    goal(f"{case}: times faster than chunked torch", faster[CHUNKED], at_least=1)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("d", [128, 512])
@pytest.mark.parametrize("n", [512, 4096])
def bench_sizes(race, n, d, dtype):
    race(siglip, n, d, NAMES, dtype, seconds=3)
