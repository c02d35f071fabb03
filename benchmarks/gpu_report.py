"""Turns OUT/results.json of gpu.py into OUT/README.md and plots, and prints the goals.

python benchmarks/gpu_report.py OUT [STAGES]

STAGES is what gpu.sh noted: a line `name <tab> state <tab> remark` for each of its steps.
"""

import json
import sys
from pathlib import Path

from gpu_cases import KERNELS, LOSSES, OURS, TITLES, goals, plan

SHORT = {  # columns of the tables of losses
    OURS: "sslkern",
    "memeff": "memeff",
    "inf-cl": "inf-cl",
    "cut-cross-entropy": "cut-cross-entropy",
    "siglip-kernel": "siglip-kernel",
    "pytorch-metric-learning": "pytorch-metric-learning",
    "gather + bmm (CMC)": "gather + bmm",
    "dense product + gather": "dense product",
    "chunked torch": "reference",
    "chunked products": "chunked products",
}
COLORS = ["#d62728", "#1f77b4", "#2ca02c", "#7f7f7f", "#bcbd22", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#ff7f0e"]
COLORS += ["#000000", "#1b9e77", "#7570b3", "#a6761d"]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |" for cells in lines) + "\n"


def judged(results: dict) -> list[dict]:
    """Each goal with its figure, or with None where the case was not measured."""
    judged = []
    for goal in goals():
        case = results["cases"].get(goal.case, {})
        try:
            figure = goal.figure(case["contenders"], results["rates"])
        except (KeyError, ValueError):  # the case, a contender or its graph is missing
            figure = None
        bound = goal.at_most if goal.at_least is None else goal.at_least
        met = None if figure is None else figure <= bound if goal.at_least is None else figure >= bound
        stretched = met and goal.stretch is not None and figure <= goal.stretch
        state = {None: "not measured", True: "met", False: "MISSED"}[met] + (", stretch too" if stretched else "")
        state = "dry run" if results["dry_run"] and figure is not None else state
        text = f"at {'most' if goal.at_least is None else 'least'} {bound:g}"
        text += f" ({goal.stretch:g} as the stretch)" if goal.stretch else ""
        judged.append({"what": goal.what, "figure": figure, "goal": text, "state": state})
    return judged


def goals_table(results: dict) -> str:
    rows = [[g["what"], number(g["figure"]), g["goal"], bold(g["state"])] for g in judged(results)]
    return table(["figure", "measured", "goal", ""], rows)


def bold(state: str) -> str:
    return f"**{state}**" if state.startswith("MISSED") else state


def number(x: float | None) -> str:
    return "" if x is None else f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def title(case: dict) -> str:
    return f"{TITLES.get(case['problem'], case['problem'])}, {case['n']:,} x {case['d']}, {case['dtype']}"


def loss_table(results: dict, problem: str) -> str:
    """A row for each size: our time and rate, and how many times longer the others take."""
    cases = [c for key, c in results["cases"].items() if c["problem"] == problem and OURS in c["contenders"]]
    cases.sort(key=lambda c: (c["dtype"] != "bf16", c["dtype"], c["n"], c["d"]))
    merged: dict[tuple, dict] = {}
    for case in cases:  # several measurements of one size: each has our time beside the others'
        row = merged.setdefault((case["dtype"], case["n"], case["d"]), {"ours": case["contenders"][OURS], "ratios": {}})
        for name, figures in case["contenders"].items():
            row["ratios"][name] = figures["seconds"] / case["contenders"][OURS]["seconds"]
    names = list(dict.fromkeys(name for row in merged.values() for name in row["ratios"] if name != OURS))
    families = {"dense": "dense", "compiled dense": "dense, compiled"}
    columns = [name for name in names if family(name) is None]
    columns += [f for f in families if any(family(name) == f for name in names)]
    product, copy = (results["rates"].get(key) for key in ("bf16_flops_per_second", "copy_bytes_per_second"))
    rows = []
    for (dtype, n, d), row in merged.items():
        ours, ratios = row["ours"], row["ratios"]
        if "flops_per_second" in ours:
            rate, share = number(ours["flops_per_second"] / 1e12), percent(ours["flops_per_second"], product)
        else:
            rate, share = number(ours["bytes_per_second"] / 1e9), percent(ours["bytes_per_second"], copy)
        cells = [f"{n:,}", str(d), dtype, number(1e3 * ours["seconds"]), number(ms_of(ours, "graph_seconds"))]
        cells += [rate, share, number(ours.get("peak_bytes", 0) / 2**20)]
        for column in columns:
            found = [ratio for name, ratio in ratios.items() if column in (name, family(name))]
            cells.append(f"{min(found):.2f}" if found else "")
        rows.append(cells)
    bytes_only = problem in ("nce",)
    units = ["GB/s", "of the copy"] if bytes_only else ["TFLOP/s", "of bf16 products"]
    head = ["N", "D", "type", "ms", "CUDA graph, ms", *units, "peak extra MiB"]
    return table(head + [families.get(c, SHORT.get(c, c)) for c in columns], rows)


def family(name: str) -> str | None:
    """Of the dense forms the fastest counts."""
    return next((f for f in ("compiled dense", "dense") if name.startswith(f"{f} ") and "product" not in name), None)


def ms_of(figures: dict, key: str) -> float | None:
    return 1e3 * figures[key] if key in figures else None


def percent(x: float, whole: float | None) -> str:
    return f"{100 * x / whole:.0f} %" if whole else ""


def kernel_table(results: dict) -> str:
    rows, copy = [], results["rates"].get("copy_bytes_per_second")
    for case in results["cases"].values():
        for name, f in case["contenders"].items() if case["problem"] in KERNELS else ():
            times = [number(1e3 * f["seconds"]), number(ms_of(f, "graph_seconds"))]
            rate = [number(f["bytes_per_second"] / 1e9), percent(f["bytes_per_second"], copy)]
            rows.append([case["problem"], f"{case['n']:,} x {case['d']}", name, *times, *rate])
    return table(["kernel", "rows", "", "ms", "CUDA graph, ms", "GB/s", "of the copy"], rows)


def all_cases(results: dict) -> str:
    parts = []
    for key, case in results["cases"].items():
        rows = []
        for name, f in sorted(case["contenders"].items(), key=lambda item: item[1]["seconds"]):
            error = f.get("error", f.get("error_of_1024_losses"))
            times = [number(1e3 * f["seconds"]), number(ms_of(f, "graph_seconds"))]
            peak = number(f["peak_bytes"] / 2**20) if "peak_bytes" in f else ""
            rows.append([name, *times, peak, "" if error is None else f"{error:.1e}"])
        rows += [[name, why, "", "", ""] for name, why in case["failed"].items()]
        head = ["", "ms", "CUDA graph, ms", "peak extra MiB", "error"]
        parts += [f"<details><summary>{title(case)} ({key})</summary>\n", table(head, rows), "</details>\n"]
    return "\n".join(parts)


def missing(results: dict, stages: list[list[str]]) -> list[str]:
    """All that a reader might take for measured and is not."""
    lines = [f"not run: {name}: {remark or state}" for name, state, remark in stages if state == "not run"]
    unmeasured = [case.key for case in plan() if case.key not in results["cases"]]
    lines += [f"not measured: {key}" for key in unmeasured]
    why: dict[str, list[str]] = {}
    for key, case in results["cases"].items():
        for name, text in case["failed"].items():
            why.setdefault(f"{name}: {text}", []).append(key)
    lines += [f"not measured: {what} ({', '.join(keys)})" for what, keys in why.items()]
    return lines + [f"crash: {c['contender']}, case {c['case']}: {c['reason']}" for c in results["crashes"]]


def plot(results: dict, path: Path) -> str | None:
    """Time against N at D = 128 and 512, the losses with an N x N matrix; returns why not, if not."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed"
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    chosen = [
        (problem, d)
        for problem in ("nt_xent", "clip", "siglip")
        for d in sorted({c["d"] for c in results["cases"].values() if c["problem"] == problem and c["dtype"] == "bf16"})
    ]
    if not chosen:
        return "nothing was measured"
    rows = (len(chosen) + 3) // 4
    figure, axes = plt.subplots(rows, 4, figsize=(18, 4 * rows), layout="constrained", squeeze=False)
    colors: dict[str, str] = {OURS: COLORS[0]}
    for ax, (problem, d) in zip(axes.flat, chosen, strict=False):
        points: dict[str, dict[int, float]] = {}
        for case in results["cases"].values():
            if (case["problem"], case["d"], case["dtype"]) == (problem, d, "bf16"):
                for name, f in case["contenders"].items():
                    of = points.setdefault(family(name) or name, {})
                    of[case["n"]] = min(of.get(case["n"], 1e9), 1e3 * f["seconds"])
        for name, of in points.items():
            color = colors.setdefault(name, COLORS[len(colors) % len(COLORS)])
            ax.plot(
                *zip(*sorted(of.items()), strict=True), "o-", label=name, color=color, lw=2.5 if name == OURS else 1
            )
        ax.set(xscale="log", yscale="log", xlabel="N", ylabel="ms", title=f"{TITLES[problem]}, D = {d}, bf16")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=6)
    for ax in axes.flat[len(chosen) :]:
        ax.axis("off")
    figure.suptitle(heading(results))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def heading(results: dict) -> str:
    if results["dry_run"]:
        return "Dry run on a CPU, tiny sizes: the figures mean nothing"
    return f"{results['machine']['gpu']}, forward + backward"


def report(results: dict, stages: list[list[str]], plotted: str | None) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items() if value)
    rates = results["rates"]
    parts = [f"# {heading(results)}\n", f"Written by `benchmarks/gpu.sh`. {facts}.\n"]
    if rates:
        product, copy = rates["bf16_flops_per_second"] / 1e12, rates["copy_bytes_per_second"] / 1e9
        parts += [
            f"Measured in the same run: bf16 products of `torch.mm` at {number(product)} TFLOP/s, a copy at "
            f"{number(copy)} GB/s, read and written. TFLOP/s count the floor of the algorithm, not what is executed; "
            "rates come from the time under a CUDA graph where there is one and it is shorter.\n"
        ]
    parts += [
        "## Goals\n",
        "They are set for an H100, in bf16, forward + backward.\n",
        goals_table(results),
        *(["## Steps\n", table(["step", "", ""], stages)] if stages else []),
        *([f"![time against N]({plotted})\n"] if plotted else []),
    ]
    for problem in LOSSES:
        parts += [f"## {TITLES[problem]}\n", "Columns after the memory: times longer than ours.\n"]
        parts += [loss_table(results, problem)]
    parts += ["## Kernels bound by memory\n", kernel_table(results)]
    parts += ["## Not measured, not run\n", "\n".join(f"- {line}" for line in missing(results, stages)) + "\n"]
    return "\n".join([*parts, "## All cases\n", all_cases(results)])


def write(out: Path, stages: Path | None = None) -> None:
    path = out / "results.json"
    empty = {"dry_run": False, "machine": {}, "rates": {}, "cases": {}, "crashes": [], "complete": False}
    results = empty | (json.loads(path.read_text()) if path.exists() else {})
    results["machine"].setdefault("gpu", "no GPU")
    steps = [line.split("\t") for line in stages.read_text().splitlines()] if stages and stages.exists() else []
    plotted = "time.png"
    if why := plot(results, out / plotted):
        steps, plotted = [*steps, ["plots", "not run", why]], None
    results |= {"goals": judged(results), "steps": steps, "missing": missing(results, steps)}
    path.write_text(json.dumps(results, indent=1))
    (out / "README.md").write_text(report(results, steps, plotted))
    print(f"\n{heading(results)}: {len(results['cases'])} of {len(plan())} cases")
    for step in steps:
        print(f"{step[0]:<22}{step[1]:<10}{step[2]}")
    for goal in results["goals"]:
        print(f"{goal['state']:<20}{number(goal['figure']):>9}  {goal['goal']:<34}{goal['what']}")
    states = [goal["state"].partition(",")[0] for goal in results["goals"]]
    print("goals: " + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
