"""Times sslkern on a GPU beside its rivals, and writes OUT/results.json and OUT/README.md anew after every case.

python benchmarks/gpu.py OUT [--part headlines] [--seconds 300] [--select clip-65536] [--dry-run]

The cases, the most important first, run in a process of their own, since a failed kernel takes its process along: what
crashed or hung is listed with the reason, and a new process goes on without it. Results are checked before they are
timed, in turn, a, b, c, a, b, c, by CUDA events; beside them what the library's products take at that moment. Rivals
are timed once, and `--part profile` tells where the time of ours goes. Results are added to those that OUT has.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import gpu_report
import torch
from baselines import chunked
from gpu_cases import DTYPES, LIBRARY, OURS, PARTS, PASSES, PROBLEMS, Case, Problem, plan, yardsticks

from sslkern import functional
from sslkern.backends.reference import similarity_lse as reference

PATIENCE = 100  # seconds without a word from the worker: it hangs
FATAL = re.compile(r"CUDA error|illegal memory access|misaligned address|device-side assert|launch failure", re.I)
# torch.compile would start one for each core, which takes longer than our few kernels.
FEW_COMPILERS = {"TORCHINDUCTOR_COMPILE_THREADS": "4"} | os.environ
PACKAGES = "torch nvidia-cuda-nvrtc nvidia-cuda-nvrtc-cu12 triton memeff inf-cl cut-cross-entropy siglip-kernel".split()
PACKAGES += "pytorch-metric-learning kornia".split()

# ---- the worker -----------------------------------------------------------------------------------------------------


def worker(part: str, done: set[str], skip: set[tuple[str, str]], deadline: float, dry: bool, select: str) -> None:
    """Measures the selected cases that are not done, and tells what it does in lines of JSON."""
    device = "cpu" if dry else "cuda"
    if dry:
        torch.set_num_threads(1)
    else:
        reference.BLOCK = 2**28  # rows for a GPU, not for the cache of a CPU
    for case in plan(part):
        if case.key in done or not re.search(select, case.key):
            continue
        if time.time() > deadline:
            break
        tell("case", key=case.key)
        with contextlib.suppress(Exception):
            torch.compiler.reset()  # it gives up on functions that have met too many shapes
        result = measure(shrunk(case) if dry else case, case.key, skip, device, deadline)
        release(device)
        tell("result", key=case.key, **result)
    tell("end")


def tell(event: str, **facts) -> None:
    print("@" + json.dumps({"event": event} | facts), flush=True)


def shrunk(case: Case) -> Case:
    """The same case at a size that a dry run gets through in no time."""
    return dataclasses.replace(case, n=max(32, case.n >> 12), d=max(8, case.d // 8), seconds=0.01)


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure(case: Case, key: str, skip: set, device: str, deadline: float) -> dict:
    """The figures of each contender of a case, and why others have none."""
    torch.set_float32_matmul_precision("highest" if case.dtype == "fp32" else "high")
    contenders, failed = {}, {}
    facts = dataclasses.asdict(case) | {"contenders": contenders, "failed": failed}
    try:
        problem = case.build(device)
        want = None if case.part == "profile" else truth(problem, case)
    except Exception as error:
        failed["the case itself"] = reason(error)
        return facts
    facts |= {"flops": PASSES[problem.work]["floor"] * problem.pass_flops, "bytes": problem.bytes}
    steps = {}
    for name, factory in case.contenders(problem).items():
        if (key, name) in skip or time.time() > deadline:
            failed[name] = "took its process along, or hung" if (key, name) in skip else "no time left"
            continue
        tell("contender", name=name)
        try:
            step = step_of(problem, factory(), case)
            if case.part == "profile":
                contenders[name] = {"kernels": profile(step, problem, device)}
            else:
                contenders[name], steps[name] = first_calls(case, name, problem, step, want, device), step
        except Exception as error:
            failed[name] = reason(error)
        release(device)
    if case.part in ("headlines", "small"):
        del want
        tell("timing")
        try:
            race(case, problem, steps, facts, device)
        except Exception as error:  # no memory for the library's product
            failed["the rounds"] = reason(error)
    return facts


def race(case: Case, problem: Problem, steps: dict[str, Callable], facts: dict, device: str) -> None:
    """Times the contenders and the library's products in turn, as they are and then as CUDA graphs."""
    contenders, failed, graphs = facts["contenders"], facts["failed"], {}
    forms = sorted((figures["seconds"], name) for name, figures in contenders.items() if name.startswith("compiled"))
    for _, name in forms[1:]:  # the fastest in its first call is enough, and has the memory
        del steps[name]
    steps = steps | yardsticks(problem, DTYPES[case.dtype], device)
    for name, seconds in run_in_turn(steps, case.seconds, device, failed).items():
        contenders.setdefault(name, {})["seconds"] = seconds
    release(device)
    failed_graphs: dict[str, str] = {}
    for name, step in steps.items() if case.graph else ():
        if name not in failed:
            try:
                graphs[name] = captured(step, device)
            except Exception as error:  # such an error ends the capture, not the process
                failed_graphs[name] = words(error)
    for name, seconds in run_in_turn(graphs, case.seconds / 2, device, failed_graphs).items():
        contenders[name]["graph_seconds"] = seconds
    failed |= {f"{name}, CUDA graph": why for name, why in failed_graphs.items()}


