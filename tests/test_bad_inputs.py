"""Bad inputs to everything that is exported: right, or refused in one sentence that names the argument.

Random ones are those of fuzz.py; SSLKERN_FUZZ_COUNT and SSLKERN_FUZZ_SEED choose others.
"""

import inspect
import os
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sslkern
from sslkern.backends import BACKENDS

from . import fuzz
from .examples import LOSSES, OPS, PUSHES
from .fuzz import INITS, Call, Case, Failure

ALL = LOSSES | OPS | PUSHES
MODULES = [name for name in INITS if issubclass(getattr(sslkern, name), nn.Module)]


def refusal(call) -> str:
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def switches(function) -> list[str]:
    return [name for name, x in inspect.signature(function).parameters.items() if isinstance(x.default, bool)]


@pytest.mark.parametrize("name", [name for name in ALL if name != "CachedLoss"])  # its encoder may take them
def test_tensors_that_are_not_dense_are_refused(name):
    for i in range(len(ALL[name]().tensors())):
        example = ALL[name](N=2, D=4)
        x = example.tensors()[i].detach()
        others = [x.to_sparse()]
        if x.ndim > 1:  # a list of rows of several lengths, and the same in one piece of memory
            others += [torch.nested.nested_tensor([*x], layout=layout) for layout in (torch.strided, torch.jagged)]
        if x.ndim > 0 and x.dtype == torch.float32:
            others.append(x.to_mkldnn())
        for other in others:
            assert "must be a dense tensor" in refusal(example.with_tensor(i, other)), i


@pytest.mark.parametrize("value", ["yes", torch.tensor([True, False])], ids=["str", "tensor"])
def test_switches_are_true_or_false(value):
    for name in ALL:
        example = ALL[name](N=2, D=4)
        for switch in () if name.partition(":")[0] in (*INITS, "matryoshka") else switches(example.target):
            changed = example.map(lambda x: x)
            changed.options = changed.options | {switch: value}
            assert refusal(changed).startswith(f"{switch} must be True or False"), name
    for name in MODULES:
        thing = getattr(sslkern, name)
        for switch in switches(thing):
            assert refusal(lambda: thing(**INITS[name](4), **{switch: value})).startswith(f"{switch} must be"), name  # noqa: B023


@pytest.mark.parametrize("name", MODULES)
def test_a_learned_temperature_is_shown_on_one_line(name):
    thing, init = getattr(sslkern, name), INITS[name](4)
    for option in {"temperature", "logit_scale"} & {*inspect.signature(thing).parameters}:
        if name != "CLIPLoss":  # whose scale is a parameter of its own
            shown = repr(thing(**init | {option: nn.Parameter(torch.tensor(0.25))}))
            assert (
                f"{option}=Parameter(0.25)" in shown.splitlines()[0] + shown.splitlines()[1 % len(shown.splitlines())]
            )
            assert "Parameter containing" not in shown and "tensor(" not in shown


def test_what_was_meant_is_suggested():
    z, labels = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    queue, bank = sslkern.FeatureQueue(3, 8), sslkern.MemoryBank(8, 3)
    F = sslkern.functional
    for call in (
        lambda x: F.info_nce(z, z, x),
        lambda x: F.moco(z, z, x),
        lambda x: F.nnclr(z, z, z, z, x),
        lambda x: F.nearest_neighbors(z, x),
    ):
        for given in (queue, queue.queue):
            assert ".queue.t()" in refusal(lambda: call(given))  # noqa: B023
    assert refusal(lambda: F.nce(z, bank, labels.view(4, 1))).endswith("pass its .bank")
    for call in (F.nt_xent, F.info_nce, F.clip, F.dcl, F.debiased):
        assert "pass them as ids=, or to sup_con" in refusal(lambda: call(z, z, labels))  # noqa: B023


# ---- random ones -----------------------------------------------------------------------------------------------------


def fails_on(count: int, seed: int = 0) -> None:
    report = fuzz.run(count, seed)
    assert not report.failures, "\n".join(fuzz.told(seed, failure) for failure in report.failures[:20])
    ends = sum(report.ends.values())
    assert ends == count, f"{count - ends} cases have no end"
    assert 0.2 < report.ends["returned"] / count < 0.8, report.ends  # neither refuses everything nor changes nothing


def test_random_calls_are_right_or_refused():
    fails_on(300, seed=2)


@pytest.mark.long
def test_two_thousand_random_calls_are_right_or_refused():
    fails_on(2000)


@pytest.mark.long
def test_a_hundred_thousand_random_calls_are_right_or_refused():
    fails_on(int(os.environ.get("SSLKERN_FUZZ_COUNT", 100_000)), int(os.environ.get("SSLKERN_FUZZ_SEED", 1)))


def a_case(target, **args) -> Case:
    return Case(Call("planted", target, None, None, args), torch.float32, "", "auto", [], False)


