"""A folder, a zip and a tar of the same tree give the same files; links count, and nothing is left out unsaid."""

import io
import os
import random
import stat
import tarfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from ssltrain import UsageError, data, files

KINDS = ["folder", "zip", "tar", "tar.gz", "tar.xz"]


class Link(str):
    """A symbolic link, by its target."""


class Hard(str):
    """A hard link of a tar."""


def build(root: Path, kind: str, tree: list[tuple[str, bytes | Link | Hard]]) -> Path:
    """The members in this order, as a folder or an archive."""
    if kind == "folder":
        for name, content in tree:
            path = root / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Link):
                path.symlink_to(content)
            elif isinstance(content, Hard):
                os.link(root / "set" / content, path)
            else:
                path.write_bytes(content)
        return root / "set"
    path = root / f"set.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in tree:
                info = zipfile.ZipInfo(name)
                mode = stat.S_IFLNK if isinstance(content, Link) else stat.S_IFREG
                info.external_attr = (mode | 0o644) << 16
                archive.writestr(info, content)
        return path
    with tarfile.open(path, "w:" + kind.removeprefix("tar").removeprefix(".")) as archive:
        for name, content in tree:
            info = tarfile.TarInfo(name)
            if isinstance(content, (Link, Hard)):
                info.type = tarfile.SYMTYPE if isinstance(content, Link) else tarfile.LNKTYPE
                info.linkname = str(content)
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def read(path: Path) -> tuple[dict[str, bytes], files.Unread]:
    unread = files.Unread()
    found = list(files.read(path, {".png"}, unread))
    assert len(found) == len(dict(found))
    return dict(found), unread


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_stands_for_a_file_a_class_or_a_split(tmp_path, kind):
    tree = [
        ("train/ant/0.png", b"0"),
        ("train/ant/1.png", Link("../../blobs/ab12")),  # before what it leads to, which has no name of an image
        ("train/bee", Link("../pool/bee")),
        ("pool/bee/0.png", b"2"),
        ("blobs/ab12", b"1"),
        ("val", Link("./train")),
        ("test", Link("val")),
    ]
    found, unread = read(build(tmp_path, kind, tree))
    images = {"ant/0.png": b"0", "ant/1.png": b"1", "bee/0.png": b"2"}
    expected = {f"{split}/{name}": content for split in ("train", "val", "test") for name, content in images.items()}
    assert found == expected | {"pool/bee/0.png": b"2"}
    assert not unread.left and unread.other == ["blobs/ab12"]


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.xz"])
def test_hard_links(tmp_path, kind):
    tree = [("a/0.png", b"0"), ("b/0.png", Hard("a/0.png")), ("c/0.png", Hard("b/0.png"))]
    found, unread = read(build(tmp_path, kind, tree))
    assert found == {"a/0.png": b"0", "b/0.png": b"0", "c/0.png": b"0"} and not unread.left


