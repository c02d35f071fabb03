"""How the benchmarks measure, on a CPU and on a GPU: results are checked first, then all contenders run in turn in one
process. What depends on the device is a method of `Cpu` or `Gpu`.

Run as a script it prints the name of this CPU, which is the folder of its results.
"""

import contextlib
import functools
import gc
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[], tuple[Tensor | None, ...]]

OURS = "sslkern"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "tf32": torch.float32, "fp16": torch.float16}
CPU_DTYPES = "fp32", "bf16"
# Of an error relative to the norm of the result: of ours, and of rivals, which add their own.
TOLERANCE = {"fp32": (2e-6, 2e-5), "bf16": (1e-2, 5e-2), "tf32": (2e-3, 1e-2), "fp16": (2e-3, 1e-2)}
PACKAGES = "torch nvidia-cuda-nvrtc nvidia-cuda-nvrtc-cu12 triton memeff inf-cl cut-cross-entropy siglip-kernel".split()
PACKAGES += "pytorch-metric-learning kornia".split()

# ---- the step that is timed -----------------------------------------------------------------------------------------


def step_of(function: Callable, inputs: Sequence[Tensor], phase: str = "both", slope: Tensor | None = None) -> Step:
    """A call of a contender: its "forward", its "backward" (of one forward done here) or "both".

    Returns the loss and a gradient for each input that wants one, None where the contender has none; or what the
    function returns, if it is a tuple. A function may have a context, `around`, for both of its ways.
    """
    around = getattr(function, "around", contextlib.nullcontext)
    wanted = [x for x in inputs if x.requires_grad]

    def forward():
        with around():
            result = function(*inputs)
        return result if isinstance(result, tuple) else (result,)

    def both():
        with around():
            loss = function(*inputs)
            return (loss.detach(), *torch.autograd.grad(loss, wanted, slope, allow_unused=True))

    if phase == "forward" or not wanted:
        return forward
    if phase == "both":
        return both
    loss = function(*inputs)
    return lambda: torch.autograd.grad(loss, wanted, slope, retain_graph=True)


def as_type(inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs]


# ---- the checks -----------------------------------------------------------------------------------------------------


def checked(got, want, tolerance: float, what: str = "wrong", least: float = 1e-300) -> float:
    """The largest error of the loss and the gradients, relative to their norms; of numbers, sums of terms that cancel,
    to `least` where they are smaller.

    Raises:
        AssertionError: it is above the tolerance.
    """
    errors = [0.0]
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a is not None:
            norm = b.double().norm().clamp_min(1e-300 if b.ndim else least)
            errors.append(((a.double() - b.double()).norm() / norm).item())
            which = f"result {i}" if i else "the loss"
            assert errors[-1] <= tolerance, f"{what}: {which} differs by {errors[-1]:.1e} of its norm"
    return max(errors)


def check_exact(function, problem, exact, tolerance: float, slope: Tensor | None = None) -> float:
    """The error of a function against the textbook of the same problem built in float64, on the same inputs."""
    got = step_of(function, problem.inputs, slope=slope)()
    inputs = as_type(problem.inputs, exact.inputs[0].dtype)
    return checked(got, step_of(exact.textbook, inputs, slope=slope)(), tolerance, "against float64")


@functools.cache
def check_few_rows(build: Callable, d: int, dtype: str, rows: int = 96) -> None:
    problem = build(rows, d, DTYPES[dtype])
    check_exact(problem.ours, problem, build(rows, d, torch.float64), TOLERANCE[dtype][0])


def checked_steps(build: Callable, n: int, d: int, dtype: str, names: Sequence[str], phase: str = "both"):
    """The problem, and of the named contenders those that it has as steps, once our result is found right: against
    float64 for a few rows, against each rival at the size itself.

    Raises:
        AssertionError: a loss or a gradient is wrong.
    """
    check_few_rows(build, d, dtype)
    problem = build(n, d, DTYPES[dtype])
    factories = problem.contenders()
    functions = {name: factories[name]() for name in names if name in factories}
    ours = step_of(functions[OURS], problem.inputs)()
    for name in functions.keys() - {OURS}:
        result = step_of(functions[name], problem.inputs)()
        checked(result, ours, TOLERANCE[dtype][1], f"{name} beside {OURS} at n={n}, d={d}, {dtype}")
    return problem, {name: step_of(function, problem.inputs, phase) for name, function in functions.items()}


# ---- the devices ----------------------------------------------------------------------------------------------------


class Cpu:
    """Timed by a clock of the host. Memory is measured in a process of its own: `peak_memory`."""

    name = "cpu"
    tolerance = TOLERANCE
    untimed_calls = 0  # before a timed one
    activity, spent = torch.profiler.ProfilerActivity.CPU, "self_cpu_time_total"

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock

    def seconds_per_call(self, step: Step, calls: int = 1) -> float:
        start = self.clock()
        for _ in range(calls):
            step()
        return (self.clock() - start) / calls

    def seconds_and_peak(self, step: Step) -> dict[str, float]:
        return {"seconds": self.seconds_per_call(step)}

    def synchronize(self) -> None:
        pass

    def release(self) -> None:
        gc.collect()

    def captured(self, step: Step) -> Step:
        """Graphs are for GPUs."""
        return step

    def profile(self, step: Step) -> list[dict]:
        """The kernels of one call, the longest first."""
        for _ in range(2):
            step()
        with torch.profiler.profile(activities=[self.activity]) as run:
            step()
            self.synchronize()
        events = [(getattr(e, self.spent) / 1e6, e) for e in run.key_averages()]
        kernels = [{"name": e.key, "calls": e.count, "seconds": seconds} for seconds, e in events if seconds > 0]
        return sorted(kernels, key=lambda kernel: -kernel["seconds"])

    def machine(self) -> dict:
        """What a reader must know to judge a figure."""
        return {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 2),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }


