"""What a loss over ranks costs, by a model: bytes, flop, time and memory of a rank. `strategy="auto"` goes by it.

n rows of D features on each of W ranks, in types of b bytes, with sums in a = 4 (of fp64 8) bytes: the keys of a rank
are k = n (D b + 8) bytes with their ids, their gradient is d = n D a, and numbers of rows are s = n a. A pass is the
product for a block of n x n scores, 2 n^2 D flop. What a rank moves, and holds beside its own rows:

                      q with k, rows and columns                  q with itself
    forward           W passes, (W - 1) (k + s)                   W/2 passes, W/2 (k + s)
    backward          3 W passes, (W - 1) (k + 2 s + d)           2 W passes, (W - 1) (k + 2 s)
    all_gather holds  W (k + 2 d), the keys and two of dk         W k + k
    ring holds        2 k + 4 d + W s                             2 k + d + W s + k

and the gradients, d for each set of rows. The last k are the views as one tensor. Who has gathered the keys does not
move them again in the backward.

This backward of q with itself visits each pair of ranks from both sides, and no gradient travels. A ring also has the
other, a triangle, which visits each pair once and makes both gradients of a block, of which one goes home:

    backward          3/2 W passes, W/2 (k + 2 s + d)             ring holds  2 k + 4 d + W s + k

It is 2 W passes where the kernel computes the scores of a block anew for its second gradient, as those for GPUs do of
few features. `by_triangle` says which of the two runs.

Of a memory that is sharded over the ranks, K / W rows on each, the queries travel, k = n D b, and the mean of the rows
of the memory for each, d, comes home with its log-sum-exp, s. It is all in the forward, and the backward exchanges
nothing:

    forward           2 W passes of n x K / W scores, (W - 1) (k + d + s)
    all_gather holds  W (k + 2 (d + s))                           ring holds  2 k + 4 (d + s) + d + W s

To push n rows onto a queue a rank sends (1 - 1 / W) n D b. What it sends to update n rows of a bank depends on whose
they are, (1 - 1 / W) n (D b + 8) if they are spread evenly. NCE against T rows of a bank for each query sends
(W - 1) n (D b + L (4 + a)) in the forward and (W - 1) n (L (4 + a) + D a) for the gradient, where L is the length of
the longest list of rows that a query names of one rank: T / W and some.

All_gather exchanges, then computes. The ring does both at the same time, step by step (schedule.py), and takes the
longer of the two; but it computes in W blocks what the other does in one, each of which costs a launch. What a device
can do are assumptions, DEVICES, rounded figures of data sheets; nothing of it has been measured.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

from .schedule import Schedule, Step, ring, triangle


class Device(NamedTuple):
    """What is assumed of a rank and its way to the others."""

    flops: float  # of products, per second
    bandwidth: float  # bytes per second that a rank sends, while it receives as many
    latency: float  # seconds until a message arrives, whatever its size
    launch: float  # seconds that a block costs beside its flop
    memory: float  # bytes
    anew: int  # features up to which a kernel computes scores once for each gradient of a block, and not for both


DEVICES = {
    "cpu": Device(flops=1e11, bandwidth=1e9, latency=1e-4, launch=1e-4, memory=1.6e10, anew=0),
    # H100, 400 Gb/s to others
    "cuda": Device(flops=4e14, bandwidth=5e10, latency=2e-5, launch=5e-5, memory=8e10, anew=128),
}
SHARE = 1 / 8  # of the memory that the loss of a network may take


class Problem(NamedTuple):
    """n rows on each of `size` ranks; q with itself, with k, or with `shard` rows of a memory on each rank."""

    rows: int
    features: int
    size: int
    itself: bool
    itemsize: int = 2
    shard: int = 0


class Phase(NamedTuple):
    """The forward or the backward of the rank that has most to do: bytes that it sends, or receives where these are
    more, flop, and seconds, in `exposed` of which it only waits for others."""

    moved: int
    flop: int
    seconds: float
    exposed: float


class Cost(NamedTuple):
    forward: Phase
    backward: Phase
    memory: int  # the most beside this rank's rows, with their gradients

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds


@functools.lru_cache
def cost(strategy: str, problem: Problem, device: Device, triangular: bool | None = None) -> Cost:
    """A forward and a backward by "all_gather" or "ring". triangular: whether the ring's backward of q with itself is a
    triangle; None: as it is."""
    n, D, W, itself, b, shard = problem
    a = max(b, 4)
    keys, sums, gradient = n * (D * b + 8), n * a, n * D * a
    if strategy == "ring":
        phase, again = _overlapped, keys  # keys travel once more in the backward
    else:
        phase, again = _one_after_the_other, 0
    if shard:
        result = gradient + sums
        forward = phase(ring(0, W, results=True), problem, device, 2, n * D * b, result)
        held = 2 * n * D * b + 4 * result + W * sums if strategy == "ring" else W * (n * D * b + 2 * result)
        return Cost(forward, Phase(0, 0, 0, 0), gradient + held)
    if itself:
        forward = phase(triangle(0, W), problem, device, 1, keys, sums)
        if strategy == "ring" and triangular is None:
            triangular = by_triangle(problem, device)
        if triangular:
            passes = 4 if D <= device.anew else 3
            backward = phase(triangle(0, W), problem, device, passes, again + 2 * sums, gradient)
            held = 2 * keys + 4 * gradient + W * sums
        else:
            backward = phase(ring(0, W), problem, device, 2, again + 2 * sums, 0)
            held = 2 * keys + gradient + W * sums if strategy == "ring" else W * keys
        memory = gradient + keys + held
    else:
        forward = phase(ring(0, W, results=True), problem, device, 1, keys, sums)
        backward = phase(ring(0, W, results=True), problem, device, 3, again + 2 * sums, gradient)
        held = 2 * keys + 4 * gradient + W * sums if strategy == "ring" else W * (keys + 2 * gradient)
        memory = 2 * gradient + held
    return Cost(forward, backward, memory)


def _overlapped(schedule: Schedule, problem: Problem, device: Device, passes: int, keys: int, result: int) -> Phase:
    """Step by step: the longer of computing and exchanging."""
    size = {"keys": keys, "result": result}
    moved = flop = seconds = exposed = 0
    for step, times in _alike(schedule):
        out, come = (sum(size[m.what] for m in messages) for messages in (step.sends, step.receives))
        exchanges = max(out, come) / device.bandwidth + (device.latency if step.sends or step.receives else 0)
        work = _flop(schedule, step, problem, passes)
        computes = work / device.flops + (device.launch if work else 0)
        moved, flop = moved + times * max(out, come), flop + times * work
        seconds += times * max(computes, exchanges)
        exposed += times * max(0, exchanges - computes)
    return Phase(moved, flop, seconds, exposed)


def _one_after_the_other(
    schedule: Schedule, problem: Problem, device: Device, passes: int, keys: int, result: int
) -> Phase:
    """All keys, one block of everything, all results."""
    others = problem.size - 1
    results = sum(times for step, times in _alike(schedule) for m in step.sends if m.what == "result")
    moved = others * keys + results * result
    flop = sum(times * _flop(schedule, step, problem, passes) for step, times in _alike(schedule))
    exposed = moved / device.bandwidth + (device.latency * (1 + (results > 0)) if others else 0)
    return Phase(moved, flop, exposed + flop / device.flops + device.launch, exposed)


def _alike(schedule: Schedule) -> Iterator[tuple[Step, int]]:
    """Steps, and how many there are of each kind: all but the first two and the last three are alike."""
    steps = len(schedule)
    kinds = range(steps) if steps < 6 else [0, 1, 2, steps - 3, steps - 2, steps - 1]
    for i in kinds:
        yield schedule[i], max(1, steps - 5) if i == 2 else 1


def _flop(schedule: Schedule, step: Step, problem: Problem, passes: int) -> int:
    """A pass is 2 n^2 D; of the triangle's own block only a half is needed."""
    if step.compute is None:
        return 0
    half = schedule.once and step.compute == schedule.rank
    return passes * problem.rows * (problem.shard or problem.rows) * problem.features * (1 if half else 2)


def choose(problem: Problem, device: Device) -> str:
    """What "auto" is: the quicker of the two, but nothing that takes more than SHARE of the memory where the other
    takes less."""
    gather, walk = (cost(strategy, problem, device) for strategy in ("all_gather", "ring"))
    if gather.memory > max(walk.memory, SHARE * device.memory):
        return "ring"
    return "ring" if walk.seconds < gather.seconds else "all_gather"


def by_triangle(problem: Problem, device: Device) -> bool:
    """Whether the ring's backward of q with itself visits each pair of ranks once: where that is quicker, and takes no
    more than SHARE of the memory."""
    owners, once = (cost("ring", problem, device, triangular) for triangular in (False, True))
    return once.seconds < owners.seconds and once.memory <= SHARE * device.memory