def reason(error: Exception) -> str:
    """Why a contender has no figures; after an error that leaves the GPU unusable the process ends here."""
    text = words(error)
    if FATAL.search(text) and "out of memory" not in text:
        tell("fatal", reason=text)
        os._exit(3)
    return text


def words(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def step_of(problem: Problem, function: Callable, case: Case, inputs=None) -> Callable:
    """Forward and backward; returns the loss and a gradient, or None, for each input that wants one."""
    inputs = problem.inputs if inputs is None else inputs
    wanted = [x for x in inputs if x.requires_grad]
    # As a gradient scaler does: gradients of a mean over many rows are too small for fp16.
    slope = torch.tensor(2.0**16, device=inputs[0].device) if case.dtype == "fp16" else None
    around = getattr(function, "around", contextlib.nullcontext)

    def step():
        with around():
            if problem.plain:
                return function()
            loss = function(*inputs)
            return (loss.detach(), *torch.autograd.grad(loss, wanted, slope, allow_unused=True))

    return step


def truth(problem: Problem, case: Case):
    """The result on the reference backend in fp32, with tf32 products unless the case is fp32; None: takes too long."""
    if problem.plain:
        return chunked(problem.ours)()
    if not problem.truth:
        return None
    return step_of(problem, chunked(problem.ours), case, as_type(problem.inputs, torch.float32))()


def as_type(inputs, dtype: torch.dtype):
    return [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs]


def first_calls(case: Case, name: str, problem: Problem, step: Callable, want, device: str) -> dict:
    """The checks, the peak memory, and the time of one call."""
    figures = {}
    if name.startswith(OURS):
        figures["error_of_96_rows"] = check_exact(case, name, device)
    got = step()
    if want is not None:
        figures["error"] = checked(got, want, RIVAL_TOLERANCE[case.dtype], least=0.1)
    else:
        figures["error_of_1024_losses"] = check_some_losses(problem)
    assert all(x is None or x.isfinite().all() for x in got), "its result is not finite"
    del got
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = [seconds_per_call(step, 1, device)]
    if device == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    if seconds[0] < 0.05:  # what is slow is timed once
        seconds = [seconds_per_call(step, 1, device) for _ in range(5)]
    return figures | {"seconds": statistics.median(seconds)}


# Ours against float64 of the same inputs, relative to the norm; everybody at the size itself.
OURS_TOLERANCE = {"fp32": 1e-5, "tf32": 2e-3, "bf16": 1e-2, "fp16": 2e-3}
RIVAL_TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}
_exact: dict[tuple, float] = {}


def check_exact(case: Case, name: str, device: str) -> float:
    """Ours against the textbook in float64, 96 rows: once for each width and type."""
    kind = (case.problem, name, case.d, case.dtype, case.scale)
    if kind not in _exact:
        problem = case.build(device, rows=96)
        got = step_of(problem, case.contenders(problem)[name](), case)()
        if problem.plain:
            want = chunked(problem.ours)()
        else:
            want = step_of(problem, problem.textbook, case, as_type(problem.inputs, torch.float64))()
        _exact[kind] = checked(got, want, OURS_TOLERANCE[case.dtype])
    return _exact[kind]


