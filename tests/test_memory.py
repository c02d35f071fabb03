import copy
import io

import pytest
import torch

import sslkern
from sslkern import CrossBatchMemory, FeatureQueue, MemoryBank
from sslkern.memory import joined


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
    near = 1e-7 if how == "assign" else 0  # of a queue in another layout the keys are divided by other code
    assert torch.allclose(memory.queue, other.queue, rtol=0, atol=near)
    assert torch.equal(memory.queue_ptr, other.queue_ptr)


def test_compiled_push_does_not_clone_the_queue(backend):
    torch.compiler.reset()
    memory, keys = FeatureQueue(dim=3, size=8), torch.randn(5, 3)
    twin, at = copy.deepcopy(memory), memory.queue.data_ptr()
    torch.compile(memory.push, fullgraph=True, backend="aot_eager")(keys)
    twin.push(keys)
    assert torch.equal(memory.queue, twin.queue) and memory.queue_ptr.item() == 5 and memory.queue.data_ptr() == at


def test_a_bank_divides_features_by_their_norm(backend):
    """How long a row is does not change how far its vector moves; the published code normalises in the network."""
    bank, x, index = MemoryBank(size=8, dim=3, momentum=0.3), torch.randn(4, 3), torch.tensor([1, 6, 0, 3])
    before, twin, others = bank.bank.clone(), copy.deepcopy(bank), [2, 4, 5, 7]
    bank.update(index, x)
    twin.update(index, x * torch.tensor([[0.1], [2.0], [30.0], [1e4]]))
    moved = 0.3 * before[index] + 0.7 * torch.nn.functional.normalize(x, dim=1)
    assert torch.allclose(bank.bank[index], torch.nn.functional.normalize(moved, dim=1), atol=1e-6)
    assert torch.allclose(twin.bank, bank.bank, atol=1e-6) and torch.equal(bank.bank[others], before[others])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="size must"):
        FeatureQueue(3, 0)
    index, wrong = torch.arange(2), (None, [1.0], torch.ones(2, 4), torch.ones(3), torch.ones(2, 3).long())
    bank = MemoryBank(8, 3)
    for bad in wrong:
        for name, call in {
            "keys": lambda bad=bad: FeatureQueue(3, 8).push(bad),
            "keys must": lambda bad=bad: CrossBatchMemory(3, 8).push(bad, index),
            "labels must": lambda bad=bad: CrossBatchMemory(3, 8).push(torch.ones(2, 3), bad),
            "features must": lambda bad=bad: bank.update(index, bad),
            "index must": lambda bad=bad: bank.update(bad, torch.ones(2, 3)),
            "index must be": lambda bad=bad: bank.sample(bad, 2),
            "negatives must": lambda bad=bad: bank.sample(index, bad),
        }.items():
            with pytest.raises((ValueError, TypeError), match=name):
                call()
    narrow, z = torch.float8_e4m3fn, torch.randn(2, 3)  # a type that torch has and no kernel computes in
    for name, call in {
        "queue must": lambda: FeatureQueue(3, 8).to(narrow).push(z),
        "queue must be": lambda: CrossBatchMemory(3, 8).to(narrow).push(z, index),
        "queue": lambda: sslkern.MoCoLoss(3, 8).to(narrow)(z, z),
        "queue must be ": lambda: sslkern.NNCLRLoss(3, 8).to(narrow)(z, z, z, z),
        "bank must": lambda: MemoryBank(8, 3).to(narrow).update(index, z),
        "bank must be": lambda: sslkern.NCELoss(8, 3, 2).to(narrow)(z, index),
    }.items():
        with pytest.raises((ValueError, TypeError), match=name):
            call()
    with pytest.raises(TypeError, match="generator must"):
        bank.sample(index, 2, 0)


