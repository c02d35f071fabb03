"""The lines of docs/recipes.md, as they stand there, against the formulas they are to have."""

import math

import pytest
import torch
import torch.nn.functional as F

import sslkern

from . import pages
from .agreement import drawn, same, stepped

# ---- solo-learn ------------------------------------------------------------------------------------------------------


solo = pages.run("recipes.md", "solo-learn")


def simclr(z, indexes, temperature=0.1):
    """Minus the logarithm of the share that the positives of a row have of all its pairs."""
    z = F.normalize(z, dim=-1)
    scores = (z @ z.t() / temperature).exp() * (1 - torch.eye(len(z)).to(z))
    positive = (scores * (indexes[:, None] == indexes)).sum(1)
    return -(positive / scores.sum(1)).log().mean()


def moco_v2_plus(query, key, queue, temperature=0.1):
    scores = torch.cat(((query * key).sum(1, keepdim=True), query @ queue), 1) / temperature
    return F.cross_entropy(scores, torch.zeros(len(query), dtype=torch.long))


def moco_v3(query, key, temperature=0.2):
    scores = F.normalize(query, dim=1) @ F.normalize(key, dim=1).t() / temperature
    return 2 * temperature * F.cross_entropy(scores, torch.arange(len(query)))


@pytest.mark.parametrize("indexes", [[0, 1, 2] * 2, [0, 1, 2] * 4, [5, 5, 5, 7, 7, -1, -1], [3, 3]], ids=str)
def test_solo_learn_simclr(indexes):
    """Of two views, of more, of labels, and of one sample, which has no negatives."""
    (z,), indexes = drawn(0, torch.float64, (len(indexes), 4)), torch.tensor(indexes)
    mine = solo.simclr_loss_func
    for options in ({}, {"temperature": 0.5}):
        same(*(stepped(lambda *batch, of=of, to=options: of(*batch, **to), [(z, indexes)]) for of in (mine, simclr)))
    if len(indexes) == 6:
        same([mine(z, indexes).detach()], [sslkern.functional.nt_xent(*z.chunk(2), 0.1).detach()])


def test_solo_learn_simclr_of_a_sample_without_a_positive_is_infinite():
    (z,), indexes = drawn(0, torch.float64, (3, 4)), torch.tensor([0, 0, 1])
    assert solo.simclr_loss_func(z, indexes) == simclr(z, indexes) == math.inf


def test_solo_learn_simclr_does_not_overflow():
    (z,), indexes = drawn(0, torch.float32, (6, 4)), torch.arange(3).repeat(2)
    value, gradient = stepped(lambda *batch: solo.simclr_loss_func(*batch, 0.005), [(z, indexes)])
    assert value.isfinite() and gradient.isfinite().all()
    assert not simclr(torch.cat((z[:3], z[:3])), indexes, 0.005).isfinite()  # as it has exp(1 / 0.005)


def nnclr(nn, p, temperature=0.1):
    return moco_v3(nn, p, temperature) / (2 * temperature)


@pytest.mark.parametrize("name, theirs", [("mocov2plus", moco_v2_plus), ("mocov3", moco_v3), ("nnclr", nnclr)])
def test_solo_learn_moco_and_nnclr(name, theirs):
    """Rows of any length, which MoCo v2 takes as they are; keys that learn have a gradient, as in theirs."""
    batch = drawn(0, torch.float64, (5, 4), (5, 4), (4, 9))
    batch = (*batch[:2], batch[2].detach()) if name == "mocov2plus" else batch[:2]
    mine = getattr(solo, f"{name}_loss_func")
    for options in ({}, {"temperature": 0.7}):
        same(*(stepped(lambda *batch, of=of, to=options: of(*batch, **to), [batch]) for of in (mine, theirs)))


# ---- CMC -------------------------------------------------------------------------------------------------------------


