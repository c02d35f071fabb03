"""Beside a formula written here, and SupContrast's own file where its checkout is on PYTHONPATH."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from sslkern.compat import sup_contrast as ours

from . import peer
from .agreement import drawn, errs_no_more, random_configurations, same, stepped, trained


class Formula(nn.Module):
    """Of each anchor the others, without itself."""

    def __init__(self, temperature=0.07, contrast_mode="all", base_temperature=0.07):
        super().__init__()
        self.temperature, self.contrast_mode, self.base_temperature = temperature, contrast_mode, base_temperature

    def forward(self, features, labels=None, mask=None):
        B, V = features.shape[:2]
        if B * V == 1:
            return torch.tensor(torch.nan, dtype=features.dtype)
        if mask is None:
            mask = torch.eye(B) if labels is None else labels[:, None] == labels
        rows = features.flatten(2).transpose(0, 1).flatten(0, 1)
        anchors = torch.arange(B * V if self.contrast_mode == "all" else B)
        others = torch.stack([torch.cat((torch.arange(i), torch.arange(i + 1, B * V))) for i in anchors])
        scores = torch.einsum("id,ijd->ij", rows[anchors], rows[others]) / self.temperature
        weights = mask.float()[anchors[:, None] % B, others % B]
        losses = (weights * (scores.logsumexp(1, keepdim=True) - scores)).sum(1)
        weight = weights.sum(1)
        return self.temperature / self.base_temperature * (losses / torch.where(weight < 1e-6, 1, weight)).mean()


@pytest.fixture(scope="module")
def package():
    return peer("losses")


def yardsticks():
    try:
        return [Formula, peer("losses").SupConLoss]
    except pytest.skip.Exception:
        return [Formula]


@pytest.fixture(params=[True, False], ids=["small", "fused"])
def small(request, monkeypatch):
    """The path of small batches, and that of all others."""
    if not request.param:
        monkeypatch.setattr(ours, "FEW_PAIRS", -1)
        monkeypatch.setattr(ours, "FEW_OF_VIEWS", -1)
    return request.param


def unit(seed, *shape, dtype=torch.float64):
    return F.normalize(drawn(seed, dtype, shape)[0].detach(), dim=-1).requires_grad_()


def check(features, *args, temperature=0.1, contrast_mode="all", base_temperature=0.07, within=1e-9):
    """Value and gradient are those of all yardsticks."""
    made = (loss(temperature, contrast_mode, base_temperature) for loss in (ours.SupConLoss, *yardsticks()))
    mine, *others = [stepped(lambda x, loss=loss: loss(x, *args), [(features,)]) for loss in made]
    for other in others:
        same(mine, other, within)
    return mine[0]


def positives_of(kind, seed, B):
    """(labels, mask). Weights are few bits long, as their file adds them up in fp32."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (B,), generator=generator)
    if kind == "nothing":
        return None, None
    if kind == "labels":
        return labels, None
    if kind == "labels in a column":
        return labels.view(-1, 1).int(), None
    if kind == "float labels":
        return labels / 3, None
    if kind == "mask":
        return None, torch.rand(B, B, generator=generator) < 0.3
    return None, torch.randint(-3, 9, (B, B), generator=generator) / 8


KINDS = ["nothing", "labels", "labels in a column", "float labels", "mask", "weights"]


# ---- the numbers -----------------------------------------------------------------------------------------------------


@random_configurations(
    seed=st.integers(0, 2**31),
    B=st.integers(2, 8),
    V=st.integers(1, 3),
    D=st.integers(1, 8),
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([0.07, 0.5, 1, -0.3]),
    contrast_mode=st.sampled_from(["all", "one"]),
    base_temperature=st.sampled_from([0.07, 1.0]),
    few=st.sampled_from([-1, 2**17]),
)
def test_numbers(seed, B, V, D, kind, temperature, contrast_mode, base_temperature, few):
    labels, mask = positives_of(kind, seed, B)
    options = dict(temperature=temperature, contrast_mode=contrast_mode, base_temperature=base_temperature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "FEW_PAIRS", few)
        patch.setattr(ours, "FEW_OF_VIEWS", few)
        if labels is not None and labels.ndim == 2:
            column = check_package_alone(unit(seed, B, V, D), labels, **options)
            assert torch.allclose(column, check(unit(seed, B, V, D), labels.view(-1), **options))
        else:
            check(unit(seed, B, V, D), labels, mask, **options)


def check_package_alone(features, *args, temperature, contrast_mode, base_temperature):
    mine = ours.SupConLoss(temperature, contrast_mode, base_temperature)(features, *args)
    for loss in yardsticks()[1:]:
        same([mine.detach()], [loss(temperature, contrast_mode, base_temperature)(features, *args).detach()])
    return mine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("contrast_mode", ["all", "one"])