@pytest.mark.parametrize("kind", KINDS)
def test_loops_and_links_to_nothing_are_left_out_and_named(tmp_path, kind):
    tree = [
        ("a/0.png", b"0"),
        ("a/up", Link("..")),
        ("a/self.png", Link("self.png")),
        ("b", Link("c")),
        ("c", Link("b")),
        ("gone.png", Link("a/none.png")),
        ("below.png", Link("a/0.png/more")),
    ]
    found, unread = read(build(tmp_path, kind, tree))
    assert found == {"a/0.png": b"0"}
    assert sorted(unread.left[files.LOOP]) == ["a/self.png", "a/up", "b", "c"]
    assert sorted(unread.left[files.NOTHING]) == ["below.png", "gone.png"] and unread.count == 6


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_and_links_that_lead_outside_are_named_as_that(tmp_path, kind):
    outside = ["../0.png", "/etc/0.png", "a/../../0.png", "C:/0.png", "a/link.png", "a/root"]
    tree = [(name, b"x") for name in outside[:4]] + [("a/link.png", Link("../../0.png")), ("a/root", Link("/etc"))]
    found, unread = read(build(tmp_path, kind, [*tree, ("a/b/../1.png", b"1"), ("./a/2.png", b"2")]))
    assert (
        found.values() and set(found.values()) == {b"1", b"2"} and {Path(n).name for n in found} == {"1.png", "2.png"}
    )
    assert unread.left == {files.OUTSIDE: outside}
    assert unread.notes("image") == [
        "warning: 6 files whose names lead outside were left out: ../0.png, /etc/0.png, a/../../0.png, C:/0.png, "
        "a/link.png, ..."
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_that_is_too_large_is_left_out_before_it_is_read(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 2**20)
    path = build(tmp_path, kind, [("a/0.png", b"0"), ("a/zeros.png", bytes(2**25)), ("b.png", Link("a/zeros.png"))])
    tracemalloc.start()
    found, unread = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == {"a/0.png": b"0"} and peak < 2**24
    assert unread.left == {files.LARGE: ["a/zeros.png (33,554,432 bytes)", "b.png (33,554,432 bytes)"]}


def test_links_that_multiply_come_to_an_end(tmp_path):
    tree = [(f"{i}/{side}", Link(f"../{i + 1}")) for i in range(40) for side in "ab"] + [("40/0.png", b"0")]
    found, unread = read(build(tmp_path, "tar", tree))
    assert set(found.values()) == {b"0"} and len(found) == files.MOST_VISITS + 1  # and its own name
    assert any("links to it" in why for why in unread.left)
    twice = [(str(i), Link(f"{i + 1}/../{i + 1}")) for i in range(200)] + [("200/0.png", b"0")]
    found, _ = read(build(tmp_path, "zip", twice))
    assert len(found) == 201
    long = [(f"{i}.png", Link(f"{i + 1}.png")) for i in range(3000)] + [("3000.png", b"0")]
    found, unread = read(build(tmp_path, "tar", long))
    assert len(found) + unread.count == 3001 and set(found.values()) == {b"0"}


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_and_other_files_are_counted(tmp_path, kind):
    tree = [
        ("a/0.png", b"0"),
        ("README.md", b"x"),
        (".git/0.png", b"x"),
        ("__MACOSX/a/._0.png", b"x"),
        ("a/.x.png", b""),
    ]
    found, unread = read(build(tmp_path, kind, tree))
    assert found == {"a/0.png": b"0"} and sorted(unread.other) == [".git", "README.md", "__MACOSX", "a/.x.png"]
    assert unread.notes("image")[0].startswith("4 files that are hidden, or no image by their names, are not read: ")


def test_members_that_are_broken_or_no_files_are_named(tmp_path):
    path = build(tmp_path, "zip", [("a/0.png", b"good " * 99), ("a/1.png", b"bad  " * 99), ("a\\2.png", b"2")])
    content = bytearray(path.read_bytes())
    second = content.index(b"a/1.png")
    content[second + 10] ^= 0xFF
    path.write_bytes(content)
    found, unread = read(path)
    assert found == {"a/0.png": b"good " * 99, "a/2.png": b"2"} and unread.left[files.BROKEN][0].startswith("a/1.png (")
    folder = build(tmp_path, "folder", [("a/0.png", b"0")])
    os.mkfifo(folder / "a" / "pipe.png")
    found, unread = read(folder)
    assert found == {"a/0.png": b"0"} and unread.left == {"that are no plain files": ["a/pipe.png"]}


def test_of_equal_names_in_an_archive_the_last_counts_as_when_it_is_unpacked(tmp_path):
    for kind in ("zip", "tar"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = build(tmp_path, kind, [("0.png", b"old"), ("0.png", b"new")])
        unread = files.Unread()
        assert dict(files.read(path, {".png"}, unread)) == {"0.png": b"new"}
        assert unread.left == {"of a name that comes again later": ["0.png"]}


def test_a_name_is_shown_on_one_line():
    assert files.shown("a\nb\udcff\x1b[31mé") == "a\\nb\\udcff\\x1b[31mé"


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_of_links(tmp_path, kind):
    """Through `data.load`: a class and a split that are links, one that leads round."""

    def png(level: int) -> bytes:
        file = io.BytesIO()
        Image.new("L", (6, 5), level).save(file, "png")
        return file.getvalue()

    tree = [(f"Train/ant/{i}.png", png(i)) for i in range(3)] + [(f"other/{i}.png", png(10 + i)) for i in range(3)]
    tree += [("Train/bee", Link("../other")), ("Val", Link("Train")), ("Train/ant/up", Link("../../Train"))]
    images = data.load(str(build(tmp_path, kind, tree)))
    assert images.classes == ["ant", "bee"] and images.train[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert torch.equal(images.train, images.test)
    notes = " ".join(images.notes)
    assert "3 images outside" in notes and "other/0.png" in notes and "into a loop were left out: Train/ant/up" in notes


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_are_a_sentence_or_a_left_out_file(tmp_path, kind):
    """Flipped and missing bytes, in the archive itself or, for a folder, in every file."""
    draw = random.Random(0)

    def damaged(content: bytes) -> bytes:
        content = bytearray(content)
        for _ in range(draw.choice([1, 5, 20])):
            content[draw.randrange(len(content))] = draw.choice([0, 255, draw.randrange(256)])
        return bytes(content[: draw.randrange(1, len(content))] if draw.random() < 0.2 else content)

    tree = []
    for i, form in enumerate(("PNG", "JPEG", "GIF", "WEBP", "TIFF", "PPM", "BMP", "JPEG2000")):
        file = io.BytesIO()
        Image.linear_gradient("L").resize((8, 8)).convert("RGB").save(file, form)
        tree.append((f"{i % 2}/{i}.png", file.getvalue()))
    whole = build(tmp_path, kind, tree)
    content, used = whole.read_bytes() if kind != "folder" else b"", 0
    for _ in range(30):
        if kind == "folder":
            for name, image in tree:
                (whole / name).write_bytes(damaged(image))
        else:
            whole.write_bytes(damaged(content))
        try:
            names, pixels, _ = data.read_files(whole)
            used += len(names) == len(pixels)
        except UsageError as error:
            assert "\n" not in str(error) and str(error).endswith(".")
    assert used or kind != "folder"


def test_an_archive_that_expands_without_end_costs_no_memory(tmp_path):
    """300 MB of zeros in a zip, as reported."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/0.png", "w") as file:
        for _ in range(300):
            file.write(bytes(10**6))
    tracemalloc.start()
    with pytest.raises(UsageError, match="none of its 1 image files can be used, .*a/0.png .*larger than 64 MiB"):
        data.load(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
