import math

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import siglip

from ..ops.dense import within
from .agreement import peer


def dense(image, text, scale, bias, ids=None, normalize=True):
    """[N] losses by the paper's formula: -log sigmoid(label * logit), summed over the texts."""
    N = len(image)
    if normalize:
        image, text = (F.normalize(x.to(scale.dtype), dim=1).to(x.dtype) for x in (image, text))
    logits = (image @ text.T).to(scale.dtype) * scale + bias
    ids = torch.arange(N) if ids is None else ids
    counts = (ids[:, None] != ids) | torch.eye(N, dtype=torch.bool)
    return -(F.logsigmoid((2 * torch.eye(N, dtype=scale.dtype) - 1) * logits) * counts).sum(1)


def inputs(N, D, dtype=torch.float32, scale=10.0, bias=-10.0):
    wide = torch.promote_types(dtype, torch.float32)
    image, text = torch.randn(N, D, dtype=wide), torch.randn(N, D, dtype=wide)
    text += image  # positives stand out
    return (
        image.to(dtype).requires_grad_(),
        text.to(dtype).requires_grad_(),
        torch.tensor(scale, dtype=wide, requires_grad=True),
        torch.tensor(bias, dtype=wide, requires_grad=True),
    )


IDS = torch.arange(130) // 2


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_formula_in_float64(reduction, ids, normalize):
    x = inputs(130, 33, torch.float64)
    loss, losses = siglip(*x, ids=ids, normalize=normalize, reduction=reduction), dense(*x, ids, normalize)
    expected = losses if reduction == "none" else getattr(losses, reduction)()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.linspace(-1, 2, loss.numel()).double().view(loss.shape)
    for got, want in zip(
        torch.autograd.grad(loss, x, upstream), torch.autograd.grad(expected, x, upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N, D", [(1, 5), (17, 33), (200, 64)])
@pytest.mark.parametrize("scale, bias", [(10.0, -10.0), (100.0, -40.0), (1.0, 0.0)])
def test_is_as_exact_as_dense(backend, N, D, dtype, scale, bias):
    x = inputs(N, D, dtype, scale, bias)
    # the formula from the rounded unit rows on: normalisation is the same in all
    unit = [F.normalize(t.detach().float(), dim=1).to(dtype).requires_grad_() for t in x[:2]]
    results = []
    for function, tensors in (
        (siglip, (*unit, *x[2:])),
        (lambda *t, **o: dense(*t, **o).mean(), (*unit, *x[2:])),
        (lambda *t, **o: dense(*t, **o).mean(), [t.detach().double().requires_grad_() for t in (*unit, *x[2:])]),
    ):
        loss = function(*tensors, normalize=False)
        results.append((loss.detach(), *torch.autograd.grad(loss, tensors)))
    for got, plain, want in zip(*results, strict=True):
        # a gradient is the sum of two, of positives and negatives, which are rounded to its type
        within(got, want, plain, scale=want.abs().max().item() * torch.finfo(got.dtype).eps / 2**-23)


def test_equals_open_clip():
    loss_module = peer("open_clip.loss")
    x = inputs(40, 16)
    a, b = (F.normalize(t, dim=1) for t in x[:2])
    loss, expected = siglip(*x), loss_module.SigLipLoss()(a, b, *x[2:])
    torch.testing.assert_close(loss, expected)
    for got, want in zip(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_row_without_negatives_has_its_positive_alone(backend):
    x, same = inputs(12, 8, scale=2.0, bias=1.0), torch.zeros(12, dtype=torch.long)
    loss = siglip(*x, ids=same)
    positive = -F.logsigmoid(2.0 * F.cosine_similarity(x[0], x[1]) + 1.0).mean()
    torch.testing.assert_close(loss, positive)
    got, want = (torch.autograd.grad(y, x[0])[0] for y in (loss, positive))
    torch.testing.assert_close(got, want)


def test_tiny_losses_keep_their_digits(backend):
    """Orthogonal pairs, identical within: logits are 30 and -20, where 1 + exp(-20) is 1 in fp32."""
    z = torch.eye(20, 32)
    loss = siglip(z, z, 50.0, -20.0).double()
    expected = dense(z.double(), z.double(), torch.tensor(50.0).double(), -20.0).mean()
    assert 0 < expected < 1e-7 and abs(loss / expected - 1) < 1e-5


def test_small_temperature(backend):
    z = F.normalize(torch.randn(64, 32), dim=1)
    z[1] = z[0]  # a negative with the logit of a positive
    loss = siglip(z, z.flip(0), 100.0, -50.0)
    torch.testing.assert_close(
        loss.double(),
        dense(z.double(), z.flip(0).double(), torch.tensor(100.0).double(), -50.0).mean(),
        rtol=1e-5,
        atol=0,
    )


def test_an_infinite_bias_has_the_gradient_of_the_formula(backend):
    """sigmoid(inf) = 1, and only of pairs that are not left out."""
    image, text = torch.eye(2, 3).requires_grad_(), torch.eye(2, 3).requires_grad_()
    loss = siglip(image, text, 3.0, torch.tensor(math.inf), normalize=False)
    for g in torch.autograd.grad(loss, (image, text)):
        assert torch.equal(g, 1.5 * torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))


def test_gradcheck():
    x = inputs(4, 3, torch.float64, scale=2.0, bias=-1.0)
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(lambda *x, r=reduction: siglip(*x, reduction=r), x)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_break(backend, reduction):
    torch.compiler.reset()
    x = inputs(9, 8)
    compiled = torch.compile(siglip, fullgraph=True, backend="aot_eager")
    got, want = (f(*x, reduction=reduction).sum() for f in (compiled, siglip))
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, x), torch.autograd.grad(want, x), strict=True):
        torch.testing.assert_close(a, b)


def test_module():
    image, text, ids = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 1, 2, 3])
    criterion = sslkern.SigLIPLoss(normalize=False, reduction="sum")
    expected = siglip(image, text, 10.0, -10.0, ids=ids, normalize=False, reduction="sum")
    assert torch.equal(criterion(image, text, 10.0, -10.0, ids=ids), expected)
    with pytest.raises(ValueError, match="reduction must"):
        sslkern.SigLIPLoss(reduction="max")


def test_bad_arguments_are_named():
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    cases = [
        ("image must", (a[0], b, 1.0, 0.0), {}),
        ("image is empty", (a[:0], b[:0], 1.0, 0.0), {}),
        ("text must", (a, b[:3], 1.0, 0.0), {}),
        ("text must", (a, b.half(), 1.0, 0.0), {}),
        ("logit_scale must", (a, b, torch.ones(2), 0.0), {}),
        ("logit_bias must", (a, b, 1.0, float("nan")), {}),
        ("logit_bias is on meta", (a, b, 1.0, torch.zeros((), device="meta")), {}),
        ("ids must", (a, b, 1.0, 0.0), {"ids": torch.arange(3)}),
        ("reduction must", (a, b, 1.0, 0.0), {"reduction": "max"}),
    ]
    for message, args, options in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            siglip(*args, **options)
        assert "\n" not in str(error.value)
