"""What the reader sees of a run: the progress line, the table of accuracies, and one PNG with everything.

`page.py` makes a page of the same panels.
"""

from __future__ import annotations

import functools
import io
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from ssltrain.checkpoints import replacing
from ssltrain.config import Config
from ssltrain.evaluate import Evaluation
from ssltrain.files import shown
from ssltrain.loop import State
from ssltrain.panels import BLUE

BLUES = (BLUE, "#8fb8e0", "#c9d9ea")
POINTS = 1000  # of the embedding
NO_LABELS = "there are no labels to probe with, which takes two classes or more"


class Progress:
    """A progress bar on a terminal, elsewhere a line now and then; and the curves for TensorBoard."""

    LINE_EVERY, SHOW_EVERY = 10.0, 0.1  # seconds

    def __init__(self, config: Config, out: Path):
        self.config, self.out = config, out
        self.console = Console()
        self.last, self.shown = time.perf_counter(), 0.0
        self.logged: int | None = None  # steps
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Progress:
        self.bar.start()
        self.task = self.bar.add_task(self.config.method, total=1.0, figures="")
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()
        if self.logged is not None:
            self.curves.close()

    def update(self, state: State, progress: float) -> None:
        """Show where the run stands; `progress` is the part of it that is done."""
        self._log(state)
        now = time.perf_counter()
        if now - self.shown < self.SHOW_EVERY and progress < 1:
            return  # a step of a GPU can be shorter than this takes
        self.shown = now
        figures = f"T {self.config.temperature:g}  {state.samples_per_s:,.0f} {self.config.unit}/s"
        for name, values in {"loss": state.losses, **state.stats}.items():
            if values:
                recent = values[-10:]
                figures = f"{name} {sum(recent) / len(recent):.3f}  {figures}"
        self.bar.update(self.task, completed=progress, figures=figures)
        if not self.console.is_terminal and now - self.last > self.LINE_EVERY:
            self.last = now
            left = state.seconds * (1 - progress) / progress
            print(f"{self.config.method} {progress:4.0%}  {figures}  {left:.0f} s left", flush=True)

    def _log(self, state: State) -> None:
        if self.logged is None:
            from torch.utils.tensorboard import SummaryWriter

            self.logged = len(state.losses)
            # what an interrupted run wrote beyond its last checkpoint is hidden
            self.curves = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.logged or None)
        if len(state.losses) == self.logged:
            return
        for name, values in {"loss": state.losses, **state.stats}.items():
            for step in range(self.logged, len(values)):
                self.curves.add_scalar(name, values[step], step)
        self.curves.add_scalar(f"{self.config.unit} per second", state.samples_per_s, state.step)
        self.curves.add_scalar("temperature", self.config.temperature, state.step)
        self.logged = len(state.losses)


def table(evaluation: Evaluation) -> str:
    """The accuracies as aligned text, a dash where there is none, and how many features they are of."""
    names = "".join(f"{name:>20}" for name in evaluation.columns.values())
    lines = [f"{'test accuracy':<20}{'features':>10}{names}"]
    for prefix, name in evaluation.rows.items():
        figures = [evaluation.accuracies[prefix + key] for key in evaluation.columns]
        width = f"{evaluation.widths[prefix]:,}"
        lines.append(f"{name:<20}{width:>10}" + "".join(f"{'-' if math.isnan(x) else f'{x:.3f}':>20}" for x in figures))
    if any(map(math.isnan, evaluation.accuracies.values())):
        lines.append(f"-: {NO_LABELS}")
    return "\n".join(lines)


TUNED = {"fine_tuned": "fine-tuned", "from_middle": "from the middle", "scratch": "from scratch", "beside": "other run"}


