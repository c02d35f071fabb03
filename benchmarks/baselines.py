"""What sslkern is compared with, and on which inputs.

Each problem is a function of its size that returns the inputs and the contenders, loss functions of these inputs that
compute the same quantity. Dense is what people write: logits and cross_entropy, or logsumexp.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkern
from sslkern import functional, ops

TEMPERATURE = 0.2


@dataclass
class Problem:
    inputs: tuple[Tensor, ...]
    contenders: dict[str, Callable[..., Tensor]]
    textbook: str  # the contender to trust when it computes in float64


def chunked(loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same loss on the reference backend: matrix products of row blocks and in-place exponentials."""

    @wraps(loss_fn)
    def on_reference(*inputs):
        with sslkern.use_backend("reference"):
            return loss_fn(*inputs)

    return on_reference


def dense(cross_entropy: Callable[..., Tensor], logsumexp: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """The dense forms; "dense" in a result is the fastest of them."""
    return {
        "dense cross_entropy": cross_entropy,
        "dense logsumexp": logsumexp,
        "compiled dense cross_entropy": torch.compile(cross_entropy, dynamic=False),
        "compiled dense logsumexp": torch.compile(logsumexp, dynamic=False),
    }


@cache
def compiled(problem: Callable[..., Problem]) -> Callable[..., Problem]:
    """The same problem with each contender under torch.compile."""

    @wraps(problem)
    def build(*size):
        built = problem(*size)
        built.contenders = {name: torch.compile(fn, dynamic=False) for name, fn in built.contenders.items()}
        return built

    return build


def correlated_pairs(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two views [n, d] as a half-trained encoder gives them, both with gradient."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, n, d, generator=generator)
    b += a
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


# NT-Xent, the loss of SimCLR


def nt_xent(views: int, d: int, dtype: torch.dtype) -> Problem:
    z0, z1 = correlated_pairs(views // 2, d, dtype)
    contenders = {
        "sslkern": nt_xent_sslkern,
        "chunked torch": chunked(nt_xent_sslkern),
        **dense(nt_xent_cross_entropy, nt_xent_logsumexp),
    }
    if dtype == torch.float32:
        contenders["lightly"] = nt_xent_lightly
        if views <= 256:  # its loss has views^3 elements
            contenders["pytorch-metric-learning"] = nt_xent_metric_learning
    return Problem((z0, z1), contenders, "dense cross_entropy")


def nt_xent_sslkern(z0, z1):
    return functional.nt_xent(z0, z1, TEMPERATURE)


def nt_xent_logits(z0, z1):
    z = F.normalize(torch.cat((z0, z1)), dim=1)
    diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (z @ z.T / TEMPERATURE).masked_fill(diagonal, float("-inf"))


def nt_xent_cross_entropy(z0, z1):
    logits = nt_xent_logits(z0, z1)
    positives = torch.arange(len(logits), device=logits.device).roll(len(z0))
    return F.cross_entropy(logits, positives)


def nt_xent_logsumexp(z0, z1):
    positive = (F.normalize(z0, dim=1) * F.normalize(z1, dim=1)).sum(1).mean() / TEMPERATURE
    return nt_xent_logits(z0, z1).logsumexp(1).mean() - positive


def nt_xent_lightly(z0, z1):
    return lightly_loss()(z0, z1)


@cache
def lightly_loss():
    allow_torchvision_import()
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE)


def nt_xent_metric_learning(z0, z1):
    return metric_learning_loss()(torch.cat((z0, z1)), torch.arange(len(z0)).repeat(2))


@cache
def metric_learning_loss():
    from pytorch_metric_learning.losses import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE)


def bare_products(views: int, d: int, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    """The three matrix products of dense autograd and nothing else: Z Z^T, W Z, W^T Z with W [views, views]."""
    z, w = torch.randn(views, d).to(dtype), torch.rand(views, views).to(dtype)
    return lambda: (z @ z.T, w @ z, w.T @ z)


# InfoNCE in both directions, the loss of CLIP, with a learned logit scale


def two_way(rows: int, d: int, dtype: torch.dtype) -> Problem:
    q, k = correlated_pairs(rows, d, dtype)
    logit_scale = torch.tensor(1 / TEMPERATURE, requires_grad=True)
    contenders = {
        "sslkern": two_way_sslkern,
        "chunked torch": chunked(two_way_sslkern),
        **dense(two_way_cross_entropy, two_way_logsumexp),
        "open_clip": two_way_open_clip,
    }
    return Problem((q, k, logit_scale), contenders, "dense cross_entropy")


def two_way_sslkern(q, k, logit_scale):
    return functional.info_nce(q, k, two_way=True, logit_scale=logit_scale)


def two_way_logits(q, k, logit_scale):
    return logit_scale.to(q.dtype) * F.normalize(q, dim=1) @ F.normalize(k, dim=1).T


def two_way_cross_entropy(q, k, logit_scale):
    logits = two_way_logits(q, k, logit_scale)
    positives = torch.arange(len(q), device=q.device)
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2


def two_way_logsumexp(q, k, logit_scale):
    logits = two_way_logits(q, k, logit_scale)
    return (logits.logsumexp(1) + logits.logsumexp(0)).mean() / 2 - logits.diagonal().mean()


def two_way_open_clip(q, k, logit_scale):
    return open_clip_loss()(F.normalize(q, dim=1), F.normalize(k, dim=1), logit_scale.to(q.dtype))


@cache
def open_clip_loss():
    allow_torchvision_import()
    from open_clip.loss import ClipLoss

    return ClipLoss()


# InfoNCE in one direction


def one_way(rows: int, d: int, dtype: torch.dtype) -> Problem:
    contenders = {
        "sslkern": one_way_sslkern,
        "chunked torch": chunked(one_way_sslkern),
        **dense(one_way_cross_entropy, one_way_logsumexp),
        "info-nce-pytorch": one_way_info_nce_pytorch,
    }
    return Problem(correlated_pairs(rows, d, dtype), contenders, "dense cross_entropy")


def one_way_sslkern(q, k):
    return functional.info_nce(q, k, temperature=TEMPERATURE)


def one_way_cross_entropy(q, k):
    return F.cross_entropy(two_way_logits(q, k, torch.tensor(1 / TEMPERATURE)), torch.arange(len(q), device=q.device))


def one_way_logsumexp(q, k):
    logits = two_way_logits(q, k, torch.tensor(1 / TEMPERATURE))
    return (logits.logsumexp(1) - logits.diagonal()).mean()


def one_way_info_nce_pytorch(q, k):
    from info_nce import info_nce

    return info_nce(q, k, temperature=TEMPERATURE)


# SigLIP, with a learned scale and bias


def siglip(rows: int, d: int, dtype: torch.dtype) -> Problem:
    image, text = correlated_pairs(rows, d, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    scale, bias = (torch.tensor(x, dtype=wide, requires_grad=True) for x in (10.0, -10.0))
    contenders = {
        "sslkern": functional.siglip,
        "chunked torch": chunked(functional.siglip),
        "dense logsigmoid": siglip_logsigmoid,
        "dense softplus": siglip_softplus,
        "compiled dense logsigmoid": torch.compile(siglip_logsigmoid, dynamic=False),
        "open_clip": siglip_open_clip,
    }
    return Problem((image, text, scale, bias), contenders, "dense logsigmoid")


def siglip_logits(image, text, scale, bias):
    scale, bias = scale.to(image.dtype), bias.to(image.dtype)
    return scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T + bias


def siglip_logsigmoid(image, text, scale, bias):
    logits = siglip_logits(image, text, scale, bias)
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(logits)


def siglip_softplus(image, text, scale, bias):
    """softplus(-l) = softplus(l) - l: no matrix of labels."""
    logits = siglip_logits(image, text, scale, bias)
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(logits)


def siglip_open_clip(image, text, scale, bias):
    scale, bias = scale.to(image.dtype), bias.to(image.dtype)
    return open_clip_siglip_loss()(F.normalize(image, dim=1), F.normalize(text, dim=1), scale, bias)


@cache
def open_clip_siglip_loss():
    allow_torchvision_import()
    from open_clip.loss import SigLipLoss

    return SigLipLoss()


# A step of MoCo: loss of the queries against their keys and the queue, then the keys enter the queue


def moco_step(batch: int, d: int, dtype: torch.dtype, size: int = 65536) -> Problem:
    q, k = correlated_pairs(batch, d, dtype)
    contenders = {
        "sslkern": moco_sslkern(d, size),
        "chunked torch": chunked(moco_sslkern(d, size)),
        "published MoCo": moco_published(d, dtype, size),
    }
    return Problem((q, k.detach()), contenders, "published MoCo")


def seeded_queue(d, size):
    torch.manual_seed(0)
    return sslkern.FeatureQueue(d, size)


def moco_sslkern(d, size):
    queue = seeded_queue(d, size)

    def step(q, k):
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
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
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        positive = torch.einsum("nd,nd->n", q, k).unsqueeze(1)
        negative = torch.einsum("nd,dk->nk", q, queue.clone())
        logits = torch.cat((positive, negative), dim=1) / TEMPERATURE
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
        queue[:, position : position + len(k)] = k.T
        position = (position + len(k)) % size
        return loss

    return step


# Supervised contrastive loss, the form "out", of single views with 100 labels


def sup_con(rows: int, d: int, dtype: torch.dtype, classes: int = 100) -> Problem:
    z, _ = correlated_pairs(rows, d, dtype)
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    contenders = {
        "sslkern": lambda z: functional.sup_con(z, labels, TEMPERATURE),
        "chunked torch": chunked(lambda z: sup_con_one_pass(z, labels)),
        "SupContrast": lambda z: sup_con_published(z, labels),
        "compiled SupContrast": torch.compile(lambda z: sup_con_published(z, labels), dynamic=False),
    }
    if dtype == torch.float32:
        contenders["pytorch-metric-learning"] = lambda z: metric_learning_sup_con()(z, labels)
    return Problem((z,), contenders, "SupContrast")


def sup_con_one_pass(z, labels):
    """The sum over all others in one pass; the mean over the positives from the sums of the classes."""
    z = F.normalize(z, dim=1)
    row = ops.similarity_lse(z, scale=1 / TEMPERATURE)
    member = F.one_hot(labels).to(z.dtype)
    others = member @ (member.T @ z) - z
    count = member.sum(0)[labels] - 1
    losses = row - (z * others).sum(1) / TEMPERATURE / count.clamp_min(1)
    return losses.masked_fill(count == 0, 0).mean()


def sup_con_published(z, labels):
    """Khosla et al., arXiv:2004.11362, eq. 2 as its authors compute it: masks times N x N logarithms."""
    z = F.normalize(z, dim=1)
    others = 1 - torch.eye(len(z), dtype=z.dtype, device=z.device)
    positives = (labels[:, None] == labels).to(z.dtype) * others
    logits = z @ z.T / TEMPERATURE
    logits = logits - logits.amax(1, keepdim=True).detach()
    log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((positives * log_prob).sum(1) / positives.sum(1).clamp_min(1)).mean()


@cache
def metric_learning_sup_con():
    from pytorch_metric_learning.losses import SupConLoss
    from pytorch_metric_learning.reducers import MeanReducer

    return SupConLoss(temperature=TEMPERATURE, reducer=MeanReducer())  # its own leaves out rows whose loss is 0


# The primitive itself in its four forms, on unit vectors


def lse_self(n: int, d: int, dtype: torch.dtype) -> Problem:
    z, _ = unit_pairs(n, d, dtype)
    return lse_problem((z.requires_grad_(),))


def lse_rows(n: int, d: int, dtype: torch.dtype) -> Problem:
    q, k = unit_pairs(n, d, dtype)
    return lse_problem((q.requires_grad_(), k.requires_grad_()))


def lse_rows_and_columns(n: int, d: int, dtype: torch.dtype) -> Problem:
    q, k = unit_pairs(n, d, dtype)
    return lse_problem((q.requires_grad_(), k.requires_grad_()), columns=True)


def lse_frozen_keys(n: int, d: int, dtype: torch.dtype) -> Problem:
    q, k = unit_pairs(n, d, dtype)
    return lse_problem((q.requires_grad_(), k))


def unit_pairs(n, d, dtype):
    return (F.normalize(x.detach().float(), dim=1).to(dtype) for x in correlated_pairs(n, d, dtype))


def lse_problem(inputs, columns=False):
    def sslkern_lse(q, k=None):
        out = ops.similarity_lse(q, k, 1 / TEMPERATURE, columns=columns)
        return (out[0].mean() + out[1].mean()) / 2 if columns else out.mean()

    def dense_logsumexp(q, k=None):
        s = q @ (q if k is None else k).T / TEMPERATURE
        s = s if k is not None else s.masked_fill(torch.eye(len(q), dtype=torch.bool), float("-inf"))
        row = s.logsumexp(1).mean()
        return (row + s.logsumexp(0).mean()) / 2 if columns else row

    contenders = {
        "sslkern": sslkern_lse,
        "chunked torch": chunked(sslkern_lse),
        "dense logsumexp": dense_logsumexp,
        "compiled dense logsumexp": torch.compile(dense_logsumexp, dynamic=False),
    }
    return Problem(inputs, contenders, "dense logsumexp")


LSE_PROBLEMS = (lse_self, lse_rows, lse_rows_and_columns, lse_frozen_keys)


# The nearest keys of each query, as for kNN evaluation: their scores


def nearest(queries: int, d: int, dtype: torch.dtype, count: int = 200) -> Problem:
    generator = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(rows, d, generator=generator), dim=1).to(dtype) for rows in (queries, 5 * queries))
    contenders = {
        "sslkern": lambda q, k: ops.similarity_topk(q, k, count)[0],
        "chunked torch": lambda q, k: torch.cat([(rows @ k.T).topk(count).values for rows in q.split(256)]),
        "dense matmul + topk": lambda q, k: (q @ k.T).topk(count).values,
    }
    return Problem((q, k), contenders, "dense matmul + topk")


# NCE against a memory bank


def memory_bank(rows: int, d: int, dtype: torch.dtype, size: int = 50_000, negatives: int = 16_384) -> Problem:
    q, _ = correlated_pairs(rows, d, dtype)
    generator = torch.Generator().manual_seed(1)
    bank = F.normalize(torch.randn(size, d, generator=generator), dim=1).to(dtype)
    index = torch.randint(size, (rows, 1 + negatives), generator=generator)
    log_z = math.log(size) + d**-1 / (2 * TEMPERATURE**2)  # of independent unit vectors

    def sslkern_nce(q):
        return functional.nce(q, bank, index, TEMPERATURE, log_z=log_z)

    contenders = {
        "sslkern": sslkern_nce,
        "chunked torch": chunked(sslkern_nce),
        "gather + bmm (CMC)": lambda q: published_nce(gathered_scores(F.normalize(q, dim=1), bank, index), size, log_z),
    }
    if size < 10**6:  # all scores of a larger bank would take gigabytes
        contenders["dense product"] = lambda q: published_nce(
            picked_scores(F.normalize(q, dim=1), bank, index), size, log_z
        )
    return Problem((q,), contenders, "gather + bmm (CMC)")


def memory_bank_large(rows: int, d: int, dtype: torch.dtype) -> Problem:
    return memory_bank(rows, d, dtype, size=1_280_000)


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


PROBLEMS = {
    problem.__name__: problem
    for problem in (
        nt_xent,
        two_way,
        one_way,
        siglip,
        moco_step,
        sup_con,
        nearest,
        memory_bank,
        memory_bank_large,
        *LSE_PROBLEMS,
    )
}


def allow_torchvision_import() -> None:
    """lightly and open_clip import torchvision, whose PyPI wheel finds no operators beside a CPU build of torch."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        global _torchvision
        _torchvision = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
