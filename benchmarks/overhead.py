"""What every loss costs at small batches, in this checkout and in another, both asked in turn.

    python benchmarks/overhead.py ../before --rows 32 64 128 256 > overhead.md

Each checkout runs in a process of its own, with one thread unless --threads says otherwise, and times forward +
backward of the calls in tests/examples.py of this checkout (features of 128 numbers, fp32). In each round both time
the same loss, in changing order; the table has the medians over the rounds, in microseconds, and the median of the
ratios, this checkout over the other.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from harness import CPU, Step, run_in_turn

ROOT = Path(__file__).resolve().parents[1]


def serve(root: str, threads: int) -> None:
    """Answers lines "name rows" with the median time of a step."""
    sys.path[:0] = [root, str(ROOT)]  # sslkern of the checkout that is asked, the examples of this one
    import sslkern

    if not sslkern.__file__.startswith(root):
        raise SystemExit(f"{sslkern.__file__} is not of {root}")
    torch.set_num_threads(threads)
    steps = {}
    for line in sys.stdin:
        name, rows = line.rsplit(maxsplit=1)
        if line not in steps:
            steps[line] = warm_step(name, int(rows))
        times = run_in_turn({line: steps[line]}, 0.04, calls=1)
        print(statistics.median(times[line]), flush=True)


def warm_step(name: str, rows: int) -> Step:
    from tests.examples import LOSSES, value

    example = LOSSES[name](N=rows, D=128)
    leaves = example.leaves()

    def step():
        torch.autograd.grad(value(example)[0].sum(), leaves, allow_unused=True)

    for _ in range(20):
        step()
    return step


class Checkout:
    def __init__(self, root: Path, threads: int):
        command = [sys.executable, __file__, "--serve", str(root), "--threads", str(threads)]
        # Else it is luck, for the life of a process, whether glibc gives a step's memory back and faults it in again.
        keeps = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, cwd="/", env=os.environ | keeps, **pipes)

    def seconds(self, name: str, rows: int) -> float:
        print(name, rows, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="a checkout with its native module built, sslkern/_cpu*.so")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="names of losses in tests/examples.py")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.threads)
    if options.other is None or not list((options.other / "sslkern").glob("_cpu*.so")):
        parser.error("name another checkout, with its native module built by `make setup` or `make build`")

    sys.path.insert(0, str(ROOT))
    from tests.examples import LOSSES

    ours, other = (Checkout(root.resolve(), options.threads) for root in (ROOT, options.other))
    facts = CPU.machine() | {"threads": options.threads}
    print(", ".join(f"{key} {value}" for key, value in facts.items()) + "; us, forward + backward, before -> now\n")
    print("| loss |" + "".join(f" {rows} rows | ratio |" for rows in options.rows))
    print("| --- |" + " --- | --- |" * len(options.rows))
    ratios = []
    for name in options.only or LOSSES:
        cells = []
        for rows in options.rows:
            before, now, ratio = compared(other, ours, name, rows, options.rounds)
            ratios.append(ratio)
            cells += [f"{1e6 * before:.0f} -> {1e6 * now:.0f}", f"{ratio:.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"\nMedian of the ratios {statistics.median(ratios):.3f}, highest {max(ratios):.3f}.")


def compared(other: Checkout, ours: Checkout, name: str, rows: int, rounds: int) -> tuple[float, float, float]:
    """Medians over the rounds, which begin with one and the other in turn: of both times and of ours over the other."""
    before, now = [], []
    for number in range(rounds):
        for checkout, times in ((other, before), (ours, now))[:: 1 if number % 2 else -1]:
            times.append(checkout.seconds(name, rows))
    ratios = [b / a for a, b in zip(before, now, strict=True)]
    return statistics.median(before), statistics.median(now), statistics.median(ratios)


if __name__ == "__main__":
    main()
