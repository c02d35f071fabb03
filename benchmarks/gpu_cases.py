"""What `benchmarks/gpu.py` measures: the cases in their order, who takes part in each, and the goals.

The problems and their contenders are those of problems.py.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple
from unittest import mock

import problems
import torch
from harness import DTYPES, OURS
from problems import KERNELS, Factory, Problem

import sslkern
from sslkern import backends
from sslkern.backends import BACKENDS, load

COPY, COPY_BYTES = "copy of 2 GiB", 2**32  # read and written
CUBE = "product of 8,192^3"  # by BLAS: the product rate of the moment
PRODUCT = "product"  # the same of the N, M and D of the case, which for few features waits for memory
BANK = 1_280_000
PROBLEMS = {
    "clip": partial(problems.two_way, scale=14.3, cosine=0.2),  # where CLIP begins; positives are hard to tell
    "nt_xent": partial(problems.nt_xent, with_scale=True),
    "info_nce": partial(problems.one_way, with_scale=True),
    "info_nce_frozen": partial(problems.one_way, with_scale=True, frozen=True),
    "moco": problems.moco,
    "siglip": problems.siglip,
    "sup_con": partial(problems.sup_con, classes=1000),
    "cpc": problems.cpc,
    "nce": problems.nce,
    **KERNELS,
}
# Rivals of the CPU's benchmarks: their formulas, restated, need no torchvision.
ON_A_CPU = "lightly", "open_clip", "info-nce-pytorch"
LATE = ("cut-cross-entropy",)
# Passes of 2 N M D flop that kernels execute, by a part of their names; of a backward what one that owns rows of
# gradients takes for all sides (less where it writes weights for products by BLAS).
BLAS = "gemm|nvjet|cutlass|xmma"
PASSES = {
    "both": {"forward|lse_fwd": 1, "weights": 1, "gradient_(rows|columns)|lse_bwd": 4, BLAS: 2},
    "itself": {"forward|lse_fwd": 0.5, "weights": 0.5, "gradient_(rows|columns)|lse_bwd": 2, BLAS: 1},
    "frozen": {"frozen": 2, "forward|lse_fwd": 1},
    "softplus": {"softplus": 3},
    "unknown": {},
}


@dataclass(frozen=True)
class Case:
    problem: str
    n: int
    d: int
    dtype: str = "bf16"
    part: str = "headlines"  # or "small", "rivals", "profile"
    scale: float | None = None  # of CLIP
    seconds: float = 0.5  # of rounds, once everybody is warm
    alone: bool = False  # ours and nobody else
    graph: bool = True
    late: bool = False  # the rivals that need minutes to tune themselves, and no others

    @property
    def key(self) -> str:
        suffix = f"-scale-{self.scale:g}" if self.scale else ""
        suffix += "" if self.part in ("headlines", "small") else f"-{self.part}"
        return f"{self.problem}-{self.n}-{self.d}-{self.dtype}{suffix}{'-late' if self.late else ''}"

    def build(self, device: str, rows: int | None = None, dtype: torch.dtype | None = None) -> Problem:
        options = {"scale": self.scale} if self.scale else {}
        return PROBLEMS[self.problem](rows or self.n, self.d, dtype or DTYPES[self.dtype], device, **options)

    def contenders(self, problem: Problem) -> dict[str, Factory]:
        """Those of the problem that take part, and ours in the ways that the package could choose."""
        everybody = problem.contenders()
        ours = {OURS: everybody.pop(OURS)}
        if self.alone:
            return ours
        if self.part == "profile":
            return ours | variants(problem)
        dense = {name: everybody.pop(name) for name in list(everybody) if name.startswith("compiled dense")}
        if self.part != "rivals":
            return ours | variants(problem) | dense
        rivals = {name: factory for name, factory in everybody.items() if name not in ON_A_CPU}
        return ours | {name: factory for name, factory in rivals.items() if (name in LATE) == self.late}


def variants(problem: Problem) -> dict[str, Factory]:
    """Ours on each backend that can take all of it, and where the CUDA kernels have two ways, by each."""
    parts = {problem.primitive} if problem.plain else {problem.primitive, "unit_pairs", "pair_losses"}
    device = problem.inputs[0].device.type
    names = [n for n, b in BACKENDS.items() if b.DEVICES and device in b.DEVICES and parts <= set(b.PRIMITIVES)]
    ways = {name: partial(sslkern.use_backend, name) for name in names}
    of_pairs = problem.primitive == "similarity_lse" and problem.shape
    if of_pairs and device == "cuda" and BACKENDS["cuda"].MISSING is None:
        ways |= ways_of_cuda(*problem.shape)
    return {f"{OURS}, {name}": partial(within, way, problem.ours) for name, way in ways.items()}


def within(way: Callable, function: Callable) -> Callable:
    """The function in a way, which is a context for its forward and its backward."""
    function = partial(function)
    function.around = way
    return function


def ways_of_cuda(N: int, M: int, D: int) -> dict[str, Callable]:
    """Where the CUDA kernels have two ways, each of them."""
    ways = {}
    if 64 < D <= 256:  # gradients from owners of rows, or as products by BLAS
        ways |= {"owners of rows": partial(widest_owners, 256), "weights": partial(widest_owners, 0)}
    if N <= 1024:  # the loss of few pairs as a whole, or from its parts
        ways["in parts"] = in_parts
    return ways


@contextlib.contextmanager
def in_parts():
    left_out = {"pair_contrast": lambda x, **_: "it is left out"}
    with mock.patch.dict(BACKENDS["cuda"].LACKS, left_out), mock.patch.object(backends, "_found", {}):
        yield


@contextlib.contextmanager
def widest_owners(features: int):
    cuda = load("cuda", "similarity_lse")
    with mock.patch.object(cuda, "BOTH_SIDES", features), mock.patch.object(cuda.gradient, "MOST_FEATURES", features):
        yield


def yardsticks(problem: Problem, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """What a copy takes at the same moment, or products by BLAS, of a cube and of the sizes of S."""
    small = device == "cpu"  # of a dry run
    if problem.bytes:
        source = torch.zeros(COPY_BYTES // (2**20 if small else 1) // 4, dtype=torch.int16, device=device)
        target = torch.empty_like(source)
        return {COPY: lambda: target.copy_(source)}
    sizes = {CUBE: (64 if small else 8192,) * 3}
    if problem.shape:
        N, M, D = problem.shape
        sizes[PRODUCT] = min(N, 2**32 // M), M, D  # of a million views some rows
    return {name: product(*size, dtype, device) for name, size in sizes.items()}


def product(N: int, M: int, D: int, dtype: torch.dtype, device: str) -> Callable:
    a, b = torch.randn(N, D, device=device).to(dtype), torch.randn(M, D, device=device).to(dtype)
    out = torch.empty(N, M, dtype=dtype, device=device)
    return lambda: torch.mm(a, b.T, out=out)


def plan(part: str = "") -> list[Case]:
    """The cases of a part, or all, what matters most first: what does not fit into the time is told as not measured."""
    n, several = 65536, {"sampled_similarity": (BANK, 128), "sampled_similarity_bwd": (BANK, 128)}
    headlines = [
        Case("clip", n, 512, seconds=3),
        Case("nt_xent", n, 128, seconds=1.5),
        Case("nt_xent", n, 512, seconds=2),
        Case("clip", n, 512, scale=100.0, seconds=2),
        Case("moco", n, 128),
        Case("clip", n, 128, seconds=1),
        *(Case("clip", size, 512) for size in (8192, 32768)),
        Case("nt_xent", 8192, 128),
        *(Case("nt_xent", n, d, seconds=1) for d in (64, 256)),
        *(Case("clip", n, d, seconds=1) for d in (256, 768)),
        *(Case(name, n, 128, seconds=1) for name in ("info_nce", "info_nce_frozen")),
        *(Case(name, *several.get(name, (2**19, 256))) for name in KERNELS),
        Case("clip", n, 512, "fp16", seconds=1, alone=True),
        Case("nt_xent", n, 128, "fp16", seconds=1, alone=True),
        Case("sup_con", n, 128, seconds=1),
        Case("cpc", 64, 128, "tf32"),
        Case("siglip", n, 768, seconds=1),
        Case("nt_xent", 2**20, 128, alone=True, graph=False),
    ]
    small = [
        Case(loss, rows, d, part="small") for d in (128, 512, 64) for rows in SMALL for loss in ("nt_xent", "clip")
    ]
    small += [Case(*size, dtype, "small") for size in (("nt_xent", 32768, 128), ("clip", 8192, 512)) for dtype in FP32]
    raced = [("clip", n, 512), ("nt_xent", n, 128), ("nt_xent", n, 512), ("siglip", n, 768), ("nce", BANK, 128)]
    raced += [("moco", n, 128), ("clip", 256, 128), ("nt_xent", 256, 128)]
    rivals = [Case(*case, part="rivals") for case in raced] + [Case("clip", n, 512, part="rivals", late=True)]
    profile = [replace(case, part="profile") for case in headlines if case.problem not in KERNELS]
    return [case for case in headlines + profile + small + rivals if part in ("", case.part)]


PARTS, FP32 = ("headlines", "profile", "small", "rivals"), ("tf32", "fp32")
SMALL = 256, 1024, 512, 64, 128, 2048, 4096  # rows, those that tell most first

# The goals: figures of cases, in the units of their names. They are set for an H100 whose BLAS multiplies at RATE;
# the times of what products decide are scaled to it by the rate of the moment.
RATE = 784e12


class Goal(NamedTuple):
    what: str
    figure: Callable[[dict], float]  # of the cases measured; KeyError: one was not
    bound: float
    least: bool = False  # or at most the bound


def ms(key: str, cases: dict) -> float:
    """Milliseconds at RATE."""
    return 1e3 * ours(key, cases)["seconds"] * rate(cases[key]) / RATE


def ours(key: str, cases: dict) -> dict:
    return cases[key]["contenders"][OURS]


def rate(case: dict) -> float:
    return 2 * 8192**3 / case["contenders"][CUBE]["seconds"]


def times_as_long(other: str, key: str, cases: dict) -> float:
    return ms(key, cases) / ms(other, cases)


def of_copy(key: str, cases: dict) -> float:
    case = cases[key]
    return case["bytes"] / ours(key, cases)["seconds"] / (COPY_BYTES / case["contenders"][COPY]["seconds"])


def times_faster(rival: str, key: str, cases: dict, seconds: str = "seconds") -> float:
    """Than the fastest of those whose name begins so."""
    found = [c[seconds] for name, c in cases[key]["contenders"].items() if name.startswith(rival) and seconds in c]
    if not found:
        raise KeyError(rival)
    return min(found) / ours(key, cases)[seconds]


def ms_in_graph(key: str, cases: dict) -> float:
    return 1e3 * ours(key, cases)["graph_seconds"]


def gigabytes(key: str, cases: dict) -> float:
    return ours(key, cases)["peak_bytes"] / 1e9


CLIP, NT_XENT, MILLION = "clip-65536-512-bf16", "nt_xent-65536-128-bf16", "nt_xent-1048576-128-bf16"
TIMES = {
    CLIP: 26,
    "clip-65536-128-bf16": 7.7,
    "clip-65536-256-bf16": 15.5,
    "clip-65536-768-bf16": 38,
    "clip-32768-512-bf16": 6.8,
    "clip-8192-512-bf16": 0.5,
    "nt_xent-65536-64-bf16": 3,
    NT_XENT: 3.9,
    "nt_xent-65536-256-bf16": 8.3,
    "nt_xent-65536-512-bf16": 12.5,
    "nt_xent-8192-128-bf16": 0.13,
    MILLION: 1000,
    "info_nce-65536-128-bf16": 7.5,
    "info_nce_frozen-65536-128-bf16": 3.2,
    "siglip-65536-768-bf16": 30,
}
GRAPH_TIMES = {"moco-65536-128-bf16": 0.027, "nt_xent-256-128-bf16": 0.011}
TIMES_FASTER = {CLIP: 1.4, NT_XENT: 5, "nt_xent-65536-512-bf16": 2.2, "cpc-64-128-tf32": 1}  # than compiled dense


def goals() -> list[Goal]:
    compiled, kernels = "compiled dense", [case.key for case in plan("headlines") if case.problem in KERNELS]
    small = [case for case in plan("small") if case.n in SMALL]
    few = [case.key for case in small if case.n <= 1024 and case.d > 64]
    in_graphs = dict.fromkeys([case.key for case in small], 1.0) | dict.fromkeys(few, 1 / 0.6)
    goals = []

    def add(unit: str, figure: Callable, bounds: dict[str, float], least: bool = False) -> None:
        goals.extend(Goal(f"{key}, {unit}", partial(figure, key), bound, least) for key, bound in bounds.items())

    add("ms", ms, TIMES)
    add("ms in a CUDA graph", ms_in_graph, GRAPH_TIMES)
    add("GB beyond the input", gigabytes, {CLIP: 1.7, MILLION: 4})
    add("times as long as NT-Xent", partial(times_as_long, NT_XENT), {"sup_con-65536-128-bf16": 1.4})
    for key in (CLIP, NT_XENT):
        add(f"times as long as {key}", partial(times_as_long, key), {key.replace("bf16", "fp16"): 1.03})

    faster = partial(times_faster, compiled)
    add(f"times faster than {compiled}", faster, TIMES_FASTER, least=True)
    add("times faster than memeff", partial(times_faster, "memeff"), {f"{CLIP}-rivals": 2.8}, least=True)
    add("of the copy rate", of_copy, dict.fromkeys(kernels, 0.85), least=True)
    graphs = partial(faster, seconds="graph_seconds")
    add(f"times faster than {compiled}, both in CUDA graphs", graphs, in_graphs, least=True)
    add(f"times faster than {compiled}, eager", faster, dict.fromkeys(few, 10 / 3), least=True)
    return goals
