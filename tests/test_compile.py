"""Compiled code, for everything that is exported: whole graphs, eager values and gradients, and few compilations while
sizes and Python numbers change."""

import inspect
import sys
from collections.abc import Container, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map

import sslkern

from .examples import LOSSES, OPS, Example, value_and_gradients

CACHED = {"CachedLoss"}  # its encoder compiles, it does not
CALLS = {name: make for name, make in (LOSSES | OPS).items() if name not in CACHED}


def with_numbers(example: Example, factor: float) -> Example:
    """The call with a Python float in place of every scale and every default that is one, all times `factor`."""

    def number(x):
        scale = isinstance(x, Tensor) and x.ndim == 0 and x.is_floating_point()
        if isinstance(x, float):
            return factor * x
        return factor * x.item() if scale else x

    args, options = tree_map(number, (example.args, example.options))
    if inspect.isfunction(example.target):
        given = inspect.signature(example.target).bind(*args, **options).arguments
        for name, parameter in inspect.signature(example.target).parameters.items():
            if name not in given and isinstance(parameter.default, float) and parameter.default:
                options[name] = number(parameter.default)
    elif isinstance(example.target, nn.Module):
        for module in example.target.modules():
            for name, value in vars(module).items():
                if not name.startswith("_") and name != "momentum":  # of a bank: compiled anew for each
                    setattr(module, name, tree_map(number, value) if isinstance(value, (dict, float)) else value)
    return Example(example.target, args, options)


def counted(calls, backend="aot_eager", **options) -> int:
    """How often the target of calls was compiled; each call gives what it gives in eager code."""
    torch.compiler.reset()
    counter, compiled = CompileCounterWithBackend(backend), {}
    for make in calls:
        example, eager = make(), make()
        target = example.target
        # modules are different ones, their code is the same
        run = compiled.setdefault(target, torch.compile(target, fullgraph=True, backend=counter, **options))
        got = value_and_gradients(Example(run, example.args, example.options))
        for ours, plain in zip(got, value_and_gradients(eager), strict=True):
            if plain is None:
                assert ours is None or not ours.any()
            else:
                assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)
    return counter.frame_count


def changing(name) -> list:
    """Three calls of different sizes and numbers."""
    return [lambda N=N, f=f: with_numbers(CALLS[name](N=N), f) for N, f in ((8, 1.0), (12, 1.1), (20, 1.2))]


@pytest.fixture
def kernels(monkeypatch):
    """The ops also where the formula is left to the compiler, as for larger batches."""
    monkeypatch.setattr(sys.modules["sslkern.ops.pair_contrast"], "few_pairs", lambda *_: False)
    monkeypatch.setattr(sys.modules["sslkern.ops._dense"], "few", lambda *_: False)


STATE = {"CMCLoss", "MoCoLoss", "NCELoss", "NNCLRLoss"}  # modules that are more than their function
FIRST = [name for name in CALLS if ":" not in name and (name[0].islower() or name in STATE)]


def names(known: Iterable[str], taken: Container[str], others: pytest.MarkDecorator) -> list:
    """Of the known ones; those that are not taken are marked."""
    return [name if name in taken else pytest.param(name, marks=others) for name in known]


SOME = {"nt_xent", "info_nce", "siglip", "NCELoss"}


@pytest.mark.parametrize("name", names(FIRST, SOME, pytest.mark.long))
def test_sizes_and_numbers_may_change(name):
    assert counted(changing(name), "eager") <= 2  # the second finds out what changes


@pytest.mark.parametrize("name", ["nt_xent: ids", "info_nce: two ways", "mnrl: every direction"])
def test_sizes_and_numbers_may_change_for_the_kernels(kernels, name):
    assert counted(changing(name), "eager") <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", names(CALLS, SOME, pytest.mark.long))
def test_the_compilers_own_derivatives(name):
    assert counted(changing(name)) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", names(CALLS, SOME, pytest.mark.long))
def test_symbolic_from_the_start(kernels, name):
    # Once may count twice: the compiler starts anew where it finds that a number need not be symbolic.
    assert counted(changing(name), dynamic=True) <= 3


GENERATED = ["nt_xent", "clip", "siglip: float", "debiased", "deep_infomax", "mnrl", "MoCoLoss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", names(GENERATED, {"nt_xent", "MoCoLoss"}, pytest.mark.long))
def test_generated_code(name):
    assert counted(changing(name), "inductor") <= 2


def test_a_second_temperature_margin_or_scale():
    z = torch.randn(2, 8, 16)
    for loss in (
        lambda x: sslkern.functional.nt_xent(*z, temperature=x),
        lambda x: sslkern.functional.mnrl(*z, margin=x),
        lambda x: sslkern.functional.siglip(*z, 10 * x, -x),
    ):
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        for x in (0.1, 0.2, 0.5):
            assert torch.allclose(compiled(x), loss(x))


def test_modules_of_other_temperatures():
    torch.compiler.reset()
    z = torch.randn(2, 8, 16)
    for T in (0.1, 0.2, 0.5):
        loss = sslkern.NTXentLoss(T)
        assert torch.allclose(torch.compile(loss, fullgraph=True, backend="eager")(*z), loss(*z))


def test_memories_of_other_batch_sizes():
    torch.compiler.reset()
    bank, queue, labelled = sslkern.MemoryBank(20, 4), sslkern.FeatureQueue(4, 9), sslkern.CrossBatchMemory(4, 9)

    def step(sample, x):
        index = bank.sample(sample, 5)
        bank.update(sample, x)
        queue.push(x)
        labelled.push(x, sample)
        return index

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for N in (3, 5, 12, 7):
        sample, x = torch.randperm(20)[:N], torch.randn(N, 4)
        index = compiled(sample, x)
        assert index.shape == (N, 6) and (index[:, 0] == sample).all() and (index[:, 1:] != sample[:, None]).all()
        last = torch.nn.functional.normalize(x)[-9:]
        for memory in (queue, labelled):
            place = (memory.queue_ptr - 1 - torch.arange(len(last)).flip(0)) % 9
            assert torch.allclose(memory.queue.t()[place], last)
        assert (labelled.labels[place] == sample[-9:]).all()
    assert counter.frame_count <= 3  # the labels of more keys than fit are cut


@pytest.mark.parametrize("N", [8, 300])
def test_a_queue_may_be_overwritten_before_the_backward(N):
    """Compiled code does not notice that a buffer which it keeps for the backward has changed."""
    torch.compiler.reset()
    query, key, start = torch.randn(N, 16, requires_grad=True), torch.randn(N, 16), torch.randn(N, 16)

    def step(query, queue):
        loss = sslkern.functional.info_nce(query, key, queue) + sslkern.ops.similarity_lse(query, queue).sum()
        queue.copy_(key)
        return loss

    (want,) = torch.autograd.grad(step(query, start.clone()), query)
    (got,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(query, start.clone()), query)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
