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

    def __getitem__(self, step: int) -> Step:  # type: ignore[override]  # there are no slices
        if not 0 <= step < len(self):
            raise IndexError(f"step must be 0 to {len(self) - 1}, not {step}")
        sends, receives = (tuple(message for message, there in messages if there) for messages in self.messages(step))
        return Step(self.keys_of(step) if self.computes(self.rank, step) else None, sends, receives)

    def has_result_of(self, worker: int) -> bool:
        """Whether that rank computes with this one's keys."""
        return self.computes(worker, (worker - self.rank) % self.size)

    # These are right for a tensor of ranks as well.

    def keys_of(self, step: int) -> int:
        """Whose keys are with this rank in a step."""
        return self._at(-step)

    def computes(self, rank: int, step: int) -> bool:
        """Whether a rank does in a step; if not, then in none after it. Of an even number of ranks only the first half
        does in the last step of a triangle."""
        from_both_sides = self.once and 2 * step == self.size
        return (step <= self.last) & ((not from_both_sides) | (2 * rank < self.size))

    def messages(self, step: int) -> tuple[list, list]:
        """What may be sent in a step, and received, each with whether it is."""
        ahead, behind, before = self._at(1), self._at(-1), step - 1  # results are of the step before
        owner, worker, results = self._at(-before), self._at(before), self.results and before > 0
        return [
            (Message("keys", self.keys_of(step), ahead), self.computes(ahead, step + 1)),
            (Message("result", owner, owner), results & self.computes(self.rank, before)),
        ], [
            (Message("keys", self.keys_of(step + 1), behind), self.computes(self.rank, step + 1)),
            (Message("result", self.rank, worker), results & self.computes(worker, before)),
        ]

    def _at(self, distance: int) -> int:
        return (self.rank + distance) % self.size


def ring(rank: int, size: int, results: bool = False) -> Schedule:
    """Each rank with the keys of each; with `results` there is one for the keys, which goes to their owner."""
    return Schedule(rank, size, False, results)


def triangle(rank: int, size: int) -> Schedule:
    """Each pair of ranks once; there is a result for the keys of another rank, which goes to it."""
    return Schedule(rank, size, True, True)