def checked(got, want, tolerance: float, least: float = 1e-300) -> float:
    """The largest error of the loss and the gradients, relative to their norms; of numbers, sums of terms that cancel,
    to `least` where they are smaller.

    Raises:
        AssertionError: it is above the tolerance.
    """
    errors = []
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a is not None:
            norm = b.double().norm().clamp_min(1e-300 if b.ndim else least)
            errors.append(((a.double() - b.double()).norm() / norm).item())
            what = f"result {i}" if i else "the loss"
            assert errors[-1] <= tolerance, f"wrong: {what} differs by {errors[-1]:.1e} of its norm"
    return max(errors)


@torch.no_grad()
def check_some_losses(problem: Problem, count: int = 1024) -> float:
    """NT-Xent where the truth would take too long: the losses of some views, against rows of the whole matrix."""
    *views, scale = problem.inputs
    z, N = torch.cat([x.float() for x in views]), len(views[0])
    rows = torch.linspace(0, 2 * N - 1, min(count, 2 * N), device=z.device).long()
    samples = dict(ids=rows % N, negative_ids=torch.arange(2 * N, device=z.device) % N)
    options = dict(logit_scale=scale, reduction="none")
    want = chunked(functional.info_nce)(z[rows], z[(rows + N) % (2 * N)], z, **samples, **options)
    return checked((functional.nt_xent(*views, **options)[rows],), (want,), OURS_TOLERANCE["bf16"])


def captured(step: Callable, device: str) -> Callable:
    """The step as a CUDA graph, which must give the same result."""
    if device == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = step()
    torch.cuda.current_stream().wait_stream(side)
    release(device)  # what a graph needs it has for itself
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    if isinstance(got, tuple):
        checked(got, want, 1e-2)

    def replay():
        graph.replay()
        return got

    return replay


def run_in_turn(steps: dict[str, Callable], seconds: float, device: str, failed: dict[str, str]) -> dict[str, float]:
    """Median seconds per call over rounds a, b, c, a, b, c, ... that take about `seconds`."""
    calls, times = {}, {name: [] for name in steps}
    begun = time.perf_counter()
    for done in range(100):
        if done > 2 and time.perf_counter() - begun > seconds:
            break
        for name, step in steps.items():
            if name in failed:
                continue
            try:
                estimate = seconds_per_call(step, 1, device)  # it also gets back the memory that others had meanwhile
                calls.setdefault(name, max(1, min(100, round(1e-3 / max(estimate, 1e-6)))))
                times[name].append(seconds_per_call(step, calls[name], device))
            except Exception as error:
                failed[name] = reason(error)
    return {name: statistics.median(of) for name, of in times.items() if name not in failed}


