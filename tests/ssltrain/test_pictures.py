"""Every common kind of image gives the right grey levels and colours, or is left out with a reason."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from ssltrain import data, pictures

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def saved(tmp_path, images: dict[str, Image.Image | bytes], **options) -> tuple[list[str], np.ndarray, str]:
    """Names, pixels uint8 [N, C, H, W] and notes of these files."""
    for name, image in images.items():
        path = tmp_path / name
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            image.save(path, **options)
    names, pixels, notes = data.read_files(tmp_path)
    return names, pixels.numpy(), " ".join(notes)


def one(tmp_path, name: str, image: Image.Image | bytes, **options) -> np.ndarray:
    """Pixels [C, H, W] of a single image."""
    return saved(tmp_path, {name: image}, **options)[1][0]


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.ppm", {}),
        ("a.tiff", {}),
        ("a.webp", {"lossless": True}),
        ("a.jp2", {"irreversible": False}),
        ("a.j2k", {}),
        ("a.JPEG", {"quality": 100, "subsampling": 0}),
    ],
)
def test_formats(tmp_path, name, options):
    found = one(tmp_path, name, Image.fromarray(COLOURS), **options).transpose(1, 2, 0).astype(int)
    assert abs(found - COLOURS).max() <= (6 if name == "a.JPEG" else 0)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.tif"])
def test_of_several_frames_the_first(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if name == "a.webp" else {}
    _, pixels, notes = saved(tmp_path, {name: frames[0]}, save_all=True, append_images=frames[1:], **options)
    assert (pixels[0].transpose(1, 2, 0) == (255, 0, 0)).all()
    assert "1 files hold several frames or pages, of which the first is used" in notes


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_exif_orientation_is_applied(tmp_path, orientation, name):
    """The picture as it is to be seen: white, its upper left corner black; wider than high."""
    seen = np.full((16, 32), 255, np.uint8)
    seen[:8, :8] = 0
    undo = {1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1], 5: seen.T, 6: seen.T[::-1]}
    undo |= {7: seen[::-1, ::-1].T, 8: seen.T[:, ::-1]}
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = one(tmp_path, name, Image.fromarray(np.ascontiguousarray(undo[orientation])), exif=exif)
    assert found.shape[1:] == (16, 32) and abs(found[0].astype(int) - seen).max() <= 8


def test_broken_exif_does_not_lose_the_image(tmp_path):
    file = io.BytesIO()
    Image.new("L", (8, 8), 128).save(file, "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert abs(one(tmp_path, "a.jpg", file.getvalue()).astype(int) - 128).max() <= 1


@pytest.mark.parametrize(
    "mode, value, expected",
    [
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),  # as it is written, hidden black
        ("RGBA", (200, 100, 0, 128), (227, 177, 127)),
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("LA", (0, 0), (255,)),
        ("LA", (100, 128), (177,)),
    ],
)
def test_alpha_is_laid_on_white(tmp_path, mode, value, expected):
    _, pixels, notes = saved(tmp_path, {"a.png": Image.new(mode, (8, 8), value)})
    assert pixels.shape[1] == len(expected) and (pixels[0, :, 0, 0] == expected).all()
    assert ("1 images are transparent in places and were laid on white" in notes) == (value[-1] < 255)


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_palette_with_a_transparent_colour(tmp_path, transparency):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    found = one(tmp_path, "a.png", image, transparency=transparency)
    assert found[:, 0, 0].tolist() == [255, 0, 0] and found[:, 4, 4].tolist() == [255, 255, 255]


def test_palette_cmyk_and_one_bit(tmp_path):
    assert one(tmp_path, "a.png", Image.new("1", (8, 8), 1)).tolist() == [[[255] * 8] * 8]
    cmyk = one(tmp_path, "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)  # cyan none: red
    assert abs(cmyk[:, 0, 0].astype(int) - (255, 0, 0)).max() <= 2
    (tmp_path / "p").mkdir()
    palette = one(tmp_path / "p", "a.gif", Image.fromarray(COLOURS).quantize(256))
    assert abs(palette.transpose(1, 2, 0).astype(int) - COLOURS).max() <= 8


DEEP = {
    "16 bits": ("a.png", (RAMP * 65535).astype(np.uint16), 65536),
    "12 bits": ("a.png", (RAMP * 4095).astype(np.uint16), 4096),
    "10 bits tiff": ("a.tif", (RAMP * 1023).astype(np.uint16), 1024),
    "8 bits in 16": ("a.tif", (RAMP * 255).astype(np.uint16), 256),
    "int32": ("a.tif", (RAMP * 1_000_000).astype(np.int32), 1_000_000),
    "int32 of 12 bits": ("a.tif", (RAMP * 4095).astype(np.int32), 4096),
    "int32 below 0": ("a.tif", ((RAMP - 0.5) * 2000).astype(np.int32), 2000),
    "float to 1": ("a.tif", RAMP.astype(np.float32), 1),
    "float to 0.01": ("a.tif", (RAMP * 0.01).astype(np.float32), 0.01),
    "float to 0.5": ("a.tif", (RAMP * 0.5).astype(np.float32), 1),
    "float to 255": ("a.tif", (RAMP * 255).astype(np.float32), 255),
    "float to 3": ("a.tif", (RAMP * 3).astype(np.float32), 3),
}


@pytest.mark.parametrize("name, values, span", DEEP.values(), ids=DEEP)
def test_more_than_8_bits_are_scaled_to_their_range(tmp_path, name, values, span):
    _, pixels, notes = saved(tmp_path, {name: Image.fromarray(values)})
    low = min(0, float(values.min()))
    expected = np.minimum(np.floor((values.astype(np.float64) - low) * 256 / span), 255)
    assert pixels.shape == (1, 1, 8, 8) and abs(pixels[0, 0] - expected).max() <= 1  # of float32
    assert len(np.unique(pixels)) > 60 and pixels.min() == 0 and pixels.max() > (250 if span != 1 else 125)
    assert "1 images of " in notes and "values of more than 8 bits were scaled" in notes


def test_a_packed_tiff_of_12_bits_and_a_pgm(tmp_path):
    values = (RAMP * 4095).astype(int).ravel()
    packed = int("".join(f"{v:012b}" for v in values), 2).to_bytes(96, "big")
    tags = [(256, 8), (257, 8), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, 8), (279, 96)]
    tiff = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags)
    pgm = b"P5 8 8 4095 " + values.astype(">u2").tobytes()
    names, pixels, _ = saved(tmp_path, {"a.tif": tiff + bytes(4) + packed})
    assert (pixels[0, 0].ravel() == values // 16).all()
    (tmp_path / "a.tif").unlink()
    names, pixels, _ = saved(tmp_path, {"a.pgm": pgm})
    assert abs(pixels[0, 0].ravel() - values // 16.0).max() <= 1


def test_one_range_for_a_set_so_that_dark_images_stay_dark(tmp_path):
    bright, dark = (Image.fromarray((RAMP * top).astype(np.uint16)) for top in (4095, 1023))
    _, pixels, notes = saved(tmp_path, {"a.png": bright, "b.png": dark, "c.png": Image.new("L", (8, 8), 77)})
    assert pixels[0].max() == 255 and pixels[1].max() == 63 and (pixels[2] == 77).all()
    assert "2 images of integer values of more than 8 bits were scaled: 0 to 4096 became 0 to 256" in notes
    levels = pictures.Levels.of({"integer": [0.0, 1024.0]})  # as of a run
    _, pixels, notes = data.read_files(tmp_path, levels=levels)
    assert pixels[1].max() == 255 and "warning: 1 of these have values beyond that range" in " ".join(notes)


def png(width: int, height: int, bits: int, kind: int, rows: bytes) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def test_what_cannot_be_scaled_is_left_out_with_a_reason(tmp_path):
    def colours(top: int) -> bytes:  # RGB of 16 bits a channel, of which Pillow gives the upper 8
        row = b"\0" + np.linspace(0, top, 24).astype(">u2").tobytes()
        return png(8, 8, 16, 2, row * 8)

    nan = Image.fromarray(np.full((8, 8), np.nan, np.float32))
    names, pixels, notes = saved(tmp_path, {"a.png": colours(65535), "b.png": colours(4095), "c.tif": nan})
    assert names == ["a.png"] and pixels[0, 2, 0, 7] == 255
    assert "warning: 2 files were left out: b.png (16-bit colours all below 4,096" in notes
    assert "c.tif (values that are not finite)" in notes


def test_a_decompression_bomb_costs_no_memory(tmp_path):
    bombs = {f"{side}.png": png(side, side, 1, 0, bytes(100)) for side in (8000, 12_000, 60_000)}
    tracemalloc.start()
    names, _, notes = saved(tmp_path, {"a.png": Image.new("L", (8, 8)), **bombs})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert names == ["a.png"] and notes.count("more than 50,000,000 pixels; scale it down") == 3 and peak < 10e6


def test_no_other_formats_whatever_the_name_says(tmp_path):
    """Pillow would start Ghostscript for this one."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"
    names, _, notes = saved(tmp_path, {"a.png": Image.new("L", (8, 8)), "b.png": eps})
    assert names == ["a.png"] and "b.png (UnidentifiedImageError)" in notes
