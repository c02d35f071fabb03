"""What a run is: its options, once, for the command line, YAML files, checkpoints and their checks.

Two runs with equal configurations are the same run. What all methods have stands here, and what all on images or on
speech have; each file of `methods` adds the options of its own. Nothing here imports torch before it is needed, which
takes two seconds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ssltrain import UsageError, methods

if typing.TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from ssltrain.encoders import Encoder
    from ssltrain.images import Images
    from ssltrain.methods._method import Method
    from ssltrain.methods.cpc import ContextEncoder
    from ssltrain.speech import Speech

DEFAULT_EPOCHS = 40
PLACE = {"data", "device", "threads", "compile", "save_every"}  # where and how a run is computed, not what


def option(default: Any, help: str, ok: Callable[[Any], bool] | None = None, wrong: str = "", flags: str = "") -> Any:
    """A field with its help; `ok` is asked of every value but None, and `wrong` says what to do if it says no."""
    return field(default=default, metadata={"help": help, "ok": ok, "wrong": wrong, "flags": flags})


def at_least(least: float, what: str = "") -> dict[str, Any]:
    return {"ok": lambda x: least <= x < math.inf, "wrong": f"must be {least} or more{what}"}


def positive(what: str = "") -> dict[str, Any]:
    return {"ok": lambda x: 0 < x < math.inf, "wrong": f"must be more than 0{what}"}


def below_one() -> dict[str, Any]:
    return {"ok": lambda x: 0 <= x < 1, "wrong": "must be from 0 to below 1"}


def divides(temperature: float) -> Any:
    """The option of a temperature, as most methods have it, each with a default of its own."""
    about = "Divides the similarities. Lower: the hardest negatives count for more."
    return option(temperature, about, **positive("; 0.05 to 0.5 is usual"))


def peak(lr: float) -> Any:
    """The option of the learning rate, where a method has a default of its own."""
    usual = "; 0.001 to 0.005 is usual for AdamW, 0.03 to 0.3 for SGD, 1 to 5 for LARS"
    return option(lr, "Peak learning rate; 5 % warm-up, then a cosine to zero.", **positive(usual))


def one_of(*names: object) -> dict[str, Any]:
    return {"ok": lambda x: x in names, "wrong": f"choose one of {', '.join(map(str, names))}"}


@dataclass(frozen=True)
class Config(ABC):
    """What all methods have. The docstring of a method's own configuration is the help of its command."""

    method: ClassVar[str]
    unit: ClassVar[str]  # what a sample is called, in the plural
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # options of the papers, by name

    data: str | None = option("mnist5k", "What to train on.")
    limit: int | None = option(None, "Train on a fixed random subset of that many samples.", **at_least(1))
    epochs: int | None = option(None, f"Passes over the training data. [default: {DEFAULT_EPOCHS}]", **at_least(1))
    minutes: float | None = option(None, "Train by the clock instead; the learning rate follows it.", **positive())
    batch_size: int = option(
        256, "Samples a step, shared among all processes.", **at_least(2, ", for a pair needs others to differ from")
    )
    temperature: float = divides(0.2)
    optimizer: str = option(
        "adamw",
        "adamw, sgd with a momentum of 0.9, or lars, the same with steps that fit to each layer, for large batches.",
        **one_of("adamw", "sgd", "lars"),
    )
    lr: float = peak(2e-3)
    weight_decay: float = option(1e-4, "Weight decay, on matrices and filters only.", **at_least(0))
    seed: int = option(
        0,
        "Same seed, precision and number of threads: same result.",
        lambda x: 0 <= x < 2**63,
        "must be 0 or more",
    )
    threads: int | None = option(None, "CPU threads. [default: all cores]", **at_least(1))
    device: str = option("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    precision: str = option(
        "auto",
        "fp32, bf16, fp64, or auto: time a few steps of the first two and take the faster one.",
        **one_of("auto", "fp32", "bf16", "fp64"),
    )
    compile: bool = option(
        False, "Compile the networks by torch.compile when training starts; the checkpoints are the same."
    )
    save_every: float = option(
        30.0, "Seconds between checkpoints: what a kill may cost, to be done again by --resume.", **at_least(0)
    )

    def check(self) -> Self:
        """The same with what is left open filled in; raises `UsageError` for a value that cannot be."""
        import torch

        for name, kind in kinds(type(self)).items():
            value, meta = getattr(self, name), fields(type(self))[name].metadata
            if not _is_a(value, kind):
                raise UsageError(f"{flag(name)} {value!r}: must be {_in_words(kind)}.")
            if value is not None and meta["ok"] is not None and not meta["ok"](value):
                raise UsageError(f"{flag(name)} {value}: {meta['wrong']}.")
        if self.epochs is not None and self.minutes is not None:
            raise UsageError(f"--epochs {self.epochs}: give --epochs or --minutes, not both.")
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if not is_usable(device):
            raise UsageError(f"--device {device}: torch cannot use it here; try --device cpu.")
        epochs = DEFAULT_EPOCHS if self.epochs is None and self.minutes is None else self.epochs
        threads = self.threads or torch.get_num_threads()
        return dataclasses.replace(self, epochs=epochs, threads=threads, device=device)

    def as_dict(self) -> dict[str, Any]:
        return {"method": self.method, **dataclasses.asdict(self)}

    @abstractmethod
    def load(self, about: dict | None = None) -> Images | Speech:
        """What `data` names. `about` is what a checkpoint says of a run's data."""

    @abstractmethod
    def build(self, data: Any) -> Method:
        """The method, for data that `load` gave."""

    @abstractmethod
    def build_encoder(self, shape: Sequence[int]) -> nn.Module:
        """The encoder of a run for samples of that shape, before its weights are loaded."""

    @abstractmethod
    def embed(
        self, encoder: Any, source: str, shape: Sequence[int], about: dict, device: torch.device
    ) -> tuple[list[str], Tensor, list[str]]:
        """The name and the features of every sample of `source`, and notes."""

    @abstractmethod
    def fine_tune(
        self, data: Any, encoders: dict[str, Any], share: float, draws: int, device: torch.device, seed: int
    ) -> dict[str, Any]:
        """The test accuracy of each encoder after training on a share of the labels; see `ssltrain.finetune`."""

    def up_to_middle(self, encoder: Any, weights: dict[str, Tensor]) -> nn.Module:
        """The encoder of a run and the first layer of its head, by the weights of the method."""
        raise UsageError("--from-middle: is for runs of simclr --version 2, whose head has a middle; leave it out.")

    @abstractmethod
    def exported(self, encoder: Any) -> tuple[nn.Module, dict[str, str], str]:
        """The network whose weights are of use elsewhere, what to write beside them, and how to load them."""


