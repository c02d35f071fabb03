"""What losses over 1 to 4,096 ranks cost by the model of sslkern/distributed/cost.py: a table, JSON, and a plot of the
memory beside what Inf-CL and open_clip were published to take.

python benchmarks/scaling.py

Nothing here is measured: a GPU is what DEVICES assumes of it.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from tables import table

from sslkern.distributed.cost import DEVICES, Problem, by_triangle, choose, cost

FOLDER = Path(__file__).with_name("results") / "scaling"
STRATEGIES = "all_gather", "ring"
DEVICE = DEVICES["cuda"]
RANKS = 1, 2, 8, 64, 512, 4096
# Rows of features, in bf16, on each rank.
CASES = {
    "CLIP, 512 features": [(n, 512, False) for n in (256, 8192)],
    "NT-Xent, 128 features": [(n, 128, True) for n in (512, 16384)],
}
# GB of the loss alone, of a ViT-L/14 (768 features) on A800, global batch in thousands (of 1,024) of pairs: table 1 of
# Inf-CL, https://arxiv.org/abs/2410.17243. "CLIP" computes the whole matrix on each rank, "OpenCLIP" is its local loss;
# their largest on 8 GPUs has the features on the host.
PUBLISHED = {
    8: {
        "CLIP": {32: 16.67, 64: 66.11},
        "OpenCLIP": {32: 2.27, 64: 8.63, 128: 33.64},
        "Inf-CL": {32: 0.18, 64: 0.36, 128: 0.72, 256: 1.45, 1024: 6.53},
    },
    32: {
        "CLIP": {32: 16.66, 64: 66.11},
        "OpenCLIP": {32: 0.71, 64: 2.45, 128: 8.98, 256: 34.35},
        "Inf-CL": {32: 0.05, 64: 0.09, 128: 0.18, 256: 0.35, 1024: 1.44},
    },
}
COLORS = {"all_gather": "#1f77b4", "ring": "#d62728", "CLIP": "#7f7f7f", "OpenCLIP": "#2ca02c", "Inf-CL": "#9467bd"}


def cases() -> list[dict]:
    """Every case with every number of ranks: both phases of both strategies."""
    return [
        {
            "problem": name,
            **problem._asdict(),
            "auto": choose(problem, DEVICE),
            "costs": {strategy: as_dict(cost(strategy, problem, DEVICE)) for strategy in STRATEGIES},
        }
        for name, sizes in CASES.items()
        for rows, features, itself in sizes
        for problem in (Problem(rows, features, size, itself) for size in RANKS)
    ]


def as_dict(of) -> dict:
    return {"forward": of.forward._asdict(), "backward": of.backward._asdict(), "memory": of.memory}


def cost_table(cases: list[dict]) -> str:
    """The two strategies beside each other, forward and backward together."""
    rows = []
    for case in cases:
        a, b = (case["costs"][strategy] for strategy in STRATEGIES)

        def both(key, unit, digits=1, a=a, b=b):
            sums = ((c["forward"][key] + c["backward"][key]) / unit for c in (a, b))
            return " / ".join(f"{x:,.{digits}f}" for x in sums)

        memory = " / ".join(f"{c['memory'] / 1e6:,.1f}" for c in (a, b))
        cells = both("moved", 1e6), both("flop", 1e12, 3), both("seconds", 1e-3, 2), both("exposed", 1e-3, 2), memory
        rows.append([f"{case['size']:,}", f"{case['rows'] * case['size']:,}", *cells, case["auto"]])
    return table(["ranks", "rows", "MB moved", "Tflop", "ms", "of them waiting", "MB held", "auto"], rows)


def memory_table() -> str:
    rows = []
    for size, published in PUBLISHED.items():
        for thousand in sorted(published["Inf-CL"]):
            problem = Problem(thousand * 1024 // size, 768, size, False)
            ours = [f"{cost(strategy, problem, DEVICE).memory / 1e9:.2f}" for strategy in STRATEGIES]
            theirs = [f"{gb[thousand]:.2f}" if thousand in gb else "" for gb in published.values()]
            rows.append([str(size), f"{thousand}k", *theirs, *ours])
    return table(["GPUs", "batch", *PUBLISHED[8], "sslkern, all_gather", "sslkern, ring"], rows)


def triangle_table() -> str:
    """NT-Xent by the ring with a backward by a triangle: its time over that with one by owners of rows."""
    rows = []
    for size in (8, 64):
        for n in (1024, 2048, 4096, 8192, 16384, 65536):
            cells = []
            for features in (128, 512, 2048):
                problem = Problem(n, features, size, True)
                owners, once = (cost("ring", problem, DEVICE, triangular).seconds for triangular in (False, True))
                auto = ", auto" if choose(problem, DEVICE) == "ring" and by_triangle(problem, DEVICE) else ""
                cells.append(f"{once / owners:.2f}{auto}")
            rows.append([str(size), f"{n:,}", *cells])
    return table(["ranks", "views on each", "128 features", "512", "2,048"], rows)


def plot(path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axes, (size, published) in zip(panels, PUBLISHED.items(), strict=True):
        for name, points in published.items():
            batches = [1024 * thousand for thousand in points]
            axes.plot(batches, points.values(), "o", color=COLORS[name], label=f"{name}, published")
        batches = [2**i for i in range(15, 23)]
        for strategy in STRATEGIES:
            problems = [Problem(batch // size, 768, size, False) for batch in batches]
            gb = [cost(strategy, problem, DEVICE).memory / 1e9 for problem in problems]
            axes.plot(batches, gb, "-", color=COLORS[strategy], label=f"sslkern {strategy}, by the model")
        axes.axhline(80, color="black", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="pairs in the global batch, 768 features", title=f"{size} GPUs")
        axes.set_xticks(batches, [f"{batch // 1024:,}k" for batch in batches], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("memory of the loss on each GPU, GB")
    panels[0].legend(fontsize=8)
    figure.suptitle("CLIP's loss: points were measured by the authors of Inf-CL, lines are predictions")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(cases: list[dict]) -> str:
    assumed = (
        f"products at {DEVICE.flops / 1e12:.0f} Tflop/s, {DEVICE.bandwidth / 1e9:.0f} GB/s to others, which take"
        f" {DEVICE.latency * 1e6:.0f} us to be reached, and {DEVICE.launch * 1e6:.0f} us for a block"
    )
    parts = [
        "# Losses over many ranks, predicted\n",
        'Written by `python benchmarks/scaling.py`. Nothing here was measured: it is the model that `strategy="auto"`'
        f" goes by ([docs](../../../docs/distributed.md#cost)), for a rank of which it is assumed: {assumed}. Features"
        " are bf16. Each cell is all_gather / ring, of a forward and a backward of the rank that has most to do.\n",
    ]
    for name, sizes in CASES.items():
        for rows, *_ in sizes:
            parts += [f"## {name}, {rows:,} rows on each rank\n"]
            parts += [cost_table([c for c in cases if c["problem"] == name and c["rows"] == rows])]
    parts += [
        "## NT-Xent's backward by the ring\n",
        "The time of a forward and a backward that visits each pair of ranks once, over that of one where both of two"
        " ranks compute all of their rows: the ring has the first where this is less than 1 and the memory is there,"
        f' and `"auto"` has it where it says so. Of up to {DEVICE.anew} features kernels compute the scores of a block'
        " for each of its gradients.\n",
        triangle_table(),
        "## Memory beside published figures\n",
        "GB of the loss on each GPU. Those of CLIP, OpenCLIP (its local loss) and Inf-CL are table 1 of"
        " [Inf-CL](https://arxiv.org/abs/2410.17243), measured by its authors on A800 with a ViT-L/14; ours are by the"
        " model.\n",
        memory_table(),
        "![Memory of CLIP's loss against the batch](scaling.png)",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = cases()
    plot(FOLDER / "scaling.png")
    (FOLDER / "scaling.json").write_text(json.dumps({"assumed": DEVICE._asdict(), "cases": found}, indent=1) + "\n")
    (FOLDER / "README.md").write_text(report(found))
    print(f"wrote {FOLDER / 'README.md'}, scaling.json and scaling.png")


if __name__ == "__main__":
    main()
