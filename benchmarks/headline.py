"""The figures of the README in two minutes: three rounds in turn, forward + backward in fp32 on two threads.

python benchmarks/headline.py

`bench_nt_xent.py` and `bench_info_nce.py` measure the same, and more, for longer.
"""

import statistics
import time
import warnings

import torch
import torch.nn.functional as F
from baselines import allow_torchvision_import, chunked

from sslkern.functional import info_nce, nt_xent

ROUNDS = 3


def simclr(z0, z1):
    return nt_xent(z0, z1, 0.5)


def simclr_dense(z0, z1):
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    s = (z @ z.t() / 0.5).fill_diagonal_(-torch.inf)
    return F.cross_entropy(s, torch.arange(len(s)).roll(len(z0)))


def clip(x, y):
    return info_nce(x, y, two_way=True, logit_scale=10.0, normalize=False)


def step(loss, inputs):
    def run():
        for x in inputs:
            x.grad = None
        value = loss(*inputs)
        value.backward()
        return value.item()

    return run


def race(title, steps, losses):
    """Prints medians of `steps` run in turn; refuses if one of `losses` is another number than ours."""
    values = {name: steps[name]() for name in losses}
    ours = values["sslkern"]
    assert all(abs(value - ours) < 1e-4 * abs(ours) for value in values.values()), f"{title}: not one loss: {values}"
    seconds = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{title:28} {name:22} {median:7.3f} s   x {median / medians['sslkern']:.2f}", flush=True)


def main():
    torch.set_num_threads(2)
    allow_torchvision_import()
    warnings.filterwarnings("ignore")
    from lightly.loss import NTXentLoss
    from open_clip.loss import ClipLoss

    lightly, open_clip, logit_scale = NTXentLoss(temperature=0.5), ClipLoss(), torch.tensor(10.0)
    for d in (128, 512):
        views = [torch.randn(4096, d, requires_grad=True) for _ in range(2)]
        losses = {"sslkern": simclr, "chunked torch": chunked(simclr), "dense": simclr_dense, "lightly": lightly}
        steps = {name: step(loss, views) for name, loss in losses.items()}
        z, w = torch.randn(8192, d), torch.rand(8192, 8192)
        steps["three bare products"] = lambda z=z, w=w: (z @ z.t(), w @ z, w.t() @ z)
        race(f"NT-Xent, 8192 views x {d}", steps, losses)
        rows = [F.normalize(torch.randn(8192, d), dim=1).requires_grad_() for _ in range(2)]
        losses = {
            "sslkern": clip,
            "chunked torch": chunked(clip),
            "open_clip": lambda x, y: open_clip(x, y, logit_scale),
        }
        race(f"two-way, 8192 rows x {d}", {name: step(loss, rows) for name, loss in losses.items()}, losses)


if __name__ == "__main__":
    main()
