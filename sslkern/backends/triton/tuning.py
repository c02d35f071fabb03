"""`python -m sslkern.backends.triton.tuning [--seconds 40]`: measures which scheme and tiles are fastest on this GPU.

What it finds is kept by `measured.py` and used from then on. Without it kernels run with the tables of `configs.py` and
the rule of `schemes.py`; nothing is ever measured during a call of a loss.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sslkern

from . import INTERPRETED, MISSING, chips, configs, measured, schemes

_Name = TypeVar("_Name", str, configs.Config)  # of a contender


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sslkern.backends.triton.tuning", description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="stop after so long; what was found is kept")
    parser.add_argument("--rows", type=int, default=16384, help="of each side of the two-way loss that is timed")
    parser.add_argument("--features", type=int, nargs="+", default=[512, 128, 256, 768], help="in this order")
    arguments = parser.parse_args(arguments)
    if MISSING or not (INTERPRETED or torch.cuda.is_available()):
        raise SystemExit(f"tuning needs a GPU: {MISSING or 'torch finds none'}")
    device, deadline = torch.device("cpu" if INTERPRETED else "cuda"), time.monotonic() + arguments.seconds
    with sslkern.use_backend("triton"):
        for D in arguments.features:
            tune(arguments.rows, D, device, deadline)
    print(f"what was found is in {measured.path(chips.of(device))}")


def tune(rows: int, D: int, device: torch.device, deadline: float) -> None:
    """Measures the schemes, and the tiles of the fastest one, and writes what it found."""
    chip, step, name = chips.of(device), _two_way(rows, D, device), measured.key(torch.bfloat16, D)
    found = measured.on(chip)  # what is not measured again stays

    contenders = {scheme: schemes.use_scheme(scheme) for scheme in schemes.SCHEMES}
    scheme = _fastest(f"D = {D}", step, contenders, device, deadline)
    if scheme is None:
        return
    found["scheme"][name] = scheme
    measured.write(chip, found)
    for kind in ("backward" if scheme == "fused" else "weights", "forward"):
        before = found["config"].pop(f"{kind} {name}", None)
        measured.write(chip, found)
        default = configs.choose(kind, torch.bfloat16, D, chip)
        near = configs.candidates(kind, D, default, chip)
        contenders = {config: configs.force(f"{kind} {name}", config) for config in near}
        with schemes.use_scheme(scheme):
            config = _fastest(f"D = {D}, {kind}", step, contenders, device, deadline)
        if config is None:  # there was no time
            config = before
        if config and config != default:
            found["config"][f"{kind} {name}"] = list(config)
            measured.write(chip, found)


def _fastest(
    title: str, step: Callable[[], tuple[Tensor, ...]], contenders: Mapping[_Name, AbstractContextManager],
    device: torch.device, deadline: float,
) -> _Name | None:  # fmt: skip
    """Which of the contenders, {name: what to run within}, is the fastest that agrees with the first; None where fewer
    than two had time."""
    times, expected = {}, None
    for name, around in contenders.items():
        if time.monotonic() > deadline:
            break
        try:
            with around:
                result = step()  # compiles
                expected = expected or result
                for x, y in zip(result, expected, strict=True):
                    torch.testing.assert_close(x, y, rtol=0.02, atol=0.02 * y.abs().max().item())
                times[name] = _seconds(step, device)
        except Exception as error:  # wrong; too much shared memory; a compiler that gives up
            print(f"{title}, {_short(name)}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    said = ", ".join(f"{_short(name)} {seconds * 1e3:.3f} ms" for name, seconds in times.items())
    print(f"{title}: {said or 'no time left'}")
    return min(times, key=times.get) if len(times) > 1 else None


def _short(name: str | configs.Config) -> str:
    return name if isinstance(name, str) else str(tuple(map(int, name)))


def _two_way(rows: int, D: int, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of a two-way loss, as a function that returns log-sum-exps and gradients.

    Beside it, of fewer rows, what the same tiles serve as well: a triangle, ids, one direction with its best scores.
    """
    q, k = (normalize(torch.randn(rows, D, dtype=torch.float32, device=device), dim=1) for _ in range(2))
    q, k = (x.bfloat16().requires_grad_() for x in (q, k))

    few, ids = 4096, torch.arange(rows, device=device) // 2
    some, others = q[:few].detach().requires_grad_(), k[:few].detach().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        row, col = sslkern.ops.similarity_lse(q, k, 10.0, columns=True)
        of_itself = sslkern.ops.similarity_lse(some, scale=10.0, q_ids=ids[:few])
        one_way, best = sslkern.ops.similarity_lse(some, others, 10.0, q_ids=ids[:few], k_ids=ids[:few], best=True)
        total = row.sum() + col.sum() + of_itself.sum() + one_way.sum()
        results = row, col, of_itself, one_way, best
        return *(x.detach() for x in results), *torch.autograd.grad(total, (q, k, some, others))

    return step


def _seconds(step: Callable, device: torch.device, calls: int = 5) -> float:
    times = []
    for _ in range(calls):
        _wait_for(device)
        begun = time.perf_counter()
        step()
        _wait_for(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
