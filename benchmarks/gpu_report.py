"""Turns the OUT/results.json of gpu.py, and OUT/steps.tsv of gpu.sh, into OUT/README.md, and prints the goals.

python benchmarks/gpu_report.py OUT
"""

import copy
import json
import math
import sys
from pathlib import Path

from gpu_cases import COPY, COPY_BYTES, CUBE, PRODUCT, Goal, goals, ours, plan, rate
from harness import OURS
from tables import number, of_unit, table

EMPTY = {"form": 2, "dry_run": False, "machine": {}, "cases": {}, "crashes": [], "complete": False}


def read(out: Path) -> dict:
    path = out / "results.json"
    found = json.loads(path.read_text()) if path.exists() else copy.deepcopy(EMPTY)
    if found.get("form") != EMPTY["form"]:
        sys.exit(f"{path} is of an earlier form of this benchmark; name another folder")
    return found


def write(out: Path, results: dict) -> None:
    """Each file is replaced in one step: a run that is stopped leaves whole what was measured until then."""
    steps = out / "steps.tsv"
    results["steps"] = [line.split("\t") for line in steps.read_text().splitlines()] if steps.exists() else []
    results |= {"goals": judged(results), "missing": missing(results)}
    for name, text in ("results.json", json.dumps(results, indent=1)), ("README.md", page(results)):
        part = out / f"{name}.part"
        part.write_text(text)
        part.replace(out / name)


def judged(results: dict) -> list[dict]:
    """Each goal with its figure, or with None where a case or a contender was not measured."""
    judged = []
    for goal in goals():
        try:
            figure = goal.figure(results["cases"])
        except KeyError:
            figure = None
        bound = f"at {'least' if goal.least else 'most'} {goal.bound:g}"
        state = state_of(goal, figure, results["dry_run"])
        judged.append({"what": goal.what, "figure": figure, "goal": bound, "state": state})
    return judged


def state_of(goal: Goal, figure: float | None, dry_run: bool) -> str:
    if figure is None:
        return "not measured"
    if dry_run:
        return "dry run"
    met = figure >= goal.bound if goal.least else figure <= goal.bound
    return "met" if met else "MISSED"


def missing(results: dict) -> list[str]:
    """All that a reader might take for measured and is not."""
    lines = [f"not run: {name}: {remark or state}" for name, state, remark in results["steps"] if state == "not run"]
    lines += [f"not measured: {case.key}" for case in plan() if case.key not in results["cases"]]
    why: dict[str, list[str]] = {}
    for key, case in results["cases"].items():
        for name, text in case["failed"].items():
            why.setdefault(f"{name}: {text}", []).append(key)
    lines += [f"not measured: {what} ({', '.join(keys)})" for what, keys in why.items()]
    return lines + [f"crash: {c['contender']}, case {c['case']}: {c['reason']}" for c in results["crashes"]]


def slower(results: dict) -> list[str]:
    """Where somebody is faster than we are."""
    lines = []
    for key, case in results["cases"].items():
        for how in ("seconds", "graph_seconds"):
            times = {name: f[how] for name, f in case["contenders"].items() if how in f and name not in YARDSTICKS}
            best = min(times, key=times.get, default=OURS)
            if OURS in times and times[best] < times[OURS]:
                graph = ", CUDA graph" if how == "graph_seconds" else ""
                lines.append(f"{key}{graph}: {best} {times[OURS] / times[best]:.2f} times faster")
    return lines


YARDSTICKS = COPY, CUBE, PRODUCT


