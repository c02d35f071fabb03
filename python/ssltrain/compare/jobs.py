"""The runs of a comparison, one after another, each a process of its own: one that dies loses nothing of the others.

A run is an ordinary run folder. One that is done is left alone, one that was begun goes on, by `--resume`.
"""

from __future__ import annotations

import fcntl
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssltrain import UsageError, config

CHECKPOINT, LOG = "checkpoint.pt", "log.txt"
PROGRESS = re.compile(r"^\S+ +(\d+)%  (.*)  (\d+) s left$")  # as a run says it where there is no terminal


class Stopped(Exception):
    """The user has asked for an end; what ran has saved its state."""


@dataclass(frozen=True)
class Job:
    """One process: `ssltrain` with these arguments, done once there is `result`."""

    kind: str  # of what takes equally long
    title: str
    arguments: tuple[str, ...]
    result: Path
    trains: bool = True

    @staticmethod
    def training(kind: str, title: str, options: config.Config, folder: Path) -> Job:
        """A run with these options, in that folder. Raises `UsageError` if it holds one with others."""
        _check_same(options, folder)
        arguments = (options.method, *config.as_flags(options), "--out", str(folder))
        return Job(kind, title, arguments, folder / "result.json")

    @staticmethod
    def evaluation(kind: str, title: str, run: Path, name: str, *options: str) -> Job:
        """What `ssltrain evaluate` says of a run, kept in its folder."""
        result = run / name
        return Job(kind, title, ("evaluate", str(run), *options, "--json", str(result)), result, trains=False)

    @property
    def folder(self) -> Path:
        return self.result.parent

    @property
    def begun(self) -> bool:
        return self.trains and (self.folder / CHECKPOINT).exists()

    def command(self) -> list[str]:
        resume = ["--resume"] if self.begun else []
        return [sys.executable, "-m", "ssltrain", *self.arguments, *resume]

    def found(self) -> dict[str, Any] | None:
        """Its figures, if it is done."""
        return read(self.result)


def read(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds, if it is there, and whole: a kill may leave half of one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _check_same(options: config.Config, folder: Path) -> None:
    """Where a run is computed may change; what it computes may not."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    earlier = type(options)(**config.read_yaml(path, options.method))
    for name in config.fields(type(options)).keys() - (config.PLACE - {"data"}):
        was, wanted = getattr(earlier, name), getattr(options, name)
        if was != wanted:
            raise UsageError(
                f"{folder} holds a run with other options: its {config.flag(name)} was {was}, and now it is {wanted}; "
                "choose another --out."
            )


class Runner:
    """Runs jobs and says how far they are; `kinds` are those of all that are left to do."""

    def __init__(self, kinds: list[str], total: int):
        self.left, self.total = Counter(kinds), total
        self.number = total - len(kinds)
        self.seconds: dict[str, list[float]] = {}  # that jobs took, by kind
        self.failed: dict[str, str] = {}  # why, by title
        self.process: subprocess.Popen[str] | None = None
        self.stop: int | None = None  # a signal

    def run(self, job: Job) -> None:
        """Raises `Stopped` once the job has ended after a signal; if it fails, `failed` says why."""
        if job.found() is not None:
            return
        self.number += 1
        start = time.monotonic()
        job.folder.mkdir(parents=True, exist_ok=True)
        last = self._follow(job)
        self.left[job.kind] -= 1
        if self.stop is not None:
            raise Stopped
        assert self.process is not None
        if job.found() is None:
            code = self.process.returncode
            how = f"killed by signal {-code}" if code < 0 else last.removeprefix("ssltrain: ") or f"exit {code}"
            self.failed[job.title] = f"{how} (see {job.folder / LOG})"
            self._say(f"failed: {self.failed[job.title]}", job, end="\n")
        else:
            self.seconds.setdefault(job.kind, []).append(time.monotonic() - start)

    def _follow(self, job: Job) -> str:
        """Run it, show how far it is, keep what it says; its last line."""
        last = ""
        self._say("starts", job)
        with (job.folder / LOG).open("a") as log, self._signals():
            # In a group of its own: Ctrl-C comes to it through here, once.
            self.process = subprocess.Popen(
                job.command(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                pass_fds=[self.lock.fileno()],
            )
            self._forward()  # what came before there was a process
            assert self.process.stdout is not None  # it is a pipe
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                last = line.strip() or last
                if progress := PROGRESS.match(line):
                    percent, figures, left = progress.groups()
                    self._say(f"{percent}%  {figures}  {left} s left{self._in_all(job, int(left))}", job)
            self.process.wait()
        return last

    def _in_all(self, job: Job, left: int) -> str:
        """The time that all will take, by what those before have taken."""
        known = [s for seconds in self.seconds.values() for s in seconds]
        later = self.left - Counter([job.kind])
        if not known or not later:
            return ""
        mean = {kind: sum(seconds) / len(seconds) for kind, seconds in self.seconds.items()}
        rest = sum(count * mean.get(kind, sum(known) / len(known)) for kind, count in later.items())
        return f"; all {self.total}: {(left + rest) / 60:.0f} min"

    def _say(self, what: str, job: Job, end: str | None = None) -> None:
        line = f"[{self.number}/{self.total}] {job.title}: {what}"
        if sys.stdout.isatty():
            print(f"\r\x1b[2K{line}", end=end or "", flush=True)
        else:
            print(line, flush=True)

    def done(self, job: Job, what: str) -> None:
        self._say(what, job, end="\n")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass SIGINT and SIGTERM on to the process, which stops at a step; the second one at once."""

        def note(number: int, frame: object) -> None:
            self.stop = number
            if self.process is not None:
                self._forward()

        self.process = None
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self) -> None:
        if self.stop is not None and self.process is not None and self.process.poll() is None:
            self.process.send_signal(self.stop)

    @contextmanager
    def alone(self, out: Path) -> Iterator[None]:
        """Wait until no other comparison is at work in that folder, nor a run that one has left behind."""
        out.mkdir(parents=True, exist_ok=True)
        with (out / ".lock").open("w") as self.lock:  # which the processes inherit
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{out}: another comparison, or a run that one began, is at work there; waiting for its end.")
                fcntl.flock(self.lock, fcntl.LOCK_EX)
            yield
