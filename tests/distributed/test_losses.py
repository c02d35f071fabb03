"""Every loss over ranks: that of one process with all rows."""

import torch

from sslkern import functional

from .agreement import COUNTS, Problem, agrees
from .combinations import combinations

SHARING = dict(
    ranks=[1, 2, 3, 5, 8], rows=list(COUNTS), strategy=["all_gather", "ring", "auto"], grad_reduce=["mean", "sum"]
)
OPTIONS = {
    "plain": {},
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "stats": dict(stats=True),
    "smooth": dict(label_smoothing=0.1, reduction="none"),
    "smooth, ids": dict(label_smoothing=0.1),
    "frozen": dict(frozen=("z1", "key", "text")),
    "raw": dict(normalize=False),
}


def draw(N, *shape):
    return torch.randn(N, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(N * 7 + len(shape)))


def of_pairs(N, name, extra, options):
    """A loss of two rows a sample, with ids, weights and a learned scale where `extra` says so."""
    x, y = draw(N, 2, 6).unbind(1)
    loss = getattr(functional, name)
    names = dict(nt_xent=("z0", "z1"), clip=("image", "text")).get(name, ("query", "key"))
    sharded, replicated = dict(zip(names, (x, y), strict=True)), {}
    options = dict(OPTIONS[options])
    if "ids" in extra or options == OPTIONS["smooth, ids"]:
        sharded["ids"] = torch.arange(N) * 2 // 3
    if "weights" in extra:
        sharded["weights"] = draw(N).abs()
    if "two_way" in extra:
        options["two_way"] = True
    if "negatives" in extra or "bank" in extra:
        replicated["negatives"] = draw(5, 6)
        options["in_batch"] = "bank" not in extra
    if "own" in extra:
        sharded["negatives"] = draw(N, 3, 6)
        options["in_batch"] = True
    if "learned" in extra or name == "clip":
        replicated["logit_scale"] = torch.tensor(3.0)
    else:
        options["temperature"] = 0.3
    return Problem(loss, sharded, replicated, options, 2 if name == "nt_xent" else 1)


@combinations(extra=["", "ids", "weights", "ids, learned"], options=list(OPTIONS), **SHARING)
def test_nt_xent(pool, extra, options, ranks, rows, strategy, grad_reduce):
    agrees(
        pool,
        of_pairs,
        "nt_xent",
        extra,
        options,
        counts=COUNTS[rows][ranks],
        strategy=strategy,
        grad_reduce=grad_reduce,
    )


@combinations(
    extra=["", "ids", "weights", "learned", "two_way", "negatives, ids", "bank, learned", "own"],
    options=list(OPTIONS),
    **SHARING,
)
def test_info_nce(pool, extra, options, ranks, rows, strategy, grad_reduce):
    counts = COUNTS[rows][ranks]
    agrees(pool, of_pairs, "info_nce", extra, options, counts=counts, strategy=strategy, grad_reduce=grad_reduce)


@combinations(extra=["", "ids", "weights"], options=list(OPTIONS), **SHARING)
def test_clip(pool, extra, options, ranks, rows, strategy, grad_reduce):
    counts = COUNTS[rows][ranks]
    agrees(pool, of_pairs, "clip", extra, options, counts=counts, strategy=strategy, grad_reduce=grad_reduce)
