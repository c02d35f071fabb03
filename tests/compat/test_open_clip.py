import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from sslkern.compat import open_clip as ours

from ..distributed.pool import preload
from . import pages, peer
from .agreement import drawn, errs_no_more, random_configurations, same, stepped, trained
from .ranks import as_world, three  # noqa: F401

theirs = peer("open_clip.loss")
preload(__name__)  # open_clip takes seconds to import
CLIP = "ClipLoss", "CoCaLoss", "DistillClipLoss"
DENSE = pytest.mark.filterwarnings("ignore:sslkern.compat.open_clip.* takes the dense path")


@pytest.fixture(autouse=True)
def small_batches_as_large_ones(request, monkeypatch):
    """But in the test of just that, which theirs is quicker for."""
    if "small_batches" not in request.node.name:
        monkeypatch.setattr(ours, "FEW_ROWS", -1)
        monkeypatch.setattr(ours, "FEW_PAIRS", -1)


def pairs(seed, N, D, dtype=torch.float64, count=2):
    """Unit rows, leaves."""
    return [F.normalize(x.detach(), dim=1).requires_grad_() for x in drawn(seed, dtype, *count * [(N, D)])]


def scalars(dtype=torch.float64, scale=10.0, bias=-5.0):
    return [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (scale, bias)]


def both(name, **options):
    return [getattr(package, name)(**options) for package in (ours, theirs)]


# ---- the numbers -----------------------------------------------------------------------------------------------------


@random_configurations(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 12),
    D=st.integers(1, 12),
    scale=st.sampled_from([1.0, 14.3, 100.0]),
    bias=st.sampled_from([None, -10.0, 3.0]),
    number=st.booleans(),
)
def test_clip(seed, N, D, scale, bias, number):
    batch = pairs(seed, N, D)
    if number:
        batch += [scale] if bias is None else [scale, bias]
    else:
        batch += scalars(scale=scale) if bias is None else scalars(scale=scale, bias=bias)
        batch = batch[: 3 + (bias is not None)]
    leaves = [x for x in batch if isinstance(x, torch.Tensor)]
    found = []
    for loss in both("ClipLoss"):
        value = loss(*batch)
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    same(*found)


@random_configurations(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 12),
    D=st.integers(1, 12),
    scale=st.sampled_from([1.0, 10.0, 100.0]),
    bias=st.sampled_from([None, -10.0, 3.0]),
    negative_only=st.booleans(),
)
def test_siglip(seed, N, D, scale, bias, negative_only):
    batch = pairs(seed, N, D) + scalars(scale=scale, bias=bias or 0.0)[: 1 + (bias is not None)]
    found = []
    for loss in both("SigLipLoss"):
        value = loss._loss(*batch, negative_only=negative_only)
        found.append([value.detach(), *torch.autograd.grad(value, batch)])
        if not negative_only:
            value = loss(*batch[:3], batch[3] if bias is not None else None)
            found[-1] += [value.detach(), *torch.autograd.grad(value, batch)]
    same(*found)


