"""What holds for everything that is exported: over the table of calls in examples.py."""

import ast
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sslkern
from sslkern.common.rows import row_numbers
from sslkern.functional import info_nce, nt_xent
from sslkern.ops import similarity_lse

from .conftest import EVERY
from .examples import LOSSES, OPS, PUSHES, value, value_and_gradients
from .fuzz import Wrapper

KERNELS = [name for name in dict.fromkeys(name.partition("-")[0] for name in EVERY) if name != "cuda"]


@pytest.fixture(params=KERNELS)
def kernels(request):
    """Each backend that has all primitives, with one of its instruction sets."""
    with sslkern.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("name", [*LOSSES, *OPS])
def test_an_example_is_a_loss_with_gradients_and_the_same_each_time(name):
    make = (LOSSES | OPS)[name]
    first, second = (value_and_gradients(make()) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert (x is None and y is None) or (torch.equal(x, y) and not x.isnan().any())
    if name in LOSSES:
        assert first[0].shape == () and all(grad is not None for grad in first[1:]) and len(first) > 1


@pytest.mark.parametrize("name", PUSHES)
def test_an_example_writes(name):
    example = PUSHES[name]()
    before = example.args[0].clone()
    example()
    assert not torch.equal(example.args[0], before) and not example.args[0].isnan().any()


def agrees(name: str, got: list, want: list) -> None:
    """The same types, shapes and bits."""
    for x, y in zip(got, want, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert (x.dtype, x.device, x.shape) == (y.dtype, y.device, y.shape) and torch.equal(x, y), name


@pytest.fixture
def default(request):
    """Sets the process's default type or device, and takes it back."""
    set_default = torch.set_default_device if isinstance(request.param, str) else torch.set_default_dtype
    before = None if isinstance(request.param, str) else torch.get_default_dtype()
    yield lambda on: set_default(request.param if on else before)
    set_default(before)


@pytest.mark.parametrize(
    "default, dtype",
    [
        (torch.float64, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        ("meta", torch.float32),
    ],
    ids=str,
    indirect=["default"],
)
def test_defaults_of_the_process_change_nothing(default, dtype, kernels):
    a, b = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0), device="cpu")
    for name, make in (LOSSES | OPS).items():
        want, example = value_and_gradients(make(N=6, dtype=dtype)), make(N=6, dtype=dtype)
        default(True)
        got = value_and_gradients(example)
        default(False)
        agrees(name, got, want)
    default(True)
    assert nt_xent(a, b, 0.1).item() == pytest.approx(6.898093, abs=1e-6)


@pytest.mark.parametrize("folder", ["backends", "functional", "ops"])
def test_every_allocation_names_its_type_and_device(folder):
    """What does not take those of another tensor (`x.new_empty`); a range of integers has their type anyway."""
    makers = "empty", "zeros", "ones", "full", "arange", "eye", "linspace", "tensor", "rand", "randn", "randint"
    sites = 0
    for path in (Path(sslkern.__file__).parent / folder).rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            maker = call.func if isinstance(call, ast.Call) else None
            if isinstance(maker, ast.Attribute) and maker.attr in makers and ast.unparse(maker.value) == "torch":
                named, sites = {keyword.arg for keyword in call.keywords}, sites + 1
                assert {"device"} | ({"dtype"} if maker.attr != "arange" else set()) <= named, f"{path}:{call.lineno}"
    assert sites


def inner(x):
    return x.inner if isinstance(x, Wrapper) else x


def test_wrapped_tensors(kernels):
    for name, make in (LOSSES | OPS).items():
        want, example = value_and_gradients(make()), make()
        features = example.map(lambda x: Wrapper(x).requires_grad_(x.requires_grad) if x.ndim else x)
        if isinstance(example.target, torch.nn.Module) and any(True for _ in example.target.buffers()):
            continue
        got = [inner(x) for x in value_and_gradients(features)]
        for x, y in zip(got, want, strict=True):
            assert (x is None and y is None) or torch.allclose(x, y, rtol=1e-5, atol=1e-6), name


def test_fake_tensors():
    for name, make in (LOSSES | OPS).items():
        want = value_and_gradients(make())
        example = make()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            got = value_and_gradients(example.map(mode.from_tensor))
        for x, y in zip(got, want, strict=True):
            assert (x is None and y is None) or (isinstance(x, FakeTensor) and x.shape == y.shape), name
            assert x is None or (x.dtype, x.device) == (y.dtype, y.device), name


def negated(x):
    """The same values, behind a sign bit."""
    return torch._neg_view(-x.detach()).requires_grad_(x.requires_grad) if x.is_floating_point() else x


def test_views_with_a_sign_bit(kernels):
    for name, make in (LOSSES | OPS).items():
        want, example = value_and_gradients(make()), make().map(negated)
        assert any(x.is_neg() for x in example.tensors())
        got = value_and_gradients(example)
        for x, y in zip(got, want, strict=True):
            assert (x is None and y is None) or torch.allclose(x, y, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("name", [*LOSSES, *OPS, *PUSHES])
def test_a_tensor_on_another_device_is_named(name):
    make = (LOSSES | OPS | PUSHES)[name]
    count = len(make().tensors()) if name != "CachedLoss" else 0  # its encoder says so
    for number in range(count if count > 1 else 0):
        example = make()
        moved = example.with_tensor(number, example.tensors()[number].detach().to("meta"))
        with pytest.raises(ValueError, match=r"on meta") as error:
            moved()
        assert "\n" not in str(error.value)


def spread(x):
    """The same values with strides of their own: every second number of a transposed matrix."""
    if x.ndim < 2:
        return x.detach().repeat_interleave(2)[::2].requires_grad_(x.requires_grad) if x.ndim else x
    wide = x.detach().mT.repeat_interleave(2, -1)[..., ::2].mT
    return wide.requires_grad_(x.requires_grad)


def one_number(x):
    """As if all were one number: strides of 0."""
    return x.detach().flatten()[0].expand(x.shape).requires_grad_(x.requires_grad) if x.is_floating_point() else x


@pytest.mark.parametrize("laid", [spread, one_number])
def test_strides_change_nothing(kernels, laid):
    for name, make in (LOSSES | OPS).items():
        example = make(N=6).map(laid)
        want = value_and_gradients(example.map(lambda x: x.detach().contiguous().requires_grad_(x.requires_grad)))
        got = value_and_gradients(make(N=6).map(laid))
        for x, y in zip(got, want, strict=True):
            assert (x is None and y is None) or torch.allclose(x, y, rtol=1e-5, atol=1e-5), name


def test_deterministic_algorithms_change_nothing(kernels):
    for name, make in (LOSSES | OPS).items():
        torch.use_deterministic_algorithms(False)
        want = value_and_gradients(make())
        torch.use_deterministic_algorithms(True)  # and nothing that is not
        agrees(name, value_and_gradients(make()), want)


def test_gradient_scaler(kernels):
    """Of features in fp16: what arrives at fp32 parameters is what arrives without it."""
    for name, make in LOSSES.items():
        example = make()
        if isinstance(example.target, torch.nn.Module) and any(True for _ in example.target.buffers()):
            continue  # a memory has the type of the features, or autocast
        if name == "CachedLoss":
            continue  # nor does its encoder cast
        grads = []
        for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**10), torch.amp.GradScaler("cpu", enabled=False)):
            example = make()
            optimizer = torch.optim.SGD(example.leaves(), lr=0.0)
            loss = example.map(lambda x: x.half() if x.is_floating_point() and x.ndim > 1 else x)()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            assert loss.dtype == torch.float32
            grads.append([x.grad for x in example.leaves()])
        for x, y in zip(*grads, strict=True):
            assert torch.allclose(x, y, rtol=1e-2, atol=1e-5), name


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "siglip: float"])
def test_traces(name, mode):
    """The trace of a loss and its gradients is a function of the features, and leaves nothing behind."""
    traced_as_eager(name, mode)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", ["fake", *(pytest.param(mode, marks=pytest.mark.long) for mode in ("real", "symbolic"))]
)
def test_traces_of_every_loss(mode):
    for name in LOSSES:
        traced_as_eager(name, mode)


