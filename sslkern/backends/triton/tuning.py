"""`python -m sslkern.backends.triton.tuning [--seconds 40]`: measures which strategy and tiles are fastest on this GPU.

What it finds is kept in a file for each kind of GPU, below $SSLKERN_CACHE (default: ~/.cache/sslkern), and is used
from then on. Without it kernels run with the tables of `configs.py` and the rule of `strategies.py`; nothing is ever
measured during a call of a loss.
"""

import argparse
import functools
import json
import os
import re
import statistics
import time
from pathlib import Path

from .hardware import Hardware


def path(chip: Hardware) -> Path:
    folder = Path(os.environ.get("SSLKERN_CACHE") or Path.home() / ".cache/sslkern")
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', chip.name) or 'unknown'}.json"


@functools.cache
def tuned(chip: Hardware) -> dict:
    """What was measured on this kind of GPU: {"strategy": {"bfloat16 128": "fused"}, "config": {"forward bfloat16 128":
    [..]}}, empty where nothing was or the file cannot be read."""
    if not chip.name:
        return {}
    try:
        found = json.loads(path(chip).read_text())
        return {name: dict(found.get(name, {})) for name in ("strategy", "config")}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sslkern.backends.triton.tuning", description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="stop after so long; what was found is kept")
    parser.add_argument("--rows", type=int, default=16384, help="of each side of the two-way loss that is timed")
    parser.add_argument("--features", type=int, nargs="+", default=[512, 128, 256, 768], help="in this order")
    arguments = parser.parse_args(arguments)

    import torch

    import sslkern

    from . import INTERPRETED, MISSING, hardware

    if MISSING or not (INTERPRETED or torch.cuda.is_available()):
        raise SystemExit(f"tuning needs a GPU: {MISSING or 'torch finds none'}")
    device, deadline = torch.device("cpu" if INTERPRETED else "cuda"), time.monotonic() + arguments.seconds
    with sslkern.use_backend("triton"):
        for D in arguments.features:
            tune(arguments.rows, D, device, deadline)
    print(f"what was found is in {path(hardware.of(device))}")


def tune(rows: int, D: int, device, deadline: float) -> None:
    """Measures the strategies, and the tiles of the best one, and writes what it found."""
    from torch import bfloat16

    from . import configs, hardware
    from .strategies import STRATEGIES, key, use_strategy

    chip, step, name = hardware.of(device), _two_way(rows, D, device), key(bfloat16, D)
    found = {"strategy": {}, "config": {}} | tuned(chip)  # what is not measured again stays

    best = _fastest(f"D = {D}", step, {x: use_strategy(x) for x in STRATEGIES}, device, deadline)
    if best is None:
        return
    found["strategy"][name] = best
    write(chip, found)
    for kind in ("backward" if best == "fused" else "weights", "forward"):
        before = found["config"].pop(f"{kind} {name}", None)
        write(chip, found)
        default = configs.choose(kind, bfloat16, D, chip)
        near = configs.candidates(kind, D, default, chip)
        contenders = {config: configs.force(f"{kind} {name}", config) for config in near}
        with use_strategy(best):
            config = _fastest(f"D = {D}, {kind}", step, contenders, device, deadline)
        best_tiles = before if config is None else None if config == default else list(config)
        if best_tiles:
            found["config"][f"{kind} {name}"] = best_tiles
            write(chip, found)


def _fastest(title: str, step, contenders: dict, device, deadline: float):
    """Which of the contenders, {name: what to run within}, is the fastest that agrees with the first; None where fewer
    than two had time."""
    import torch

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


def _short(name) -> str:
    return name if isinstance(name, str) else str(tuple(map(int, name)))


def _two_way(rows: int, D: int, device):
    """Forward and backward of a two-way loss, as a function that returns log-sum-exps and gradients.

    Beside it, of fewer rows, what the same tiles serve as well: a triangle, ids, one direction with its best scores.
    """
    import torch

    import sslkern

    q, k = (
        torch.nn.functional.normalize(torch.randn(rows, D, dtype=torch.float32, device=device), dim=1) for _ in range(2)
    )
    q, k = (x.bfloat16().requires_grad_() for x in (q, k))

    few, ids = 4096, torch.arange(rows, device=device) // 2
    some, others = q[:few].detach().requires_grad_(), k[:few].detach().requires_grad_()

    def step():
        row, col = sslkern.ops.similarity_lse(q, k, 10.0, columns=True)
        of_itself = sslkern.ops.similarity_lse(some, scale=10.0, q_ids=ids[:few])
        one_way, best = sslkern.ops.similarity_lse(some, others, 10.0, q_ids=ids[:few], k_ids=ids[:few], best=True)
        total = row.sum() + col.sum() + of_itself.sum() + one_way.sum()
        results = row, col, of_itself, one_way, best
        return *(x.detach() for x in results), *torch.autograd.grad(total, (q, k, some, others))

    return step


def _seconds(step, device, calls: int = 5) -> float:
    import torch

    times = []
    for _ in range(calls):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def write(chip: Hardware, found: dict) -> None:
    """Whole or not at all, for whoever reads it meanwhile, and each time that something was found."""
    file = path(chip)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1))
    part.replace(file)
    tuned.cache_clear()


if __name__ == "__main__":
    from sslkern.backends.triton import tuning  # the module that the launchers ask, not this copy of it

    tuning.main()
