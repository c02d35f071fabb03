"""Losses of libraries over 3 Gloo ranks, beside one process with all rows: is the loss that of all rows, and what is
the gradient that DDP, which averages, makes of it? And what does a rank receive, and hold?

    make bench-setup && .venv/bin/python -m pip install sentence-transformers
    git clone https://github.com/luyug/GradCache /tmp/GradCache && export PYTHONPATH=/tmp/GradCache/src
    .venv/bin/python benchmarks/gradients_over_ranks.py
"""

import ctypes
import importlib
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from harness import extra_bytes  # noqa: E402
from problems import allow_torchvision_import  # noqa: E402

import sslkern  # noqa: E402
from sslkern.functional import clip, info_nce, nt_xent  # noqa: E402

RANKS, ROWS, FEATURES = 3, 16, 8
LARGE = 1024, 256  # rows of a rank and features, for bytes and memory


def lightly(x, y, scale):
    return importlib.import_module("lightly.loss").NTXentLoss(0.25, gather_distributed=True)(x, y)


def open_clip(local_loss, gather_with_grad):
    def loss(x, y, scale):
        place = dict(rank=dist.get_rank(), world_size=dist.get_world_size())
        of = importlib.import_module("open_clip.loss").ClipLoss(local_loss, gather_with_grad, **place)
        return of(*(torch.nn.functional.normalize(z, dim=1) for z in (x, y)), scale)

    return loss


def sentence_transformers(x, y, scale):
    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    of = losses.MultipleNegativesRankingLoss(None, scale=4.0, gather_across_devices=True)
    return of.compute_loss_from_embeddings([x, y], None)


def grad_cache(x, y, scale):
    of = importlib.import_module("grad_cache.loss").DistributedContrastiveLoss()
    x, y = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
    return of(scale * x, y)


def ours(loss, **options):
    def over_ranks(x, y, scale):
        return loss(x, y, logit_scale=scale, group="world", **options)

    return over_ranks


# The loss of one process, and those that are to be it.
LOSSES = {
    "NT-Xent": (
        nt_xent,
        {
            "sslkern, all_gather": ours(nt_xent, strategy="all_gather"),
            "sslkern, ring": ours(nt_xent, strategy="ring"),
            "lightly, gather_distributed": lightly,
        },
    ),
    "CLIP": (
        clip,
        {
            "sslkern, all_gather": ours(clip, strategy="all_gather"),
            "sslkern, ring": ours(clip, strategy="ring"),
            "open_clip": open_clip(False, False),
            "open_clip, gather_with_grad": open_clip(False, True),
            "open_clip, local_loss": open_clip(True, False),
            "open_clip, local_loss, gather_with_grad": open_clip(True, True),
        },
    ),
    "one way": (
        info_nce,
        {
            "sslkern, all_gather": ours(info_nce, strategy="all_gather"),
            "sslkern, ring": ours(info_nce, strategy="ring"),
            "sentence-transformers, gather_across_devices": sentence_transformers,
            "GradCache, DistributedContrastiveLoss": grad_cache,
        },
    ),
}


class Received(TorchDispatchMode):
    """Bytes that a rank receives through torch.distributed, where each collective moves as little as it can."""

    def __init__(self):
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name, out = function._opname, tensors(args[0])
            share = (RANKS - 1) / RANKS * (2 if name.startswith("allreduce") else 1)
            self.bytes += (1 if name.startswith("recv") else share) * sum(x.numel() * x.element_size() for x in out)
        return function(*args, **(kwargs or {}))


def tensors(x):
    """Those in nested lists."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [z for y in x if isinstance(y, (list, tuple, torch.Tensor)) for z in tensors(y)]


def features(rows, width, dtype):
    return torch.randn(2, RANKS * rows, width, dtype=dtype, generator=torch.Generator().manual_seed(0))


def one_rank(rank, path, results):
    torch.set_num_threads(1)
    allow_torchvision_import()
    dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=RANKS)
    for name, (alone, others) in LOSSES.items():
        for who, loss in others.items():
            found = [None] * RANKS
            dist.all_gather_object(found, (*of_rank(rank, alone, loss), *cost(rank, who, loss)))
            if rank == 0:
                results.put((name, who, found))


def of_rank(rank, alone, loss):
    """The loss over that of one process; and of the gradient of features, and of the scale, after DDP's average: what
    it is over that of one process, and how far it is from that multiple."""
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    want = [*features(ROWS, FEATURES, torch.float64), torch.tensor(4.0, dtype=torch.float64)]
    leaves = [x.clone().requires_grad_() for x in (want[0][rows], want[1][rows], want[2])]
    want = [x.requires_grad_() for x in want]
    with sslkern.use_backend("reference"):
        exact = alone(want[0], want[1], logit_scale=want[2], group="self")
        value = loss(*leaves)
    of_all = torch.autograd.grad(exact, want)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    got, of_rows = torch.stack(grads[:2]) / RANKS, torch.stack(of_all[:2])[:, rows]
    ratio = (got * of_rows).sum() / (of_rows * of_rows).sum()
    off = (got - ratio * of_rows).norm() / of_rows.norm()
    of_scale = None if grads[2] is None else (grads[2] / RANKS / of_all[2]).item()
    return (value / exact).item(), ratio.item(), off.item(), of_scale


def cost(rank, who, loss):
    """Bytes that this rank receives, and the most that it holds beside the features and their gradients."""
    rows, width = LARGE
    x, y = features(rows, width, torch.float32)[:, rank * rows : (rank + 1) * rows].clone()
    x, y = x.requires_grad_(), y.requires_grad_()
    scale = torch.tensor(4.0, requires_grad=True)
    if who.startswith("sslkern"):
        with sslkern.distributed.recorded() as received:
            loss(x, y, scale).backward()
        moved = received.received
    else:
        with Received() as received:
            loss(x, y, scale).backward()
        moved = received.bytes
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed is given back
    return moved, extra_bytes(lambda: loss(x, y, scale).backward())


def shown(values) -> str:
    """One number, or that of each rank where they differ."""
    values = [f"{x:.3f}" for x in values]
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def main():
    results = mp.get_context("spawn").SimpleQueue()
    ranks = mp.spawn(one_rank, (tempfile.mktemp(), results), nprocs=RANKS, join=False)
    print("| loss | by | loss | gradient of features | off by | of the scale | MB received | MB held |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, (_, others) in LOSSES.items():
        for _ in others:
            _, who, found = results.get()
            value, ratio, off, scale, moved, held = zip(*found, strict=True)
            scale = "" if None in scale else f"{sum(scale):.3f}"
            numbers = [f"{max(off):.0e}", scale, f"{max(moved) / 1e6:.2f}", f"{max(held) / 1e6:.1f}"]
            print("|", " | ".join([name, who, shown(value), shown(ratio), *numbers]), "|", flush=True)
    ranks.join()


if __name__ == "__main__":
    main()
