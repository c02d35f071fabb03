"""The figure of a comparison: accuracies beside those of raw pixels and untrained encoders, and how it went."""

from __future__ import annotations

import io
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssltrain.checkpoints import replacing
from ssltrain.compare.figures import Row
from ssltrain.compare.studies import STUDIES
from ssltrain.panels import BLUE
from ssltrain.report import Panel

BLUES = (BLUE, "#8fb8e0")
GRAY, ORANGE = "#777777", "#c7641c"
SPREAD: dict[str, Any] = {"capsize": 3, "ecolor": GRAY}  # seen on light and dark


def draw(path: Path, rows: list[Row], study: str | None) -> None:
    """Write it to `path`, of the entries of which something is there."""
    rows = [row for row in rows if row.runs]
    figure = Figure(figsize=(13, 5.5 + 0.1 * len(rows)), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    (draw_study(rows, study) or draw_bars(rows))(left)
    draw_losses(rows)(right)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with replacing(path) as file:
        file.write(picture.getvalue())


def draw_study(rows: list[Row], study: str | None) -> Panel | None:
    """The accuracy, or the bound, against the axis of the study; None where it has none."""
    about = STUDIES[study] if study else None
    if about is None or not about.axis:
        return None
    if all(isinstance(row.entry.x, str) for row in rows):
        return lambda axes: _draw_groups(axes, rows, about.axis)
    return lambda axes: _draw_against(axes, rows, about.axis, about.bound)


def draw_bars(rows: list[Row]) -> Panel:
    return lambda axes: _draw_bars(axes, rows)


def draw_losses(rows: list[Row]) -> Panel:
    return lambda axes: _draw_losses(axes, rows)


def _references(axes: Axes, rows: list[Row], untrained: bool) -> None:
    """Lines of what needs no training; and of labels, if they were compared."""
    lines = {"raw pixels": rows[0].mean("raw_linear")}
    if untrained:
        lines["untrained"] = statistics.fmean(row.mean("untrained_linear") for row in rows)
    for (name, height), style in zip(lines.items(), ("--", ":"), strict=False):
        if not math.isnan(height):
            axes.axhline(height, color=GRAY, linestyle=style, linewidth=1.2, label=f"{name} {height:.3f}")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _spread(row: Row, key: str) -> float:
    spread = row.spread(key)
    return 0.0 if math.isnan(spread) else spread


def _draw_bars(axes: Axes, rows: list[Row]) -> None:
    """A method a row, as their names are long; what its own untrained encoder has is a mark across its bar."""
    places = np.arange(len(rows))[::-1]
    for i, (key, label) in enumerate((("linear", "linear probe"), ("knn", "20-NN"))):
        heights, spreads = [row.mean(key) for row in rows], [_spread(row, key) for row in rows]
        shifted = places + (0.2 if i == 0 else -0.2)
        bars = axes.barh(shifted, np.nan_to_num(heights), 0.38, xerr=spreads, color=BLUES[i], label=label, **SPREAD)
        axes.bar_label(bars, [f"{x:.3f}" for x in heights], fontsize=8, padding=3)
    untrained = [row.mean("untrained_linear") for row in rows]
    axes.scatter(untrained, places + 0.2, marker="|", s=160, color=ORANGE, zorder=3, label="untrained, linear probe")
    for name, key, style in (("linear probe", "raw_linear", "--"), ("20-NN", "raw_knn", ":")):
        axes.axvline(rows[0].mean(key), color=GRAY, linestyle=style, linewidth=1.2, label=f"raw pixels, {name}")
    supervised = [row.mean("linear") for row in rows if row.entry.method == "supervised"]
    if supervised:
        axes.axvline(supervised[0], color=ORANGE, linewidth=1.2, label="supervised, linear probe")
    axes.set_yticks(places, [row.entry.name for row in rows])
    axes.set(title="Accuracies", xlim=(0, 1.1), xlabel="test accuracy of frozen features", ylim=(-0.7, len(rows) - 0.3))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", bbox_to_anchor=(1, -0.1), ncols=2, frameon=False, fontsize=8)


def _draw_groups(axes: Axes, rows: list[Row], axis: str) -> None:
    """Bars by what was done, those of a series of one colour."""
    groups = list(dict.fromkeys(row.entry.x for row in rows))
    series = list(dict.fromkeys((row.entry.method, row.entry.series) for row in rows))
    width = 0.8 / len(series)
    for i, one in enumerate(series):
        mine = [row for row in rows if (row.entry.method, row.entry.series) == one]
        places = [groups.index(row.entry.x) + (i - (len(series) - 1) / 2) * width for row in mine]
        heights, spreads = [row.mean("linear") for row in mine], [_spread(row, "linear") for row in mine]
        label = " ".join(dict.fromkeys(one))
        bars = axes.bar(places, np.nan_to_num(heights), 0.95 * width, yerr=spreads, label=label, **SPREAD)
        axes.bar_label(bars, [f"{x:.3f}" for x in heights], fontsize=8, padding=2)
    _references(axes, rows, untrained=True)
    axes.set_xticks(range(len(groups)), [str(group) for group in groups])
    axes.set(title=f"Accuracy by {axis}", xlabel=axis, ylabel="linear probe, test accuracy")
    axes.legend(frameon=False, fontsize=8)


def _draw_against(axes: Axes, rows: list[Row], axis: str, bound: bool) -> None:
    """A line for each series, by a number."""
    for series in dict.fromkeys(row.entry.series for row in rows):
        mine = sorted((row for row in rows if row.entry.series == series), key=_number)
        values = [row.bound() if bound else row.values("linear") for row in mine]
        means = [statistics.fmean(some) for some in values]
        spreads = [statistics.stdev(some) if len(some) > 1 else 0.0 for some in values]
        axes.errorbar(list(map(_number, mine)), means, yerr=spreads, marker="o", capsize=3, label=series)
    numbers = sorted(set(map(_number, rows)))
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [f"{x:,.0f}" for x in numbers], rotation=45)
    axes.minorticks_off()
    if bound:
        axes.plot(numbers, np.log(numbers), color=GRAY, linestyle="--", label="log N, the most that it can be")
        axes.set_ylabel("log N - loss, nats")
        axes.grid(alpha=0.3)
    else:
        axes.set_ylabel("linear probe, test accuracy")
        _references(axes, rows, untrained=len({row.mean("untrained_linear") for row in rows}) == 1)
    axes.set(title=f"{'Bound' if bound else 'Accuracy'} by {axis}", xlabel=axis)
    axes.legend(frameon=False, fontsize=8)


def _number(row: Row) -> float:
    return float(row.entry.x or 0)


def _draw_losses(axes: Axes, rows: list[Row]) -> None:
    """Of the first run of each, from its lowest to its highest: losses of different methods have no common scale."""
    for row in rows:
        samples, losses = row.curves[0]
        low, high = min(losses), max(losses)
        scaled = [(loss - low) / max(high - low, 1e-12) for loss in losses]
        axes.plot(samples, scaled, linewidth=1.4, label=f"{row.entry.name}: {low:.2f} to {high:.2f}")
    axes.set(title="Training", xlabel="images seen", ylabel="training loss, from its lowest to its highest")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)
