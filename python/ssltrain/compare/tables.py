"""The tables of a comparison, and its report in Markdown."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ssltrain.compare.figures import Row
from ssltrain.compare.plan import Plan

HEAD = (
    "method",
    "linear probe",
    "20-NN",
    "untrained, linear",
    "runs",
    "training",
    "images seen",
    "passes an image",
    "features",
    "parameters",
)


@dataclass(frozen=True)
class Table:
    """Lines of text, of which the first is the head; what is measured begins at column `numbers`."""

    title: str
    about: str
    lines: list[tuple[str, ...]]
    numbers: int = 1


def title(plan: Plan, rows: list[Row]) -> str:
    return f"--study {plan.study}" if plan.study else ", ".join(row.entry.name for row in rows)


def headline(plan: Plan, rows: list[Row]) -> str:
    done = sum(len(row.runs) for row in rows)
    return f"{_data(rows)} {done} of {len(rows) * plan.seeds} runs are done.".strip()


def tables(plan: Plan, rows: list[Row]) -> list[Table]:
    """First that of accuracies; those of what was not asked for are left out."""
    about = (
        "Accuracies on the test set, of a linear probe and of the majority of 20 neighbours on frozen features: the "
        "mean over the seeds ± their standard deviation. A pass is an image going forward through the encoder, or "
        "another one like it, while training."
    )
    found = [Table("Accuracies", about, [HEAD, *map(_line, rows), *_raw(rows)])]
    if any(row.tuned for row in rows):
        found.append(_tuning(plan, rows))
    if any(row.fine_tuning for row in rows):
        found.append(_fine_tuning(rows))
    if any(row.transfer for row in rows):
        found.append(_transfer(plan, rows))
    return found


def markdown(plan: Plan, rows: list[Row], failed: dict[str, str]) -> str:
    """The whole page."""
    first, *others = tables(plan, rows)
    parts = [
        f"# {title(plan, rows)}",
        f"{headline(plan, rows)} {first.about}",
        "![Accuracies](report.png)",
        table(first.lines),
    ]
    for other in others:
        parts += [f"## {other.title}", other.about, table(other.lines)]
    if failed:
        parts += ["## Failed", "\n".join(f"- {title}: {why}" for title, why in failed.items())]
    return "\n\n".join(parts) + "\n"


def table(lines: list[tuple[str, ...]]) -> str:
    """Markdown, the first line its head."""
    rule = ("---",) * len(lines[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def figure(row: Row, key: str, elsewhere: bool = False) -> str:
    """Mean and spread, or a dash."""
    return _with_spread(row.mean(key, elsewhere), row.spread(key, elsewhere))


def _with_spread(mean: float, spread: float | None) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.3f}" + ("" if spread is None or math.isnan(spread) else f" ± {spread:.3f}")


def _data(rows: list[Row]) -> str:
    runs = [run for row in rows for run in row.runs]
    if not runs:
        return ""
    devices = sorted({run.get("device_name") or f"{run['device']} ({run['threads']} threads)" for run in runs})
    return f"Trained on {runs[0]['data']}, by {', '.join(devices)}."


def _line(row: Row) -> tuple[str, ...]:
    if not row.runs:
        return (row.entry.name, *["-"] * (len(HEAD) - 1))
    run = row.runs[0]
    return (
        row.entry.name,
        figure(row, "linear"),
        figure(row, "knn"),
        figure(row, "untrained_linear"),
        str(len(row.runs)),
        f"{row.mean('seconds'):,.0f} s",
        f"{run['samples']:,}",
        "-" if run["encoder_passes"] is None else f"{run['encoder_passes']:.2g}",
        f"{run['features']:,}",
        f"{run['parameters']:,}",
    )


def _raw(rows: list[Row]) -> list[tuple[str, ...]]:
    """Raw pixels, the same in all runs."""
    row = next((row for row in rows if row.runs), None)
    if row is None:
        return []
    accuracies = (f"{x:.3f}" if not math.isnan(x) else "-" for x in (row.mean("raw_linear"), row.mean("raw_knn")))
    return [("raw pixels", *accuracies, *["-"] * (len(HEAD) - 3))]


def _tuning(plan: Plan, rows: list[Row]) -> Table:
    assert plan.tune is not None
    about = (
        f"Each by {plan.tune.trials} trials with the same draws around the defaults, of which the first has these; the "
        f"best by the linear probe on {plan.tune.held_out:,} training images that were held out."
    )
    names = sorted({name for row in rows if row.tuned for name in row.tuned["options"]})
    lines: list[tuple[str, ...]] = [("method", *names, "probe of the best", "of all trials")]
    for row in rows:
        if row.tuned:
            probes = [trial["linear"] for trial in row.tuned["all"] if trial["linear"] is not None]
            options = [f"{row.tuned['options'][name]:g}" if name in row.tuned["options"] else "-" for name in names]
            lines.append((row.entry.name, *options, f"{max(probes):.3f}", f"{min(probes):.3f} to {max(probes):.3f}"))
    return Table("Options that were chosen", about, lines)


def _fine_tuning(rows: list[Row]) -> Table:
    about = (
        "The encoder of the first run and a linear layer, all of it trained on a share of the labels, beside the same "
        "from the untrained encoder with as many trials; mean over the draws of the labels ± standard deviation. The "
        "encoders of supcon and supervised have learned from all labels."
    )
    lines: list[tuple[str, ...]] = [("method", "share", "images", "fine-tuned", "from scratch")]
    for row in rows:
        for found in row.fine_tuning:
            accuracies = (_with_spread(found[name], found[f"{name}_spread"]) for name in ("fine_tuned", "scratch"))
            lines.append((row.entry.name, f"{found['share']:.0%}", f"{found['images']:,}", *accuracies))
    return Table("Fine-tuned on a part of the labels", about, lines)


def _transfer(plan: Plan, rows: list[Row]) -> Table:
    about = "The same features on other data, mean over the seeds ± standard deviation."
    keys = {"linear": "linear probe", "knn": "20-NN", "untrained_linear": "untrained, linear", "raw_linear": "pixels"}
    lines: list[tuple[str, ...]] = [("method", *keys.values())]
    lines += [(row.entry.name, *(figure(row, key, elsewhere=True) for key in keys)) for row in rows if row.transfer]
    return Table(f"On {plan.transfer}", about, lines)
