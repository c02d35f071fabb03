"""Every loss beside its dense formula and chunked PyTorch, forward + backward: the table of docs/losses.md.

python -m pytest benchmarks/bench_losses.py --benchmark-json=benchmarks/results/<cpu>/losses.json

A loss here is written densely as people write it, with all scores stored, eager and compiled. n counts rows of scores.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from harness import OURS
from problems import (
    CHUNKED,
    Problem,
    gathered_scores,
    memory_bank,
    moco_step,
    nt_xent,
    one_way,
    published_nce,
    siglip,
    sup_con,
    two_way,
    unit,
    views,
)
from problems import TEMPERATURE as T

from sslkern import functional

N, D = 4096, 128
NAMES = (OURS, CHUNKED, "dense", "compiled dense")
LOSSES = {}


def loss(passes: float, n: int = N, m: int | None = None):
    """Enters a problem into the table; passes: how often 2 n m d flop are needed, m the number of columns (n)."""

    def enter(problem):
        LOSSES[problem.__name__] = problem, passes, n, m or n
        return problem

    return enter


def versus(ours, dense, inputs) -> Problem:
    return Problem(inputs, ours, dense={"": dense})


def renamed(problem: Problem, dense: str) -> Problem:
    """A problem of problems.py, whose dense form has a name of its own."""
    if dense in problem.dense:
        return replace(problem, dense={"": problem.dense[dense]})
    return replace(problem, rivals={"dense": problem.rivals[dense]})  # it is not compiled


def dots(a, b):
    return (a * b).sum(-1)


def views_of(n, d, dtype, count=2):
    """count views [n / count, d]; the last axis of what follows is d."""
    pairs = [views(n // count, d, dtype) for _ in range((count + 1) // 2)]
    flat = [x.detach() + 0.1 * i for i, x in enumerate(x for pair in pairs for x in pair)]
    return tuple(x.requires_grad_() for x in flat[:count])


def others(z0, z1):
    """Scores [n, n] of all views, without a sample's own, and of the positives [n]."""
    z0, z1 = unit(z0), unit(z1)
    z = torch.cat((z0, z1))
    own = torch.eye(len(z0), dtype=torch.bool, device=z.device).repeat(2, 2)
    return (z @ z.T / T).masked_fill(own, -math.inf), dots(z0, z1).repeat(2) / T


@loss(passes=2)
def simclr(n, d, dtype):
    return renamed(nt_xent(n, d, dtype), "cross_entropy")


@loss(passes=4)
def clip(n, d, dtype):
    return renamed(two_way(n, d, dtype), "cross_entropy")


@loss(passes=3)
def in_batch(n, d, dtype):
    return renamed(one_way(n, d, dtype), "cross_entropy")


@loss(passes=3)
def sigmoid(n, d, dtype):
    return renamed(siglip(n, d, dtype), "logsigmoid")


@loss(passes=2, n=256, m=65_536)
def moco(n, d, dtype):
    return renamed(moco_step(n, d, dtype), "published MoCo")


@loss(passes=2 * 2)
def moco_v3(n, d, dtype):
    (q0, q1), keys = views_of(2 * n, d, dtype), [x.detach() for x in views_of(2 * n, d, dtype)]

    def dense(q0, q1):
        rows = torch.arange(len(q0))
        scores = [unit(q) @ unit(k).T / T for q, k in zip((q0, q1), reversed(keys), strict=True)]
        return 2 * T * sum(F.cross_entropy(s, rows) for s in scores)

    return versus(lambda q0, q1: functional.moco_v3(q0, q1, *keys, T), dense, (q0, q1))


@loss(passes=2)
def supervised(n, d, dtype):
    return renamed(sup_con(n, d, dtype), "SupContrast")


@loss(passes=2)
def dcl(n, d, dtype):
    def dense(z0, z1):
        negatives, positive = others(z0, z1)
        return (negatives.logsumexp(1) - positive).mean()

    return versus(lambda z0, z1: functional.dcl(z0, z1, T), dense, views_of(n, d, dtype))


@loss(passes=2)
def dclw(n, d, dtype):
    def dense(z0, z1):
        negatives, positive = others(z0, z1)
        w = torch.exp(positive.detach() * T / 0.5)
        return (negatives.logsumexp(1) - (2 - w / w.mean()) * positive).mean()

    return versus(lambda z0, z1: functional.dclw(z0, z1, T, 0.5), dense, views_of(n, d, dtype))


def debiased_dense(z0, z1, beta=None, tau_plus=0.1):
    negatives, positive = others(z0, z1)
    count, negatives, positive = len(negatives) - 2, negatives.exp(), positive.exp()
    if beta is not None:
        importance = negatives**beta
        negatives = importance * negatives / (importance.sum(1, keepdim=True) / count)
    rest = (negatives.sum(1) - tau_plus * count * positive) / (1 - tau_plus)
    return -(positive / (positive + rest.clamp_min(count * math.exp(-1 / T)))).log().mean()


