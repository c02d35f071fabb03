"""Prints the peak extra memory, in bytes, of one forward and backward; harness.peak_memory starts it as a child.

python benchmarks/peak_memory.py nt_xent sslkern 8192 128 fp32 2
"""

import re
import sys
from pathlib import Path

import torch
from baselines import PROBLEMS
from harness import DTYPES, Step, phase_step


def resident_bytes(field: str) -> int:
    """VmRSS: what is resident now. VmHWM: the most that was since the last reset."""
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def build_step(problem: str, contender: str, n: int, d: int, dtype: str) -> Step:
    built = PROBLEMS[problem](n, d, DTYPES[dtype])
    return phase_step(built.contenders[contender], built.inputs)


def main(problem: str, contender: str, n: str, d: str, dtype: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    # Thread pools, code pages and the work of the compiler, which compiles for one size, are no part of the figure.
    warm_up = int(n) if contender.startswith("compiled") else 64
    build_step(problem, contender, warm_up, int(d), dtype)()
    step = build_step(problem, contender, int(n), int(d), dtype)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts at what is resident now
    before = resident_bytes("VmRSS")
    results = step()
    print(resident_bytes("VmHWM") - before)
    del results  # the gradients lived until here, so they count


if __name__ == "__main__":
    main(*sys.argv[1:])
