"""The command `ssltrain compare`: what it is told becomes a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssltrain import UsageError, config
from ssltrain.compare import studies
from ssltrain.compare.plan import Entry, Plan, Tuning, epochs_of, kind_of, settings

HELP = """Train several methods at an equal number of images seen, over several seeds, and report them side by side.

Each METHOD is a name, or one with options of its own: moco moco:queue=1024 moco:queue=65536,momentum=0.999. Each run is
an ordinary run folder, <out>/<method>-<options>/seed-<seed>. They run one after another; after each the report
(report.html, report.md, report.json, report.png) says what is known so far. The same command again goes on where it
was stopped.

Studies (--study) are ready-made comparisons; METHODs named with one are those of it to take:

"""


def help_text() -> str:
    """With a line for each study; \b keeps them lines."""
    width = max(map(len, studies.STUDIES))
    lines = [f"{name:<{width}}  {study.about}" for name, study in studies.STUDIES.items()]
    return HELP + "\b\n" + "\n".join(lines)


def compare(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[METHOD]...", help="As above.", show_default=False)
    ] = None,
    data: Annotated[str, typer.Option(help="What to train on, as a method takes it.")] = "mnist5k",
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data. [default: 40]", min=1)] = None,
    images: Annotated[
        int | None,
        typer.Option(help="Images seen instead, rounded up to whole passes: 900000 are 18 of CIFAR-10.", min=1),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each, with seeds from 0 on.", min=1)] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs and the report. [default: runs/compare-<study>-<data>]")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="[METHOD:]NAME=VALUE", help="An option for all, or for all of a method; again for others."
        ),
    ] = None,
    study: Annotated[str | None, typer.Option(help="A ready-made comparison, see above.")] = None,
    tune: Annotated[
        int | None,
        typer.Option(
            help="First choose learning rate and temperature of each by so many trials, the same draws around the "
            "defaults for all, on training images that are held out.",
            min=1,
        ),
    ] = None,
    tune_epochs: Annotated[int | None, typer.Option(help="Passes of a trial. [default: those of a run]", min=1)] = None,
    held_out: Annotated[int, typer.Option(help="How many training images trials leave out.", min=1)] = 5000,
    labels: Annotated[
        str | None,
        typer.Option(
            help="In the end fine-tune the first run of each on these shares of the labels, by three draws: 0.01,0.1."
        ),
    ] = None,
    transfer: Annotated[str | None, typer.Option(help="In the end measure the features on other data, too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the commands that would run, and run none.")] = False,
) -> None:
    if epochs is not None and images is not None:
        raise UsageError(f"--epochs {epochs}: give --epochs or --images, not both.")
    if not names and study is None:
        raise UsageError("compare: name methods, such as simclr moco, or a --study; see ssltrain compare --help.")
    if labels is not None:
        config.shares(labels)
    common, of_method = settings(set_ or [])
    entries = [] if study else [Entry.of(name) for name in names or []]
    first = entries[0].method if entries else "simclr"
    there, shape = _measure(first, common | {"data": data}, held_out if tune else 0)
    if images is not None:
        epochs = epochs_of(images, there)
    epochs = epochs or config.DEFAULT_EPOCHS
    if study:
        entries = studies.of(study, names or [], epochs, shape, common | of_method.get("cpc_images", {}))
    name = Path(data).name.split(".")[0] or "data"
    plan = Plan(
        entries,
        out or Path("runs") / "-".join(filter(None, ("compare", study, name))),
        seeds,
        {"data": data, "epochs": str(epochs)} | common,
        of_method,
        Tuning(tune, held_out, tune_epochs) if tune else None,
        labels,
        transfer,
        study,
    )
    from ssltrain.compare.course import Course

    course = Course(plan)
    course.show() if dry_run else course.go()


def _measure(method: str, options: dict[str, str], held_out: int) -> tuple[int, list[int]]:
    """How many training images there are, and their shape."""
    from ssltrain import ranks

    if ranks.launched():
        raise UsageError("compare: runs in one process; start it without torchrun.")
    kind = kind_of(method)
    known = {name: text for name, text in options.items() if name in config.fields(kind)}
    loaded = kind(**config.parsed(kind, known, "--set")).load()
    if not loaded.classes:
        raise UsageError(f"--data {loaded.name}: has no labels to compare by; name other data.")
    if held_out >= len(loaded.train):
        raise UsageError(f"--held-out {held_out}: there are {len(loaded.train)} training images; hold out fewer.")
    return len(loaded.train), loaded.shape