@DENSE
@random_configurations(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 8),
    weights=st.sampled_from([(2.0, 1.0), (1, 0.5), (1.0, 0)]),
    pad_id=st.sampled_from([0, 3]),
    output_dict=st.booleans(),
)
def test_coca_and_distillation(seed, N, weights, pad_id, output_dict):
    scale, other_scale = scalars(scale=10.0, bias=20.0)
    image, text, taught_image, taught_text = pairs(seed, N, 6, count=4)
    (logits,) = drawn(seed, torch.float64, (N, 5, 7))
    labels = torch.randint(0, 7, (N, 5), generator=torch.Generator().manual_seed(seed))
    labels[0, 0] = 1  # as of nothing but padding the mean is NaN
    found = []
    for package in (ours, theirs):
        coca = package.CoCaLoss(*weights, pad_id=pad_id)(image, text, logits, labels, scale, output_dict)
        taught = taught_image, taught_text, other_scale
        distilled = package.DistillClipLoss()(image, text, scale, *taught, output_dict=output_dict)
        if output_dict:
            assert list(coca) == ["contrastive_loss", "caption_loss"]
            assert list(distilled) == ["contrastive_loss", "distill_loss"]
            coca, distilled = coca.values(), distilled.values()
        values = [*coca, *distilled]
        leaves = [image, text, taught_image, taught_text, scale, other_scale, logits]
        found.append([*(x.detach() for x in values), *torch.autograd.grad(sum(values), leaves, allow_unused=True)])
    same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_errs_no_more_than_theirs(name, dtype):
    def results(loss, seed, of):
        features = [F.normalize(x.detach().float(), dim=1).to(dtype) for x in drawn(seed, dtype, (48, 32), (48, 32))]
        batch = [x.to(of).requires_grad_() for x in features] + [torch.tensor(10.0).to(of), torch.tensor(-5.0).to(of)]
        return stepped(loss(), [batch])

    errs_no_more(results, getattr(ours, name), getattr(theirs, name), dtype)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_the_type_is_that_of_the_features(name):
    for dtype in (torch.bfloat16, torch.float16):
        scale, bias = scalars(torch.float32)
        found = [loss(*pairs(0, 6, 4, dtype), scale, bias) for loss in both(name)]
        assert found[0].dtype == found[1].dtype == dtype
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = [loss(*pairs(0, 6, 4), scale, bias) for loss in both(name)]
        assert found[0].dtype == found[1].dtype == torch.float64


# ---- constructors, calls, attributes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CLIP, "SigLipLoss"])
def test_attributes_are_theirs(name):
    options = dict(caption_loss_weight=2.0, clip_loss_weight=1.0) if name == "CoCaLoss" else {}
    mine, other = both(name, **options)
    public = [each for each in vars(other) if not each.startswith("_")]
    assert public and all(getattr(mine, each) == getattr(other, each) for each in public)
    assert mine.state_dict() == other.state_dict() == {}
    assert [each for each, _ in mine.named_modules()] == [each for each, _ in other.named_modules()]


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_output_dict(name):
    batch = [*pairs(0, 6, 4), *scalars()]
    for loss in both(name):
        assert list(loss(*batch, output_dict=True)) == ["contrastive_loss"]
        assert torch.equal(loss(*batch, output_dict=True)["contrastive_loss"], loss(*batch))


def test_an_unused_bias_has_a_gradient_of_zero():
    (image, text), (scale, bias) = pairs(0, 6, 4), scalars()
    ours.ClipLoss()(image, text, scale, bias).backward()
    assert bias.grad == 0 and scale.grad != 0


def test_no_bias():
    (image, text), (scale, _) = pairs(0, 6, 4), scalars()
    same(*([loss(image, text, scale, None).detach()] for loss in both("SigLipLoss")))
    same(*([loss(image, text, scale, logit_bias=None).detach()] for loss in both("ClipLoss")))


