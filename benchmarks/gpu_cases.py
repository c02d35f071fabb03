"""What `benchmarks/gpu.py` measures: losses and kernels with their contenders, the sizes in their order, the goals.

A contender is a factory: it imports what it needs and returns a function of the inputs, or raises, and then it is
listed with the reason. Formulas of other packages that need no code of theirs are restated here or in baselines.py.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from baselines import (
    TEMPERATURE,
    chunked,
    gathered_scores,
    nt_xent_cross_entropy,
    nt_xent_logsumexp,
    nt_xent_sslkern,
    picked_scores,
    published_nce,
    siglip_logsigmoid,
    siglip_softplus,
    two_way_cross_entropy,
    two_way_logsumexp,
)
from torch import Tensor

import sslkern
from sslkern import functional, ops
from sslkern.backends import BACKENDS, load
from sslkern.backends.triton import strategies

OURS = "sslkern"
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
SMALL, BANK = 1024, 1_280_000  # up to SMALL rows a step is also timed under a CUDA graph
ROWS_PER_CHUNK = 2**27  # scores that chunked products hold at a time


@dataclass
class Problem:
    """inputs: what a contender takes, of which those that require gradients get them. truth: a loss for the reference
    backend in fp32, None where that takes too long. textbook: the dense formula, for float64 at a small size. flops,
    bytes: the floor of the algorithm. `plain` contenders are functions without gradient that return what they wrote."""

    inputs: tuple[Tensor, ...]
    contenders: dict[str, Callable[[], Callable]]
    truth: Callable | None
    textbook: Callable | None = None
    flops: float = 0
    bytes: float = 0
    plain: bool = False


@dataclass(frozen=True)
class Case:
    problem: str
    n: int
    d: int
    dtype: str = "bf16"
    contenders: str = "all"  # or "quick": without those that compile for each size; "compiled": ours and those; names
    seconds: float = 0.6  # for timing, once everybody is warm

    @property
    def key(self) -> str:
        suffix = "" if self.contenders in ("all", "quick") else f"-{self.contenders.replace(' ', '-')}"
        return f"{self.problem}-{self.n}-{self.d}-{self.dtype}{suffix}"

    def build(self, device: str, rows: int | None = None) -> Problem:
        return PROBLEMS[self.problem](rows or self.n, self.d, DTYPES[self.dtype], device)

    def wants(self, name: str) -> bool:
        late = name == "cut-cross-entropy"  # it tries dozens of configurations first
        compiles = "compiled" in name
        if self.contenders == "all":
            return not late
        if self.contenders == "quick":
            return not late and not compiles
        return name == OURS or (compiles if self.contenders == "compiled" else name == self.contenders)

    @property
    def graph(self) -> bool:
        return self.n <= SMALL or self.problem in ("moco", "nce", *KERNELS)


# Contenders that several losses have


def ours(loss_fn: Callable) -> dict[str, Callable]:
    """As the package chooses, and each strategy of its Triton backend."""
    named = {f"{OURS}, {name}": partial(with_strategy, loss_fn, name) for name in strategies.STRATEGIES}
    return {OURS: lambda: loss_fn, **named, "chunked torch": lambda: chunked(loss_fn)}


def with_strategy(loss_fn: Callable, name: str) -> Callable:
    """The backward runs inside of the context manager as well."""
    if BACKENDS["triton"].MISSING:
        raise RuntimeError(BACKENDS["triton"].MISSING)
    loss_fn = partial(loss_fn)
    loss_fn.around = partial(strategies.use_strategy, name)
    return loss_fn


def dense(**formulas: Callable) -> dict[str, Callable]:
    contenders = {}
    for name, formula in formulas.items():
        contenders[f"dense {name}"] = lambda formula=formula: formula
        contenders[f"compiled dense {name}"] = lambda formula=formula: compiled(formula)
    return contenders


def compiled(function: Callable) -> Callable:
    """Off a GPU only the tracing, which is all that a dry run can check in seconds."""
    if torch.cuda.is_available():
        return torch.compile(function, dynamic=False)
    return torch.compile(function, dynamic=False, backend="eager")


def views(n: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Two views [n, d] as a half-trained encoder gives them, as in baselines.py, but made on the device."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, d, generator=generator, device=device) for _ in range(2))
    b += a
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


class ChunkedLse(torch.autograd.Function):
    """The rival of fused kernels: library products of row blocks in the type of the features, and what comes between
    them in eager or compiled torch. Returns logsumexp of the rows and, where `columns`, of the columns."""

    @staticmethod
    def forward(ctx, q, k, scale, columns, itself, compile):
        ctx.functions = compiled_chunk_functions() if compile else (lse_of_chunk, weights_of_chunk)
        row = q.new_empty(len(q), dtype=torch.float32)
        col = q.new_full((len(k) if columns else 0,), float("-inf"), dtype=torch.float32)
        for rows in row_chunks(q, k):
            offset = rows.start if itself else None
            row[rows], part = ctx.functions[0](scores_of_chunk(q[rows], k, offset), scale, columns)
            col = torch.logaddexp(col, part) if columns else col
        ctx.save_for_backward(q, k, torch.as_tensor(scale), row, col)
        ctx.columns, ctx.itself = columns, itself
        return row, col

    @staticmethod
    def backward(ctx, g, h):
        q, k, scale, row, col = ctx.saved_tensors
        dq, dk = torch.empty_like(q), torch.zeros_like(k)
        for rows in row_chunks(q, k):
            s = scores_of_chunk(q[rows], k, rows.start if ctx.itself else None)
            w = ctx.functions[1](s, scale, row[rows], g[rows], *((col, h) if ctx.columns else (None, None)))
            torch.mm(w, k, out=dq[rows])
            dk.addmm_(w.T, q[rows])
        dscale = (dq.float() * q).sum() / scale if ctx.needs_input_grad[2] else None
        return dq, dk, dscale, None, None, None


def row_chunks(q, k):
    step = max(1, ROWS_PER_CHUNK // len(k))
    return [slice(i, min(i + step, len(q))) for i in range(0, len(q), step)]


def scores_of_chunk(q, k, offset):
    s = q @ k.T
    if offset is not None:
        s.diagonal(offset).fill_(float("-inf"))
    return s


def lse_of_chunk(s, scale, columns):
    s = s.float() * scale
    return s.logsumexp(1), s.logsumexp(0) if columns else None


def weights_of_chunk(s, scale, row, g, col, h):
    x = s.float() * scale
    w = (x - row[:, None]).exp() * g[:, None]
    if col is not None:
        w = w + (x - col).exp() * h
    return (w * scale).to(s.dtype)


@cache
def compiled_chunk_functions():
    return compiled(lse_of_chunk), compiled(weights_of_chunk)


# The losses


def nt_xent(n: int, d: int, dtype: torch.dtype, device: str) -> Problem:
    """n counts views."""
    contenders = {
        **ours(nt_xent_sslkern),
        "chunked products": lambda: partial(nt_xent_chunked, compile=False),
        "chunked products, compiled": lambda: partial(nt_xent_chunked, compile=True),
        **dense(cross_entropy=nt_xent_cross_entropy, logsumexp=nt_xent_logsumexp),
        "lightly's formula": lambda: nt_xent_lightly,
    }
    if n <= 256:  # its loss has n^3 elements
        contenders["pytorch-metric-learning"] = partial(metric_learning, n, device)
    truth = nt_xent_sslkern if n <= 2**17 else None
    return Problem(views(n // 2, d, dtype, device), contenders, truth, nt_xent_cross_entropy, 2 * 2 * n * n * d)


def nt_xent_chunked(z0, z1, compile):
    z = F.normalize(torch.cat((z0, z1)), dim=1)
    row, _ = ChunkedLse.apply(z, z, 1 / TEMPERATURE, False, True, compile)
    positive = (z[: len(z0)].float() * z[len(z0) :]).sum(1).mean() / TEMPERATURE
    return row.mean() - positive


def nt_xent_lightly(z0, z1):
    """NTXentLoss of lightly 1.6: four products, their diagonals cut out, and cross_entropy of the rest."""
    z0, z1, n = F.normalize(z0, dim=1), F.normalize(z1, dim=1), len(z0)
    others = ~torch.eye(n, dtype=torch.bool, device=z0.device)
    s00, s11 = ((z @ z.T / TEMPERATURE)[others].view(n, -1) for z in (z0, z1))
    s01, s10 = z0 @ z1.T / TEMPERATURE, z1 @ z0.T / TEMPERATURE
    logits = torch.cat((torch.cat((s01, s00), 1), torch.cat((s10, s11), 1)))
    return F.cross_entropy(logits, torch.arange(n, device=z0.device).repeat(2))


def metric_learning(n, device):
    loss = importlib.import_module("pytorch_metric_learning.losses").NTXentLoss(temperature=TEMPERATURE)
    labels = torch.arange(n // 2, device=device).repeat(2)
    return lambda z0, z1: loss(torch.cat((z0, z1)), labels)


def clip(n: int, d: int, dtype: torch.dtype, device: str) -> Problem:
    logit_scale = torch.tensor(1 / TEMPERATURE, device=device, requires_grad=True)
    contenders = {
        **ours(functional.clip),
        "memeff": memeff,
        "inf-cl": partial(inf_cl, d),
        "cut-cross-entropy": partial(cut_cross_entropy, n, device),
        "chunked products": lambda: partial(clip_chunked, compile=False),
        "chunked products, compiled": lambda: partial(clip_chunked, compile=True),
        **dense(cross_entropy=two_way_cross_entropy, logsumexp=two_way_logsumexp),
        "open_clip's formula": lambda: clip_open_clip,
    }
    inputs = (*views(n, d, dtype, device), logit_scale)
    return Problem(inputs, contenders, functional.clip, two_way_cross_entropy, 4 * 2 * n * n * d)


def clip_chunked(image, text, logit_scale, compile):
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    row, col = ChunkedLse.apply(image, text, logit_scale, True, False, compile)
    return (row + col).mean() / 2 - (image.float() * text).sum(1).mean() * logit_scale


def clip_open_clip(image, text, logit_scale):
    """ClipLoss of open_clip 3.3: a product for each direction."""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    scale, labels = logit_scale.to(image.dtype), torch.arange(len(image), device=image.device)
    return (F.cross_entropy(scale * image @ text.T, labels) + F.cross_entropy(scale * text @ image.T, labels)) / 2


def memeff():
    """Its temperature is a number and gets no gradient; `stable` would multiply the others."""
    loss = importlib.import_module("memeff").MemoryEfficientCLIPLoss(temperature=TEMPERATURE, stable=False)
    return lambda image, text, logit_scale: loss(image, text)


def inf_cl(d):
    """One direction a call; heads of at most 256 features, whose number divides d."""
    flash = importlib.import_module("inf_cl").cal_flash_loss

    def loss(image, text, logit_scale):
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        both = [flash(*pair, scale=logit_scale, head_dim=min(d, 256)) for pair in ((image, text), (text, image))]
        return torch.cat(both).mean()

    return loss


def cut_cross_entropy(n, device):
    """One direction a call; the filter, which drops small gradients, is off."""
    loss_of = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    labels = torch.arange(n, device=device)

    def loss(image, text, logit_scale):
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        pairs = ((image, text), (text, image))
        return sum(loss_of(logit_scale.to(a.dtype) * a, b, labels, filter_eps=None) for a, b in pairs) / 2

    return loss


def siglip(n: int, d: int, dtype: torch.dtype, device: str) -> Problem:
    scale, bias = (torch.tensor(x, device=device, requires_grad=True) for x in (10.0, -10.0))
    contenders = {
        **ours(functional.siglip),
        "siglip-kernel": siglip_kernel,
        **dense(logsigmoid=siglip_logsigmoid, softplus=siglip_softplus),
    }
    inputs = (*views(n, d, dtype, device), scale, bias)
    return Problem(inputs, contenders, functional.siglip, siglip_logsigmoid, 3 * 2 * n * n * d)


def siglip_kernel():
    """It takes unit rows and the logarithm of the scale."""
    loss = importlib.import_module("siglip_kernel").fused_siglip_loss
    return lambda image, text, scale, bias: loss(F.normalize(image, dim=1), F.normalize(text, dim=1), scale.log(), bias)


def moco(n: int, d: int, dtype: torch.dtype, device: str, batch: int = 256) -> Problem:
    """n counts the keys of the queue. The loss alone: writing the queue is `queue_push`."""
    batch = min(batch, n)
    (query, key), queue = views(batch, d, dtype, device), views(n, d, torch.float32, device)[1].detach()
    key, queue = key.detach(), F.normalize(queue, dim=1).to(dtype)

    def loss(query):
        return functional.moco(query, key.to(query.dtype), queue.to(query.dtype), TEMPERATURE)

    def published(query):
        """He et al., arXiv:1911.05722, without the copy of the queue that it makes each step."""
        q, k = F.normalize(query, dim=1), F.normalize(key.to(query.dtype), dim=1)
        logits = torch.cat(((q * k).sum(1, keepdim=True), q @ queue.to(query.dtype).T), 1) / TEMPERATURE
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))

    contenders = {**ours(loss), **dense(cross_entropy=published)}
    return Problem((query,), contenders, loss, published, 2 * 2 * batch * n * d)


def nce(n: int, d: int, dtype: torch.dtype, device: str, batch: int = 256, negatives: int = 16_384) -> Problem:
    """n counts the rows of the bank."""
    batch, negatives = min(batch, n), min(negatives, n)
    query, _ = views(batch, d, dtype, device)
    bank, index = bank_and_index(n, d, dtype, device, batch, 1 + negatives)
    log_z = torch.tensor(n).log().item() + d**-1 / (2 * TEMPERATURE**2)  # of independent unit vectors

    def loss(query):
        return functional.nce(query, bank.to(query.dtype), index, TEMPERATURE, log_z=log_z)

    def published(query, scores):
        wide = torch.promote_types(query.dtype, torch.float32)
        return published_nce(scores(F.normalize(query, dim=1), bank.to(query.dtype), index).to(wide), n, log_z)

    gathered, picked = partial(published, scores=gathered_scores), partial(published, scores=picked_scores)
    contenders = {
        **ours(loss),
        "gather + bmm (CMC)": lambda: gathered,
        "compiled gather + bmm": lambda: compiled(gathered),
        "dense product + gather": lambda: picked,
    }
    row_bytes = d * query.element_size()
    return Problem((query,), contenders, loss, gathered, bytes=2 * batch * (1 + negatives) * row_bytes)


def bank_and_index(size, d, dtype, device, rows, columns):
    generator = torch.Generator(device).manual_seed(1)
    bank = F.normalize(torch.randn(size, d, generator=generator, device=device), dim=1).to(dtype)
    return bank, torch.randint(size, (rows, columns), generator=generator, device=device)


# The memory-bound kernels: every backend that has one, on rows far larger than the caches


def by_backend(primitive: str, x: Tensor, run: Callable) -> dict[str, Callable]:
    """run(backend, owner) does it once there, on the owner's copy of what is overwritten, and returns what it wrote."""

    def on(name):
        backend = BACKENDS[name]
        if backend.MISSING:
            raise RuntimeError(backend.MISSING)
        return partial(run, name, name)

    fit = [name for name, b in BACKENDS.items() if b.DEVICES is None or x.device.type in b.DEVICES]
    fit = [name for name in fit if primitive in BACKENDS[name].PRIMITIVES]
    return {OURS: lambda: partial(run, "auto", OURS), **{f"backend {name}": partial(on, name) for name in fit}}


