"""What a step of a small batch costs the host: the calls of sslkern for a GPU beside those of the dense formula.

    python benchmarks/host_time.py [--seconds 3] > host_time.md

No GPU is needed. The CUDA backend launches its kernels, forward and backward, through an emulated driver that does
nothing; the dense formula calls torch's operators for two rows of eight features on the CPU, where nearly all of their
time is the calls themselves. Their launches are missing then: the last columns count the operators that would launch a
kernel, and add what a launch through the emulated driver takes for each. Both sides in turn in one process, one thread,
16-bit features; medians in microseconds of the processor.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import baselines
from torch.utils._python_dispatch import TorchDispatchMode

from sslkern.backends.cuda import driver, launch
from tests.conftest import emulate_cuda

PROBLEMS = {"NT-Xent": baselines.nt_xent, "InfoNCE": baselines.one_way, "CLIP, learned scale": baselines.two_way}
CONTENDERS = "sslkern", "dense cross_entropy", "dense logsumexp"


def step_of(call, inputs):
    wanted = [x for x in inputs if x.requires_grad]

    def step():
        torch.autograd.grad(call(*inputs), wanted)

    for _ in range(50):
        step()
    return step


class Launches(TorchDispatchMode):
    """Counts the operators that compute something."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or "empty" in func.name())
        return func(*args, **(kwargs or {}))


def launches_of(step) -> int:
    with torch.autograd.set_multithreading_enabled(False), Launches() as mode:
        step()
    return mode.count


def launch_of_nothing() -> float:
    """Microseconds."""
    call = launch.Call("pair_contrast", torch.device("cpu"), torch.bfloat16)
    return in_turn({"": lambda: call.launch("scaled_gradients<{0}>", 1, *(0,) * 8)}, 0.5)[""]


def in_turn(steps: dict, seconds: float) -> dict[str, float]:
    times = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    return {name: 1e6 * statistics.median(of) for name, of in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3, help="for each loss")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        library = emulate_cuda(patch)
        library.emulated_idle(1)
        with driver.Context(0):  # as torch leaves it
            each = launch_of_nothing()
            print(f"A launch: {each:.1f} us.\n")
            print(
                "| us a step | sslkern | dense cross_entropy | dense logsumexp | ratio | launches | ratio with them |"
            )
            print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
            for name, problem in PROBLEMS.items():
                problem = problem(2, 8, torch.bfloat16)
                steps = {name: step_of(problem.contenders[name], problem.inputs) for name in CONTENDERS}
                ours, *dense = in_turn(steps, seconds).values()
                launches = [launches_of(steps[name]) for name in CONTENDERS[1:]]
                whole = min(us + count * each for us, count in zip(dense, launches, strict=True))
                cells = " | ".join(f"{us:.0f}" for us in (ours, *dense))
                ratios = f"{ours / min(dense):.2f} | {launches[0]}, {launches[1]} | {ours / whole:.2f}"
                print(f"| {name} | {cells} | {ratios} |", flush=True)
        library.emulated_idle(0)


if __name__ == "__main__":
    main()