@pytest.mark.parametrize("local_loss", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_clip_labels(world_size, local_loss):
    """Of local_loss they begin with the rows of this rank; `cache_labels` keeps them for a device and a number."""
    for cache_labels in (False, True):
        mine, other = both(
            "ClipLoss", local_loss=local_loss, cache_labels=cache_labels, rank=world_size - 1, world_size=world_size
        )
        for N in (4, 4, 6, 4):
            same(*([x.get_ground_truth(torch.device("cpu"), N)] for x in (mine, other)))
            assert mine.prev_num_logits == other.prev_num_logits
            assert mine.labels.keys() == other.labels.keys()
        again = [mine.get_ground_truth(torch.device("cpu"), 4) for _ in range(2)]
        assert (again[0] is again[1]) == cache_labels


def test_labels_are_kept_by_a_loss_too():
    for loss in both("ClipLoss", cache_labels=True):
        loss(*pairs(0, 6, 4), 10.0)
        assert loss.prev_num_logits == 6 and torch.equal(loss.labels[torch.device("cpu")], torch.arange(6))


def test_logits():
    batch = [*pairs(0, 6, 4), *scalars()]
    for args in (batch, batch[:3]):
        same(*([x.detach() for x in loss.get_logits(*args)] for loss in both("ClipLoss")))
        same(*([loss.get_logits(*args).detach()] for loss in both("SigLipLoss")))


@pytest.mark.parametrize("negative_only", [False, True])
def test_siglip_labels(negative_only):
    found = [x.get_ground_truth(torch.device("cpu"), torch.bfloat16, 5, negative_only) for x in both("SigLipLoss")]
    same([found[0]], [found[1]])


def test_siglip_distributed_implementations_are_checked():
    for package in (ours, theirs):
        assert package.SigLipLoss(dist_impl=None).dist_impl == "bidir"
        for name in ("bidir", "shift", "reduce", "gather"):
            assert package.SigLipLoss(dist_impl=name).dist_impl == name
        with pytest.raises(AssertionError):
            package.SigLipLoss(dist_impl="ring")


@pytest.mark.parametrize("N, M", [(7, 4), (4, 7), (5, 0)])
@pytest.mark.parametrize("negative_only", [False, True])
@pytest.mark.parametrize("chunk_size", [0, 3])
def test_siglip_blocks_of_other_numbers(N, M, negative_only, chunk_size):
    """Of the texts the first belong to images: as in later versions, which have chunk_size too. 3.3.0 refuses them."""
    (image, _), (text, _), (scale, bias) = pairs(0, N, 3), pairs(1, M, 3), scalars()
    logits = scale * image @ text.t() + bias
    labels = torch.full_like(logits, -1) if negative_only else 2 * torch.eye(N, M) - 1
    want = -F.logsigmoid(labels * logits).sum() / N
    loss = ours.SigLipLoss(chunk_size=chunk_size)._loss(image, text, scale, bias, negative_only=negative_only)
    leaves = image, text, scale, bias
    same(*([x.detach(), *torch.autograd.grad(x, leaves)] for x in (loss, want)))


def test_an_empty_batch_is_nan():
    for loss in both("ClipLoss"):
        assert loss(torch.ones(0, 4), torch.ones(0, 4), 10.0).isnan()


def test_numbers_of_images_and_texts_must_agree():
    for loss in both("ClipLoss"):
        with pytest.raises(ValueError):
            loss(torch.ones(3, 4), torch.ones(4, 4), 10.0)


@pytest.mark.parametrize("name, learned", [("ClipLoss", 3), ("SigLipLoss", 4)])
def test_small_batches_are_computed_as_they_do(name, learned):
    """To the bit, in 16 bits too, and without a word. (CLIP leaves out the bias.)"""
    batch = [*pairs(0, 6, 4, torch.bfloat16), *scalars(torch.float32)][:learned]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine, other = ([value := loss(*batch), *torch.autograd.grad(value, batch)] for loss in both(name))
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_siglip_with_a_chunk_size_stores_no_logits_of_small_batches():
    """And as in later versions its loss of 16 bits is in fp32, where 3.3.0's overflows."""
    saved, batch = [], [*pairs(0, 64, 4), *scalars()]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        loss = ours.SigLipLoss(chunk_size=16)(*batch)
    assert max(saved) < 64 * 64
    same([loss.detach()], [theirs.SigLipLoss()(*batch).detach()])
    alike = [torch.zeros(256, 4, dtype=torch.float16)] * 2 + [1.0, torch.tensor(10.0)]
    loss = ours.SigLipLoss(chunk_size=16)(*alike)
    assert loss.dtype == torch.float32 and loss.isfinite() and theirs.SigLipLoss()(*alike).isinf()


# ---- the dense path --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale, bias, why",
    [
        (torch.tensor(10.0), torch.linspace(-3, 3, 6), "logit_bias has 6 elements; pass one"),
        (torch.linspace(1, 9, 6).unsqueeze(1), None, "logit_scale has 6 elements; pass one"),
    ],
)
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_scales_and_biases_of_rows_are_dense(name, scale, bias, why):
    image, text = pairs(0, 6, 4)
    mine, other = both(name)
    with pytest.warns(UserWarning, match=f"{name} takes the dense path.*{why}"):
        loss = mine(image, text, scale.double(), bias)
    want = other(image, text, scale.double(), bias)
    same(*([x.detach(), *torch.autograd.grad(x, (image, text))] for x in (loss, want)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine(image, text, scale.double(), bias)  # said already
        mine(image, text, 10.0, None)


def test_logits_that_are_inherited_otherwise_count():
    class Shifted:
        def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
            logits = super().get_logits(image_features, text_features, logit_scale, logit_bias)
            return logits + 1 if isinstance(logits, torch.Tensor) else [2 * x for x in logits]

    image, text = pairs(0, 6, 4)
    for name in ("ClipLoss", "SigLipLoss"):
        mine, other = (type("Mine", (Shifted, getattr(of, name)), {})() for of in (ours, theirs))
        with pytest.warns(UserWarning, match="get_logits is that of Mine"):
            loss = mine(image, text, 10.0, None)
        same([loss.detach()], [other(image, text, 10.0, None).detach()])


def test_distillation_says_that_it_is_dense():
    loss, batch = ours.DistillClipLoss(), [*pairs(0, 6, 4), 10.0, *pairs(1, 6, 4), 10.0]
    with pytest.warns(UserWarning, match="DistillClipLoss takes the dense path") as said:
        loss(*batch)
        loss(*batch)
    assert len(said) == 1


def test_horovod_is_asked_for():
    for loss in both("ClipLoss", world_size=2, use_horovod=True):
        with warnings.catch_warnings(), pytest.raises(AssertionError, match="install"):
            warnings.simplefilter("ignore")
            loss(*pairs(0, 6, 4), 10.0)


# ---- over ranks ------------------------------------------------------------------------------------------------------


def over_ranks(group, package, name, options):
    """Losses and gradients, of the scale too."""
    of = ours if package == "ours" else theirs
    place = dict(rank=group.rank(), world_size=group.size())
    with as_world(group), warnings.catch_warnings():
        warnings.filterwarnings("error", "group=None")
        warnings.filterwarnings("ignore", ".*takes the dense path")
        image, text, taught_image, taught_text = pairs(group.rank(), 4, 3, count=4)
        scale, bias = scalars()
        learned = [image, text, scale, bias]
        if name == "DistillClipLoss":
            out = of.DistillClipLoss(**options, **place)(image, text, scale, taught_image, taught_text, 5.0)
            learned = [image, text, scale]
        elif name == "CoCaLoss":
            (logits,), labels = drawn(9, torch.float64, (4, 2, 5)), torch.ones(4, 2, dtype=torch.long)
            out = of.CoCaLoss(1.0, 2.0, **options, **place)(image, text, logits, labels, scale)
            learned = [image, text, scale, logits]
        elif name == "rows":  # on the dense path of ours
            bias = torch.linspace(-3, 3, 4, dtype=torch.float64).requires_grad_()
            learned = [image, text, scale, bias]
            out = (of.SigLipLoss(**options, **place)(image, text, scale, bias),)
        else:
            out = (getattr(of, name)(**options, **place)(image, text, scale, bias),)
        return [*(x.detach() for x in out), *torch.autograd.grad(sum(out), learned)]


COMBINATIONS = [dict(local_loss=a, gather_with_grad=b) for a in (False, True) for b in (False, True)]
CASES = [(name, options) for name in CLIP for options in COMBINATIONS]
CASES += [("SigLipLoss", dict(dist_impl=name)) for name in ("bidir", "shift", "reduce", "gather")]
CASES += [("rows", {})]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_over_ranks(three, name, options, ranks):  # noqa: F811
    mine, other = (three.run(over_ranks, of, name, options, ranks=ranks) for of in ("ours", "theirs"))
    for a, b in zip(mine, other, strict=True):
        same(a, b)


def own_rows(group, options):
    image, text = pairs(group.rank(), 4, 3)
    with as_world(group):
        loss = ours.ClipLoss(**options, rank=group.rank(), world_size=group.size())(image, text, 10.0)
    return torch.autograd.grad(loss, (image, text))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    COMBINATIONS,
    ids=["neither_is_a_share", "gather_with_grad_is_exact", "local_loss_is_of_queries", "both_are_exact"],
)
def test_what_ddp_makes_of_the_gradients(three, options):  # noqa: F811
    """Their mean over W ranks is that of the loss of all rows, or 1 / W of it, or that of the queries alone."""
    rows = zip(*(pairs(rank, 4, 3) for rank in range(2)), strict=True)
    image, text = (torch.cat(x).detach().requires_grad_() for x in rows)
    if options == dict(local_loss=True, gather_with_grad=False):
        keys = text.detach(), image.detach()
    else:
        keys = text, image
    scores, labels = (10 * image @ keys[0].t(), 10 * text @ keys[1].t()), torch.arange(8)
    exact = torch.autograd.grad(sum(F.cross_entropy(x, labels) for x in scores) / 2, (image, text))
    share = 1.0 if any(options.values()) else 1 / 2
    found = [torch.cat(x) / 2 for x in zip(*three.run(own_rows, options, ranks=2), strict=True)]
    same(found, [share * x for x in exact])


def in_another_place(group):
    with as_world(group):
        for loss in (ours.ClipLoss(world_size=group.size() + 1), ours.SigLipLoss(world_size=group.size() + 1)):
            with pytest.raises(ValueError, match="rank and world_size must be those"):
                loss(*pairs(0, 4, 3), *scalars())


@pytest.mark.slow
def test_the_place_must_be_that_of_the_process(three):  # noqa: F811
    three.run(in_another_place, ranks=2)
    for loss in (ours.ClipLoss(world_size=2), ours.SigLipLoss(world_size=2)):
        with pytest.raises(ValueError, match="process group"):
            loss(*pairs(0, 4, 3), *scalars())


# ---- in open_clip's own training -------------------------------------------------------------------------------------


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-5.0))

    def forward(self, image, text):
        features = F.normalize(self.visual(image), dim=-1), F.normalize(self.text(text), dim=-1)
        return dict(zip(("image_features", "text_features"), features, strict=True)) | dict(
            logit_scale=self.logit_scale.exp(), logit_bias=self.logit_bias
        )


