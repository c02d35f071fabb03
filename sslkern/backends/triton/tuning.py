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
        return json.loads(path(chip).read_text())
    except (OSError, ValueError):
        return {}


def _seconds(step, calls: int = 5) -> float:
    import torch

    step()  # compiles
    times = []
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sslkern.backends.triton.tuning", description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="stop after so long; what was found is kept")
    parser.add_argument("--rows", type=int, default=16384)
    arguments = parser.parse_args()

    import torch

    import sslkern

    from . import MISSING

    if MISSING or not torch.cuda.is_available():
        raise SystemExit(f"tuning needs a GPU: {MISSING or 'torch finds none'}")
    from . import configs, hardware
    from .strategies import STRATEGIES, key, use_strategy

    chip, deadline = hardware.of(torch.device("cuda")), time.monotonic() + arguments.seconds
    found = {"strategy": {}, "config": {}}
    tuned.cache_clear()
    sslkern.use_backend("triton")

    def two_way(D: int):
        q, k = (torch.nn.functional.normalize(torch.randn(arguments.rows, D, device="cuda"), dim=1) for _ in range(2))
        q, k = (x.bfloat16().requires_grad_() for x in (q, k))

        def step():
            row, col = sslkern.ops.similarity_lse(q, k, 10.0, columns=True)
            torch.autograd.grad(row.sum() + col.sum(), (q, k))

        return step

    for D in (128, 512, 256, 1024, 768):
        step = two_way(D)
        for kind in ("forward", "backward"):
            times = {}
            default = configs.choose(kind, torch.bfloat16, D, chip)
            for config in configs.candidates(kind, D, default):
                if time.monotonic() > deadline:
                    break
                name = f"{kind} {key(torch.bfloat16, D)}"
                with configs.force(name, config), use_strategy("fused"):
                    try:
                        times[config] = _seconds(step)
                    except Exception as error:  # too much shared memory, or a compiler that gives up: not this one
                        print(f"{name} {tuple(config)}: {type(error).__name__}")
            if times:
                best = min(times, key=times.get)
                said = ", ".join(f"{tuple(config)} {seconds * 1e3:.3f} ms" for config, seconds in times.items())
                print(f"{kind} D = {D}: {said}")
                if best != default and times[best] < 0.98 * times.get(default, float("inf")):
                    found["config"][f"{kind} {key(torch.bfloat16, D)}"] = list(best)
        if time.monotonic() < deadline:
            times = {}
            for name in STRATEGIES:
                with use_strategy(name):
                    times[name] = _seconds(step)
            found["strategy"][key(torch.bfloat16, D)] = min(times, key=times.get)
            print(f"D = {D}: " + ", ".join(f"{name} {t * 1e3:.3f} ms" for name, t in times.items()))
    file = path(chip)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1))
    part.replace(file)  # whole or not at all, for whoever reads it meanwhile
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
