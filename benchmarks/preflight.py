"""What it takes to compare what ranks were given, before each loss over them: over 2, 4 and 8 Gloo ranks of one thread,
beside the bare all-gather of as many bytes and the whole step with and without it.

    .venv/bin/python benchmarks/preflight.py
"""

import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sslkern.distributed import preflight
from sslkern.distributed.collectives import stacked
from sslkern.distributed.preflight import SIZE, compared
from sslkern.functional import nt_xent

RANKS = 2, 4, 8
ROWS, FEATURES = 64, 64  # of each of two views, on each rank
ROUNDS = 200


def one_rank(rank, size, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    z0, z1 = (torch.randn(ROWS, FEATURES, requires_grad=True) for _ in range(2))
    group, arguments = dist.group.WORLD, dict(z0=z0, z1=z1, temperature=0.1, ids=None, reduction="mean", stats=False)
    vector = torch.zeros(SIZE, dtype=torch.int64)

    def step(on):
        preflight(on)
        nt_xent(z0, z1, 0.1, group=group).backward()

    ways = {
        "all-gather": lambda: stacked(vector, group.group_name),
        "preflight": lambda: compared(group, ROWS, "nt_xent", arguments),
        "step with it": lambda: step(True),
        "without": lambda: step(False),
    }
    times = {name: [] for name in ways}
    preflight(True)
    for i in range(ROUNDS + 20):
        for name, call in ways.items():
            preflight(True)
            dist.barrier()
            start = time.perf_counter()
            call()
            if i >= 20:
                times[name].append(time.perf_counter() - start)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        results.put({name: [sorted(of)[len(of) // part] * 1e6 for part in (2, 10)] for name, of in times.items()})


def main():
    print(
        f"microseconds, medians (lower deciles) of {ROUNDS} rounds, {os.cpu_count()} cores;"
        f" NT-Xent of {2 * ROWS} x {FEATURES} on each rank"
    )
    for size in RANKS:
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(one_rank, (size, tempfile.mktemp(), results), nprocs=size)
        of = results.get()
        print(f"{size} ranks: " + ", ".join(f"{name} {a:,.0f} ({b:,.0f})" for name, (a, b) in of.items()), flush=True)


if __name__ == "__main__":
    main()
