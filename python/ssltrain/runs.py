"""The course of a run: load, train, evaluate, report; and what can be done with its folder afterwards."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import typer
from torch import Tensor, nn

from ssltrain import UsageError, checkpoints, config, evaluate, files, loop, page, ranks, report
from ssltrain.images import Images
from ssltrain.methods._method import Method
from ssltrain.speech import Speech

Data = Images | Speech


def run(options: config.Config, checkpoint: dict | None, out: Path, json_path: Path | None) -> None:
    """Train and evaluate; leaves checkpoint, config.yaml, result.json, report.png, report.html and TensorBoard's
    curves in `out`.

    Of several processes the first one evaluates, while the others are done already.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    earlier = checkpoint["about"] if checkpoint else {}
    with ranks.one_voice():
        loaded = options.load(earlier)
        _describe(loaded)
        about = {"samples": len(loaded.train), "checksum": _checksum(loaded.tensors)} | loaded.about
        if checkpoint:
            _check_same_data(loaded, checkpoint["shape"], earlier, about)
        if ranks.rank() == 0:
            check_writable("--out", out / "result.json")
            check_writable("--json", json_path)
        device = ranks.local_device(options.device)
        _prepare(device)
        torch.manual_seed(options.seed)
        method = options.build(loaded)
    ranks.check_same("the training data", about)
    untrained = copy.deepcopy(method.encoder)
    state = _train(method, loaded, options, out, checkpoint, about)
    processes = ranks.size()
    first = ranks.rank() == 0
    ranks.leave()
    if not first:
        return
    machine = _machine(options, device, processes)
    print(
        f"trained {state.samples:,} samples in {state.seconds:.0f} s ({state.samples_per_s:,.0f} a second, "
        f"{state.precision}, {f'{processes} processes with ' if processes > 1 else ''}"
        f"{machine.get('device_name') or f'{options.threads} threads'}, {state.loss_share:.1%} of the time in the loss)"
    )
    method.float()
    start = time.perf_counter()
    found = loaded.evaluate(method.encoder, untrained, torch.device(device))
    result = {
        "method": options.method,
        "data": loaded.name,
        **_figures(found),
        f"{options.unit}_per_s": round(state.samples_per_s, 1),
        "loss_share": round(state.loss_share, 4),
        "seconds": round(state.seconds, 2),
        "seed": options.seed,
        "evaluation_seconds": round(time.perf_counter() - start, 2),
        "steps": state.step,
        "samples": state.samples,
        "encoder_passes": state.encoder_passes and round(state.encoder_passes, 3),
        "features": found.features.shape[1],
        "parameters": sum(p.numel() for p in method.encoder.parameters()),
        "precision": state.precision,
        **machine,
        "loss": state.losses[-1],
    }
    print(report.table(found))
    written = [out / "result.json"] + ([json_path] if json_path else [])
    for path in written:
        path.write_text(json.dumps(result, indent=2) + "\n")
    panels = report.panels(options.method, state, found, partial(loaded.draw, method, torch.device(device)))
    drawn = _draw(
        out,
        {
            "report.png": lambda path: report.draw(path, result, state, panels),
            "report.html": lambda path: page.write(path, options, result, state, loaded, found, panels),
        },
    )
    print((f"report: {', '.join(map(str, drawn))}  " if drawn else "") + f"figures: {written[-1]}")


def _train(
    method: Method, loaded: Data, options: config.Config, out: Path, checkpoint: dict | None, about: dict
) -> loop.State:
    """The training, which the first rank shows."""
    first = ranks.rank() == 0
    if first:
        config.write_yaml(out / "config.yaml", options)
        _write_left(out / "left_out.txt", loaded.left)
        if checkpoint is None and ranks.launched():  # if that starts this run anew, an earlier one must not go on
            (out / checkpoints.CHECKPOINT).unlink(missing_ok=True)
    try:
        with report.Progress(options, out) if first else nullcontext() as progress:
            show = {"report": progress.update} if progress else {}
            return loop.train(method, loaded.train, options, out, checkpoint, about=about, **show)
    except loop.Interrupted:
        how = "the same command" if ranks.launched() else f"ssltrain {options.method} --resume --out {out}"
        print(f"Stopped. Continue with: {how}")
        raise typer.Exit(130) from None


