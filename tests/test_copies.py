"""Everything that is exported and has a state goes through pickle, deepcopy, torch.save and a state_dict."""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn

import sslkern
from sslkern.functional import matryoshka, nt_xent

from .examples import LOSSES, Example

N, D = 6, 8


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5)), nn.Linear(D, 5)

    def encode_image(self, x):
        return self.image(x)

    def encode_text(self, x):
        return self.text(x)


def of_methods():
    model = TwoTowers()
    cached = sslkern.CachedLoss((model.encode_image, model.encode_text), sslkern.CLIPLoss(), 4)
    return Example(cached, list(torch.randn(2, N, D)), {})


def learned(name):
    """The example of a module; its temperature learns if it has one."""
    example = LOSSES[name](N=N, D=D)
    if hasattr(example.target, "temperature"):
        example.target.temperature = nn.Parameter(torch.tensor(0.3))
    return example


MODULES = {name: functools.partial(learned, name) for name in LOSSES if name[0].isupper()} | {
    "CachedLoss: methods": of_methods,
    "CrossBatchMemory": lambda: Example(
        sslkern.CrossBatchMemory(D, 9), [torch.randn(N, D), torch.randint(3, (N,))], {}
    ),
    "FeatureQueue": lambda: Example(sslkern.FeatureQueue(D, 9), [torch.randn(N, D)], {}),
    "MatryoshkaLoss: function": lambda: Example(
        sslkern.MatryoshkaLoss(nt_xent, [3, D], [1, 2]), list(torch.randn(2, N, D)), {}
    ),
    "MemoryBank": lambda: Example(sslkern.MemoryBank(9, D), [torch.arange(N), torch.randn(N, D)], {}),
}


def test_nothing_is_left_out():
    exported = {name for name in sslkern.__all__ if isinstance(getattr(sslkern, name), type)}
    assert exported - {"use_backend"} == {name.partition(":")[0] for name in MODULES}


def saved(x, **options):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, **options)


def from_state_dict(module, build):
    twin = build()
    twin.load_state_dict(saved(module.state_dict(), weights_only=True))
    return twin


HOW = {
    "pickle": lambda module, _: pickle.loads(pickle.dumps(module)),
    "deepcopy": lambda module, _: copy.deepcopy(module),
    "save": lambda module, _: saved(module, weights_only=False),
    "state_dict": from_state_dict,
}


def state_of(x) -> dict[str, torch.Tensor]:
    """Parameters and buffers, of a `CachedLoss` those of its parts."""
    if isinstance(x, nn.Module):
        return dict(x.named_parameters()) | dict(x.named_buffers())
    encoders = x.encoder if isinstance(x.encoder, tuple) else (x.encoder,)
    modules = [getattr(one, "__self__", one) for one in encoders]
    return {f"{i}.{name}": t for i, part in enumerate((*modules, x.loss)) for name, t in state_of(part).items()}


def call(module, example):
    """The loss, or for a memory what it holds after the call."""
    torch.manual_seed(1)
    if isinstance(module, sslkern.FeatureQueue):
        module.push(*example.args)
    elif isinstance(module, sslkern.MemoryBank):
        module.update(*example.args)
    else:
        return module(*example.args, **example.options)
    return next(module.buffers()).clone()


CASES = [(name, how) for name in MODULES for how in HOW]
CASES = [case for case in CASES if not (case[0].startswith("CachedLoss") and case[1] == "state_dict")]  # it has none


@pytest.mark.parametrize("name, how", CASES)
def test_copies_are_equal_and_apart(name, how):
    example = MODULES[name]()
    module = example.target
    call(module, example)  # a state that is not the first
    twin = HOW[how](module, lambda: MODULES[name]().target)
    before = {key: x.detach().clone() for key, x in state_of(module).items()}
    got = call(twin, example)
    if got.requires_grad:
        got.backward()
    for key, x in state_of(module).items():
        assert torch.equal(x, before[key]) and x.grad is None and x.data_ptr() != state_of(twin)[key].data_ptr()
        assert not x.requires_grad or state_of(twin)[key].grad is not None
    assert torch.equal(call(module, example), got)
    for key, x in state_of(module).items():
        assert torch.equal(x, state_of(twin)[key])


def test_a_function_of_prefixes_travels():
    loss, z = matryoshka(functools.partial(nt_xent, temperature=0.2), [3, D]), torch.randn(2, N, D)
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert torch.equal(twin(*z), loss(*z))


@pytest.mark.parametrize("name", ["NCELoss", "CMCLoss"])
def test_pickles_from_when_each_option_of_a_bank_loss_was_an_attribute(name):
    example = MODULES[name]()
    state = dict(copy.deepcopy(example.target).__dict__)
    options = state.pop("options")
    state["sharing"] = tuple(options.pop(shared) for shared in ("group", "strategy", "grad_reduce"))
    twin = type(example.target).__new__(type(example.target))
    twin.__setstate__(state | options)
    assert repr(twin) == repr(example.target) and torch.equal(call(twin, example), call(example.target, example))


def test_pickles_name_the_modules_by_their_package():
    """As those do that were made when it was one file."""
    losses = {name for name in vars(sslkern.losses) if name.endswith("Loss")}
    assert losses == {name for name in sslkern.__all__ if name.endswith("Loss")} - {"CachedLoss"}
    assert all(getattr(sslkern.losses, name) is getattr(sslkern, name) for name in losses)
