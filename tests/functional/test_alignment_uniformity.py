import math

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import alignment, alignment_uniformity, uniformity

from ..ops.dense import within
from .agreement import compiles, refuses


def dense(z0, z1, alpha=2.0, t=2.0, uniformity_weight=1.0, normalize=True):
    """As published: all distances."""
    z0, z1 = (F.normalize(z0), F.normalize(z1)) if normalize else (z0, z1)
    spread = [torch.pdist(z).pow(2).mul(-t).exp().mean().log() for z in (z0, z1)]
    return (z0 - z1).norm(dim=1).pow(alpha).mean() + uniformity_weight * sum(spread) / 2


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("alpha, t", [(2.0, 2.0), (1.0, 7.0), (4.0, 0.5)])
def test_dense(normalize, alpha, t):
    z0, z1 = (torch.randn(9, 4).double().requires_grad_() for _ in range(2))
    options = dict(alpha=alpha, t=t, uniformity_weight=0.7, normalize=normalize)
    got, want = alignment_uniformity(z0, z1, **options), dense(z0, z1, **options)
    assert abs(got - want) < 1e-10
    for a, b in zip(*(torch.autograd.grad(x, (z0, z1)) for x in (got, want)), strict=True):
        assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("N, D", [(2, 3), (17, 33), (130, 64)])
def test_kernels(backend, N, D, normalize):
    z0, z1 = (0.5 * torch.randn(N, D)).requires_grad_(), (0.5 * torch.randn(N, D)).requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (z0, z1)]
    got, plain = alignment_uniformity(z0, z1, normalize=normalize), dense(z0, z1, normalize=normalize)
    exact = dense(*wide, normalize=normalize)
    largest = 1.0 if normalize else max((x * x).sum(1).max().item() for x in (z0, z1))
    within(got, exact, plain, "loss", 4 * largest)  # t |x|^2 and its like cancel in a distance
    grads = (torch.autograd.grad(x, leaves) for x, leaves in ((got, (z0, z1)), (exact, wide), (plain, (z0, z1))))
    for a, b, c in zip(*grads, strict=True):
        within(a, b, c, "gradient", 4 * largest * b.abs().max().item())  # weights carry the rounding of t |x|^2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(backend, dtype):
    z = torch.randn(60, 32).to(dtype)
    rounded = F.normalize(z.float()).to(dtype).double()
    exact = (rounded @ rounded.T * 4 - 4).fill_diagonal_(-math.inf).logsumexp((0, 1)) - math.log(60 * 59)
    assert uniformity(z).dtype == torch.float32 and torch.allclose(uniformity(z).double(), exact, rtol=1e-5)
    assert alignment(z, z + 0) == 0


def test_rows_at_the_same_place(backend):
    z = torch.ones(5, 3, requires_grad=True)
    assert torch.allclose(uniformity(z), torch.zeros(()), atol=1e-6)
    for alpha in (1, 2):
        (grad,) = torch.autograd.grad(alignment(z, z.detach(), alpha), z)
        assert (grad == 0).all()


def test_a_single_row_has_no_pairs(backend):
    z = torch.randn(1, 3, requires_grad=True)
    for normalize in (True, False):
        (grad,) = torch.autograd.grad(uniformity(z, normalize=normalize), z)
        assert uniformity(z, normalize=normalize) == 0 and (grad == 0).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize):
    z0, z1 = (torch.randn(4, 3).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: alignment_uniformity(a, b, normalize=normalize), (z0, z1))


def test_compiles_without_a_break(backend):
    compiles(alignment_uniformity, torch.randn(9, 8), torch.randn(9, 8))
    compiles(alignment_uniformity, torch.randn(9, 8), torch.randn(9, 8), normalize=False)


def test_module():
    z0, z1 = torch.randn(5, 3), torch.randn(5, 3)
    criterion = sslkern.AlignmentUniformityLoss(alpha=1, t=3, uniformity_weight=0.5)
    assert torch.equal(criterion(z0, z1), alignment_uniformity(z0, z1, 1, 3, 0.5)) and "t=3" in repr(criterion)


def test_bad_arguments_are_named():
    z = torch.randn(4, 3)
    refuses(
        alignment_uniformity,
        [
            ("z0 must", (z[0], z), {}),
            ("z1 must", (z, z[:3]), {}),
            ("alpha must", (z, z), {"alpha": 0.5}),
            ("t must", (z, z), {"t": 0}),
            ("uniformity_weight must", (z, z), {"uniformity_weight": -1.0}),
        ],
    )
    refuses(uniformity, [("z is empty", (z[:0],), {})])
