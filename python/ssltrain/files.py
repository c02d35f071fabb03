"""The files of a data set, by the same rules in a folder, a zip or a tar (plain, gz, bz2, xz).

A link stands for what it leads to, be that a file, a class or a split: in a folder anything on the disk, in an archive
(also a tar's hard link) another member. Hidden files and folders are passed over. Whatever is not read is noted, so
that nothing is missing unsaid.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ssltrain import UsageError

LARGEST = 64 * 2**20  # bytes of a file; a larger one is not read
MOST_VISITS = 1000  # of one folder by way of links, which can multiply without end
OUTSIDE, NOTHING, LOOP, LARGE, BROKEN = (
    "whose names lead outside",
    "that are links to nothing",
    "that are links into a loop",
    f"larger than {LARGEST / 2**20:g} MiB",
    "that cannot be read",
)


@dataclass
class Unread:
    """What was not read, all of it, and the folders that there are."""

    left: dict[str, list[str]] = field(default_factory=dict)  # by what is wrong with them, "that ...": names
    other: list[str] = field(default_factory=list)  # not of the kind that is asked for
    folders: set[str] = field(default_factory=set)

    def leave(self, name: str, why: str = "", detail: str = "") -> None:
        self.left.setdefault(why, []).append(f"{name} ({detail})" if detail else name)

    @property
    def count(self) -> int:
        return sum(map(len, self.left.values()))

    @property
    def example(self) -> str:
        """The first file that was left out, and why."""
        return next((shown(names[0]) + (f", {why}" if why else "") for why, names in self.left.items()), "")

    def lines(self) -> list[str]:
        """All names, each with what is wrong."""
        lines = [f"{shown(name)}: {why or 'left out'}" for why, names in self.left.items() for name in names]
        return lines + [f"{shown(name)}: hidden or of another kind" for name in self.other]

    def notes(self, kind: str) -> list[str]:
        """A sentence for each reason; `kind` is what files are wanted, "image"."""
        notes = [
            f"warning: {len(names)} files {why}{' ' if why else ''}were left out: {listed(names)}"
            for why, names in self.left.items()
        ]
        if self.other:
            names = listed(self.other)
            notes.append(f"{len(self.other)} files that are hidden, or no {kind} by their names, are not read: {names}")
        return notes


def shown(text: str) -> str:
    """Any name on one line, bytes that are no UTF-8 and control characters written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(names: Collection[str], most: int = 5) -> str:
    return ", ".join(shown(name) for name in list(names)[:most]) + (", ..." if len(names) > most else "")


def reason(error: Exception) -> str:
    """What an exception says, on one line, or its type if it says nothing."""
    said = getattr(error, "strerror", None) or str(error)  # of a system's error without number and path
    return shown(" ".join(said.split()).rstrip(".:- ")) or type(error).__name__


def read(path: Path, suffixes: Collection[str], unread: Unread, hint: str = "") -> Iterator[tuple[str, bytes]]:
    """Name (with forward slashes) and content of every file with one of the `suffixes`, in lower case.

    In one pass, with a second one for what a tar's links lead to, since an xz tar cannot be sought cheaply. Raises
    `UsageError`, one sentence, for what is no folder, zip or tar, or breaks off; `hint` ends the one for a path that
    does not exist.
    """
    try:
        if path.is_dir():
            yield from _contents(_files(_DiskFolder(str(path)), suffixes, unread), unread)
        elif not path.exists():
            raise UsageError(f"--data {path}: no such folder, zip or tar; name one that exists{hint}.")
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                root = _ArchiveFolder()
                for info in archive.infolist():
                    _place_zip_member(root, archive, info, unread)
                yield from _contents(_files(root, suffixes, unread), unread)
        else:
            with tarfile.open(path, "r:*") as archive:
                yield from _read_tar(archive, suffixes, unread)
    except UsageError:
        raise
    except Exception as error:  # a damaged archive raises nearly anything
        raise UsageError(
            f"--data {path}: is no complete folder, zip or tar that can be read ({reason(error)}); check the file."
        ) from error


def _read_tar(archive: tarfile.TarFile, suffixes: Collection[str], unread: Unread) -> Iterator[tuple[str, bytes]]:
    root = _ArchiveFolder()
    for member in archive:
        if member.isfile():
            node = _File(member.size, partial(_read_member, archive, member), member.offset_data)
        elif member.islnk() or member.issym():
            node = _Link(member.linkname, from_root=member.islnk())
        elif member.isdir():
            node = None
        else:
            node = "that are no plain files"
        name = root.place(member.name, node, unread)
        if name and isinstance(node, _File) and _wanted(name, suffixes) and node.size <= LARGEST:
            node.name = name
            yield name, node.read()
    linked = [(name, file) for name, file in _files(root, suffixes, unread) if name != file.name]
    yield from _contents(sorted(linked, key=lambda pair: pair[1].offset), unread)


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # as of every plain file
    return file.read()


def _place_zip_member(root: _ArchiveFolder, archive: zipfile.ZipFile, info: zipfile.ZipInfo, unread: Unread) -> None:
    name = info.filename if "/" in info.filename else info.filename.replace("\\", "/")  # as some writers have it
    node: _File | _Link | str | None = _File(info.file_size, lambda: archive.read(info))
    if name.endswith("/"):
        node = None
    elif stat.S_ISLNK(info.external_attr >> 16):
        if info.file_size > 4096:
            node = NOTHING
        else:
            node = _Link(archive.read(info).decode("utf-8", "surrogateescape"))
    root.place(name, node, unread)


