"""Ready-made comparisons: what the papers studied, each a set of runs and the axis of its figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssltrain import UsageError, config, methods
from ssltrain.compare.plan import Entry, kind_of
from ssltrain.config import ImageConfig

Given = Mapping[str, str]  # options, as text, of cpc_images
COLOUR, GRAY = ("crop", "jitter", "hue", "gray", "flip"), ("affine", "blur", "erase")  # the steps of the views


@dataclass(frozen=True)
class Study:
    """`entries(methods, epochs, shape, given)` are its runs, for images of that shape, [C, H, W], and the options
    `given` of cpc_images; `axis` is what they differ in, "" where that is the method."""

    about: str
    axis: str
    entries: Callable[[Sequence[str], int, Sequence[int], Given], list[Entry]]
    methods: Sequence[str]  # what it is made of, () for all on images; others can be named where `free`
    free: bool = False
    bound: bool = False  # its figure shows log N - loss, N = x, and not the accuracy


def of(name: str, chosen: Sequence[str], epochs: int, shape: Sequence[int], given: Given | None = None) -> list[Entry]:
    """The entries of a study, of the chosen methods alone if there are some; see `Study`."""
    if name not in STUDIES:
        raise UsageError(f"--study {name}: choose one of {', '.join(STUDIES)}.")
    study = STUDIES[name]
    for method in chosen:
        known = methods.NAMES if study.free else study.methods
        if method not in known:
            raise UsageError(f"{method}: is no method of --study {name}; choose of {', '.join(known)}.")
    return study.entries(chosen or study.methods or _on_images(), epochs, shape, given or {})


def _on_images() -> list[str]:
    return [name for name in methods.NAMES if issubclass(methods.config_of(name), ImageConfig)]


def _survey(chosen: Sequence[str], epochs: int, shape: Sequence[int], given: Given) -> list[Entry]:
    variants = {
        "moco": [{}, {"version": "3"}],
        "deep_infomax": [{"estimator": "jsd"}, {"estimator": "infonce"}, {"estimator": "dv"}],
    }
    return [Entry(method, options) for method in chosen for options in variants.get(method, [{}])]


def _width(chosen: Sequence[str], epochs: int, shape: Sequence[int], given: Given) -> list[Entry]:
    return [Entry(method, {"width": str(width)}, width, method) for method in chosen for width in (1, 2, 4)]


def _time(chosen: Sequence[str], epochs: int, shape: Sequence[int], given: Given) -> list[Entry]:
    doubled = [2**i for i in range(epochs.bit_length()) if 2**i < epochs] + [epochs]
    return [Entry(method, {"epochs": str(some)}, some, method) for method in chosen for some in doubled]


def _negatives(chosen: Sequence[str], epochs: int, shape: Sequence[int], given: Given) -> list[Entry]:
    kinds = {
        "simclr": ("batch_size", "the batch (simclr)", lambda size: 2 * size - 2, (32, 64, 128, 256, 512)),
        "instdisc": ("negatives", "a memory bank (instdisc)", lambda size: size, (64, 256, 1024, 4096)),
        "moco": ("queue", "a queue (moco)", lambda size: size, (64, 256, 1024, 4096, 16384)),
    }
    entries = []
    for method in chosen:
        option, series, negatives, sizes = kinds[method]
        entries += [Entry(method, {option: str(size)}, negatives(size), series) for size in sizes]
    return entries


def _augmentations(chosen: Sequence[str], epochs: int, shape: Sequence[int], given: Given) -> list[Entry]:
    steps = COLOUR if shape[0] == 3 else GRAY
    entries = []
    for method in chosen:
        for names, x in ((steps, "all"), ((), "none")):
            entries.append(Entry(method, {"augmentations": ",".join(names) or "none"}, x, "alone"))
        for step in steps:
            others = ",".join(name for name in steps if name != step)
            entries.append(Entry(method, {"augmentations": step}, step, "alone"))
            entries.append(Entry(method, {"augmentations": others}, step, "left out"))
    return entries


def _head(chosen: Sequence[str], epochs: int, shape: Sequence[int], given: Given) -> list[Entry]:
    return [Entry(method, {"head": head}, head, method) for method in chosen for head in ("none", "linear", "mlp")]


def _bound(chosen: Sequence[str], epochs: int, shape: Sequence[int], given: Given) -> list[Entry]:
    """In simclr the candidates of a view are all other ones of the batch, in cpc_images those of a patch the patches of
    that row."""
    entries, columns = [], 1
    if "cpc_images" in chosen:
        kind = kind_of("cpc_images")
        encoder: Any = kind(**config.parsed(kind, dict(given), "--set")).build_encoder(shape)
        columns = encoder[1].grid(shape[1:])[1]
    for size in (16, 32, 64, 128, 256, 512):
        candidates = {"simclr": 2 * size - 1, "cpc_images": size * columns}
        entries += [Entry(name, {"batch_size": str(size)}, candidates[name], name) for name in chosen]
    return entries


STUDIES = {
    "survey": Study("all methods on images beside supervised training", "", _survey, (), free=True),
    "width": Study(
        "encoders 1, 2 and 4 times as wide; other methods can be named", "width", _width, ("simclr", "supervised"), True
    ),
    "time": Study(
        "1, 2, 4, ... passes over the data up to --epochs; other methods can be named",
        "passes over the data",
        _time,
        ("simclr", "supervised"),
        True,
    ),
    "negatives": Study(
        "how many, and where they are kept: the batch, a memory bank, a queue (MoCo's argument)",
        "negatives",
        _negatives,
        ("simclr", "instdisc", "moco"),
    ),
    "augmentations": Study(
        "each step of SimCLR's views alone, and each left out", "step", _augmentations, ("simclr",), True
    ),
    "head": Study("SimCLR's projection head: none, linear, mlp", "head", _head, ("simclr",)),
    "bound": Study(
        "log N - loss, a lower bound of the mutual information in nats, against N candidates (CPC's)",
        "candidates N",
        _bound,
        ("cpc_images", "simclr"),
        bound=True,
    ),
}
