import math

import pytest
import torch

import sslkern
from sslkern.functional import debiased, hard_negative, nt_xent

from .agreement import agrees_exactly, agrees_on_kernels, compiles, none, product, refuses, unit


def dense(z0, z1, temperature, tau_plus=0.1, beta=None, ids=None):
    """[2N] losses in exponentials, shifted by their largest possible value 1 / T so that they do not overflow."""
    N = len(z0)
    ids = torch.arange(N) if ids is None else ids
    z, other = unit(torch.cat((z0, z1))), unit(torch.cat((z1, z0)))
    keep = ids.repeat(2)[:, None] != ids.repeat(2)
    s = product(z, z) / temperature
    count = keep.sum(1).to(s.dtype)
    positive = product(z.unsqueeze(1), other.unsqueeze(1)).flatten() / temperature
    shift = (1 / temperature).abs()
    weight = 1.0
    if beta is not None:
        weight = torch.exp(beta * (s - shift)) * keep
        weight = weight / (weight.sum(1, keepdim=True) / count.clamp_min(1)[:, None])
    total = (torch.exp(s - shift) * keep * weight).sum(1)
    rest = (total - tau_plus * count * torch.exp(positive - shift)) / (1 - tau_plus)
    negative = torch.maximum(rest, count * torch.exp(-2 * shift))
    return torch.log((torch.exp(positive - shift) + negative) / torch.exp(positive - shift))


@pytest.mark.parametrize("temperature", [0.5, 0.05])
@pytest.mark.parametrize("ids", [None, torch.arange(11) // 2])
@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.6])
def test_dense(tau_plus, ids, temperature):
    z0 = torch.randn(11, 4)
    features, options = [z0, z0 + torch.randn(11, 4)], dict(tau_plus=tau_plus, ids=ids)
    agrees_exactly(none(debiased), dense, features, temperature, **options)
    for beta in (0.0, 1.5):
        agrees_exactly(none(hard_negative), dense, features, temperature, beta=beta, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature, N, D", [(0.5, 17, 33), (0.2, 70, 64), (0.1, 65, 3)])
def test_kernels(backend, dtype, temperature, N, D):
    z0 = torch.randn(N, D)
    features = [z0, z0 + torch.randn(N, D)]
    agrees_on_kernels(none(debiased), dense, features, temperature, dtype, tau_plus=0.1)
    agrees_on_kernels(none(hard_negative), dense, features, temperature, dtype, scores=4, tau_plus=0.1, beta=1.0)


def test_both_sides_of_the_bound():
    """Rows whose negatives are outweighed take the bound, whose gradient is that of the positive alone."""
    z0 = torch.eye(4, 6)
    z1 = torch.cat((z0[:2], -z0[2:]))  # the positive is as near, and as far, as can be
    losses = debiased(z0, z1, 0.5, 0.5, reduction="none")
    T, M, tau = 0.5, 6, 0.5
    near = math.log1p(M * math.exp(-1 / T) * math.exp(-1 / T))  # 6 - 3 e^2 < 0
    far = math.log1p((M - tau * M * math.exp(-1 / T)) / (1 - tau) * math.exp(1 / T))
    assert torch.allclose(losses, torch.tensor([near, near, far, far]).repeat(2))


@pytest.mark.parametrize("loss", [debiased, hard_negative])
def test_small_temperature(backend, loss):
    """e^(1 / T) = e^100 is no fp32 number."""
    z0 = torch.randn(60, 16)
    z0, z1 = z0.requires_grad_(), z0.detach() + 0.8 * torch.randn(60, 16)
    value = loss(z0, z1, 0.01)
    (grad,) = torch.autograd.grad(value, z0)
    wide = z0.detach().double().requires_grad_()
    exact = dense(wide, z1.double(), torch.tensor(0.01).double(), beta=1.0 if loss is hard_negative else None).mean()
    (want,) = torch.autograd.grad(exact, wide)
    assert torch.allclose(value.double(), exact, rtol=1e-5)
    assert (grad - want).abs().max() <= 1e-4 * want.abs().max()


def test_without_bias_it_is_nt_xent(backend):
    z0, z1 = torch.randn(12, 5), torch.randn(12, 5)
    expected = nt_xent(z0, z1, 0.2, reduction="none")
    assert torch.allclose(debiased(z0, z1, 0.2, 0.0, reduction="none"), expected, atol=1e-5)
    assert torch.allclose(hard_negative(z0, z1, 0.2, 0.0, 0.0, reduction="none"), expected, atol=1e-5)


@pytest.mark.parametrize("loss", [debiased, hard_negative])
def test_rows_without_negatives(backend, loss):
    z0, z1, T = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3), torch.tensor(0.3, requires_grad=True)
    same = loss(z0, z1, T, ids=torch.zeros(5, dtype=torch.long))
    for alone in (same, loss(z0[:1], z1[:1], T)):
        grads = torch.autograd.grad(alone, (z0, T))
        assert alone == 0 and all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("loss", [debiased, hard_negative])
def test_weights(backend, loss):
    z0, z1, w = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5)
    each = loss(z0, z1, reduction="none")
    assert torch.allclose(loss(z0, z1, weights=w), (w.repeat(2) * each).sum() / (2 * w.sum()))


@pytest.mark.parametrize("loss", [debiased, hard_negative])
def test_gradcheck(loss):
    z0, z1, T = (x.double().requires_grad_() for x in (torch.randn(4, 3), torch.randn(4, 3), torch.tensor(0.4)))
    assert torch.autograd.gradcheck(lambda a, b, t: loss(a, b, t, reduction="none"), (z0, z1, T))


@pytest.mark.parametrize("loss", [debiased, hard_negative])
def test_compiles_without_a_break(backend, loss):
    compiles(loss, torch.randn(9, 8), torch.randn(9, 8))


def test_module():
    z0, z1 = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(sslkern.DebiasedLoss(0.2, 0.3)(z0, z1), debiased(z0, z1, 0.2, 0.3))
    assert torch.equal(sslkern.HardNegativeLoss(0.2, 2.0, 0.3)(z0, z1), hard_negative(z0, z1, 0.2, 2.0, 0.3))


def test_bad_arguments_are_named():
    z = torch.randn(4, 3)
    refuses(
        hard_negative,
        [
            ("z0 must", (z[0], z), {}),
            ("ids must", (z, z), {"ids": torch.arange(3)}),
            ("tau_plus must", (z, z), {"tau_plus": 1.0}),
            ("tau_plus must", (z, z), {"tau_plus": -0.1}),
            ("beta must", (z, z), {"beta": -1}),
            ("weights must", (z, z), {"weights": torch.ones(8)}),
        ],
    )
