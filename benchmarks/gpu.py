"""Times sslkern on a GPU beside its rivals and writes OUT/results.json; gpu_report.py makes tables and plots of it.

python benchmarks/gpu.py OUT [--seconds 300] [--select clip-65536] [--dry-run]

The cases, the most important first, run in a process of their own, since a failed kernel takes its process along: what
crashed or hung is listed with the reason, and a new process goes on without it. Results are checked before they are
timed: ours against float64 at a small size, and every contender against fp32 at the size itself. Contenders of a case
are timed in turn, by CUDA events, and the median of the rounds counts.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import queue
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 100  # seconds without a word from the worker: it hangs
FATAL = re.compile(r"CUDA error|illegal memory access|misaligned address|device-side assert|launch failure", re.I)
PACKAGES = "torch nvidia-cuda-nvrtc nvidia-cuda-nvrtc-cu12 triton memeff inf-cl cut-cross-entropy siglip-kernel".split()
PACKAGES += "pytorch-metric-learning kornia".split()


# ---- the worker: the only part that imports torch -------------------------------------------------------------------


def worker(first: int, skip: set[tuple[str, str]], deadline: float, dry: bool, select: str) -> None:
    """Measures the selected cases from number `first` on and tells what it does in lines of JSON."""
    import torch
    from gpu_cases import plan

    from sslkern.backends.reference import similarity_lse as reference

    device = "cpu" if dry else "cuda"
    if dry:
        torch.set_num_threads(1)
    else:
        reference.BLOCK = 2**28  # rows for a GPU, not for the cache of a CPU
    if first == 0:
        tell("rates", **rates(device))
    cases = [case for case in plan() if re.search(select, case.key)]
    for number, case in enumerate(cases[first:], first):
        tell("case", number=number, key=case.key)
        if time.time() > deadline:
            break
        with contextlib.suppress(Exception):
            torch.compiler.reset()  # it gives up on functions that have met too many shapes
        result = measure(shrunk(case) if dry else case, case.key, skip, device, deadline)
        gc.collect()
        if not dry:
            torch.cuda.empty_cache()
        tell("result", key=case.key, **result)
    tell("end")


def tell(event: str, **facts) -> None:
    print("@" + json.dumps({"event": event} | facts), flush=True)


def shrunk(case):
    """The same case at a size that a dry run gets through in no time."""
    import dataclasses

    return dataclasses.replace(case, n=max(32, case.n >> 12), d=case.d // 8, seconds=0.01)


def rates(device: str) -> dict:
    """What this machine reaches: bf16 products of a large matrix and the copy of a large tensor, read and written."""
    import torch

    size, elements = (8192, 2**30) if device == "cuda" else (128, 2**16)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.empty(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    product = median_seconds(lambda: a @ b, device)
    copy = median_seconds(lambda: target.copy_(source), device)
    return {"bf16_flops_per_second": 2 * size**3 / product, "copy_bytes_per_second": 2 * source.nbytes / copy}


def median_seconds(step: Callable, device: str, rounds: int = 20) -> float:
    for _ in range(5):
        step()
    return statistics.median(seconds_per_call(step, 1, device) for _ in range(rounds))


def seconds_per_call(step: Callable, calls: int, device: str) -> float:
    """By CUDA events around `calls` calls: the GPU's time, or the CPU's where launching takes longer."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def measure(case, key: str, skip: set, device: str, deadline: float) -> dict:
    """The figures of each contender of a case, and why others have none."""
    import torch

    torch.set_float32_matmul_precision("highest" if case.dtype == "fp32" else "high")
    facts = {"problem": case.problem, "n": case.n, "d": case.d, "dtype": case.dtype, "contenders": {}, "failed": {}}
    try:
        problem = case.build(device)
        want = truth(problem)
    except Exception as error:
        return facts | {"failed": {"the case itself": reason(error)}}
    steps, graphs = {}, {}
    for name, factory in problem.contenders.items():
        if not case.wants(name):
            continue
        if (key, name) in skip:
            facts["failed"][name] = "took its process along, or hung"
            continue
        if time.time() > deadline:
            facts["failed"][name] = "not measured: no time left"
            continue
        tell("contender", key=key, name=name)
        try:
            step = step_of(problem, factory())
            figures = prepare(case, name, problem, step, want, device)
            if case.graph and may_be_captured(name):
                try:
                    graphs[name] = captured(step, device)
                except Exception as error:  # such an error ends the capture, not the process
                    facts["failed"][f"{name}, CUDA graph"] = words(error)
            steps[name], facts["contenders"][name] = step, figures
        except Exception as error:
            facts["failed"][name] = reason(error)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    del want
    tell("timing", key=key)
    for name, seconds in run_in_turn(steps, case.seconds, device, facts["failed"]).items():
        facts["contenders"][name]["seconds"] = seconds
    failed_graphs: dict[str, str] = {}
    for name, seconds in run_in_turn(graphs, case.seconds / 2, device, failed_graphs).items():
        facts["contenders"][name]["graph_seconds"] = seconds
    facts["failed"] |= {f"{name}, CUDA graph": why for name, why in failed_graphs.items()}
    facts["contenders"] = {name: figures for name, figures in facts["contenders"].items() if "seconds" in figures}
    for figures in facts["contenders"].values():
        best = min(figures["seconds"], figures.get("graph_seconds", figures["seconds"]))
        if problem.flops:
            figures["flops_per_second"] = problem.flops / best
        if problem.bytes:
            figures["bytes_per_second"] = problem.bytes / best
    return facts


