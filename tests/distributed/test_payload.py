"""What ranks exchange and hold, beside what the model says of it (sslkern/distributed/cost.py)."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from sslkern import FeatureQueue, MemoryBank
from sslkern.distributed import collectives, recorded
from sslkern.distributed.cost import DEVICES, Problem, cost
from sslkern.functional import clip, moco, nce, nt_xent

from .agreement import by_triangle
from .combinations import combinations

STRATEGIES = ["all_gather", "ring"]
ITSELF = {"nt_xent": True, "clip": False}


def loss_of(name: str, rows: int, features: int, group, strategy: str, dtype=torch.float32):
    """The loss of so many rows of this rank, whose gradients are wanted."""
    if ITSELF.get(name):
        z0, z1 = (torch.randn(rows // 2, features, dtype=dtype, requires_grad=True) for _ in range(2))
        return nt_xent(z0, z1, normalize=False, group=group, strategy=strategy)
    x, y = (torch.randn(rows, features, dtype=dtype, requires_grad=True) for _ in range(2))
    if isinstance(name, FeatureQueue):
        return moco(x, y.detach(), name.queue.t(), normalize=False, group=group, strategy=strategy)
    return clip(x, y, 1.0, normalize=False, group=group, strategy=strategy)


def exchanged(group, name, strategy, rows, features, dtype, triangular=False):
    """The bytes of the forward and of the backward, sent or received, whichever are more."""
    with recorded() as forward:
        loss = loss_of(name, rows, features, group, strategy, dtype)
    with recorded() as backward, by_triangle(triangular):
        loss.backward()
    return [max(record.sent, record.received) for record in (forward, backward)]


@combinations(name=list(ITSELF), strategy=STRATEGIES, ranks=[2, 3, 5, 8], dtype=[torch.float32, torch.bfloat16])
def test_what_is_exchanged_is_what_the_model_counts(pool, name, strategy, ranks, dtype):
    """Keys in their own type, gradients of others' in fp32."""
    rows, features = 256, 128
    of = cost(strategy, Problem(rows, features, ranks, ITSELF[name], dtype.itemsize), DEVICES["cpu"], False)
    everyones = pool.run(exchanged, name, strategy, rows, features, dtype, ranks=ranks)
    for phase, counted in zip((of.forward, of.backward), zip(*everyones, strict=True), strict=True):
        assert max(counted) == pytest.approx(phase.moved, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [3, 5, 8])  # of two one only sends keys, and the other only a gradient
def test_by_a_triangle_gradients_of_half_the_ranks_go_home(pool, ranks, dtype):
    rows, features = 256, 128
    of = cost("ring", Problem(rows, features, ranks, True, dtype.itemsize), DEVICES["cpu"], True)
    everyones = pool.run(exchanged, "nt_xent", "ring", rows, features, dtype, True, ranks=ranks)
    assert max(backward for _, backward in everyones) == pytest.approx(of.backward.moved, rel=0.02)


