"""Bad inputs to everything that is exported: right, or refused in one sentence that names the argument."""

import inspect

import pytest
import torch
from torch import nn

import sslkern

from .examples import LOSSES, OPS, PUSHES
from .fuzz import INITS

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
        sparse = example.tensors()[i].detach().to_sparse()
        assert "must be a dense tensor" in refusal(example.with_tensor(i, sparse)), i


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