def test_bank_samples_others_and_travels(backend):
    memory = MemoryBank(size=5, dim=3)
    assert torch.allclose(memory.bank.norm(dim=1), torch.ones(5))
    index = torch.tensor([0, 4, 2])
    rows = memory.sample(index, 4000)
    assert torch.equal(rows[:, 0], index) and rows.shape == (3, 4001)
    for row in rows:
        counts = row[1:].bincount(minlength=5)
        assert counts[row[0]] == 0 and counts.sum() == 4000 and (counts[counts > 0] > 850).all()  # of 1,000
    memory.update(index, torch.randn(3, 3, requires_grad=True))
    other = MemoryBank(size=5, dim=3)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.bank, memory.bank) and memory.state_dict().keys() == {"bank"}
    x = torch.randn(3, 3)
    memory.update(index, x)
    other.update(index, x)
    assert torch.equal(other.bank, memory.bank)
    for bad in (lambda: memory.sample(index.float(), 3), lambda: memory.sample(index, -1)):
        with pytest.raises(ValueError, match="must be"):
            bad()
    with pytest.raises(ValueError, match="negatives must be 0"):
        MemoryBank(1, 3).sample(torch.zeros(1, dtype=torch.long), 1)


def test_bank_samples_from_a_generator():
    memory, index = MemoryBank(size=50, dim=3), torch.arange(5)
    first, again, other = (memory.sample(index, 20, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_cross_batch_memory_knows_the_labels(backend):
    memory, keys = CrossBatchMemory(dim=3, size=8), torch.nn.functional.normalize(torch.randn(21, 3), dim=1)
    labels = torch.arange(21)
    assert memory.contents()[0].shape == (0, 3)
    memory.push(keys[:5], labels[:5])
    assert torch.allclose(memory.contents()[0], keys[:5]) and torch.equal(memory.contents()[1], labels[:5])
    memory.push(keys[5:9], labels[5:9])
    kept, of = memory.contents()
    assert sorted(of.tolist()) == list(range(1, 9)) and torch.allclose(kept, keys[of])
    memory.push(keys[9:], labels[9:])  # more than fit
    kept, of = memory.contents()
    assert sorted(of.tolist()) == list(range(13, 21)) and torch.allclose(kept, keys[of])
    other = CrossBatchMemory(dim=3, size=8)
    other.load_state_dict(copy.deepcopy(memory.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(memory.contents(), other.contents(), strict=True))
    with pytest.raises(ValueError, match="labels must"):
        memory.push(keys[:2], labels[:3])
    for wild in (-1, 12) if backend == "cuda-emulated" else (-1, 12, 2**63 - 1, -(2**63)):
        memory.queue_ptr.fill_(wild)
        memory.push(keys[:5], labels[:5])
        kept, of = memory.contents()
        assert torch.allclose(kept, keys[of]) and set(of.tolist()) >= set(range(5))


def test_a_memory_may_be_pushed_rows_of_its_own(backend):
    memory, other = (CrossBatchMemory(4, 12) for _ in range(2))
    memory.push(torch.randn(10, 4), torch.arange(10))
    other.load_state_dict(memory.state_dict())
    keys, labels = memory.contents()
    memory.push(keys, labels)
    keys, labels = (x.clone() for x in other.contents())
    other.push(keys, labels)
    assert torch.equal(memory.queue, other.queue) and torch.equal(memory.labels, other.labels)


def test_a_process_alone_has_all_of_a_sharded_memory(backend):
    query, key = torch.randn(2, 5, 4)
    whole, sharded = sslkern.MoCoLoss(4, 9), sslkern.MoCoLoss(4, 9, group="world", sharded=True)
    sharded.load_state_dict(whole.state_dict())
    for _ in range(3):
        assert torch.equal(whole(query, key), sharded(query, key))
    state = joined([sharded.state_dict()])
    assert all(torch.equal(x, state[name]) for name, x in whole.state_dict().items())
    assert repr(sharded) == repr(whole).replace("group=None", "group='world'")
