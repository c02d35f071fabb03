"""What holds for everything that is exported: over the table of calls in examples.py."""

import ast
from pathlib import Path

import pytest
import torch

import sslkern
from sslkern.functional import nt_xent

from .conftest import EVERY
from .examples import LOSSES, OPS, PUSHES, missing, value_and_gradients

KERNELS = [name for name in dict.fromkeys(name.partition("-")[0] for name in EVERY) if name != "cuda"]


@pytest.fixture(params=KERNELS)
def kernels(request):
    """Each backend that has all primitives, with one of its instruction sets."""
    with sslkern.use_backend(request.param):
        yield request.param


def test_everything_exported_has_an_example():
    assert not missing(), f"add examples for {missing()} to tests/examples.py"


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
    before = torch.get_default_device() if isinstance(request.param, str) else torch.get_default_dtype()
    yield lambda on: set_default(request.param if on else before)
    set_default(before)


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16, "meta"], ids=str, indirect=True)
def test_defaults_of_the_process_change_nothing(default, kernels):
    a, b = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0), device="cpu")
    for name, make in (LOSSES | OPS).items():
        for dtype in (torch.float32, torch.bfloat16):
            want = value_and_gradients(make(N=6, dtype=dtype))
            example = make(N=6, dtype=dtype)
            default(True)
            got = value_and_gradients(example)
            default(False)
            agrees(f"{name}, {dtype}", got, want)
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
