"""What the runs of a comparison found: of each entry the figures of its runs, their mean and how far they spread."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from ssltrain.compare.jobs import CHECKPOINT, Job, read
from ssltrain.compare.plan import Entry, Plan
from ssltrain.compare.tuning import CHOSEN

POINTS = 100  # of a curve
LAST = 0.05  # of the steps of a run, over which its last loss is averaged


@dataclass
class Row:
    """An entry and what is there of it."""

    entry: Entry
    runs: list[dict[str, Any]]  # the result.json of each run that is done
    curves: list[tuple[list[float], list[float]]]  # of each: samples seen, loss
    tuned: dict[str, Any] | None  # the trials by which its options were chosen

    def values(self, key: str) -> list[float]:
        return [run[key] for run in self.runs if run.get(key) is not None]

    def mean(self, key: str) -> float:
        """NaN where there is none."""
        values = self.values(key)
        return statistics.fmean(values) if values else math.nan

    def spread(self, key: str) -> float:
        """The standard deviation over the seeds; NaN of one alone."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def bound(self) -> list[float]:
        """log N - loss of each run, N = x of the entry, at its end."""
        last = [losses[-max(1, round(LAST * len(losses))) :] for _, losses in self.curves]
        return [math.log(float(self.entry.x or 1)) - statistics.fmean(losses) for losses in last]


def collect(plan: Plan, jobs: dict[str, list[Job]]) -> list[Row]:
    """A row for each entry, in their order; `jobs` are its runs, by its name."""
    rows = []
    for entry in plan.entries:
        done = [job for job in jobs.get(entry.name, []) if job.found() is not None]
        runs = [job.found() or {} for job in done]
        rows.append(Row(entry, runs, [_curve(job) for job in done], read(plan.folder(entry, CHOSEN))))
    return rows


def _curve(job: Job) -> tuple[list[float], list[float]]:
    """Samples seen and loss, in so many points: each the mean of those since the one before."""
    state = torch.load(job.folder / CHECKPOINT, map_location="cpu", weights_only=True, mmap=True)["state"]
    losses, samples = state["losses"], state["samples"]
    width = math.ceil(len(losses) / POINTS)
    middles = [min(first + width, len(losses)) for first in range(0, len(losses), width)]
    means = [statistics.fmean(losses[first : first + width]) for first in range(0, len(losses), width)]
    return [samples * end / len(losses) for end in middles], means


def as_json(plan: Plan, rows: list[Row], failed: dict[str, str]) -> dict[str, Any]:
    """All of it for other programs; what JSON has no number for is null."""
    return {
        "study": plan.study,
        "seeds": plan.seeds,
        "failed": failed,
        "entries": [
            {
                "name": row.entry.name,
                "method": row.entry.method,
                "options": row.entry.options,
                "x": row.entry.x,
                "series": row.entry.series,
                "tuned": row.tuned,
                **{key: {"mean": _or_none(row.mean(key)), "spread": _or_none(row.spread(key))} for key in MEASURED},
                "log_n_minus_loss": row.bound() if isinstance(row.entry.x, int) else None,
                "runs": row.runs,
            }
            for row in rows
        ],
    }


MEASURED = ("linear", "knn", "raw_linear", "raw_knn", "untrained_linear", "untrained_knn", "seconds")


def _or_none(x: float) -> float | None:
    return None if math.isnan(x) else round(x, 5)
