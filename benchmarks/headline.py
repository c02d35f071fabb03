"""The figures of the README in two minutes: three rounds in turn, forward + backward in fp32 on two threads.

python benchmarks/headline.py

`bench_nt_xent.py` and `bench_info_nce.py` measure the same, and more, for longer.
"""

import warnings

import torch
from harness import OURS, checked_steps, medians, run_in_turn, times_faster
from problems import CHUNKED, bare_products, nt_xent, two_way

DENSE = "dense cross_entropy"


def race(title: str, steps: dict) -> None:
    times = run_in_turn(steps, 0, calls=1)  # for no time: as few rounds as there may be
    ratios = {OURS: 1.0} | times_faster(times)
    for name, median in medians(times).items():
        print(f"{title:28} {name:22} {median:7.3f} s   x {ratios[name]:.2f}", flush=True)


def main() -> None:
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore")
    n = 8192
    for d in (128, 512):
        _, steps = checked_steps(nt_xent, n, d, "fp32", [OURS, CHUNKED, DENSE, "lightly"])
        race(f"NT-Xent, {n} views x {d}", steps | {"three bare products": bare_products(n, d, torch.float32)})
        _, steps = checked_steps(two_way, n, d, "fp32", [OURS, CHUNKED, "open_clip"])
        race(f"two-way, {n} rows x {d}", steps)


if __name__ == "__main__":
    main()
