"""The commands of `ssltrain`: one a method, whose flags are the fields of its configuration, and those for a run that
is done: `evaluate`, `embed`, `export`; and `compare`, which starts many runs."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ssltrain import UsageError, config, methods
from ssltrain.compare.command import compare, help_text

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Train self-supervised encoders through sslkern, and measure what they learned.\n\n"
    "Over several processes, the GPUs of a machine or of many: torchrun --nproc-per-node 8 -m ssltrain moco ...",
)

# What a run has besides its configuration.
RUN = {
    "preset": (
        str | None,
        None,
        ("--preset",),
        "Settings of a paper, by name, see above; a file of --config and flags count before them.",
    ),
    "config_file": (
        Path | None,
        None,
        ("--config",),
        "A YAML file of options, `name: value` a line; flags count before it. The options of a run lie in its folder.",
    ),
    "resume": (
        bool,
        False,
        ("--resume",),
        "Continue the run in --out, with the options it was started with. Of these --data (moved), --device, "
        "--threads, --compile and --save-every may be given anew. Under torchrun a run that was not finished goes on "
        "by itself.",
    ),
    "overwrite": (bool, False, ("--overwrite",), "Start over even if --out holds a run."),
    "out": (
        Path | None,
        None,
        ("--out",),
        "Folder of checkpoint, config.yaml, result.json, report.png, report.html, tensorboard. [default: "
        "runs/<method>-<data>]",
    ),
    "json_path": (Path | None, None, ("--json",), "Write the result to this file as well."),
}


class MethodCommand(TyperCommand):
    """The command of a method, which is imported, and torch with it, once the command is called."""

    name: str

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        return _command_of(self.name).make_context(*args, **kwargs)


for _name in methods.NAMES:
    app.command(_name, cls=MethodCommand, help=methods.summary_of(_name))(lambda: None)


def _command_of(method: str) -> Any:
    kind = methods.config_of(method)

    def command(context: typer.Context, **given: Any) -> None:
        sources = {n: context.get_parameter_source(n) for n in given if n not in RUN}
        flags = {n for n, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
        explicit = config.preset(kind, given["preset"]) if given["preset"] else {}
        explicit |= config.read_yaml(given["config_file"], method) if given["config_file"] else {}
        explicit |= {name: given[name] for name in flags}
        start(kind(**explicit), set(explicit), *(given[name] for name in ("resume", "overwrite", "out", "json_path")))

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    types = config.kinds(kind)
    for name, field in config.fields(kind).items():
        names = [field.metadata["flags"] or config.flag(name)]
        option: Any = Annotated[types[name], typer.Option(*names, help=field.metadata["help"])]
        parameters.append(inspect.Parameter(name, keyword, default=field.default, annotation=option))
    for name, (type_, default, names, help) in RUN.items():
        option = Annotated[type_, typer.Option(*names, help=help)]
        parameters.append(inspect.Parameter(name, keyword, default=default, annotation=option))
    vars(command).update(__signature__=inspect.Signature(parameters))
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(method, help=_help_of(kind))(command)
    return typer.main.get_command(alone)


def _help_of(kind: type[config.Config]) -> str:
    """What a method is, and its presets, a line each."""
    about = inspect.cleandoc(kind.__doc__ or "")
    if not kind.presets:
        return about
    lines = [
        f"{name}: {', '.join(f'{config.flag(option)[2:]} {value}' for option, value in options.items())}"
        for name, options in kind.presets.items()
    ]
    return f"{about}\n\nPresets, as the papers have it (--preset):\n\n\b\n" + "\n".join(lines)


Run = Annotated[Path, typer.Argument(help="The folder of a run, as in --out.", show_default=False)]


@app.command("evaluate")
def evaluate_(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(
            help="Other data than the run's, of the same kind; images are made as large as the run's, and gray or not."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Also fine-tune on these shares of the labels, beside training from scratch with as many trials: "
            "0.01,0.1 is 1 % and 10 %."
        ),
    ] = None,
    draws: Annotated[int, typer.Option(help="How often the labelled images are drawn.")] = 3,
    beside: Annotated[
        Path | None, typer.Option(help="The folder of a run to measure beside it, such as a supervised one.")
    ] = None,
    from_middle: Annotated[
        bool,
        typer.Option(
            "--from-middle",
            help="Fine-tune with the first layer of the head as well, as SimCLR 2 does (simclr --version 2).",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Draws the labelled images.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure the features of a run again, or on other data, or fine-tuned on a few labels."""
    from ssltrain import runs

    shares = [] if labels is None else config.shares(labels)
    if draws < 1:
        raise UsageError(f"--draws {draws}: must be 1 or more.")
    if from_middle and not shares:
        raise UsageError("--from-middle: says where fine-tuning starts; give --labels, too, or leave it out.")
    runs.check_writable("--json", json_path)
    figures = runs.evaluate_run(run, data, shares, draws, seed, beside, from_middle)
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")


@app.command()
def embed(
    run: Run,
    data: Annotated[str, typer.Option(help="Whatever a run of this kind could train on.")],
    out: Annotated[Path, typer.Option(help="A file .npz or .safetensors; it is written whole or not at all.")],
) -> None:
    """Write the features of every file of a data set: arrays `features` float32 [N, F] and `names` [N]."""
    from ssltrain import runs

    if out.suffix not in (".npz", ".safetensors"):
        raise UsageError(f"--out {out}: must end in .npz or .safetensors.")
    runs.check_writable("--out", out)
    runs.embed_run(run, data, out)