def reason(error: Exception) -> str:
    """Why a contender has no figures; after an error that leaves the GPU unusable the process ends here."""
    text = words(error)
    if FATAL.search(text) and "out of memory" not in text:
        tell("fatal", reason=text)
        os._exit(3)
    return text


def words(error: Exception) -> str:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def step_of(problem, function: Callable, inputs=None) -> Callable:
    """Forward and backward; returns the loss and a gradient, or None, for each input that wants one."""
    import torch

    if problem.plain:
        return function
    inputs = problem.inputs if inputs is None else inputs
    wanted = [x for x in inputs if x.requires_grad]
    around = getattr(function, "around", contextlib.nullcontext)

    def step():
        with around():
            loss = function(*inputs)
            return (loss.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True))

    return step


def truth(problem):
    """The result on the reference backend in fp32, with tf32 products unless the case is fp32; None: takes too long."""
    from baselines import chunked

    if problem.plain:
        return problem.truth()
    if problem.truth is None:
        return None
    return step_of(problem, chunked(problem.truth), as_type(problem.inputs, "float32"))()


def as_type(inputs, dtype: str):
    import torch

    return [x.detach().to(getattr(torch, dtype)).requires_grad_(x.requires_grad) for x in inputs]


def prepare(case, name: str, problem, step: Callable, want, device: str) -> dict:
    """First calls, the checks and the peak memory."""
    import torch
    from gpu_cases import OURS

    figures = {}
    if name.startswith(OURS):
        figures["error_of_96_rows"] = check_exact(case, name, device)
    got = step()
    if want is not None:
        figures["error"] = checked(got, want, RIVAL_TOLERANCE[case.dtype])
    elif case.problem == "nt_xent":
        figures["error_of_1024_losses"] = check_some_losses(problem)
    assert all(x is None or x.isfinite().all() for x in got), "its result is not finite"
    del got
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        figures["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return figures


OURS_TOLERANCE = {"fp32": 1e-5, "tf32": 2e-3, "bf16": 1e-2}  # against float64 of the same inputs, relative to the norm
RIVAL_TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}  # of everybody, at the size itself
_exact: dict[tuple, float] = {}


def check_exact(case, name: str, device: str) -> float:
    """Ours against the textbook in float64, 96 rows: once for each width and type."""
    kind = (case.problem, name, case.d, case.dtype)
    if kind not in _exact:
        problem = case.build(device, rows=96)
        got = step_of(problem, problem.contenders[name]())()
        if problem.plain:
            want = problem.truth()
        else:
            want = step_of(problem, problem.textbook, as_type(problem.inputs, "float64"))()
        _exact[kind] = checked(got, want, OURS_TOLERANCE[case.dtype])
    return _exact[kind]


