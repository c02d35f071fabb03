"""What every loss is asked: to agree with a dense formulation, to compile, to say what is wrong with its arguments."""

import contextlib
import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch

import sslkern

from ..ops.dense import within

_rounding = torch.float64  # of unit rows in the exact result: the losses are defined on rows as they are rounded


def unit(x):
    """Rows of length 1, rounded to the type of x."""
    rows = torch.nn.functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
    if x.dtype != torch.float64:
        return rows.to(x.dtype)
    return rows + (rows.to(_rounding).double() - rows).detach()


@contextlib.contextmanager
def rounded_as(dtype):
    global _rounding
    _rounding = dtype
    yield
    _rounding = torch.float64


def product(a, b):
    """a b^T in the type of a and b, for a softmax in fp32 or fp64."""
    return (a @ b.mT).to(torch.promote_types(a.dtype, torch.float32))


def none(loss):
    """With reduction="none"."""
    return functools.partial(loss, reduction="none")


def results(loss, features, temperature, options, dtype):
    """The loss and the gradients of its sum, by the features and the temperature; 16-bit features are leaves."""
    T = torch.tensor(temperature, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    leaves = [x.detach().to(dtype).requires_grad_() for x in features]
    out = loss(*leaves, temperature=T, **options)
    # weights of both signs and many sizes, so that no error cancels in the sum
    upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * upstream).sum(), (*leaves, T), allow_unused=True)]


def agrees_exactly(loss, dense, features, temperature, **options):
    """In float64 through the reference: value and gradients to 1e-10."""
    with sslkern.use_backend("reference"):
        got = results(loss, features, temperature, options, torch.float64)
    for a, b in zip(got, results(dense, features, temperature, options, torch.float64), strict=True):
        assert (a is None and b is None) or (a - b).abs().max() <= 1e-10 * max(1, b.abs().max())


def agrees_on_kernels(loss, dense, features, temperature, dtype, scores=2, **options):
    """Within twice the error of the dense form in the same dtype, whatever backend is chosen.

    scores: how many dot products over the temperature a row's loss consists of, whose rounding adds up.
    """
    features = [x.to(dtype) for x in features]
    got = results(loss, features, temperature, options, dtype)
    plain = results(dense, features, temperature, options, dtype)
    with rounded_as(dtype):
        exact = results(dense, features, temperature, options, torch.float64)
    assert got[0].dtype == torch.float32
    for i, (a, b, c) in enumerate(zip(got, exact, plain, strict=True)):
        # they carry an ulp of 1 / temperature, and their sum enters the gradient of the temperature
        ulps = {0: scores / temperature, len(got) - 1: scores * got[0].numel() / temperature**2}
        if a is not None:
            within(a, b, c, f"{'gradient' if i else 'loss'} {i} at {temperature}, {dtype}", ulps.get(i, 0.0))


def compiles(loss, *features, **options):
    """fullgraph, with the same value and gradient."""
    torch.compiler.reset()
    leaves = [x.detach().requires_grad_() for x in features]
    # aot_eager: the trace is what is tested, not the compiler's code
    got, want = (f(*leaves, **options) for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss))
    assert torch.allclose(got, want, atol=1e-6)
    pairs = zip(*(torch.autograd.grad(x.sum(), leaves, allow_unused=True) for x in (got, want)), strict=True)
    assert all((a is None and b is None) or torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def refuses(loss, cases):
    """cases: (start of the message, arguments, options)."""
    for message, args, options in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            loss(*args, **options)
        assert "\n" not in str(error.value)


def peer(module: str):
    """A module of another package; skips the test where that is not installed."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        importlib.import_module("baselines").allow_torchvision_import()
    except ImportError:
        pass  # lightly and open_clip will say so
    finally:
        sys.path.pop(0)
    return pytest.importorskip(module)
