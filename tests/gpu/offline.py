"""Compiles the Triton kernels for chips that are not there, as the launchers would launch them, and looks at the code.

    export PYTHONPATH=.venv/triton-3.6.0   # make .venv/triton-3.6.0
    .venv/bin/python tests/gpu/offline.py --only similarity_lse --arch 90 --dtype bf16 --d 512
    .venv/bin/python tests/gpu/offline.py --all   # everything, into benchmarks/results/offline/triton.{json,md}

The launchers of `sslkern.backends.triton` are called with tensors on torch's meta device, which have shapes but no
memory. Triton is told of a chip by a driver that knows its architecture only, and to compile where it would launch.
"""

import argparse
import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks/results/offline"


class Chip(NamedTuple):
    processors: int
    shared: int  # bytes of shared memory that a program can have
    shared_of_processor: int  # of which each program on it takes 1 KB for the system


CHIPS = {80: Chip(108, 163 << 10, 164 << 10), 90: Chip(132, 227 << 10, 228 << 10), 100: Chip(148, 227 << 10, 228 << 10)}
"""A100, H100, B200."""

MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCMMA"}
"""The matrix instructions of 16-bit types that each of them is fast with; the later ones know those before, slowly."""

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "tf32": "float32"}


# ---- what is compiled ------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    primitive: str
    name: str
    call: Callable  # of the primitive's module and `Inputs`


CASES: list[Case] = []


def case(primitive: str):
    def register(call):
        CASES.append(Case(primitive, call.__name__, call))
        return call

    return register


class Inputs(NamedTuple):
    """Makes tensors without memory, and problems of them."""

    dtype: object
    D: int

    def features(self, *rows):
        return self.new(*rows, self.D, dtype=self.dtype)

    @staticmethod
    def floats(*shape):
        return Inputs.new(*shape, dtype="float32")

    @staticmethod
    def integers(*shape):
        return Inputs.new(*shape, dtype="int64")

    @staticmethod
    def new(*shape, dtype):
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    @staticmethod
    def problem(*tensors, **options):
        from sslkern.backends.problem import Problem

        return Problem(*tensors, **options)


@case("similarity_lse")
def nt_xent(f, new):
    of_itself(f, new, 65536)


@case("similarity_lse")
def two_way(f, new):
    """CLIP, whose scale learns."""
    q, k, ids, vector = new.features(32768), new.features(32768), new.integers(32768), new.floats(32768)
    problem = new.problem(q, k, new.floats(), q_ids=ids, k_ids=ids)
    f.similarity_lse_fwd(problem, True, False, 0)
    f.similarity_lse_bwd(problem, vector, vector, vector, vector, None, True, True, True, False)


@case("similarity_lse")
def one_way(f, new):
    """Some rows against many keys, with accuracy."""
    q, k, row = new.features(4096), new.features(16384), new.floats(4096)
    problem = new.problem(q, k, scale=2.0, q_ids=new.integers(4096), k_ids=new.integers(16384))
    f.similarity_lse_fwd(problem, False, True, 0)
    f.similarity_lse_bwd(problem, row, None, row, None, None, True, True, False, False)


@case("similarity_lse")
def small(f, new):
    of_itself(f, new, 256)


def of_itself(f, new, N):
    problem, vector = new.problem(new.features(N), scale=2.0, q_ids=new.integers(N)), new.floats(N)
    f.similarity_lse_fwd(problem, False, False, 0)
    f.similarity_lse_bwd(problem, vector, None, vector, None, None, True, False, False, False)


@case("similarity_lse")
def biased(f, new):
    """Everything at once: groups, positives by id, a bias that learns, limits."""
    q, k = new.features(4, 1000), new.features(4, 3000)
    row, col = new.floats(4, 1000), new.floats(4, 3000)
    ids = dict(q_ids=new.integers(4, 1000), k_ids=new.integers(4, 3000), same=True)
    problem = new.problem(q, k, new.floats(), **ids, k_bias=col, q_limit=row)
    f.similarity_lse_fwd(problem, True, True, 0)
    f.similarity_lse_bwd(problem, row, col, row, col, None, True, True, True, True)


@case("similarity_lse")
def frozen(f, new):
    """MoCo."""
    f.similarity_lse_frozen_fwd(new.problem(new.features(256), new.features(65536), scale=5.0), True)


@case("similarity_softplus")
def siglip(f, new):
    q, k, ids, row = new.features(32768), new.features(32768), new.integers(32768), new.floats(32768)
    problem = new.problem(q, k, new.floats(), q_ids=ids, k_ids=ids)
    f.similarity_softplus_fwd(problem, row, row, 1.0, True, True, True, True, False)


@case("similarity_softplus")
def softplus_of_itself(f, new):
    problem = new.problem(new.features(32768), scale=2.0, q_ids=new.integers(32768))
    f.similarity_softplus_fwd(problem, None, None, 1.0, True, *(False,) * 4)


