"""The course of a comparison: choose options, run what is not done, and write the report after every run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import typer

from ssltrain import files
from ssltrain.compare import figures, page, plots, tables, tuning
from ssltrain.compare.jobs import Job, Runner, Stopped
from ssltrain.compare.plan import Entry, Plan, for_disk


class Course:
    """A comparison on its way."""

    def __init__(self, plan: Plan):
        plan.check()
        self.plan = plan
        self.trials = [job for entry in plan.entries if plan.tune for job in tuning.trials(plan, entry)]
        runs = [job for entry in plan.entries for job in self.runs(entry)]  # of which none may have other options
        evaluations = [job for entry in plan.entries for job in self.evaluations(entry)]
        jobs = [*self.trials, *runs, *evaluations]
        kinds = [job.kind for job in jobs if job.found() is None]
        for entry in plan.entries:  # whose runs are known once its options are
            kinds += [entry.name] * (plan.seeds - len(self.runs(entry)))
        self.runner = Runner(kinds, len(kinds) + sum(job.found() is not None for job in jobs))

    def runs(self, entry: Entry) -> list[Job]:
        """The runs of an entry, by seed, once its options are chosen."""
        options = tuning.chosen(self.plan, entry)
        if options is None:
            return []
        return [
            Job.training(
                entry.name,
                f"{entry.name} seed {seed}",
                self.plan.config(entry, seed, **options),
                self.plan.folder(entry, f"seed-{seed}"),
            )
            for seed in range(self.plan.seeds)
        ]

    def evaluations(self, entry: Entry) -> list[Job]:
        """What is measured of the runs of an entry in the end: on other data all, fine-tuned the first one."""
        plan, jobs = self.plan, []
        if plan.transfer:
            name = f"transfer-{for_disk(Path(plan.transfer).name)}.json"
            for seed in range(plan.seeds):
                kind, run = f"{entry.name} transfer", plan.folder(entry, f"seed-{seed}")
                jobs.append(Job.evaluation(kind, f"{kind} seed {seed}", run, name, "--data", plan.transfer))
        if plan.labels:
            kind, run = f"{entry.name} labels", plan.folder(entry, "seed-0")
            jobs.append(Job.evaluation(kind, kind, run, f"labels-{plan.labels}.json", "--labels", plan.labels))
        return jobs

    def show(self) -> None:
        """What would run, as commands."""
        runs = [job for entry in self.plan.entries for job in self.runs(entry)]
        evaluations = [job for entry in self.plan.entries for job in self.evaluations(entry)]
        for job in [*self.trials, *runs, *evaluations]:
            if job.found() is not None:
                continue
            print(f"{shlex.join(['ssltrain', *job.arguments])}{' --resume' if job.begun else ''}")
        later = [entry.name for entry in self.plan.entries if tuning.chosen(self.plan, entry) is None]
        if later:
            print(f"then {self.plan.seeds} runs each of {', '.join(later)}, with the options of their best trials")
        print(f"{self.runner.total} runs in all, {self.runner.number} of them done")

    def go(self) -> None:
        """Exits with 1 if a run has failed, with 130 if the user has stopped it."""
        try:
            with self.runner.alone(self.plan.out):
                self._tune()
                for seed in range(self.plan.seeds):  # all methods once, before the next seed
                    for entry in self.plan.entries:
                        for job in self.runs(entry)[seed : seed + 1]:
                            self._run(job)
                for entry in self.plan.entries:
                    for job in self.evaluations(entry):
                        if (job.folder / "result.json").exists():
                            self._run(job)
                self.write()
        except Stopped:
            print("\nStopped. The same command goes on.")
            raise typer.Exit(130) from None
        print(f"report: {self.plan.out / 'report.md'}")
        if self.runner.failed:
            print(f"{len(self.runner.failed)} runs failed; the same command tries them again:")
            print("\n".join(f"  {title}: {why}" for title, why in self.runner.failed.items()))
            raise typer.Exit(1)

    def _tune(self) -> None:
        for job in self.trials:
            self._run(job, report=False)
        for entry in self.plan.entries:
            if tuning.chosen(self.plan, entry) is None:
                tuning.choose(self.plan, entry)
            if tuning.chosen(self.plan, entry) is None:
                self.runner.failed[entry.name] = "none of its trials succeeded"

    def _run(self, job: Job, report: bool = True) -> None:
        if job.found() is not None:
            return
        self.runner.run(job)
        found = job.found()
        if found is not None:
            accuracies = {"linear probe": found.get("linear"), "20-NN": found.get("knn")}
            self.runner.done(
                job, ", ".join(f"{name} {x:.3f}" for name, x in accuracies.items() if x is not None) or "done"
            )
        if report:
            self.write()

    def write(self) -> None:
        """The report of what is there."""
        plan, failed = self.plan, self.runner.failed
        rows = [figures.Row.of(plan, entry, self.runs(entry), self.evaluations(entry)) for entry in plan.entries]
        (plan.out / "report.json").write_text(json.dumps(figures.as_json(plan, rows, failed), indent=2) + "\n")
        (plan.out / "report.md").write_text(tables.markdown(plan, rows, failed))
        jobs = [*self.trials, *(job for entry in plan.entries for job in (*self.runs(entry), *self.evaluations(entry)))]
        left = [job for job in jobs if job.found() is None]
        pictures = {
            "report.png": lambda path: plots.draw(path, rows, plan.study) if any(row.runs for row in rows) else None,
            "report.html": lambda path: page.write(path, plan, rows, failed, left),
        }
        for name, write in pictures.items():
            try:
                write(plan.out / name)
            except Exception as error:  # nearly anything may be wrong with a picture, and nothing depends on it
                typer.echo(f"warning: {name} could not be written ({files.reason(error)}).", err=True)
