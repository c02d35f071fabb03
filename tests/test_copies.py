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

N, D = 6, 8


def features(count=2):
    return [torch.randn(N, D, requires_grad=True) for _ in range(count)]


def labels():
    return torch.randint(3, (N,))


def learned():
    return nn.Parameter(torch.tensor(0.3))


def cached():
    encoder = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5))
    return sslkern.CachedLoss(encoder, sslkern.NTXentLoss(learned()), 4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(D, 5), nn.Linear(D, 5)

    def encode_image(self, x):
        return self.image(x)

    def encode_text(self, x):
        return self.text(x)


def cached_methods():
    model = Model()
    return sslkern.CachedLoss((model.encode_image, model.encode_text), sslkern.CLIPLoss(), 4)


# name: how it is built, the arguments of a call
MODULES = {
    "AlignmentUniformityLoss": (sslkern.AlignmentUniformityLoss, features),
    "CLIPLoss": (sslkern.CLIPLoss, features),
    "CMCLoss": (lambda: sslkern.CMCLoss(2, 9, D, 5, learned()), lambda: (features(), torch.arange(N))),
    "CPCLoss": (lambda: sslkern.CPCLoss(D, D, 2, learned()), lambda: [x.view(2, 3, D) for x in features()]),
    "CachedLoss": (cached, features),
    "CachedLoss of methods": (cached_methods, features),
    "CrossBatchMemory": (lambda: sslkern.CrossBatchMemory(D, 9), lambda: (*features(1), labels())),
    "DCLLoss": (lambda: sslkern.DCLLoss(learned()), features),
    "DCLWLoss": (lambda: sslkern.DCLWLoss(learned()), features),
    "DebiasedLoss": (lambda: sslkern.DebiasedLoss(learned()), features),
    "DeepInfoMaxLoss": (
        lambda: sslkern.DeepInfoMaxLoss("infonce", learned()),
        lambda: (*features(1), torch.randn(N, 3, D)),
    ),
    "FeatureQueue": (lambda: sslkern.FeatureQueue(D, 9), lambda: features(1)),
    "HardNegativeLoss": (lambda: sslkern.HardNegativeLoss(learned()), features),
    "InfoNCELoss": (lambda: sslkern.InfoNCELoss(learned(), two_way=True), features),
    "MatryoshkaLoss": (lambda: sslkern.MatryoshkaLoss(sslkern.NTXentLoss(learned()), [3, D]), features),
    "MatryoshkaLoss of a function": (lambda: sslkern.MatryoshkaLoss(nt_xent, [3, D], [1, 2]), features),
    "MemoryBank": (lambda: sslkern.MemoryBank(9, D), lambda: (torch.arange(N), *features(1))),
    "MoCoLoss": (lambda: sslkern.MoCoLoss(D, 9, learned()), features),
    "MoCoV3Loss": (lambda: sslkern.MoCoV3Loss(learned()), lambda: features(4)),
    "MultipleNegativesRankingLoss": (lambda: sslkern.MultipleNegativesRankingLoss(learned()), features),
    "NCELoss": (lambda: sslkern.NCELoss(9, D, 5, learned()), lambda: (*features(1), torch.arange(N))),
    "NNCLRLoss": (lambda: sslkern.NNCLRLoss(D, 9, learned()), lambda: features(4)),
    "NTXentLoss": (lambda: sslkern.NTXentLoss(learned()), features),
    "NTXentMultiViewLoss": (lambda: sslkern.NTXentMultiViewLoss(learned()), lambda: (features(3),)),
    "SigLIPLoss": (sslkern.SigLIPLoss, lambda: (*features(), torch.tensor(3.0), torch.tensor(-3.0))),
    "SupConLoss": (lambda: sslkern.SupConLoss(learned()), lambda: (*features(1), labels())),
}


def test_nothing_is_left_out():
    exported = {name for name in sslkern.__all__ if isinstance(getattr(sslkern, name), type)}
    assert exported - {"use_backend"} == {name.split()[0] for name in MODULES}


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


def call(x, arguments):
    """The loss, or for a memory what it holds after the call."""
    torch.manual_seed(1)
    if isinstance(x, (sslkern.FeatureQueue, sslkern.MemoryBank)):
        (x.push if isinstance(x, sslkern.FeatureQueue) else x.update)(*arguments)
        return next(x.buffers()).clone()
    return x(*arguments)


CASES = [(name, how) for name in MODULES for how in HOW]
CASES = [case for case in CASES if not (case[0].startswith("CachedLoss") and case[1] == "state_dict")]  # it has none


@pytest.mark.parametrize("name, how", CASES)
def test_copies_are_equal_and_apart(name, how):
    build, arguments_of = MODULES[name]
    module, arguments = build(), arguments_of()
    call(module, arguments)  # a state that is not the first
    twin = HOW[how](module, build)
    before = {key: x.detach().clone() for key, x in state_of(module).items()}
    got = call(twin, arguments)
    if got.requires_grad:
        got.backward()
    for key, x in state_of(module).items():
        assert torch.equal(x, before[key]) and x.grad is None and x.data_ptr() != state_of(twin)[key].data_ptr()
        assert not x.requires_grad or name == "SigLIPLoss" or state_of(twin)[key].grad is not None
    assert torch.equal(call(module, arguments), got)
    for key, x in state_of(module).items():
        assert torch.equal(x, state_of(twin)[key])


def test_a_function_of_prefixes_travels():
    loss, z = matryoshka(functools.partial(nt_xent, temperature=0.2), [3, D]), torch.randn(2, N, D)
    for travel in (pickle.dumps, copy.deepcopy):
        twin = travel(loss)
        twin = pickle.loads(twin) if isinstance(twin, bytes) else twin
        assert torch.equal(twin(*z), loss(*z))
