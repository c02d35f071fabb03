import math

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import deep_infomax

from ..ops.dense import within

ESTIMATORS = ["jsd", "infonce", "dv"]


def dense(features, local_features, estimator, temperature=1.0, ids=None):
    """The estimators over all scores [N, N, L] of images and locations."""
    N = len(features)
    t = torch.einsum("id,jld->ijl", features, local_features)
    t = t.to(torch.promote_types(t.dtype, torch.float32)) / temperature
    ids = torch.arange(N) if ids is None else ids
    own, other = t[range(N), range(N)], (ids[:, None] != ids).unsqueeze(-1).expand_as(t)
    if estimator == "jsd":
        return F.softplus(-own, threshold=40).mean() + F.softplus(t[other], threshold=40).mean()
    if estimator == "dv":
        return t[other].logsumexp(0) - math.log(other.sum()) - own.mean()
    negatives = t.masked_fill(~other, -math.inf).flatten(1).logsumexp(1, keepdim=True)
    return (torch.logaddexp(own, negatives) - own).mean()


def inputs(N, L, D, dtype=torch.float32, temperature=0.5):
    local_features = F.normalize(torch.randn(N, L, D), dim=-1)
    features = F.normalize(local_features.mean(1) + torch.randn(N, D) / D**0.5, dim=-1)
    T = torch.tensor(temperature, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    return features.to(dtype).requires_grad_(), local_features.to(dtype).requires_grad_(), T


def value_and_gradients(function, tensors, *options, **more):
    features, local_features, T = tensors
    loss = function(features, local_features, *options, temperature=T, **more)
    return loss.detach(), *torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("N, L, D", [(2, 1, 3), (17, 9, 33)])
@pytest.mark.parametrize("grouped", [False, True])
def test_equals_the_formula_in_float64(estimator, N, L, D, grouped):
    x, ids = inputs(N, L, D, torch.float64), torch.arange(N) * 2 // 3 if grouped and N > 2 else None
    results = (value_and_gradients(function, x, estimator, ids=ids) for function in (deep_infomax, dense))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("N, L, D, temperature", [(17, 9, 33, 0.5), (40, 5, 64, 0.01), (7, 70, 16, 1.0)])
def test_is_as_exact_as_dense(backend, estimator, N, L, D, temperature, dtype):
    x = inputs(N, L, D, dtype, temperature)
    exact = [t.detach().double().requires_grad_() for t in x]
    plain, exact = (value_and_gradients(dense, tensors, estimator) for tensors in (x, exact))
    for i, (got, a, b) in enumerate(zip(value_and_gradients(deep_infomax, x, estimator), exact, plain, strict=True)):
        # a gradient is the sum of two, of positives and negatives, which are rounded to its type
        scale = a.abs().max().item() * torch.finfo(got.dtype).eps / 2**-23
        # the terms that cancel in the loss, and in the gradient of the temperature
        within(got, a, b, f"result {i}", max(scale, {0: 1 / temperature, 3: 4 / temperature**2}.get(i, 0.0)))


def test_two_views_are_one_location(backend):
    a, b = torch.randn(9, 5), torch.randn(9, 5)
    for estimator in ESTIMATORS:
        assert torch.equal(deep_infomax(a, b, estimator), deep_infomax(a, b.unsqueeze(1), estimator))


def test_normalize_and_scale(backend):
    a, b = torch.randn(9, 5), torch.randn(9, 4, 5)
    loss = deep_infomax(a, b, logit_scale=4.0, normalize=True)
    torch.testing.assert_close(loss, dense(F.normalize(a, dim=-1), F.normalize(b, dim=-1), "jsd", 0.25))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_negatives(backend, estimator):
    for N in (1, 6):
        a, b, T = inputs(N, 4, 5)
        loss = deep_infomax(a, b, estimator, T, ids=torch.zeros(N, dtype=torch.long))
        grads = torch.autograd.grad(loss, (a, b, T))
        if estimator == "jsd":
            torch.testing.assert_close(loss, F.softplus(-torch.einsum("nd,nld->nl", a, b) / T).mean())
            assert all(x.isfinite().all() for x in grads)
        else:
            assert loss == 0 and all((x == 0).all() for x in grads)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_row_without_negatives(backend, estimator):
    """The ids of one image stand for all: it has no negatives, nor is it one."""
    a, b, T = inputs(4, 3, 5)
    ids = torch.tensor([0, 0, 0, 1])
    got, want = (value_and_gradients(f, (a, b, T), estimator, ids=ids) for f in (deep_infomax, dense))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_unnormalised_features(backend):
    a, b = 30 * torch.randn(20, 16), 30 * torch.randn(20, 3, 16)
    for estimator in ESTIMATORS:
        torch.testing.assert_close(
            deep_infomax(a, b, estimator).double(), dense(a.double(), b.double(), estimator), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(estimator):
    a, b, T = inputs(4, 2, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda a, b, T: deep_infomax(a, b, estimator, T), (a, b, T))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiles_without_a_break(backend, estimator):
    torch.compiler.reset()
    x = inputs(9, 3, 8)
    compiled = torch.compile(deep_infomax, fullgraph=True, backend="aot_eager")
    results = (value_and_gradients(f, x, estimator) for f in (compiled, deep_infomax))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_module():
    a, b, ids = torch.randn(5, 3), torch.randn(5, 2, 3), torch.tensor([0, 1, 1, 2, 3])
    criterion = sslkern.DeepInfoMaxLoss("dv", 0.3, normalize=True)
    assert torch.equal(criterion(a, b, ids=ids), deep_infomax(a, b, "dv", 0.3, ids=ids, normalize=True))
    assert repr(criterion) == "DeepInfoMaxLoss(estimator='dv', temperature=0.3, normalize=True)"
    with pytest.raises(ValueError, match="estimator must"):
        sslkern.DeepInfoMaxLoss("mine")


def test_bad_arguments_are_named():
    a, b = torch.randn(4, 3), torch.randn(4, 2, 3)
    cases = [
        ("features must", (b, b), {}),
        ("features is empty", (a[:0], b[:0]), {}),
        ("local_features must", (a, b[:3]), {}),
        ("local_features must", (a, b[..., :2]), {}),
        ("local_features must", (a, b[:, :0]), {}),
        ("local_features must", (a, b.transpose(1, 2)), {}),
        ("local_features must", (a, b.half()), {}),
        ("estimator must", (a, b, "mine"), {}),
        ("temperature must not be 0", (a, b, "jsd", 0.0), {}),
        ("logit_scale must", (a, b), {"logit_scale": torch.ones(2)}),
        ("ids must", (a, b), {"ids": torch.arange(3)}),
    ]
    for message, args, options in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            deep_infomax(*args, **options)
        assert "\n" not in str(error.value)
