"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
import io
from pathlib import Path

import pytest
import ssltrain
import torch

import sslkern


def modules_with_examples() -> list[str]:
    files = [
        (Path(package.__file__).parent, path)
        for package in (sslkern, ssltrain)
        for path in Path(package.__file__).parent.rglob("*.py")
    ]
    names = (path.relative_to(root.parent).with_suffix("").parts for root, path in files if ">>> " in path.read_text())
    return sorted(".".join(parts).removesuffix(".__init__") for parts in names)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name):
    """With torch, sslkern and what the module itself can see."""
    module = importlib.import_module(name)
    torch.manual_seed(0)
    report, runner = io.StringIO(), doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder().find(module, extraglobs={"torch": torch, "sslkern": sslkern}):
        runner.run(test, out=report.write)
    assert runner.tries > 0 and runner.failures == 0, report.getvalue()