@pytest.mark.parametrize("kind", ["nothing", "labels", "mask"])
def test_errs_no_more_than_theirs(package, small, kind, contrast_mode, dtype):
    def results(loss, seed, of):
        features = unit(seed, 32, 2, 16, dtype=torch.float32).detach().to(dtype).to(of).requires_grad_()
        loss = loss(0.1, contrast_mode)
        return stepped(lambda x: loss(x, *positives_of(kind, seed, 32)), [(features,)])

    errs_no_more(results, ours.SupConLoss, package.SupConLoss, dtype)


def test_temperature_learns(small):
    """Through the factor in front, too."""
    found = []
    for loss in (ours.SupConLoss, *yardsticks()):
        temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        of, x = loss(temperature), unit(0, 6, 2, 4)
        for kind in KINDS[:2] + KINDS[-1:]:
            value = of(x, *positives_of(kind, 0, 6))
            found.append([value.detach(), *torch.autograd.grad(value, (x, temperature))])
    for i, theirs in enumerate(found[3:]):
        same(found[i % 3], theirs)


def test_a_temperature_in_one_element_is_one(small):
    for kind in KINDS[:2] + KINDS[-1:]:
        losses = [
            loss(torch.tensor([0.2]).double())(unit(0, 6, 2, 4), *positives_of(kind, 0, 6))
            for loss in (ours.SupConLoss, *yardsticks()[1:])
        ]
        assert all(loss.ndim == 0 and torch.allclose(loss, losses[0]) for loss in losses)


def test_a_temperature_of_zero_is_nan_and_said(small):
    for kind in KINDS[:2]:
        with pytest.warns(UserWarning, match="temperature is 0; pass another number"):
            assert ours.SupConLoss(0)(unit(0, 6, 2, 4), *positives_of(kind, 0, 6)).isnan()
        assert all(loss(0)(unit(0, 6, 2, 4), *positives_of(kind, 0, 6)).isnan() for loss in yardsticks()[1:])


@pytest.mark.slow
@pytest.mark.parametrize("kind, contrast_mode", [("nothing", "all"), ("labels", "all"), ("mask", "one")])
def test_trains_the_same(small, kind, contrast_mode):
    def weights(loss):
        torch.manual_seed(0)
        model, loss = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).double(), loss(0.2, contrast_mode)

        def step(model, i):
            (x,) = drawn(i, torch.float64, (12, 2, 6))
            return loss(F.normalize(model(x), dim=2), *positives_of(kind, i, 12))

        return trained(model, step)

    mine, *others = map(weights, (ours.SupConLoss, *yardsticks()))
    for other in others:
        same(mine, other, 1e-8)


# ---- what it keeps ---------------------------------------------------------------------------------------------------


def test_the_package_is_compared_with(package):
    assert yardsticks() == [Formula, package.SupConLoss]


def test_attributes_are_theirs():
    for loss in (ours.SupConLoss, *yardsticks()):
        of = loss(temperature=0.1, contrast_mode="one", base_temperature=0.2)
        assert (of.temperature, of.contrast_mode, of.base_temperature) == (0.1, "one", 0.2) and of.state_dict() == {}
        of = loss()
        assert (of.temperature, of.contrast_mode, of.base_temperature) == (0.07, "all", 0.07)


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((4, 3), {}, "features must be"),
        ((4, 2, 3), dict(labels=torch.arange(4), mask=torch.eye(4)), "labels and mask"),
        ((4, 2, 3), dict(labels=torch.arange(5)), "labels must have"),
    ],
)
def test_errors_are_theirs(shape, options, message):
    for loss in (ours.SupConLoss, *yardsticks()[1:]):
        with pytest.raises(ValueError, match=message if loss is ours.SupConLoss else None):
            loss()(torch.ones(shape), **options)


def test_a_mask_of_another_shape_is_refused(small):
    for shape in ((1, 4), (4, 1), (5, 5), (4,)):
        with pytest.raises(ValueError, match=r"mask must be \[4, 4\]"):
            ours.SupConLoss()(torch.ones(4, 2, 3), mask=torch.ones(shape))


def test_an_empty_batch_is_refused(small):
    for shape in ((0, 2, 3), (4, 0, 3)):
        with pytest.raises(ValueError, match="features must have samples and views"):
            ours.SupConLoss()(torch.ones(shape))


def test_an_unknown_contrast_mode_is_an_error_of_the_call():
    for loss in (ours.SupConLoss, *yardsticks()[1:]):
        of = loss(contrast_mode="both")
        with pytest.raises(ValueError, match="both"):
            of(torch.ones(4, 2, 3))


def test_features_of_more_dimensions_are_flattened(small):
    check(unit(0, 5, 2, 3, 2, 2) / 2, torch.tensor([0, 1, 0, 2, 1]))


