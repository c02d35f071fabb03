import copy
import io

import pytest
import torch

from sslkern import FeatureQueue


def test_holds_the_last_keys(backend):
    memory = FeatureQueue(dim=3, size=8)
    assert torch.allclose(memory.queue.norm(dim=0), torch.ones(8)) and memory.queue.shape == (3, 8)
    keys = torch.randn(11, 3, requires_grad=True)
    memory.push(keys[:5])
    memory.push(keys[5:])
    assert memory.queue_ptr.tolist() == [3] and not memory.queue.requires_grad
    expected = torch.nn.functional.normalize(keys[3:].detach()).roll(3, 0)
    assert torch.allclose(memory.queue.t(), expected, atol=1e-6)
    plain = FeatureQueue(dim=3, size=8, normalize=False)
    plain.push(keys[:5])
    assert torch.equal(plain.queue.t()[:5], keys[:5])


@pytest.mark.parametrize("how", ["state_dict", "assign", "deepcopy", "save", "to"])
def test_travels(backend, how):
    memory = FeatureQueue(dim=3, size=8)
    memory.push(torch.randn(5, 3))
    assert {name: x.shape for name, x in memory.state_dict().items()} == {"queue": (3, 8), "queue_ptr": (1,)}
    other = FeatureQueue(dim=3, size=8)
    if how in ("state_dict", "assign"):
        state = {name: x.contiguous().clone() for name, x in memory.state_dict().items()}  # as safetensors has it
        other.load_state_dict(state, assign=how == "assign")
    elif how == "save":
        file = io.BytesIO()
        torch.save(memory.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
    else:
        other = (
            copy.deepcopy(memory) if how == "deepcopy" else copy.deepcopy(memory).to(torch.float64).to(torch.float32)
        )
    if how != "assign":
        assert other.queue.t().is_contiguous()
    keys = torch.randn(6, 3)
    memory.push(keys)
    other.push(keys)
    assert torch.equal(memory.queue, other.queue) and torch.equal(memory.queue_ptr, other.queue_ptr)


def test_compiled_push_does_not_clone_the_queue(backend):
    torch.compiler.reset()
    memory, keys = FeatureQueue(dim=3, size=8), torch.randn(5, 3)
    twin, at = copy.deepcopy(memory), memory.queue.data_ptr()
    torch.compile(memory.push, fullgraph=True, backend="aot_eager")(keys)
    twin.push(keys)
    assert torch.equal(memory.queue, twin.queue) and memory.queue_ptr.item() == 5 and memory.queue.data_ptr() == at


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="size must"):
        FeatureQueue(3, 0)
    with pytest.raises(ValueError, match="keys must"):
        FeatureQueue(3, 8).push(torch.ones(2, 4))
