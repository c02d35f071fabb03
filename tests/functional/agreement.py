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
_moving = None  # (dtype, generator): products move by what rounding in that type does to them


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
    if _moving is not None:
        return _Moved.apply(a, b, *_moving)
    return (a @ b.mT).to(torch.promote_types(a.dtype, torch.float32))


class _Moved(torch.autograd.Function):
    """a b^T with scores that are off by an ulp of 1, up or down: the product and what it is multiplied with are rounded
    in fp32. In the backward the weights of pairs are off by half an ulp of the type in which they are multiplied with
    the features."""

    @staticmethod
    def forward(ctx, a, b, dtype, generator):
        ctx.save_for_backward(a, b)
        ctx.half_ulp, ctx.generator = torch.finfo(dtype).eps / 2, generator
        s = a @ b.mT
        return s + torch.finfo(torch.float32).eps * _signs(s, generator)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        g = g * (1 + ctx.half_ulp * _signs(g, ctx.generator))
        return g @ b, g.mT @ a, None, None


def _signs(x, generator):
    return torch.randint(0, 2, x.shape, generator=generator, device="cpu").to(x) * 2 - 1


def moved(exact, recomputed, dtype, draws=8):
    """How far each of the exact results moves at most when scores and weights are rounded in one way or another."""
    global _moving
    try:
        _moving, distances = (dtype, torch.Generator("cpu").manual_seed(0)), []
        for _ in range(draws):
            pairs = zip(recomputed(), exact, strict=True)
            distances.append([0.0 if b is None else (a - b).abs().nan_to_num(0).max().item() for a, b in pairs])
        return [max(each) for each in zip(*distances, strict=True)]
    finally:
        _moving = None


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

    At T = 0.01 few pairs of each row have weights, and the error of a gradient is that of the row that has the
    most, divided by a length that may be small: of two roundings of the same numbers one is often more than twice the
    other. So where the dense form was lucky, what rounding scores and weights does to the exact gradient is the
    yardstick: in fp32 an ulp of 1 / T in each score, which changes a weight p by p (1 - p) / T ulps; in 16 bits the
    weights themselves, which go through the product with the features in that type.
    """
    got = results(loss, [x.to(dtype) for x in features], temperature, options, dtype)
    rounds_as(got, dense, features, temperature, dtype, scores, **options)


def rounds_as(got, dense, features, temperature, dtype, scores=2, **options):
    """The same of results that have been computed already."""
    features = [x.to(dtype) for x in features]
    plain = results(dense, features, temperature, options, dtype)
    recomputed = functools.partial(results, dense, features, temperature, options, torch.float64)
    with rounded_as(dtype):
        exact = recomputed()
        distances = moved(exact, recomputed, dtype)
    assert got[0].dtype == torch.float32
    N, last = got[0].numel(), len(got) - 1
    # Scores carry an ulp of 1 / T, and their sum enters the gradient of the temperature. So does the error that the
    # weights of a row have in common, as a log-sum-exp near 1 / T is rounded: of N rows, weighted by 1 on average and
    # with both signs, sqrt(N) ulps of 1 / T.
    ulps = {0: scores / temperature, last: max(scores * N / temperature**2, N**0.5 / temperature**3)}
    for i, (a, b, c) in enumerate(zip(got, exact, plain, strict=True)):
        if a is not None:
            what = f"{'gradient' if i else 'loss'} {i} at {temperature}, {dtype}"
            within(a, b, c, what, ulps.get(i, 0.0), 0.0 if i in ulps else distances[i])


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
        importlib.import_module("problems").allow_torchvision_import()
    except ImportError:
        pass  # lightly and open_clip will say so
    finally:
        sys.path.pop(0)
    return pytest.importorskip(module)
