"""The stand-ins of sslkern.compat beside the classes whose place they take: time, memory, the largest batch that fits.

    python benchmarks/compat.py                               # table, plots, JSON in benchmarks/results/<cpu>/compat
    python benchmarks/compat.py --quick --out /tmp/compat     # the same at a few small sizes, to see that it runs
    python benchmarks/compat.py --only lightly --sizes 64 1024
    python benchmarks/compat.py --device cuda                 # on a GPU

Forward and backward of the loss by itself, with the gradients of features and scales, in fp32. Each peer has to be
installed, or its checkout on PYTHONPATH; a class whose peer is not there is named as not run. `make bench-setup`
installs some of them.

1. Ours and the peer's are given the same batch of 64, and have to give the same loss and gradients.
2. Memory, in a process for each of both: batches grow until one takes more than --limit, or a call more than --longest
   seconds; the largest that fits is then bisected to 15 %.
3. Time, in this process: both in turn, for about --seconds at each size at which both fit; medians of paired rounds.

A size at which ours is slower is named at the end and on the page. A second run into the same folder replaces the
classes that it measures, and keeps the others.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from harness import CPU, GPU, OURS, Cpu, Step, checked, extra_bytes, medians, run_in_turn, step_of, times_faster
from problems import allow_torchvision_import, learned, places, unit, views
from tables import number, table
from torch import Tensor, nn

SIZES = 8, 32, 128, 512, 2048, 8192
FEW = 8, 64, 512
WITHIN = 1.05, 50e-6  # of the peer's time, or seconds more: what a stand-in may take at most, at any size
TOLERANCE = 1e-4  # of the norm, in fp32, of ours beside theirs

# ---- what is compared ------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A class, under one name in the peer's module and in ours. make: of either module, the loss as a function of the
    inputs; inputs: for n samples of d features."""

    name: str
    peer: str
    ours: str
    d: int
    inputs: Callable[[int, int, str], tuple[Tensor, ...]]
    make: Callable[..., Callable]
    divides: int = 0  # what a batch has to divide

    def loss(self, whose: str) -> Callable:
        package = imported(f"sslkern.compat.{self.ours}" if whose == OURS else self.peer)
        torch.manual_seed(0)  # of memories, which begin with the same rows
        return self.make(package)

    def step(self, whose: str, n: int, device: str) -> Step:
        inputs = self.inputs(n, self.d, device)
        loss = self.loss(whose)
        return step_of(loss.to(device) if isinstance(loss, nn.Module) else loss, inputs)


@functools.cache
def imported(module: str) -> ModuleType:
    with contextlib.suppress(ImportError):  # those that need it will say so
        allow_torchvision_import()
    return importlib.import_module(module)


def two(n: int, d: int, device: str) -> tuple[Tensor, ...]:
    return views(n, d, torch.float32, device)


def less_alike(n: int, d: int, device: str) -> tuple[Tensor, ...]:
    """Whose losses at high scales have digits in fp32, too."""
    return views(n, d, torch.float32, device, 0.2)


def unit_pair(scale: float, *bias: float):
    """Rows of length 1, as the models of open_clip return them, a scale, and a bias."""

    def inputs(n, d, device):
        image, text = (unit(x.detach()).requires_grad_() for x in two(n, d, device))
        return image, text, *(learned(x, device) for x in (scale, *bias))

    return inputs


def both_views(n: int, d: int, device: str) -> tuple[Tensor, ...]:
    """All views in one tensor [2n, d], and the labels of the samples."""
    z = torch.cat([x.detach() for x in two(n, d, device)])
    return z.requires_grad_(), places(z) % n


def classes(count: int):
    """Rows [n, d] and labels of so many classes."""

    def inputs(n, d, device):
        z, _ = two(n, d, device)
        return z, places(z) % count

    return inputs


def stacked(n: int, d: int, device: str) -> tuple[Tensor, ...]:
    z = torch.stack([unit(x.detach()) for x in two(n, d, device)], 1)
    return z.requires_grad_(), places(z) % 100


