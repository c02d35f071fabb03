"""Every loss under autocast, torch.func and torch.compile with changing sizes, and differentiated twice."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import cpc, info_nce, mnrl, nt_xent

D = 16
GUIDE = torch.randn(8, 4), torch.randn(8, 4)
LOSSES = {  # loss(a, b [N, D], temperature)
    "nt_xent": nt_xent,
    "info_nce, one way": lambda a, b, T: info_nce(a, b, temperature=T),
    "info_nce, two way": lambda a, b, T: info_nce(a, b, temperature=T, two_way=True),
    "info_nce, negatives": lambda a, b, T: info_nce(a, b, a.flip(1), T, in_batch=True),
    "info_nce, frozen": lambda a, b, T: info_nce(a, b.detach(), b.detach().flip(1), T) + 0 * b.sum(),
    "mnrl": lambda a, b, T: mnrl(a, b, b.flip(1).unsqueeze(1), T, directions=("query_to_doc", "query_to_query")),
    "mnrl, margin": lambda a, b, T: mnrl(a, b, None, T, margin=0.1),
    "cpc": lambda a, b, T: cpc(a.view(-1, 4, D), b.view(-1, 4, D), torch.eye(D).expand(2, D, D), T),
}
GUIDED = {"mnrl, guide": lambda a, b, T: mnrl(a, b, None, T, guide=(a.detach().roll(1), b.detach()))}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
with_guided = pytest.mark.parametrize("loss", (LOSSES | GUIDED).values(), ids=(LOSSES | GUIDED).keys())


def inputs(N=8, dtype=torch.float32):
    a, b = torch.randn(N, D), torch.randn(N, D)
    return [x.to(dtype).requires_grad_() for x in (a, b + a)] + [torch.tensor(0.2, requires_grad=True)]


def value_and_gradients(loss, tensors):
    value = loss(*tensors)
    return value.detach(), *torch.autograd.grad(value, tensors)


@with_guided
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, loss, dtype):
    tensors, autocast = inputs(dtype=dtype), torch.float16 if dtype == torch.float16 else torch.bfloat16
    want = value_and_gradients(loss, tensors)
    with torch.autocast("cpu", dtype=autocast):
        value = loss(*tensors)
        inside = torch.autograd.grad(value, tensors, retain_graph=True)
    outside = torch.autograd.grad(value, tensors)
    assert value.dtype == torch.float32
    assert all(x.dtype == g.dtype == h.dtype for x, g, h in zip(tensors, inside, outside, strict=True))
    # predictors and guides are torch's own products, which autocast rounds
    tolerance = 1e-5 if loss not in (LOSSES["cpc"], GUIDED["mnrl, guide"]) else 3e-2
    for grads in (inside, outside):
        for ours, plain in zip((value, *grads), want, strict=True):
            assert torch.allclose(ours, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())


@every_loss
def test_autocast_changes_nothing_in_compiled_code(loss):
    torch.compiler.reset()
    tensors = inputs()
    want = value_and_gradients(loss, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors)
    assert value.dtype == torch.float32
    tolerance = 1e-5 if loss is not LOSSES["cpc"] else 3e-2
    for ours, plain in zip((value, *torch.autograd.grad(value, tensors)), want, strict=True):
        assert torch.allclose(ours, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())
