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
    transfer: list[dict[str, Any]]  # the accuracies of each run on other data
    fine_tuning: list[dict[str, Any]]  # of the first run, by the share of the labels

    @staticmethod
    def of(plan: Plan, entry: Entry, jobs: list[Job], evaluations: list[Job]) -> Row:
        """What is there after these runs and evaluations of them."""
        done = [(job, found) for job in jobs if (found := job.found()) is not None]
        others = [found for job in evaluations if (found := job.found()) is not None]
        return Row(
            entry,
            [found for _, found in done],
            [_curve(job) for job, _ in done],
            read(plan.folder(entry, CHOSEN)),
            [found for found in others if "fine_tuning" not in found],
            next((found["fine_tuning"] for found in others if "fine_tuning" in found), []),
        )

    def values(self, key: str, elsewhere: bool = False) -> list[float]:
        """Of each run; `elsewhere` on the other data."""
        return [run[key] for run in (self.transfer if elsewhere else self.runs) if run.get(key) is not None]

    def mean(self, key: str, elsewhere: bool = False) -> float:
        """NaN where there is none."""
        values = self.values(key, elsewhere)
        return statistics.fmean(values) if values else math.nan

    def spread(self, key: str, elsewhere: bool = False) -> float:
        """The standard deviation over the seeds; NaN of one alone."""
        values = self.values(key, elsewhere)
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def bound(self) -> list[float]:
        """log N - loss of each run, N = x of the entry, at its end."""
        last = [losses[-max(1, round(LAST * len(losses))) :] for _, losses in self.curves]
        return [math.log(float(self.entry.x or 1)) - statistics.fmean(losses) for losses in last]


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
                "fine_tuning": row.fine_tuning,
                "transfer": row.transfer,
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
