"""What `benchmarks/gpu.py` measures: losses and kernels with their contenders, the cases in their order, the goals.

A contender is a factory: it imports what it needs and returns a function of the inputs, or raises, and then it is
listed with the reason. Formulas of other packages that need no code of theirs are restated here or in baselines.py.
"""

import contextlib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import NamedTuple
from unittest import mock

import baselines
import torch
import torch.nn.functional as F
from baselines import TEMPERATURE, chunked, published_nce
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sslkern
from sslkern import functional, ops
from sslkern.backends import BACKENDS, load

OURS = "sslkern"
COPY, COPY_BYTES = "copy of 2 GiB", 2**32  # read and written
CUBE = "product of 8,192^3"  # by the library: the product rate of the moment
PRODUCT = "product"  # the same of the N, M and D of the case, which for few features waits for memory
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
BANK = 1_280_000
SCORES_PER_CHUNK = 2**28  # of the rival that holds so many at a time


@dataclass
class Problem:
    """inputs: what a contender takes, of which those that require gradients get them. ours: the loss, `primitive` the
    one it spends its time in. dense: formulas that store S, raced compiled, and rivals as they are. rivals: factories.
    textbook: the formula for float64 at a small size. shape: N, M, D of S; work: which passes over it there are
    (`PASSES`); bytes: the least that are moved. truth: at the size itself there is time for one. `plain` functions have
    no gradient and return what they wrote."""

    inputs: tuple[Tensor, ...]
    ours: Callable
    primitive: str = "similarity_lse"
    dense: dict[str, Callable] = field(default_factory=dict)
    rivals: dict[str, Callable[[], Callable]] = field(default_factory=dict)
    textbook: Callable | None = None
    shape: tuple[int, int, int] | None = None
    work: str = "unknown"
    bytes: float = 0
    truth: bool = True
    plain: bool = False

    @property
    def pass_flops(self) -> int:
        return 2 * math.prod(self.shape) if self.shape else 0

    def racers(self) -> dict[str, Callable[[], Callable]]:
        """Ours as the package chooses and as it could, and the compiled formulas."""
        formulas = {f"compiled dense {name}": partial(compiled, formula) for name, formula in self.dense.items()}
        return {OURS: lambda: self.ours} | self.variants() | formulas

    def variants(self) -> dict[str, Callable[[], Callable]]:
        """Ours in the other ways that the package could choose; a way is a context for a forward and its backward."""
        parts = {self.primitive} if self.plain else {self.primitive, "unit_pairs", "pair_losses"}
        device = self.inputs[0].device.type
        names = [n for n, b in BACKENDS.items() if b.DEVICES and device in b.DEVICES and parts <= set(b.PRIMITIVES)]
        ways = {name: partial(sslkern.use_backend, name) for name in names}
        if self.primitive == "similarity_lse" and device == "cuda" and BACKENDS["cuda"].MISSING is None and self.shape:
            ways |= ways_of_cuda(*self.shape)
        return {f"{OURS}, {name}": partial(self.within, way) for name, way in ways.items()}

    def within(self, way: Callable) -> Callable:
        ours = partial(self.ours)
        ours.around = way
        return ours

    def others(self) -> dict[str, Callable[[], Callable]]:
        formulas = {f"dense {name}": lambda formula=formula: formula for name, formula in self.dense.items()}
        return {OURS: lambda: self.ours, "chunked torch": lambda: chunked(self.ours)} | formulas | self.rivals


def ways_of_cuda(N: int, M: int, D: int) -> dict[str, Callable]:
    """Where the CUDA kernels have two ways, each of them."""
    ways = {}
    if 64 < D <= 256:  # gradients from owners of rows, or as products of the library
        ways |= {"owners of rows": partial(widest_owners, 256), "weights": partial(widest_owners, 0)}
    if N <= 1024:  # the loss of few pairs as a whole, or from its parts
        left_out = {"pair_contrast": lambda x, **_: "it is left out"}
        ways["in parts"] = lambda: mock.patch.dict(BACKENDS["cuda"].LACKS, left_out)
    return ways


