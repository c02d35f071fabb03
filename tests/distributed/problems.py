"""The losses as problems for ranks: what each is given, by name."""

import inspect

import torch

from sslkern import functional

from .agreement import Problem

OPTIONS = {
    "plain": {},
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "stats": dict(stats=True),
    "smooth": dict(label_smoothing=0.1, reduction="none"),
    "smooth, ids": dict(label_smoothing=0.1),
    "frozen": dict(frozen=("z1", "key", "text")),
    "raw": dict(normalize=False),
}


def draw(N, *shape):
    return torch.randn(N, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(N * 7 + len(shape)))


def of_pairs(N, name, extra, options):
    """A loss of two rows a sample, with ids, weights and a learned scale where `extra` says so."""
    x, y = draw(N, 2, 6).unbind(1)
    loss = getattr(functional, name)
    names = dict(nt_xent=("z0", "z1"), clip=("image", "text")).get(name, ("query", "key"))
    sharded, replicated = dict(zip(names, (x, y), strict=True)), {}
    options = dict(OPTIONS[options])
    if "ids" in extra or options == OPTIONS["smooth, ids"]:
        sharded["ids"] = torch.arange(N) * 2 // 3
    if "weights" in extra:
        sharded["weights"] = draw(N).abs()
    if "two_way" in extra:
        options["two_way"] = True
    if "negatives" in extra or "bank" in extra:
        replicated["negatives"] = draw(5, 6)
        options["in_batch"] = "bank" not in extra
    if "own" in extra:
        sharded["negatives"] = draw(N, 3, 6)
        options["in_batch"] = True
    if "learned" in extra or name == "clip":
        replicated["logit_scale"] = torch.tensor(3.0)
    else:
        options["temperature"] = 0.3
    return Problem(loss, sharded, replicated, options, 2 if name == "nt_xent" else 1)


# ---- the other losses ------------------------------------------------------------------------------------------------


def _views(N, names, width=6):
    return dict(zip(names, draw(N, len(names), width).unbind(1), strict=True))


def _ids(N):
    return torch.arange(N) * 2 // 3


