"""What is raced, and on which inputs: each problem is a function of its size, type and device, with ours and all who
compute the same.

A contender is a factory: it imports what it needs and returns a function of the inputs, or raises where that is not
installed. Dense is what people write: all scores stored, then cross_entropy or logsumexp. Formulas of other packages
that need no code of theirs are restated.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial, wraps

import torch
import torch.nn.functional as F
from harness import OURS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sslkern
from sslkern import functional, ops
from sslkern.backends import load

TEMPERATURE = 0.2
CHUNKED = "chunked torch"
DENSE = "dense cross_entropy", "dense logsumexp"
FORMS = OURS, CHUNKED, *DENSE, *(f"compiled {name}" for name in DENSE)  # those that need no other package
SCORES_PER_CHUNK = 2**28  # of the rival that holds so many at a time
# Of torch.compile. A dry run takes "eager": the tracing, which is all that it can check in seconds.
COMPILER = "inductor"
# Passes of 2 N M D flop that an algorithm needs, forward and backward: over rows and columns of S, over a symmetric S,
# over S with keys that do not learn, and of what needs no normaliser; the last two have their gradients in the forward.
FLOORS = {"both": (1, 3), "itself": (0.5, 1.5), "frozen": (2, 0), "softplus": (3, 0), "scores": (1, 0)}

Factory = Callable[[], Callable]


@dataclass
class Problem:
    """inputs: what a contender takes; those that require gradients get them. ours: the loss, `primitive` the one it
    spends its time in. dense: formulas that store S, raced as they are and compiled. rivals: the other contenders.
    chunked: the rival in short blocks, by default ours on the reference backend. textbook: the formula for float64, by
    default the first dense one. shape: N, M, D of S; work: which passes over it are needed (`FLOORS`); bytes: the least
    that are moved. truth: at a size of many rows there is time for one. `plain` functions have no gradient and return
    what they wrote."""

    inputs: tuple[Tensor, ...]
    ours: Callable
    primitive: str = "similarity_lse"
    dense: dict[str, Callable] = field(default_factory=dict)
    rivals: dict[str, Factory] = field(default_factory=dict)
    chunked: Callable | None = None
    textbook: Callable | None = None
    shape: tuple[int, int, int] | None = None
    work: str = "unknown"
    bytes: float = 0
    truth: bool = True
    plain: bool = False

    def __post_init__(self):
        self.chunked = self.chunked or chunked(self.ours)
        self.textbook = self.textbook or next(iter(self.dense.values()))

    def contenders(self) -> dict[str, Factory]:
        dense = {f"dense {name}".strip(): formula for name, formula in self.dense.items()}
        return {
            OURS: lambda: self.ours,
            CHUNKED: lambda: self.chunked,
            **{name: lambda formula=formula: formula for name, formula in dense.items()},
            **{f"compiled {name}": partial(compiled, formula) for name, formula in dense.items()},
            **self.rivals,
        }

    @property
    def pass_flops(self) -> int:
        return 2 * math.prod(self.shape or (0,))

    def floor_flops(self, phase: str = "both") -> float:
        """What the algorithm has to multiply."""
        forward, backward = FLOORS.get(self.work, (0, 0))
        return {"forward": forward, "backward": backward, "both": forward + backward}[phase] * self.pass_flops


def chunked(function: Callable) -> Callable:
    """The same on the reference backend: matrix products of row blocks and in-place exponentials."""

    @wraps(function)
    def on_reference(*inputs):
        with sslkern.use_backend("reference"):
            return function(*inputs)

    return on_reference


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False, backend=COMPILER)


@cache
def all_compiled(build: Callable[..., Problem]) -> Callable[..., Problem]:
    """The same problem with ours and the dense forms under torch.compile."""

    @wraps(build)
    def build_compiled(*size):
        problem = build(*size)
        dense = {name: compiled(formula) for name, formula in problem.dense.items()}
        return replace(problem, ours=compiled(problem.ours), dense=dense)

    return build_compiled


def views(n: int, d: int, dtype: torch.dtype, device: str = "cpu", cosine: float = 0.7) -> tuple[Tensor, Tensor]:
    """Two views [n, d] as a half-trained encoder gives them, with about that cosine between those of a row."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, d, generator=generator, device=device) for _ in range(2))
    b = cosine * a + (1 - cosine**2) ** 0.5 * b
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def learned(value: float, device: str) -> Tensor:
    return torch.tensor(value, device=device, requires_grad=True)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def diagonal(s: Tensor) -> Tensor:
    return torch.eye(len(s), dtype=torch.bool, device=s.device)