class Given(nn.Module):
    """In place of a SentenceTransformer: its embeddings are the features."""

    tokenizer, max_seq_length = None, 9

    def __getitem__(self, i: int) -> nn.Module:
        return self

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["embedding"]}


def of_columns(loss: nn.Module) -> Callable:
    return lambda *columns: loss([{"embedding": x} for x in columns], None)


def guided(package) -> Callable:
    class Words(importlib.import_module("transformers").PreTrainedTokenizerBase):
        def __init__(self):
            pass

        def get_vocab(self):
            return {}

    models = Given(), Given()
    for model in models:
        model.tokenizer = Words()
    return of_columns(package.GISTEmbedLoss(*models))


def query_and_key(n: int, d: int, device: str) -> tuple[Tensor, ...]:
    query, key = two(n, d, device)
    return query, key.detach()


class Contrasted(nn.Module):
    """The model of MoCo around encoders that return what they are given: its loss, and how many queries find their key
    among the first five, as main_moco.py prints."""

    def __init__(self, package: ModuleType):
        super().__init__()
        ours = package.__name__.startswith("sslkern")
        self.model = package.MoCo(lambda num_classes: nn.Identity(), dim=128, **({"fused": True} if ours else {}))
        if not ours and not dist.is_initialized():  # which the peer needs, in one process too
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        if query.device.type == "cpu":
            torch.Tensor.cuda = lambda x: x  # by which the peer stays there
        out = self.model(query, key)
        if hasattr(out, "loss"):
            return out.loss
        logits, labels = out
        logits.detach().topk(5, 1)
        return nn.functional.cross_entropy(logits, labels)


LIGHTLY = "lightly.loss", "lightly", 128
OPEN_CLIP = "open_clip.loss", "open_clip", 512
SENTENCES = "sentence_transformers.sentence_transformer.losses", "sentence_transformers", 384
METRIC = "pytorch_metric_learning.losses", "pytorch_metric_learning", 128
CASES = [
    Case("lightly NTXentLoss", *LIGHTLY, two, lambda package: package.NTXentLoss(0.1)),
    Case("lightly NTXentLoss, bank of 65,536", *LIGHTLY, two, lambda package: package.NTXentLoss(0.1, (65536, 128))),
    Case("lightly DCLLoss", *LIGHTLY, two, lambda package: package.DCLLoss()),
    Case("lightly DCLWLoss", *LIGHTLY, two, lambda package: package.DCLWLoss()),
    Case("open_clip ClipLoss", *OPEN_CLIP, unit_pair(14.3), lambda package: package.ClipLoss()),
    Case("open_clip SigLipLoss", *OPEN_CLIP, unit_pair(10.0, -10.0), lambda package: package.SigLipLoss()),
    Case(
        "sentence-transformers MultipleNegativesRankingLoss",
        *SENTENCES,
        less_alike,
        lambda package: of_columns(package.MultipleNegativesRankingLoss(Given())),
    ),
    Case("sentence-transformers GISTEmbedLoss", *SENTENCES, less_alike, guided),
    Case("pytorch-metric-learning NTXentLoss", *METRIC, both_views, lambda package: package.NTXentLoss(0.1)),
    Case("pytorch-metric-learning SupConLoss", *METRIC, classes(100), lambda package: package.SupConLoss()),
    Case(
        "pytorch-metric-learning CrossBatchMemory of 65,536, SupConLoss",
        *METRIC,
        classes(100),
        lambda package: package.CrossBatchMemory(package.SupConLoss(), 128, 65536),
    ),
    Case("info-nce-pytorch InfoNCE", "info_nce", "info_nce", 128, two, lambda package: package.InfoNCE(0.1)),
    Case(
        "GradCache SimpleContrastiveLoss",
        "grad_cache.loss",
        "grad_cache",
        768,
        two,
        lambda package: package.SimpleContrastiveLoss(),
    ),
    Case("SupContrast SupConLoss", "losses", "sup_contrast", 128, stacked, lambda package: package.SupConLoss()),
    Case("moco MoCo of 65,536, fused", "moco.builder", "moco", 128, query_and_key, Contrasted, divides=65536),
]