class Gpu(Cpu):
    """Timed by CUDA events: the GPU's time, or the host's where launching takes longer."""

    name = "cuda"
    tolerance = TOLERANCE | {"fp32": (1e-5, 1e-4)}
    untimed_calls = 1  # gets back the memory that others had meanwhile
    activity, spent = torch.profiler.ProfilerActivity.CUDA, "self_device_time_total"

    def seconds_per_call(self, step: Step, calls: int = 1) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def seconds_and_peak(self, step: Step) -> dict[str, float]:
        """Of one call; the peak is the allocator's, beyond what was there before, with the gradients."""
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds = self.seconds_per_call(step)
        return {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated() - before}

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def captured(self, step: Step) -> Step:
        """The step as a CUDA graph, which must give the same result."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            want = step()
        torch.cuda.current_stream().wait_stream(side)
        self.release()  # what a graph needs it has for itself
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        graph.replay()
        self.synchronize()
        if isinstance(got, tuple):
            checked(got, want, 1e-2)

        def replay():
            graph.replay()
            return got

        return replay

    def machine(self) -> dict:
        """Asks the driver's tool: whoever supervises the measurements does not touch the GPU."""
        facts = {"gpu": None, "driver": None}
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
            facts["gpu"], facts["driver"] = (part.strip() for part in lines[0].split(","))
        for package in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                facts[package] = importlib.metadata.version(package)
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
            facts["commit"] = commit.stdout.strip()
        return facts | {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


CPU, GPU = Cpu(), Gpu()


def cpu_name() -> str:
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def has_amx() -> bool:
    return sys.platform == "linux" and "amx_bf16" in Path("/proc/cpuinfo").read_text()


# ---- time -----------------------------------------------------------------------------------------------------------


def raised(name: str, error: Exception) -> None:
    raise error


def in_rounds(run: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
    for _ in range(rounds):
        setup()
        run()


def run_in_turn(
    steps: dict[str, Step],
    seconds: float,
    device: Cpu = CPU,
    *,
    calls: int | None = None,
    most: int = 100,
    rounds: Callable = in_rounds,
    lost: Callable[[str, Exception], None] = raised,
) -> dict[str, list[float]]:
    """Times the steps in paired rounds, a, b, c, a, b, c, ..., for about `seconds`; returns seconds per call.

    Args:
        calls: of each step in a round; default: as many as take 2 ms, well above the grain of clock and scheduler.
        most: rounds, of which there are at least two, or three where one takes less than 5 s.
        rounds: runs them, as `pedantic` of pytest-benchmark does: the first step as what it times, the others in the
            setup of each round.
        lost: is told of a step that failed, which then is left out.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}

    def take(names: Sequence[str], calls: dict[str, int]) -> None:
        for name in [name for name in names if name in times]:
            try:
                for _ in range(device.untimed_calls):
                    steps[name]()
                times[name].append(device.seconds_per_call(steps[name], calls[name]))
            except Exception as error:
                lost(name, error)
                del times[name]

    def estimated(calls: int) -> dict[str, float]:
        take(list(steps), dict.fromkeys(steps, calls))
        return {name: of.pop() for name, of in times.items()}

    estimates = estimated(1)
    if max(estimates.values(), default=1) < 0.01:  # a first call is slower than the others, by much if they are short
        estimates = estimated(3)
    enough = {name: calls or max(1, min(100, round(2e-3 / max(each, 1e-6)))) for name, each in estimates.items()}
    one_round = sum((enough[name] + device.untimed_calls) * each for name, each in estimates.items())
    least = 3 if one_round < 5 else 2
    first, *others = steps
    count = min(most, max(least, int(seconds / max(one_round, 1e-6))))
    rounds(lambda: take([first], enough), setup=lambda: take(others, enough), rounds=count)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(of) for name, of in times.items()}


def times_faster(times: dict[str, list[float]]) -> dict[str, float]:
    """Than each rival we are: medians over the rounds of its time by ours."""
    ratios = {name: [a / b for a, b in zip(of, times[OURS], strict=True)] for name, of in times.items()}
    return {name: ratio for name, ratio in medians(ratios).items() if name != OURS}


# ---- memory of the CPU ----------------------------------------------------------------------------------------------


def peak_memory(build: Callable, contender: str, n: int, d: int, dtype: str, threads: int | None = None) -> int:
    """Peak extra bytes of one forward and backward, gradients included, measured in a child process."""
    script = str(Path(__file__).with_name("peak_memory.py"))
    arguments = [build.__name__, contender, n, d, dtype, threads or torch.get_num_threads()]
    # Without this glibc keeps freed blocks of up to 32 MiB and hides their reuse.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(
        [sys.executable, script, *map(str, arguments)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return int(child.stdout)


def extra_bytes(step: Callable) -> int:
    """The most that a call holds beyond what was there before, its results included."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts at what is resident now
    before = resident_bytes("VmRSS")
    results = step()
    extra = resident_bytes("VmHWM") - before
    del results
    return extra


def resident_bytes(field: str) -> int:
    """VmRSS: what is resident now. VmHWM: the most that was since the last reset."""
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    print(re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-"))
