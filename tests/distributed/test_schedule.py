"""The order in which ranks meet, for many more ranks than there are processes here."""

import functools
from collections import Counter

import pytest
import torch

from sslkern.distributed.schedule import Message, Step, ring, triangle

SCHEDULES = {
    "ring": ring,
    "ring with results": lambda rank, size: ring(rank, size, results=True),
    "triangle": triangle,
}
SIZES = range(1, 65)


@functools.cache
def of_all(schedule, size: int) -> list[list[Step]]:
    """The steps of each rank."""
    return [list(SCHEDULES[schedule](rank, size)) for rank in range(size)]


def messages_of(rank: int, step: Step) -> tuple[set, set]:
    """The messages of a step as (from, to, what, block): what the rank sends, and what it receives."""
    sends = {(rank, m.peer, m.what, m.block) for m in step.sends}
    return sends, {(m.peer, rank, m.what, m.block) for m in step.receives}


def run(ranks: list[list[Step]]) -> set[int]:
    """Goes through the steps as ranks without any buffer would: a message passes when both sides are at the step that
    has it, and a rank goes on when all of its messages have passed. Returns who does not get to the end."""
    left, passed, moved = {rank: list(steps) for rank, steps in enumerate(ranks)}, set(), True
    while moved:
        now = {rank: messages_of(rank, steps[0]) for rank, steps in left.items()}
        passed |= set().union(*(sends for sends, _ in now.values())) & set().union(*(r for _, r in now.values()))
        moved = [rank for rank, (sends, receives) in now.items() if sends | receives <= passed]
        for rank in moved:
            left[rank].pop(0)
        left = {rank: steps for rank, steps in left.items() if steps}
    return set(left)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_pair_of_ranks_meets_once(schedule):
    for size in SIZES:
        pairs = Counter((rank, s.compute) for rank, steps in enumerate(of_all(schedule, size)) for s in steps)
        pairs = Counter({pair: n for pair, n in pairs.items() if pair[1] is not None})
        if schedule == "triangle":
            pairs = Counter(frozenset(pair) for pair in pairs.elements())
        assert set(pairs.values()) == {1}
        assert len(pairs) == (size * (size + 1) // 2 if schedule == "triangle" else size**2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_work_is_balanced_within_one_block(schedule):
    for size in SIZES:
        blocks = [sum(s.compute is not None for s in steps) for steps in of_all(schedule, size)]
        assert max(blocks) - min(blocks) <= (schedule == "triangle" and size % 2 == 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rank_has_what_it_works_with_and_what_it_sends(schedule):
    """And never more of others' than the keys of this step and the next, the result that it makes and one on its way,
    and one that comes in."""
    for size in SIZES:
        for rank, steps in enumerate(of_all(schedule, size)):
            keys, made = {rank}, set()
            for step in steps:
                assert {m.block for m in step.sends if m.what == "keys"} <= keys
                assert {m.block for m in step.sends if m.what == "result"} == made  # of the step before, all of it
                assert step.compute is None or step.compute in keys
                coming = {m.block for m in step.receives if m.what == "keys"}
                assert len((keys | coming) - {rank}) <= 2
                assert sum(m.what == "result" for m in step.receives) <= 1
                assert all(m.block == rank for m in step.receives if m.what == "result")
                made = {step.compute} - {None, rank} if schedule != "ring" else set()
                keys = coming or keys
            assert not made


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_rank_gets_to_the_end(schedule):
    """Every send has its receive in a step that both reach: nothing is waited for in vain, without any buffer."""
    for size in SIZES:
        assert not run(of_all(schedule, size))


def test_waiting_in_vain_would_be_seen():
    ranks = [list(steps) for steps in of_all("triangle", 5)]
    ranks[2][1] = ranks[2][1]._replace(receives=ranks[2][1].receives[:-1])
    assert set(run(ranks)) == set(range(5))


def test_results_go_to_whom_they_are_for():
    for size in SIZES:
        for rank, steps in enumerate(of_all("triangle", size)):
            for m in [m for step in steps for m in step.sends]:
                assert m.what == "keys" and m.peer == (rank + 1) % size or m == Message("result", m.peer, m.peer)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [pytest.param("ring", marks=pytest.mark.long), *list(SCHEDULES)[1:]])
def test_of_4096_ranks(schedule):
    """All of the above, for the steps of all ranks at a time."""
    size = 4096
    ranks = torch.arange(size)
    of_all = SCHEDULES[schedule](ranks, size)
    some = [SCHEDULES[schedule](rank, size) for rank in (1, 2048)]
    met, blocks = torch.zeros(size, size, dtype=torch.int8), torch.zeros(size, dtype=torch.int64)
    here, made = ranks, torch.zeros(size, dtype=torch.bool)  # whose keys; whether there is a result of the step before
    for step in range(len(of_all)):
        computes = torch.as_tensor(of_all.computes(ranks, step)).expand(size)
        sends, receives = (
            {m.what: (m.block, m.peer, torch.as_tensor(there).expand(size)) for m, there in messages}
            for messages in of_all.messages(step)
        )
        for what, (block, peer, there) in sends.items():  # nothing is waited for in vain
            their_block, their_peer, awaited = receives[what]
            assert (awaited[peer] & (their_peer[peer] == ranks) & (their_block[peer] == block))[there].all()
            assert awaited.sum() == there.sum()
        keys = of_all.keys_of(step)
        assert (keys == here)[computes].all() and (sends["keys"][0] == here)[sends["keys"][2]].all()
        assert torch.equal(sends["result"][2], made) and (sends["result"][0] == (ranks - step + 1) % size).all()
        assert (sends["result"][0] == sends["result"][1]).all() and (receives["result"][0] == ranks).all()
        met[ranks[computes], keys[computes]] += 1
        blocks += computes
        here = torch.where(receives["keys"][2], receives["keys"][0], here)
        made = computes & (keys != ranks) & of_all.results
        for plan in some:  # what is yielded is that
            got, rank = plan[step], plan.rank
            assert got.compute == (keys[rank] if computes[rank] else None)
            for messages, those in ((got.sends, sends), (got.receives, receives)):
                assert [tuple(m) for m in messages] == [
                    (what, block[rank], peer[rank]) for what, (block, peer, there) in those.items() if there[rank]
                ]
    assert not made.any()
    assert (met + met.T.tril(-1) + met.T.triu(1) == 1).all() if schedule == "triangle" else (met == 1).all()
    assert blocks.max() - blocks.min() <= (schedule == "triangle")
