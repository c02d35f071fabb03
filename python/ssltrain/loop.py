"""The training loop that every method shares: batches from memory, a cosine schedule, checkpoints, a progress line.

A run of `--epochs` is a function of its configuration: with the same precision and the same number of threads it ends
at the same bits, interrupted and resumed or not. A run of `--minutes` follows the clock and cannot promise that. Over
several processes (`ranks.py`) the sums of a run have another order and nothing else changes.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ssltrain import UsageError, checkpoints, ranks
from ssltrain.config import Config
from ssltrain.draws import Draws, key
from ssltrain.lars import LARS
from ssltrain.methods._method import Method
from ssltrain.rehearsal import compiled, encoder_passes, faster_precision, rehearse
from ssltrain.speech import Clips
from ssltrain.stopwatch import Stopwatch

WARMUP = 0.05  # of the schedule
READ_EVERY = 10  # steps


@dataclass
class State:
    """Everything about a run that changes while it goes, apart from the method and the optimiser themselves."""

    precision: str
    step: int = 0
    seconds: float = 0.0  # of training
    loss_seconds: float = 0.0  # of these, in the criterion, forward and backward
    samples: int = 0
    losses: list[float] = field(default_factory=list)  # one a step
    stats: dict[str, list[float]] = field(default_factory=dict)  # the method's own figures, one a step
    finished: bool = False
    encoder_passes: float | None = None  # of a sample, forward; see `rehearsal`

    @property
    def samples_per_s(self) -> float:
        return self.samples / max(self.seconds, 1e-9)

    @property
    def loss_share(self) -> float:
        return self.loss_seconds / max(self.seconds, 1e-9)


class Interrupted(Exception):
    """The run was stopped by a signal, after its checkpoint was written."""


def train(
    method: Method,
    data: Tensor | Clips,
    config: Config,
    out: Path,
    checkpoint: dict | None = None,
    report: Callable[[State, float], None] = lambda state, progress: None,
    about: dict | None = None,
) -> State:
    """Train `method` in place on `data`, images uint8 [N, C, H, W] or clips, and leave its last checkpoint in `out`.

    `checkpoint`, from `checkpoints.load`, continues that run. `report(state, progress)` is called after every step,
    `progress` in [0, 1]. On SIGINT or SIGTERM the step is finished, a checkpoint written, and `Interrupted` raised.
    `about` is what a checkpoint keeps about the data.
    """
    device = torch.device(ranks.local_device(config.device))
    if len(data) < config.batch_size:
        raise UsageError(
            f"--batch-size {config.batch_size}: there are {len(data)} training samples; use that many or fewer."
        )
    if config.batch_size < ranks.size():
        raise UsageError(
            f"--batch-size {config.batch_size}: there are {ranks.size()} processes; use that many or more, for each "
            "takes a part of every batch."
        )
    if ranks.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
    data = data.to(device)
    method.to(device, torch.float64 if config.precision == "fp64" else None).train()
    ranks.normalise(method, device, method.parts)
    passes = encoder_passes(method, data[ranks.share(0, config.batch_size)]) if checkpoint is None else None
    with compiled(method) if config.compile else nullcontext():
        training = Training(method, data, config, out, checkpoint, about or {})
        training.state.encoder_passes = passes or training.state.encoder_passes
        training.go(report)
    return training.state


class Training:
    """A run on its way: what it works with and how far it is."""

    def __init__(
        self, method: Method, data: Tensor | Clips, config: Config, out: Path, checkpoint: dict | None, about: dict
    ):
        self.method, self.data, self.config, self.out, self.about = method, data, config, out, about
        weight = next(method.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.optimizer = _optimizer(method, config)
        example = data[ranks.share(0, config.batch_size)]
        if checkpoint is None:
            precision = config.precision
            if precision == "auto":
                precision = ranks.of_first(faster_precision(method, example))
            self.state = State(precision)
        else:
            method.load_state_dict(checkpoint["method"])
            self.optimizer.load_state_dict(_as_fused(checkpoint["optimizer"], _fused(config)))
            self.state = State(**checkpoint["state"])
            _set_rng(checkpoint["rng"], self.device)
        if config.compile:
            rehearse(method, example, [self.state.precision])  # to compile is no training
        self.loss_of = ranks.loss_of(method)
        self.pending: list[tuple[Tensor, dict[str, Tensor]]] = []  # the figures of the last steps, on the device

    def go(self, report: Callable[[State, float], None]) -> None:
        """Train to the end."""
        state, progress = self.state, self._progress()
        self.saved = self.clock = time.perf_counter()
        with Stopwatch(self.method.criterion, self.device) as self.stopwatch, _signals() as stop_requested:
            for draws, batch in _batches(self.data, self.config, state.step, self.device):
                if progress >= 1:
                    break
                self._step(draws, batch, progress)
                if state.step % READ_EVERY == 0:
                    self._read()
                self._tick()
                report(state, self._progress())
                due = self.clock - self.saved > self.config.save_every
                stop, due, state.seconds = ranks.agree(stop_requested(), due, state.seconds)
                progress = self._progress()
                if stop and progress < 1:
                    self._save()
                    ranks.wait()
                    raise Interrupted
                if due:
                    self._save()
            state.finished = True
            self._save()

    def _step(self, draws: Draws, batch: Tensor | Clips, progress: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * _cosine_with_warmup(progress)
        with draws:
            views = self.method.views(batch).to(self.dtype)
            if ranks.size() > 1:  # what networks draw, as for dropout
                torch.manual_seed(int(key(self.config.seed, 2, self.state.step, ranks.rank())[0]))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.state.precision == "bf16"):
                loss, stats = self.loss_of(views)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.pending.append((loss.detach(), stats))
        self.state.step += 1
        self.state.samples += self.config.batch_size

    def _progress(self) -> float:
        """The part of the run that is done, by steps or by the clock, in [0, 1]."""
        if self.config.minutes is not None:
            return min(1.0, self.state.seconds / (60 * self.config.minutes))
        assert self.config.epochs is not None  # as `Config.check` leaves it
        steps_per_epoch = len(self.data) // self.config.batch_size
        return min(1.0, self.state.step / (self.config.epochs * steps_per_epoch))

    def _tick(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self.clock
        self.clock = now

    def _read(self) -> None:
        """Fetch the figures of the last steps: at once, since on a GPU a fetch waits for the queued work."""
        state = self.state
        rows = [[loss, *stats.values()] for loss, stats in self.pending]
        if rows:
            figures = torch.stack([x.to(self.dtype) for row in rows for x in row]).view(len(rows), -1).T.tolist()
            state.losses += figures[0]
            for name, values in zip(self.pending[0][1], figures[1:], strict=True):
                state.stats.setdefault(name, []).extend(values)
        self.pending.clear()
        state.loss_seconds += self.stopwatch.read()
        self._tick()
        if state.losses and not math.isfinite(state.losses[-1]):
            raise UsageError(f"the loss became {state.losses[-1]}; try a smaller --lr or a larger --temperature.")

    def _save(self) -> None:
        self._read()
        if ranks.rank() == 0:
            content = {
                "optimizer": self.optimizer.state_dict(),
                "state": dataclasses.asdict(self.state),
                "config": self.config.as_dict(),
                "shape": list(self.data.shape[1:]) if isinstance(self.data, Tensor) else [],
                "rng": _rng(self.device),
                "about": self.about,
            }
            checkpoints.save(self.out, self.method.state_dict(), content)
        self.saved = self.clock = time.perf_counter()  # writing is no training


def _optimizer(method: Method, config: Config) -> torch.optim.Optimizer:
    """Biases and normalisation parameters, the vectors, are not decayed."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, fused=_fused(config))
    if config.optimizer == "lars":
        return LARS(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, fused=_fused(config))