def _draw(out: Path, reports: dict[str, Callable[[Path], None]]) -> list[Path]:
    """Write each of the files, and return those that could be: nearly anything may be wrong with a picture, and nothing
    depends on it."""
    drawn = []
    for name, write in reports.items():
        try:
            write(out / name)
            drawn.append(out / name)
        except Exception as error:
            (out / name).unlink(missing_ok=True)  # of an earlier run
            typer.echo(f"warning: {name} could not be drawn ({files.reason(error)}).", err=True)
    return drawn


def _machine(options: config.Config, device: str, processes: int) -> dict[str, str | int | float | None]:
    """What the run was computed with."""
    machine: dict[str, str | int | float | None] = {"threads": options.threads, "device": options.device}
    if processes > 1:
        machine["processes"] = processes
    if torch.device(device).type == "cuda":
        machine["device_name"] = torch.cuda.get_device_name()
        machine["peak_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)  # of the training
    return machine


def _write_left(path: Path, left: list[str]) -> None:
    """Every file that the data set has and the run has not."""
    if left:
        path.write_text("".join(f"{line}\n" for line in left), encoding="utf-8")
        print(f"all {len(left)} files that are left out: {path}")
    else:
        path.unlink(missing_ok=True)  # of an earlier run


def _figures(found: evaluate.Evaluation) -> dict[str, float | str | None]:
    """The accuracies for JSON, which knows no NaN, and why some are missing."""
    figures = {key: None if math.isnan(figure) else round(figure, 4) for key, figure in found.accuracies.items()}
    return figures | ({"note": report.NO_LABELS} if None in figures.values() else {})


def _checksum(tensors: Iterable[Tensor]) -> int:
    check = 0
    for x in tensors:
        check = zlib.crc32(x.contiguous().numpy().data, check)
    return check


def _check_same_data(loaded: Data, shape: list[int], earlier: dict, now: dict) -> None:
    """Raises `UsageError` if a run cannot go on with these, and warns if they are others than those it started with."""
    was = earlier.get("samples", now["samples"])  # earlier versions did not keep it
    if loaded.shape != list(shape) or now["samples"] != was:
        raise UsageError(
            f"--resume: the training data at --data {loaded.name} are {now['samples']:,} samples{_of(loaded.shape)}, "
            f"those of the run {was:,}{_of(shape)}; name the same data, or choose another --out."
        )
    if now["checksum"] != earlier.get("checksum", now["checksum"]):
        typer.echo(
            f"warning: the training data at --data {loaded.name} are not to the bit those that the run was started "
            "with, so it will not end at the same bits as without a stop.",
            err=True,
        )


def _of(shape: Sequence[int]) -> str:
    return f" of {tuple(shape)}" if shape else ""


def _prepare(device: str) -> None:
    """Make `device` the one that all work goes to, with kernels that repeat their bits."""
    if torch.device(device).type != "cuda":
        return
    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for GRUs
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)
    torch.cuda.reset_peak_memory_stats()


def _describe(loaded: Data) -> None:
    print(loaded.describe())
    _tell(loaded.notes)


def _tell(notes: list[str]) -> None:
    for note in notes:
        typer.echo(note, err=note.startswith("warning"))


# ---- A run that is done ----------------------------------------------------------------------------------------------