def seconds_per_call(step: Callable, calls: int, device: str) -> float:
    """By CUDA events around `calls` calls: the GPU's time, or the CPU's where launching takes longer."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def profile(step: Callable, problem: Problem, device: str) -> list[dict]:
    """The kernels of one call, the longest first."""
    activity, spent = torch.profiler.ProfilerActivity.CUDA, "self_device_time_total"
    if device == "cpu":
        activity, spent = torch.profiler.ProfilerActivity.CPU, "self_cpu_time_total"
    for _ in range(2):
        step()
    with torch.profiler.profile(activities=[activity]) as run:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    kernels = [{"name": e.key, "calls": e.count, "seconds": getattr(e, spent) / 1e6} for e in run.key_averages()]
    kernels = sorted((k for k in kernels if k["seconds"] > 0), key=lambda kernel: -kernel["seconds"])
    return add_rates(kernels, problem)


def add_rates(kernels: list[dict], problem: Problem) -> list[dict]:
    """What those execute that are known by their names, per second."""
    groups, executed = {}, PASSES[problem.work]
    for kernel in kernels:
        patterns = [p for p in executed if re.search(p, kernel["name"]) and "pair" not in kernel["name"]]
        if patterns:
            groups.setdefault(patterns[0], []).append(kernel)
    for pattern, group in groups.items():
        by_library = LIBRARY in groups and "backward" in pattern  # it writes the weights that the library multiplies
        passes = executed["weights" if by_library else pattern]
        rate = passes * problem.pass_flops / sum(kernel["seconds"] for kernel in group)
        for kernel in group:
            kernel["flops_per_second"] = rate
    return kernels


# ---- the parent: keeps the results, restarts the worker, never touches the GPU --------------------------------------


def supervise(out: Path, part: str, seconds: float, dry: bool, select: str = "") -> dict:
    """Runs workers until all cases are done or the time is up; the results in OUT are whole after every case."""
    deadline = time.time() + seconds
    results = gpu_report.read(out)
    results |= {"dry_run": dry, "machine": machine(), "complete": False}
    done, skip = set(), set()
    while time.time() < deadline and not results["complete"]:
        key = begun = crash = None
        for message in talk(part, done, skip, deadline, dry, select):
            event = message.pop("event")
            if event in ("case", "timing"):
                key, begun = message.get("key", key), None
            elif event == "contender":
                begun = (key, message["name"])
            elif event == "result":
                results["cases"][message.pop("key")] = message
                done.add(key)
                gpu_report.write(out, results)
            elif event in ("fatal", "gone"):
                crash = crash or message["reason"]
            elif event == "end":
                results["complete"] = True
        if crash and not results["complete"]:
            results["crashes"].append({"case": key, "contender": begun and begun[1], "reason": crash})
            if key is None:
                break  # it does not even start
            if begun is None:
                done.add(key)  # nobody to blame: on with the next case
            else:
                skip.add(begun)
    gpu_report.write(out, results)
    return results


def talk(part: str, done: set, skip: set, deadline: float, dry: bool, select: str):
    """Yields what a worker tells, and in the end how it died, if it did."""
    arguments = json.dumps([part, sorted(done), sorted(skip), deadline, dry, select])
    command = [sys.executable, __file__, "--worker", arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=FEW_COMPILERS)
    lines: queue.Queue = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            try:
                line = lines.get(timeout=max(1.0, min(PATIENCE, deadline + 20 - time.time())))
            except queue.Empty:
                yield {"event": "gone", "reason": "no answer"}
                return
            if line is None:
                break
            if line.startswith("@"):
                yield json.loads(line[1:])
            else:
                print(line, end="", flush=True)
        if process.wait() not in (0, 3):
            yield {"event": "gone", "reason": f"exit status {process.returncode}"}
    finally:
        process.kill()
        process.wait()


def warm(part: int, parts: int, dry: bool, select: str) -> None:
    """Fills the compilers' caches on disk: each racer of every so many cases once."""
    device = "cpu" if dry else "cuda"
    cases = [case for case in plan("headlines") + plan("small") if re.search(select, case.key)]
    for case in cases[part::parts]:
        with contextlib.suppress(Exception):
            torch.compiler.reset()
            case = shrunk(case) if dry else case
            problem = case.build(device)
            for factory in case.contenders(problem).values():
                with contextlib.suppress(Exception):
                    step_of(problem, factory(), case)()
        release(device)


def exercise(device: str) -> None:
    """Every loss and kernel of ours once, at odd sizes; what fails is told, and the exit status is 1."""
    failed = False
    for name, d in itertools.product(PROBLEMS, (72, 200, 776)):  # each a class of kernels for Hopper
        case = Case(name, 194, d, alone=True)
        problem = case.build(device)
        for contender, factory in (case.contenders(problem) | problem.variants()).items():
            try:
                step_of(problem, factory(), case)()
                print(f"{name}, {d} features, {contender}: ran", flush=True)
            except Exception as error:
                failed = failed or contender == OURS
                print(f"{name}, {d} features, {contender}: {error!r}", flush=True)
    sys.exit(failed)


def machine() -> dict:
    """What a reader must know to judge a figure."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--part", default="", choices=PARTS, help="only the cases of this part")
    parser.add_argument("--seconds", type=float, default=300, help="how long to measure, about")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: the figures mean nothing")
    parser.add_argument("--select", default="", metavar="REGEX", help="only the cases whose key has it")
    warm_help = "only compile ahead what the cases will need, as one of so many processes"
    parser.add_argument("--warm", type=int, nargs=2, metavar=("NUMBER", "PROCESSES"), help=warm_help)
    parser.add_argument("--exercise", action="store_true", help="only run each of our kernels once, for a sanitizer")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        part, done, skip, *rest = json.loads(options.worker)
        return worker(part, set(done), {tuple(pair) for pair in skip}, *rest)
    if options.warm:
        return warm(*options.warm, options.dry_run, options.select)
    if options.exercise:
        return exercise("cpu" if options.dry_run else "cuda")
    if options.out is None:
        parser.error("OUT, the folder for the results, is missing")
    options.out.mkdir(parents=True, exist_ok=True)
    results = supervise(options.out, options.part, options.seconds, options.dry_run, options.select)
    print(gpu_report.summary(results))


if __name__ == "__main__":
    main()
