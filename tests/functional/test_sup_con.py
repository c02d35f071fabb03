import math

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import nt_xent, sup_con

from .agreement import agrees_exactly, agrees_on_kernels, compiles, none, peer, product, refuses, unit

LABELS = torch.tensor([7, -3, 7, 2**40, 5, -3, 7, 5, 2**40 + 1, 7, 11, -3])  # two rows alone in their class, two twins


def dense(z, temperature, labels, form="out"):
    """[N] losses with masks, as the authors' code has them."""
    s = product(unit(z), unit(z)) / temperature
    self_ = torch.eye(len(z), dtype=torch.bool)
    positive = (labels[:, None] == labels) & ~self_
    log_prob = s - s.masked_fill(self_, -math.inf).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    if form == "out":
        loss = -log_prob.where(positive, 0).sum(1) / count.clamp_min(1)
    else:
        loss = -(log_prob.masked_fill(~positive, -1e9).logsumexp(1) - count.clamp_min(1).to(s.dtype).log())
    return loss.where(count > 0, 0)


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("temperature", [0.5, 0.01, -0.3])
def test_dense(form, temperature):
    agrees_exactly(none(sup_con), dense, [torch.randn(12, 5)], temperature, labels=LABELS, form=form)


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature, N, D", [(0.2, 12, 3), (0.1, 150, 33), (0.01, 70, 64)])
def test_kernels(backend, form, dtype, temperature, N, D):
    labels = torch.cat((LABELS[:12], torch.arange(N - 12) % 9))
    agrees_on_kernels(none(sup_con), dense, [torch.randn(N, D)], temperature, dtype, labels=labels, form=form)


@pytest.mark.parametrize("form", ["out", "in"])
def test_views(backend, form):
    z, labels = torch.randn(6, 2, 8), torch.tensor([1, 2, 1, 3, 4, 4])
    flat = dense(z.reshape(12, 8), 0.2, labels.repeat_interleave(2), form)
    assert torch.allclose(sup_con(z, labels, 0.2, form=form, reduction="none"), flat.view(6, 2), atol=1e-5)
    assert torch.allclose(sup_con(z, labels, 0.2, form=form), flat.mean())
    w = torch.rand(6)
    weighted = (w[:, None] * flat.view(6, 2)).sum() / (2 * w.sum())
    assert torch.allclose(sup_con(z, labels, 0.2, form=form, weights=w), weighted)
    # without labels two views are each other's positives: NT-Xent
    simclr = nt_xent(z[:, 0], z[:, 1], 0.2, reduction="none").view(2, 6).t()
    assert torch.allclose(sup_con(z, temperature=0.2, form=form, reduction="none"), simclr, atol=1e-5)


@pytest.mark.parametrize("form", ["out", "in"])
def test_rows_without_positives_or_competitors(backend, form):
    z = torch.randn(9, 4, requires_grad=True)
    for labels in (torch.arange(9), torch.arange(9) // 8 * 5):  # nobody has a positive; all but one share a label
        losses = sup_con(z, labels, form=form, reduction="none")
        (grad,) = torch.autograd.grad(losses[-1], z)
        assert losses[-1] == 0 and (grad == 0).all() and losses.isfinite().all()
    one = sup_con(z[:1], torch.zeros(1, dtype=torch.long), form=form)
    two = sup_con(z[:2], torch.zeros(2, dtype=torch.long), form=form)  # a positive, no negatives
    for loss in (one, two):
        (grad,) = torch.autograd.grad(loss, z)
        assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("form", ["out", "in"])
def test_tiny_losses_keep_their_digits(backend, form):
    z = torch.eye(20, 32).repeat(2, 1).requires_grad_()
    labels, T = torch.arange(20).repeat(2), 0.05
    losses = sup_con(z, labels, T, form=form, reduction="none", normalize=False)
    exact = torch.tensor(math.log1p(38 * math.exp(-1 / T)))
    assert torch.allclose(losses, exact.expand(40), rtol=1e-5, atol=0) and exact < 1e-7
    (grad,) = torch.autograd.grad(losses.sum(), z)
    wide = z.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(
        (product(wide, wide) / T).fill_diagonal_(-math.inf).logsumexp(1).sum() - (wide[:20] * wide[20:]).sum() * 2 / T,
        wide,
    )
    assert (grad - want).abs().max() <= 1e-4 * want.abs().max()


def test_metric_learning():
    losses = peer("pytorch_metric_learning.losses")
    z, labels = torch.randn(40, 8), torch.randint(5, (40,))
    assert torch.allclose(sup_con(z, labels, 0.1), losses.SupConLoss(0.1)(z, labels))


@pytest.mark.parametrize("form", ["out", "in"])
def test_gradcheck(form):
    z, T = torch.randn(6, 3).double().requires_grad_(), torch.tensor(0.3).double().requires_grad_()
    labels = torch.tensor([1, 1, 2, 2, 2, 3])
    assert torch.autograd.gradcheck(lambda z, t: sup_con(z, labels, t, form=form, reduction="none"), (z, T))


@pytest.mark.parametrize("form", ["out", "in"])
def test_compiles_without_a_break(backend, form):
    compiles(sup_con, torch.randn(12, 8), labels=LABELS, form=form)


def test_module():
    z = torch.randn(12, 3)
    criterion = sslkern.SupConLoss(0.2, form="in")
    assert torch.equal(criterion(z, LABELS), sup_con(z, LABELS, 0.2, form="in"))
    assert torch.equal(criterion(F.normalize(z), LABELS, logit_scale=3.0), criterion(z, LABELS, logit_scale=3.0))


def test_bad_arguments_are_named():
    z = torch.randn(12, 3)
    refuses(
        sup_con,
        [
            ("z must", (z[0], LABELS), {}),
            ("z is empty", (z[:0], LABELS[:0]), {}),
            ("z is empty", (z[:0, None], LABELS[:0]), {}),
            ("labels must be given", (z,), {}),
            ("labels must be an int64", (z, LABELS[:3]), {}),
            ("labels must be int64", (z, LABELS.int()), {}),
            ("form must", (z, LABELS), {"form": "both"}),
            ("temperature must not be 0", (z, LABELS, 0.0), {}),
            ("weights must", (z, LABELS), {"weights": torch.ones(3)}),
            ("weights must be floating", (z, LABELS), {"weights": torch.ones(12).long()}),
            ("reduction must", (z[:, None], LABELS), {"reduction": "avg"}),
        ],
    )