@dataclass(frozen=True)
class ImageConfig(Config):
    """What methods on images have."""

    unit: ClassVar[str] = "images"
    recoloured: ClassVar[bool] = True  # whether the views of colour images are, if --augmentations says nothing

    data: str = option(
        "mnist5k",
        "mnist5k (embedded), digits (scikit-learn), CIFAR-10 as published (cifar-10-python.tar.gz or its folder) or "
        "the path of a folder, zip or tar of images laid out as train/<class>/* and test/<class>/*. Without a test "
        "folder a fifth of every class is held out; without classes all images train, and nothing is probed.",
    )
    encoder: str = option(
        "convnet",
        "convnet (0.1 M parameters, made for a CPU), resnet18 (11 M, made for a GPU), or timm:<name>, any of timm "
        "where that is installed.",
        lambda x: x in ("convnet", "resnet18") or x.startswith("timm:"),
        "choose one of convnet, resnet18, timm:<name>",
    )
    width: int = option(1, "Times as many channels in the encoder: 1, 2 or 4.", **one_of(1, 2, 4))
    dim: int = option(128, "Width of the projections that the loss compares.", **at_least(1))
    flip: bool | None = option(None, "Mirror images at random. [default: colour images only]", flags="--flip/--no-flip")
    augmentations: str | None = option(
        None,
        "What is done to views, with commas between: of crop, jitter, hue, gray, flip for colour images, of affine, "
        "blur, erase, flip for grayscale ones; or none. [default: all, flip as --flip says; of cmc none that "
        "recolours]",
    )
    image_size: int | None = option(
        None,
        "Scale image files to a square of that many pixels. [default: as they are, up to 96 pixels]",
        lambda x: 4 <= x <= 1024,
        "must be from 4 to 1024 pixels",
    )
    held_out: int | None = option(
        None,
        "Hold out so many training images, always the same, as the test set; the real test set is not used. For "
        "choosing options.",
        **at_least(1),
    )
    shuffle_positives: bool = option(
        False, "A control that must learn nothing: pair each image with another one of the batch, drawn anew each step."
    )

    def check(self) -> Self:
        from ssltrain import ranks

        checked = super().check()
        if self.encoder.startswith("timm:") and self.width != 1:
            raise UsageError(
                f"--width {self.width}: is for convnet and resnet18; leave it out, or name a wider model of timm."
            )
        if self.shuffle_positives and ranks.size() > 1:
            raise UsageError(
                f"--shuffle-positives: is a control for one process, and there are {ranks.size()}; leave it out, or "
                "start it without torchrun."
            )
        return checked

    def load(self, about: dict | None = None) -> Images:
        """What `data` names. `about` is what a checkpoint says of a run's data."""
        from ssltrain import data
        from ssltrain.pictures import Levels

        return data.load(self.data, self.image_size, self.limit, Levels.of((about or {}).get("levels")), self.held_out)

    def augment(self, data: Images) -> Callable[[Tensor], Tensor]:
        """What makes a view of an image."""
        from ssltrain import augment

        return augment.build(data.channels, data.size, self.flip, self.augmentations, self.recoloured)

    def build_encoder(self, shape: Sequence[int]) -> Encoder:
        """The encoder of a run for images of that shape, [C, H, W], before its weights are loaded."""
        import torch

        from ssltrain import encoders

        return encoders.build(self.encoder, torch.zeros(1, *shape, dtype=torch.uint8), self.width)

    def embed(
        self, encoder: nn.Module, source: str, shape: Sequence[int], about: dict, device: torch.device
    ) -> tuple[list[str], Tensor, list[str]]:
        """The name and the features of every image of `source`, and notes."""
        from ssltrain import data, images

        names, pixels, notes = data.to_embed(source, shape[1:], about)
        return names, images.features(encoder, images.with_channels(pixels, shape[0]), device), notes

    def fine_tune(
        self, data: Images, encoders: dict[str, Encoder], share: float, draws: int, device: torch.device, seed: int
    ) -> dict[str, Any]:
        """The test accuracy of each encoder after training on a share of the labels; see `ssltrain.finetune`."""
        from ssltrain import augment, finetune

        if not data.classes:
            raise UsageError(f"--labels: {data.name} has no labels to train on; leave it out, or name other --data.")
        views = augment.build(data.channels, data.size, self.flip)
        return finetune.fine_tune(data, encoders, views, share, draws, device, seed)

    def exported(self, encoder: Encoder) -> tuple[nn.Module, dict[str, str], str]:
        """The network whose weights are of use elsewhere, what to write beside them, and how to load them."""
        standardize, network = encoder
        about = {name: json.dumps(getattr(standardize, name).flatten().tolist()) for name in ("mean", "std")}
        how = ""
        if self.encoder == "resnet18":
            how = (
                "To load: model = torchvision.models.resnet18(); model.conv1 = nn.Conv2d(C, 64, 3, 1, 1, bias=False)\n"
                "model.maxpool = model.fc = nn.Identity(); model.load_state_dict(safetensors.torch.load_file(path))"
            )
        return network, {"encoder": self.encoder} | about, how


