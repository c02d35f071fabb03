"""The training loop that every method shares: batches from memory, a cosine schedule, checkpoints, a progress line.

A run of `--epochs` is a function of its configuration: with the same precision and the same number of threads it ends
at the same bits, interrupted and resumed or not. A run of `--minutes` follows the clock and cannot promise that. Over
several processes (`ranks.py`) the sums of a run have another order and nothing else changes.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ssltrain import UsageError, ranks
from ssltrain.config import Config
from ssltrain.draws import Draws, key
from ssltrain.speech import Clips

WARMUP = 0.05  # of the schedule
READ_EVERY = 10  # steps
CHECKPOINT = "checkpoint.pt"


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

    @property
    def samples_per_s(self) -> float:
        return self.samples / max(self.seconds, 1e-9)

    @property
    def loss_share(self) -> float:
        return self.loss_seconds / max(self.seconds, 1e-9)


class Interrupted(Exception):
    """The run was stopped by a signal, after its checkpoint was written."""


def train(
    method: nn.Module,
    data: Tensor | Clips,
    config: Config,
    out: Path,
    checkpoint: dict | None = None,
    report: Callable[[State, float], None] = lambda state, progress: None,
    about: dict | None = None,
) -> State:
    """Train `method` in place on `data`, images uint8 [N, C, H, W] or clips, and leave its last checkpoint in `out`.

    `checkpoint`, from `load_checkpoint`, continues that run. `report(state, progress)` is called after every step,
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
    ranks.synchronise(method, device)
    with _compiled(method) if config.compile else nullcontext():
        return _train(method, data, config, out, checkpoint, report, about or {})


def _train(
    method: nn.Module,
    data: Tensor | Clips,
    config: Config,
    out: Path,
    checkpoint: dict | None,
    report: Callable[[State, float], None],
    about: dict,
) -> State:
    weight = next(method.parameters())
    device, dtype = weight.device, weight.dtype
    shape = list(data.shape[1:]) if isinstance(data, Tensor) else []
    optimizer = _optimizer(method, config)
    if checkpoint is None:
        precision = config.precision
        if precision == "auto":
            precision = ranks.of_first(faster_precision(method, data[ranks.share(0, config.batch_size)]))
        state = State(precision)
    else:
        method.load_state_dict(checkpoint["method"])
        optimizer.load_state_dict(_as_fused(checkpoint["optimizer"], _fused(config)))
        state = State(**checkpoint["state"])
        _set_rng(checkpoint["rng"], device)
    if config.compile:
        rehearse(method, data[ranks.share(0, config.batch_size)], [state.precision])  # to compile is no training
    loss_of = ranks.loss_of(method)

    pending: list[tuple[Tensor, dict[str, Tensor]]] = []

    def read() -> None:
        """Fetch the figures of the last steps: at once, since on a GPU a fetch waits for the queued work."""
        rows = [[loss, *stats.values()] for loss, stats in pending]
        figures = torch.stack([x.to(dtype) for row in rows for x in row]).tolist() if rows else []
        names = list(pending[0][1]) if rows else []
        state.losses += figures[:: 1 + len(names)]
        for place, name in enumerate(names, 1):
            state.stats.setdefault(name, []).extend(figures[place :: 1 + len(names)])
        pending.clear()
        state.loss_seconds += stopwatch.read()
        tick()
        if state.losses and not math.isfinite(state.losses[-1]):
            raise UsageError(f"the loss became {state.losses[-1]}; try a smaller --lr or a larger --temperature.")

    def tick() -> None:
        nonlocal clock
        now = time.perf_counter()
        state.seconds, clock = state.seconds + now - clock, now

    def save() -> None:
        nonlocal saved, clock
        read()
        if ranks.rank() == 0:
            save_checkpoint(out, method, optimizer, state, config, shape, device, about)
        saved = clock = time.perf_counter()  # writing is no training

    steps_per_epoch = len(data) // config.batch_size
    progress = _progress(state, config, steps_per_epoch)
    saved = clock = time.perf_counter()
    with Stopwatch(method.criterion, device) as stopwatch, _signals() as stop_requested:
        for draws, batch in _batches(data, config, state.step, device):
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _cosine_with_warmup(progress)
            with draws:
                views = method.views(batch).to(dtype)
            if ranks.size() > 1:  # what networks draw, as for dropout
                torch.manual_seed(int(key(config.seed, 2, state.step, ranks.rank())[0]))
            with torch.autocast(device.type, torch.bfloat16, enabled=state.precision == "bf16"):
                loss, stats = loss_of(views)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

            pending.append((loss.detach(), stats))
            state.step += 1
            state.samples += config.batch_size
            if state.step % READ_EVERY == 0:
                read()
            tick()
            report(state, _progress(state, config, steps_per_epoch))
            stop, due, state.seconds = ranks.agree(stop_requested(), clock - saved > config.save_every, state.seconds)
            progress = _progress(state, config, steps_per_epoch)
            if stop and progress < 1:
                save()
                ranks.wait()
                raise Interrupted
            if due:
                save()
        state.finished = True
        save()

    return state


