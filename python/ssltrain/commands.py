"""The commands of `ssltrain`, one a method, and the course of a run: load, train, evaluate, report."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ssltrain import UsageError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Train self-supervised encoders through sslkern, and measure what they learned.",
)


@app.callback()
def _root() -> None:
    """Keeps the method a subcommand while there is only one."""


@app.command()
def simclr(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            help="mnist5k (embedded), digits (scikit-learn), or the path of a folder, zip or tar of images laid out "
            "as train/<class>/* and test/<class>/*. Without a test folder a fifth of every class is held out."
        ),
    ] = "mnist5k",
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images. [default: 40]")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Train by the clock instead; the learning rate follows it.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Images a step. Each image's negatives are the other 2 * (batch size - 1) views.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(help="Divides the similarities. Lower: the hardest negatives count for more.")
    ] = 0.2,
    dim: Annotated[int, typer.Option(help="Width of the projections that the loss compares.")] = 128,
    encoder: Annotated[
        str, typer.Option(help="convnet (0.1 M parameters, made for a CPU) or resnet18 (11 M, made for a GPU).")
    ] = "convnet",
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW; 5 % warm-up, then a cosine to zero.")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW, on matrices and filters only.")] = 1e-4,
    flip: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="Mirror images at random. [default: colour images only]"),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Scale image files to a square of that many pixels. [default: as they are, up to 96 pixels]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Train on a fixed random subset of that many images.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, precision and number of threads: same result.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: all cores]")] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, or auto: time a few steps of both and take the faster one.")
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, with the options it was started with.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over even if --out holds a run.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the checkpoint, result.json and report.png. [default: runs/simclr-<data>]"),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result to this file as well.")] = None,
) -> None:
    """SimCLR: two augmented views of an image attract, views of different images repel (Chen et al. 2020).

    The default trains a small conv net on 4,000 MNIST digits in about a minute on two CPU cores, then compares its
    features with raw pixels and with the untrained encoder, by linear probe and nearest neighbours.
    """
    from ssltrain import augment, encoders, loop
    from ssltrain.methods.simclr import SimCLR

    given = {f.name: context.params[f.name] for f in dataclasses.fields(loop.Config) if f.name in context.params}
    explicit = {name for name in given if context.get_parameter_source(name).name == "COMMANDLINE"}

    def build(config: loop.Config, images) -> SimCLR:
        return SimCLR(
            encoders.build(config.encoder, images.train),
            augment.build(images.channels, images.size, config.flip),
            config.dim,
            config.temperature,
        )

    out = out or Path("runs") / f"simclr-{Path(data).name.split('.')[0] or 'data'}"
    config, checkpoint = _open(loop.Config("simclr", **given), explicit, out, resume, overwrite)
    _run(config, checkpoint, build, out, json_path)


def _open(config, explicit: set[str], out: Path, resume: bool, overwrite: bool):
    """The configuration to run, and the checkpoint to start from or None. Nothing of an earlier run is lost unasked."""
    from ssltrain import loop

    config = config.check()
    checkpoint = loop.load_checkpoint(out)
    if resume:
        if checkpoint is None:
            raise UsageError(
                f"--resume: {out} holds no run; name its folder by --out, or leave --resume out to start one."
            )
        earlier = loop.Config(**checkpoint["config"]).check()
        for name in sorted(explicit):
            if getattr(config, name) != getattr(earlier, name):
                flag, value = "--" + name.replace("_", "-"), getattr(earlier, name)
                raise UsageError(f"--resume: {flag} was {value} in {out}; leave it out, or choose another --out.")
        return earlier, checkpoint
    if checkpoint is not None and not overwrite:
        if checkpoint["config"] != dataclasses.asdict(config):
            raise UsageError(f"--out {out} holds a run with other options; choose another folder, or pass --overwrite.")
        if not checkpoint["state"]["finished"]:
            raise UsageError(f"--out {out} holds an unfinished run; continue it by --resume, or pass --overwrite.")
        print(f"{out} holds a finished run with the same options; it is replaced.")
    return config, None


def _run(config, checkpoint: dict | None, build: Callable, out: Path, json_path: Path | None) -> None:
    """Load, train, evaluate and report. `build(config, images)` makes the method."""
    import torch

    from ssltrain import data, evaluate, loop, report

    torch.set_num_threads(config.threads)
    images = data.load(config.data, config.image_size, config.limit)
    height, width = images.size
    print(
        f"{images.name}: {len(images.train):,} training and {len(images.test):,} test images of "
        f"{width} x {height} pixels, {'colour' if images.channels == 3 else 'grayscale'}, {len(images.classes)} classes"
    )
    for note in images.notes:
        typer.echo(note, err=note.startswith("warning"))

    _check_folder("--out", out)
    if json_path is not None:
        _check_folder("--json", json_path.parent)
        if json_path.is_dir():
            raise UsageError(f"--json {json_path}: is a folder; name a file.")

    torch.manual_seed(config.seed)
    torch.backends.cudnn.deterministic = True
    method = build(config, images)
    untrained = copy.deepcopy(method.encoder)
    try:
        with report.Progress(config) as progress:
            state = loop.train(method, images.train, config, out, checkpoint, progress.update)
    except loop.Interrupted:
        print(f"Stopped. Continue with: ssltrain {config.method} --resume --out {out}")
        raise typer.Exit(130) from None
    print(
        f"trained {state.images:,} images in {state.seconds:.0f} s ({state.images_per_s:,.0f} images/s, "
        f"{state.precision}, {config.threads} threads, {state.loss_share:.1%} of the time in the loss)"
    )

    start = time.perf_counter()
    device = torch.device(config.device)
    labels = images.train_labels.to(device), images.test_labels.to(device)
    result = {"method": config.method, "data": images.name}
    seen = {}  # what the classifiers are given, by the prefix of its key
    for prefix, encoder in (("", method.encoder), ("raw_", torch.nn.Flatten()), ("untrained_", untrained.to(device))):
        seen[prefix] = [evaluate.features(encoder, part, device) for part in (images.train, images.test)]
        train, test = seen[prefix]
        result[f"{prefix}linear"] = round(evaluate.linear_probe(train, labels[0], test, labels[1]), 4)
        result[f"{prefix}knn"] = round(evaluate.knn(train, labels[0], test, labels[1]), 4)
    result |= {
        "images_per_s": round(state.images_per_s, 1),
        "loss_share": round(state.loss_share, 4),
        "seconds": round(state.seconds, 2),
        "seed": config.seed,
        "evaluation_seconds": round(time.perf_counter() - start, 2),
        "steps": state.step,
        "precision": state.precision,
        "threads": config.threads,
        "device": config.device,
        "loss": state.losses[-1],
    }
    written = [out / "result.json"] + ([json_path] if json_path else [])
    for path in written:
        path.write_text(json.dumps(result, indent=2) + "\n")
    views = method.views(images.train[:: max(1, len(images.train) // report.PAIRS)][: report.PAIRS].to(device))
    report.draw(out / "report.png", result, state, seen[""][1], images, views)
    print(report.table(result))
    print(f"report: {out / 'report.png'}  figures: {written[-1]}")


def _check_folder(flag: str, folder: Path) -> None:
    """Find out before the training that nothing could be written after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"{flag}: the folder {folder} cannot be written ({error.strerror}); choose another."
        ) from error
