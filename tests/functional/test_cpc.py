import math

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import cpc
from tests.ops.dense import within

SIZES = [(5, 7, 3, 4, 6), (1, 4, 3, 2, 5), (4, 2, 1, 1, 1), (3, 70, 12, 33, 8)]  # N, T, K, Dz, Dc


def dense(context, targets, predictors, temperature=1.0, negatives="all", normalize=False):
    """[K] losses and [K] accuracies, one step and one prediction at a time."""
    (N, T, _), wide = context.shape, torch.promote_types(context.dtype, torch.float32)
    sample, time = torch.arange(N)[:, None].expand(N, T), torch.arange(T).expand(N, T)
    z = F.normalize(targets.to(wide), dim=2).to(targets.dtype) if normalize else targets
    losses, accuracies = [], []
    for k, predictor in enumerate(predictors, 1):
        step, wins = [], []
        for n in range(N):
            for t in range(T - k):
                query = context[n, t] @ predictor.to(context.dtype).T
                query = F.normalize(query.to(wide), dim=0).to(query.dtype) if normalize else query
                pool = {"all": sample >= 0, "sample": time == t + k, "time": sample == n}[negatives]
                s = ((z @ query).to(wide) / temperature).masked_fill(~pool, -math.inf).flatten()
                target = torch.tensor(n * T + t + k)
                step.append(F.cross_entropy(s, target))
                wins.append(s[target] > s.index_fill(0, target, -math.inf).max())
        losses.append(torch.stack(step).mean())
        accuracies.append(torch.stack(wins).float().mean())
    return torch.stack(losses), torch.stack(accuracies)


def problem(N, T, K, Dz, Dc, dtype=torch.float32):
    context, targets = torch.randn(N, T, Dc), torch.randn(N, T, Dz)
    predictors = torch.randn(K, Dz, Dc) / Dc**0.5
    return [x.to(dtype).requires_grad_() for x in (context, targets, predictors)]


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("negatives", ["all", "sample", "time"])
def test_equals_a_loop_over_steps_in_float64(size, negatives, normalize):
    inputs = [*problem(*size, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)]
    losses, accuracy = cpc(*inputs, negatives=negatives, normalize=normalize, reduction="none", stats=True)
    expected, expected_accuracy = dense(*inputs, negatives=negatives, normalize=normalize)
    assert losses.shape == size[2:3] and torch.allclose(losses, expected, rtol=1e-10, atol=1e-10)
    assert torch.allclose(accuracy, expected_accuracy)
    weight = torch.linspace(1, 2, len(losses)).double()
    got = torch.autograd.grad(losses @ weight, inputs)
    for ours, theirs in zip(got, torch.autograd.grad(expected @ weight, inputs), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    assert torch.allclose(cpc(*inputs, negatives=negatives, normalize=normalize), losses.mean())
    total = cpc(*inputs, negatives=negatives, normalize=normalize, reduction="sum")
    assert torch.allclose(total, losses.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("negatives, temperature", [("all", 1.0), ("all", 0.01), ("sample", 0.1), ("time", 0.1)])
def test_within_the_bound(backend, negatives, temperature, dtype):
    inputs, options = problem(4, 6, 3, 33, 5, dtype), dict(negatives=negatives, temperature=temperature)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for function, tensors in ((cpc, inputs), (dense, exact_inputs), (dense, inputs)):
        if function is cpc:
            losses = cpc(*tensors, reduction="none", **options)
        else:
            losses, _ = dense(*tensors, **options)
        results.append((losses.detach(), *torch.autograd.grad(losses.mean(), tensors)))
    largest = 50 / temperature  # of a score; a weight carries its rounding
    for name, result, exact, plain in zip(("loss", "dc", "dz", "dW"), *results, strict=True):
        within(result, exact, plain, name, scale=largest if name == "loss" else largest / temperature)


def test_one_sample_has_no_negatives_in_others(backend):
    inputs = problem(1, 5, 4, 3, 2)
    loss, accuracy = cpc(*inputs, negatives="sample", stats=True)
    assert loss == 0 and (accuracy == 1).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, inputs))


def test_larger_than_a_tile(backend):
    inputs = problem(*SIZES[3])
    losses = cpc(*inputs, reduction="none")
    with sslkern.use_backend("reference"):
        expected = cpc(*(x.detach().double() for x in inputs), reduction="none")
    assert torch.allclose(losses.double(), expected, rtol=1e-5)


def test_predictors_are_cast():
    context, targets, predictors = problem(3, 5, 2, 4, 6)
    loss = cpc(context.bfloat16(), targets.bfloat16(), predictors)
    assert loss.dtype == torch.float32 and torch.allclose(loss, cpc(context, targets, predictors), rtol=0.05)
    loss.backward()
    assert predictors.grad.dtype == torch.float32 and predictors.grad.any()


@pytest.mark.parametrize("negatives", ["all", "sample", "time"])
def test_gradcheck(negatives):
    inputs = problem(3, 4, 2, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: cpc(*x, 0.5, negatives=negatives, reduction="none"), inputs)


@pytest.mark.parametrize("negatives", ["all", "sample", "time"])
def test_compiles_without_a_break(negatives):
    torch.compiler.reset()
    inputs = problem(*SIZES[0])
    compiled = torch.compile(cpc, fullgraph=True, backend="aot_eager")
    got, want = compiled(*inputs, negatives=negatives), cpc(*inputs, negatives=negatives)
    assert torch.allclose(got, want)
    for ours, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_module():
    criterion = sslkern.CPCLoss(6, 4, 2, negatives="time")
    context, targets = torch.randn(3, 5, 6), torch.randn(3, 5, 4)
    loss = criterion(context, targets)
    assert torch.equal(loss, cpc(context, targets, criterion.predictors, negatives="time"))
    loss.backward()
    assert criterion.predictors.grad.any() and list(criterion.state_dict()) == ["predictors"]
    with pytest.raises(ValueError, match="steps must"):
        sslkern.CPCLoss(6, 4, 0)


def test_bad_arguments_are_named():
    c, z, w = torch.randn(3, 5, 6), torch.randn(3, 5, 4), torch.randn(2, 4, 6)
    cases = [
        ("context must", (c[0], z, w), {}),
        ("context must", (c.long(), z, w), {}),
        ("context is empty", (c[:0], z[:0], w), {}),
        ("targets must", (c, z[:, :4], w), {}),
        ("targets must", (c, z.double(), w), {}),
        ("targets is on meta", (c, z.to("meta"), w), {}),
        ("predictors must", (c, z, w[0]), {}),
        ("predictors must", (c, z, w.mT), {}),
        ("predictors must", (c, z, w.long()), {}),
        ("predictors must", (c, z, torch.randn(5, 4, 6)), {}),
        ("predictors must", (c, z, w[:0]), {}),
        ("negatives must", (c, z, w), {"negatives": "batch"}),
        ("temperature must not be 0", (c, z, w), {"temperature": 0}),
        ("reduction must", (c, z, w), {"reduction": "avg"}),
    ]
    for message, args, options in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            cpc(*args, **options)
        assert "\n" not in str(error.value)
