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
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import typer
from torch import Tensor, nn

from sslkern.functional import cpc
from ssltrain import UsageError, augment, config, data, encoders, evaluate, files, loop, methods, ranks, report, speech
from ssltrain.methods.cpc import ContextEncoder


def run(options: config.Config, checkpoint: dict | None, out: Path, json_path: Path | None) -> None:
    """Train and evaluate; leaves checkpoint, config.yaml, result.json, report.png and TensorBoard's curves in `out`.

    Of several processes the first one evaluates, while the others are done already.
    """
    torch.set_num_threads(options.threads)
    first = ranks.rank() == 0
    earlier = checkpoint["about"] if checkpoint else {}
    with ranks.one_voice():
        loaded = methods.load_data(options, earlier)
        _describe(loaded)
        about = {"samples": len(loaded.train), "checksum": _checksum(loaded.train)}
        if isinstance(loaded, data.Images):
            about["levels"] = {kind: list(range_) for kind, range_ in loaded.levels.known.items()}
        if checkpoint:
            _check_same_data(loaded, checkpoint["shape"], earlier, about)
        if first:
            check_writable("--out", out / "result.json")
            check_writable("--json", json_path)
        device = ranks.local_device(options.device)
        on_gpu = _prepare(device)
        torch.manual_seed(options.seed)
        method = methods.build(options, loaded)
    ranks.check_same("the training data", about)
    untrained = copy.deepcopy(method.encoder)
    if first:
        config.write_yaml(out / "config.yaml", options)
        _write_left(out / "left_out.txt", loaded.left)
        if checkpoint is None and ranks.launched():  # if that starts this run anew, an earlier one must not go on
            (out / loop.CHECKPOINT).unlink(missing_ok=True)
    try:
        with report.Progress(options, out) if first else nullcontext() as progress:
            show = {"report": progress.update} if first else {}
            state = loop.train(method, loaded.train, options, out, checkpoint, about=about, **show)
    except loop.Interrupted:
        how = "the same command" if ranks.launched() else f"ssltrain {options.method} --resume --out {out}"
        print(f"Stopped. Continue with: {how}")
        raise typer.Exit(130) from None
    processes = ranks.size()
    ranks.leave()
    if not first:
        return
    method.float()
    gpu = {}
    if on_gpu:
        gpu["device_name"] = torch.cuda.get_device_name()
        gpu["peak_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)  # of the training
    print(
        f"trained {state.samples:,} samples in {state.seconds:.0f} s ({state.samples_per_s:,.0f} a second, "
        f"{state.precision}, {f'{processes} processes with ' if processes > 1 else ''}"
        f"{gpu.get('device_name') or f'{options.threads} threads'}, {state.loss_share:.1%} of the time in the loss)"
    )

    start = time.perf_counter()
    device = torch.device(device)
    found = _evaluate(method.encoder, untrained, loaded, device)
    per_s = "clips_per_s" if options.method == "cpc" else "images_per_s"
    result = {"method": options.method, "data": loaded.name}
    result |= _figures(found)
    result |= {
        per_s: round(state.samples_per_s, 1),
        "loss_share": round(state.loss_share, 4),
        "seconds": round(state.seconds, 2),
        "seed": options.seed,
        "evaluation_seconds": round(time.perf_counter() - start, 2),
        "steps": state.step,
        "precision": state.precision,
        "threads": options.threads,
        "device": options.device,
        **({"processes": processes} if processes > 1 else {}),
        **gpu,
        "loss": state.losses[-1],
    }
    print(report.table(found))
    written = [out / "result.json"] + ([json_path] if json_path else [])
    for path in written:
        path.write_text(json.dumps(result, indent=2) + "\n")
    try:
        report.draw(out / "report.png", result, state, found, _last_picture(method, loaded, device))
    except Exception as error:  # nearly anything may be wrong with a picture, and nothing depends on it
        (out / "report.png").unlink(missing_ok=True)  # of an earlier run
        typer.echo(f"warning: report.png could not be drawn ({files.reason(error)}).", err=True)
        print(f"figures: {written[-1]}")
    else:
        print(f"report: {out / 'report.png'}  figures: {written[-1]}")


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


def _checksum(train: Tensor | speech.Clips) -> int:
    check = 0
    for x in [train] if isinstance(train, Tensor) else [train.samples, train.start, train.length]:
        check = zlib.crc32(x.contiguous().numpy(), check)
    return check


def _check_same_data(loaded, shape: list[int], earlier: dict, now: dict) -> None:
    """Raises `UsageError` if a run cannot go on with these, and warns if they are others than those it started with."""
    here = list(loaded.train.shape[1:]) if isinstance(loaded, data.Images) else []
    was = earlier.get("samples", now["samples"])  # earlier versions did not keep it
    if here != list(shape) or now["samples"] != was:
        raise UsageError(
            f"--resume: the training data at --data {loaded.name} are {now['samples']:,} samples{_of(here)}, those of "
            f"the run {was:,}{_of(shape)}; name the same data, or choose another --out."
        )
    if now["checksum"] != earlier.get("checksum", now["checksum"]):
        typer.echo(
            f"warning: the training data at --data {loaded.name} are not to the bit those that the run was started "
            "with, so it will not end at the same bits as without a stop.",
            err=True,
        )


def _of(shape: list[int]) -> str:
    return f" of {tuple(shape)}" if shape else ""


def _prepare(device: str) -> bool:
    """Make `device` the one that all work goes to, with kernels that repeat their bits; true for a GPU by CUDA."""
    if torch.device(device).type != "cuda":
        return False
    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for GRUs
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)
    torch.cuda.reset_peak_memory_stats()
    return True


