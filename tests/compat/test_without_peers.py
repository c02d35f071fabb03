"""What stand-ins that import no package compute, beside the formula, for where the packages are not installed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslkern.compat import grad_cache, info_nce

from ..functional.agreement import compiles
from .agreement import drawn, same


def results(value, leaves):
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves, retain_graph=True)]


# ---- info_nce --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("kind, sizes", [("unpaired", []), ("unpaired", [(7, 4)]), ("paired", [(6, 3, 4)])])
def test_info_nce(kind, sizes, small, monkeypatch):
    for name in ("FEW_PRODUCTS", "FEW_SCORES", "FEW_FEATURES"):
        monkeypatch.setattr(info_nce, name, 2**20 if small else -1)
    batch = drawn(0, torch.float64, (6, 4), (6, 4), *sizes)
    query, key, *negatives = (F.normalize(x, dim=-1) for x in batch)
    positive = torch.einsum("nd,nd->n", query, key).exp().pow(5)  # of temperature 0.2
    if negatives:
        scores = torch.einsum("nd,nmd->nm", query, negatives[0].expand(6, -1, 4)).exp().pow(5)
    else:
        scores = torch.einsum("nd,md->nm", query, key).exp().pow(5) * (1 - torch.eye(6))
    losses = -(positive / (positive + scores.sum(1))).log()
    for reduction, want in (("none", losses), ("sum", losses.sum()), ("mean", losses.mean())):
        got = info_nce.InfoNCE(0.2, reduction, kind)(*batch)
        same(results(got, batch), results(want, batch))


# ---- grad_cache ------------------------------------------------------------------------------------------------------


def contrasted(x, y, targets, reduction="mean"):
    scores = torch.einsum("nd,md->nm", x, y).exp()
    losses = (scores.sum(1) / scores[torch.arange(len(x)), targets]).log()
    return {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}[reduction]()


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("hard", [0, 2])
def test_grad_cache_losses(hard, small, monkeypatch):
    monkeypatch.setattr(grad_cache, "FEW_SCORES", 2**20 if small else -1)
    loss, batch = grad_cache.SimpleContrastiveLoss(hard), drawn(0, torch.float64, (5, 4), (5 * (1 + hard), 4))
    for reduction in ("mean", "sum", "none"):
        want = contrasted(*batch, torch.arange(5) * (1 + hard), reduction)
        same(results(loss(*batch, reduction=reduction), batch), results(want, batch))
    targets = torch.tensor([4, 0, 0, 2, 1])
    same(results(loss(*batch, targets), batch), results(contrasted(*batch, targets), batch))
    some = targets.masked_fill(targets == 0, -100)
    want = contrasted(batch[0][[0, 3, 4]], batch[1], targets[[0, 3, 4]])
    same(results(loss(*batch, some), batch), results(want, batch))


def test_grad_cache():
    """A step over chunks has the gradient of the whole batch, in which what is dropped was drawn chunk by chunk."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(width, 4), nn.Dropout(0.4)).double() for width in (6, 5)]
    parameters = [p for model in models for p in model.parameters()]
    inputs = [x.detach() for x in drawn(0, torch.float64, (7, 6), (7, 5))]
    torch.manual_seed(1)
    chunks = [torch.cat([*map(model, x.split(size))]) for model, x, size in zip(models, inputs, (3, 4), strict=True)]
    want = results(contrasted(*chunks, torch.arange(7)), parameters)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    loss = grad_cache.GradCache(models, [3, 4], grad_cache.SimpleContrastiveLoss())(*inputs)
    same([loss, *(p.grad for p in parameters)], want)
    assert torch.equal(torch.get_rng_state(), after)


# ---- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "loss, sizes",
    [
        (info_nce.InfoNCE(torch.tensor([0.2])), [(6, 4), (6, 4)]),
        (info_nce.InfoNCE(negative_mode="paired"), [(6, 4), (6, 4), (6, 3, 4)]),
        (grad_cache.SimpleContrastiveLoss(1), [(6, 4), (12, 4)]),
    ],
    ids=["batch", "paired", "hard"],
)
def test_compiles(loss, sizes):
    compiles(lambda *batch: loss(*batch), *drawn(0, torch.float32, *sizes))
