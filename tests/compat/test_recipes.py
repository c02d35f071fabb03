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


@pytest.mark.parametrize("name, theirs", [("mocov2plus_loss_func", moco_v2_plus), ("mocov3_loss_func", moco_v3)])
def test_solo_learn_moco(name, theirs):
    """Rows of any length, which v2 takes as they are; keys that learn have a gradient, as in theirs."""
    batch = drawn(0, torch.float64, (5, 4), (5, 4), (4, 9))
    batch = (*batch[:2], batch[2].detach()) if name.startswith("mocov2") else batch[:2]
    mine = getattr(solo, name)
    for options in ({}, {"temperature": 0.7}):
        same(*(stepped(lambda *batch, of=of, to=options: of(*batch, **to), [batch]) for of in (mine, theirs)))
