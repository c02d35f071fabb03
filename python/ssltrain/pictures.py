"""Image files of every common kind become uint8 arrays of one size.

The first frame of several, upright as EXIF says, on white where they are transparent; palettes and CMYK become RGB.
Images of more than 8 bits a pixel are scaled by the range of their set, see `Levels`.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000")  # of what Pillow can read
SUFFIXES = (
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff"}
    | {".pbm", ".pgm", ".ppm", ".pnm"}
    | {".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"}
)
LARGEST = 96  # px; larger images are scaled to LARGE_TO unless the caller names a size
LARGE_TO = 64
MOST_PIXELS = 50_000_000  # an image of more is not decoded
BACKGROUND = "white"

_ORIENTATION = 0x0112  # the tag of EXIF, and what undoes each of its values
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unusable(Exception):
    """Why an image is not taken."""


@dataclass
class Levels:
    """What becomes 0 and 255 in images of more than 8 bits: lowest value and the one past the highest.

    One range for all integers of a set and one for all floats, so that bright and dark images stay so. Integers from 0
    are taken as 8, 10, 12, 14 or 16 bits, by the largest; floats from 0 as [0, 1], if the largest is above a quarter;
    all else from the smallest value to the largest. Ranges that are known are kept: those of the training set go with
    a run.
    """

    known: dict[str, tuple[float, float]] = field(default_factory=dict)  # by "integer" and "float"

    @staticmethod
    def of(known: dict[str, list[float]] | None) -> Levels:
        """As they were kept with a run, if any were."""
        return Levels({kind: (low, high) for kind, (low, high) in (known or {}).items()})

    def learn(self, kind: str, low: float, high: float) -> None:
        if kind in self.known:
            return
        if kind == "integer" and low >= 0 and high < 2**16:
            low, high = 0.0, next(2.0**bits for bits in (8, 10, 12, 14, 16) if high < 2**bits)
        elif kind == "float" and low >= 0 and 0.25 < high <= 1:
            low, high = 0.0, 1.0
        self.known[kind] = (low, high)

    def apply(self, kind: str, values: np.ndarray) -> np.ndarray:
        """float32 to uint8."""
        low, high = self.known[kind]
        return ((values - low) * (256 / max(high - low, 1e-30))).clip(0, 255).astype(np.uint8)


class Pictures:
    """Decodes images one by one, `add`, and gives all of them, `stack`; `size` is (height, width), that of the first
    one if None, or 64 x 64 if that is larger than 96 pixels."""

    def __init__(self, size: tuple[int, int] | None, levels: Levels):
        self.size, self.levels = size, levels
        self.arrays: dict[str, np.ndarray] = {}  # uint8 [H, W] or [H, W, 3]; float32 [H, W] where there are more bits
        self.kinds: dict[str, tuple[str, float, float]] = {}  # of the latter: integer or float, lowest, highest
        self.fitted: set[str] = set()
        self.transparent: set[str] = set()
        self.several: set[str] = set()

    def add(self, name: str, content: bytes) -> None:
        """Raises `Unusable` with a reason, or nearly anything, as Pillow's decoders do on a broken file."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pixels, tags and palettes; what matters is said here
            try:
                image = Image.open(io.BytesIO(content), formats=_formats())
            except Image.DecompressionBombError:
                raise _too_many_pixels() from None
            if image.width * image.height > MOST_PIXELS:
                raise _too_many_pixels()
            wide_colour = ";16" in str(image.tile)
            image.load()
            upright = _UPRIGHT.get(_orientation(image)) if image.format != "TIFF" else None  # which Pillow has done
            file, (image, gray, kind) = image, _plain(image)
        if wide_colour and not kind and max(high for _, high in _extrema(image)[: 1 if gray else 3]) < 16:
            raise Unusable("16-bit colours all below 4,096, of which Pillow reads the upper 8 bits; save it in 8 bits")
        if upright is not None:
            image = image.transpose(upright)
        if self.size is None:
            self.size = (image.height, image.width) if max(image.size) <= LARGEST else (LARGE_TO, LARGE_TO)
        if (image.height, image.width) != self.size:
            self.fitted.add(name)
            image = ImageOps.fit(image, (self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        if image.mode == "RGBA":
            if _extrema(image)[3][0] < 255:
                self.transparent.add(name)
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
            image = image.convert("L" if gray else "RGB")
        if kind:
            self.kinds[name] = kind
        self.arrays[name] = np.asarray(image)
        if file.format in ("GIF", "TIFF", "WEBP") and _has_more_frames(file):
            self.several.add(name)

    def stack(self) -> Tensor:
        """uint8 [N, C, H, W]: one channel if every image is grayscale, else three."""
        for wanted in ("integer", "float"):
            found = {name: (low, high) for name, (kind, low, high) in self.kinds.items() if kind == wanted}
            if found:
                lows, highs = zip(*found.values(), strict=True)
                self.levels.learn(wanted, min(lows), max(highs))
            for name in found:
                self.arrays[name] = self.levels.apply(wanted, self.arrays[name])
        arrays = list(self.arrays.values())
        if any(a.ndim == 3 for a in arrays):
            stacked = np.empty((len(arrays), *arrays[0].shape[:2], 3), np.uint8)
            for out, a in zip(stacked, arrays, strict=True):
                out[:] = a if a.ndim == 3 else a[:, :, None]
            return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
        return torch.from_numpy(np.stack(arrays)).unsqueeze(1)

    def notes(self) -> list[str]:
        """What was done to them; after `stack`."""
        notes = []
        if self.size and self.fitted:
            notes.append(f"{len(self.fitted)} images were scaled and cropped to {self.size[1]} x {self.size[0]} pixels")
        if self.transparent:
            notes.append(f"{len(self.transparent)} images are transparent in places and were laid on {BACKGROUND}")
        if self.several:
            notes.append(f"{len(self.several)} files hold several frames or pages, of which the first is used")
        for wanted, (low, high) in self.levels.known.items():
            found = [(least, most) for kind, least, most in self.kinds.values() if kind == wanted]
            beyond = sum(least < low or most > high for least, most in found)
            if found:
                notes.append(
                    f"{len(found)} images of {wanted} values of more than 8 bits were scaled: {low:g} to {high:g} "
                    "became 0 to 256"
                )
            if beyond:
                notes.append(f"warning: {beyond} of these have values beyond that range, which were clipped")
        return notes


def _formats() -> list[str]:
    """No others: some run programs, such as EPS."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _too_many_pixels() -> Unusable:
    return Unusable(f"more than {MOST_PIXELS:,} pixels; scale it down")


def _has_more_frames(image: Image.Image) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.seek(1)
    except Exception:  # a broken second frame is no second frame
        return False
    return True


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # metadata may be broken while the image is not
        return 1


def _extrema(image: Image.Image) -> tuple[tuple[float, float], ...]:
    found: Any = image.getextrema()
    return found if isinstance(found[0], tuple) else (found,)


def _plain(image: Image.Image) -> tuple[Image.Image, bool, tuple[str, float, float] | None]:
    """The image as L, RGB, RGBA or F; whether it is gray; and for F integer or float, the lowest and highest value."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if values.dtype == np.int32 and values.min() < 0 and getattr(image, "tag_v2", {}).get(339) == 1:
            values = values.view(np.uint32)  # which Pillow does not have
        if "transparency" in image.info:
            raise Unusable("16 bits and a transparent level; save it in 8 bits")
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise Unusable("values that are not finite")
        kind = "float" if image.mode == "F" else "integer"
        return Image.fromarray(values.astype(np.float32)), True, (kind, low, high)
    gray = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        wanted = "RGBA"
    else:
        wanted = "L" if gray else "RGB"
    return image if image.mode == wanted else image.convert(wanted), gray, None
