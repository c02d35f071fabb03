"""What counts as a number: NumPy's and fractions as much as Python's; and what is refused, in one sentence."""

import fractions
import inspect
from typing import get_args

import numpy as np
import pytest
import torch

import sslkern
from sslkern import functional as F

from ..examples import LOSSES, OPS, value
from ..fuzz import INITS

A, B = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
INDEX = torch.arange(12).unsqueeze(1) + torch.arange(4)
GROUPS = A.view(3, 4, 8), B.view(3, 4, 8), torch.eye(8).expand(2, 8, 8)


def test_the_named_case():
    assert F.nt_xent(A, B, np.float32(0.1)).item() == pytest.approx(6.898093, rel=1e-6)


# Every number of every loss and primitive, as make(value): those with other options than an example has, then the
# examples.
CALLS = {
    "label_smoothing": lambda e: F.info_nce(A, B, B, label_smoothing=e),
    "relative margin": lambda m: F.mnrl(A, B, margin=m, margin_strategy="relative"),
    "weights": lambda w: F.matryoshka(F.nt_xent, [8], [w])(A, B),
}


def numbers_of(name: str) -> list[str]:
    """The arguments of an example that are numbers."""
    parameters = inspect.signature((LOSSES | OPS)[name]().target, eval_str=True).parameters.values()
    return [x.name for x in parameters if float in (x.annotation, *get_args(x.annotation))]


def with_number(name: str, argument: str):
    """The example as make(value)."""

    def call(number):
        example = (LOSSES | OPS)[name]()
        bound = inspect.signature(example.target).bind(*example.args, **example.options)
        if argument == "logit_scale":
            bound.arguments.pop("temperature", None)
        bound.arguments[argument] = number
        return sum(x.float().sum() for x in value(type(example)(example.target, list(bound.args), bound.kwargs)))

    return call


CALLS |= {f"{name}, {argument}": with_number(name, argument) for name in LOSSES | OPS for argument in numbers_of(name)}
for name in ("alignment, alpha", "alignment_uniformity, alpha", "nce: softmax, log_z"):
    del CALLS[name]  # test_alpha; and the form has none


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_number_is_a_number(call):
    want = call(0.25)
    for kind in (np.float16, np.float32, np.float64, np.longdouble, fractions.Fraction):
        assert torch.equal(call(kind(0.25)), want), kind
    for wrong in (True, "0.25", None, 1j, np.array([0.1, 0.2]), 10**400, 1e39, float("nan")):
        try:
            got = call(wrong)
        except (ValueError, TypeError) as error:
            assert "\n" not in str(error)
        else:  # None is the default of some, and a weight or an exponent may be large
            assert wrong is None or (isinstance(wrong, (int, float)) and not got.isnan()), wrong


@pytest.mark.parametrize("name", sslkern.losses.__all__)
def test_a_module_refuses_what_is_no_number(name):
    """When it is made: the bounds of its options stand in losses/base.py."""
    module = getattr(sslkern, name)
    for option in inspect.signature(module.__init__).parameters.values():
        if type(option.default) is float:
            with pytest.raises((ValueError, TypeError), match=option.name):
                module(**INITS[name](8) | {option.name: "0.25"})


def test_alpha():
    for kind in (np.float32, np.int64, fractions.Fraction):
        assert torch.equal(F.alignment(A, B, kind(3)), F.alignment(A, B, 3.0))
    for wrong in (True, np.float32(0.5), "2", 2j):
        with pytest.raises(ValueError, match="alpha must be a number, at least 1"):
            F.alignment(A, B, wrong)


