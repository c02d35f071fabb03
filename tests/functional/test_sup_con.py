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


# Rows 1 and 6 have no positive but each other, 10 none but 3, which has more; 4 and 9 none.
TAGS = torch.zeros(12, 9, dtype=torch.bool)
for row, tags in enumerate([[0], [1, 2], [0, 3], [3, 4, 0], [5], [0, 3], [1, 2, 6], [3], [0], [], [4], [0, 7]]):
    TAGS[row, tags] = True


def dense_labels(z, temperature, labels):
    """[N] losses with a mask for each label: a supervised contrastive loss of every label that a row shares."""
    s = product(unit(z), unit(z)) / temperature
    self_ = torch.eye(len(z), dtype=torch.bool)
    log_prob = s - s.masked_fill(self_, -math.inf).logsumexp(1, keepdim=True)
    total, tasks = torch.zeros_like(s[:, 0]), torch.zeros_like(s[:, 0])
    for label in labels.T:
        positive = label[:, None] & label & ~self_
        count = positive.sum(1)
        total = total - log_prob.where(positive, 0).sum(1) / count.clamp_min(1)
        tasks = tasks + (count > 0)
    return total / tasks.clamp_min(1)


@pytest.mark.parametrize("temperature", [0.5, 0.01, -0.3])
def test_several_labels(temperature):
    agrees_exactly(none(sup_con), dense_labels, [torch.randn(12, 5)], temperature, labels=TAGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature, N, D", [(0.2, 12, 3), (0.1, 150, 33), (0.01, 70, 64)])
def test_several_labels_on_kernels(backend, dtype, temperature, N, D):
    labels = torch.cat((TAGS, torch.rand(N - 12, 9) < 0.3))
    agrees_on_kernels(none(sup_con), dense_labels, [torch.randn(N, D)], temperature, dtype, labels=labels)


def test_one_of_several_labels_is_the_loss_of_single_labels(backend):
    z, labels = torch.randn(40, 8, requires_grad=True), torch.cat((torch.arange(8), torch.randint(6, (32,))))
    got, want = (sup_con(z, x, reduction="none") for x in (F.one_hot(labels, 9).bool(), labels))
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    assert torch.allclose(*(torch.autograd.grad(x.sum(), z)[0] for x in (got, want)), atol=1e-4)
    views = torch.randn(6, 2, 8)
    tags = F.one_hot(labels[:6], 9).bool()
    assert torch.allclose(sup_con(views, tags), sup_con(views, labels[:6]), atol=1e-5)


def test_several_labels_weighted_by_their_number_are_the_sum_over_rows_and_labels():
    """The unweighted sum of MulSupCon: each pair of a row and one of its labels counts once."""
    z, labels = torch.randn(30, 8), torch.rand(30, 4) < 0.5
    s = product(unit(z), unit(z)).fill_diagonal_(-math.inf) / 0.1
    rows, tags = labels.nonzero().unbind(1)
    positive = labels[:, tags].T & (torch.arange(30) != rows[:, None])
    terms = -(s.log_softmax(1)[rows].where(positive, 0).sum(1) / positive.sum(1))
    assert torch.allclose(sup_con(z, labels, 0.1, weights=labels.sum(1).float()), terms.mean())


def test_several_labels_without_positives_or_negatives(backend):
    z = torch.randn(4, 3, requires_grad=True)
    nothing = torch.zeros(4, 5, dtype=torch.bool)
    cases = [z, nothing], [z, torch.eye(4, 5).bool()], [z, nothing[:, :0]], [z[:1], ~nothing[:1]], [z[:2], ~nothing[:2]]
    for rows, labels in cases:
        losses = sup_con(rows, labels, reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), z)
        assert (losses == 0).all() and (grad == 0).all()
    alone = sup_con(torch.randn(12, 3), TAGS, reduction="none")
    assert alone.isfinite().all() and (alone == 0).nonzero().flatten().tolist() == [4, 9]


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
def test_a_batch_of_one_label(backend, form):
    """No negatives: positives compete with each other, log(8) at least, and of "in" always."""
    z, labels = torch.randn(9, 4, requires_grad=True), torch.full((9,), 3)
    losses = sup_con(z, labels, form=form, reduction="none")
    assert torch.allclose(losses, dense(z, 0.1, labels, form), rtol=1e-5)
    (grad,) = torch.autograd.grad(losses.sum(), z)
    (want,) = torch.autograd.grad(dense(z, 0.1, labels, form).sum(), z)
    assert torch.allclose(grad, want, rtol=1e-4, atol=1e-4)
    tags = sup_con(z, torch.ones(9, 1, dtype=torch.bool), reduction="none") if form == "out" else losses
    assert torch.allclose(tags, losses, rtol=1e-5)
    least = torch.tensor(math.log(8)).expand(9)
    assert (losses > least + 1).all() if form == "out" else torch.allclose(losses, least) and (grad == 0).all()
    assert torch.allclose(sup_con(torch.ones(9, 4), labels, form=form, reduction="none"), least)


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


