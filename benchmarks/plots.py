"""Turns the JSON of `make bench` into tables and plots beside it.

python benchmarks/plots.py benchmarks/results/<cpu>
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from harness import OURS
from tables import table

TITLES = {"nt_xent": ("NT-Xent", "views"), "two_way": ("two-way InfoNCE", "rows")}
COLORS = {
    OURS: "#d62728",
    "chunked torch": "#1f77b4",
    "dense cross_entropy": "#7f7f7f",
    "dense logsumexp": "#bcbd22",
    "lightly": "#2ca02c",
    "open_clip": "#2ca02c",
    "pytorch-metric-learning": "#9467bd",
}


def load(folder: Path) -> tuple[dict, list[dict]]:
    """The machine, and for each benchmark its name and figures."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    cases = [{"name": b["name"], **b["extra_info"]} for run in runs for b in run["benchmarks"]]
    return runs[0]["machine_info"], [case for case in cases if "problem" in case]


def plot_curve(cases: list[dict], problem: str, path: Path) -> None:
    """Time and peak memory of one forward and backward against n."""
    cases = [c for c in cases if c["name"].startswith("bench_curve") and c["problem"] == problem]
    title, unit = TITLES[problem]
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, color in COLORS.items():
        for axes, key, divisor in ((time_axes, "seconds", 1e-3), (memory_axes, "peak_bytes", 2**20)):
            points = [(c["n"], c[key][name] / divisor) for c in cases if name in c[key]]
            style = {"linewidth": 2.5, "zorder": 3} if name == OURS else {"linewidth": 1.5}
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=color, label=name, markersize=4, **style)
    for axes, label in ((time_axes, "time, ms"), (memory_axes, "peak extra memory, MiB")):
        ticks = sorted({c["n"] for c in cases})
        axes.set(xscale="log", yscale="log", xlabel=f"N, {unit} of {cases[0]['d']} features", ylabel=label)
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time_axes.legend(fontsize=8)
    figure.suptitle(f"{title}, forward + backward, {cases[0]['dtype']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def goals_table(cases: list[dict]) -> str:
    goals = [g for c in cases for g in c.get("goals", []) if not c["name"].startswith("bench_never_worse")]
    rows = [[g["what"], f"{g['figure']:.2f}", g["goal"], "yes" if g["met"] else "**no**"] for g in goals]
    return table(["figure", "measured", "goal", "met"], rows)


def case_table(case: dict) -> str:
    rows = []
    for name, seconds in sorted(case["seconds"].items(), key=lambda item: item[1]):
        ratio = case["times_faster"].get(name)
        rate = case.get("gflops_on_floor", {}).get(name)
        peak = case.get("peak_bytes", {}).get(name)
        rows.append(
            [
                name,
                f"{seconds * 1e3:,.{1 if seconds > 0.1 else 3}f}",
                "" if ratio is None else f"{ratio:.2f}",
                "" if rate is None else f"{rate:.0f}",
                "" if peak is None else f"{peak / 2**20:.1f}",
            ]
        )
    return table(["", "ms", "times slower than sslkern", "Gflop/s on our floor", "peak extra MiB"], rows)


def never_worse_table(cases: list[dict]) -> str:
    """Our time over that of the fastest dense form, n downwards and d across, one table for each kind."""
    parts = []
    cases = [c for c in cases if c["name"].startswith("bench_never_worse")]
    for kind in dict.fromkeys((c["problem"], c["dtype"], c["mode"]) for c in cases):
        ratios = {(c["n"], c["d"]): c["goals"][0] for c in cases if (c["problem"], c["dtype"], c["mode"]) == kind}
        ds = sorted({d for _, d in ratios})
        rows = []
        for n in sorted({n for n, _ in ratios}):
            cells = [ratios.get((n, d)) for d in ds]
            texts = ["" if g is None else f"{g['figure']:.2f}" if g["met"] else f"**{g['figure']:.2f}**" for g in cells]
            rows.append([f"{n:,}", *texts])
        parts += [f"{TITLES[kind[0]][0]}, {kind[1]}, {kind[2]}\n", table(["N", *(f"D = {d}" for d in ds)], rows)]
    return "\n".join(parts)


def report(machine: dict, cases: list[dict]) -> str:
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items())
    parts = [
        "# Benchmark results\n",
        "Written by `make bench`. Medians of rounds in which all contenders ran in turn in one process; ratios are "
        f"medians over these rounds. Peak memory comes from child processes. Machine: {facts}.\n",
        "## Goals\n",
        goals_table(cases),
        "## Time over that of the fastest dense form\n",
        "At most 1.05 is the goal; **bold** misses it.\n",
        never_worse_table(cases),
        "## Time and memory against N\n",
        *(f"![{TITLES[problem][0]}]({problem}.png)\n" for problem in TITLES),
        "## All cases\n",
    ]
    for case in cases:
        if "seconds" in case and not case["name"].startswith("bench_never_worse"):
            size = f", queue of {case['size']:,}" if "size" in case else ""
            phase = case.get("phase", "both").replace("both", "forward + backward")
            head = f"{case['problem']}, {case['n']:,} x {case['d']}{size}, {case['dtype']}, {phase}"
            load = f"load average {case['load_average']}"
            parts += [f"### {head}\n", f"{case['rounds']} rounds, {load}.\n", case_table(case)]
    return "\n".join(parts)


def main(folder: Path) -> None:
    machine, cases = load(folder)
    for problem in TITLES:
        plot_curve(cases, problem, folder / f"{problem}.png")
    (folder / "README.md").write_text(report(machine, cases))
    print(f"wrote {folder / 'README.md'} and {', '.join(f'{problem}.png' for problem in TITLES)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
