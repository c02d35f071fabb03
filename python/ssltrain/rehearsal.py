"""What is tried or compiled before a training starts, which leaves the method as it was."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssltrain import UsageError
from ssltrain.draws import Draws
from ssltrain.methods._method import Method
from ssltrain.patches import Patches
from ssltrain.speech import Clips


def faster_precision(method: Method, batch: Tensor | Clips, trials: int = 5) -> str:
    """`bf16` if a training step under bf16 autocast is at least a tenth faster than in fp32 on this device, by trial.

    The best of the trials counts, since other programs only ever add time.
    """
    times = rehearse(method, batch, ("fp32", "bf16"), trials)
    return "bf16" if min(times["bf16"]) < 0.9 * min(times["fp32"]) else "fp32"


def rehearse(
    method: Method, batch: Tensor | Clips, precisions: Sequence[str], trials: int = 0
) -> dict[str, list[float]]:
    """Seconds of some forward and backward passes, by precision, after one of each that warms up, and may compile.

    The method and the random state are left as they were. The samples pass for the first of the training set.
    """
    before = copy.deepcopy(method.state_dict())
    weight = next(method.parameters())
    device = weight.device
    times: dict[str, list[float]] = {precision: [] for precision in precisions}
    draws = Draws(seed=0, epoch=0, batch=0, rows=torch.arange(len(batch)))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), draws:
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


@torch.no_grad()
def encoder_passes(method: Method, batch: Tensor | Clips) -> float:
    """How often a sample of training goes forward through the encoder, or another one, by what convolutions multiply.

    Two views are two passes; those of a momentum encoder count, and a patch of an image for its part of it: where the
    encoder sees patches, a pass is that of its network over the whole image. The method and the random state are left
    as they were.
    """
    before = copy.deepcopy(method.state_dict())
    weight = next(method.parameters())
    whole = next((part.network for part in method.encoder.modules() if isinstance(part, Patches)), method.encoder)
    counted = [0]

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            counted[-1] += output.numel() * module.weight[0].numel()

    hook = nn.modules.module.register_module_forward_hook(count)
    draws = Draws(seed=0, epoch=0, batch=0, rows=torch.arange(len(batch)))
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []), draws:
        try:
            views = method.views(batch).to(weight.dtype)
            method.loss(views)
            counted.append(0)
            whole(batch.to(weight.dtype) / 255 if isinstance(batch, Tensor) else views)
        finally:
            hook.remove()
    method.load_state_dict(before)
    return counted[0] / max(counted[1], 1)


@contextmanager
def compiled(method: Method) -> Iterator[None]:
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