@case("similarity_softplus")
def softplus_rows(f, new):
    q, k, ids = new.features(4096), new.features(16384), new.integers(4096)
    problem = new.problem(q, k, scale=2.0, q_ids=ids, k_ids=new.integers(16384), same=True)
    f.similarity_softplus_fwd(problem, None, None, -1.0, *(False,) * 5)


@case("similarity_topk")
def neighbours(f, new):
    """kNN evaluation."""
    f.similarity_topk_fwd(new.problem(new.features(10000), new.features(50000)), 20)


@case("similarity_topk")
def hard_negatives(f, new):
    ids, limit = new.integers(8192), new.floats(8192)
    f.similarity_topk_fwd(new.problem(new.features(8192), q_ids=ids, q_limit=limit), 16)


@case("sampled_similarity")
def memory_bank(f, new):
    q, bank, index = new.features(256), new.features(50000), new.integers(256, 16384)
    f.sampled_similarity_fwd(q, bank, index)
    f.sampled_similarity_bwd(q, bank, index, new.floats(256, 16384), True, False)


@case("sampled_similarity")
def sampled_negatives(f, new):
    """CPC, whose candidates learn."""
    q, bank, index = new.features(8, 1000), new.features(8, 1000), new.integers(8, 1000, 100)
    f.sampled_similarity_fwd(q, bank, index)
    f.sampled_similarity_bwd(q, bank, index, new.floats(8, 1000, 100), True, True)


@case("queue_push")
def push(f, new):
    f.queue_push_(new.features(65536), new.integers(1), new.features(256), True)


@case("bank_update")
def update(f, new):
    f.bank_update_(new.features(50000), new.integers(256), new.features(256), 0.5)


@case("unit_pairs")
def pairs(f, new):
    x, half = new.features(4096), new.floats(4096)
    f.unit_pairs_fwd(x, x, True)
    wide = new.floats(4096, new.D)
    f.unit_pairs_bwd(new.features(8192), new.floats(8192), half, wide, wide, True, True)


@case("pair_losses")
def losses(f, new):
    row, cosine, scale = new.floats(8192), new.floats(8192), new.floats()
    for first, second in ((row, row), (row, None), (new.floats(16384), None)):
        _, _, gap = f.pair_losses_fwd(first, second, cosine, scale, 1.0, False)
        f.pair_losses_bwd(gap, scale.expand_as(gap), scale, 1.0)


SPECIALISED = ("nt_xent", "two_way", "one_way")  # whose kernels tuning may give warps of their own for loads


class Job(NamedTuple):
    primitive: str
    case: str
    dtype: str
    D: int
    arch: int

    def __str__(self):
        return f"{self.primitive}/{self.case} {self.dtype} D={self.D} sm_{self.arch}"


SIZES = {"bf16": (33, 128, 256, 512, 768, 2048)} | dict.fromkeys(("fp16", "fp32", "tf32"), (128, 512))


def job_of(row: dict) -> Job:
    return Job(*(row[name] for name in Job._fields))


def jobs(only: str = "", dtypes: Iterable[str] = DTYPES, sizes: Iterable[int] = (), archs: Iterable[int] = CHIPS):
    """Everything, or `only` what has this in its primitive/case; these sizes, or those usual for a dtype."""
    return [
        Job(primitive, name, dtype, D, arch)
        for primitive, name, _ in CASES
        if only in f"{primitive}/{name}"
        for dtype in dtypes
        if dtype != "tf32" or primitive.startswith("similarity")  # the others have no products
        for D in sizes or SIZES[dtype]
        for arch in archs
    ]


# ---- how -------------------------------------------------------------------------------------------------------------


class Driver:
    """What Triton asks of a driver until it launches. Each architecture is a device: that keeps their kernels apart."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)
        properties = {"max_shared_mem": CHIPS[arch].shared, "multiprocessor_count": CHIPS[arch].processors}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


_compiled: list[tuple] = []  # (kernel, what ptxas said) since this was emptied last


@functools.cache
def _prepare() -> None:
    """Once in a process: kernels are compiled and noted instead of launched."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/triton"))
    from triton import knobs
    from triton.runtime.jit import JITFunction

    from sslkern.backends.triton import INTERPRETED

    assert not INTERPRETED, "the interpreter does not compile: unset TRITON_INTERPRET"
    knobs.nvidia.dump_ptxas_log = True
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        _compiled.append((kernel, said.getvalue()))
        return kernel

    JITFunction.run = compile_only


