"""What every stand-in is asked: to give the numbers of the package that it stands in for, step after step."""

from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn


def random_configurations(**strategies):
    """A test that is given random configurations: 25, and 500 where long tests run."""

    def of(test: Callable) -> Callable:
        @pytest.mark.parametrize("examples", [25, pytest.param(500, marks=pytest.mark.long)])
        def run(examples):
            settings(max_examples=examples, deadline=None, derandomize=examples == 25)(given(**strategies)(test))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return of


def drawn(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Leaves of these shapes, the same for all types but for rounding."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def stepped(loss: Callable, batches: Iterable[tuple[Tensor, ...]], learned: Iterable[Tensor] = ()) -> list[Tensor]:
    """Of each batch in turn the loss and its gradients by the batch and by what is learned; then the buffers."""
    found = []
    for batch in batches:
        value = loss(*batch)
        leaves = [x for x in (*batch, *learned) if x.requires_grad]
        found += [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)]
    return found + [x.clone() for x in (loss.buffers() if isinstance(loss, nn.Module) else ())]


def same(ours: list, theirs: list, within: float = 1e-9) -> None:
    """Of one type and shape, and within so much of theirs, which are NaN and infinite in the same places."""
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None), f"result {i}: {a}, theirs is {b}"
        if b is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, f"result {i}: {a.dtype} {a.shape}, {b.dtype} {b.shape}"
            most = max([1.0, *b[b.isfinite()].double().abs().flatten().tolist()])
            assert torch.allclose(a.double(), b.double(), rtol=0, atol=within * most, equal_nan=True), f"result {i}"


def errs_no_more(results: Callable[[Callable, int, torch.dtype], list[Tensor]], ours, theirs, dtype) -> None:
    """Of results(loss, seed, dtype) ours are at most twice as far from theirs in float64 as theirs in that type, and an
    ulp; of each result the most over some seeds, as a single one may be lucky."""
    errors: dict[int, list[tuple[float, float, float]]] = {}
    for seed in range(8):
        found = (results(loss, seed, of) for loss, of in ((ours, dtype), (theirs, dtype), (theirs, torch.float64)))
        for i, (a, b, exact) in enumerate(zip(*found, strict=True)):
            assert a.dtype == b.dtype
            distances = ((x.double() - exact).abs().max().item() for x in (a, b))
            errors.setdefault(i, []).append((*distances, torch.finfo(a.dtype).eps * exact.abs().max().item()))
    for i, each in errors.items():
        error, yardstick, ulp = map(max, zip(*each, strict=True))
        assert error <= 2 * yardstick + ulp, f"result {i}: {error:.3g}, theirs {yardstick:.3g}"


def trained(model: nn.Module, step: Callable[[nn.Module, int], Tensor], steps: int = 20) -> list[Tensor]:
    """The parameters after so many steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for i in range(steps):
        optimizer.zero_grad()
        step(model, i).backward()
        optimizer.step()
    return [x.detach() for x in model.parameters()]