def kernel(primitive: str, x: Tensor, run: Callable, bytes: float) -> Problem:
    return Problem((), by_backend(primitive, x, run), partial(run, "reference", "truth"), bytes=bytes, plain=True)


def queue_push(n, d, dtype, device):
    keys = views(n, d, dtype, device)[0].detach()

    @fresh_state
    def state():
        return torch.zeros(2 * n, d, dtype=dtype, device=device), torch.zeros(1, dtype=torch.long, device=device)

    def run(backend, owner):
        queue, ptr = state(owner)
        with sslkern.use_backend(backend):
            ops.queue_push_(queue, ptr, keys, normalize=True)
        return (queue,)

    return kernel("queue_push", keys, run, 2 * keys.nbytes)


def bank_update(n, d, dtype, device):
    x = views(n, d, dtype, device)[0].detach()
    bank, _ = bank_and_index(2 * n + n // 2, d, dtype, device, 1, 1)
    index = torch.randperm(len(bank), generator=torch.Generator(device).manual_seed(2), device=device)[:n]
    state = fresh_state(bank.clone)

    def run(backend, owner):
        moved = state(owner)
        with sslkern.use_backend(backend):
            ops.bank_update_(moved, index, x, 0.5)
        return (moved,)

    return kernel("bank_update", x, run, 3 * x.nbytes + index.nbytes)


def fresh_state(make: Callable) -> Callable:
    """What a kernel overwrites, a copy for each owner, so that first calls can be compared."""
    states = {}

    def of(owner):
        if owner not in states:
            states[owner] = make()
        return states[owner]

    return of


def sampled(n, d, dtype, device, batch=256, negatives=16_384, backward=False):
    batch, negatives = min(batch, n), min(negatives, n)
    q = F.normalize(views(batch, d, dtype, device)[0].detach(), dim=1)
    bank, index = bank_and_index(n, d, dtype, device, batch, negatives)
    g = torch.randn(index.shape, generator=torch.Generator(device).manual_seed(3), device=device)

    def run(backend, owner):
        with sslkern.use_backend(backend):
            if backward:
                return (ops.sampled_similarity_bwd(q, bank, index, g, need_q=True, need_bank=False)[0],)
            return (ops.sampled_similarity(q, bank, index),)

    moved = index.numel() * (d * q.element_size() + 8 + 4)  # a row, its index, its score or the gradient of that
    return kernel("sampled_similarity", q, run, moved)


def unit_pairs(n, d, dtype, device, backward=False):
    x, y = (v.detach() for v in views(n, d, dtype, device))
    z, norm, _ = load("reference", "unit_pairs").unit_pairs_fwd(x, y, True)
    if backward:
        generator = torch.Generator(device).manual_seed(3)
        da, db = (torch.randn(n, d, generator=generator, device=device) for _ in range(2))
        pull = torch.rand(n, generator=generator, device=device)
        moved = z.nbytes + da.nbytes + db.nbytes + z.nbytes
    else:
        moved = 2 * z.nbytes

    def run(backend, owner):
        name = sslkern.backends.resolve("unit_pairs", x) if backend == "auto" else backend
        module = load(name, "unit_pairs")
        if backward:
            return module.unit_pairs_bwd(z, norm, pull, da, db, True, True)
        return module.unit_pairs_fwd(x, y, True)

    return kernel("unit_pairs", x, run, moved)


KERNELS = {
    "queue_push": queue_push,
    "bank_update": bank_update,
    "sampled_similarity": sampled,
    "sampled_similarity_bwd": partial(sampled, backward=True),
    "unit_pairs": unit_pairs,
    "unit_pairs_bwd": partial(unit_pairs, backward=True),
}
LOSSES = {"clip": clip, "nt_xent": nt_xent, "moco": moco, "siglip": siglip, "nce": nce}
PROBLEMS = LOSSES | KERNELS
TITLES = {
    "clip": "CLIP",
    "nt_xent": "NT-Xent",
    "moco": "MoCo, batch of 256",
    "siglip": "SigLIP",
    "nce": "NCE, 256 x 16,384 of a memory bank",
}


def plan() -> list[Case]:
    """All cases, what matters most first: what does not fit into the time is listed as not measured."""
    kernels = {"sampled_similarity": BANK, "sampled_similarity_bwd": BANK}
    cases = [
        Case("clip", 65536, 512, seconds=3),
        Case("nt_xent", 65536, 128, seconds=2),
        Case("nt_xent", 65536, 512, seconds=2),
        Case("moco", 65536, 128),
        *(Case(loss, n, 128) for n in (256, 1024, 512) for loss in ("nt_xent", "clip")),
        Case("nt_xent", 2**20, 128, contenders=OURS, seconds=4),
        *(Case(name, kernels.get(name, 2**19), 128 if name in kernels or "bank" in name else 256) for name in KERNELS),
        Case("siglip", 65536, 768, "bf16", "quick", seconds=2),
        Case("nce", BANK, 128),
        *(Case("nt_xent", 32768, 128, dtype, "quick") for dtype in ("tf32", "fp32")),
        *(Case("clip", 8192, 512, dtype, "quick") for dtype in ("tf32", "fp32")),
        Case("clip", 65536, 512, contenders="cut-cross-entropy", seconds=1),
        *(Case(loss, n, 512) for n in (256, 1024, 512) for loss in ("nt_xent", "clip")),
    ]
    sizes = [(n, d) for n in (8192, 32768, 131072, 65536, 1024, 256) for d in (128, 512, 256, 768)]
    matrix = [(loss, n, d) for n, d in sizes for loss in ("nt_xent", "clip", "siglip")]
    matrix += [("moco", 65536, d) for d in (256, 512, 768)] + [("nce", BANK, d) for d in (256, 512, 768)]
    taken = {(c.problem, c.n, c.d) for c in cases if c.dtype == "bf16"}
    cases += [Case(*case, contenders="quick", seconds=0.3) for case in matrix if case not in taken]
    taken = {(c.problem, c.n, c.d) for c in cases if c.contenders == "all"}
    return cases + [Case(*case, contenders="compiled", seconds=0.3) for case in matrix if case not in taken]


# The goals: a figure of a case, in the units of its name


@dataclass(frozen=True)
class Goal:
    what: str
    case: str
    figure: Callable[[dict, dict], float]  # of the contenders of the case and of the rates of the machine
    at_most: float | None = None
    at_least: float | None = None
    stretch: float | None = None


def ms(contenders, rates):
    return 1e3 * contenders[OURS]["seconds"]


def graph_ms(contenders, rates):
    return 1e3 * contenders[OURS]["graph_seconds"]


def peak_gb(contenders, rates):
    return contenders[OURS]["peak_bytes"] / 1e9


def times_faster(rival, contenders, rates):
    return contenders[rival]["seconds"] / contenders[OURS]["seconds"]


def over_compiled(contenders, rates):
    """How many times faster than the fastest compiled dense form, both under CUDA graphs."""
    rivals = [c["graph_seconds"] for name, c in contenders.items() if name.startswith("compiled dense")]
    return min(rivals) / contenders[OURS]["graph_seconds"]


def of_copy(contenders, rates):
    ours = contenders[OURS]
    return ours["bytes_per_second"] / rates["copy_bytes_per_second"]


def goals() -> list[Goal]:
    clip, simclr = "clip-65536-512-bf16", "nt_xent-65536-{}-bf16"
    large = "nt_xent-1048576-128-bf16-sslkern"
    return [
        Goal("CLIP, 65,536 x 512, ms", clip, ms, at_most=45, stretch=30),
        Goal("CLIP, 65,536 x 512, times faster than memeff", clip, partial(times_faster, "memeff"), at_least=2),
        Goal("CLIP, 65,536 x 512, times faster than inf-cl", clip, partial(times_faster, "inf-cl"), at_least=8),
        Goal("NT-Xent, 65,536 views x 128, ms", simclr.format(128), ms, at_most=7),
        Goal("NT-Xent, 65,536 views x 512, ms", simclr.format(512), ms, at_most=28, stretch=16),
        Goal("MoCo, 256 x 65,536 x 128, CUDA graph, ms", "moco-65536-128-bf16", graph_ms, at_most=0.06),
        Goal("NT-Xent, 1,048,576 views x 128, ms", large, ms, at_most=2000),
        Goal("NT-Xent, 1,048,576 views x 128, GB beyond the input", large, peak_gb, at_most=4),
        *(
            Goal(
                f"{TITLES[loss]}, {n:,} x {d}, CUDA graphs, times faster than compiled dense",
                f"{loss}-{n}-{d}-bf16",
                over_compiled,
                at_least=1,
            )
            for loss in ("nt_xent", "clip")
            for d in (128, 512)
            for n in (256, 512, 1024)
        ),
        *(
            Goal(f"{case.problem}, fraction of the copy bandwidth", case.key, of_copy, at_least=0.85)
            for case in plan()
            if case.problem in KERNELS
        ),
    ]
