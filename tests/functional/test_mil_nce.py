import math

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import info_nce, mil_nce, mnrl

from .agreement import agrees_exactly, agrees_on_kernels, compiles, product, refuses, unit

IDS = torch.tensor([4, -2, 4, 2**40, 5, 2**40 + 1, -2, 7, 8])
VALID = torch.rand(9, 3, generator=torch.Generator().manual_seed(3)) < 0.7
VALID[4] = False  # an anchor without candidates


def dense(anchor, positives, temperature, two_way=False, valid=None, ids=None, normalize=True):
    """[N] losses from all scores [N, N, P] and their masks."""
    N, P, _ = positives.shape
    if normalize:
        anchor, positives = unit(anchor), unit(positives)
    s = product(anchor, positives.flatten(0, 1)).view(N, N, P) / temperature
    if valid is not None:
        s = s.masked_fill(~valid, -math.inf)
    ids = torch.arange(N) if ids is None else ids
    negatives = s.masked_fill((ids[:, None] == ids).unsqueeze(2), -math.inf)
    own = s[torch.arange(N), torch.arange(N)]
    negatives = torch.cat((negatives, negatives.transpose(0, 1)), 1) if two_way else negatives
    alone = (own == -math.inf).all(1, keepdim=True)
    own = own.masked_fill(alone, 0)
    losses = torch.cat((own, negatives.flatten(1)), 1).logsumexp(1) - own.logsumexp(1)
    return losses.masked_fill(alone.squeeze(1), 0)


def loss(anchor, positives, temperature, **options):
    return mil_nce(anchor, positives, temperature, reduction="none", **{"normalize": True} | options)


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize("options", [{}, dict(ids=IDS), dict(ids=IDS, valid=VALID), dict(normalize=False)])
@pytest.mark.parametrize("temperature", [0.5, 0.01, -0.3])
def test_dense(two_way, options, temperature):
    features = [torch.randn(9, 5), torch.randn(9, 3, 5)]
    agrees_exactly(loss, dense, features, temperature, two_way=two_way, **options)


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature, N, P, D", [(0.2, 17, 5, 33), (0.07, 70, 3, 64), (0.01, 9, 3, 8)])
def test_kernels(backend, two_way, dtype, temperature, N, P, D):
    options = dict(two_way=two_way) | (dict(valid=VALID, ids=IDS) if N == 9 else {})
    # the positives, the row and, in two ways, the column
    agrees_on_kernels(
        loss, dense, [torch.randn(N, D), torch.randn(N, P, D)], temperature, dtype, scores=2 + two_way, **options
    )


def authors(video, text):
    """loss.py of https://github.com/antoine77340/MIL-NCE_HowTo100M as a formula: video [N, D], text [N P, D]."""
    N = len(video)
    s = (video @ text.T).view(N, N, -1)
    both = torch.cat((s, s.transpose(0, 1)), 1).flatten(1)
    return (both.logsumexp(1) - s.diagonal().T.logsumexp(1)).mean()


def test_the_authors_code_counts_positives_twice(backend):
    video, text = torch.randn(8, 6), torch.randn(8, 4, 6)
    ours = mil_nce(video, text, two_way=True, reduction="none")
    assert torch.allclose(F.softplus(ours).mean(), authors(video, text.flatten(0, 1)))


@pytest.mark.parametrize("two_way", [False, True])
def test_one_positive_each(backend, two_way):
    a, p = torch.randn(7, 5), torch.randn(7, 5)
    got = mil_nce(a, p.unsqueeze(1), 0.2, two_way=two_way, normalize=True, reduction="none")
    if two_way:  # mnrl has the positive in both directions
        both = mnrl(a, p, temperature=0.2, directions=("query_to_doc", "doc_to_query"), reduction="none")
        assert torch.allclose(F.softplus(got), both, atol=1e-6)
    else:
        assert torch.allclose(got, info_nce(a, p, temperature=0.2, reduction="none"), atol=1e-6)


@pytest.mark.parametrize("two_way", [False, True])
def test_left_out_candidates_change_nothing(backend, two_way):
    a, p, junk = torch.randn(6, 5), torch.randn(6, 2, 5), torch.full((6, 1, 5), 7.0)
    valid = torch.tensor([True, False, True]).expand(6, 3)
    padded = torch.cat((p[:, :1], junk, p[:, 1:]), 1).requires_grad_()
    got = mil_nce(a, padded, valid=valid, two_way=two_way)
    assert torch.allclose(got, mil_nce(a, p, two_way=two_way))
    (grad,) = torch.autograd.grad(got, padded)
    assert (grad[:, 1] == 0).all() and (grad[:, ::2] != 0).any()


