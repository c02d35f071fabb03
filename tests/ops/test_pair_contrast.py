"""`pair_contrast` against the formula that compiled code traces: similarity_lse, dots and softplus under autograd."""

import math

import pytest
import torch

from sslkern.functional import _common, info_nce, nt_xent
from sslkern.ops.pair_contrast import pair_contrast

MODES = ["views", "one_way", "two_way"]


def traced(monkeypatch, *args):
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(_common, "small", lambda *sizes: True)
        return _common.contrast(*args)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode, normalize):
    x, y = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 2, 0, 1])

    def losses(x, y, scale):
        return pair_contrast(x, y, scale, ids, mode, normalize, False)[0]

    assert torch.autograd.gradcheck(losses, (x, y, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("N, D", [(1, 1), (2, 3), (33, 64), (130, 129)])  # 64 and more features keep their scores
def test_equals_the_traced_formula(backend, monkeypatch, mode, N, D, dtype):
    x, y = torch.randn(N, D), torch.randn(N, D)
    results = []
    for call in (pair_contrast, lambda *args: traced(monkeypatch, *args)):
        a, b = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
        scale = torch.tensor(5.0, requires_grad=True)
        losses, positive, best = call(a, b, scale, None, mode, True, True)
        (losses * torch.arange(1, 1 + losses.numel()).view_as(losses)).sum().backward()
        results.append((losses.detach(), positive, best, a.grad.float(), b.grad.float(), scale.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, formula in zip(*results, strict=True):
        assert torch.allclose(ours, formula, rtol=tolerance, atol=tolerance * (1 + formula.abs().max().item()))


@pytest.mark.parametrize("mode", MODES)
def test_row_without_negatives_gets_zero_whatever_arrives(backend, mode):
    x, y = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    losses, _, _ = pair_contrast(x, y, 2.0, torch.zeros(3, dtype=torch.int64), mode, True, False)
    assert (losses == 0).all()
    losses.backward(torch.full_like(losses, math.nan))
    assert (x.grad == 0).all() and (y.grad == 0).all()


def test_after_inference_mode(backend):
    x = torch.randn(7, 4)
    with torch.inference_mode():
        expected = nt_xent(x, x + 1)
    x.requires_grad_()
    loss = nt_xent(x, x + 1)  # meets the row numbers that inference mode made
    loss.backward()
    assert torch.equal(loss.detach(), expected) and x.grad.isfinite().all()


@pytest.mark.parametrize("loss", [nt_xent, lambda x, y: info_nce(x, y, two_way=True)])
def test_second_derivative_says_so(backend, loss):
    x, y = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(x, y), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", ["views", "one_way", "two_way"])
def test_opcheck(backend, mode):
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 5)
    scale = torch.tensor(2.0, requires_grad=True)
    ids = torch.arange(6).repeat(2 if mode == "views" else 1)
    name = backend.partition("-")[0]
    keep = len(ids) if name == "cpu" else 0
    args = (x.requires_grad_(), y.requires_grad_(), scale, 1.0, ids, mode, True, False, keep, name, name)
    torch.library.opcheck(torch.ops.sslkern.pair_contrast.default, args)