def writes(x):
    x += 1


def writes_beside(x):
    x.as_strided((1,), (1,), x.storage_offset() + x.numel()).fill_(1)


def is_wrong_in_fp32(x):
    return x.sum() * (1 if x.dtype == torch.float64 else 1 + 1e-3)


def returns_what_nobody_wrote(x):
    return torch.full((), 1.5e16 if x.dtype == torch.float32 else 1.0, dtype=x.dtype)


def says_nothing(x):
    raise ValueError("no")


def says_too_much(x):
    raise ValueError("x must be something else,\nwhich is said here")


def names_nothing(x):
    raise ValueError("something must be something else")


def stumbles(x):
    return x.no_such_attribute


def leaves_it_to_torch(x):
    return x @ x


@pytest.mark.parametrize("fault", [writes, writes_beside, is_wrong_in_fp32, returns_what_nobody_wrote, says_nothing,
                                   says_too_much, names_nothing, stumbles, leaves_it_to_torch])  # fmt: skip
def test_the_fuzzer_sees_planted_faults(fault, monkeypatch):
    monkeypatch.setattr(fuzz, "PACKAGE", os.path.dirname(__file__))  # where refusals may come from
    native = BACKENDS["cpu"]._cpu
    before = native and native.isa()
    with pytest.raises(Failure):
        fuzz.check(a_case(fault, x=torch.rand(2, 3) + 0.5))
    assert (native and native.isa()) == before  # for the tests that follow


def test_the_fuzzer_sees_a_wrong_gradient():
    def scaled(x):
        return x.sum() if x.dtype == torch.float64 else (2 * x - x.detach()).sum()

    with pytest.raises(Failure, match="grads"):
        fuzz.check(a_case(scaled, x=torch.rand(2, 3, requires_grad=True)))


def test_the_fuzzer_knows_what_cancels_where_all_rows_are_equal():
    def off(times):  # by as much as the rounding of cosines is felt, times `times`
        def loss(z, temperature):
            exact = sslkern.functional.sup_con(F.normalize(z), torch.tensor([0, 0, 1]), temperature)
            wrong = 0.0 if z.dtype == torch.float64 else times * 2**-23 / temperature.detach() ** 2
            return exact + wrong * (temperature - temperature.detach())

        return loss

    z, temperature = torch.randn(1, 8).expand(3, 8), torch.tensor(0.1, requires_grad=True)
    assert fuzz.check(a_case(off(3), z=z, temperature=temperature)) == "returned"
    with pytest.raises(Failure, match="grads"):
        fuzz.check(a_case(off(200), z=z, temperature=temperature))


def test_the_fuzzer_takes_a_zero_prefix_for_a_row_of_zeros():
    z = torch.randn(4, 2)
    z[1, 0] = 0  # in fp16 its gradient is 0, in float64 beyond fp16
    call = fuzz.valid_call("matryoshka", 4, 2, torch.float16, 0)
    call.args["features"] = [z.half().requires_grad_(), torch.randn(4, 2).half().requires_grad_(), torch.tensor(0.3)]
    assert call.target.args[1] == (1, 2) and fuzz.check(Case(call, torch.float16, "", "auto", [], False)) == "returned"


def test_the_fuzzer_lets_overflowing_products_be_nan_or_minus_infinity():
    q = torch.tensor([[1e20, 1e20], [1e20, -2e20]], requires_grad=True)  # 1e40 - 2e40
    for backend in ("auto", "reference"):
        case = a_case(sslkern.ops.similarity_lse, q=q)
        case.backend = backend
        assert fuzz.check(case) == "returned"


def test_a_wrapper_of_a_sign_bit_or_an_offset_is_the_tensor():
    x = torch.randn(3, 4)
    for odd in (torch._neg_view(-x), torch.cat((x[:, :1], x), 1)[:, 1:], x.mT.contiguous().mT):
        wrapped = fuzz.Wrapper(odd)
        assert torch.equal((wrapped * 1).inner, x)
        assert (wrapped.stride(), wrapped.storage_offset()) == (odd.stride(), odd.storage_offset() * (not odd.is_neg()))
        assert torch.equal(wrapped.as_strided((2,), (odd.stride(1),), wrapped.storage_offset()).inner, x[0, :2])


@pytest.mark.parametrize(
    "how", [pytest.param("dies", marks=pytest.mark.slow), pytest.param("hangs", marks=pytest.mark.long)]
)
def test_the_fuzzer_outlives_what_dies_or_hangs(how, monkeypatch):
    monkeypatch.setenv("SSLKERN_FUZZ_PLANTED", how)
    start = time.monotonic()
    report = fuzz.run(6, seed=0)
    assert [failure["case"] for failure in report.failures] == [3] and time.monotonic() - start < 60
    assert "died" in report.failures[0]["failure"] and sum(report.ends.values()) == 5
