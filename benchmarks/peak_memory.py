"""Prints the peak extra memory, in bytes, of one forward and backward; harness.peak_memory starts it as a child.

python benchmarks/peak_memory.py nt_xent sslkern 8192 128 fp32 2
"""

import sys

import problems
import torch
from harness import DTYPES, Step, extra_bytes, step_of


def build_step(name: str, contender: str, n: int, d: int, dtype: str) -> Step:
    problem = getattr(problems, name)(n, d, DTYPES[dtype])
    return step_of(problem.contenders()[contender](), problem.inputs)


def main(name: str, contender: str, n: str, d: str, dtype: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    # Thread pools, code pages and the work of the compiler, which compiles for one size, are no part of the figure.
    warm_up = int(n) if contender.startswith("compiled") else 64
    build_step(name, contender, warm_up, int(d), dtype)()
    print(extra_bytes(build_step(name, contender, int(n), int(d), dtype)))


if __name__ == "__main__":
    main(*sys.argv[1:])
