"""What the dense formula says at the edges: no features, rows of zeros, infinite and huge ones, digits of fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import info_nce, nce, nt_xent, siglip, uniformity
from sslkern.ops import similarity_lse, similarity_softplus, similarity_topk

from ..examples import LOSSES, OPS, value_and_gradients

# Prefixes and layers have sizes of their own, which are at least 1.
SIZED = {"matryoshka", "MatryoshkaLoss", "CMCLoss", "CPCLoss", "CachedLoss", "MoCoLoss", "NCELoss", "NNCLRLoss"}


@pytest.mark.parametrize("chosen", ["auto", "reference"])
@pytest.mark.parametrize("name", [name for name in LOSSES | OPS if name not in SIZED])
def test_no_features_are_features_of_zero(chosen, name):
    """D = 0: all scores are 0."""
    D = 7  # a size of nothing else
    example = (LOSSES | OPS)[name](D=D)

    def zeros(x):
        return torch.zeros_like(x, requires_grad=x.requires_grad) if D in x.shape else x

    def nothing(x):
        return x.new_zeros([0 if d == D else d for d in x.shape]).requires_grad_(x.requires_grad) if D in x.shape else x

    with sslkern.use_backend(chosen):
        pairs = [value_and_gradients(example.map(change)) for change in (nothing, zeros)]
    for got, want in zip(*pairs, strict=True):
        if got is None or want is None:
            assert got is None and want is None
        elif D in want.shape:
            assert got.shape == tuple(0 if d == D else d for d in want.shape)
        else:
            assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)


def test_no_features_by_hand(backend):
    q, k = torch.zeros(2, 0), torch.zeros(3, 0)
    assert torch.allclose(similarity_lse(q, k), torch.full((2,), math.log(3)))
    assert torch.allclose(similarity_lse(k), torch.full((3,), math.log(2)))
    assert similarity_softplus(q, k).item() == pytest.approx(6 * math.log(2))
    assert similarity_topk(q, k, 2)[1].tolist() == [[0, 1], [0, 1]]
    assert similarity_lse(q, torch.zeros(0, 0)).tolist() == [-math.inf] * 2


def test_uniformity_knows_rows_of_zeros(backend):
    cases = ([1, 0], 2.0), ([1, 0, 0], 2.0), ([0, 0], 3.0), ([1, 1, 0, 1], 0.5), ([1, 0, 1], 200.0), ([0], 2.0)
    for rows, t in cases:
        z = torch.randn(len(rows), 3) * torch.tensor(rows).unsqueeze(1)
        z = z.requires_grad_()
        u = F.normalize(z.detach(), dim=1).double().requires_grad_()
        apart = ~torch.eye(len(rows), dtype=torch.bool)
        dense = (u.unsqueeze(1) - u).square().sum(2)[apart].mul(-t)
        dense = dense.logsumexp(0) - math.log(max(1, len(dense))) if len(dense) else u.sum() * 0
        got = uniformity(z, t)
        assert got.item() == pytest.approx(dense.item(), rel=1e-5, abs=1e-6), rows
        (grad,) = torch.autograd.grad(got, z)
        assert grad.isfinite().all()
    assert uniformity(torch.tensor([[2.0, 0.0], [0.0, 0.0]])).item() == pytest.approx(-2)


LEARNED = [name for name in LOSSES if name != "CachedLoss"]


@pytest.mark.parametrize("name", LEARNED)
def test_a_row_of_zeros_in_fp16_has_a_finite_gradient(backend, name):
    """1e12 times what arrives is more than fp16 holds, and a gradient scaler would skip the step for ever."""
    example = LOSSES[name](dtype=torch.float16)

    def zeroed(x):
        if not x.requires_grad or x.ndim < 2:
            return x
        x = x.detach().clone()
        x[..., 0, :] = 0
        return x.requires_grad_()

    for x in value_and_gradients(example.map(zeroed)):
        assert x is None or x.isfinite().all()


def dense_infinite(query, key, two_way):
    s = query @ key.T / 0.1
    own = torch.arange(len(query))
    losses = F.cross_entropy(s, own, reduction="none")
    return (losses + F.cross_entropy(s.T, own, reduction="none")) / 2 if two_way else losses


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("two_way", [False, True])
def test_an_infinite_feature_shows(backend, value, two_way):
    """NaN where cross-entropy has it, which was 0 or inf."""
    x, y = torch.ones(3, 4), torch.ones(3, 4)
    x[0, 0] = value
    for query, key in ((x, y), (y, x)):
        got = info_nce(query, key, two_way=two_way, normalize=False, reduction="none")
        assert torch.allclose(got, dense_infinite(query, key, two_way), rtol=1e-5, equal_nan=True)
        bank = info_nce(query, key, key, normalize=False, reduction="none")
        s = torch.cat(((query * key).sum(1, keepdim=True), query @ key.T), 1) / 0.1
        dense = F.cross_entropy(s, torch.zeros(3, dtype=torch.long), reduction="none")
        assert torch.allclose(bank, dense, rtol=1e-5, equal_nan=True)
        own = info_nce(query, key, key.expand(3, 3, 4), normalize=False, reduction="none")
        assert torch.allclose(own, dense, rtol=1e-5, equal_nan=True)
    if value == math.inf:
        assert nt_xent(x, y, normalize=False).isnan()


@pytest.mark.parametrize("tensor", [False, True])
def test_huge_features_whose_scores_are_not(backend, tensor):
    """Scaled features would overflow; scaled products do not."""
    q, k = torch.tensor([[3e38, 0.0], [0.1, 1.0]]), torch.tensor([[0.009, 0.0], [0.009, 1.0]])
    scale = torch.tensor(10.0) if tensor else 10.0
    row, col, best = similarity_lse(q, k, scale, columns=True, best=True)
    s = 10 * (q @ k.T)
    assert s[0, 0].item() == pytest.approx(2.7e37)
    for got, want in ((row, s.logsumexp(1)), (col, s.logsumexp(0)), (best, torch.cat((s.amax(1), s.amax(0))))):
        assert torch.allclose(got, want, rtol=1e-5)
    assert torch.allclose(similarity_topk(q, k, 1, scale=scale)[0], s.amax(1, keepdim=True), rtol=1e-5)


def test_numbers_in_fp32_keep_the_digits_of_fp64():
    """Beside features in fp64, with what they are in fp32."""
    a, b = torch.randn(2, 12, 8, dtype=torch.float64)
    index = torch.arange(12).unsqueeze(1) + torch.arange(3) * 5
    log_z, T, scale = torch.tensor(2.3), torch.tensor(0.07), torch.tensor(14.3)
    for loss in (
        lambda log_z, T, s: nce(a, torch.cat((b, b)), index, T, log_z=log_z),
        lambda log_z, T, s: nce(a, torch.cat((b, b)), index, logit_scale=s, form="softmax"),
        lambda log_z, T, s: nt_xent(a, b, T),
        lambda log_z, T, s: siglip(a, b, s, -log_z),
        lambda log_z, T, s: sslkern.functional.clip(a, b, s),
        lambda log_z, T, s: sslkern.functional.moco_v3(a, b, a, b, T),
    ):
        assert loss(log_z, T, scale).item() == loss(log_z.double(), T.double(), scale.double()).item()