def test_tiny_losses_of_several_labels_keep_their_digits(backend):
    """Pairs whose two rows share one to three labels, beside one that nobody else has."""
    z, T = torch.eye(20, 32).repeat(2, 1), 0.05
    pairs = torch.zeros(20, 61, dtype=torch.bool)
    for i in range(20):
        pairs[i, 3 * i : 3 * i + 1 + i % 3] = True
    labels = pairs.repeat(2, 1)
    labels[0, 60] = True
    losses = sup_con(z, labels, T, reduction="none", normalize=False)
    assert torch.allclose(losses, torch.tensor(math.log1p(38 * math.exp(-1 / T))).expand(40), rtol=1e-5, atol=0)


def test_metric_learning():
    losses = peer("pytorch_metric_learning.losses")
    z, labels = torch.randn(40, 8), torch.randint(5, (40,))
    assert torch.allclose(sup_con(z, labels, 0.1), losses.SupConLoss(0.1)(z, labels))


@pytest.mark.parametrize("form", ["out", "in"])
def test_gradcheck(form):
    z, T = torch.randn(6, 3).double().requires_grad_(), torch.tensor(0.3).double().requires_grad_()
    labels = torch.tensor([1, 1, 2, 2, 2, 3])
    assert torch.autograd.gradcheck(lambda z, t: sup_con(z, labels, t, form=form, reduction="none"), (z, T))


def test_gradcheck_of_several_labels():
    z, T = torch.randn(12, 3).double().requires_grad_(), torch.tensor(0.3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z, t: sup_con(z, TAGS, t, reduction="none"), (z, T))


def test_several_labels_compile_without_a_break(backend):
    compiles(sup_con, torch.randn(12, 8), labels=TAGS)


@pytest.mark.parametrize("form", ["out", "in"])
def test_compiles_without_a_break(backend, form):
    compiles(sup_con, torch.randn(12, 8), labels=LABELS, form=form)


def test_module():
    z = torch.randn(12, 3)
    criterion = sslkern.SupConLoss(0.2, form="in")
    assert torch.equal(criterion(z, LABELS), sup_con(z, LABELS, 0.2, form="in"))
    assert torch.equal(sslkern.SupConLoss(0.2)(z, TAGS), sup_con(z, TAGS, 0.2))
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
            ("form must", (z, TAGS), {"form": "in"}),
            ("labels must be a bool tensor", (z, TAGS[:3]), {}),
            ("labels must be int64 .N., or bool", (z, LABELS[:, None]), {}),
            ("labels must be int64 .N., or bool", (z, TAGS.float()), {}),
            ("labels is on meta", (z, TAGS.to("meta")), {}),
            ("temperature must not be 0", (z, LABELS, 0.0), {}),
            ("weights must", (z, LABELS), {"weights": torch.ones(3)}),
            ("weights must be floating", (z, LABELS), {"weights": torch.ones(12).long()}),
            ("reduction must", (z[:, None], LABELS), {"reduction": "avg"}),
        ],
    )
