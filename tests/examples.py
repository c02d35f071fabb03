"""Calls of everything that is exported: for what must hold for each loss, and for a new one as soon as it is here.

    for name in LOSSES:
        example = LOSSES[name](N=8, D=8, dtype=torch.float32, device="cpu", seed=0)
        loss = example()                                  # target(*args, **options), 0-d
        torch.autograd.grad(loss, example.leaves())       # features, scales and parameters that learn
        changed = example.map(lambda x: x.double())       # the same call of other tensors

A name is that of the function or module, after a colon a way of calling it. OPS are those of `sslkern.ops`, of which
some return tuples, and PUSHES what writes into its first tensor. `test_tables.py` names what is exported without an
example.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

import sslkern
from sslkern import functional as F


@dataclasses.dataclass
class Example:
    target: Callable  # a function or a module
    args: list[Any]
    options: dict[str, Any]

    def __call__(self) -> Any:
        return self.target(*self.args, **self.options)

    def tensors(self) -> list[Tensor]:
        """The arguments that are tensors, in order."""
        return [x for x in tree_flatten((self.args, self.options))[0] if isinstance(x, Tensor)]

    def leaves(self) -> list[Tensor]:
        """What gets a gradient, parameters of the module among it."""
        parameters = self.target.parameters() if isinstance(self.target, nn.Module) else ()
        return [x for x in (*self.tensors(), *parameters) if x.requires_grad]

    def map(self, function: Callable[[Tensor], Any]) -> "Example":
        """The same call with function(x) in place of each tensor x."""
        return Example(self.target, *tree_map_only(Tensor, function, (self.args, self.options)))

    def with_tensor(self, number: int, x: Any) -> "Example":
        """The same call with x in place of one of `tensors()`."""
        count = iter(range(len(self.tensors())))
        return self.map(lambda old: x if next(count) == number else old)


class _Inputs:
    """Makes the tensors of an example, from a generator of its own whatever the defaults of the process are."""

    def __init__(self, N: int, D: int, dtype: torch.dtype, device: str, seed: int):
        self.N, self.D, self.dtype, self.device = N, D, dtype, device
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def bank(self, *shape: int) -> Tensor:
        """[N, D], or [*shape, D]; no gradient. Rows of length 1 or so."""
        x = torch.randn(*(shape or (self.N,)), self.D, generator=self.generator, dtype=torch.float64, device="cpu")
        return (x / self.D**0.5).to(self.device, self.dtype)

    def features(self, *shape: int) -> Tensor:
        """[N, D], or [*shape, D], that learn."""
        return self.bank(*shape).requires_grad_()

    def scale(self, value: float) -> Tensor:
        """0-d, learns."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return torch.tensor(value, dtype=wide, device=self.device, requires_grad=True)

    def weights(self, *shape: int) -> Tensor:
        """[N] or shape, from 0 to 1."""
        x = torch.rand(shape or (self.N,), generator=self.generator, dtype=torch.float64, device="cpu")
        return x.to(self.device, torch.promote_types(self.dtype, torch.float32))

    def ids(self, size: int | None = None) -> Tensor:
        """[N] or [size]: 0 0 1 1 2 2 ..."""
        return torch.arange(size or self.N, dtype=torch.int64, device="cpu").to(self.device) // 2

    def index(self, high: int, *shape: int) -> Tensor:
        x = torch.randint(high, shape, generator=self.generator, dtype=torch.int64, device="cpu")
        return x.to(self.device)

    def module(self, make: Callable[[], nn.Module]) -> nn.Module:
        """The same random buffers and parameters each time, in the type of the features."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(1)
            return make().to(self.device, self.dtype)


def _example(build: Callable[..., tuple]) -> Callable[..., Example]:
    def make(N: int = 8, D: int = 8, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Example:
        target, args, options = build(_Inputs(N, D, dtype, device, seed))
        return Example(target, list(args), options)

    return make


def _two(function, *args, views: int = 2, **options):
    """Losses of `views` tensors [N, D], then a learned temperature or scale."""
    return lambda x: (function, (*(x.features() for _ in range(views)), x.scale(0.3), *args), options)


def _many(function, **options):
    """The same with ids and weights of samples."""
    return lambda x: (
        function,
        (x.features(), x.features(), x.scale(0.3)),
        options | dict(ids=x.ids(), weights=x.weights()),
    )


def _module(make, views: int = 2, frozen: int = 0):
    """A module of views that learn, and then some that do not."""
    return lambda x: (
        x.module(lambda: make(x)),
        (*(x.features() for _ in range(views)), *(x.bank() for _ in range(frozen))),
        {},
    )


def _cpc(x, **options):
    context, targets = x.features(x.N, 5), x.features(x.N, 5)
    return F.cpc, (context, targets, x.features(2, x.D), x.scale(0.8)), options


def _nce(x, bank, **options):
    return F.nce, (x.features(), bank(20), x.index(20, x.N, 6), x.scale(0.3)), options


def _cmc(x, **options):
    views, banks = [x.features() for _ in range(3)], [x.bank(20) for _ in range(3)]
    return F.cmc, (views, banks, x.index(20, x.N, 6), x.scale(0.3)), options


LOSSES = {
    name: _example(build)
    for name, build in {
        "alignment": lambda x: (F.alignment, (x.features(), x.features()), {}),
        "alignment_uniformity": lambda x: (F.alignment_uniformity, (x.features(), x.features()), {}),
        "uniformity": lambda x: (F.uniformity, (x.features(),), {}),
        "nt_xent": _two(F.nt_xent),
        "nt_xent: float": lambda x: (F.nt_xent, (x.features(), x.features(), 0.3), {}),
        "nt_xent: ids": _many(F.nt_xent, label_smoothing=0.1),
        "nt_xent: as they are": _two(F.nt_xent, normalize=False),
        "nt_xent_multi_view": lambda x: (F.nt_xent_multi_view, (x.features(3, x.N), x.scale(0.3)), {}),
        "nt_xent_multi_view: joint": lambda x: (
            F.nt_xent_multi_view,
            ([x.features() for _ in range(3)], x.scale(0.3)),
            dict(positives="joint", ids=x.ids(), weights=x.weights()),
        ),
        "info_nce": lambda x: (F.info_nce, (x.features(), x.features(), None, x.scale(0.3)), {}),
        "info_nce: two ways": lambda x: (
            F.info_nce,
            (x.features(), x.features(), None, x.scale(0.3)),
            dict(two_way=True, ids=x.ids(), weights=x.weights(), label_smoothing=0.1),
        ),
        "info_nce: frozen": lambda x: (F.info_nce, (x.features(), x.bank(), None, x.scale(0.3)), {}),
        "info_nce: queue": lambda x: (F.info_nce, (x.features(), x.features(), x.bank(12), x.scale(0.3)), {}),
        "info_nce: negatives": lambda x: (
            F.info_nce,
            (x.features(), x.features(), x.features(12), x.scale(0.3)),
            dict(in_batch=True, ids=x.ids(), negative_ids=x.ids(12), label_smoothing=0.1),
        ),
        "info_nce: own negatives": lambda x: (
            F.info_nce,
            (x.features(), x.features(), x.features(x.N, 3), x.scale(0.3)),
            dict(label_smoothing=0.1),
        ),
        "clip": lambda x: (F.clip, (x.features(), x.features(), x.scale(3.0)), {}),
        "moco": lambda x: (F.moco, (x.features(), x.bank(), x.bank(12), x.scale(0.3)), {}),
        "moco_v3": lambda x: (F.moco_v3, (x.features(), x.features(), x.bank(), x.bank(), x.scale(0.3)), {}),
        "mnrl": lambda x: (F.mnrl, (x.features(), x.features(), x.features(x.N, 2), x.scale(0.3)), {}),
        "mnrl: every direction": lambda x: (
            F.mnrl,
            (x.features(), x.features(), [x.features() for _ in range(2)], x.scale(0.3)),
            dict(directions=("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"), margin=0.1),
        ),
        "mnrl: pairs": lambda x: (F.mnrl, (x.features(), x.features(), None, x.scale(0.3)), dict(ids=x.ids())),
        "mnrl: guide": lambda x: (
            F.mnrl,
            (x.features(), x.features(), None, x.scale(0.3)),
            dict(guide=[x.bank(), x.bank()]),
        ),
        "mil_nce": lambda x: (F.mil_nce, (x.features(), x.features(x.N, 3), x.scale(0.3)), {}),
        "mil_nce: two ways": lambda x: (
            F.mil_nce,
            (x.features(), x.features(x.N, 3), x.scale(0.3)),
            dict(two_way=True, valid=x.weights(x.N, 3) < 0.7, ids=x.ids(), weights=x.weights(), normalize=True),
        ),
        "cpc": lambda x: _cpc(x),
        "cpc: sample": lambda x: _cpc(x, negatives="sample", normalize=True),
        "cpc: time": lambda x: _cpc(x, negatives="time"),
        "dcl": _two(F.dcl),
        "dcl: ids": _many(F.dcl),
        "dclw": _two(F.dclw),
        "debiased": _two(F.debiased),
        "hard_negative": _two(F.hard_negative),
        "hard_negative: ids": _many(F.hard_negative),
        "deep_infomax": lambda x: (F.deep_infomax, (x.features(), x.features(x.N, 3), "jsd", x.scale(0.8)), {}),
        "deep_infomax: infonce": lambda x: (
            F.deep_infomax,
            (x.features(), x.features(x.N, 3), "infonce", x.scale(0.8)),
            dict(ids=x.ids()),
        ),
        "deep_infomax: dv": lambda x: (F.deep_infomax, (x.features(), x.features(), "dv", x.scale(0.8)), {}),
        "matryoshka": lambda x: (
            F.matryoshka(F.nt_xent, [x.D // 2, x.D]),
            (x.features(), x.features(), x.scale(0.3)),
            {},
        ),
        "nce": lambda x: _nce(x, x.bank),
        "nce: softmax": lambda x: _nce(x, x.features, form="softmax", weights=x.weights()),
        "cmc": lambda x: _cmc(x),
        "cmc: softmax": lambda x: _cmc(x, graph="core", form="softmax", weights=x.weights()),
        "nnclr": lambda x: (
            F.nnclr,
            (x.bank(), x.bank(), x.features(), x.features(), x.bank(12), x.scale(0.3)),
            {},
        ),
        "siglip": lambda x: (F.siglip, (x.features(), x.features(), x.scale(3.0), x.scale(-2.0)), {}),
        "siglip: float": lambda x: (F.siglip, (x.features(), x.features(), 3.0, -2.0), dict(ids=x.ids())),
        "sup_con": lambda x: (F.sup_con, (x.features(), x.ids(), x.scale(0.3)), {}),
        "sup_con: in": lambda x: (F.sup_con, (x.features(x.N, 2), x.ids(), x.scale(0.3)), dict(form="in")),
        "sup_con: several labels": lambda x: (
            F.sup_con,
            (x.features(), x.weights(x.N, 5) < 0.4, x.scale(0.3)),
            dict(weights=x.weights()),
        ),
        "AlignmentUniformityLoss": _module(lambda x: sslkern.AlignmentUniformityLoss()),
        "CLIPLoss": _module(lambda x: sslkern.CLIPLoss()),
        "CMCLoss": lambda x: (
            x.module(lambda: sslkern.CMCLoss(2, 20, x.D, 5)),
            ([x.features(), x.features()], x.index(20, x.N)),
            dict(index=x.index(20, x.N, 6)),
        ),
        "CPCLoss": lambda x: (
            x.module(lambda: sslkern.CPCLoss(x.D, x.D, 2)),
            (x.features(x.N, 5), x.features(x.N, 5)),
            {},
        ),
        "CachedLoss": lambda x: (
            sslkern.CachedLoss(x.module(lambda: nn.Linear(x.D, x.D)), sslkern.NTXentLoss(0.3), 3),
            (x.features(), x.features()),
            {},
        ),
        "DCLLoss": _module(lambda x: sslkern.DCLLoss()),
        "DCLWLoss": _module(lambda x: sslkern.DCLWLoss()),
        "DebiasedLoss": _module(lambda x: sslkern.DebiasedLoss()),
        "DeepInfoMaxLoss": _module(lambda x: sslkern.DeepInfoMaxLoss()),
        "HardNegativeLoss": _module(lambda x: sslkern.HardNegativeLoss()),
        "InfoNCELoss": _module(lambda x: sslkern.InfoNCELoss(nn.Parameter(torch.tensor(0.3)))),
        "MILNCELoss": lambda x: (sslkern.MILNCELoss(), (x.features(), x.features(x.N, 3)), {}),
        "MatryoshkaLoss": _module(lambda x: sslkern.MatryoshkaLoss(sslkern.NTXentLoss(), [x.D // 2, x.D])),
        "MoCoLoss": _module(lambda x: sslkern.MoCoLoss(x.D, 12), views=1, frozen=1),
        "MoCoV3Loss": _module(lambda x: sslkern.MoCoV3Loss(), frozen=2),
        "MultipleNegativesRankingLoss": _module(lambda x: sslkern.MultipleNegativesRankingLoss()),
        "NCELoss": lambda x: (
            x.module(lambda: sslkern.NCELoss(20, x.D, 5)),
            (x.features(), x.index(20, x.N)),
            dict(index=x.index(20, x.N, 6)),
        ),
        "NNCLRLoss": lambda x: (
            x.module(lambda: sslkern.NNCLRLoss(x.D, 12)),
            (x.bank(), x.bank(), x.features(), x.features()),
            {},
        ),
        "NTXentLoss": _module(lambda x: sslkern.NTXentLoss()),
        "NTXentMultiViewLoss": lambda x: (sslkern.NTXentMultiViewLoss(), (x.features(3, x.N),), {}),
        "SigLIPLoss": lambda x: (
            sslkern.SigLIPLoss(),
            (x.features(), x.features(), x.scale(3.0), x.scale(-2.0)),
            {},
        ),
        "SupConLoss": lambda x: (sslkern.SupConLoss(), (x.features(), x.ids()), {}),
    }.items()
}


def _softplus(x, **options):
    problem = x.features(), x.features(5), x.scale(2.0), x.weights().requires_grad_()
    options |= dict(q_ids=x.ids(), k_ids=x.ids(5), k_bias=x.weights(5), q_limit=x.weights() + 1)
    return sslkern.ops.similarity_softplus, problem, options


OPS = {
    name: _example(build)
    for name, build in {
        "similarity_lse": lambda x: (
            sslkern.ops.similarity_lse,
            (x.features(), x.features(5), x.scale(2.0)),
            dict(q_ids=x.ids(), k_ids=x.ids(5), k_bias=x.weights(5), q_limit=x.weights() + 1, columns=True, best=True),
        ),
        "similarity_lse: with itself": lambda x: (sslkern.ops.similarity_lse, (x.features(),), dict(q_ids=x.ids())),
        "similarity_lse: frozen": lambda x: (sslkern.ops.similarity_lse, (x.features(), x.bank(5), x.scale(2.0)), {}),
        "similarity_lse: groups": lambda x: (sslkern.ops.similarity_lse, (x.features(2, x.N), x.features(2, 5)), {}),
        "similarity_lse_bwd": lambda x: (
            sslkern.ops.similarity_lse_bwd,
            (x.bank(), x.bank(5), x.weights(), x.weights(5), x.weights(), x.weights(5), x.scale(2.0)),
            dict(q_ids=x.ids(), k_ids=x.ids(5), k_bias=x.weights(5), q_limit=x.weights() + 1, need_bias=True),
        ),
        "logsumexp": lambda x: (sslkern.ops.logsumexp, (x.features(3, x.N),), dict(dim=0)),
        "similarity_softplus": lambda x: _softplus(x, weights=x.weights().requires_grad_()),
        "similarity_softplus: rows": lambda x: _softplus(x, rows=True, sign=-1),
        "similarity_topk": lambda x: (
            sslkern.ops.similarity_topk,
            (x.features(), x.features(5), 3),
            dict(scale=x.scale(2.0), q_ids=x.ids(), k_ids=x.ids(5), q_limit=x.weights() + 1),
        ),
        "sampled_similarity": lambda x: (
            sslkern.ops.sampled_similarity,
            (x.features(), x.features(20), x.index(20, x.N, 6)),
            {},
        ),
        "sampled_similarity_bwd": lambda x: (
            sslkern.ops.sampled_similarity_bwd,
            (x.bank(), x.bank(20), x.index(20, x.N, 6), x.weights(x.N, 6)),
            {},
        ),
    }.items()
}

PUSHES = {
    name: _example(build)
    for name, build in {
        "queue_push_": lambda x: (
            sslkern.ops.queue_push_,
            (x.bank(12), torch.full((1,), 7, dtype=torch.int64, device=x.device), x.bank()),
            dict(normalize=True),
        ),
        "bank_update_": lambda x: (sslkern.ops.bank_update_, (x.bank(12), x.index(12, x.N), x.bank()), {}),
    }.items()
}

# No losses, and tested where they are: helpers, memories, the choice of a backend.
OTHERS = {
    "CrossBatchMemory",
    "FeatureQueue",
    "MemoryBank",
    "clamp_logit_scale_",
    "cmc_pairs",
    "distributed",
    "functional",
    "nearest_neighbors",
    "ops",
    "use_backend",
}


def value(example: Example) -> list[Tensor]:
    """What a call returns, as a flat list."""
    return [x for x in tree_flatten(example())[0] if isinstance(x, Tensor)]


def value_and_gradients(example: Example) -> list[Tensor | None]:
    """What a call returns and the gradients of its sum, by `leaves()`; None where nothing depends on one."""
    out, leaves = value(example), example.leaves()
    learning = [x for x in out if x.requires_grad]
    total = sum(x.masked_fill(x == -torch.inf, 0).sum() for x in learning)
    grads = torch.autograd.grad(total, leaves, allow_unused=True) if learning and leaves else ()
    return [*(x.detach() for x in out), *grads]