def page(results: dict) -> str:
    heading = f"{results['machine'].get('gpu')}, forward + backward"
    if results["dry_run"]:
        heading = "Dry run on a CPU, tiny sizes: the figures mean nothing"
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items() if value)
    rates = [rate(case) / 1e12 for case in results["cases"].values() if CUBE in case["contenders"]]
    span = f" It multiplied at {number(min(rates))} to {number(max(rates))} TFLOP/s." if rates else ""
    return "\n".join(
        [
            f"# {heading}\n",
            f"Written by `benchmarks/gpu.sh`. {facts}.{span} [How it is measured](../README.md#on-a-gpu).\n",
            "## Goals\n",
            "For an H100. Times are scaled to a BLAS that multiplies at 784 TFLOP/s, by its rate at that moment.\n",
            table(
                ["figure", "measured", "goal", ""],
                [
                    [g["what"], number(g["figure"]), g["goal"], g["state"].replace("MISSED", "**MISSED**")]
                    for g in results["goals"]
                ],
            ),
            *(["## Steps\n", table(["step", "", ""], results["steps"])] if results["steps"] else []),
            "## Ours\n",
            "mm: the product by BLAS of the same sizes. Floor: what the algorithm has to multiply or to move, at the "
            "rate of products by BLAS or of copies of the same moment, as a share of our time.\n",
            table(*overview(results)),
            "## Where somebody is faster\n",
            listed(slower(results)),
            "## What the time goes into\n",
            *(profiled(key, case) for key, case in results["cases"].items() if case["part"] == "profile"),
            "## Not measured, not run\n",
            listed(results["missing"]),
            "## All cases\n",
            *(detailed(key, case) for key, case in results["cases"].items() if case["part"] != "profile"),
        ]
    )


def overview(results: dict) -> tuple[list[str], list[list[str]]]:
    rows = []
    for key, case in results["cases"].items():
        if case["part"] == "profile" or OURS not in case["contenders"]:
            continue
        figures = ours(key, results["cases"])
        compiled = [f for name, f in case["contenders"].items() if name.startswith("compiled dense")]
        fastest = min(compiled, key=lambda f: f["seconds"], default={})
        times = [ms(f, how) for f in (figures, fastest) for how in ("seconds", "graph_seconds")]
        product, peak = ms(case["contenders"].get(PRODUCT, {})), of_unit(figures, "peak_bytes", 2**20)
        rows.append([key, *times, product, share_of_floor(case, figures), peak])
    head = ["case", "ours, ms", "CUDA graph", "compiled dense, ms", "CUDA graph", "mm, ms", "floor", "peak extra MiB"]
    return head, rows


def share_of_floor(case: dict, ours: dict) -> str:
    """What the algorithm has to multiply or to move, at the rate of the moment, over our time."""
    best = min(ours["seconds"], ours.get("graph_seconds", math.inf))
    if CUBE in case["contenders"] and case["flops"]:
        return f"{100 * case['flops'] / best / rate(case):.0f} %"
    if COPY in case["contenders"]:
        return f"{100 * case['bytes'] / best / COPY_BYTES * case['contenders'][COPY]['seconds']:.0f} %"
    return ""


def profiled(key: str, case: dict) -> str:
    rows = []
    for name, figures in case["contenders"].items():
        for kernel in figures["kernels"][:8]:
            rates = of_unit(kernel, "flops_per_second", 1e12)
            rows.append([name, kernel["name"][:80], str(kernel["calls"]), ms(kernel), rates])
    return folded(key, table(["", "kernel", "launches", "ms", "TFLOP/s executed"], rows))


def detailed(key: str, case: dict) -> str:
    rows = []
    for name, f in sorted(case["contenders"].items(), key=lambda item: item[1]["seconds"]):
        error = f.get("error", f.get("error_of_1024_losses"))
        rows.append(
            [
                name,
                ms(f),
                ms(f, "graph_seconds"),
                of_unit(f, "peak_bytes", 2**20),
                "" if error is None else f"{error:.1e}",
            ]
        )
    rows += [[name, why, "", "", ""] for name, why in case["failed"].items()]
    return folded(key, table(["", "ms", "CUDA graph, ms", "peak extra MiB", "error"], rows))


def folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n</details>\n"


def listed(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines or ["nothing"]) + "\n"


def ms(figures: dict, key: str = "seconds") -> str:
    return of_unit(figures, key, 1e-3)


def summary(results: dict) -> str:
    lines = [f"{step[0]:<22}{step[1]:<10}{step[2]}" for step in results["steps"]]
    lines += [f"{g['state']:<14}{number(g['figure']):>9}  {g['goal']:<16}{g['what']}" for g in results["goals"]]
    states = [goal["state"] for goal in results["goals"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return "\n".join([*lines, f"{len(results['cases'])} of {len(plan())} cases; goals: {counts}"])


if __name__ == "__main__":
    found = read(Path(sys.argv[1]))
    write(Path(sys.argv[1]), found)
    print(summary(found))