def compile_job(job: Job, every: bool) -> list[dict]:
    """A row for each kernel that the job launches, or one with an `error`. every: bf16, by which tuning decides, also
    in the ways that the rule does not take."""
    _prepare()
    import torch
    from triton.runtime import driver

    from sslkern.backends.triton import chips, configs, measured, schemes

    chip = chips.Chip(job.arch, CHIPS[job.arch].processors)
    chips.of = lambda device: chip
    driver.set_active(Driver(job.arch))
    torch.set_float32_matmul_precision("high" if job.dtype == "tf32" else "highest")
    _compiled.clear()
    call = next(case.call for case in CASES if case[:2] == job[:2])
    error = None
    try:
        module = importlib.import_module(f"sslkern.backends.triton.{job.primitive}")
        for name in ("rule", *schemes.SCHEMES) if every and job.dtype == "bf16" else ("rule",):
            with contextlib.ExitStack() as stack:
                if name != "rule":
                    stack.enter_context(schemes.use_scheme(name))
                call(module, Inputs(DTYPES[job.dtype], job.D))
                if every and job.case in SPECIALISED and job.arch >= 100 and job.dtype == "bf16":
                    for kind in ("forward", "backward", "weights"):
                        near = configs.candidates(kind, job.D, configs.choose(kind, torch.bfloat16, job.D, chip), chip)
                        config = next((config for config in near if config.specialised), near[0])
                        tiles = f"{kind} {measured.key(torch.bfloat16, job.D)}"
                        stack.enter_context(configs.force(tiles, config))
                    call(module, Inputs(DTYPES[job.dtype], job.D))
    except Exception:
        error = traceback.format_exc()
    kernels = {kernel.hash: (kernel, said) for kernel, said in reversed(_compiled)}  # ptxas speaks the first time only
    rows = [job._asdict() | inspect(kernel, said, job.arch) for kernel, said in reversed(kernels.values())]
    return rows + ([job._asdict() | {"kernel": "?", "error": error}] if error else [])


def compile_all(todo: list[Job], processes: int = 2, every: bool = False) -> Iterable[dict]:
    """Rows as they come, each kernel of an architecture once."""
    # Neighbours share kernels and the time to read them; fresh processes know nothing of this one's driver.
    seen = set()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for rows in pool.map(functools.partial(compile_job, every=every), todo):
            for row in rows:
                if "error" in row or row["hash"] not in seen:
                    seen.add(row.get("hash"))
                    yield row


# ---- what the code is like -------------------------------------------------------------------------------------------


def inspect(kernel, said: str, arch: int) -> dict:
    """Resources and instructions of a kernel, which are kept beside it: to disassemble takes as long as to compile."""
    kept = Path(os.environ["TRITON_CACHE_DIR"]) / f"inspected-{kernel.hash}.json"
    try:
        return json.loads(kept.read_text())
    except FileNotFoundError:
        pass
    used, sass = _disassemble(kernel.asm["cubin"], kernel.hash)
    products = re.findall(r"tt\.dot .*?(tf32)?(?:x3)? : tensor<\w+x(\w+)> \*", kernel.asm["ttir"])
    threads = int(re.search(r"\.(?:req|max)ntid (\d+)", kernel.asm["ptx"])[1])
    opcodes = re.findall(r"^\s+(?:/\*\w+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", sass, re.M)

    def count(pattern: str) -> int:
        return sum(re.match(pattern, opcode) is not None for opcode in opcodes)

    row = {
        "kernel": kernel.name,
        "hash": kernel.hash,
        "products": sorted({tf32 or dtype for tf32, dtype in products}),
        "registers": used["REG"],
        "stack": used["STACK"],
        "spills": count("STL"),
        "shared": kernel.metadata.shared,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0,
        "threads": threads,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "HMMA": count("HMMA"),
        "HGMMA": count("HGMMA"),
        "UTCMMA": count("UTC.*MMA"),
        "FFMA": count("FFMA"),
        "EX2": count(r"MUFU\.EX2"),
        "TMA": count("UTMALDG"),
        "LDGSTS": count("LDGSTS"),
        "LDG128": count(r"LDG\..*128"),
        "instructions": len(opcodes),
        # ptxas could not leave several matrix products under way, which costs Hopper most of their speed
        "serialized": "wgmma.mma_async instructions are serialized" in said,
    }
    row["programs"] = _resident(row, CHIPS[arch])
    kept.write_text(json.dumps(row))
    return row


