"""The order in which ranks meet, for many more ranks than there are processes here."""

import functools
from collections import Counter

import pytest

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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_of_4096_ranks(schedule):
    """All steps of some ranks, whose peers have the other side of each message in the same step; and who computes with
    the keys of such a rank."""
    size = 4096
    for rank in (0, 1, 1234, 2047, 2048, 4095):
        steps, met = SCHEDULES[schedule](rank, size), []
        for i, step in enumerate(steps):
            sends, receives = messages_of(rank, step)
            for peer in {m.peer for m in step.sends + step.receives}:
                their_sends, their_receives = messages_of(peer, SCHEDULES[schedule](peer, size)[i])
                assert {key for key in sends if key[1] == peer} == {key for key in their_receives if key[0] == rank}
                assert {key for key in receives if key[0] == peer} == {key for key in their_sends if key[1] == rank}
            met += [step.compute] if step.compute is not None else []
            met += [m.peer for m in step.receives if m.what == "result"] if schedule == "triangle" else []
        assert sorted(met) == list(range(size))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_of_all_4096_ranks(schedule):
    """The first and last steps and some between, of every rank."""
    size = 4096
    ranks = [SCHEDULES[schedule](rank, size) for rank in range(size)]
    last = len(ranks[0]) - 1
    for i in sorted({0, 1, 2, *range(0, last, 311), last - 2, last - 1, last}):
        steps = [messages_of(rank, steps[i]) for rank, steps in enumerate(ranks)]
        assert set().union(*(sends for sends, _ in steps)) == set().union(*(receives for _, receives in steps))
        works_with = {rank: steps[i].compute for rank, steps in enumerate(ranks) if steps[i].compute is not None}
        assert all((rank - keys) % size == i for rank, keys in works_with.items())  # whom it meets in no other step
        expected = size // 2 if schedule == "triangle" and i == size // 2 else size if i <= ranks[0].last else 0
        assert len(works_with) == expected