@dataclass(frozen=True)
class SpeechConfig(Config):
    """What methods on speech have."""

    unit: ClassVar[str] = "clips"

    data: str | None = option(
        None, "A folder, zip or tar of wav files named <word>_<speaker>_<index>.wav; index 0 to 4 is the test set."
    )
    batch_size: int = option(
        64,
        "Windows of sound a step, shared among all processes.",
        **at_least(2, ", for a pair needs others to differ from"),
    )
    window: int = option(2048, "Samples that are cut from a clip; shorter clips are left out.", **at_least(160))
    level: bool = option(
        True,
        "Make all clips equally loud, so that loudness does not tell speakers apart.",
        flags="--level/--no-level",
    )

    def load(self, about: dict | None = None) -> Speech:
        """What `data` names."""
        from ssltrain import speech

        return speech.load(self.data, self.limit, self.window, self.level)

    def embed(
        self, encoder: ContextEncoder, source: str, shape: Sequence[int], about: dict, device: torch.device
    ) -> tuple[list[str], Tensor, list[str]]:
        """The name of every sound of `source` and the mean of its contexts, and notes."""
        from ssltrain import speech

        names, clips, _, notes = speech.read_files(source, self.level)
        return names, speech.features(encoder, clips, device)[0], notes

    def fine_tune(self, *_: Any) -> dict[str, Any]:
        raise UsageError(f"--labels: is for runs on images; leave it out for {self.method}.")

    def exported(self, encoder: nn.Module) -> tuple[nn.Module, dict[str, str], str]:
        """The network whose weights are of use elsewhere, what to write beside them, and how to load them."""
        return encoder, {}, ""