def checked(got, want, tolerance: float) -> float:
    """The largest error of the loss and the gradients, relative to their norms.

    Raises:
        AssertionError: it is above the tolerance.
    """
    errors = [
        ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()
        for a, b in zip(got, want, strict=True)
        if a is not None
    ]
    for i, error in enumerate(errors):
        assert error <= tolerance, f"wrong: {f'result {i}' if i else 'the loss'} differs by {error:.1e} of its norm"
    return max(errors)


def check_some_losses(problem, count: int = 1024) -> float:
    """NT-Xent where the truth would take too long: the losses of some views, from their rows of the whole matrix."""
    import torch
    import torch.nn.functional as F
    from baselines import TEMPERATURE

    from sslkern.functional import nt_xent

    with torch.no_grad():
        got = nt_xent(*problem.inputs, TEMPERATURE, reduction="none")
        z = F.normalize(torch.cat([x.float() for x in problem.inputs]), dim=1)
        rows = torch.linspace(0, len(z) - 1, min(count, len(z)), device=z.device).long()
        want = []
        for some in rows.split(64):
            s = z[some] @ z.T / TEMPERATURE
            positive = s.gather(1, ((some + len(z) // 2) % len(z))[:, None]).squeeze(1)
            s.scatter_(1, some[:, None], float("-inf"))
            want.append(s.logsumexp(1) - positive)
        return checked((got[rows],), (torch.cat(want),), OURS_TOLERANCE["bf16"])


def may_be_captured(name: str) -> bool:
    """Others wait for the GPU within their step."""
    if name.split(",")[0] in ("sslkern", "chunked products"):
        return True
    return name.startswith(("dense", "compiled", "backend")) and name != "backend reference"


def captured(step: Callable, device: str) -> Callable:
    """The step as a CUDA graph, which must give the same result."""
    if device == "cpu":
        return step
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            want = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    checked(got, want, 1e-2)

    def replay():
        graph.replay()
        return got

    return replay


def run_in_turn(steps: dict[str, Callable], seconds: float, device: str, failed: dict[str, str]) -> dict[str, float]:
    """Median seconds per call over rounds a, b, c, a, b, c, ... that take about `seconds`."""
    calls, times = {}, {}
    begun = time.perf_counter()
    for done in range(101):
        if done > 3 and time.perf_counter() - begun > seconds:
            break
        for name, step in steps.items():
            if name in failed:
                continue
            try:
                estimate = seconds_per_call(step, 1, device)  # also gives it back the memory that others had meanwhile
                if done == 0:
                    calls[name], times[name] = max(1, min(100, round(1e-3 / max(estimate, 1e-6)))), []
                else:
                    times[name].append(seconds_per_call(step, calls[name], device))
            except Exception as error:
                failed[name] = reason(error)
    return {name: statistics.median(of) for name, of in times.items() if name not in failed}


# ---- the parent: keeps the results, restarts the worker, never touches the GPU --------------------------------------


def supervise(out: Path, seconds: float, dry: bool, select: str = "") -> dict:
    """Runs workers until all cases are done or the time is up; results.json is whole after every case."""
    deadline = time.time() + seconds
    results = {"dry_run": dry, "machine": machine(), "rates": {}, "cases": {}, "crashes": [], "complete": False}
    first, skip, begun = 0, set(), None
    while time.time() < deadline and not results["complete"]:
        crash, heard = None, False
        for message in talk(first, skip, deadline, dry, select):
            heard = heard or message["event"] != "gone"
            event = message.pop("event")
            if event == "rates":
                results["rates"] = message
            elif event == "case":
                first, begun = message["number"], None
            elif event == "contender":
                begun = (message["key"], message["name"])
            elif event == "timing":
                begun = None
            elif event == "result":
                results["cases"][message.pop("key")] = message
                first, begun = first + 1, None
            elif event in ("fatal", "gone"):
                crash = crash or message["reason"]
            elif event == "end":
                results["complete"] = True
            save(out, results)
        if crash and not results["complete"]:
            results["crashes"].append({"case": first, "contender": begun and begun[1], "reason": crash})
            if begun in skip or begun is None:
                first += 1  # nobody to blame: on with the next case
            else:
                skip.add(begun)
        if not heard:
            break  # it does not even start
    save(out, results)
    return results


def talk(first: int, skip: set, deadline: float, dry: bool, select: str):
    """Yields what a worker tells, and in the end how it died, if it did."""
    arguments = ["--worker", json.dumps([first, sorted(skip), deadline, dry, select])]
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, env=few_compilers(4)
    )
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
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()


def warm(processes: int, dry: bool) -> None:
    """Fills the compilers' caches on disk from several processes, so that measuring finds what it needs."""
    parts = [json.dumps([i, processes, dry]) for i in range(processes)]
    command = [sys.executable, __file__, "--warm-part"]
    children = [subprocess.Popen([*command, part], env=few_compilers(1)) for part in parts]
    for child in children:
        child.wait()


def few_compilers(processes: int) -> dict[str, str]:
    """torch.compile would start one for each core, which takes longer than our few kernels."""
    return {"TORCHINDUCTOR_COMPILE_THREADS": str(processes)} | os.environ


def warm_part(part: int, parts: int, dry: bool) -> None:
    """Code compiled by torch is for one size, and a large one would not fit beside the others'; kernels are for all."""
    import torch
    from gpu_cases import plan

    tasks = {}
    for case in plan():
        matrix = case.problem in ("nt_xent", "clip", "siglip")
        if case.dtype == "bf16":
            tasks[case.problem, case.d, min(case.n, 8192) if matrix else case.n, False] = case
        if case.dtype == "bf16" and not (matrix and case.n > 8192):
            tasks[case.problem, case.d, case.n, True] = case
    for (_, _, rows, compiled), case in list(tasks.items())[part::parts]:
        with contextlib.suppress(Exception):
            torch.compiler.reset()
            problem = shrunk(case).build("cpu") if dry else case.build("cuda", rows)
            for name, factory in problem.contenders.items():
                if ("compiled" in name) == compiled and name != "cut-cross-entropy":
                    with contextlib.suppress(Exception):
                        step_of(problem, factory())()


def exercise(device: str) -> None:
    """Every loss and kernel of ours once, at odd sizes; what fails is told, and the exit status is 1."""
    from gpu_cases import DTYPES, OURS, PROBLEMS

    failed = False
    for problem_name, build in PROBLEMS.items():
        problem = build(194, 72, DTYPES["bf16"], device)
        for name, factory in problem.contenders.items():
            if name.startswith((OURS, "backend")) and name != "backend reference":
                try:
                    step_of(problem, factory())()
                    print(f"{problem_name}, {name}: ran", flush=True)
                except Exception as error:
                    failed = failed or name == OURS
                    print(f"{problem_name}, {name}: {error!r}", flush=True)
    sys.exit(failed)


def save(out: Path, results: dict) -> None:
    partial = out / "results.json.part"
    partial.write_text(json.dumps(results, indent=1))
    partial.replace(out / "results.json")


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
    parser.add_argument("--seconds", type=float, default=300, help="how long to measure, about")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: the figures mean nothing")
    parser.add_argument("--select", default="", metavar="REGEX", help="only the cases whose key has it")
    parser.add_argument("--warm", type=int, metavar="PROCESSES", help="only compile ahead what the cases will need")
    parser.add_argument("--exercise", action="store_true", help="only run each of our kernels once, for a sanitizer")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--warm-part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        first, skip, deadline, dry, select = json.loads(options.worker)
        return worker(first, {tuple(pair) for pair in skip}, deadline, dry, select)
    if options.warm_part:
        return warm_part(*json.loads(options.warm_part))
    if options.warm:
        return warm(options.warm, options.dry_run)
    if options.exercise:
        return exercise("cpu" if options.dry_run else "cuda")
    if options.out is None:
        parser.error("OUT, the folder for the results, is missing")
    options.out.mkdir(parents=True, exist_ok=True)
    supervise(options.out, options.seconds, options.dry_run, options.select)
    from gpu_report import write

    write(options.out)


if __name__ == "__main__":
    main()