def _fused(config: Config) -> bool | None:
    return True if config.device.startswith("cuda") else None  # a kernel or two for all parameters


def _as_fused(state: dict, fused: bool | None) -> dict:
    """The state of an optimiser, on the device of which it may go on: it brings its own choice along."""
    return state | {"param_groups": [group | {"fused": fused} for group in state["param_groups"]]}


def _cosine_with_warmup(progress: float) -> float:
    """The factor of the learning rate: linear warm-up to 1, then half a cosine to 0 (Loshchilov and Hutter 2017)."""
    if progress < WARMUP:
        return (progress + 0.01) / (WARMUP + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def _batches(
    data: Tensor | Clips, config: Config, step: int, device: torch.device
) -> Iterator[tuple[Draws, Tensor | Clips]]:
    """Batches without end from `step` on, of each the part of this process, with the draws that augment it.

    The order of an epoch depends only on its number and the seed.
    """
    steps_per_epoch = len(data) // config.batch_size  # the uneven rest waits for another order
    while True:
        epoch, first = divmod(step, steps_per_epoch)
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(data), generator=generator)
        if device.type == "cuda":
            order = order.pin_memory()  # else the copy would wait for the steps that are queued
        there = order.to(device, non_blocking=True)
        for number in range(first, steps_per_epoch):
            rows = ranks.share(number * config.batch_size, (number + 1) * config.batch_size)
            yield Draws(config.seed, epoch, number, order[rows]), data[there[rows]]
            step += 1


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Ask for a stop at the next whole step on the first SIGINT or SIGTERM; the second one acts at once."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.getsignal(number)
            signal.signal(number, note)
    except ValueError:  # only the main thread may set handlers; elsewhere the caller's stay
        pass
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is note:
                signal.signal(number, handler)


def _rng(device: torch.device) -> dict[str, Tensor]:
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    return rng


def _set_rng(rng: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(rng["cpu"])
    if device.type == "cuda" and "cuda" in rng:  # else the run comes from another device
        torch.cuda.set_rng_state(rng["cuda"], device)
