"""How the options of an entry are chosen: by trials with a learning rate and a temperature drawn around the defaults.

All entries have the same number of trials, with the same draws. A trial trains without some of the training images, on
which its features are probed: the test set is read by the runs alone that follow, with what was chosen.
"""

from __future__ import annotations

import json
import random
from typing import Any

from ssltrain import UsageError, config, methods
from ssltrain.compare.jobs import Job, read
from ssltrain.compare.plan import Entry, Plan

AROUND = {"lr": 4.0, "temperature": 2.0}  # up to so many times the default, or as often less
CHOSEN = "tuned.json"


def drawn(plan: Plan, entry: Entry, trial: int) -> dict[str, float]:
    """What a trial has in place of the options of the entry; the first one has these themselves."""
    options, draw = plan.config(entry, 0), random.Random(trial)
    exponents = {name: draw.uniform(-1, 1) if trial else 0.0 for name in AROUND}
    there = config.fields(methods.config_of(entry.method)).keys() & AROUND.keys()
    return {name: float(f"{getattr(options, name) * AROUND[name] ** exponents[name]:.3g}") for name in sorted(there)}


def trials(plan: Plan, entry: Entry) -> list[Job]:
    """The trials of an entry."""
    assert plan.tune is not None
    more = {"held_out": plan.tune.held_out} | ({"epochs": plan.tune.epochs} if plan.tune.epochs else {})
    return [
        Job.training(
            f"{entry.name} trial",
            f"{entry.name} trial {trial}",
            plan.config(entry, 0, **more, **drawn(plan, entry, trial)),
            plan.folder(entry, f"trial-{trial}"),
        )
        for trial in range(plan.tune.trials)
    ]


def chosen(plan: Plan, entry: Entry) -> dict[str, Any] | None:
    """The options that were chosen, once they were; they stay so."""
    if plan.tune is None:
        return {}
    found = read(plan.folder(entry, CHOSEN))
    if found is None:
        return None
    if found["trials"] != plan.tune.trials:
        raise UsageError(
            f"--tune {plan.tune.trials}: the options of {entry.name} in {plan.out} were chosen among {found['trials']} "
            "trials; give that number, or choose another --out."
        )
    return found["options"]


def choose(plan: Plan, entry: Entry) -> None:
    """Keep the options of the best trial, by the probe on what was held out; none if all have failed."""
    if plan.tune is None:
        return
    probes = [(job.found() or {}).get("linear") for job in trials(plan, entry)]
    done = [(probe, -trial) for trial, probe in enumerate(probes) if probe is not None]
    if not done:
        return
    best = -max(done)[1]  # the first of equal ones
    all_trials = [drawn(plan, entry, trial) | {"linear": probe} for trial, probe in enumerate(probes)]
    content = {"options": drawn(plan, entry, best), "trials": plan.tune.trials, "all": all_trials}
    plan.folder(entry, CHOSEN).write_text(json.dumps(content, indent=2) + "\n")
