"""What holds for everything that is exported: over the table of calls in examples.py."""

import pytest
import torch

from .examples import LOSSES, OPS, PUSHES, missing, value_and_gradients


def test_everything_exported_has_an_example():
    assert not missing(), f"add examples for {missing()} to tests/examples.py"


@pytest.mark.parametrize("name", [*LOSSES, *OPS])
def test_an_example_is_a_loss_with_gradients_and_the_same_each_time(name):
    make = (LOSSES | OPS)[name]
    first, second = (value_and_gradients(make()) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert (x is None and y is None) or (torch.equal(x, y) and not x.isnan().any())
    if name in LOSSES:
        assert first[0].shape == () and all(grad is not None for grad in first[1:]) and len(first) > 1


@pytest.mark.parametrize("name", PUSHES)
def test_an_example_writes(name):
    example = PUSHES[name]()
    before = example.args[0].clone()
    example()
    assert not torch.equal(example.args[0], before) and not example.args[0].isnan().any()
