"""A LightningModule with our loss: the lines of docs/recipes.md."""

import logging

import pytest
import torch
from torch import nn

import sslkern

from . import pages, peer
from .agreement import same

pl = peer("pytorch_lightning")
recipe = pages.run("recipes.md", "Lightning")


def encoder():
    """Always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def fitted(make, folder, criterion, precision="64-true"):
    """The module after 20 steps of a `Trainer`."""
    module = make(encoder(), criterion)
    views = torch.randn(2, 40, 6, dtype=torch.float64 if precision == "64-true" else torch.float32)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*views), batch_size=8)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    trainer = pl.Trainer(accelerator="cpu", max_steps=20, precision=precision, default_root_dir=folder, **quiet)
    trainer.fit(module, batches)
    assert trainer.global_step == 20
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and loggers
def test_twenty_steps_of_trainer(tmp_path):
    theirs = peer("lightly.loss").NTXentLoss(0.1)
    ours, theirs = (fitted(recipe.SimCLR, tmp_path, criterion) for criterion in (None, theirs))
    same(*([x.detach() for x in module.parameters()] for module in (ours, theirs)), within=1e-8)
    before = encoder().double().parameters()
    assert not any(torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True))


class MoCo(recipe.SimCLR):
    """With a memory, which DDP is to leave alone."""

    def __init__(self, encoder, criterion):
        super().__init__(encoder, criterion)
        sslkern.memory.ignored_by_ddp(self)


@pytest.mark.filterwarnings("ignore")
def test_a_memory_under_mixed_precision_is_written_and_saved(tmp_path):
    criterion = sslkern.MoCoLoss(4, 64, group="world")
    before = criterion.memory.queue.clone()
    module = fitted(MoCo, tmp_path, criterion, precision="bf16-mixed")
    assert module.criterion.memory.queue_ptr == 20 * 8 % 64 and not torch.equal(criterion.memory.queue, before)
    state = module.state_dict()
    assert state["criterion.memory.queue"].dtype == torch.float32
    assert {"criterion.memory.queue", "criterion.memory.queue_ptr"} <= set(module._ddp_params_and_buffers_to_ignore)
