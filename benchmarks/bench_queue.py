"""The queue of MoCo: a whole training step of the loss, and the write into the ring alone.

python -m pytest benchmarks/bench_queue.py
"""

import pytest
import torch
from harness import CPU_DTYPES, DTYPES, OURS
from problems import CHUNKED, moco_step

from sslkern import ops

BATCH, SIZE, D = 256, 65536, 128
PUBLISHED = "published MoCo"


def bench_goals(race, goal):
    """The keys are frozen: S and the gradient of the queries, two passes over the queue."""
    result = race(moco_step, BATCH, D, [OURS, CHUNKED, PUBLISHED], seconds=20, memory=True, size=SIZE)
    case = f"MoCo step, {BATCH} x {SIZE} x {D}"
    goal(f"{case}: times faster than the published one", result.times_faster[PUBLISHED], at_least=3)
    share = result.peak_bytes[OURS] / (BATCH * SIZE * 4)
    goal(f"{case}: peak extra memory over an N x K tensor's", share, at_most=0.5)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
def bench_push(timed, dtype):
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
    timed(steps, seconds=2, problem="queue_push", n=BATCH, d=D, dtype=dtype, size=SIZE)
