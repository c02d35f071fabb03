"""In which order ranks meet: pure functions that yield, for a rank, what it computes, sends and receives in each step.

Keys walk round the ring: in step s rank r works with those of rank r - s (of all numbers the rest by the size of the
group is meant), while it passes them on to rank r + 1 and receives those of the next step from rank r - 1. What comes
out for the keys (the log-sum-exps of columns, or the keys' gradient) goes straight back to their owner while the next
step is computed. So at most two blocks of others' keys and two results are alive in any step, for any number of ranks.

                keys of rank    0  1  2  3  4          0  1  2  3  4          the number is the step
    ring              rank 0    0  4  3  2  1          0  .  .  2  1    triangle
                           1    1  0  4  3  2          1  0  .  .  2
                           2    2  1  0  4  3          2  1  0  .  .
                           3    3  2  1  0  4          .  2  1  0  .
                           4    4  3  2  1  0          .  .  2  1  0

`ring` is for two sets of rows, and for what a rank works out for its own rows alone. `triangle` is for one set with
itself: it visits each pair of ranks once, and results for the keys are the other half. Of an even number of ranks those
of the last step would meet from both sides, so that only the first half of them computes then.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Message(NamedTuple):
    """What is sent to `peer`, or received from it: the keys of rank `block`, or a result for them."""

    what: str
    block: int
    peer: int


class Step(NamedTuple):
    """Post what is sent and received, compute with the keys of rank `compute` (None: nothing), then wait."""

    compute: int | None
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


class Schedule(Sequence[Step]):
    """The steps of a rank: 0 to `last`, in which it may compute, and one more in which the last results arrive."""

    def __init__(self, rank: int, size: int, once: bool, results: bool):
        self.rank, self.size, self.once, self.results = rank, size, once, results
        self.last = size // 2 if once else size - 1

    def __len__(self) -> int:
        return self.last + 1 + (self.results and self.last > 0)

    def __getitem__(self, step: int) -> Step:
        if not 0 <= step < len(self):
            raise IndexError(f"step must be 0 to {len(self) - 1}, not {step}")
        ahead, behind, before = self._at(1), self._at(-1), step - 1
        sends, receives = [], []
        if self._computes(ahead, step + 1):  # who does not compute in a step does in none after it
            sends.append(Message("keys", self._at(-step), ahead))
        if self._computes(self.rank, step + 1):
            receives.append(Message("keys", self._at(-step - 1), behind))
        if self.results and before > 0:
            owner, worker = self._at(-before), self._at(before)
            if self._computes(self.rank, before):
                sends.append(Message("result", owner, owner))
            if self._computes(worker, before):
                receives.append(Message("result", self.rank, worker))
        compute = self._at(-step) if self._computes(self.rank, step) else None
        return Step(compute, tuple(sends), tuple(receives))

    def has_result_of(self, worker: int) -> bool:
        """Whether that rank computes with this one's keys."""
        return self._computes(worker, (worker - self.rank) % self.size)

    def _at(self, distance: int) -> int:
        return (self.rank + distance) % self.size

    def _computes(self, rank: int, step: int) -> bool:
        """Of an even number of ranks only the first half does in the last step of a triangle."""
        from_both_sides = self.once and 2 * step == self.size
        return step <= self.last and not (from_both_sides and 2 * rank >= self.size)


def ring(rank: int, size: int, results: bool = False) -> Schedule:
    """Each rank with the keys of each; with `results` there is one for the keys, which goes to their owner."""
    return Schedule(rank, size, False, results)


def triangle(rank: int, size: int) -> Schedule:
    """Each pair of ranks once; there is a result for the keys of another rank, which goes to it."""
    return Schedule(rank, size, True, True)
