"""The native modules refuse each tensor that is not as their kernels read or write it."""

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

import sslkern
from sslkern.backends import BACKENDS
from sslkern.ops.unit_pairs import unit_pairs

from .conftest import GPU, emulated_cuda
from .examples import OPS, PUSHES, value_and_gradients

FUNCTIONS = {
    "similarity_lse_fwd",
    "similarity_lse_frozen_fwd",
    "similarity_lse_bwd",
    "similarity_softplus",
    "similarity_topk",
    "sampled_similarity_fwd",
    "sampled_similarity_bwd",
    "queue_push_",
    "bank_update_",
    "unit_pairs_fwd",
    "unit_pairs_bwd",
}
WRONG = {
    "type": lambda x: x.to(torch.int32),
    "size": lambda x: torch.cat((x.flatten(), x.flatten()[:1])),
    "nothing": lambda x: x.flatten()[:0],
    "device": lambda x: x.to("meta"),
    "gaps": lambda x: x.flatten().repeat_interleave(2)[::2],
    "shape": lambda x: [],
}


def refused(call, args) -> int:
    """Calls a native function with each of its tensors replaced in turn; how many those are."""
    leaves, structure = tree_flatten(args)
    places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
    for i in places:
        for name, wrong in WRONG.items():
            if name == "gaps" and leaves[i].numel() < 2:
                continue
            other = wrong(leaves[i].detach())
            kept = other.clone() if isinstance(other, torch.Tensor) and not other.is_meta else None
            with pytest.raises(ValueError, match="must ") as error:
                call(*tree_unflatten([*leaves[:i], other, *leaves[i + 1 :]], structure))
            assert "\n" not in str(error.value)
            assert kept is None or torch.equal(kept.nan_to_num(), other.nan_to_num())
    return len(places)


@pytest.mark.skipif(GPU or BACKENDS["triton"].INTERPRETED, reason="for native kernels on the CPU, emulated ones too")
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_wrong_buffers_are_refused(monkeypatch, name):
    native = BACKENDS["cpu"]._cpu if name == "cpu" else emulated_cuda()
    if name == "cuda":
        for attribute, value in (("_cuda", native), ("MISSING", None), ("DEVICES", ("cpu",))):
            monkeypatch.setattr(BACKENDS[name], attribute, value)
    known, calls = {f for f in FUNCTIONS if hasattr(native, f)}, {}

    def recorded(function):
        real = getattr(native, function)

        def call(*args):
            calls[function] = real, args
            return real(*args)

        return call

    for function in known:
        monkeypatch.setattr(native, function, recorded(function))
    with sslkern.use_backend(name):
        for make in [OPS[op] for op in OPS if name == "cpu" or "sampled" in op] + list(PUSHES.values()):
            value_and_gradients(make())
        x, y = torch.randn(2, 8, 4, requires_grad=True)
        sum(out.sum() for out in unit_pairs(x, y)).backward()
    assert calls.keys() == known
    for function, (real, args) in calls.items():
        assert refused(real, args) >= 3, function
