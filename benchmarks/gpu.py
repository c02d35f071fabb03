"""Times sslkern on a GPU beside its rivals, and writes OUT/results.json and OUT/README.md anew after every case.

python benchmarks/gpu.py OUT [--part headlines] [--seconds 300] [--select clip-65536] [--dry-run]

The cases, the most important first, run in a process of their own, since a failed kernel takes its process along: what
crashed or hung is listed with the reason, and a new process goes on without it. Results are checked before they are
timed, in turn, a, b, c, a, b, c, by CUDA events; beside them what products by BLAS take at that moment. Rivals
are timed once, and `--part profile` tells where the time of ours goes. Results are added to those that OUT has.
How things are measured stands in harness.py, what is measured in gpu_cases.py.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import gpu_report
import problems
import torch
from gpu_cases import BLAS, PARTS, PASSES, PROBLEMS, Case, plan, yardsticks
from harness import CPU, DTYPES, GPU, OURS, Cpu, Step, as_type, check_exact, checked, medians, run_in_turn, step_of
from problems import Problem, chunked

from sslkern import functional
from sslkern.backends.reference import similarity_lse as reference

PATIENCE = 100  # seconds without a word from the worker: it hangs
FATAL = re.compile(r"CUDA error|illegal memory access|misaligned address|device-side assert|launch failure", re.I)
# torch.compile would start one for each core, which takes longer than our few kernels.
FEW_COMPILERS = {"TORCHINDUCTOR_COMPILE_THREADS": "4"} | os.environ

# ---- the worker -----------------------------------------------------------------------------------------------------


def start(dry: bool) -> Cpu:
    """The device, made ready."""
    if dry:
        torch.set_num_threads(1)
        problems.COMPILER = "eager"
        return CPU
    reference.BLOCK = 2**28  # rows for a GPU, not for the cache of a CPU
    return GPU


def worker(part: str, done: set[str], skip: set[tuple[str, str]], deadline: float, dry: bool, select: str) -> None:
    """Measures the selected cases that are not done, and tells what it does in lines of JSON."""
    device = start(dry)
    for case in plan(part):
        if case.key in done or not re.search(select, case.key):
            continue
        if time.time() > deadline:
            break
        tell("case", key=case.key)
        with contextlib.suppress(Exception):
            torch.compiler.reset()  # it gives up on functions that have met too many shapes
        result = measure(shrunk(case) if dry else case, case.key, skip, device, deadline)
        device.release()
        tell("result", key=case.key, **result)
    tell("end")


def tell(event: str, **facts) -> None:
    print("@" + json.dumps({"event": event} | facts), flush=True)


def shrunk(case: Case) -> Case:
    """The same case at a size that a dry run gets through in no time."""
    return dataclasses.replace(case, n=max(32, case.n >> 12), d=max(8, case.d // 8), seconds=0.01)


def measure(case: Case, key: str, skip: set, device: Cpu, deadline: float) -> dict:
    """The figures of each contender of a case, and why others have none."""
    torch.set_float32_matmul_precision("highest" if case.dtype == "fp32" else "high")
    contenders, failed = {}, {}
    facts = dataclasses.asdict(case) | {"contenders": contenders, "failed": failed}
    try:
        problem = case.build(device.name)
        want = None if case.part == "profile" else truth(problem, case)
    except Exception as error:
        failed["the case itself"] = reason(error)
        return facts
    facts |= {"flops": problem.floor_flops(), "bytes": problem.bytes}
    steps = {}
    for name, factory in case.contenders(problem).items():
        if (key, name) in skip:
            failed[name] = "took its process along, or hung"
            continue
        if time.time() > deadline:
            failed[name] = "no time left"
            continue
        tell("contender", name=name)
        try:
            step = step_of(factory(), problem.inputs, slope=slope(case, problem))
            if case.part == "profile":
                contenders[name] = {"kernels": add_rates(device.profile(step), problem)}
            else:
                contenders[name], steps[name] = first_calls(case, name, problem, step, want, device), step
        except Exception as error:
            failed[name] = reason(error)
        device.release()
    if case.part in ("headlines", "small"):
        del want
        tell("timing")
        try:
            race(case, problem, steps, facts, device)
        except Exception as error:  # no memory for the product by BLAS
            failed["the rounds"] = reason(error)
    return facts


def race(case: Case, problem: Problem, steps: dict[str, Step], facts: dict, device: Cpu) -> None:
    """Times the contenders and products by BLAS in turn, as they are and then as CUDA graphs."""
    contenders, failed = facts["contenders"], facts["failed"]
    forms = sorted((figures["seconds"], name) for name, figures in contenders.items() if name.startswith("compiled"))
    for _, name in forms[1:]:  # the fastest in its first call is enough, and has the memory
        del steps[name]
    steps = steps | yardsticks(problem, DTYPES[case.dtype], device.name)

    def lost(suffix: str, name: str, error: Exception) -> None:
        failed[name + suffix] = reason(error)

    times = run_in_turn(steps, case.seconds, device, lost=functools.partial(lost, ""))
    for name, seconds in medians(times).items():
        contenders.setdefault(name, {})["seconds"] = seconds
    device.release()
    if not case.graph:
        return
    graphs = {}
    for name in times:
        try:
            graphs[name] = device.captured(steps[name])
        except Exception as error:  # such an error ends the capture, not the process
            failed[f"{name}, CUDA graph"] = words(error)
    times = run_in_turn(graphs, case.seconds / 2, device, lost=functools.partial(lost, ", CUDA graph"))
    for name, seconds in medians(times).items():
        contenders[name]["graph_seconds"] = seconds


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


def slope(case: Case, problem: Problem) -> torch.Tensor | None:
    """As a gradient scaler does: gradients of a mean over many rows are too small for fp16."""
    if case.dtype != "fp16":
        return None
    return torch.tensor(2.0**16, device=problem.inputs[0].device)


def truth(problem: Problem, case: Case):
    """The result on the reference backend in fp32, with tf32 products unless the case is fp32; None: takes too long."""
    if problem.plain:
        return chunked(problem.ours)(*problem.inputs)
    if not problem.truth:
        return None
    inputs = as_type(problem.inputs, torch.float32)
    return step_of(chunked(problem.ours), inputs, slope=slope(case, problem))()


def first_calls(case: Case, name: str, problem: Problem, step: Step, want, device: Cpu) -> dict:
    """The checks, the peak memory, and the time of one call."""
    figures = {}
    ours, others = device.tolerance[case.dtype]
    if name.startswith(OURS):
        figures["error_of_96_rows"] = error_of_few_rows(few_rows(case), name, device)
    got = step()
    if want is not None:
        figures["error"] = checked(got, want, others, least=0.1)
    else:
        figures["error_of_1024_losses"] = check_some_losses(problem, ours)
    assert all(x is None or x.isfinite().all() for x in got), "its result is not finite"
    del got
    figures |= device.seconds_and_peak(step)
    if figures["seconds"] < 0.05:  # what is slow is timed once
        figures["seconds"] = statistics.median(device.seconds_per_call(step) for _ in range(5))
    return figures


def few_rows(case: Case) -> Case:
    """What is the same for all cases of a width and a type."""
    return Case(case.problem, 96, case.d, case.dtype, "headlines", case.scale, alone=case.alone)


@functools.cache
def error_of_few_rows(case: Case, name: str, device: Cpu) -> float:
    """Of ours against the textbook in float64."""
    problem = case.build(device.name)
    exact = problem if problem.plain else case.build(device.name, dtype=torch.float64)
    function, (tolerance, _) = case.contenders(problem)[name](), device.tolerance[case.dtype]
    return check_exact(function, problem, exact, tolerance, slope(case, problem))


@torch.no_grad()
def check_some_losses(problem: Problem, tolerance: float, count: int = 1024) -> float:
    """NT-Xent where the truth would take too long: the losses of some views, against rows of the whole matrix."""
    *views, scale = problem.inputs
    z, N = torch.cat([x.float() for x in views]), len(views[0])
    rows = torch.linspace(0, 2 * N - 1, min(count, 2 * N), device=z.device).long()
    samples = dict(ids=rows % N, negative_ids=torch.arange(2 * N, device=z.device) % N)
    options = dict(logit_scale=scale, reduction="none")
    want = chunked(functional.info_nce)(z[rows], z[(rows + N) % (2 * N)], z, **samples, **options)
    return checked((functional.nt_xent(*views, **options)[rows],), (want,), tolerance)


def add_rates(kernels: list[dict], problem: Problem) -> list[dict]:
    """What those execute that are known by their names, per second."""
    groups, executed = {}, PASSES[problem.work]
    for kernel in kernels:
        patterns = [p for p in executed if re.search(p, kernel["name"]) and "pair" not in kernel["name"]]
        if patterns:
            groups.setdefault(patterns[0], []).append(kernel)
    for pattern, group in groups.items():
        by_blas = BLAS in groups and "lse_bwd" in pattern  # it writes the weights that BLAS multiplies
        passes = executed["weights" if by_blas else pattern]
        rate = passes * problem.pass_flops / sum(kernel["seconds"] for kernel in group)
        for kernel in group:
            kernel["flops_per_second"] = rate
    return kernels


# ---- the parent: keeps the results, restarts the worker, never touches the GPU --------------------------------------


def supervise(out: Path, part: str, seconds: float, dry: bool, select: str = "") -> dict:
    """Runs workers until all cases are done or the time is up; the results in OUT are whole after every case."""
    deadline = time.time() + seconds
    results = gpu_report.read(out)
    results |= {"dry_run": dry, "machine": GPU.machine(), "complete": False}
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
                done.add(key)  # no contender was running: on with the next case
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
    device = start(dry)
    cases = [case for case in plan("headlines") + plan("small") if re.search(select, case.key)]
    for case in cases[part::parts]:
        with contextlib.suppress(Exception):
            torch.compiler.reset()
            case = shrunk(case) if dry else case
            problem = case.build(device.name)
            for factory in case.contenders(problem).values():
                with contextlib.suppress(Exception):
                    step_of(factory(), problem.inputs, slope=slope(case, problem))()
        device.release()


def exercise(dry: bool) -> None:
    """Every loss and kernel of ours once, at odd sizes; what fails is told, and the exit status is 1."""
    device, failed = start(dry), False
    for name, d in itertools.product(PROBLEMS, (72, 200, 776)):  # each a class of kernels for Hopper
        case = Case(name, 194, d, part="profile")
        problem = case.build(device.name)
        for contender, factory in case.contenders(problem).items():
            try:
                step_of(factory(), problem.inputs)()
                print(f"{name}, {d} features, {contender}: ran", flush=True)
            except Exception as error:
                failed = failed or contender == OURS
                print(f"{name}, {d} features, {contender}: {error!r}", flush=True)
    sys.exit(failed)


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
        return exercise(options.dry_run)
    if options.out is None:
        parser.error("OUT, the folder for the results, is missing")
    options.out.mkdir(parents=True, exist_ok=True)
    results = supervise(options.out, options.part, options.seconds, options.dry_run, options.select)
    print(gpu_report.summary(results))


if __name__ == "__main__":
    main()