def _disassemble(cubin: bytes, name: str) -> tuple[dict, str]:
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    file = Path(os.environ["TRITON_CACHE_DIR"]) / f"{name}-{os.getpid()}.cubin"
    file.write_bytes(cubin)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    try:
        usage, sass = (
            subprocess.run([tools / tool, *args, file], env=environment, capture_output=True, text=True, check=True)
            for tool, *args in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    finally:
        file.unlink()
    line = next(line for line in usage.stdout.splitlines() if "REG:" in line)
    return {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}, sass.stdout


def _resident(row: dict, chip: Chip) -> int:
    """Programs that fit on a processor at a time."""
    registers = -(-row["registers"] // 8) * 8 * row["threads"]
    limits = [
        65536 // registers,
        chip.shared_of_processor // (row["shared"] + 1024),
        2048 // row["threads"],
        *([512 // row["tensor_memory"]] if row["tensor_memory"] else []),
    ]
    return min(limits)


def complaints(row: dict) -> list[str]:
    """What must not be."""
    if "error" in row:
        return [row["error"].strip().splitlines()[-1]]
    found = []
    if row["stack"] or row["spills"]:
        found.append(f"spills ({row['spills']} stores, {row['stack']} bytes of stack)")
    if row["shared"] > CHIPS[row["arch"]].shared:
        found.append(f"needs {row['shared']} bytes of shared memory")
    if row["programs"] == 0:
        found.append("fits on no processor")
    if {"bf16", "f16"} & set(row["products"]) and not row[MATRIX[row["arch"]]]:
        found.append(f"has no {MATRIX[row['arch']]}")
    if "tf32" in row["products"] and not any(row[name] for name in MATRIX.values()):
        found.append("has no matrix instruction")
    if row["serialized"]:
        found.append("waits for each matrix product (serialized)")
    return found


# ---- tables ----------------------------------------------------------------------------------------------------------

COLUMNS = (
    "arch", "primitive", "case", "dtype", "D", "kernel", "registers", "spills", "stack", "shared", "tensor_memory",
    "warps", "stages", "programs", "HMMA", "HGMMA", "UTCMMA", "FFMA", "EX2", "TMA", "LDGSTS", "LDG128", "instructions",
)  # fmt: skip

HEADER = """# Triton kernels, compiled without a GPU

`make triton-offline` wrote this with Triton {version}: no GPU was involved and no time was measured. It is what
`tests/gpu/test_triton_offline.py` checks: nothing spills, shared memory suffices, and products of 16-bit types use the
matrix instructions of their architecture.

A row is a kernel as the case first launches it (the same code may serve later cases, too); tf32 is fp32 under
`torch.set_float32_matmul_precision("high")`. registers: for each thread. spills, stack: stores to local memory, and
bytes of it for each thread. shared: bytes for each program. tensor_memory: columns of it. programs: how many fit on a
processor at a time. HMMA, HGMMA (wgmma), UTCMMA (tcgen05): matrix instructions in the code, FFMA those of true fp32.
EX2: exponentials. TMA, LDGSTS (cp.async), LDG128: loads by tensor descriptor, asynchronous, and of 16 bytes.

{complaints}

"""


def table(rows: list[dict], columns=COLUMNS, markdown: bool = True) -> str:
    cells = [list(columns)] + [[str(row.get(name, "")) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    if markdown:
        lines = ["| " + " | ".join(line) + " |" for line in cells]
        lines.insert(1, "| " + " | ".join("---" for _ in columns) + " |")
    return "\n".join(lines)


def write(rows: list[dict]) -> None:
    import triton

    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = sorted((row for row in rows if "error" not in row), key=lambda row: [row[name] for name in COLUMNS[:6]])
    kept = [{name: value for name, value in row.items() if name not in ("hash", "threads")} for row in rows]
    lines = ",\n".join(json.dumps(row) for row in kept)
    (RESULTS / "triton.json").write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')
    bad = [f"- {row['kernel']} of {job_of(row)}: {', '.join(complaints(row))}"
           for row in rows if complaints(row)]  # fmt: skip
    said = "\n".join(["What is not so:", "", *bad]) if bad else "All of it holds for every row."
    text = HEADER.format(version=triton.__version__, complaints=said) + table(rows) + "\n"
    (RESULTS / "triton.md").write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="what the name primitive/case must contain")
    parser.add_argument("--arch", type=int, action="append", choices=list(CHIPS), help="default: all three")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="default: bf16")
    parser.add_argument("--d", type=int, action="append", help="default: 128 and 512")
    parser.add_argument("--all", action="store_true", help="all cases, dtypes and sizes, and write the results")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.all:
        todo = jobs(options.only)
    else:
        todo = jobs(options.only, options.dtype or ["bf16"], options.d or [128, 512], options.arch or CHIPS)
    rows = []
    for row in compile_all(todo, options.processes, options.all):
        rows.append(row)
        if "error" in row:
            print(row["error"], file=sys.stderr)
    if options.all and not options.only:
        write(rows)
    else:
        print(table(rows, [name for name in COLUMNS if name != "primitive"], markdown=False))
    bad = [row for row in rows if complaints(row)]
    for row in bad:
        print(f"{row['kernel']} of {job_of(row)}: {', '.join(complaints(row))}")
    print(f"{len(rows)} kernels, {len(bad)} not as they must be")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
