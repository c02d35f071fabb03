"""The primitive `similarity_lse` in its four forms, against dense and chunked torch.

python -m pytest benchmarks/bench_similarity_lse.py -k 'frozen and fp32'
"""

import pytest
from harness import CPU_DTYPES, OURS
from problems import CHUNKED, LSE_PROBLEMS


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("d", [128, 512])
@pytest.mark.parametrize("n", [512, 4096])
@pytest.mark.parametrize("phase", ["forward", "backward", "both"])
@pytest.mark.parametrize("problem", LSE_PROBLEMS, ids=lambda problem: problem.__name__)
def bench_forms(race, problem, phase, n, d, dtype):
    memory = (phase, dtype) == ("both", "fp32")
    race(problem, n, d, [OURS, CHUNKED, "dense logsumexp"], dtype, phase, seconds=2, memory=memory)
