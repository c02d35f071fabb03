"""torch.func and forward mode, for everything exported: the derivatives of a plain backward, or one sentence."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import sslkern

from .examples import LOSSES, OPS, value

CACHED = {"CachedLoss"}
CALLS = {name: make for name, make in (LOSSES | OPS).items() if name not in CACHED and "_bwd" not in name}


def function_of_features(name, dtype=torch.float32):
    """A scalar function of the arguments that learn, and these."""
    example = CALLS[name](dtype=dtype)
    if isinstance(example.target, nn.Module):
        example.target.eval()  # buffers stay as they are
    places = [i for i, x in enumerate(example.tensors()) if x.requires_grad]

    def function(*features: Tensor) -> Tensor:
        call = example
        for place, x in zip(places, features, strict=True):
            call = call.with_tensor(place, x)
        parts = [x for x in value(call) if x.is_floating_point()]
        return sum(x.masked_fill(x == -torch.inf, 0).sum() for x in parts[:1])

    return function, [example.tensors()[i] for i in places]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls the kernels one by one
def test_func_grad_and_vmap(name):
    function, leaves = function_of_features(name)
    want = torch.autograd.grad(function(*leaves), leaves)
    primals, argnums = [x.detach() for x in leaves], tuple(range(len(leaves)))
    for got in (
        torch.func.grad(function, argnums)(*primals),
        torch.func.jacrev(function, argnums)(*primals),
        [x[0] for x in torch.func.vmap(torch.func.grad(function, argnums))(*(x[None] for x in primals))],
    ):
        for ours, plain in zip(got, want, strict=True):
            assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)


def derivative_along(function, primals, tangents, way) -> Tensor:
    if way == "jvp":
        return torch.func.jvp(function, tuple(primals), tuple(tangents))[1]
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(x.requires_grad_(way == "learning"), t) for x, t in zip(primals, tangents, strict=True)
        ]
        return forward_ad.unpack_dual(function(*duals)).tangent


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_right_or_refused(name):
    function, leaves = function_of_features(name)
    grads = torch.autograd.grad(function(*leaves), leaves)
    tangents = [torch.randn_like(x) for x in leaves]
    want = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    for way in ("jvp", "dual", "learning"):
        try:
            got = derivative_along(function, [x.detach() for x in leaves], tangents, way)
        except NotImplementedError as error:
            assert "no forward-mode derivatives" in str(error) and "\n" not in str(error)
        else:
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def test_forward_mode_of_the_ops_is_refused():
    q, k = torch.randn(4, 3), torch.randn(5, 3)
    for op in (
        lambda q: sslkern.ops.similarity_lse(q, k),
        lambda q: sslkern.ops.similarity_softplus(q, k),
        lambda q: sslkern.ops.similarity_softplus(q, k, rows=True),
        lambda q: sslkern.ops.similarity_topk(q, k, 2)[0],
        lambda q: sslkern.ops.sampled_similarity(q, k, torch.zeros(4, 1).long()),
        lambda q: sslkern.functional.siglip(q, k[:4], 3.0, -1.0),
    ):
        for transform in (torch.func.jacfwd, torch.func.hessian):
            with pytest.raises(NotImplementedError, match="no (forward-mode|second) derivatives"):
                transform(lambda q, op=op: op(q).sum())(q)
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            torch.func.linearize(op, q)
    with forward_ad.dual_level():  # what has no tangent is computed
        assert torch.equal(sslkern.ops.similarity_lse(q, k), sslkern.ops.similarity_lse(q, k))
    cached = LOSSES["CachedLoss"](D=3).target
    with pytest.raises(NotImplementedError, match="CachedLoss"):
        torch.func.grad(lambda x: cached(x, x))(q)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_second_derivative_is_right_or_refused(name):
    """By each argument that learns, and by a factor of the gradient from above; of eager code and under torch.func."""
    function, leaves = function_of_features(name, torch.float64)
    factor = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    directions = [torch.randn_like(x) for x in leaves]

    def slope(factor, *leaves):
        """The derivative along the directions."""
        grads = torch.autograd.grad(factor * function(*leaves), leaves, create_graph=True, allow_unused=True)
        return sum((g * d).sum() for g, d in zip(grads, directions, strict=True) if g is not None)

    def slope_by_func(factor, *leaves):
        grads = torch.func.grad(lambda *leaves: factor * function(*leaves), tuple(range(len(leaves))))(*leaves)
        return sum((g * d).sum() for g, d in zip(grads, directions, strict=True))

    inputs = [factor, *leaves]
    for number, x in enumerate(inputs):
        moves, step = torch.randn_like(x), 1e-5
        sides = []
        for sign in (1, -1):
            moved = [y.detach().requires_grad_() for y in inputs]
            moved[number] = (x.detach() + sign * step * moves).requires_grad_()
            sides.append(slope(*moved).detach())
        want = (sides[0] - sides[1]) / (2 * step)

        def eager(x=x):
            out = slope(*inputs)
            (got,) = torch.autograd.grad(out, x, allow_unused=True) if out.requires_grad else (None,)
            return torch.zeros_like(x) if got is None else got

        def func(number=number):
            return torch.func.grad(slope_by_func, number)(*(y.detach() for y in inputs))

        for way in (eager, func):
            try:
                got = (way() * moves).sum()
            except NotImplementedError as error:
                assert "no second derivatives" in str(error) and "\n" not in str(error)
            else:
                assert torch.allclose(got, want, rtol=1e-4, atol=1e-6), (name, number, way.__name__)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_many_gradients_at_a_time(name):
    """`is_grads_batched`, as `torch.autograd.functional.jacobian(vectorize=True)` asks for it."""
    function, leaves = function_of_features(name)
    out = function(*leaves)
    want = torch.autograd.grad(out, leaves, retain_graph=True)
    got = torch.autograd.grad(out, leaves, torch.tensor([1.0, -2.0], dtype=out.dtype), is_grads_batched=True)
    for ours, plain in zip(got, want, strict=True):
        assert torch.allclose(ours, torch.stack((plain, -2 * plain)), rtol=1e-4, atol=1e-5)