def traced_as_eager(name, mode):
    example, other = LOSSES[name](N=5, seed=0), LOSSES[name](N=5, seed=1)
    if isinstance(example.target, torch.nn.Module) or name == "CachedLoss":
        return

    def step(*tensors):
        leaves = iter(
            [x.detach().requires_grad_(old.requires_grad) for x, old in zip(tensors, example.tensors(), strict=True)]
        )
        return value_and_gradients(example.map(lambda _: next(leaves)))

    graph = make_fx(step, tracing_mode=mode)(*(x.detach() for x in example.tensors()))
    for tensors in (example.tensors(), other.tensors()):
        got, want = graph(*(x.detach() for x in tensors)), step(*tensors)
        for x, y in zip(got, want, strict=True):
            assert (x is None and y is None) or torch.allclose(x, y, rtol=1e-4, atol=1e-5), name


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in LOSSES if name[0].islower()])
def test_jit_traces(name):
    """A trace computes what it is given, not what it saw."""
    example, other = (LOSSES[name](N=5, seed=seed).map(lambda x: x.detach()) for seed in (0, 1))
    if not example.tensors()[0].is_floating_point():
        return

    def loss(*features):
        call = example
        for number, x in zip(floating, features, strict=True):
            call = call.with_tensor(number, x)
        return value(call)[0]

    floating = [i for i, x in enumerate(example.tensors()) if x.is_floating_point()]
    first, second = ([call.tensors()[i] for i in floating] for call in (example, other))
    traced = torch.jit.trace(loss, first, check_trace=False)
    for features in (first, second):
        assert torch.allclose(traced(*features), loss(*features), rtol=1e-4, atol=1e-5)


