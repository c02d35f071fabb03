"""What stands in examples/ runs, and does what it says; the pictures in docs/ are those of the code."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).parents[1]


def example(name: str):
    return importlib.import_module(f"examples.{name}")


def test_a_new_loss():
    ours, dense, *gradients = example("new_loss").main()
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_simclr():
    untrained, trained = example("simclr").main()
    assert trained > untrained + 0.03


@pytest.mark.slow
def test_clip_under_ddp():
    """Two processes, started as its first lines say."""
    script = CHECKOUT / "examples" / "clip_ddp.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    paths = os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    share = re.search(r"of 128 pairs a share of ([\d.]+) find each other", ran.stdout)
    assert share and float(share[1]) > 0.8, ran.stdout


def test_the_architecture_is_drawn_as_it_is():
    from docs import architecture

    assert architecture.TARGET.read_text() == architecture.drawn(), "run python -m docs.architecture"


def test_the_figures_of_pairs_are_drawn_as_they_are():
    from docs import figures

    made = figures.figures()
    assert {path: path.read_text() for path in figures.FOLDER.iterdir()} == made, "run python -m docs.figures"
    pages = "".join(page.read_text() for page in figures.FOLDER.parent.glob("*.md") if page.name != "survey.md")
    assert [path.name for path in made if f"(figures/{path.name})" not in pages] == []


def test_a_figure_of_pairs_is_that_of_the_formula():
    """Its colours come from derivatives; here is what they have to say of SimCLR and MoCo."""
    from docs import figures

    simclr = figures.simclr().derivatives
    partner = torch.eye(8).roll(4, 0)
    assert torch.equal(simclr.sign(), 1 - torch.eye(8) - 2 * partner)
    moco = figures.moco_with_queue().derivatives
    assert torch.equal(moco.sign(), torch.cat([-torch.eye(4), torch.ones(4, 10)], 1))