def exchanged_with_a_memory(group, name, strategy, rows, features, size):
    """The same of a loss of a sharded memory, and of writing to it: of the last the bytes sent."""
    x, y = (torch.randn(rows, features, requires_grad=True) for _ in range(2))
    if name == "moco":
        memory = FeatureQueue(features, size, group=group, sharded=True)
        with recorded() as forward:
            loss = moco(x, y, memory.queue.t(), group=group, strategy=strategy)
    else:
        memory = MemoryBank(size, features, group=group, sharded=True)
        with recorded() as forward:
            loss = nce(x, memory.bank, torch.arange(64).expand(rows, 64), group=group, strategy=strategy)
    with recorded() as backward:
        loss.backward()
    with recorded() as written:
        if name == "moco":
            memory.push(y)
        else:
            memory.update(torch.arange(rows) * group.size() + group.rank(), y)
    return *(max(record.sent, record.received) for record in (forward, backward)), written.sent


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_of_a_sharded_memory_queries_are_exchanged(pool, strategy, ranks):
    rows, features, size = 240, 128, 4800
    of = cost(strategy, Problem(rows, features, ranks, False, 4, size // ranks), DEVICES["cpu"])
    everyones = pool.run(exchanged_with_a_memory, "moco", strategy, rows, features, size, ranks=ranks)
    forward, backward, pushed = (max(counted) for counted in zip(*everyones, strict=True))
    assert forward == pytest.approx(of.forward.moved, rel=0.02) and backward == of.backward.moved == 0
    assert pushed == (ranks - 1) * (rows // ranks * features * 4 + 512)  # of the preflight


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_of_a_sharded_bank_names_and_scores_are_exchanged(pool, ranks):
    rows, features = 240, 128
    everyones = pool.run(exchanged_with_a_memory, "nce", "auto", rows, features, 4800, ranks=ranks)
    forward, backward, updated = (max(counted) for counted in zip(*everyones, strict=True))
    longest = -(-64 // ranks)
    each = features * 4 + longest * 8 + longest * 8 + features * 4
    assert forward == pytest.approx((ranks - 1) * rows * each, rel=0.02) and backward == 0
    assert updated == (ranks - 1) * (512 + 8 * (ranks + 1))  # how many go where: all samples are this rank's


def gathered_both_ways(group):
    """Rows of all ranks through Gloo's all-gather and as messages to each of them, with what is counted."""
    counts, found = [3, 0, 4, 1, 4][: group.size()], []
    x = torch.randn(counts[group.rank()], 5, generator=torch.Generator().manual_seed(group.rank()))
    with pytest.MonkeyPatch.context() as patch:
        for least in (collectives.DIRECTLY, 1):
            patch.setattr(collectives, "DIRECTLY", least)
            with recorded() as record:
                found.append((collectives.gather_rows(x, counts, group.group_name), record.sent, record.received))
    return found


@pytest.mark.parametrize("ranks", [2, 5])
def test_large_rows_are_sent_to_each_rank(pool, ranks):
    """As Gloo's all-gather would hold them twice."""
    for (rows, *counted), (directly, *counted_then) in pool.run(gathered_both_ways, ranks=ranks):
        assert torch.equal(rows, directly) and counted == counted_then and counted[1] > 0


def events(group):
    """Of a forward and a backward by a ring."""
    x, y = (torch.randn(8, 4, requires_grad=True) for _ in range(2))
    with recorded() as record:
        clip(x, y, 1.0, group=group, strategy="ring").backward()
    return record.events


def events_by_triangle(group):
    """Of a backward of views with each other that visits each pair of ranks once."""
    loss = loss_of("nt_xent", 8, 4, group, "ring")
    with recorded() as record, by_triangle(True):
        loss.backward()
    return record.events


@pytest.mark.parametrize("ranks", [2, 5])
def test_what_comes_next_is_asked_for_before_a_block_is_computed_by_a_triangle(pool, ranks):
    for rank, found in enumerate(pool.run(events_by_triangle, ranks=ranks)):
        computing = [step for step in range(ranks // 2 + 1) if 2 * step < ranks or 2 * rank < ranks]
        phase = [(event, step) for step in computing for event in ("post", "compute", "wait")]
        phase += [(event, step) for step in range(len(computing), ranks // 2 + 2) for event in ("post", "wait")]
        assert found == phase


@pytest.mark.parametrize("ranks", [2, 5])
def test_what_comes_next_is_asked_for_before_a_block_is_computed(pool, ranks):
    phase = [(event, step) for step in range(ranks) for event in ("post", "compute", "wait")]
    phase += [("post", ranks), ("wait", ranks)]  # the last results
    assert pool.run(events, ranks=ranks) == [2 * phase] * ranks


def held(group, name, strategy, rows, features, triangular=False):
    """The most bytes that a forward and a backward need at once, beside what was there before."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed is given back, and so not there before
    with by_triangle(triangular):
        loss_of(name, 64, features, group, strategy).backward()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts at what is resident now
        before = resident("VmRSS")
        loss_of(name, rows, features, group, strategy).backward()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="it needs Linux, which tells the peak")
@pytest.mark.parametrize("name", ITSELF)
def test_the_ring_holds_a_few_blocks_for_any_number_of_ranks(pool, name):
    rows, features = 1024, 480
    own = rows * features * 4 * (1 if ITSELF[name] else 2)  # are drawn within what is measured
    peaks = {
        (strategy, ranks): max(pool.run(held, name, strategy, rows, features, ranks=ranks))
        for strategy, ranks in (("ring", 3), ("ring", 8), ("all_gather", 8))
    }
    for (strategy, ranks), peak in peaks.items():
        predicted = cost(strategy, Problem(rows, features, ranks, ITSELF[name], 4), DEVICES["cpu"], False).memory + own
        print(f"{strategy} of {ranks} ranks: {peak / 1e6:.1f} MB, by the model {predicted / 1e6:.1f}")
        assert peak < 1.15 * predicted
    assert peaks["all_gather", 8] > max(0.85 * predicted, 1.5 * peaks["ring", 8])  # or nothing of this would be seen


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="it needs Linux, which tells the peak")
def test_a_triangle_holds_three_gradients_more_for_any_number_of_ranks(pool):
    rows, features = 1024, 480
    own = rows * features * 4  # are drawn within what is measured
    for ranks in (3, 5, 8):
        peak = max(pool.run(held, "nt_xent", "ring", rows, features, True, ranks=ranks))
        predicted = cost("ring", Problem(rows, features, ranks, True, 4), DEVICES["cpu"], True).memory + own
        print(f"{ranks} ranks: {peak / 1e6:.1f} MB, by the model {predicted / 1e6:.1f}")
        assert peak < 1.15 * predicted
    assert peak > 0.85 * predicted  # or nothing of this would be seen


def held_with_a_memory(group, strategy, rows, features, size):
    """The bytes of the buffers of a queue, and the most that a loss needs beside them."""
    memory = FeatureQueue(features, size, group=group, sharded=True)
    return sum(x.nbytes for x in memory.buffers()), held(group, memory, strategy, rows, features)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="it needs Linux, which tells the peak")
def test_a_rank_holds_its_part_of_a_memory_and_a_few_blocks_of_queries(pool):
    rows, features, size = 1024, 480, 4096
    whole, query = size * features * 4, rows * features * 4
    for strategy, ranks in (("ring", 3), ("ring", 8), ("all_gather", 8)):
        everyones = pool.run(held_with_a_memory, strategy, rows, features, size, ranks=ranks)
        part, peak = (max(of) for of in zip(*everyones, strict=True))
        of = cost(strategy, Problem(rows, features, ranks, False, 4, size // ranks), DEVICES["cpu"])
        print(f"{strategy} of {ranks} ranks: {peak / 1e6:.1f} MB, by the model {(of.memory + 2 * query) / 1e6:.1f}")
        assert part == pytest.approx(whole / ranks, rel=0.01)
        assert peak < 1.15 * (of.memory + 2 * query)