def test_features_are_not_normalised(small):
    x = drawn(0, torch.float64, (5, 2, 3))[0]
    check(x, torch.tensor([0, 1, 0, 2, 1]), temperature=1.0)
    assert not torch.allclose(ours.SupConLoss(1.0)(x), ours.SupConLoss(1.0)(2 * x))


def test_a_row_that_is_most_similar_to_itself_by_far(small):
    """Theirs is NaN: beside its own exponential those of the others are 0."""
    x = drawn(0, torch.float64, (6, 2, 4))[0].detach()
    x[1] *= 100
    labels = torch.tensor([0, 1, 0, 2, 1, 1])
    same(*([loss(1.0)(x, labels)] for loss in (ours.SupConLoss, Formula)))
    assert all(loss(1.0)(x, labels).isnan() for loss in yardsticks()[1:])


def test_the_loss_is_multiplied_by_temperature_over_base_temperature():
    x = unit(0, 5, 2, 3)
    assert torch.allclose(ours.SupConLoss(0.5)(x), ours.SupConLoss(0.5, base_temperature=0.5)(x) * 0.5 / 0.07)


def test_a_sample_without_positives_adds_nothing_and_counts(small):
    """In the file as it was before December 2023 the loss is NaN."""
    x, labels = unit(0, 4, 1, 3), torch.tensor([0, 1, 1, 2])
    loss = check(x, labels)
    pair = ours.SupConLoss(0.1)(x, mask=torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]))
    assert torch.allclose(loss, pair)
    assert check(x, torch.arange(4)) == 0 and check(x) == 0


def test_one_row_alone_is_nan(small):
    for contrast_mode in ("all", "one"):
        for loss in (ours.SupConLoss, *yardsticks()):
            assert loss(0.1, contrast_mode)(unit(0, 1, 1, 3)).isnan()
        check(unit(0, 1, 2, 3), contrast_mode=contrast_mode)


def test_anchors_of_contrast_mode_one_are_the_first_views(small):
    x = unit(0, 6, 3, 4)
    both = check(x, torch.arange(6) % 3, contrast_mode="one")
    assert not torch.allclose(both, check(x.flip(1), torch.arange(6) % 3, contrast_mode="one"))


def test_mask_need_not_be_symmetric(small):
    x, mask = unit(0, 6, 2, 4), torch.ones(6, 6).triu()
    assert not torch.allclose(check(x, None, mask), check(x, None, mask.t()))
    for contrast_mode in ("all", "one"):
        check(x, None, mask, contrast_mode=contrast_mode)


def test_mask_may_weigh(small):
    """Positives count as much as they weigh, and where that is 0 or less it is divided by 1."""
    x, mask = unit(0, 6, 2, 4), torch.randint(-8, 8, (6, 6), generator=torch.Generator().manual_seed(0)) / 8
    check(x, None, mask)
    assert torch.allclose(check(x, None, mask.abs()), check(x, None, 4 * mask.abs()))
    assert check(x, None, torch.zeros(6, 6)) == 0
    check(x, None, -torch.ones(6, 6))
    check(x, None, torch.zeros(6, 6).fill_diagonal_(0.5))


def test_mask_says_whether_views_of_a_sample_are_positives(small):
    x = unit(0, 6, 2, 4)
    assert torch.allclose(check(x, None, torch.eye(6)), check(x))
    check(x, None, 1 - torch.eye(6))


def test_labels_of_any_type(small):
    x, labels = unit(0, 6, 2, 4), torch.tensor([0, 1, 0, 1, 1, 0])
    want = check(x, labels)
    for dtype in (torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16):
        assert torch.allclose(check(x, labels.to(dtype)), want)


def test_a_label_that_is_nan_is_that_of_no_sample(small):
    """Not even of the other views of its own."""
    labels = torch.tensor([0.5, torch.nan, 0.5, torch.nan, 2.0])
    for contrast_mode in ("all", "one"):
        check(unit(0, 5, 2, 4), labels, contrast_mode=contrast_mode)


@pytest.mark.parametrize("kind", ["nothing", "labels", "mask"])
def test_the_loss_is_in_fp32_at_least(small, kind):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for loss in (ours.SupConLoss, *yardsticks()[1:]):
            value = loss()(unit(0, 6, 2, 4, dtype=dtype), *positives_of(kind, 0, 6))
            assert value.dtype == torch.promote_types(dtype, torch.float32)


def test_autocast(small):
    x = unit(0, 6, 2, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for kind in ("nothing", "labels", "mask"):
            found = [loss(0.1)(x, *positives_of(kind, 0, 6)) for loss in (ours.SupConLoss, *yardsticks()[1:])]
            assert all(value.dtype == torch.float32 and torch.allclose(value, found[0], 2e-2) for value in found)
