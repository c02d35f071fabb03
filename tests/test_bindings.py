"""Native code refuses each tensor that is not as its kernels read or write it."""

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

import sslkern
from sslkern.backends import BACKENDS
from sslkern.backends.cuda import launch
from sslkern.ops.unit_pairs import unit_pairs

from .conftest import GPU, emulate_cuda
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


def run(name: str) -> None:
    """Calls all functions of a backend that take tensors."""
    with sslkern.use_backend(name):
        for make in [OPS[op] for op in OPS if name == "cpu" or "sampled" in op] + list(PUSHES.values()):
            value_and_gradients(make())
        x, y = torch.randn(2, 8, 4, requires_grad=True)
        sum(out.sum() for out in unit_pairs(x, y)).backward()


on_the_cpu = pytest.mark.skipif(
    GPU or BACKENDS["triton"].INTERPRETED, reason="for native kernels on the CPU, emulated ones too"
)


@on_the_cpu
def test_wrong_buffers_are_refused(monkeypatch):
    native = BACKENDS["cpu"]._cpu
    known, calls = {f for f in FUNCTIONS if hasattr(native, f)}, {}

    def recorded(function):
        real = getattr(native, function)

        def call(*args):
            calls[function] = real, args
            return real(*args)

        return call

    for function in known:
        monkeypatch.setattr(native, function, recorded(function))
    run("cpu")
    assert calls.keys() == known
    for function, (real, args) in calls.items():
        assert refused(real, args) >= 3, function


@on_the_cpu
def test_wrong_buffers_are_refused_before_a_cuda_launch(monkeypatch):
    emulate_cuda(monkeypatch)
    real, calls, launched = launch.Call.address, [], []

    def address(self, *args):
        calls.append((self, args))
        return real(self, *args)

    def put(self, kernel, blocks, *arguments):
        launched.append((kernel, arguments))

    monkeypatch.setattr(launch.Call, "address", address)
    monkeypatch.setattr(launch.Call, "launch", put)
    run("cuda")
    checked = {real(call, *args) for call, args in calls}
    for _, arguments in launched:  # no number is an address by another way
        assert all(x in checked or abs(x) < 2**32 for x in arguments)
    assert {args[0] for _, args in calls} == {
        *("queue", "ptr", "keys", "bank", "index", "x", "last", "q", "out", "g", "dq", "y", "z", "norm", "cosine"),
        *("pull", "da", "db", "dx", "dy"),
    }
    for call, args in calls:
        if args[1] is not None:
            assert refused(lambda *args, call=call: real(call, *args), args) == 1
            with pytest.raises(ValueError, match="plain memory"):
                real(call, args[0], torch._neg_view(args[1]), *args[2:])
