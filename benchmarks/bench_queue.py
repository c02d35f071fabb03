"""The queue of MoCo: a whole training step of the loss, and the write into the ring alone.

python -m pytest benchmarks/bench_queue.py
"""

import pytest
import torch
from baselines import moco_step
from harness import DTYPES, OURS, add_peak_memory, checked_steps

from sslkern import ops

BATCH, SIZE, D = 256, 65536, 128


def bench_goals(race, goal, benchmark):
    """The keys are frozen: S and the gradient of the queries, two passes over the queue."""
    steps = checked_steps(moco_step, BATCH, D, "fp32")
    flops = 2 * 2 * BATCH * SIZE * D
    result = race(steps, seconds=20, floor_flops=flops, problem="moco_step", n=BATCH, d=D, dtype="fp32", size=SIZE)
    add_peak_memory(benchmark, moco_step, BATCH, D, "fp32", list(steps))
    case = f"MoCo step, {BATCH} x {SIZE} x {D}"
    faster = result.times_faster["published MoCo"]
    goal(f"{case}: times faster than the published one", faster, at_least=3)
    peak = benchmark.extra_info["peak_bytes"][OURS]
    goal(f"{case}: peak extra memory over an N x K tensor's", peak / (BATCH * SIZE * 4), at_most=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_push(race, dtype):
    """The write of one batch alone; the published code writes a slice of a queue laid out as (D, K)."""
    keys = torch.randn(BATCH, D).to(DTYPES[dtype])
    ring, ptr = torch.zeros(SIZE, D, dtype=DTYPES[dtype]), torch.zeros(1, dtype=torch.long)
    slices, position = torch.zeros(D, SIZE, dtype=DTYPES[dtype]), 0

    def write_slice():
        nonlocal position
        slices[:, position : position + BATCH] = keys.T
        position = (position + BATCH) % SIZE

    steps = {OURS: lambda: ops.queue_push_(ring, ptr, keys), "slice of (D, K)": write_slice}
    for step in steps.values():
        step()
    assert torch.equal(ring, slices.T) and ptr.item() == position, "queue_push_ wrote something else than the slices"
    race(steps, seconds=2, problem="queue_push", n=BATCH, d=D, dtype=dtype, size=SIZE)