def test_torch_func_leaves_nothing_behind():
    """What is kept for the next small batch must not belong to a transform that is over."""
    z = torch.randn(29, 8)
    torch.func.grad(lambda x: nt_xent(x, x + 1))(z)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(row_numbers(29, 2, z.device, keep=True))


def test_a_zero_without_memory():
    zero = torch._efficientzerotensor((4, 8))
    assert torch.equal(similarity_lse(zero, torch.ones(3, 8)), similarity_lse(torch.zeros(4, 8), torch.ones(3, 8)))


def test_a_checkpoint_that_is_watched_when_it_computes_again():
    x, y = torch.randn(2, 8, 4, requires_grad=True)
    want = torch.autograd.grad(info_nce(x, y), (x, y))
    loss = checkpoint(lambda a, b: info_nce(a, b), x, y, use_reentrant=False)
    with FlopCounterMode(display=False):
        got = torch.autograd.grad(loss, (x, y))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))


def test_a_trace_that_fails_leaves_nothing_behind():
    """A cache must not keep what belongs to the trace."""
    a, b = torch.randn(2, 23, 8)

    def fails(a, b):
        info_nce(a, b)
        raise LookupError

    want = info_nce(a.double(), b.double())
    for mode in ("fake", "symbolic"):
        with pytest.raises(LookupError):
            make_fx(fails, tracing_mode=mode)(a, b)
        assert torch.allclose(info_nce(a, b).double(), want)


@pytest.mark.parametrize("name", PUSHES)
def test_writing_with_a_sign_bit(kernels, name):
    """Rows that come with one are pushed as what they stand for; a memory with one is refused, not written wrongly."""
    want, got = PUSHES[name](), PUSHES[name]()
    got.args[-1] = negated(got.args[-1])
    assert got.args[-1].is_neg()
    want(), got()
    assert torch.equal(got.args[0], want.args[0])
    got.args[0] = negated(got.args[0])
    with pytest.raises(ValueError, match="sign bit"):
        got()