def _contents(files: Iterator[tuple[str, _File]] | list, unread: Unread) -> Iterator[tuple[str, bytes]]:
    for name, file in files:
        try:
            content = file.read()
        except Exception as error:  # damaged, encrypted, of an unknown compression, not permitted
            unread.leave(name, BROKEN, reason(error))
        else:
            yield name, content


def _wanted(name: str, suffixes: Collection[str]) -> bool:
    parts = name.split("/")
    return os.path.splitext(name)[1].lower() in suffixes and not any(map(_hidden, parts))


def _hidden(part: str) -> bool:
    return part.startswith((".", "__MACOSX"))


def _files(
    root: _DiskFolder | _ArchiveFolder, suffixes: Collection[str], unread: Unread
) -> Iterator[tuple[str, _File]]:
    """The wanted files below a folder, links followed, in the order of their names part by part."""
    visits: Counter = Counter()
    waiting: list[tuple] = [("", root, ())]  # name, what is there, the folders above
    while waiting:
        name, node, above = waiting.pop()
        if _hidden(name.rpartition("/")[2]):
            unread.other.append(name)
        elif isinstance(node, str):
            unread.leave(name, node)
        elif isinstance(node, _File):
            if not _wanted(name, suffixes):
                unread.other.append(name)
            elif node.size > LARGEST:
                unread.leave(name, LARGE, f"{node.size:,} bytes")
            else:
                yield name, node
        elif node.key in above:
            unread.leave(name, LOOP)
        else:
            visits[node.key] += 1
            if visits[node.key] > MOST_VISITS:
                unread.leave(name, f"of a folder with more than {MOST_VISITS} links to it")
                continue
            try:
                entries = node.entries()
            except OSError as error:
                if not name:
                    raise
                unread.leave(name, BROKEN, reason(error))
                continue
            if name:
                unread.folders.add(name)
            waiting += [
                (f"{name}/{part}" if name else part, entry, (*above, node.key)) for part, entry in reversed(entries)
            ]


@dataclass
class _File:
    size: int
    read: Callable[[], bytes]
    offset: int = 0
    name: str | None = None  # under which it has been read


class _DiskFolder:
    def __init__(self, path: str):
        self.path = path
        found = os.stat(path)
        self.key = (found.st_dev, found.st_ino)

    def entries(self) -> list[tuple[str, _DiskFolder | _File | str]]:
        with os.scandir(self.path) as entries:
            return [(entry.name, self._entry(entry)) for entry in sorted(entries, key=lambda entry: entry.name)]

    def _entry(self, entry: os.DirEntry) -> _DiskFolder | _File | str:
        try:
            found = entry.stat()  # of what a link leads to
            if stat.S_ISDIR(found.st_mode):
                return _DiskFolder(entry.path)
        except (FileNotFoundError, NotADirectoryError):
            return NOTHING
        except OSError as error:
            return LOOP if error.errno == errno.ELOOP else BROKEN
        if not stat.S_ISREG(found.st_mode):
            return "that are no plain files"
        return _File(found.st_size, lambda: _read_at_most(entry.path, found.st_size))


def _read_at_most(path: str, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)  # also of a file that grows meanwhile


class _ArchiveFolder:
    """A folder of an archive; its members are looked up by name, as links lead to them."""

    def __init__(self, parent: _ArchiveFolder | None = None):
        self.parent, self.key = parent, id(self)
        self.members: dict[str, _ArchiveFolder | _File | _Link | str] = {}

    def place(self, name: str, node: _File | _Link | str | None, unread: Unread) -> str:
        """Put a member (None: a folder) where its name says, from the root; the name in plain form, or ""."""
        parts: list[str] = []
        outside = name.startswith("/") or re.match("[A-Za-z]:[/\\\\]", name)
        for part in name.split("/"):
            if part == "..":
                outside = outside or not parts
                parts = parts[:-1]
            elif part not in ("", "."):
                parts.append(part)
        if outside:
            unread.leave(name, OUTSIDE)
            return ""
        plain, folder = "/".join(parts), self
        for part in parts if node is None else parts[:-1]:
            folder = folder.members.setdefault(part, _ArchiveFolder(folder))
            if not isinstance(folder, _ArchiveFolder):
                unread.leave(plain, "whose folder is something else")
                return ""
        if node is None or not parts:
            return ""
        if parts[-1] in folder.members:
            unread.leave(plain, "of a name that comes again later")
        if isinstance(node, _Link):
            node.folder = self if node.from_root else folder
        folder.members[parts[-1]] = node
        return plain

    def entries(self) -> list[tuple[str, _ArchiveFolder | _File | str]]:
        members = sorted(self.members.items())
        return [(name, node.follow() if isinstance(node, _Link) else node) for name, node in members]

    def at(self, target: str) -> _ArchiveFolder | _File | str:
        """What lies at a path from here, or why there is nothing."""
        if target.startswith("/"):
            return OUTSIDE
        here = self
        for part in target.split("/"):
            if part in ("", "."):
                continue
            if not isinstance(here, _ArchiveFolder):
                return here if isinstance(here, str) else NOTHING
            if part == "..":
                here = here.parent or OUTSIDE
            else:
                here = here.members.get(part, NOTHING)
                here = here.follow() if isinstance(here, _Link) else here
        return here


@dataclass
class _Link:
    target: str
    from_root: bool = False
    folder: _ArchiveFolder = field(init=False)  # where the target's name starts, once it has its place
    end: _ArchiveFolder | _File | str | None = None

    def follow(self) -> _ArchiveFolder | _File | str:
        if self.end is None:
            self.end = LOOP  # if it is met on its own way
            try:
                self.end = self.folder.at(self.target)
            except RecursionError:
                pass
        return self.end