def _describe(loaded: data.Images | speech.Speech) -> None:
    if isinstance(loaded, speech.Speech):
        minutes = int(loaded.train.length.sum()) / loaded.rate / 60
        print(
            f"{loaded.name}: {len(loaded.train):,} training clips ({minutes:.0f} minutes at {loaded.rate} Hz) and "
            f"{len(loaded.test):,} test clips, {len(loaded.words)} words, {len(loaded.speakers)} speakers"
        )
    else:
        height, width = loaded.size
        test = f" and {len(loaded.test):,} test" if len(loaded.test) else ""
        print(
            f"{loaded.name}: {len(loaded.train):,} training{test} images of {width} x {height} pixels, "
            f"{'colour' if loaded.channels == 3 else 'grayscale'}, "
            + (f"{len(loaded.classes)} classes" if loaded.classes else "no labels")
        )
    for note in loaded.notes:
        typer.echo(note, err=note.startswith("warning"))


def _evaluate(encoder: nn.Module, untrained: nn.Module, loaded, device: torch.device) -> evaluate.Evaluation:
    of = evaluate.of_speech if isinstance(loaded, speech.Speech) else evaluate.of_images
    return of(encoder, untrained, loaded, device)


@torch.no_grad()
def _last_picture(method: nn.Module, loaded, device: torch.device):
    """What the report's last panel shows: accuracy by frames ahead, or pairs of views."""
    if isinstance(loaded, speech.Speech):
        long_enough = loaded.test[loaded.test.length >= method.window]
        if len(long_enough) < 2:
            return lambda axes: axes.set_axis_off()
        method.eval()
        frames, contexts = method.encoder.frames_and_contexts(method.views(long_enough[:256].to(device)))
        loss = method.criterion
        _, by_step = cpc(contexts, frames, loss.predictors, loss.temperature, reduction="none", stats=True)
        return lambda axes: report.draw_steps(axes, by_step)
    chosen = loaded.train[:: max(1, len(loaded.train) // report.PAIRS)][: report.PAIRS]
    views = method.views(chosen.to(device))
    return lambda axes: report.draw_pairs(axes, views)


# ---- A run that is done ----------------------------------------------------------------------------------------------


def _load(folder: Path) -> tuple[config.Config, nn.Module, tuple[int, ...], dict]:
    """The configuration of a run, its encoder, the shape of its samples, (C, H, W) for images, and what it keeps about
    its data."""
    if ranks.launched():
        raise UsageError("this command runs in one process; start it without torchrun.")
    checkpoint = loop.load_checkpoint(folder)
    if checkpoint is None:
        raise UsageError(f"{folder}: holds no run; name the folder that a run has as --out.")
    options = config.from_dict(checkpoint["config"], str(folder))
    if not config.is_usable(options.device):  # trained on another machine
        options = dataclasses.replace(options, device="auto")
    options = options.check()
    torch.set_num_threads(options.threads)
    _prepare(options.device)
    shape = tuple(checkpoint["shape"])
    if options.method == "cpc":
        encoder = ContextEncoder(options.width, options.units)
    else:
        encoder = encoders.build(options.encoder, torch.zeros(1, *shape, dtype=torch.uint8))
    prefix = "encoder."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["method"].items() if k.startswith(prefix)}
    encoder.load_state_dict(weights)
    return options, encoder.to(options.device).eval(), shape, checkpoint["about"]


def evaluate_run(folder: Path, source: str | None, share: float | None, seed: int) -> dict[str, float | str | None]:
    """Print and return the accuracies of a run's encoder, on other data if named."""
    options, encoder, shape, about = _load(folder)
    device = torch.device(options.device)
    if source is not None:
        options = config.from_dict(options.as_dict() | {"data": source}, str(folder))
    loaded = methods.load_data(options, about)
    _describe(loaded)
    if shape and tuple(loaded.train.shape[1:]) != shape:
        raise UsageError(
            f"--data {loaded.name}: its images are {tuple(loaded.train.shape[1:])} (channels, height, width), "
            f"those of the run {shape}; choose images alike."
        )
    torch.manual_seed(options.seed)
    untrained = methods.build(options, loaded).encoder
    found = _evaluate(encoder, untrained, loaded, device)
    print(report.table(found))
    figures = _figures(found)
    if share is not None:
        if options.method == "cpc":
            raise UsageError("--labels: is for runs on images; leave it out for cpc.")
        if not loaded.classes:
            raise UsageError(f"--labels: {loaded.name} has no labels to train on; leave it out, or name other --data.")
        torch.manual_seed(options.seed)
        views = augment.build(loaded.channels, loaded.size, options.flip)
        for name, network in (("fine_tuned", encoder), ("scratch", untrained)):
            figures[name], count = evaluate.fine_tune(network, loaded, share, views, device, seed)
            figures[name] = round(figures[name], 4)
        figures["labels"] = count
        print(
            f"trained on {count} labelled images: {figures['fine_tuned']:.3f} from the run's encoder, "
            f"{figures['scratch']:.3f} from scratch"
        )
    return figures


def embed_run(folder: Path, source: str, out: Path) -> None:
    """Write the features of every file of `source`."""
    options, encoder, shape, about = _load(folder)
    device = torch.device(options.device)
    if options.method == "cpc":
        names, clips, _, notes = speech.read_files(source)
        features = evaluate.contexts(encoder, clips, device)
    else:
        names, pixels, notes = _images_to_embed(source, shape, about)
        features = evaluate.features(encoder, _with_channels(pixels, shape[0]), device)
    for note in notes:
        typer.echo(note, err=note.startswith("warning"))
    features = features.cpu().contiguous()
    with loop.replacing(out) as file:
        if out.suffix == ".npz":
            np.savez(file, features=features.numpy(), names=np.array(names))
        else:
            file.write(safetensors.torch.save({"features": features}, {"names": json.dumps(names)}))
    print(f"{out}: {len(names):,} x {features.shape[1]} features of {source}")


def _images_to_embed(source: str, shape: tuple[int, ...], about: dict) -> tuple[list[str], Tensor, list[str]]:
    """Names, pixels and notes of whatever a run could train on; files are scaled to the size of the run's images."""
    if not data.is_array(source):
        return data.read_files(Path(source), shape[1:], data.Levels.of(about.get("levels")))
    images = data.load(source)
    if images.size != shape[1:]:
        raise UsageError(
            f"--data {source}: its images are of {images.size[1]} x {images.size[0]} pixels, those of the run of "
            f"{shape[2]} x {shape[1]}; choose images alike."
        )
    names = [f"{part}/{i}" for part in ("train", "test") for i in range(len(getattr(images, part)))]
    return names, torch.cat([images.train, images.test]), images.notes


def _with_channels(pixels: Tensor, channels: int) -> Tensor:
    """uint8 [N, C, H, W] with that many channels, as Pillow converts between colour and gray."""
    if pixels.shape[1] == channels:
        return pixels
    if channels == 3:
        return pixels.expand(-1, 3, -1, -1)
    red, green, blue = pixels.float().unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).round().to(torch.uint8).unsqueeze(1)


def export_run(folder: Path, out: Path) -> None:
    """Write the encoder's weights."""
    options, encoder, _, _ = _load(folder)
    about = {"method": options.method}
    network = encoder
    if options.method != "cpc":
        standardize, network = encoder
        about |= {"encoder": options.encoder}
        about |= {name: json.dumps(getattr(standardize, name).flatten().tolist()) for name in ("mean", "std")}
    weights = {name: x.cpu().contiguous() for name, x in network.state_dict().items()}
    with loop.replacing(out) as file:
        file.write(safetensors.torch.save(weights, about))
    print(f"{out}: {sum(x.numel() for x in weights.values()):,} numbers in {len(weights)} tensors")
    if options.method != "cpc" and options.encoder == "resnet18":
        print(
            "To load: model = torchvision.models.resnet18(); model.conv1 = nn.Conv2d(C, 64, 3, 1, 1, bias=False)\n"
            "model.maxpool = model.fc = nn.Identity(); model.load_state_dict(safetensors.torch.load_file(path))"
        )


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
