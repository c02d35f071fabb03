import math

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import nt_xent


def dense(z0, z1, temperature, ids=None):
    """[2N] losses, written as the paper does: cross-entropy of the other view among all but oneself."""
    N, z = len(z0), F.normalize(torch.cat((z0, z1)), dim=1)
    ids = torch.arange(N) if ids is None else ids
    positive = torch.arange(2 * N).roll(N)
    s = z @ z.T / temperature
    out = ids.repeat(2)[:, None] == ids.repeat(2)
    out[torch.arange(2 * N), positive] = False
    return F.cross_entropy(s.masked_fill(out, -math.inf), positive, reduction="none")


@pytest.mark.parametrize("N, D", [(2, 3), (17, 33), (130, 64)])
@pytest.mark.parametrize("temperature", [0.5, 0.05, -0.5])
def test_value_and_gradient(backend, N, D, temperature):
    z0, z1 = torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)
    T = torch.tensor(temperature, requires_grad=True)
    losses = nt_xent(z0, z1, T, reduction="none")
    expected = dense(z0.double(), z1.double(), T.double())
    assert losses.shape == (2 * N,) and torch.allclose(losses.double(), expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(
        torch.autograd.grad(losses.mean(), (z0, z1, T)), torch.autograd.grad(expected.mean(), (z0, z1, T)), strict=True
    ):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)
    assert torch.allclose(nt_xent(z0, z1, temperature), losses.mean())
    assert torch.allclose(nt_xent(z0, z1, temperature, reduction="sum"), losses.sum())
    assert torch.allclose(nt_xent(z0, z1, logit_scale=1 / temperature), losses.mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(backend, dtype):
    z0, z1 = torch.randn(60, 32).to(dtype), torch.randn(60, 32).to(dtype)
    loss = nt_xent(z0, z1, 0.1)
    rounded = [F.normalize(z.float(), dim=1).to(dtype).double() for z in (z0, z1)]
    z = torch.cat(rounded)
    s = (z @ z.T / 0.1).fill_diagonal_(-math.inf)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss.double(), F.cross_entropy(s, torch.arange(120).roll(60)), rtol=1e-5)


def test_tiny_losses_keep_their_digits(backend):
    z = torch.eye(20, 32)  # orthogonal samples, identical views: the loss is log(1 + 38 exp(-1 / T))
    T = 0.05
    losses = nt_xent(z, z, T, reduction="none")
    assert torch.allclose(losses.double(), torch.tensor(math.log1p(38 * math.exp(-1 / T))).double(), rtol=1e-5)
    assert 0 < losses.max() < 1e-7


def test_equal_ids_are_not_negatives(backend):
    z0, z1, ids = torch.randn(12, 8), torch.randn(12, 8), torch.arange(12) // 3
    assert torch.allclose(nt_xent(z0, z1, 0.2, ids=ids, reduction="none"), dense(z0, z1, 0.2, ids), atol=1e-5)
    assert nt_xent(z0, z1, ids=torch.zeros(12, dtype=torch.long)) == 0  # no negatives at all


def test_one_sample_has_no_negatives(backend):
    z0, z1 = torch.randn(1, 8, requires_grad=True), torch.randn(1, 8)
    loss = nt_xent(z0, z1)
    loss.backward()
    assert loss == 0 and (z0.grad == 0).all()


def test_zero_vectors_are_finite(backend):
    z = torch.zeros(4, 8, requires_grad=True)
    assert nt_xent(z, z + 0).isfinite()


def test_share_of_rows_that_win(backend):
    z0 = F.normalize(torch.randn(30, 8), dim=1)
    z1 = z0 + 0.5 * torch.randn(30, 8)
    _, share = nt_xent(z0, z1, 0.2, stats=True)
    z = F.normalize(torch.cat((z0, z1)), dim=1)
    nearest = (z @ z.T).fill_diagonal_(-math.inf).argmax(1)
    assert torch.allclose(share, (nearest == torch.arange(60).roll(30)).float().mean()) and 0 < share < 1


def test_gradcheck():
    z0, z1 = torch.randn(4, 3).double().requires_grad_(), torch.randn(4, 3).double().requires_grad_()
    T = torch.tensor(0.3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b, t: nt_xent(a, b, t, reduction="none"), (z0, z1, T))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(backend, dynamic):
    torch.compiler.reset()
    z0, z1 = torch.randn(9, 8, requires_grad=True), torch.randn(9, 8)
    T = torch.tensor(0.2, requires_grad=True)
    # aot_eager: the trace is what is tested, not the compiler's code
    compiled = torch.compile(nt_xent, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    (loss, share), (expected, expected_share) = compiled(z0, z1, T, stats=True), nt_xent(z0, z1, T, stats=True)
    assert torch.allclose(loss, expected) and share == expected_share
    for got, want in zip(torch.autograd.grad(loss, (z0, T)), torch.autograd.grad(expected, (z0, T)), strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_module():
    z0, z1 = torch.randn(5, 3), torch.randn(5, 3)
    criterion = sslkern.NTXentLoss(0.2, reduction="sum")
    assert torch.equal(criterion(z0, z1), nt_xent(z0, z1, 0.2, reduction="sum"))
    assert torch.equal(criterion(z0, z1, logit_scale=3.0), nt_xent(z0, z1, logit_scale=3.0, reduction="sum"))
    assert "temperature=0.2" in repr(criterion)
    learned = sslkern.NTXentLoss(torch.nn.Parameter(torch.tensor(0.2)))
    learned(z0, z1).backward()
    assert learned.temperature.grad != 0 and list(learned.state_dict()) == ["temperature"]
    with pytest.raises(ValueError, match="temperature"):
        sslkern.NTXentLoss(temperature=0)


def test_bad_arguments_are_named():
    z = torch.randn(4, 3)
    cases = [
        ("z0 must", (z[0], z), {}),
        ("z0 must", ([1.0], z), {}),
        ("z0 must", (z.long(), z), {}),
        ("z0 is empty", (z[:0], z[:0]), {}),
        ("z1 must", (z, z[:3]), {}),
        ("z1 must", (z, z[:, :2]), {}),
        ("z1 must", (z, z.double()), {}),
        ("z1 is on meta", (z, z.to("meta")), {}),
        ("temperature must not be 0", (z, z, 0), {}),
        ("temperature must", (z, z, math.inf), {}),
        ("temperature must", (z, z, "0.1"), {}),
        ("temperature must", (z, z, torch.ones(2)), {}),
        ("temperature is on meta", (z, z, torch.ones((), device="meta")), {}),
        ("logit_scale must", (z, z), {"logit_scale": math.nan}),
        ("ids must", (z, z), {"ids": torch.arange(3)}),
        ("ids must be int64", (z, z), {"ids": torch.ones(4)}),
        ("reduction must", (z, z), {"reduction": "avg"}),
        ("strategy must", (z, z), {"strategy": "tree"}),
        ("group must be None, 'world'", (z, z), {"group": "words"}),
        ("group must be None, 'world'", (z, z), {"group": z}),
        ("grad_reduce must", (z, z), {"grad_reduce": "none"}),
    ]
    for message, args, options in cases:
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=message) as error:
            nt_xent(*args, **options)
        assert "\n" not in str(error.value)