class Memories:
    """What NCEAverage keeps and returns, and its criteria: the scores of the named rows, gathered; then rows move."""

    def __init__(self, state, use_softmax):
        (_, self.T, *z, self.momentum), self.use_softmax = state["params"].tolist(), use_softmax
        self.rows, self.z = [state["memory_l"].clone(), state["memory_ab"].clone()], z

    def __call__(self, views, y, idx, eps=0.0):
        total, noise = 0, (idx.shape[1] - 1) / len(self.rows[0])
        for i, (view, rows) in enumerate(zip(views, reversed(self.rows), strict=True)):
            scores = (rows[idx] * view[:, None]).sum(2) / self.T
            if self.use_softmax:
                total = total + F.cross_entropy(scores, torch.zeros_like(y))
                continue
            if self.z[i] < 0:
                self.z[i] = scores.exp().mean().item() * len(rows)
            p = scores.exp() / self.z[i]
            right = torch.cat((p[:, :1] / (p[:, :1] + noise + eps), noise / (p[:, 1:] + noise + eps)), 1)
            total = total - right.log().sum(1).mean()
        for rows, view in zip(self.rows, views, strict=True):
            rows[y] = F.normalize(self.momentum * rows[y] + (1 - self.momentum) * view.detach(), dim=1)
        return total


@pytest.mark.parametrize("use_softmax", [True, False])
@pytest.mark.parametrize("started", [False, True])
def test_cmc(use_softmax, started):
    """Five steps from a checkpoint: losses, gradients, memories. Some negatives are the sample's own row."""
    size, D, K = 30, 5, 12
    torch.manual_seed(0)
    recipe = pages.run("recipes.md", "CMC")
    z = [60.0, 45.0] if started and not use_softmax else [-1.0, -1.0]
    state = dict(params=torch.tensor([K, 0.25, *z, 0.5]).double())
    state |= {name: torch.rand(size, D).double() - 0.5 for name in ("memory_l", "memory_ab")}
    theirs, ours = Memories(state, use_softmax), recipe.contrast_of(D, size, K, 0.25, 0.5, use_softmax).double()
    recipe.load_contrast(ours, state)
    for seed in range(5):
        views, idx = drawn(seed, torch.float64, (4, D), (4, D)), torch.randint(size, (4, 1 + K))
        y = torch.randperm(size)[:4]
        idx[:, 0], idx[0, 3] = y, y[0]
        unit = [F.normalize(x, dim=1) for x in views]
        losses = ours(unit, y, index=idx), theirs(unit, y, idx)
        same(*([x.detach(), *torch.autograd.grad(x, views, retain_graph=True)] for x in losses))
        same([memory.bank for memory in ours.memories], theirs.rows)


def test_cmc_is_near_the_criterion_with_its_1e_7():
    state = dict(params=torch.tensor([9, 0.25, 60.0, 45.0, 0.5]).double())
    state |= {name: F.normalize(torch.randn(30, 5).double()) for name in ("memory_l", "memory_ab")}
    recipe = pages.run("recipes.md", "CMC")
    ours = recipe.contrast_of(5, 30, 9, 0.25, use_softmax=False).double()
    recipe.load_contrast(ours, state)
    views, idx = [F.normalize(x) for x in torch.randn(2, 4, 5).double()], torch.randint(30, (4, 10))
    theirs = Memories(state, use_softmax=False)(views, idx[:, 0], idx, eps=1e-7)
    assert 0 < abs(ours(views, idx[:, 0], index=idx) / theirs - 1) < 1e-5


def test_cmc_draws_negatives_and_keeps_its_memories_in_evaluation():
    contrast = pages.run("recipes.md", "CMC").contrast_of(5, 30, 12)
    views, y = [F.normalize(x) for x in torch.randn(2, 4, 5)], torch.arange(4)
    before = contrast.memories[0].bank.clone()
    assert contrast.eval()(views, y).isfinite() and torch.equal(contrast.memories[0].bank, before)
    assert contrast.train()(views, y).isfinite() and not torch.equal(contrast.memories[0].bank[:4], before[:4])