def is_usable(device: str) -> bool:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # of another machine, or no device at all
        return False
    return True


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def fields(config: type[Config]) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(config)}


def kinds(config: type[Config]) -> dict[str, Any]:
    """The type of each field."""
    hints = typing.get_type_hints(config)
    return {name: hints[name] for name in fields(config)}


def _is_a(value: Any, kind: Any) -> bool:
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, bool):
        return bool in choices
    return isinstance(value, choices) or (isinstance(value, int) and float in choices)


def _in_words(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "left out"}
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return " or ".join(words[choice] for choice in choices)


def from_dict(values: dict[str, Any], source: str) -> Config:
    """The configuration that `as_dict` or a YAML file gave; raises `UsageError` where it does not fit."""
    values = dict(values)
    method = values.pop("method", None)
    if method not in methods.NAMES:
        raise UsageError(f"{source}: method is {method!r}; choose one of {', '.join(methods.NAMES)}.")
    config = methods.config_of(method)
    unknown = sorted(map(str, values.keys() - fields(config).keys()))
    if unknown:
        raise UsageError(
            f"{source}: {unknown[0]} is no option of {method}; see ssltrain {method} --help for what there is."
        )
    return config(**values)


def read_yaml(path: Path, method: str) -> dict[str, Any]:
    """Options from a YAML file, `name: value` a line, names as the flags have them, with - or _."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: cannot be read as YAML ({' '.join(str(error).split())}).") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: must hold lines `option: value`.")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    if values.setdefault("method", method) != method:
        raise UsageError(f"--config {path}: is for {values['method']}, not for {method}; use that command.")
    values = _with_floats(methods.config_of(method), values)
    from_dict(values, f"--config {path}")
    del values["method"]
    return values


def shares(labels: str) -> list[float]:
    """Of the labels, as --labels names them."""
    try:
        found = [float(share) for share in labels.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise UsageError(f"--labels {labels}: must be shares, more than 0 and at most 1, with commas between.")
    return found


def preset(config: type[Config], name: str) -> dict[str, Any]:
    """The options that go by that name."""
    if name not in config.presets:
        there = f"choose one of {', '.join(config.presets)}" if config.presets else "there are none; leave it out"
        raise UsageError(f"--preset {name}: is none of {config.method}; {there}.")
    return dict(config.presets[name])


def parsed(config: type[Config], texts: dict[str, str], source: str) -> dict[str, Any]:
    """Options from text, as a YAML file could have it."""
    import yaml

    unknown = sorted(texts.keys() - fields(config).keys())
    if unknown:
        raise UsageError(
            f"{source}: {unknown[0]} is no option of {config.method}; see ssltrain {config.method} --help for what "
            "there is."
        )
    texts_alone = {name for name, kind in kinds(config).items() if str in (typing.get_args(kind) or (kind,))}
    values = {}
    for name, text in texts.items():
        try:
            values[name] = text if name in texts_alone else yaml.safe_load(text)
        except yaml.YAMLError:
            values[name] = text  # the check says what is wrong
    return _with_floats(config, values)


def _with_floats(config: type[Config], values: dict[str, Any]) -> dict[str, Any]:
    """The same with numbers where YAML 1.1 reads text, as of 1e-3."""
    values = dict(values)
    for name, kind in kinds(config).items():
        if float in (typing.get_args(kind) or (kind,)) and isinstance(values.get(name), str):
            try:
                values[name] = float(values[name])
            except ValueError:
                pass  # the check says what is wrong
    return values


def as_flags(config: Config) -> list[str]:
    """The options that are not the default, as the command line has them."""
    flags = []
    for name, field_ in fields(type(config)).items():
        value, names = getattr(config, name), (field_.metadata["flags"] or flag(name)).split("/")
        if value == field_.default or value is None:
            continue
        if isinstance(value, bool):
            flags.append(names[0] if value else names[-1] if len(names) > 1 else "--no-" + names[0][2:])
        else:
            flags += [names[0], str(value)]
    return flags


def write_yaml(path: Path, config: Config) -> None:
    import yaml

    path.write_text(yaml.safe_dump(config.as_dict(), sort_keys=False))