def tuned_table(tuned: Sequence[dict[str, Any]]) -> str:
    """What `finetune` found for some shares of the labels, as aligned text."""
    names = [name for name in TUNED if name in tuned[0]]
    lines = [f"{'labels':<20}{'images':>10}" + "".join(f"{TUNED[name]:>20}" for name in names)]
    for of in tuned:
        spreads = {name: of[f"{name}_spread"] for name in names}
        figures = [f"{of[name]:.3f}" + ("" if x is None else f" ± {x:.3f}") for name, x in spreads.items()]
        share = f"{100 * of['share']:g} %"
        lines.append(f"{share:<20}{of['images']:>10,}" + "".join(f"{figure:>20}" for figure in figures))
    draws, trials = tuned[0]["draws"], tuned[0]["trials"]
    lines.append(f"test accuracy, {draws} draws; learning rate and length by {trials} trials each on training images")
    return "\n".join(lines)


Panel = Callable[[Axes], None]  # draws into axes, with a title


def panels(method: str, state: State, evaluation: Evaluation, last: Panel) -> dict[str, Panel]:
    """What reports show, by name: curve, accuracies, an embedding of the test set, and what `last` draws."""
    points = functools.cache(functools.partial(_on_a_plane, evaluation))
    return {
        "curve": lambda axes: _draw_curve(axes, state),
        "accuracies": lambda axes: _draw_accuracies(axes, method, evaluation),
        "embedding": lambda axes: _draw_embedding(axes, evaluation, *points()),
        "views": last,
    }


def title(result: dict) -> str:
    """What was trained on what."""
    return f"{result['method']} on {_short(Path(result['data']).name)}"


def headline(result: dict, state: State) -> str:
    """For how long, and on which machine."""
    return (
        f"{state.samples:,} samples in {state.seconds:.0f} s ({state.samples_per_s:,.0f} a second, {state.precision}), "
        f"{state.loss_share:.1%} of the time in the loss, seed {result['seed']}"
        + (f"\n{result['device_name']}" if "device_name" in result else "")
    )


