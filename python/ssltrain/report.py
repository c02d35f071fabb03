"""What the reader sees of a run: the progress line, the table of accuracies, and one PNG with everything."""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from ssltrain.data import Images
from ssltrain.loop import Config, State

SHOWN = {"": "trained", "raw_": "raw pixels", "untrained_": "untrained encoder"}  # prefix of the JSON keys: what it is
COLORS = {"linear": "#1f5fa8", "knn": "#8fb8e0"}
POINTS = 1000  # of the embedding
PAIRS, COLUMNS = 15, 3


class Progress:
    """A progress bar on a terminal; elsewhere, as in a log file, a line now and then."""

    LINE_EVERY = 10.0  # seconds

    def __init__(self, config: Config):
        self.title = config.method
        self.console = Console()
        self.last = time.perf_counter()
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
        self.task = self.bar.add_task(self.title, total=1.0, figures="")
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def update(self, state: State, progress: float) -> None:
        """Show where the run stands; `progress` is the part of it that is done."""
        figures = f"{state.images_per_s:,.0f} images/s"
        for name, values in {"loss": state.losses, **state.stats}.items():
            if values:
                recent = values[-10:]
                figures = f"{name} {sum(recent) / len(recent):.3f}  {figures}"
        self.bar.update(self.task, completed=progress, figures=figures)
        now = time.perf_counter()
        if not self.console.is_terminal and now - self.last > self.LINE_EVERY:
            self.last = now
            left = state.seconds * (1 - progress) / progress
            print(f"{self.title} {progress:4.0%}  {figures}  {left:.0f} s left", flush=True)


def table(result: dict) -> str:
    """The accuracies as aligned text, one line each for trained, raw pixels and untrained."""
    lines = [f"{'test accuracy':<20}{'linear probe':>14}{'20-NN':>10}"]
    for prefix, name in SHOWN.items():
        lines.append(f"{name:<20}{result[prefix + 'linear']:>14.3f}{result[prefix + 'knn']:>10.3f}")
    return "\n".join(lines)


def draw(path: Path, result: dict, state: State, features: Tensor, images: Images, views: Tensor) -> None:
    """Write the report to `path`.

    `features` [M, F] are those of the test images, `views` [2 B, C, H, W] the two augmentations of the same B images.
    """
    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1))
    _draw_curve(figure.add_subplot(grid[0, 0]), state)
    _draw_accuracies(figure.add_subplot(grid[0, 1]), result)
    _draw_embedding(figure.add_subplot(grid[1, 0]), features, images)
    _draw_pairs(figure.add_subplot(grid[1, 1]), views)
    figure.suptitle(
        f"{result['method']} on {result['data']}: {state.images:,} images in {state.seconds:.0f} s "
        f"({state.images_per_s:,.0f} images/s, {state.precision}), {state.loss_share:.1%} of the time in the loss, "
        f"seed {result['seed']}",
        fontsize=12,
    )
    figure.savefig(path)


def _draw_curve(axes: Axes, state: State) -> None:
    axes.set_title("Training")
    smooth = max(1, len(state.losses) // 50)
    steps = np.arange(1, len(state.losses) + 1)
    middles = steps[smooth - 1 :] - (smooth - 1) / 2
    axes.plot(steps, state.losses, color=COLORS["knn"], linewidth=0.6)
    axes.plot(middles, _moving_average(state.losses, smooth), color=COLORS["linear"], linewidth=1.8)
    axes.set(xlabel="step", ylabel="loss", xlim=(0, len(steps)))
    axes.yaxis.label.set_color(COLORS["linear"])
    axes.grid(alpha=0.3)
    if "top1" in state.stats:
        right = axes.twinx()
        right.plot(middles, _moving_average(state.stats["top1"], smooth), color="#c7641c", linewidth=1.4)
        right.set(ylim=(0, 1))
        right.set_ylabel("share of views that find their partner first", color="#c7641c")


def _moving_average(values: list[float], width: int) -> np.ndarray:
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def _draw_accuracies(axes: Axes, result: dict) -> None:
    axes.set_title("Test accuracy of frozen features")
    for shift, kind, label in ((-0.2, "linear", "linear probe"), (0.2, "knn", "cosine 20-NN")):
        heights = [result[prefix + kind] for prefix in SHOWN]
        bars = axes.bar(np.arange(len(SHOWN)) + shift, heights, 0.38, color=COLORS[kind], label=label)
        axes.bar_label(bars, fmt="%.3f", fontsize=9, padding=2)
    axes.set_xticks(range(len(SHOWN)), [result["method"] if not prefix else name for prefix, name in SHOWN.items()])
    axes.set(ylim=(0, 1.12), yticks=np.linspace(0, 1, 6))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", ncols=2, frameon=False)


def _draw_embedding(axes: Axes, features: Tensor, images: Images) -> None:
    from sklearn.manifold import TSNE

    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:POINTS]
    points = torch.nn.functional.normalize(features[chosen.to(features.device)], dim=1).cpu().numpy()
    labels = images.test_labels[chosen].numpy()
    perplexity = min(30.0, max(1.0, (len(points) - 1) / 3))
    flat = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(points) if len(points) > 3 else points
    classes = len(images.classes)
    palette = matplotlib.colormaps["tab10" if classes <= 10 else "tab20"]
    colors = palette(np.arange(classes) % palette.N)  # beyond 20 classes they come round again
    axes.scatter(flat[:, 0], flat[:, 1], s=9, color=colors[labels], linewidths=0)
    for c in range(min(classes, 20)):
        axes.scatter([], [], s=30, color=colors[c], label=images.classes[c])
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, borderpad=0)
    axes.set_title(f"Features of {len(points)} test images (t-SNE), coloured by class")
    axes.set(xticks=[], yticks=[])


def _draw_pairs(axes: Axes, views: Tensor) -> None:
    """PAIRS pairs in COLUMNS columns, white between them."""
    first, second = (half[:PAIRS].cpu().float().clamp(0, 1) for half in views.chunk(2))
    gap = max(1, first.shape[3] // 8)
    pairs = torch.nn.functional.pad(torch.cat([first, second], dim=3), (gap, gap, gap, gap), value=1.0)
    blank = torch.ones_like(pairs[: -len(pairs) % COLUMNS])
    lines = torch.cat([pairs, blank]).split(COLUMNS)
    sheet = torch.cat([torch.cat(list(line), dim=2) for line in lines], dim=1).permute(1, 2, 0).numpy()
    axes.imshow(sheet if sheet.shape[2] == 3 else sheet[:, :, 0], cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    axes.set_title("Pairs of views that the loss pulls together")