@loss(passes=2)
def debiased(n, d, dtype):
    return versus(lambda z0, z1: functional.debiased(z0, z1, T), debiased_dense, views_of(n, d, dtype))


@loss(passes=3)
def hard_negative(n, d, dtype):
    ours = lambda z0, z1: functional.hard_negative(z0, z1, T, 0.5)  # noqa: E731
    return versus(ours, lambda z0, z1: debiased_dense(z0, z1, 0.5), views_of(n, d, dtype))


@loss(passes=4)
def alignment_uniformity(n, d, dtype):
    def spread(z):
        itself = torch.eye(len(z), dtype=torch.bool)
        return (4 * (z @ z.T) - 4).exp().masked_fill(itself, 0).sum().log() - math.log(len(z) * (len(z) - 1))

    def dense(z0, z1):
        z0, z1 = unit(z0), unit(z1)
        return (z0 - z1).square().sum(1).mean() + (spread(z0) + spread(z1)) / 2

    return versus(functional.alignment_uniformity, dense, views_of(2 * n, d, dtype))


@loss(passes=2)
def four_views(n, d, dtype):
    def dense(*views):
        z = unit(torch.cat(views))
        samples = len(views[0])
        own = torch.eye(samples, dtype=torch.bool).repeat(4, 4)
        s = z @ z.T / T
        negatives = s.masked_fill(own, -math.inf).logsumexp(1, keepdim=True)
        positives = s[own].view(len(z), 4)[~torch.eye(4, dtype=torch.bool).repeat_interleave(samples, 0)]
        return F.softplus(negatives - positives.view(len(z), 3)).mean()

    return versus(lambda *views: functional.nt_xent_multi_view(views, T), dense, views_of(n, d, dtype, 4))