@app.command()
def export(
    run: Run, out: Annotated[Path, typer.Option(help="A file .safetensors.")] = Path("encoder.safetensors")
) -> None:
    """Write the weights of the encoder alone, with the names that torchvision and timm use for a ResNet.

    Mean and standard deviation of the input, by channel, are in the file's metadata.
    """
    from ssltrain import runs

    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: must end in .safetensors.")
    runs.check_writable("--out", out)
    runs.export_run(run, out)


app.command("compare", help=help_text())(compare)


DATA = {
    "mnist5k": "4,000 training and 1,000 test images of 28 x 28 pixels, grayscale, 10 digits; embedded.",
    "digits": "1,438 and 359 images of 8 x 8 pixels, grayscale, 10 digits; embedded, of scikit-learn.",
    "cifar-10-python.tar.gz": "CIFAR-10 as published, or its folder: 50,000 and 10,000 of 32 x 32, colour, 10 classes.",
    "<path>": "A folder, zip or tar of images, train/<class>/* and test/<class>/*, or <class>/*, or without classes.",
    "<path> for speech": "A folder, zip or tar of wav files named <word>_<speaker>_<index>.wav.",
}


@app.command("list")
def list_() -> None:
    """Name the methods and the data that there are."""
    about = {name: methods.summary_of(name) for name in methods.NAMES}
    for title, lines in (("Methods, ssltrain <method> --help", about), ("Data, --data", DATA)):
        print(f"{title}:")
        for name, line in lines.items():
            print(f"  {name:<24}{line}")


for _command in app.registered_commands:  # what the list of commands says; typer cuts it where a line ends
    _about = _command.help or inspect.getdoc(_command.callback) or ""
    _command.short_help = " ".join(_about.partition("\n\n")[0].split())


def start(
    wanted: config.Config,
    explicit: set[str],
    resume: bool,
    overwrite: bool,
    out: Path | None,
    json_path: Path | None,
) -> None:
    """Start or continue a run. Nothing of an earlier one is lost unasked."""
    from ssltrain import checkpoints, ranks, runs

    name = Path(wanted.data or "data").name.split(".")[0] or "data"
    out = out or Path("runs") / f"{wanted.method}-{name}"
    with ranks.joined():
        with ranks.one_voice():
            wanted = wanted.check()
            checkpoint = checkpoints.load(out) if ranks.rank() == 0 else None
        checkpoint = ranks.of_first(checkpoint)  # so that the folder need not be everywhere
        with ranks.one_voice():
            if not resume and checkpoint is not None:
                resume = _goes_on(checkpoint, wanted, overwrite, out)
            if resume:
                wanted = _continued(checkpoint, wanted, explicit, out)
        runs.run(wanted, checkpoint if resume else None, out, json_path)


def _goes_on(checkpoint: dict, wanted: config.Config, overwrite: bool, out: Path) -> bool:
    """Whether a run that is there continues unasked, as it does under `torchrun`, which starts anew what has failed."""
    from ssltrain import ranks

    if overwrite and not ranks.restarted():  # else the run that is there is this one
        return False
    earlier = config.from_dict(checkpoint["config"], f"--out {out}")
    place = {name: getattr(earlier, name) for name in config.PLACE - {"data"} if ranks.launched()}
    if earlier != dataclasses.replace(wanted, **place):
        raise UsageError(f"--out {out} holds a run with other options; choose another folder, or pass --overwrite.")
    if ranks.restarted() or (ranks.launched() and not checkpoint["state"]["finished"]):
        print(f"{out} holds this run up to step {checkpoint['state']['step']}; it goes on.")
        return True
    if not checkpoint["state"]["finished"]:
        raise UsageError(f"--out {out} holds an unfinished run; continue it by --resume, or pass --overwrite.")
    print(f"{out} holds a finished run with the same options; it is replaced.")
    return False


def _continued(checkpoint: dict | None, wanted: config.Config, explicit: set[str], out: Path) -> config.Config:
    """The configuration of a run that goes on, with the explicit options of `wanted` that leave its mathematics."""
    if checkpoint is None:
        raise UsageError(f"--resume: {out} holds no run; name its folder by --out, or leave --resume out to start one.")
    earlier = config.from_dict(checkpoint["config"], f"--out {out}")
    if earlier.method != wanted.method:
        raise UsageError(f"--resume: {out} holds a run of {earlier.method}; use that command.")
    anew = {option: getattr(wanted, option) for option in explicit}
    anew = {option: value for option, value in anew.items() if value != getattr(earlier, option)}
    for option in sorted(anew.keys() - config.PLACE):
        raise UsageError(
            f"--resume: {config.flag(option)} was {getattr(earlier, option)} in {out}; leave it out, or choose another "
            "--out."
        )
    changed = dataclasses.replace(earlier, **anew)
    if "device" not in anew and not config.is_usable(earlier.device):
        raise UsageError(
            f"--resume: {out} was trained with --device {earlier.device}, which torch cannot use here; name another, "
            "such as --device cpu."
        )
    rounding = [f"{config.flag(name)} {anew[name]}" for name in ("device", "threads", "compile") if name in anew]
    if rounding:
        typer.echo(
            f"warning: {' and '.join(rounding)} may round otherwise than the run did, so it will not end at the same "
            "bits as without a stop.",
            err=True,
        )
    return changed.check()