def places(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


# ---- NT-Xent, the loss of SimCLR ------------------------------------------------------------------------------------


def nt_xent(n: int, d: int, dtype: torch.dtype, device: str = "cpu", with_scale: bool = False) -> Problem:
    """n counts views, two of each sample; with a learned logit scale, or a temperature that is a number."""
    rivals = {
        "compiled chunks": lambda: nt_xent_chunked,
        "lightly's formula": lambda: nt_xent_lightly,
        "lightly": lightly,
    }
    if n <= 256:  # its loss has n^3 elements
        rivals["pytorch-metric-learning"] = metric_learning_nt_xent
    scale = [learned(1 / TEMPERATURE, device)] if with_scale else []
    return Problem(
        (*views(n // 2, d, dtype, device), *scale),
        nt_xent_sslkern,
        dense={"cross_entropy": nt_xent_cross_entropy, "logsumexp": nt_xent_logsumexp},
        rivals=rivals,
        shape=(n, n, d),
        work="itself",
        truth=n <= 2**17,
    )


def nt_xent_sslkern(z0, z1, scale=None):
    return functional.nt_xent(z0, z1, TEMPERATURE, logit_scale=scale)


def nt_xent_scores(z0, z1, scale):
    z = unit(torch.cat((z0, z1)))
    s = z @ z.T / TEMPERATURE if scale is None else scale.to(z.dtype) * z @ z.T
    return s.masked_fill(diagonal(s), -math.inf)


def nt_xent_cross_entropy(z0, z1, scale=None):
    s = nt_xent_scores(z0, z1, scale)
    return F.cross_entropy(s, places(s).roll(len(z0)))


def nt_xent_logsumexp(z0, z1, scale=None):
    positive = (unit(z0) * unit(z1)).sum(1).mean() * (1 / TEMPERATURE if scale is None else scale)
    return nt_xent_scores(z0, z1, scale).logsumexp(1).mean() - positive


def nt_xent_chunked(z0, z1, scale):
    z = unit(torch.cat((z0, z1)))
    row, _ = chunked_lse(z, z, scale, itself=True)
    return row.mean() - (z[: len(z0)].float() * z[len(z0) :]).sum(1).mean() * scale


def nt_xent_lightly(z0, z1, scale=None):
    """NTXentLoss of lightly 1.6: four products, their diagonals cut out, and cross_entropy of the rest."""
    z0, z1, n = unit(z0), unit(z1), len(z0)
    others = ~torch.eye(n, dtype=torch.bool, device=z0.device)
    s00, s11 = ((z @ z.T / TEMPERATURE)[others].view(n, -1) for z in (z0, z1))
    s01, s10 = z0 @ z1.T / TEMPERATURE, z1 @ z0.T / TEMPERATURE
    s = torch.cat((torch.cat((s01, s00), 1), torch.cat((s10, s11), 1)))
    return F.cross_entropy(s, places(z0).repeat(2))


def lightly():
    allow_torchvision_import()
    loss = importlib.import_module("lightly.loss").NTXentLoss(temperature=TEMPERATURE)
    return lambda z0, z1, scale=None: loss(z0, z1)


def metric_learning_nt_xent():
    loss = importlib.import_module("pytorch_metric_learning.losses").NTXentLoss(temperature=TEMPERATURE)
    return lambda z0, z1, scale=None: loss(torch.cat((z0, z1)), places(z0).repeat(2))


def bare_products(n: int, d: int, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    """The three matrix products of dense autograd and nothing else: Z Z^T, W Z, W^T Z with W [n, n]."""
    z, w = torch.randn(n, d).to(dtype), torch.rand(n, n).to(dtype)
    return lambda: (z @ z.T, w @ z, w.T @ z)


@cache
def lse_of_chunk():
    def lse(q, k, scale, first):
        s = scale.to(q.dtype) * q @ k.T
        if first is not None:  # the column of a row of q itself, which is left out
            s = s.masked_fill(places(k) == (first + places(q))[:, None], -math.inf)
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


# ---- InfoNCE in both directions, the loss of CLIP, with a learned logit scale ---------------------------------------


def two_way(
    n: int, d: int, dtype: torch.dtype, device: str = "cpu", scale: float = 1 / TEMPERATURE, cosine: float = 0.7
) -> Problem:
    rivals = {
        "memeff": partial(memeff, scale),
        "inf-cl": partial(inf_cl, d),
        "cut-cross-entropy": cut_cross_entropy,
        "compiled chunks": lambda: two_way_chunked,
        "open_clip's formula": lambda: two_way_open_clip,
        "open_clip": open_clip,
    }
    return Problem(
        (*views(n, d, dtype, device, cosine), learned(scale, device)),
        functional.clip,
        dense={"cross_entropy": two_way_cross_entropy, "logsumexp": two_way_logsumexp},
        rivals=rivals,
        shape=(n, n, d),
        work="both",
    )


def scaled_scores(q, k, scale):
    return scale.to(q.dtype) * unit(q) @ unit(k).T


def two_way_cross_entropy(q, k, scale):
    s = scaled_scores(q, k, scale)
    positives = places(s)
    return (F.cross_entropy(s, positives) + F.cross_entropy(s.T, positives)) / 2


def two_way_logsumexp(q, k, scale):
    s = scaled_scores(q, k, scale)
    return (s.logsumexp(1) + s.logsumexp(0)).mean() / 2 - s.diagonal().mean()


def two_way_chunked(q, k, scale):
    q, k = unit(q), unit(k)
    row, col = chunked_lse(q, k, scale, itself=False)
    return (row + col).mean() / 2 - (q.float() * k).sum(1).mean() * scale


def two_way_open_clip(q, k, scale):
    """ClipLoss of open_clip 3.3: a product for each direction."""
    q, k, scale, positives = unit(q), unit(k), scale.to(q.dtype), places(q)
    return (F.cross_entropy(scale * q @ k.T, positives) + F.cross_entropy(scale * k @ q.T, positives)) / 2


def open_clip():
    allow_torchvision_import()
    loss = importlib.import_module("open_clip.loss").ClipLoss()
    return lambda q, k, scale: loss(unit(q), unit(k), scale.to(q.dtype))


def memeff(scale):
    """Its temperature is a number and gets no gradient; `stable` would multiply the others."""
    loss = importlib.import_module("memeff").MemoryEfficientCLIPLoss(temperature=1 / scale, stable=False)
    return lambda q, k, scale: loss(q, k)


def inf_cl(d):
    """One direction a call; heads of at most 256 features, whose number divides d."""
    flash = importlib.import_module("inf_cl").cal_flash_loss

    def loss(q, k, scale):
        q, k = unit(q), unit(k)
        both = [flash(*pair, scale=scale, head_dim=min(d, 256)) for pair in ((q, k), (k, q))]
        return torch.cat(both).mean()

    return loss


def cut_cross_entropy():
    """One direction a call; the filter, which drops small gradients, is off."""
    loss_of = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def loss(q, k, scale):
        q, k, positives = unit(q), unit(k), places(q)
        pairs = ((q, k), (k, q))
        return sum(loss_of(scale.to(a.dtype) * a, b, positives, filter_eps=None) for a, b in pairs) / 2

    return loss


# ---- InfoNCE in one direction ---------------------------------------------------------------------------------------


def one_way(
    n: int, d: int, dtype: torch.dtype, device: str = "cpu", with_scale: bool = False, frozen: bool = False
) -> Problem:
    """With a learned logit scale, or a temperature that is a number; both sides learn, or the keys are frozen."""
    q, k = views(n, d, dtype, device)
    scale = [learned(1 / TEMPERATURE, device)] if with_scale else []
    return Problem(
        (q, k.detach() if frozen else k, *scale),
        one_way_sslkern,
        dense={"cross_entropy": one_way_cross_entropy, "logsumexp": one_way_logsumexp},
        rivals={"info-nce-pytorch": info_nce_pytorch},
        shape=(n, n, d),
        work="frozen" if frozen else "both",
    )


def one_way_sslkern(q, k, scale=None):
    return functional.info_nce(q, k, temperature=TEMPERATURE, logit_scale=scale)


def one_way_scores(q, k, scale):
    return scaled_scores(q, k, torch.tensor(1 / TEMPERATURE) if scale is None else scale)


def one_way_cross_entropy(q, k, scale=None):
    return F.cross_entropy(one_way_scores(q, k, scale), places(q))


def one_way_logsumexp(q, k, scale=None):
    s = one_way_scores(q, k, scale)
    return (s.logsumexp(1) - s.diagonal()).mean()


def info_nce_pytorch():
    loss = importlib.import_module("info_nce").info_nce
    return lambda q, k, scale=None: loss(q, k, temperature=TEMPERATURE)


# ---- SigLIP, with a learned scale and bias --------------------------------------------------------------------------


def siglip(n: int, d: int, dtype: torch.dtype, device: str = "cpu") -> Problem:
    return Problem(
        (*views(n, d, dtype, device), learned(10.0, device), learned(-10.0, device)),
        functional.siglip,
        "similarity_softplus",
        dense={"logsigmoid": siglip_logsigmoid, "softplus": siglip_softplus},
        rivals={"siglip-kernel": siglip_kernel, "open_clip": siglip_open_clip},
        shape=(n, n, d),
        work="softplus",
    )


def siglip_scores(image, text, scale, bias):
    return scaled_scores(image, text, scale) + bias.to(image.dtype)


def siglip_logsigmoid(image, text, scale, bias):
    s = siglip_scores(image, text, scale, bias)
    labels = 2 * torch.eye(len(s), dtype=s.dtype, device=s.device) - 1
    return -F.logsigmoid(labels * s).sum() / len(s)


def siglip_softplus(image, text, scale, bias):
    """softplus(-s) = softplus(s) - s: no matrix of labels."""
    s = siglip_scores(image, text, scale, bias)
    return (F.softplus(s).sum() - s.diagonal().sum()) / len(s)


def siglip_kernel():
    """It takes unit rows and the logarithm of the scale."""
    loss = importlib.import_module("siglip_kernel").fused_siglip_loss
    return lambda image, text, scale, bias: loss(unit(image), unit(text), scale.log(), bias)


def siglip_open_clip():
    allow_torchvision_import()
    loss = importlib.import_module("open_clip.loss").SigLipLoss()
    return lambda image, text, scale, bias: loss(unit(image), unit(text), scale.to(image.dtype), bias.to(image.dtype))


# ---- MoCo: the loss alone; and a step, in which the keys then enter the queue ---------------------------------------


def moco(n: int, d: int, dtype: torch.dtype, device: str = "cpu", batch: int = 256) -> Problem:
    """n counts the keys of the queue. The loss alone: writing the queue is `queue_push`."""
    batch = min(batch, n)
    query, key = views(batch, d, dtype, device)
    queue = unit(views(n, d, torch.float32, device)[1].detach()).to(dtype)
    return Problem(
        (query, key.detach(), queue),
        lambda query, key, queue: functional.moco(query, key, queue, TEMPERATURE),
        dense={"cross_entropy": moco_cross_entropy},
        shape=(batch, n, d),
        work="frozen",
    )


def moco_cross_entropy(query, key, queue):
    """He et al., arXiv:1911.05722, without the copy of the queue that it makes each step."""
    q, k = unit(query), unit(key)
    s = torch.cat(((q * k).sum(1, keepdim=True), q @ queue.T), 1) / TEMPERATURE
    return F.cross_entropy(s, torch.zeros_like(places(q)))


def moco_step(n: int, d: int, dtype: torch.dtype, size: int = 65536) -> Problem:
    """n counts queries."""
    query, key = views(n, d, dtype)
    return Problem(
        (query, key.detach()),
        moco_sslkern(d, size),
        rivals={"published MoCo": partial(moco_published, d, dtype, size)},
        chunked=chunked(moco_sslkern(d, size)),
        textbook=moco_published(d, dtype, size),
        shape=(n, size, d),
        work="frozen",
    )


def seeded_queue(d, size):
    torch.manual_seed(0)
    return sslkern.FeatureQueue(d, size)


def moco_sslkern(d, size):
    queue = seeded_queue(d, size)

    def step(q, k):
        q, k = unit(q), unit(k)
        loss = functional.info_nce(q, k, queue.queue.T, TEMPERATURE, normalize=False)
        queue.push(k)
        return loss

    return step


def moco_published(d, dtype, size):
    """He et al., arXiv:1911.05722: the queue is cloned because the backward reads it after it was overwritten."""
    queue = seeded_queue(d, size).queue.to(dtype).contiguous()  # [d, size]
    position = 0

    def step(q, k):
        nonlocal position
        q, k = unit(q), unit(k)
        positive = torch.einsum("nd,nd->n", q, k).unsqueeze(1)
        negative = torch.einsum("nd,dk->nk", q, queue.clone())
        s = torch.cat((positive, negative), dim=1) / TEMPERATURE
        loss = F.cross_entropy(s, torch.zeros(len(q), dtype=torch.long))
        queue[:, position : position + len(k)] = k.T
        position = (position + len(k)) % size
        return loss

    return step


# ---- Supervised contrastive loss, the form "out", of single views ---------------------------------------------------


def sup_con(n: int, d: int, dtype: torch.dtype, device: str = "cpu", classes: int = 100) -> Problem:
    """Classes in random order: equal labels are everywhere."""
    labels = torch.randint(classes, (n,), generator=torch.Generator(device).manual_seed(1), device=device)
    return Problem(
        views(n, d, dtype, device)[:1],
        lambda z: functional.sup_con(z, labels, TEMPERATURE),
        dense={"SupContrast": lambda z: sup_con_published(z, labels)},
        rivals={"pytorch-metric-learning": partial(metric_learning_sup_con, labels)},
        chunked=chunked(lambda z: sup_con_one_pass(z, labels)),
        shape=(n, n, d),
        work="itself",
    )


def sup_con_one_pass(z, labels):
    """The sum over all others in one pass; the mean over the positives from the sums of the classes."""
    z = unit(z)
    row = ops.similarity_lse(z, scale=1 / TEMPERATURE)
    member = F.one_hot(labels).to(z.dtype)
    others = member @ (member.T @ z) - z
    count = member.sum(0)[labels] - 1
    losses = row - (z * others).sum(1) / TEMPERATURE / count.clamp_min(1)
    return losses.masked_fill(count == 0, 0).mean()


def sup_con_published(z, labels):
    """Khosla et al., arXiv:2004.11362, eq. 2 as its authors compute it: masks times N x N logarithms."""
    z = unit(z)
    others = 1 - torch.eye(len(z), dtype=z.dtype, device=z.device)
    positives = (labels[:, None] == labels).to(z.dtype) * others
    s = z @ z.T / TEMPERATURE
    s = s - s.amax(1, keepdim=True).detach()
    log_prob = s - (s.exp() * others).sum(1, keepdim=True).log()
    return -((positives * log_prob).sum(1) / positives.sum(1).clamp_min(1)).mean()


def metric_learning_sup_con(labels):
    losses, reducers = (importlib.import_module(f"pytorch_metric_learning.{name}") for name in ("losses", "reducers"))
    # Its own reducer leaves out rows whose loss is 0.
    loss = losses.SupConLoss(temperature=TEMPERATURE, reducer=reducers.MeanReducer())
    return lambda z: loss(z, labels)


# ---- CPC with the frames and steps of the trainer; negatives are the same time of other windows: groups -------------


def cpc(n: int, d: int, dtype: torch.dtype, device: str = "cpu", frames: int = 23, steps: int = 8) -> Problem:
    """n counts windows."""
    context, targets = (x.detach().view(n, frames, d).requires_grad_() for x in views(n * frames, d, dtype, device))
    generator = torch.Generator(device).manual_seed(1)
    predictors = (torch.randn(steps, d, d, generator=generator, device=device) / d).to(dtype).requires_grad_()

    def ours(context, targets, predictors):
        return functional.cpc(context, targets, predictors, negatives="sample")

    def baddbmm(context, targets, predictors):
        predicted, key = torch.einsum("ntc,kzc->tknz", context, predictors), targets.transpose(0, 1)
        ahead = range(1, steps + 1)
        query = torch.cat([predicted[: frames - k, k - 1] for k in ahead])
        s = torch.baddbmm(query.new_zeros(()), query, torch.cat([key[k:] for k in ahead]).mT, beta=0)
        losses = (s.logsumexp(2) - s.diagonal(dim1=1, dim2=2)).mean(1)
        return torch.stack([step.mean() for step in losses.split([frames - k for k in ahead])]).mean()

    return Problem((context, targets, predictors), ours, dense={"baddbmm": baddbmm})


# ---- NCE against a memory bank --------------------------------------------------------------------------------------


def memory_bank(
    n: int, d: int, dtype: torch.dtype, device: str = "cpu", size: int = 50_000, negatives: int = 16_384
) -> Problem:
    """n counts queries, size the rows of the bank."""
    query, _ = views(n, d, dtype, device)
    bank, index = bank_and_index(size, d, dtype, device, n, 1 + negatives)
    log_z = math.log(size) + d**-1 / (2 * TEMPERATURE**2)  # of independent unit vectors

    def ours(query, bank):
        return functional.nce(query, bank, index, TEMPERATURE, log_z=log_z)

    def published(query, bank, scores):
        wide = torch.promote_types(query.dtype, torch.float32)
        return published_nce(scores(unit(query), bank, index).to(wide), size, log_z)

    gathered = partial(published, scores=gathered_scores)
    rivals = {
        "gather + bmm (CMC)": lambda: gathered,
        "compiled gather + bmm": lambda: compiled(gathered),
        "dense product": lambda: partial(published, scores=picked_scores),
    }
    moved = 2 * n * (1 + negatives) * d * query.element_size()
    inputs = (query, bank)
    return Problem(inputs, ours, "sampled_similarity", rivals=rivals, textbook=gathered, bytes=moved)


def memory_bank_large(n: int, d: int, dtype: torch.dtype) -> Problem:
    return memory_bank(n, d, dtype, size=1_280_000)


def nce(n: int, d: int, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """n counts the rows of the bank."""
    return memory_bank(min(256, n), d, dtype, device, size=n, negatives=min(16_384, n))


def bank_and_index(size, d, dtype, device, rows, columns):
    generator = torch.Generator(device).manual_seed(1)
    bank = unit(torch.randn(size, d, generator=generator, device=device)).to(dtype)
    return bank, torch.randint(size, (rows, columns), generator=generator, device=device)


def gathered_scores(q, bank, index):
    """Tian et al., arXiv:1906.05849: the rows of the bank are gathered, [N, 1 + K, D]."""
    return torch.bmm(bank[index.view(-1)].view(*index.shape, -1), q.unsqueeze(2)).squeeze(2)


def picked_scores(q, bank, index):
    return (q @ bank.T).gather(1, index)


def published_nce(scores, size, log_z):
    p = torch.exp(scores / TEMPERATURE - log_z)
    noise = (scores.shape[1] - 1) / size
    positive, negative = p[:, 0], p[:, 1:]
    return -((positive / (positive + noise)).log().sum() + (noise / (negative + noise)).log().sum()) / len(p)


# ---- The primitive similarity_lse in its four forms, on unit vectors ------------------------------------------------


def lse_self(n: int, d: int, dtype: torch.dtype) -> Problem:
    z, _ = unit_views(n, d, dtype)
    return lse_problem((z.requires_grad_(),), "itself")


def lse_rows(n: int, d: int, dtype: torch.dtype) -> Problem:
    q, k = unit_views(n, d, dtype)
    return lse_problem((q.requires_grad_(), k.requires_grad_()), "both")


def lse_rows_and_columns(n: int, d: int, dtype: torch.dtype) -> Problem:
    q, k = unit_views(n, d, dtype)
    return lse_problem((q.requires_grad_(), k.requires_grad_()), "both", columns=True)


def lse_frozen_keys(n: int, d: int, dtype: torch.dtype) -> Problem:
    q, k = unit_views(n, d, dtype)
    return lse_problem((q.requires_grad_(), k), "frozen")


def unit_views(n, d, dtype):
    return (unit(x.detach()).to(dtype) for x in views(n, d, torch.float32))


def lse_problem(inputs, work, columns=False):
    def ours(q, k=None):
        out = ops.similarity_lse(q, k, 1 / TEMPERATURE, columns=columns)
        return (out[0].mean() + out[1].mean()) / 2 if columns else out.mean()

    def logsumexp(q, k=None):
        if k is None:
            s = q @ q.T / TEMPERATURE
            return s.masked_fill(diagonal(s), -math.inf).logsumexp(1).mean()
        s = q @ k.T / TEMPERATURE
        row = s.logsumexp(1).mean()
        return (row + s.logsumexp(0).mean()) / 2 if columns else row

    q, k = inputs[0], inputs[-1]
    return Problem(inputs, ours, dense={"logsumexp": logsumexp}, shape=(len(q), len(k), q.shape[1]), work=work)


LSE_PROBLEMS = (lse_self, lse_rows, lse_rows_and_columns, lse_frozen_keys)


# ---- The nearest keys of each query, as for kNN evaluation: their scores --------------------------------------------


def nearest(n: int, d: int, dtype: torch.dtype, count: int = 200) -> Problem:
    """n counts queries, of which there are a fifth of the keys."""
    generator = torch.Generator().manual_seed(0)
    q, k = (unit(torch.randn(rows, d, generator=generator)).to(dtype) for rows in (n, 5 * n))

    def matmul_topk(q, k):
        return (q @ k.T).topk(count).values

    return Problem(
        (q, k),
        lambda q, k: ops.similarity_topk(q, k, count)[0],
        "similarity_topk",
        rivals={"dense matmul + topk": lambda: matmul_topk},
        chunked=lambda q, k: torch.cat([matmul_topk(rows, k) for rows in q.split(256)]),
        textbook=matmul_topk,
        shape=(n, 5 * n, d),
        work="scores",
    )


# ---- The memory-bound kernels, on more rows than fit into the caches: functions that run on the backend of the moment,
# and return what they wrote


def kernel(primitive: str, x: Tensor, run: Callable, bytes: float) -> Problem:
    return Problem((x,), run, primitive, textbook=chunked(run), bytes=bytes, plain=True)


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

    def run(keys):
        queue, ptr = state()
        ops.queue_push_(queue, ptr, keys, normalize=True)
        return (queue,)

    return kernel("queue_push", keys, run, 2 * keys.nbytes)


def bank_update(n, d, dtype, device):
    x = views(n, d, dtype, device)[0].detach()
    bank, _ = bank_and_index(2 * n + n // 2, d, dtype, device, 1, 1)
    index = torch.randperm(len(bank), generator=torch.Generator(device).manual_seed(2), device=device)[:n]
    state = state_of_each(bank.clone)

    def run(x):
        ops.bank_update_(state(), index, x, 0.5)
        return (state(),)

    return kernel("bank_update", x, run, 3 * x.nbytes + index.nbytes)


def sampled(n, d, dtype, device, batch=256, negatives=16_384, backward=False):
    batch, negatives = min(batch, n), min(negatives, n)
    q = unit(views(batch, d, dtype, device)[0].detach())
    bank, index = bank_and_index(n, d, dtype, device, batch, negatives)
    g = torch.randn(index.shape, generator=torch.Generator(device).manual_seed(3), device=device)

    def run(q):
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

    def run(x):
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


def allow_torchvision_import() -> None:
    """lightly, open_clip and transformers import it; its PyPI wheel finds no operators beside a CPU build of torch."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        global _torchvision
        _torchvision = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
