"""Pairs of rows on their way into a loss, which have no public op: each backend against the formulas in float64."""

import pytest
import torch

from sslkern.backends import load
from sslkern.ops.unit_pairs import unit_pairs

from . import dense

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(0, 3), (1, 1), (2, 8), (17, 33), (33, 128), (5, 130), (3, 768), (2, 4100)]


def forward(x, y, normalize):
    """z, norm and cosine by the formulas, in the type of x; cosine of z as it is rounded."""
    z = torch.cat((x, y))
    norm = z.norm(dim=1).clamp_min(1e-12)
    z = z / norm.unsqueeze(1) if normalize else z
    return z, norm, (z[: len(x)] * z[len(x) :]).sum(1)


def backward(z, norm, pull, da, db):
    a, b = z.chunk(2)
    grads = []
    for du, own, other, lengths in zip((da, db), (a, b), (b, a), norm.chunk(2), strict=True):
        du = du - pull.unsqueeze(1) * other
        grads.append((du - own * (du * own).sum(1, keepdim=True)) / lengths.unsqueeze(1))
    return grads


def implementation(backend):
    return load(backend.partition("-")[0], "unit_pairs")


@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "as they are"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(backend, dtype, normalize):
    for N, D in SIZES:
        x, y = (3 * torch.randn(N, D)).to(dtype), torch.randn(N, D).to(dtype)
        z, norm, cosine = implementation(backend).unit_pairs_fwd(x, y, normalize)
        assert z.dtype == dtype and cosine.dtype == torch.float32
        if not normalize:
            assert norm is None and torch.equal(z, torch.cat((x, y)))
        else:
            exact, plain = forward(x.double(), y.double(), True), forward(x.float(), y.float(), True)
            dense.within(z, exact[0], plain[0].to(dtype), "z")
            top = exact[1].amax().item() if N else 0.0  # sums of thousands of squares in few lanes, rooted
            dense.within(norm, exact[1], plain[1], "norm", scale=4 * top)
        dots = (z[:N].double() * z[N:].double()).sum(1)
        plain = (z[:N].float() * z[N:].float()).sum(1)
        size = (z[:N].double() * z[N:].double()).abs().sum(1).amax().item() if N else 0.0
        dense.within(cosine, dots, plain, "cosine", scale=size)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "as they are"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(backend, dtype, normalize, needs):
    for N, D in SIZES:
        z, norm, _ = forward(torch.randn(N, D), torch.randn(N, D), normalize)
        z, norm = z.to(dtype), norm if normalize else None
        pull, da, db = torch.randn(N), torch.randn(N, D), torch.randn(N, D)
        sides = (da if needs[0] else None, db if needs[1] else None)
        got = implementation(backend).unit_pairs_bwd(z, norm, pull, *sides, *needs)
        if normalize:
            exact = backward(z.double(), norm.double(), pull.double(), da.double(), db.double())
            plain = backward(z.float(), norm, pull, da, db)
        else:
            a, b = z.chunk(2)
            exact, plain = (
                [du.to(t) - pull.to(t).unsqueeze(1) * other.to(t) for du, other in ((da, b), (db, a))]
                for t in (torch.float64, torch.float32)
            )
        for grad, need, want, rounded in zip(got, needs, exact, plain, strict=True):
            assert (grad is not None) == need
            if need:
                assert grad.dtype == dtype
                terms = want.abs().amax().item() + pull.abs().amax().item() if N else 0.0
                dense.within(grad, want, rounded.to(dtype), "gradient", scale=4 * terms)


def test_rows_of_length_0_and_of_nan(backend):
    x, y = torch.randn(3, 40), torch.randn(3, 40)
    x[0], x[1, 5], y[2, 7] = 0, torch.nan, torch.inf
    z, norm, cosine = implementation(backend).unit_pairs_fwd(x, y, True)
    assert (z[0] == 0).all() and norm[0] == 1e-12 and cosine[0] == 0
    assert z[1].isnan().all() and cosine[1].isnan() and norm[1].isnan()
    assert norm[5] == torch.inf and z[5, 7].isnan() and (z[5, :7] == 0).all()


def test_the_same_bits_wherever_rows_lie(backend):
    """Rows that begin on no multiple of 16 bytes are summed in the same order."""
    x, y = torch.randn(9, 64), torch.randn(9, 64)
    results = []
    for shift in (0, 1, 3):
        moved = [torch.empty(9 * 64 + shift)[shift:].view(9, 64).copy_(rows) for rows in (x, y)]
        results.append(implementation(backend).unit_pairs_fwd(*moved, True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_without_memory_for_each_number(backend):
    """Those of a sum are one number, expanded."""
    x, y = torch.randn(2, 5, 12, requires_grad=True)
    grads = [
        torch.autograd.grad([*unit_pairs(x, y)], (x, y), upstream)
        for upstream in (
            [torch.ones(()).expand(5, 12), torch.ones(()).expand(5, 12), torch.ones(()).expand(5)],
            [torch.ones(5, 12), torch.ones(5, 12), torch.ones(5)],
        )
    ]
    for ours, plain in zip(*grads, strict=True):
        assert torch.equal(ours, plain)