@loss(passes=2 * (32 + 64 + 128) / 128)
def matryoshka(n, d, dtype):
    dims = (d // 4, d // 2, d)

    def dense(z0, z1):
        total = 0
        for width in dims:
            negatives, positive = others(z0[:, :width], z1[:, :width])
            total = total + F.softplus(negatives.logsumexp(1) - positive).mean()
        return total

    ours = functional.matryoshka(lambda z0, z1: functional.nt_xent(z0, z1, T), dims)
    return versus(ours, dense, views_of(n, d, dtype))


@loss(passes=2 * 2 + 2 * 4)
def nnclr(n, d, dtype):
    z0, z1 = (x.detach() for x in views_of(2 * n, d, dtype))
    support = unit(views(4 * n, d, torch.float32)[0].detach()).to(dtype)

    def dense(p0, p1):
        losses = 0
        for z, p in ((z0, p1), (z1, p0)):
            near = support[(unit(z) @ support.T).argmax(1)]
            losses = losses + F.cross_entropy(near @ unit(p).T / T, torch.arange(len(p)))
        return losses / 2

    return versus(lambda p0, p1: functional.nnclr(z0, z1, p0, p1, support, T), dense, views_of(2 * n, d, dtype))


@loss(passes=3, m=2 * N)
def mnrl(n, d, dtype):
    """A hard negative for each anchor; what is closer than the positive by 0.1 is left out."""
    anchor, positive, negative = views_of(3 * n, d, dtype, 3)

    def dense(anchor, positive, negative):
        a, documents = unit(anchor), unit(torch.cat((positive, negative)))
        cosine = a @ documents.T
        limit = dots(a, documents[: len(a)]).detach() + 0.1
        out = (cosine.detach() > limit[:, None]).index_put((torch.arange(len(a)),) * 2, torch.tensor(False))
        return F.cross_entropy((cosine / T).masked_fill(out, -math.inf), torch.arange(len(a)))

    ours = lambda a, p, n: functional.mnrl(a, p, n[:, None], T, margin=0.1)  # noqa: E731
    return versus(ours, dense, (anchor, positive, negative))


@loss(passes=4, n=1024, m=4096)
def mil_nce(n, d, dtype, candidates=4):
    """`candidates` sentences for each clip, negatives both ways."""
    clips, *rest = views_of((1 + candidates) * n, d, dtype, 1 + candidates)
    sentences = torch.stack([x.detach() for x in rest], 1).requires_grad_()

    def dense(clips, sentences):
        s = torch.einsum("id,jpd->ijp", unit(clips), unit(sentences)) / T
        own = torch.eye(len(clips), dtype=torch.bool)
        others = s.masked_fill(own.unsqueeze(2), -math.inf).transpose(0, 1)
        return (torch.cat((s, others), 1).flatten(1).logsumexp(1) - s[own].logsumexp(1)).mean()

    ours = lambda clips, sentences: functional.mil_nce(clips, sentences, T, two_way=True, normalize=True)  # noqa: E731
    return versus(ours, dense, (clips, sentences))


@loss(passes=3 * 4, n=2048)
def cpc(n, d, dtype, steps=4):
    """Sequences of 16 windows; every window of the batch is a candidate for each of 4 steps."""
    time = min(16, n // 2)
    generator = torch.Generator().manual_seed(0)
    context, targets = torch.randn(2, n // time, time, d, generator=generator)
    predictors = torch.randn(steps, d, d, generator=generator) / d
    inputs = tuple(x.to(dtype).requires_grad_() for x in (context, targets, predictors))

    def dense(context, targets, predictors):
        z, total = targets.flatten(0, 1), 0
        places = torch.arange(len(z)).view(targets.shape[:2])
        for k, predictor in enumerate(predictors, 1):
            predicted = (context[:, : time - k] @ predictor.T).flatten(0, 1)
            total = total + F.cross_entropy(predicted @ z.T, places[:, k:].flatten())
        return total / steps

    return versus(functional.cpc, dense, inputs)


def deep_infomax(n, d, dtype, estimator, locations=64):
    """n images, each with `locations` local features."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(n, d, generator=generator)
    local = unit(image.unsqueeze(1) + torch.randn(n, locations, d, generator=generator))
    image = unit(image)

    def dense(image, local):
        t = torch.einsum("id,jld->ijl", image, local) / T
        itself = torch.eye(n, dtype=torch.bool)
        own = t.diagonal().T
        if estimator == "jsd":
            others = F.softplus(t).masked_fill(itself.unsqueeze(-1), 0).sum() / (n * (n - 1) * locations)
            return F.softplus(-own).mean() + others
        negatives = t.masked_fill(itself.unsqueeze(-1), -math.inf)
        if estimator == "dv":
            return negatives.logsumexp((0, 1, 2)) - math.log(n * (n - 1) * locations) - own.mean()
        return F.softplus(negatives.flatten(1).logsumexp(1, keepdim=True) - own).mean()

    ours = lambda image, local: functional.deep_infomax(image, local, estimator, T)  # noqa: E731
    return versus(ours, dense, tuple(x.to(dtype).requires_grad_() for x in (image, local)))


@loss(passes=3, n=256, m=256 * 64)
def deep_infomax_jsd(n, d, dtype):
    return deep_infomax(n, d, dtype, "jsd")


@loss(passes=3, n=256, m=256 * 64)
def deep_infomax_infonce(n, d, dtype):
    return deep_infomax(n, d, dtype, "infonce")


@loss(passes=3, n=256, m=256 * 64)
def deep_infomax_dv(n, d, dtype):
    return deep_infomax(n, d, dtype, "dv")


@loss(passes=2, n=256, m=16_384)
def instance_discrimination(n, d, dtype):
    return renamed(memory_bank(n, d, dtype), "gather + bmm (CMC)")


@loss(passes=2, n=256, m=16_384)
def bank_softmax(n, d, dtype, size=50_000, negatives=16_384):
    generator = torch.Generator().manual_seed(1)
    bank = unit(torch.randn(size, d, generator=generator)).to(dtype)
    index = torch.randint(size, (n, 1 + negatives), generator=generator)

    def dense(q):
        return F.cross_entropy(gathered_scores(unit(q), bank, index) / T, torch.zeros(len(q), dtype=torch.long))

    ours = lambda q: functional.nce(q, bank, index, T, form="softmax")  # noqa: E731
    return versus(ours, dense, views(n, d, dtype)[:1])


@loss(passes=2 * 2, n=256, m=4096)
def cmc(n, d, dtype, size=50_000, negatives=4096):
    """Two views and their banks."""
    generator = torch.Generator().manual_seed(1)
    banks = unit(torch.randn(2, size, d, generator=generator)).to(dtype)
    index = torch.randint(size, (n, 1 + negatives), generator=generator)
    log_z = torch.full((2,), math.log(size) + 1 / (2 * d * T**2))

    def dense(a, b):
        total = 0
        for view, bank in ((a, banks[1]), (b, banks[0])):
            total = total + published_nce(gathered_scores(unit(view), bank, index), size, log_z[0])
        return total

    ours = lambda a, b: functional.cmc((a, b), banks, index, T, log_z=log_z)  # noqa: E731
    return versus(ours, dense, views_of(2 * n, d, dtype))


@pytest.mark.parametrize("name", LOSSES)
def bench_loss(race, name):
    build, passes, n, m = LOSSES[name]
    race(build, n, D, NAMES, seconds=6, floor_flops=passes * 2 * n * m * D, columns=m)