@contextmanager
def drawing() -> Iterator[None]:
    """Without warnings about letters that the font lacks, which become boxes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@drawing()
def draw(path: Path, result: dict, state: State, panels: dict[str, Panel]) -> None:
    """Write the four panels to `path`, as PNG."""
    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1))
    for place, panel in enumerate(panels.values()):
        panel(figure.add_subplot(grid[place]))
    _write(figure.suptitle("", fontsize=12), f"{title(result)}: {headline(result, state)}")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with replacing(path) as file:
        file.write(picture.getvalue())


def _short(name: str, most: int = 28) -> str:
    """A name from the disk as it can be drawn."""
    name = shown(name)
    return name if len(name) <= most else name[: most - 3] + "..."


def _write(text: Text, content: str) -> None:
    """Dollars are no formulas here."""
    text.set_parse_math(False)
    text.set_text(content)


def _draw_curve(axes: Axes, state: State) -> None:
    axes.set_title("Training loss")
    smooth = max(1, len(state.losses) // 50)
    steps = np.arange(1, len(state.losses) + 1)
    middles = steps[smooth - 1 :] - (smooth - 1) / 2
    axes.plot(steps, state.losses, color=BLUES[1], linewidth=0.6)
    axes.plot(middles, _moving_average(state.losses, smooth), color=BLUES[0], linewidth=1.8)
    axes.set(xlabel="step", ylabel="loss", xlim=(0, len(steps)))
    axes.yaxis.label.set_color(BLUES[0])
    axes.grid(alpha=0.3)
    if "top1" in state.stats:
        right = axes.twinx()
        right.plot(middles, _moving_average(state.stats["top1"], smooth), color="#c7641c", linewidth=1.4)
        right.set(ylim=(0, 1))
        right.set_ylabel("share that finds its partner first", color="#c7641c")


def _moving_average(values: list[float], width: int) -> np.ndarray:
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def _draw_accuracies(axes: Axes, method: str, evaluation: Evaluation) -> None:
    axes.set_title("Test accuracy of frozen features")
    if all(map(math.isnan, evaluation.accuracies.values())):
        axes.set_axis_off()
        axes.text(0.5, 0.5, NO_LABELS.replace(", ", ",\n"), ha="center", va="center", transform=axes.transAxes)
        return
    rows, columns = evaluation.rows, evaluation.columns
    width = 0.8 / len(columns)
    for i, (key, label) in enumerate(columns.items()):
        heights = [evaluation.accuracies[prefix + key] for prefix in rows]
        shift = (i - (len(columns) - 1) / 2) * width
        bars = axes.bar(np.arange(len(rows)) + shift, np.nan_to_num(heights), 0.95 * width, color=BLUES[i], label=label)
        axes.bar_label(bars, ["-" if math.isnan(x) else f"{x:.3f}" for x in heights], fontsize=9, padding=2)
    axes.set_xticks(range(len(rows)), [method if not prefix else name for prefix, name in rows.items()])
    axes.set(ylim=(0, 1.2), yticks=np.linspace(0, 1, 6))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", ncols=len(columns), frameon=False)


def draw_stat(axes: Axes, name: str, values: list[float]) -> None:
    """A figure of the method's own, step by step."""
    axes.set_title(name)
    smooth = max(1, len(values) // 50)
    middles = np.arange(smooth, len(values) + 1) - (smooth - 1) / 2
    axes.plot(middles, _moving_average(values, smooth), color=BLUES[0], linewidth=1.8)
    axes.set(xlabel="step", xlim=(0, len(values)))
    axes.grid(alpha=0.3)


def draw_confusion(axes: Axes, evaluation: Evaluation, predictions: Tensor) -> None:
    """How often each class was taken for which, a class a row, in percent of the row."""
    names, most = evaluation.classes, 20  # classes, beyond which there is no room for numbers
    count = len(names)
    pairs = torch.bincount(evaluation.labels * count + predictions.cpu(), minlength=count**2).view(count, count)
    shares = (100 * pairs / pairs.sum(1, keepdim=True).clamp_min(1)).numpy()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_title("What the linear probe takes for what, %")
    axes.set(xlabel="taken for", ylabel="is", xticks=[], yticks=[])
    if count > most:
        return
    for row, column in np.argwhere(shares >= 0.5):
        share = shares[row, column]
        ink = "white" if share > 50 else "black"
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color=ink)
    labels = [_short(name, 16) for name in names]
    axes.set_xticks(range(count), labels, rotation=90, parse_math=False)
    axes.set_yticks(range(count), labels, parse_math=False)


def _on_a_plane(evaluation: Evaluation) -> tuple[Tensor, np.ndarray]:
    """Which rows of the features are shown, and where, [POINTS, 2]."""
    from sklearn.manifold import TSNE

    features = evaluation.features
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:POINTS]
    points = torch.nn.functional.normalize(features[chosen.to(features.device)], dim=1).cpu().numpy()
    perplexity = min(30.0, max(1.0, (len(points) - 1) / 3))
    if len(points) > 3:
        points = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(points)
    return chosen, points


def _draw_embedding(axes: Axes, evaluation: Evaluation, chosen: Tensor, points: np.ndarray) -> None:
    labels, names = evaluation.labels[chosen].numpy(), evaluation.classes
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    colors = palette(np.arange(max(1, len(names))) % palette.N)  # beyond 20 classes they come round again
    axes.scatter(points[:, 0], points[:, 1], s=9, color=colors[labels], linewidths=0)
    if names:
        dots = [axes.scatter([], [], s=30, color=colors[c]) for c in range(min(len(names), 20))]
        legend = axes.legend(
            dots,
            [" "] * len(dots),
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            frameon=False,
            fontsize=9,
            borderpad=0,
        )
        for text, name in zip(legend.get_texts(), names, strict=False):
            _write(text, _short(name))  # not as a label, of which matplotlib skips those that start with _
    by_class = ", coloured by class" if names else ""
    axes.set_title(f"Features of {len(points)} {evaluation.part} samples (t-SNE){by_class}")
    axes.set(xticks=[], yticks=[])
