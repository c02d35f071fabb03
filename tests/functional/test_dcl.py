import math

import pytest
import torch

import sslkern
from sslkern.functional import dcl, dclw

from .agreement import agrees_exactly, agrees_on_kernels, compiles, none, peer, product, refuses, unit


def dense(z0, z1, temperature, ids=None, sigma=None):
    """[2N] losses: the log-sum-exp of what is left once sample by sample is out, minus the weighted positive."""
    N = len(z0)
    ids = torch.arange(N) if ids is None else ids
    z, other = unit(torch.cat((z0, z1))), unit(torch.cat((z1, z0)))
    s = (product(z, z) / temperature).masked_fill(ids.repeat(2)[:, None] == ids.repeat(2), -math.inf)
    cosine = product(z.unsqueeze(1), other.unsqueeze(1)).flatten()
    w = 1.0
    if sigma is not None:
        w = torch.exp(cosine.detach() / sigma)
        w = 2 - w / w.mean()
    return s.logsumexp(1) - w * cosine / temperature


@pytest.mark.parametrize("temperature", [0.5, 0.01, -0.3])
def test_dense(temperature):
    features = [torch.randn(9, 4), torch.randn(9, 4)]
    agrees_exactly(none(dcl), dense, features, temperature, ids=torch.arange(9) // 2)
    agrees_exactly(none(dclw), dense, features, temperature, sigma=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature, N, D", [(0.2, 17, 33), (0.07, 70, 64), (0.01, 65, 3)])
def test_kernels(backend, dtype, temperature, N, D):
    features = [torch.randn(N, D), torch.randn(N, D)]
    agrees_on_kernels(none(dcl), dense, features, temperature, dtype)
    agrees_on_kernels(none(dclw), dense, features, temperature, dtype, sigma=0.5)


@pytest.mark.filterwarnings("ignore:To copy construct")
def test_lightly():
    lightly = peer("lightly.loss")
    z0, z1 = torch.randn(20, 8), torch.randn(20, 8)
    assert torch.allclose(dcl(z0, z1, 0.1), lightly.DCLLoss(0.1)(z0, z1))
    assert torch.allclose(dclw(z0, z1, 0.1, 0.4), lightly.DCLWLoss(0.1, 0.4)(z0, z1))


@pytest.mark.parametrize("loss", [dcl, dclw])
def test_rows_without_negatives(backend, loss):
    z0, z1 = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    same = loss(z0, z1, ids=torch.zeros(5, dtype=torch.long))
    for alone in (same, loss(z0[:1], z1[:1])):
        (grad,) = torch.autograd.grad(alone, z0)
        assert alone == 0 and (grad == 0).all()


@pytest.mark.parametrize("loss", [dcl, dclw])
def test_weights(backend, loss):
    z0, z1, w = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5)
    each = loss(z0, z1, reduction="none")
    assert torch.allclose(loss(z0, z1, weights=w), (w.repeat(2) * each).sum() / (2 * w.sum()))


@pytest.mark.parametrize("loss", [dcl, dclw])
def test_gradcheck(loss):
    z0, z1, T = (x.double().requires_grad_() for x in (torch.randn(4, 3), torch.randn(4, 3), torch.tensor(0.3)))
    if loss is dclw:  # whose weights are constants
        fixed = dclw(z0, z1, 0.3, sigma=1e5)
        assert torch.allclose(fixed, dcl(z0, z1, 0.3), atol=1e-3)
    else:
        assert torch.autograd.gradcheck(lambda a, b, t: loss(a, b, t, reduction="none"), (z0, z1, T))


@pytest.mark.parametrize("loss", [dcl, dclw])
def test_compiles_without_a_break(backend, loss):
    compiles(loss, torch.randn(9, 8), torch.randn(9, 8))


def test_module():
    z0, z1 = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(sslkern.DCLLoss(0.2)(z0, z1), dcl(z0, z1, 0.2))
    assert torch.equal(sslkern.DCLWLoss(0.2, 0.3)(z0, z1, logit_scale=2.0), dclw(z0, z1, sigma=0.3, logit_scale=2.0))


def test_bad_arguments_are_named():
    z = torch.randn(4, 3)
    refuses(
        dclw,
        [
            ("z0 must", (z[0], z), {}),
            ("z1 must", (z, z[:3]), {}),
            ("ids must", (z, z), {"ids": torch.arange(3)}),
            ("sigma must", (z, z), {"sigma": 0}),
            ("weights must", (z, z), {"weights": torch.ones(8)}),
            ("reduction must", (z, z), {"reduction": "avg"}),
        ],
    )