def _tags(N):
    """Some of 7 labels, among them pairs of rows that have nobody else, and rows with none."""
    tags = draw(N, 7) > 0.8
    tags[:, 5:] = False
    tags[: N // 4, :] = False
    tags[1 : N : N - 2 if N > 3 else 1, 5] = True
    return tags


def _prefixes(z0, z1, **options):
    return functional.matryoshka(functional.nt_xent, [2, 6], normalize=True)(z0, z1, **options)


def of_loss(N, case, extra):
    """The Problem of a loss in one of its forms. extra: of "ids", "weights", "learned", "none", "sum"."""
    name, _, form = case.partition(" ")
    loss, sharded, replicated, options = getattr(functional, name, None), {}, {}, {}
    views, by_row = 1, True
    temperature = "temperature"
    if name in ("dcl", "dclw", "debiased", "hard_negative"):
        sharded, views = _views(N, ("z0", "z1")), 2
    elif name == "nt_xent_multi_view":
        loss, views, options = _three_views, 3, dict(positives=form)
        sharded = _views(N, ("a", "b", "c"))
    elif name == "sup_con":
        sharded = dict(z=draw(N, 2, 6) if form in ("views", "tags, views") else draw(N, 6))
        options = dict(form="in") if form == "in" else {}
        if "views" in form:
            loss, views = _views_of_samples, 2
        if form != "views":
            sharded["labels"] = _tags(N) if "tags" in form else _ids(N) * 3 % 5
    elif name == "moco":
        sharded, replicated, options = (
            _views(N, ("query", "key")),
            dict(queue=draw(9, 6)),
            dict(frozen=("key", "queue")),
        )
        options |= dict(stats=form == "stats", label_smoothing=0.1 if form == "smooth" else 0.0)
    elif name == "moco_v3":
        sharded = _views(N, ("query0", "query1", "key0", "key1"))
        options = dict(frozen=("key0", "key1"), times_2t=form != "plain")
    elif name == "mnrl":
        sharded, options = _mnrl(N, form)
        loss = _mnrl_of_lists if "guide" in form else loss
    elif name == "mil_nce":
        sharded, options = dict(anchor=draw(N, 6), positives=draw(N, 3, 6)), dict(two_way="two" in form)
        if "valid" in form:
            sharded["valid"] = draw(N, 3) > -0.5
    elif name == "nce":
        sharded = dict(query=draw(N, 6), index=_index(N))
        replicated = dict(bank=draw(9, 6))
        options = dict(form="softmax") if form == "softmax" else dict(stats=True, frozen=("bank",))
    elif name == "cmc":
        loss, sharded = _two_banks, _views(N, ("a", "b")) | dict(index=_index(N))
        replicated = dict(first=draw(9, 6), second=draw(9, 6) * 2)
    elif name == "nnclr":
        sharded, replicated = _views(N, ("z0", "z1", "p0", "p1")), dict(support=draw(9, 6))
        options = dict(frozen=("z0", "z1", "support"), two_way=form == "two_way")
    elif name == "cpc":
        sharded, by_row = dict(context=draw(N, 5, 4), targets=draw(N, 5, 6)), False
        replicated, options = dict(predictors=draw(2, 6, 4)), dict(negatives=form, stats=True)
    elif name == "deep_infomax":
        sharded = dict(features=draw(N, 6), local_features=draw(N, 6) if form == "jsd" else draw(N, 3, 6))
        options = dict(estimator=form)
    elif name in ("alignment_uniformity", "alignment", "uniformity"):
        sharded = dict(z=draw(N, 6)) if name == "uniformity" else _views(N, ("z0", "z1"))
        options, temperature = dict(normalize=form != "raw"), None
        sharded = {x: z.index_fill(0, torch.tensor([0]), 0) for x, z in sharded.items()} if form == "zeros" else sharded
    elif name == "siglip":
        sharded = _views(N, ("image", "text"))
        replicated, temperature = dict(logit_scale=torch.tensor(2.0), logit_bias=torch.tensor(-1.0)), None
    elif name == "matryoshka":
        loss, sharded = _prefixes, _views(N, ("z0", "z1"))
        views = 2
    parameters = inspect.signature(getattr(functional, "nt_xent" if name == "matryoshka" else name)).parameters
    if "ids" in extra and "ids" in parameters:
        sharded["ids"] = _ids(N)
    if "weights" in extra and "weights" in parameters:
        sharded["weights"] = draw(N).abs()
    if temperature and "learned" in extra:
        replicated["temperature"] = torch.tensor(0.4)
    elif temperature:
        options["temperature"] = 0.4
    if "reduction" in parameters:
        options["reduction"] = "none" if "none" in extra else "sum" if "sum" in extra else "mean"
    return Problem(loss, sharded, replicated, options, views, by_row)


def _three_views(a, b, c, **options):
    return functional.nt_xent_multi_view([a, b, c], **options)


def _views_of_samples(z, labels=None, **options):
    loss = functional.sup_con(z, labels, **options)
    return loss.t() if loss.ndim else loss


def _two_banks(a, b, first, second, index, **options):
    return functional.cmc((a, b), (first, second), index, **options)


def _index(N):
    return torch.randint(9, (N, 4), generator=torch.Generator().manual_seed(N))


def _mnrl(N, form):
    sharded, options = _views(N, ("anchor", "positive")), dict(stats="stats" in form)
    if "two" in form:
        options |= dict(directions=("query_to_doc", "doc_to_query"), partition="per_direction")
    if "all" in form:
        options["directions"] = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    if "hard" in form:
        sharded["negatives"] = draw(N, 2, 6, 1)[..., 0]  # not the anchors and positives once more
    if "margin" in form:
        options |= dict(margin=0.1, margin_strategy="relative")
    if "guide" in form:
        sharded |= dict(zip(("guide0", "guide1"), draw(N, 2, 3).unbind(1), strict=True))
        if "hard" in form:
            sharded["guide2"] = draw(N, 2, 3, 1)[..., 0]
        options["frozen"] = ("guide0", "guide1", "guide2")
    return sharded, options


def _mnrl_of_lists(anchor, positive, guide0, guide1, guide2=None, negatives=None, **options):
    """With hard negatives, and what the guide makes of them, as lists; and directions in an order that differs from
    process to process."""
    guide = [guide0, guide1] if guide2 is None else (guide0, guide1, list(guide2.unbind(1)))
    negatives = None if negatives is None else negatives.unbind(1)
    directions = set(options.pop("directions", ["query_to_doc"]))
    return functional.mnrl(anchor, positive, negatives, directions=directions, guide=guide, **options)


CASES = [
    "dcl", "dclw", "debiased", "hard_negative", "nt_xent_multi_view separate", "nt_xent_multi_view joint", "sup_con",
    "sup_con in", "sup_con views", "sup_con tags", "sup_con tags, views", "moco stats", "moco smooth", "moco_v3",
    "moco_v3 plain", "mnrl stats", "mnrl two", "mnrl hard, all, stats", "mnrl hard, margin", "mnrl two, hard, stats",
    "mnrl guide", "mnrl guide, hard, all, stats", "mnrl guide, hard, two, margin",
    "mil_nce", "mil_nce two, valid", "nce", "nce softmax", "cmc", "nnclr", "nnclr two_way", "cpc all", "cpc sample",
    "cpc time", "deep_infomax jsd", "deep_infomax infonce", "deep_infomax dv", "alignment_uniformity",
    "alignment_uniformity zeros", "alignment raw", "uniformity raw", "siglip", "matryoshka",
]  # fmt: skip