@contextlib.contextmanager
def widest_owners(features: int):
    cuda = load("cuda", "similarity_lse")
    with mock.patch.object(cuda, "BOTH_SIDES", features), mock.patch.object(cuda.gradient, "MOST_FEATURES", features):
        yield


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

    def build(self, device: str, rows: int | None = None) -> Problem:
        options = {"scale": self.scale} if self.scale else {}
        return PROBLEMS[self.problem](rows or self.n, self.d, DTYPES[self.dtype], device, **options)

    def contenders(self, problem: Problem) -> dict[str, Callable[[], Callable]]:
        if self.alone:
            return {OURS: lambda: problem.ours}
        if self.part == "profile":
            return {OURS: lambda: problem.ours} | problem.variants()
        if self.part != "rivals":
            return problem.racers()
        return {name: f for name, f in problem.others().items() if name == OURS or (name in LATE) == self.late}


LATE = ("cut-cross-entropy",)
# Passes of 2 N M D flop: what the algorithm needs, and what kernels execute, by a part of their names; of a backward
# what one that owns rows of gradients takes for all sides (less where it writes weights for products of the library).
LIBRARY = "gemm|nvjet|cutlass|xmma"
PASSES = {
    "both": {"floor": 4, "forward": 1, "weights": 1, "gradient_(rows|columns)|backward": 4, LIBRARY: 2},
    "itself": {"floor": 2, "forward": 0.5, "weights": 0.5, "gradient_(rows|columns)|backward": 2, LIBRARY: 1},
    "frozen": {"floor": 2, "frozen": 2, "forward": 1},
    "softplus": {"floor": 3, "softplus": 3},
    "unknown": {"floor": 0},
}


def compiled(function: Callable) -> Callable:
    """Off a GPU only the tracing, which is all that a dry run can check in seconds."""
    if torch.cuda.is_available():
        return torch.compile(function, dynamic=False)
    return torch.compile(function, dynamic=False, backend="eager")