# ---- memory, in a process of its own ---------------------------------------------------------------------------------


def climb(case: Case, whose: str, sizes: list[int], limit: int, longest: float, device: str) -> Iterator[dict]:
    """The peak of each size, then of larger ones, until a batch takes more than the limit, or too long; then of sizes
    between the last two. Each is {"n", "peak_bytes", "seconds"}, without a peak where memory ran out."""
    fits, too_large = 0, None
    for n in [*sizes, *(sizes[-1] * 2**i for i in range(1, 20))]:
        if case.divides and case.divides % n:
            return
        figures = probe(case, whose, n, device)
        yield figures
        if figures.get("peak_bytes", limit + 1) > limit:
            too_large = n
            break
        fits = n
        if figures["seconds"] > longest:
            return
    while too_large is not None and fits and too_large / fits > 1.15 and not case.divides:
        n = round((too_large * fits) ** 0.5)
        figures = probe(case, whose, n, device)
        yield figures
        if figures.get("peak_bytes", limit + 1) > limit:
            too_large = n
        else:
            fits = n


def probe(case: Case, whose: str, n: int, device: str) -> dict:
    try:
        step = case.step(whose, n, device)
        gc.collect()
        if device == "cuda":
            return {"n": n} | GPU.seconds_and_peak(step)
        peak = [0]
        seconds = CPU.seconds_per_call(lambda: peak.append(extra_bytes(step)))
        return {"n": n, "peak_bytes": peak[-1], "seconds": seconds}
    except MemoryError:
        return {"n": n}
    except RuntimeError as error:
        if "memory" not in str(error).lower():
            raise
        return {"n": n}


