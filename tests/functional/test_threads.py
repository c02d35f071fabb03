"""The same bits for any number of threads, where torch shares its work among them: from 32,768 numbers on."""

import pytest
import torch
import torch.nn.functional as F

from sslkern import functional, ops
from sslkern.common.sums import log_total, mean, total

from ..examples import LOSSES, OPS, value_and_gradients

N, D, MANY = 130, 768, 40_000


def rows(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def named(n):
    return torch.arange(MANY * 4).view(MANY, 4) % n


CASES = {
    "frozen keys": (lambda a, b, T: functional.info_nce(a, b.detach(), temperature=T), (N, D), (N, D)),
    "queue": (lambda a, b, T: functional.moco(a, a, b, T), (N, D), (300, D)),
    "in batch": (lambda a, b, T: functional.info_nce(a, a, b, T, in_batch=True), (N, D), (300, D)),
    "margin": (lambda a, b, T: functional.mnrl(a, b, None, T, margin=0.1), (N, D), (N, D)),
    "topk": (lambda a, b, T: ops.similarity_topk(a, b, 5, scale=T)[0].sum(), (N, D), (N, D)),
    "nce": (lambda a, b, T: functional.nce(a, b.detach(), named(300)[:N].repeat(1, 64), T), (N, D), (300, D)),
    "nce, bank": (lambda a, b, T: functional.nce(a, b, named(300)[:N].repeat(1, 64), T), (N, D), (300, D)),
    "nce, many": (lambda a, b, T: functional.nce(a, b, named(300), T), (MANY, 8), (300, 8)),
    "queue, many": (lambda a, b, T: functional.info_nce(a, a.roll(1, 1), b.detach(), T), (MANY, 8), (4, 8)),
    "negatives, many": (lambda a, b, T: functional.info_nce(a, a.roll(1, 1), b, T), (MANY, 8), (4, 8)),
    "alignment": (lambda a, b, T: functional.alignment(a, b) + 0 * T, (MANY, 8), (MANY, 8)),
    "dim": (lambda a, b, T: functional.deep_infomax(a, b, "infonce", T), (64, 8), (64, 625, 8)),
}


def same_bits(compute, counts=(1, 2, 3)):
    before, results = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_losses(name):
    loss, *shapes = CASES[name]
    tensors = [*(rows(*shape) for shape in shapes), torch.tensor(0.1)]

    def compute():
        leaves = [x.clone().requires_grad_() for x in tensors]
        value = loss(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)

    same_bits(compute)


# Products of torch's have the bits of torch's.
PRODUCTS = ("cpc", "CPCLoss", "nt_xent_multi_view", "NTXentMultiView", "sup_con: several", "mnrl: guide", "CachedLoss")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LOSSES | OPS if not name.startswith(PRODUCTS)])
def test_everything(name):
    def compute():
        torch.manual_seed(0)
        return value_and_gradients((LOSSES | OPS)[name](N=N, D=D))

    same_bits(compute, (1, 3, 4))


def test_sums_are_sums():
    for size in (1, 32_767, 32_768, 99_840, 1_100_003):
        x = torch.randn(size)
        for ours, exact in ((total(x), x.double().sum()), (mean(x), x.double().mean())):
            assert abs(ours - exact) <= 1e-6 * x.abs().sum()
        assert log_total(x).item() == pytest.approx(x.double().logsumexp(0).item(), rel=1e-6)
    x = torch.full((40_000,), -torch.inf)
    x[7] = 2.0
    assert log_total(x) == 2


def test_a_log_sum_exp_of_many():
    x = torch.randn(70_000)

    def compute():
        leaf = x.clone().requires_grad_()
        value = log_total(leaf)
        return value.detach(), *torch.autograd.grad(value, leaf)

    same_bits(compute)
    value, grad = compute()
    assert torch.allclose(grad, x.softmax(0), rtol=1e-5, atol=0) and torch.allclose(value, x.logsumexp(0))