def arguments(**changed):
    """What create_loss reads of the command line."""
    names = "distill siglip local_loss gather_with_grad horovod".split()
    return SimpleNamespace(
        **dict.fromkeys(names, False) | dict(model="ViT-B-32", rank=0, world_size=1, loss_dist_impl=None) | changed
    )


@pytest.fixture
def factory(monkeypatch):
    """open_clip.factory, as it is again after the test."""
    module = peer("open_clip.factory")
    for name in (*CLIP, "SigLipLoss"):
        monkeypatch.setattr(module, name, getattr(theirs, name))
    return module


def test_the_recipe_for_create_loss_puts_all_losses_in_place(factory):
    weights = dict(coca_caption_loss_weight=2.0, coca_contrastive_loss_weight=1.0)
    asked = dict(distill=True), dict(siglip=True), dict(model="coca_ViT-B-32", **weights), {}
    pages.run("migrate_open_clip.md", "From open_clip")
    made = [type(factory.create_loss(arguments(**each))) for each in asked]
    assert made == [ours.DistillClipLoss, ours.SigLipLoss, ours.CoCaLoss, ours.ClipLoss]


@pytest.mark.parametrize("siglip", [False, True])
def test_trains_the_same_by_create_loss(siglip, factory):
    found = []
    for package in (theirs, ours):
        if package is ours:
            pages.run("migrate_open_clip.md", "From open_clip")
        torch.manual_seed(0)
        model, loss = Towers().double(), factory.create_loss(arguments(siglip=siglip))
        assert type(loss) is getattr(package, "SigLipLoss" if siglip else "ClipLoss")

        def step(model, i, loss=loss):
            inputs = torch.randn(12, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
            losses = loss(**model(*inputs.split([6, 5], 1)), output_dict=True)
            return sum(losses.values())

        found.append(trained(model, step))
    same(*found, 1e-8)
