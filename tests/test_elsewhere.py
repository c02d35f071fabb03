"""What the other tests rely on: a test that leaves an argument on the CPU fails here as it would beside a GPU."""

import pytest
import torch

import sslkern
from sslkern.functional import moco, nt_xent

from .elsewhere import DEVICE, Elsewhere

IDS = torch.arange(4) // 2
QUEUE = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def another_device():
    with sslkern.use_backend("reference"), Elsewhere():
        yield


def test_what_stays_on_the_cpu_is_noticed(another_device):
    z = torch.randn(4, 8)
    with pytest.raises(ValueError, match="ids is on cpu but the features are on xpu"):
        nt_xent(z, z, ids=IDS.cpu())
    with pytest.raises(ValueError, match="queue is on cpu"):
        moco(z, z, QUEUE.cpu())
    with pytest.raises(RuntimeError, match="and the CPU"):
        z @ QUEUE.cpu().T
    with pytest.raises(RuntimeError, match="and the CPU"):
        torch.allclose(z, z.cpu())
    with pytest.raises(RuntimeError, match="and the CPU"):
        torch.ops.sslkern.sampled_similarity.default(z, QUEUE.cpu(), torch.zeros(4, 1).long(), "reference")
    with pytest.raises(RuntimeError, match="generator of the CPU"):
        torch.randn(3, generator=torch.Generator())
    with pytest.raises(TypeError, match="copy it to the CPU"):
        z.numpy()


def test_what_is_made_or_moved_there_is_there(another_device):
    z = torch.randn(4, 8, requires_grad=True)
    loss = nt_xent(z, torch.randn(4, 8), ids=IDS.cpu().to(DEVICE))
    loss.backward()
    queue, module = sslkern.FeatureQueue(8, 16), torch.nn.Linear(3, 2)
    there = z, z.double()[1:], loss, z.grad, torch.zeros_like(z), queue.queue, module.weight, torch.tensor([1.0])
    assert {x.device for x in there} == {DEVICE} and torch.empty(0).device == DEVICE
    assert {x.device.type for x in (z.cpu(), z.to("cpu"), torch.zeros(2, device="cpu"), z.to("meta"))} == {
        "cpu",
        "meta",
    }


@pytest.mark.parametrize("ids", [IDS])
def test_tensors_that_were_there_before_move(backend, ids):
    there = torch.empty(0).device
    assert IDS.device == ids.device == QUEUE.device == torch.zeros(1).device == there
    assert there == DEVICE or backend != "reference"


def test_no_trace_is_left():
    assert {torch.zeros(1).device.type, IDS.device.type, torch.empty(0).device.type} == {"cpu"}