@pytest.mark.parametrize("two_way", [False, True])
def test_rows_without_candidates_or_negatives(backend, two_way):
    a, p = torch.randn(5, 4, requires_grad=True), torch.randn(5, 2, 4, requires_grad=True)
    nobody, same = torch.zeros(5, 2, dtype=torch.bool), torch.zeros(5, dtype=torch.long)
    for options in (dict(valid=nobody), dict(ids=same), dict(ids=same, valid=nobody)):
        losses = mil_nce(a, p, two_way=two_way, reduction="none", **options)
        grads = torch.autograd.grad(losses.sum(), (a, p))
        assert (losses == 0).all() and all((grad == 0).all() for grad in grads)
    assert mil_nce(a[:1], p[:1], two_way=two_way) == 0 and mil_nce(a, p[:, :0], two_way=two_way) == 0


@pytest.mark.parametrize("two_way", [False, True])
def test_tiny_losses_keep_their_digits(backend, two_way):
    anchor, T = torch.eye(20, 32).requires_grad_(), 0.05
    positives = anchor.detach().unsqueeze(1).expand(20, 3, 32).clone()
    positives[:, 2] *= 0.5
    losses = mil_nce(anchor, positives, T, two_way=two_way, reduction="none")
    negatives = 19 * 3 * (1 + two_way)
    exact = math.log1p(negatives / (2 * math.exp(1 / T) + math.exp(0.5 / T)))
    assert torch.allclose(losses, torch.tensor(exact).expand(20), rtol=1e-5, atol=0) and exact < 2e-7
    (grad,) = torch.autograd.grad(losses.sum(), anchor)
    wide = anchor.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(dense(wide, positives.double(), T, two_way, normalize=False).sum(), wide)
    assert (grad - want).abs().max() <= 1e-4 * want.abs().max()


def test_weights_and_reductions(backend):
    a, p, w = torch.randn(6, 5), torch.randn(6, 2, 5), torch.rand(6)
    losses = mil_nce(a, p, reduction="none")
    assert losses.shape == (6,)
    assert torch.allclose(mil_nce(a, p), losses.mean()) and torch.allclose(mil_nce(a, p, reduction="sum"), losses.sum())
    assert torch.allclose(mil_nce(a, p, weights=w), (w * losses).sum() / w.sum())


@pytest.mark.parametrize("two_way", [False, True])
def test_gradcheck(two_way):
    a, p = torch.randn(4, 3).double().requires_grad_(), torch.randn(4, 2, 3).double().requires_grad_()
    T = torch.tensor(0.6).double().requires_grad_()
    valid = torch.tensor([[True, True], [False, True], [True, True], [False, False]])
    options = dict(two_way=two_way, valid=valid, reduction="none")
    assert torch.autograd.gradcheck(lambda a, p, t: mil_nce(a, p, t, **options), (a, p, T))


@pytest.mark.parametrize("two_way", [False, True])
def test_compiles_without_a_break(backend, two_way):
    compiles(mil_nce, torch.randn(9, 8), torch.randn(9, 3, 8), two_way=two_way, valid=VALID, ids=IDS)


def test_module():
    a, p = torch.randn(9, 3), torch.randn(9, 3, 3)
    criterion = sslkern.MILNCELoss(0.2, two_way=True, normalize=True)
    options = dict(two_way=True, normalize=True)
    assert torch.equal(criterion(a, p, valid=VALID, ids=IDS), mil_nce(a, p, 0.2, valid=VALID, ids=IDS, **options))
    assert torch.equal(criterion(a, p, logit_scale=3.0), mil_nce(a, p, logit_scale=3.0, **options))
    assert "two_way=True" in repr(criterion)


def test_bad_arguments_are_named():
    a, p = torch.randn(4, 3), torch.randn(4, 2, 3)
    refuses(
        mil_nce,
        [
            ("anchor must", (p, p), {}),
            ("anchor is empty", (a[:0], p[:0]), {}),
            ("positives must", (a, a), {}),
            ("positives must", (a, p[:3]), {}),
            ("positives must", (a, p[..., :2]), {}),
            ("positives must", (a, list(p)), {}),
            ("positives must have the dtype", (a, p.half()), {}),
            ("valid must be a bool", (a, p), {"valid": torch.ones(4, dtype=torch.bool)}),
            ("valid must be bool", (a, p), {"valid": torch.ones(4, 2)}),
            ("valid is on meta", (a, p), {"valid": torch.ones(4, 2, dtype=torch.bool, device="meta")}),
            ("ids must", (a, p), {"ids": torch.arange(3)}),
            ("weights must", (a, p), {"weights": torch.ones(3)}),
            ("temperature must not be 0", (a, p, 0.0), {}),
            ("reduction must", (a, p), {"reduction": "avg"}),
        ],
    )
