"""Which runs a comparison has: entries, each a method with options of its own, and of each a run per seed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssltrain import UsageError, config, methods
from ssltrain.config import ImageConfig

SET_ELSEWHERE = {
    "data": "give --data",
    "seed": "give --seeds, how many there are",
    "minutes": "give --epochs or --images: methods are compared at equal images seen",
    "held_out": "options are chosen by --tune, on as many images as --held-out says",
}


@dataclass(frozen=True)
class Entry:
    """A method with the options, as text, in which it differs from others; where a study's figure has it."""

    method: str
    options: dict[str, str] = field(default_factory=dict)
    x: float | str | None = None
    series: str = ""

    @property
    def name(self) -> str:
        """As it is called in tables and on the disk: moco-queue-1024."""
        own = (f"-{option.replace('_', '-')}-{value}" for option, value in self.options.items())
        return for_disk(self.method + "".join(own))

    @property
    def text(self) -> str:
        """As the command line has it."""
        own = ",".join(f"{option}={value}" for option, value in self.options.items())
        return f"{self.method}:{own}" if own else self.method

    @staticmethod
    def of(text: str) -> Entry:
        """From moco, or moco:queue=1024,version=2."""
        method, _, options = text.partition(":")
        if method not in methods.NAMES:
            raise UsageError(f"{method}: is no method; choose of {', '.join(methods.NAMES)}.")
        own = [_setting(part, text) for part in re.split(r",(?=[\w-]+=)", options) if part]
        return Entry(method, dict(own))


@dataclass(frozen=True)
class Tuning:
    """How options are chosen: so many trials of each entry, on training images without so many that are held out."""

    trials: int
    held_out: int
    epochs: int | None = None  # of a trial; None: those of a run


@dataclass(frozen=True)
class Plan:
    """A comparison as it was asked for."""

    entries: Sequence[Entry]
    out: Path
    seeds: int
    common: dict[str, str]  # options of all
    of_method: dict[str, dict[str, str]]  # options of all entries of a method
    tune: Tuning | None = None
    labels: str | None = None  # shares of the labels to fine-tune on, with commas between
    transfer: str | None = None  # other data to measure the features on
    study: str | None = None

    def config(self, entry: Entry, seed: int, **more: Any) -> ImageConfig:
        """The configuration of a run, checked."""
        kind = kind_of(entry.method)
        options = self.common | self.of_method.get(entry.method, {}) | entry.options
        values = config.parsed(kind, options, entry.name) | {"seed": seed} | more
        return kind(**values).check()

    def folder(self, entry: Entry, part: str) -> Path:
        return self.out / entry.name / part

    def command(self) -> list[str]:
        """That makes this comparison, or goes on with it."""
        names = [entry.method if self.study else entry.text for entry in self.entries]
        words = ["ssltrain", "compare", *dict.fromkeys(names)]
        given = {"study": self.study, "data": self.common["data"], "epochs": self.common["epochs"]}
        given |= {"seeds": str(self.seeds), "labels": self.labels, "transfer": self.transfer}
        if self.tune:
            epochs = str(self.tune.epochs) if self.tune.epochs else None
            given |= {"tune": str(self.tune.trials), "tune-epochs": epochs, "held-out": str(self.tune.held_out)}
        for name, value in (given | {"out": str(self.out)}).items():
            words += [f"--{name}", value] if value is not None else []
        for name, value in self.common.items():
            words += ["--set", f"{name}={value}"] if name not in ("data", "epochs") else []
        for method, options in self.of_method.items():
            words += [word for name, value in options.items() for word in ("--set", f"{method}:{name}={value}")]
        return words

    def check(self) -> None:
        """Raises `UsageError` for what no run of it would take."""
        names = [entry.name for entry in self.entries]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"{name}: is there twice; leave one out.")
        unknown = self.of_method.keys() - {entry.method for entry in self.entries}
        for method in sorted(unknown):
            raise UsageError(f"--set {method}:...: {method} is not compared here; leave it out, or name it as well.")
        for entry in self.entries:
            self.config(entry, 0)


def kind_of(method: str) -> type[ImageConfig]:
    """The configuration of a method on images."""
    kind = methods.config_of(method)
    if not issubclass(kind, ImageConfig):
        raise UsageError(f"{method}: is not for images, which compare is for; leave it out.")
    return kind


def settings(texts: Sequence[str]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Of `name=value` for all and `method:name=value` for one: the options of all, and those by method."""
    common: dict[str, str] = {}
    of_method: dict[str, dict[str, str]] = {}
    for text in texts:
        name, value = _setting(text, f"--set {text}")
        method, colon, own = name.rpartition(":")
        (of_method.setdefault(method, {}) if colon else common)[own] = value
    return common, of_method


def for_disk(text: str) -> str:
    """As part of a name of a file."""
    return re.sub(r"[^\w.,+=-]", "+", text)


def epochs_of(images: int, there: int) -> int:
    """Whole passes over the images that are there in which so many are seen, or some more."""
    return math.ceil(images / there)


def _setting(text: str, whole: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals:
        raise UsageError(f"{whole}: {text!r} is no option with its value; write name=value.")
    if (own := name.rpartition(":")[2]) in SET_ELSEWHERE:
        raise UsageError(f"{whole}: {own} cannot be set for a comparison; {SET_ELSEWHERE[own]}.")
    return name, value.strip()