def yardsticks(problem: Problem, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """What the library takes at the same moment: for a copy, or for products, of a cube and of the sizes of S."""
    small = device == "cpu"
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


def views(n: int, d: int, dtype: torch.dtype, device: str, cosine: float = 0.7) -> tuple[Tensor, Tensor]:
    """Two views [n, d] with about that cosine between those of a row."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, d, generator=generator, device=device) for _ in range(2))
    b = cosine * a + (1 - cosine**2) ** 0.5 * b
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


@cache
def lse_of_chunk():
    def lse(q, k, scale, first):
        s = scale.to(q.dtype) * q @ k.T
        if first is not None:  # the column of a row of q itself, which is left out
            rows, columns = (torch.arange(len(x), device=q.device) for x in (q, k))
            s = s.masked_fill(columns == (first + rows)[:, None], float("-inf"))
        return s.logsumexp(1), s.logsumexp(0)

    return compiled(lse)


def chunked_lse(q, k, scale, itself):
    """What one can do in compiled torch without the whole of S: a block of rows at a time, computed once more in the
    backward. Returns the log-sum-exps of rows and columns."""
    step = max(1, SCORES_PER_CHUNK // len(k))
    firsts = [torch.tensor(i, device=q.device) if itself else None for i in range(0, len(q), step)]
    pairs = zip(q.split(step), firsts, strict=True)
    parts = [checkpoint(lse_of_chunk(), x, k, scale, first, use_reentrant=False) for x, first in pairs]
    return torch.cat([row for row, _ in parts]), torch.stack([col for _, col in parts]).logsumexp(0)


# The losses


def learned(scale: float, device: str) -> Tensor:
    return torch.tensor(scale, device=device, requires_grad=True)


def nt_xent(n: int, d: int, dtype: torch.dtype, device: str) -> Problem:
    """n counts views."""
    rivals = {"compiled chunks": lambda: nt_xent_chunked, "lightly's formula": lambda: nt_xent_lightly}
    if n <= 256:  # its loss has n^3 elements
        rivals["pytorch-metric-learning"] = partial(metric_learning, n, device)
    return Problem(
        (*views(n // 2, d, dtype, device), learned(1 / TEMPERATURE, device)),
        lambda z0, z1, scale: functional.nt_xent(z0, z1, logit_scale=scale),
        dense={"cross_entropy": nt_xent_cross_entropy, "logsumexp": nt_xent_logsumexp},
        rivals=rivals,
        textbook=nt_xent_cross_entropy,
        shape=(n, n, d),
        work="itself",
        truth=n <= 2**17,
    )


def nt_xent_logits(z0, z1, scale):
    z = F.normalize(torch.cat((z0, z1)), dim=1)
    diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (scale.to(z.dtype) * z @ z.T).masked_fill(diagonal, float("-inf"))


def nt_xent_cross_entropy(z0, z1, scale):
    logits = nt_xent_logits(z0, z1, scale)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device).roll(len(z0)))


def nt_xent_logsumexp(z0, z1, scale):
    positive = (F.normalize(z0, dim=1) * F.normalize(z1, dim=1)).sum(1).mean() * scale
    return nt_xent_logits(z0, z1, scale).logsumexp(1).mean() - positive


def nt_xent_chunked(z0, z1, scale):
    z = F.normalize(torch.cat((z0, z1)), dim=1)
    row, _ = chunked_lse(z, z, scale, itself=True)
    return row.mean() - (z[: len(z0)].float() * z[len(z0) :]).sum(1).mean() * scale


def nt_xent_lightly(z0, z1, scale):
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
    return lambda z0, z1, scale: loss(torch.cat((z0, z1)), labels)


def clip(n: int, d: int, dtype: torch.dtype, device: str, scale: float = 14.3) -> Problem:
    """scale: 14.3 is where CLIP begins, 100 where it ends; positives are hard to tell, so that there are gradients."""
    rivals = {
        "memeff": partial(memeff, scale),
        "inf-cl": partial(inf_cl, d),
        "cut-cross-entropy": partial(cut_cross_entropy, n, device),
        "compiled chunks": lambda: clip_chunked,
        "open_clip's formula": lambda: clip_open_clip,
    }
    return Problem(
        (*views(n, d, dtype, device, cosine=0.2), learned(scale, device)),
        functional.clip,
        dense={"cross_entropy": baselines.two_way_cross_entropy, "logsumexp": baselines.two_way_logsumexp},
        rivals=rivals,
        textbook=baselines.two_way_cross_entropy,
        shape=(n, n, d),
        work="both",
    )


def clip_chunked(image, text, logit_scale):
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    row, col = chunked_lse(image, text, logit_scale, itself=False)
    return (row + col).mean() / 2 - (image.float() * text).sum(1).mean() * logit_scale


def clip_open_clip(image, text, logit_scale):
    """ClipLoss of open_clip 3.3: a product for each direction."""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    scale, labels = logit_scale.to(image.dtype), torch.arange(len(image), device=image.device)
    return (F.cross_entropy(scale * image @ text.T, labels) + F.cross_entropy(scale * text @ image.T, labels)) / 2


def memeff(scale):
    """Its temperature is a number and gets no gradient; `stable` would multiply the others."""
    loss = importlib.import_module("memeff").MemoryEfficientCLIPLoss(temperature=1 / scale, stable=False)
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


def info_nce(n: int, d: int, dtype: torch.dtype, device: str, frozen: bool = False) -> Problem:
    """One direction; both sides learn, or the keys are frozen."""
    query, key = views(n, d, dtype, device)

    def cross_entropy(query, key, scale):
        logits = scale.to(query.dtype) * F.normalize(query, dim=1) @ F.normalize(key, dim=1).T
        return F.cross_entropy(logits, torch.arange(len(query), device=query.device))

    return Problem(
        (query, key.detach() if frozen else key, learned(1 / TEMPERATURE, device)),
        lambda query, key, scale: functional.info_nce(query, key, logit_scale=scale),
        dense={"cross_entropy": cross_entropy},
        textbook=cross_entropy,
        shape=(n, n, d),
        work="frozen" if frozen else "both",
    )


def moco(n: int, d: int, dtype: torch.dtype, device: str, batch: int = 256) -> Problem:
    """n counts the keys of the queue. The loss alone: writing the queue is `queue_push`."""
    batch = min(batch, n)
    (query, key), queue = views(batch, d, dtype, device), views(n, d, torch.float32, device)[1].detach()
    key, queue = key.detach(), F.normalize(queue, dim=1).to(dtype)

    def published(query):
        """He et al., arXiv:1911.05722, without the copy of the queue that it makes each step."""
        q, k = F.normalize(query, dim=1), F.normalize(key.to(query.dtype), dim=1)
        logits = torch.cat(((q * k).sum(1, keepdim=True), q @ queue.to(query.dtype).T), 1) / TEMPERATURE
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))

    return Problem(
        (query,),
        lambda query: functional.moco(query, key.to(query.dtype), queue.to(query.dtype), TEMPERATURE),
        dense={"cross_entropy": published},
        textbook=published,
        shape=(batch, n, d),
        work="frozen",
    )


def siglip(n: int, d: int, dtype: torch.dtype, device: str) -> Problem:
    return Problem(
        (*views(n, d, dtype, device), learned(10.0, device), learned(-10.0, device)),
        functional.siglip,
        "similarity_softplus",
        dense={"logsigmoid": baselines.siglip_logsigmoid, "softplus": baselines.siglip_softplus},
        rivals={"siglip-kernel": siglip_kernel},
        textbook=baselines.siglip_logsigmoid,
        shape=(n, n, d),
        work="softplus",
    )


def siglip_kernel():
    """It takes unit rows and the logarithm of the scale."""
    loss = importlib.import_module("siglip_kernel").fused_siglip_loss
    return lambda image, text, scale, bias: loss(F.normalize(image, dim=1), F.normalize(text, dim=1), scale.log(), bias)


def sup_con(n: int, d: int, dtype: torch.dtype, device: str, classes: int = 1000) -> Problem:
    """Classes in random order: equal labels are everywhere."""
    labels = torch.randint(classes, (n,), generator=torch.Generator(device).manual_seed(1), device=device)

    def published(z):
        return baselines.sup_con_published(z, labels)

    return Problem(
        views(n, d, dtype, device)[:1],
        lambda z: functional.sup_con(z, labels, TEMPERATURE),
        dense={"SupContrast": published},
        textbook=published,
        shape=(n, n, d),
        work="itself",
    )


def cpc(n: int, d: int, dtype: torch.dtype, device: str, frames: int = 23, steps: int = 8) -> Problem:
    """n windows with the frames and steps of the trainer; negatives are the same time of other windows: groups."""
    context, targets = views(n * frames, d, dtype, device)
    context, targets = (x.detach().view(n, frames, d).requires_grad_() for x in (context, targets))
    generator = torch.Generator(device).manual_seed(1)
    predictors = (torch.randn(steps, d, d, generator=generator, device=device) / d).to(dtype).requires_grad_()

    def ours(context, targets, predictors):
        return functional.cpc(context, targets, predictors, negatives="sample")

    def baddbmm(context, targets, predictors):
        predicted, key = torch.einsum("ntc,kzc->tknz", context, predictors), targets.transpose(0, 1)
        ahead = range(1, steps + 1)
        query = torch.cat([predicted[: frames - k, k - 1] for k in ahead])
        logits = torch.baddbmm(query.new_zeros(()), query, torch.cat([key[k:] for k in ahead]).mT, beta=0)
        losses = (logits.logsumexp(2) - logits.diagonal(dim1=1, dim2=2)).mean(1)
        return torch.stack([step.mean() for step in losses.split([frames - k for k in ahead])]).mean()

    inputs = (context, targets, predictors)
    return Problem(inputs, ours, dense={"baddbmm": baddbmm}, textbook=baddbmm)


def nce(n: int, d: int, dtype: torch.dtype, device: str, batch: int = 256, negatives: int = 16_384) -> Problem:
    """n counts the rows of the bank."""
    batch, negatives = min(batch, n), min(negatives, n)
    query, _ = views(batch, d, dtype, device)
    bank, index = bank_and_index(n, d, dtype, device, batch, 1 + negatives)
    log_z = torch.tensor(n).log().item() + d**-1 / (2 * TEMPERATURE**2)  # of independent unit vectors

    def ours(query):
        return functional.nce(query, bank.to(query.dtype), index, TEMPERATURE, log_z=log_z)

    def published(query, scores):
        wide = torch.promote_types(query.dtype, torch.float32)
        return published_nce(scores(F.normalize(query, dim=1), bank.to(query.dtype), index).to(wide), n, log_z)

    gathered = partial(published, scores=baselines.gathered_scores)
    rivals = {
        "gather + bmm (CMC)": lambda: gathered,
        "compiled gather + bmm": lambda: compiled(gathered),
        "product + gather": lambda: partial(published, scores=baselines.picked_scores),
    }
    moved = 2 * batch * (1 + negatives) * d * query.element_size()
    return Problem((query,), ours, "sampled_similarity", rivals=rivals, textbook=gathered, bytes=moved)


def bank_and_index(size, d, dtype, device, rows, columns):
    generator = torch.Generator(device).manual_seed(1)
    bank = F.normalize(torch.randn(size, d, generator=generator, device=device), dim=1).to(dtype)
    return bank, torch.randint(size, (rows, columns), generator=generator, device=device)


# The memory-bound kernels, on rows far larger than the caches: functions without arguments that run on the backend of
# the moment, and return what they wrote


def kernel(primitive: str, x: Tensor, run: Callable, bytes: float) -> Problem:
    return Problem((x,), run, primitive, bytes=bytes, plain=True)


def state_of_each(make: Callable) -> Callable:
    """What a kernel overwrites, a copy for each backend, so that first calls can be compared."""
    states = {}

    def state():
        name = sslkern.backends.current()
        if name not in states:
            states[name] = make()
        return states[name]

    return state


def queue_push(n, d, dtype, device):
    keys = views(n, d, dtype, device)[0].detach()

    @state_of_each
    def state():
        return torch.zeros(2 * n, d, dtype=dtype, device=device), torch.zeros(1, dtype=torch.long, device=device)

    def run():
        queue, ptr = state()
        ops.queue_push_(queue, ptr, keys, normalize=True)
        return (queue,)

    return kernel("queue_push", keys, run, 2 * keys.nbytes)


def bank_update(n, d, dtype, device):
    x = views(n, d, dtype, device)[0].detach()
    bank, _ = bank_and_index(2 * n + n // 2, d, dtype, device, 1, 1)
    index = torch.randperm(len(bank), generator=torch.Generator(device).manual_seed(2), device=device)[:n]
    state = state_of_each(bank.clone)

    def run():
        ops.bank_update_(state(), index, x, 0.5)
        return (state(),)

    return kernel("bank_update", x, run, 3 * x.nbytes + index.nbytes)


def sampled(n, d, dtype, device, batch=256, negatives=16_384, backward=False):
    batch, negatives = min(batch, n), min(negatives, n)
    q = F.normalize(views(batch, d, dtype, device)[0].detach(), dim=1)
    bank, index = bank_and_index(n, d, dtype, device, batch, negatives)
    g = torch.randn(index.shape, generator=torch.Generator(device).manual_seed(3), device=device)

    def run():
        if backward:
            return (ops.sampled_similarity_bwd(q, bank, index, g, need_q=True, need_bank=False)[0],)
        return (ops.sampled_similarity(q, bank, index),)

    moved = index.numel() * (d * q.element_size() + 8 + 4)  # a row, its index, its score or the gradient of that
    return kernel("sampled_similarity", q, run, moved)


def unit_pairs(n, d, dtype, device, backward=False):
    x, y = (v.detach() for v in views(n, d, dtype, device))
    z, norm, _ = load("reference", "unit_pairs").unit_pairs_fwd(x, y, True)
    generator = torch.Generator(device).manual_seed(3)
    da, db = (torch.randn(n, d, generator=generator, device=device) for _ in range(2))
    pull = torch.rand(n, generator=generator, device=device)

    def run():
        module = load(sslkern.backends.resolve("unit_pairs", x), "unit_pairs")
        if backward:
            return module.unit_pairs_bwd(z, norm, pull, da, db, True, True)
        return module.unit_pairs_fwd(x, y, True)

    return kernel("unit_pairs", x, run, 2 * z.nbytes + (da.nbytes + db.nbytes if backward else 0))


KERNELS = {
    "queue_push": queue_push,
    "bank_update": bank_update,
    "sampled_similarity": sampled,
    "sampled_similarity_bwd": partial(sampled, backward=True),
    "unit_pairs": unit_pairs,
    "unit_pairs_bwd": partial(unit_pairs, backward=True),
}
PROBLEMS = {
    "clip": clip,
    "nt_xent": nt_xent,
    "info_nce": info_nce,
    "info_nce_frozen": partial(info_nce, frozen=True),
    "moco": moco,
    "siglip": siglip,
    "sup_con": sup_con,
    "cpc": cpc,
    "nce": nce,
    **KERNELS,
}


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

# The goals: figures of cases, in the units of their names. They are set for an H100 whose library multiplies at RATE;
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


def goals() -> list[Goal]:
    clip, nt_xent, million = "clip-65536-512-bf16", "nt_xent-65536-128-bf16", "nt_xent-1048576-128-bf16"
    compiled, kernels = "compiled dense", [case.key for case in plan("headlines") if case.problem in KERNELS]
    small = [case for case in plan("small") if case.n in SMALL]
    few = [case.key for case in small if case.n <= 1024 and case.d > 64]
    times = {clip: 26, "clip-65536-128-bf16": 7.7, "clip-65536-256-bf16": 15.5, "clip-65536-768-bf16": 38}
    times |= {"clip-32768-512-bf16": 6.8, "clip-8192-512-bf16": 0.5}
    times |= {"nt_xent-65536-64-bf16": 3, nt_xent: 3.9, "nt_xent-65536-256-bf16": 8.3, "nt_xent-65536-512-bf16": 12.5}
    times |= {"nt_xent-8192-128-bf16": 0.13, million: 1000, "info_nce-65536-128-bf16": 7.5}
    times |= {"info_nce_frozen-65536-128-bf16": 3.2, "siglip-65536-768-bf16": 30}
    faster = {clip: 1.4, nt_xent: 5, "nt_xent-65536-512-bf16": 2.2, "cpc-64-128-tf32": 1}
    most = [
        ("ms", ms, times),
        (
            "ms in a CUDA graph",
            lambda key, cases: 1e3 * ours(key, cases)["graph_seconds"],
            {"moco-65536-128-bf16": 0.027, "nt_xent-256-128-bf16": 0.011},
        ),
        ("GB beyond the input", lambda key, cases: ours(key, cases)["peak_bytes"] / 1e9, {clip: 1.7, million: 4}),
        ("times as long as NT-Xent", partial(times_as_long, nt_xent), {"sup_con-65536-128-bf16": 1.4}),
        *(
            (f"times as long as {x}", partial(times_as_long, x), {x.replace("bf16", "fp16"): 1.03})
            for x in (clip, nt_xent)
        ),
    ]
    least = [
        (f"times faster than {compiled}", partial(times_faster, compiled), faster),
        ("times faster than memeff", partial(times_faster, "memeff"), {f"{clip}-rivals": 2.8}),
        ("of the copy rate", of_copy, dict.fromkeys(kernels, 0.85)),
        (
            f"times faster than {compiled}, both in CUDA graphs",
            partial(times_faster, compiled, seconds="graph_seconds"),
            {case.key: 1 / 0.6 if case.key in few else 1 for case in small},
        ),
        (f"times faster than {compiled}, eager", partial(times_faster, compiled), dict.fromkeys(few, 10 / 3)),
    ]
    return [
        Goal(f"{key}, {unit}", partial(figure, key), bound, table is least)
        for table in (most, least)
        for unit, figure, bounds in table
        for key, bound in bounds.items()
    ]