SIZES = {
    "FeatureQueue": lambda n: sslkern.FeatureQueue(n, n).queue,
    "CrossBatchMemory": lambda n: sslkern.CrossBatchMemory(n, n).queue,
    "MemoryBank": lambda n: sslkern.MemoryBank(n, n, np.float32(0.5)).bank,
    "MemoryBank.sample": lambda n: sslkern.MemoryBank(9, 4).sample(torch.arange(3), n),
    "MoCoLoss": lambda n: sslkern.MoCoLoss(n, n).memory.queue,
    "NNCLRLoss": lambda n: sslkern.NNCLRLoss(n, n).support.queue,
    "NCELoss": lambda n: sslkern.NCELoss(9, n, n).memory.bank,
    "CMCLoss": lambda n: sslkern.CMCLoss(n, 9, n, n).log_z,
    "CPCLoss": lambda n: sslkern.CPCLoss(n, n, n).predictors,
    "CachedLoss": lambda n: sslkern.CachedLoss(torch.nn.Identity(), F.nt_xent, n)(A, B),
    "matryoshka": lambda n: F.matryoshka(F.nt_xent, [n])(A, B),
    "MatryoshkaLoss": lambda n: sslkern.MatryoshkaLoss(F.nt_xent, [n])(A, B),
    "similarity_topk": lambda n: sslkern.ops.similarity_topk(A, B, n)[0],
}


@pytest.mark.parametrize("make", SIZES.values(), ids=SIZES.keys())
def test_a_size_is_a_size(make):
    want = make(4)
    for kind in (np.int64, np.int32, np.uint8):
        assert make(kind(4)).shape == want.shape
    for wrong in (True, 4.0, "4", torch.tensor(4), -1, np.float32(4), np.array([[4, 4], [4, 4]])):
        with pytest.raises(ValueError, match="must be") as error:
            make(wrong)
        assert "\n" not in str(error.value)


def test_numbers_that_fp32_cannot_hold():
    """As 0 and inf were refused before, which they become."""
    for T in (1e-40, -1e-40, 1e-320, 0, np.float64(1e-45)):
        with pytest.raises(ValueError, match="^temperature must not be"):
            F.nt_xent(A, B, T)
    for call in (lambda s: F.nt_xent(A, B, logit_scale=s), lambda s: sslkern.ops.similarity_lse(A, B, s)):
        for scale in (1e39, -1e39, 10**39, float("inf"), float("nan")):
            with pytest.raises(ValueError, match="scale must be a finite number"):
                call(scale)
    assert F.nt_xent(A, B, 1e-36).isfinite()
    assert F.nt_xent(A, B, logit_scale=1e36).isfinite()


@pytest.mark.parametrize("name", [name for name in OPS if "scale" in inspect.signature(OPS[name]().target).parameters])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
def test_a_scale_is_real(name, dtype):
    """A complex one would lose its imaginary part."""
    example = OPS[name]()
    bound = inspect.signature(example.target).bind(*example.args, **example.options)
    for scale in (torch.tensor(1, dtype=dtype), torch.tensor(1, dtype=dtype).item()):
        bound.arguments["scale"] = scale
        if scale.__class__ is int:
            value(type(example)(example.target, list(bound.args), bound.kwargs))
            continue
        with pytest.raises((ValueError, TypeError), match="^scale must be") as error:
            example.target(*bound.args, **bound.kwargs)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in LOSSES if not name[0].isupper()])
def test_a_temperature_is_real(name):
    example = LOSSES[name]()
    parameters = inspect.signature(example.target).parameters
    for argument in {"temperature", "logit_scale", "logit_bias"} & set(parameters):
        bound = inspect.signature(example.target).bind(*example.args, **example.options)
        for wrong in (torch.tensor(1 + 1j), torch.tensor(1), torch.tensor(True), 1 + 1j, True):
            bound.arguments[argument] = wrong
            with pytest.raises((ValueError, TypeError), match=f"^{argument} must be") as error:
                example.target(*bound.args, **bound.kwargs)
            assert "\n" not in str(error.value)


def test_numbers_that_change_do_not_break_the_graph():
    torch.compiler.reset()
    compiled = torch.compile(F.siglip, fullgraph=True, backend="aot_eager")
    for x in (0.5, 0.25, 0.125):
        assert torch.allclose(compiled(A, B, x, -x), F.siglip(A, B, x, -x), rtol=1e-5)