def bounded(limit: int, device: str) -> None:
    """What is far beyond the limit fails, and takes no machine along."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, 3 * limit / torch.cuda.mem_get_info()[1]))
        return
    status = Path("/proc/self/status").read_text()
    now = 1024 * int(status.partition("VmData:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (now + max(3 * limit, 2**30), resource.RLIM_INFINITY))


def serve(name: str, whose: str, options: argparse.Namespace) -> None:
    """What the child does: prints a line for each size."""
    torch.set_num_threads(options.threads)
    case = next(case for case in CASES if case.name == name)
    case.step(whose, 64, options.device)()  # thread pools and code pages are no part of the figures
    limit = int(options.limit * 2**30)
    bounded(limit, options.device)
    for figures in climb(case, whose, options.sizes, limit, options.longest, options.device):
        print(json.dumps(figures), flush=True)


def climbed(case: Case, whose: str, options: argparse.Namespace) -> list[dict]:
    """Those lines."""
    given = ["--sizes", *options.sizes, "--limit", options.limit, "--longest", options.longest]
    given += ["--threads", options.threads, "--device", options.device, "--serve", case.name, whose]
    # Without this glibc keeps freed blocks of up to 32 MiB and hides their reuse.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *map(str, given)]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    if child.returncode and not lines:
        raise SystemExit(f"{case.name}, {whose}: the process that measures memory ended with {child.returncode}")
    return sorted(lines, key=lambda figures: figures["n"])


# ---- a case ----------------------------------------------------------------------------------------------------------


def measured(case: Case, options: argparse.Namespace, device: Cpu) -> dict:
    check_alike(case, options.device)
    limit = options.limit * 2**30
    result: dict = {"name": case.name, "d": case.d, "times": {}, "memory": {}, "largest": {}}
    fits: dict[str, set[int]] = {}
    for whose in (OURS, "peer"):
        lines = climbed(case, whose, options)
        inside = [figures["n"] for figures in lines if figures.get("peak_bytes", limit + 1) <= limit]
        fits[whose] = set(inside)
        result["memory"][whose] = {figures["n"]: figures["peak_bytes"] for figures in lines if "peak_bytes" in figures}
        result["largest"][whose] = {"n": max(inside, default=0), "or_more": len(inside) == len(lines)}
    for n in options.sizes:
        steps = {whose: case.step(whose, n, options.device) for whose in (OURS, "peer") if n in fits[whose]}
        if OURS not in steps:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            times = run_in_turn(steps, options.seconds, device)
        device.release()
        result["times"][n] = {"seconds": medians(times), "times_faster": times_faster(times).get("peer")}
    return result


def check_alike(case: Case, device: str, n: int = 64) -> None:
    """
    Raises:
        AssertionError: ours gives another loss or gradient.
    """
    ours, theirs = (case.step(whose, n, device)() for whose in (OURS, "peer"))
    checked(ours, theirs, TOLERANCE, case.name)


def slower(result: dict) -> list[str]:
    """The sizes at which ours takes longer, in words."""
    found = []
    for n, figures in result["times"].items():
        faster = figures["times_faster"]
        if faster is not None and faster < 1:
            more = figures["seconds"][OURS] - figures["seconds"]["peer"]
            beyond = 1 / faster > WITHIN[0] and more > WITHIN[1]
            found.append(f"{int(n):,} ({1 / faster:.2f} times the peer's time{', more than it may' if beyond else ''})")
    return found


# ---- the page --------------------------------------------------------------------------------------------------------


def page(facts: dict, results: list[dict], missing: dict[str, str]) -> str:
    sizes = sorted({int(n) for result in results for n in result["times"]})
    limit = f"{facts['limit_gib']:g} GiB"
    ratios, largest, details = [], [], []
    for result in results:
        of = {int(n): figures for n, figures in result["times"].items()}
        cells = [of[n]["times_faster"] if n in of else None for n in sizes]
        ratios.append([result["name"], *(_ratio(x, n in of) for x, n in zip(cells, sizes, strict=True))])
        largest.append([result["name"], *(_batch(result["largest"][whose]) for whose in ("peer", OURS))])
        memory = {whose: {int(n): peak for n, peak in of.items()} for whose, of in result["memory"].items()}
        for n in sizes:
            row = [result["name"], str(result["d"]), f"{n:,}"]
            for whose in ("peer", OURS):
                row += [number(1e3 * of[n]["seconds"][whose]) if whose in of.get(n, {}).get("seconds", {}) else ""]
            row += [number(memory[whose][n] / 2**20) if n in memory[whose] else "" for whose in ("peer", OURS)]
            details.append(row)
    behind = [f"- {result['name']}: {', '.join(named)}" for result in results if (named := slower(result))]
    parts = [
        "# Drop-in classes beside the peers' own\n",
        "Written by `python benchmarks/compat.py`. Forward and backward of the loss by itself, fp32; medians of rounds"
        " in which both ran in turn in one process; peak memory beyond what was there before, gradients included, from"
        f" a process of its own. {', '.join(f'{key} {value}' for key, value in facts.items())}.\n",
        "## Times faster than the peer, by batch\n",
        "**Bold**: ours is slower. A dash: the peer does not fit, or a smaller batch takes it too long already.\n",
        table(["class", *(f"{n:,}" for n in sizes)], ratios),
        "![time](time.png)\n",
        "## Sizes at which ours is slower\n",
        "\n".join(behind or ["None of those measured."]) + "\n",
        f"## The largest batch that fits in {limit}\n",
        "With a + a larger one was not tried, as a call takes too long.\n",
        table(["class", "peer", OURS], largest),
        "![memory](memory.png)\n",
        "## All figures\n",
        table(["class", "D", "batch", "peer, ms", "ours, ms", "peer, MiB", "ours, MiB"], details),
    ]
    if missing:
        parts += ["## Not run\n", "\n".join(f"- {name}: {reason}" for name, reason in missing.items()) + "\n"]
    return "\n".join(parts)


def _ratio(times_faster: float | None, measured: bool) -> str:
    if times_faster is None:
        return "-" if measured else ""
    return f"**{times_faster:.2f}**" if times_faster < 1 else f"{times_faster:.2f}"


def _batch(largest: dict) -> str:
    return f"{largest['n']:,}{' +' if largest['or_more'] else ''}" if largest["n"] else "none"


def plot(results: list[dict], what: str, path: Path) -> None:
    """Small multiples of time or memory against the batch."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from plots import COLORS

    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False)
    for axes, result in zip(grid.flat, results, strict=False):
        for whose, color in (("peer", "#7f7f7f"), (OURS, COLORS[OURS])):
            if what == "time":
                seconds = {n: figures["seconds"] for n, figures in result["times"].items()}
                points = [(int(n), 1e3 * of[whose]) for n, of in seconds.items() if whose in of]
            else:
                points = [(int(n), max(peak, 2**12) / 2**20) for n, peak in result["memory"][whose].items()]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=whose, markersize=3)
        axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="ms" if what == "time" else "MiB")
        axes.set_title("\n".join(result["name"].split(" ", 1)), fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in list(grid.flat)[len(results) :]:
        axes.remove()
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    packages = "lightly", "open-clip-torch", "sentence-transformers", "pytorch-metric-learning", "info-nce-pytorch"
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"sizes {FEW}, 0.1 GiB, 0.1 s each")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="classes whose name has one of these words")
    parser.add_argument("--sizes", type=int, nargs="+", help=f"samples in a batch, ascending (default: {SIZES})")
    parser.add_argument("--limit", type=float, help="GiB that a batch may take (default: 2)")
    parser.add_argument("--seconds", type=float, help="of timing at each size (default: 0.5)")
    parser.add_argument("--longest", type=float, default=2.0, help="seconds: no larger batch than one that takes these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/<cpu or gpu>/compat)")
    parser.add_argument("--list", action="store_true", help="print the classes, and measure nothing")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    quick = options.quick
    options.sizes = sorted(options.sizes or (FEW if quick else SIZES))
    options.limit = options.limit or (0.1 if quick else 2.0)
    options.seconds = options.seconds or (0.1 if quick else 0.5)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    if options.serve:
        return serve(*options.serve, options)
    cases = [c for c in CASES if not options.only or any(word in c.name for word in options.only)]
    if options.list:
        return print("\n".join(case.name for case in cases))
    torch.set_num_threads(options.threads)
    device = GPU if options.device == "cuda" else CPU
    facts = device.machine() | versions() | {"limit_gib": options.limit}
    folder = options.out or Path(__file__).with_name("results") / _slug(facts.get("gpu") or facts["cpu"]) / "compat"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "compat.json"
    before = {r["name"]: r for r in json.loads(kept.read_text())["results"]} if kept.exists() else {}
    missing = {}
    for case in cases:
        try:
            case.loss("peer")
        except ImportError as error:
            missing[case.name] = f"{error}".splitlines()[0]
            print(f"{case.name}: not run, {missing[case.name]}", flush=True)
            continue
        before[case.name] = result = json.loads(json.dumps(measured(case, options, device)))  # keys as they are kept
        ratios = "  ".join(f"{n}: {_ratio(of['times_faster'], True)}" for n, of in result["times"].items())
        largest = " and ".join(f"{_batch(result['largest'][whose])} ({whose})" for whose in (OURS, "peer"))
        print(f"{case.name}\n  times faster  {ratios}\n  largest batch {largest}", flush=True)
        results = [before[c.name] for c in CASES if c.name in before]
        kept.write_text(json.dumps({"machine": facts, "results": results, "not_run": missing}, indent=1) + "\n")
    results = [before[case.name] for case in CASES if case.name in before]
    if not results:
        raise SystemExit("nothing was measured: no peer is installed")
    for what in ("time", "memory"):
        plot(results, what, folder / f"{what}.png")
    (folder / "README.md").write_text(page(facts, results, missing))
    behind = [f"  {result['name']}: {', '.join(named)}" for result in results if (named := slower(result))]
    print("Ours is slower at\n" + "\n".join(behind) if behind else "Ours is slower at none of these sizes.")
    print(f"wrote {folder / 'README.md'}, compat.json, time.png and memory.png")


if __name__ == "__main__":
    main()