def _optimizer(method: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Biases and normalisation parameters, the vectors, are not decayed."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, fused=_fused(config))
    return torch.optim.AdamW(groups, lr=config.lr, fused=_fused(config))


def _fused(config: Config) -> bool | None:
    return True if config.device.startswith("cuda") else None  # a kernel or two for all parameters


def _as_fused(state: dict, fused: bool | None) -> dict:
    """The state of an optimiser, on the device of which it may go on: it brings its own choice along."""
    return state | {"param_groups": [group | {"fused": fused} for group in state["param_groups"]]}


def _progress(state: State, config: Config, steps_per_epoch: int) -> float:
    """The part of the run that is done, by steps or by the clock, in [0, 1]."""
    if config.epochs is not None:
        return min(1.0, state.step / (config.epochs * steps_per_epoch))
    return min(1.0, state.seconds / (60 * config.minutes))


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


def faster_precision(method: nn.Module, batch: Tensor | Clips, trials: int = 5) -> str:
    """`bf16` if a training step under bf16 autocast is at least a tenth faster than in fp32 on this device, by trial.

    The best of the trials counts, since other programs only ever add time.
    """
    times = rehearse(method, batch, ("fp32", "bf16"), trials)
    return "bf16" if min(times["bf16"]) < 0.9 * min(times["fp32"]) else "fp32"


def rehearse(
    method: nn.Module, batch: Tensor | Clips, precisions: Sequence[str], trials: int = 0
) -> dict[str, list[float]]:
    """Seconds of some forward and backward passes, by precision, after one of each that warms up, and may compile.

    The method and the random state are left as they were.
    """
    before = copy.deepcopy(method.state_dict())
    weight = next(method.parameters())
    device = weight.device
    times: dict[str, list[float]] = {precision: [] for precision in precisions}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        views = method.views(batch).to(weight.dtype)
        for trial in range(trials + 1):
            for precision, measured in times.items():
                start = time.perf_counter()
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    loss, _ = method.loss(views)
                loss.backward()
                loss.item()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if trial > 0:
                    measured.append(time.perf_counter() - start)
    method.zero_grad(set_to_none=True)
    method.load_state_dict(before)
    return times


@contextmanager
def _compiled(method: nn.Module) -> Iterator[None]:
    """Meanwhile the `networks` of a method are compiled: as functions, so that no name in a checkpoint changes."""
    from torch._dynamo.exc import TorchDynamoException  # a second to import

    def impossible(error: Exception) -> UsageError:
        cause = getattr(error, "inner_exception", error)  # what the compiler itself said
        reason = (str(cause).strip() or type(cause).__name__).partition("\n")[0].rstrip(".")
        return UsageError(f"--compile: torch.compile cannot compile the networks here ({reason}); leave it out.")

    try:
        compiled = {name: torch.compile(getattr(method, name), dynamic=False) for name in method.networks}
    except RuntimeError as error:  # not for this Python or system
        raise impossible(error) from error
    vars(method).update(compiled)
    try:
        yield
    except TorchDynamoException as error:
        raise impossible(error) from error
    finally:
        for name in compiled:
            del vars(method)[name]


class Stopwatch:
    """Seconds spent in a module, forward and backward, by hooks; on a GPU by events, without waiting for it."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.device = device
        self.marks: list = []
        self.hooks = [
            module.register_forward_pre_hook(self._mark),
            module.register_forward_hook(self._mark),
            module.register_full_backward_pre_hook(self._mark),
            module.register_full_backward_hook(self._mark),
        ]

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *exception) -> None:
        for hook in self.hooks:
            hook.remove()

    def _mark(self, *_) -> None:
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record(torch.cuda.current_stream(self.device))
        else:
            mark = time.perf_counter()
        self.marks.append(mark)

    def read(self) -> float:
        """Seconds since the last reading."""
        marks, self.marks = self.marks, []
        pairs = zip(marks[::2], marks[1::2], strict=True)
        if self.device.type == "cuda":
            if marks:
                marks[-1].synchronize()
            return sum(a.elapsed_time(b) for a, b in pairs) / 1e3
        return sum(b - a for a, b in pairs)


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Ask for a stop at the next whole step on the first SIGINT or SIGTERM; the second one acts at once."""
    received: list[int] = []
    previous: dict[int, object] = {}

    def note(number: int, frame) -> None:
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


def save_checkpoint(
    out: Path,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    config: Config,
    shape: list[int],
    device: torch.device,
    about: dict,
) -> None:
    """Write a checkpoint into the folder `out`; a kill at any moment leaves the old one or the new one.

    The weights come first, in a file of a new name; replacing checkpoint.pt, which names it, makes them count.
    """
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    weights = f"weights-{secrets.token_hex(4)}.safetensors"
    content = {
        "weights": weights,
        "optimizer": optimizer.state_dict(),
        "state": dataclasses.asdict(state),
        "config": config.as_dict(),
        "shape": shape,
        "rng": rng,
        "about": about,
    }
    with replacing(out / weights) as file:
        file.write(safetensors.torch.save({name: x.contiguous() for name, x in method.state_dict().items()}))
    with replacing(out / CHECKPOINT) as file:
        torch.save(content, file)
    for old in out.glob("weights-*.safetensors*"):
        if old.name != weights:
            old.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """A file that takes the place of `path` once it is written whole and lies on the disk."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load_checkpoint(out: Path) -> dict | None:
    """The checkpoint in the folder `out`, on the CPU, or None; raises `UsageError` if it cannot be read."""
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        method = safetensors.torch.load_file(out / Path(checkpoint["weights"]).name)
        about = {"about": checkpoint.get("about", {})}  # earlier versions had none
        keys = ("optimizer", "state", "config", "shape", "rng")
        return {"method": method} | {key: checkpoint[key] for key in keys} | about
    except Exception as error:  # unpickling a foreign or damaged file may raise nearly anything
        raise UsageError(
            f"--out {out}: {path.name} is no checkpoint that can be read; choose another folder."
        ) from error


def _set_rng(rng: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(rng["cpu"])
    if device.type == "cuda" and "cuda" in rng:  # else the run comes from another device
        torch.cuda.set_rng_state(rng["cuda"], device)
