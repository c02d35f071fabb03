import math

import pytest
import torch

from sslkern.ops import logsumexp

from ..functional.agreement import refuses

NOTHING = -math.inf


def test_equals_torch_where_something_is_left():
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x[1, 2] = NOTHING
        x[1, 2, 3] = 0.5
        x[0, 0, 0] = 800.0
    for dim in (-1, 0, 1):
        got, want = logsumexp(x, dim), torch.logsumexp(x, dim)
        assert torch.equal(got, want)
        g = torch.randn_like(got)
        assert torch.equal(*(torch.autograd.grad(y, x, g)[0] for y in (got, want)))


@pytest.mark.parametrize("shape, dim", [((3, 4), 1), ((3, 0), 1), ((0, 4), 0)])
def test_nothing_left_has_no_gradient(shape, dim):
    x = torch.full(shape, NOTHING, requires_grad=True)
    out = logsumexp(x, dim)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (out == NOTHING).all() and (grad == 0).all()


def test_a_row_of_its_own_decides():
    x = torch.tensor([[NOTHING, NOTHING], [NOTHING, 2.0], [math.nan, 1.0]], requires_grad=True)
    out = logsumexp(x)
    assert out[0] == NOTHING and out[1] == 2 and out[2].isnan()
    (grad,) = torch.autograd.grad(out[:2].sum(), x)
    assert torch.equal(grad[:2], torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


def test_compiles():
    torch.compiler.reset()
    x = torch.randn(3, 4)
    x[1] = NOTHING
    compiled = torch.compile(logsumexp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), logsumexp(x))


def test_bad_arguments_are_named():
    x = torch.randn(3, 4)
    cases = [("x must", (y,), {}) for y in (None, [1.0], x.long(), x.to(torch.complex64), x.to_sparse())]
    cases.append(("dim must", (torch.tensor(1.0), 0), {}))
    refuses(logsumexp, [*cases, *(("dim must", (x, dim), {}) for dim in (2, -3, None, 0.5, (0, 1), "a"))])
