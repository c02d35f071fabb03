"""The supervised contrastive loss; n counts rows, of 100 classes.

python -m pytest benchmarks/bench_sup_con.py -k goals
"""

import pytest
from harness import CPU_DTYPES, OURS
from problems import CHUNKED, sup_con

PUBLISHED = "dense SupContrast"


def bench_goals(race, goal):
    n, d = 8192, 128
    faster = race(sup_con, n, d, [OURS, CHUNKED, PUBLISHED], seconds=30, memory=True).times_faster
    case = f"SupCon, {n} rows x {d}, 100 classes"
    goal(f"{case}: times faster than SupContrast", faster[PUBLISHED], at_least=8)
    goal(f"{case}: times faster than chunked torch", faster[CHUNKED], at_least=1)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("n", [256, 2048, 8192])
def bench_sizes(race, n, dtype):
    names = [OURS, CHUNKED, PUBLISHED, f"compiled {PUBLISHED}"]
    names += ["pytorch-metric-learning"] if dtype == "fp32" else []
    race(sup_con, n, 128, names, dtype, seconds=5)