def _load(folder: Path) -> tuple[config.Config, nn.Module, tuple[int, ...], dict]:
    """The configuration of a run, its encoder, the shape of its samples, (C, H, W) for images, and what it keeps about
    its data."""
    if ranks.launched():
        raise UsageError("this command runs in one process; start it without torchrun.")
    checkpoint = checkpoints.load(folder)
    if checkpoint is None:
        raise UsageError(f"{folder}: holds no run; name the folder that a run has as --out.")
    options = config.from_dict(checkpoint["config"], str(folder))
    if not config.is_usable(options.device):  # trained on another machine
        options = dataclasses.replace(options, device="auto")
    options = options.check()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    _prepare(options.device)
    shape = tuple(checkpoint["shape"])
    encoder = options.build_encoder(shape)
    prefix = "encoder."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["method"].items() if k.startswith(prefix)}
    encoder.load_state_dict(weights)
    return options, encoder.to(options.device).eval(), shape, checkpoint["about"]


def evaluate_run(
    folder: Path,
    source: str | None,
    shares: Sequence[float],
    draws: int,
    seed: int,
    beside: Path | None,
    from_middle: bool,
) -> dict[str, Any]:
    """Print and return the accuracies of a run's encoder, on other data if named, and that of another run beside it."""
    options, encoder, shape, about = _load(folder)
    other = _load_beside(beside, folder, shape) if beside else None
    middle = _up_to_middle(folder, options, encoder) if from_middle else None
    device = torch.device(options.device)
    if source is not None:
        options = config.from_dict(options.as_dict() | {"data": source}, str(folder))
    loaded = options.load(about)
    _describe(loaded := loaded.like(shape))
    torch.manual_seed(options.seed)
    untrained = options.build(loaded).encoder
    found = loaded.evaluate(encoder, untrained, device, other)
    print(report.table(found))
    figures: dict[str, Any] = _figures(found)
    networks = {"fine_tuned": encoder, "scratch": untrained} | ({"beside": other} if beside else {})
    networks |= {"from_middle": middle} if from_middle else {}
    tuned = [options.fine_tune(loaded, networks, share, draws, device, seed) for share in shares]
    if tuned:
        print(report.tuned_table(tuned))
        figures["fine_tuning"] = tuned
    return figures


def _up_to_middle(folder: Path, options: config.Config, encoder: nn.Module) -> nn.Module:
    checkpoint = checkpoints.load(folder)
    assert checkpoint is not None  # as the encoder comes from it
    return options.up_to_middle(encoder, checkpoint["method"])


def _load_beside(beside: Path, folder: Path, shape: tuple[int, ...]) -> nn.Module:
    options, encoder, its_shape, _ = _load(beside)
    if its_shape != shape:
        raise UsageError(
            f"--beside {beside}: its samples, {its_shape}, are not like those of {folder}, {shape}; name a run on "
            "samples alike."
        )
    return encoder


def embed_run(folder: Path, source: str, out: Path) -> None:
    """Write the features of every file of `source`."""
    options, encoder, shape, about = _load(folder)
    names, features, notes = options.embed(encoder, source, shape, about, torch.device(options.device))
    _tell(notes)
    features = features.cpu().contiguous()
    with checkpoints.replacing(out) as file:
        if out.suffix == ".npz":
            np.savez(file, features=features.numpy(), names=np.array(names))
        else:
            file.write(safetensors.torch.save({"features": features}, {"names": json.dumps(names)}))
    print(f"{out}: {len(names):,} x {features.shape[1]} features of {source}")


def export_run(folder: Path, out: Path) -> None:
    """Write the encoder's weights."""
    options, encoder, _, _ = _load(folder)
    network, about, how = options.exported(encoder)
    weights = {name: x.cpu().contiguous() for name, x in network.state_dict().items()}
    with checkpoints.replacing(out) as file:
        file.write(safetensors.torch.save(weights, {"method": options.method} | about))
    print(f"{out}: {sum(x.numel() for x in weights.values()):,} numbers in {len(weights)} tensors")
    if how:
        print(how)


def check_writable(flag: str, path: Path | None) -> None:
    """Find out before the work that nothing could be written after it."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{flag} {path}: is a folder; name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UsageError(
            f"{flag}: the folder {path.parent} cannot be written ({error.strerror}); choose another."
        ) from error
