import warnings

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from sslkern.compat import info_nce as ours
from sslkern.compat._dense import _said as warned

from . import peer
from .agreement import drawn, errs_no_more, random_configurations, same, stepped, trained

theirs = peer("info_nce")
KINDS = "batch", "unpaired", "paired"
DENSE = pytest.mark.filterwarnings("ignore:sslkern.compat.info_nce.info_nce takes the dense path")


@pytest.fixture(autouse=True)
def small_batches_as_large_ones(request, monkeypatch):
    """But in the test of just that, which theirs is quicker for."""
    if "small_batches" not in request.node.name:
        for name in ("FEW_PRODUCTS", "FEW_SCORES", "FEW_FEATURES"):
            monkeypatch.setattr(ours, name, -1)


def shapes(kind, N, M, D):
    """Of queries, positive keys and negatives."""
    return [(N, D), (N, D)] + {"batch": [], "unpaired": [(M, D)], "paired": [(N, M, D)]}[kind]


def mode(kind):
    return "paired" if kind == "paired" else "unpaired"


def both(*args, **options):
    return [package.InfoNCE(*args, **options) for package in (ours, theirs)]


# ---- the numbers -----------------------------------------------------------------------------------------------------


@random_configurations(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    N=st.integers(1, 9),
    M=st.integers(0, 12),
    D=st.integers(1, 12),
    temperature=st.sampled_from([0.1, 0.05, 1, 7.0, -0.3]),
    learns=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_info_nce(seed, kind, N, M, D, temperature, learns, reduction):
    """All three kinds of negatives; the temperature a number, or a tensor that learns."""
    found = []
    for package in (ours, theirs):
        of, learned = temperature, []
        if learns:
            of = torch.tensor(float(temperature), dtype=torch.float64, requires_grad=True)
            learned = [of]
        loss = package.InfoNCE(of, reduction, mode(kind))
        batches = [drawn(seed + i, torch.float64, *shapes(kind, N, M, D)) for i in range(2)]
        if reduction == "none":
            assert loss(*batches[0]).shape == (N,)
            found.append([loss(*batches[0]).detach()])
            weights = torch.linspace(-1, 2, N, dtype=torch.float64)
            found[-1] += stepped(
                lambda *batch, loss=loss, weights=weights: (weights * loss(*batch)).sum(), batches, learned
            )
        else:
            found.append(stepped(loss, batches, learned))
    same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_errs_no_more_than_theirs(kind, dtype):
    def results(loss, seed, of):
        batch = drawn(seed, dtype, *shapes(kind, 48, 24, 32))
        return stepped(loss(0.1, negative_mode=mode(kind)), [[x.detach().to(of).requires_grad_() for x in batch]])

    errs_no_more(results, ours.InfoNCE, theirs.InfoNCE, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_type_is_that_of_the_features(kind):
    """And of a temperature [1], as torch promotes it; inside autocast fp32."""
    for dtype in (torch.bfloat16, torch.float16):
        batch = drawn(0, dtype, *shapes(kind, 6, 5, 4))
        for temperature in (0.1, torch.tensor(0.1), torch.tensor([0.1])):
            mine, other = (loss(*batch) for loss in both(temperature, negative_mode=mode(kind)))
            assert mine.dtype == other.dtype
            assert torch.allclose(mine.float(), other.float(), rtol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batch = drawn(0, torch.bfloat16, *shapes(kind, 6, 5, 4))
        mine, other = (loss(*batch) for loss in both(negative_mode=mode(kind)))
    assert mine.dtype == other.dtype == torch.float32


@pytest.mark.parametrize("kind", ["unpaired", "paired"])
def test_autocast_meets_negatives_in_fp32(kind):
    query, key, negatives = drawn(0, torch.float32, *shapes(kind, 6, 5, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, other = (loss(query.bfloat16(), key.bfloat16(), negatives) for loss in both(negative_mode=mode(kind)))
    assert mine.dtype == other.dtype == torch.float32 and torch.allclose(mine, other, atol=0.1)


def test_rows_of_zeros():
    """They stay zero, with a gradient divided by 1e-12."""
    for kind in KINDS:
        batch = drawn(0, torch.float64, *shapes(kind, 4, 3, 5))
        for x in batch:
            x.data[..., 0, :] = 0
        same(*(stepped(loss, [batch]) for loss in both(negative_mode=mode(kind))))


def test_without_any_negative_the_loss_is_zero():
    for kind in ("unpaired", "paired"):
        results = [stepped(loss, [drawn(0, torch.float64, *shapes(kind, 4, 0, 5))]) for loss in both(0.1, "mean", kind)]
        same(*results)
        assert results[0][0] == 0
    same(*(stepped(loss, [drawn(0, torch.float64, (1, 5), (1, 5))]) for loss in both()))


def test_an_empty_batch_is_nan():
    for kind in KINDS:
        batch = [torch.ones(shape) for shape in shapes(kind, 0, 3, 4)]
        for loss in both(negative_mode=mode(kind)):
            assert loss(*batch).isnan()
        for loss in both(reduction="none", negative_mode=mode(kind)):
            assert loss(*batch).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_small_batches_are_computed_as_they_do(kind):
    """To the bit, in 16 bits too, and without a word."""
    batch = drawn(0, torch.bfloat16, *shapes(kind, 6, 5, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine, other = (stepped(loss, [batch]) for loss in both(negative_mode=mode(kind)))
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


# ---- the dense path --------------------------------------------------------------------------------------------------


@DENSE
def test_a_temperature_for_each_query():
    temperature = torch.linspace(0.1, 1, 6, dtype=torch.float64).unsqueeze(1).requires_grad_()
    for kind in KINDS:
        batch = drawn(0, torch.float64, *shapes(kind, 6, 5, 4))
        same(*(stepped(loss, [batch], [temperature]) for loss in both(temperature, negative_mode=mode(kind))))


@DENSE
def test_a_temperature_of_zero_is_nan():
    batch = drawn(0, torch.float64, (6, 4), (6, 4))
    same(*(stepped(loss, [batch]) for loss in both(0)))
    assert ours.info_nce(*batch, temperature=0.0).isnan()


@DENSE
def test_several_types_are_promoted_where_torch_does():
    (query, negatives), (key,) = drawn(0, torch.float32, (6, 4), (5, 4)), drawn(1, torch.float64, (6, 4))
    same(*(stepped(loss, [(query, key, negatives)]) for loss in both()))
    for loss in both():
        with pytest.raises(RuntimeError):
            loss(query, key)


def test_the_dense_path_says_why_once():
    x, y = drawn(0, torch.float32, (3, 4), (3, 4))
    for given, options, why in (
        ((x, y), dict(temperature=torch.ones(3, 1)), "temperature has 3 elements; pass one"),
        ((x, y), dict(temperature=0), "temperature is 0; pass another number"),
        ((x, y.double(), y), {}, "query, positive_key and negative_keys have several types; convert them to one"),
    ):
        warned.pop(ours.info_nce, None)
        with pytest.warns(UserWarning, match=f"info_nce.info_nce takes the dense path.*: {why}"):
            ours.info_nce(*given, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours.info_nce(*given, **options)


# ---- constructors, calls, errors -------------------------------------------------------------------------------------


def test_names_arguments_and_attributes_are_theirs():
    assert ours.__all__ == theirs.__all__
    for args in ((), (0.2, "sum", "paired")):
        mine, other = both(*args)
        assert all(
            getattr(mine, name) == getattr(other, name) for name in ("temperature", "reduction", "negative_mode")
        )
        assert mine.state_dict() == other.state_dict() == {}
    for loss in both(nn.Parameter(torch.tensor(0.2))):
        assert [name for name, _ in loss.named_parameters()] == ["temperature"]


def test_what_it_was_made_with_may_change():
    batch = drawn(0, torch.float64, (4, 3), (4, 3), (4, 2, 3))
    losses = both()
    for loss in losses:
        loss.temperature, loss.reduction, loss.negative_mode = 0.3, "sum", "paired"
    same(*(stepped(loss, [batch]) for loss in losses))


def test_the_function_takes_what_the_class_does():
    batch = drawn(0, torch.float64, (4, 3), (4, 3), (4, 2, 3))
    same(*([package.info_nce(*batch, 0.2, "none", "paired").detach()] for package in (ours, theirs)))
    options = dict(temperature=0.2, reduction="sum", negative_mode="paired")
    same(*([package.info_nce(*batch, **options).detach()] for package in (ours, theirs)))


def test_helpers():
    x, y = drawn(0, torch.float64, (2, 3, 4), (5, 3))
    for package in (ours, theirs):
        a, b, none = package.normalize(x, y, None)
        assert (
            none is None and torch.allclose(a.norm(dim=-1), torch.ones(2, 3, dtype=torch.float64)) and b.shape == (5, 3)
        )
        assert torch.equal(package.transpose(x), x.transpose(-2, -1))
    same(ours.normalize(x, y, None), theirs.normalize(x, y, None))


@pytest.mark.parametrize(
    "sizes, kind, what",
    [
        ([(4,), (4, 3)], "unpaired", "query must have 2 dimensions, not 1"),
        ([(4, 3), (4, 3, 1)], "unpaired", "positive_key must have 2 dimensions, not 3"),
        ([(4, 3), (4, 3), (4, 2, 3)], "unpaired", "negative_keys must have 2 dimensions .* 'unpaired', not 3"),
        ([(4, 3), (4, 3), (2, 3)], "paired", "negative_keys must have 3 dimensions .* 'paired', not 2"),
        ([(4, 3), (5, 3)], "unpaired", "positive_key must have the 4 rows of query, not 5"),
        ([(4, 3), (4, 3), (5, 2, 3)], "paired", "negative_keys must have the 4 rows of query, not 5"),
        ([(4, 3), (4, 2)], "unpaired", "positive_key must have the 3 features of query, not 2"),
        ([(4, 3), (4, 3), (5, 2)], "unpaired", "negative_keys must have the 3 features of query, not 2"),
    ],
)
def test_sizes_that_are_refused(sizes, kind, what):
    for package, said in ((ours, what), (theirs, None)):
        with pytest.raises(ValueError, match=said):
            package.info_nce(*(torch.ones(size) for size in sizes), negative_mode=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_other_reductions_are_refused(kind):
    for loss in both(reduction="median", negative_mode=mode(kind)):
        with pytest.raises(ValueError, match="reduction|not a valid value"):
            loss(*drawn(0, torch.float32, *shapes(kind, 4, 2, 3)))


def test_other_modes_are_refused_where_there_are_negatives():
    """There too, by an error of Python's."""
    batch = drawn(0, torch.float32, (4, 3), (4, 3), (2, 3))
    same(*([loss(*batch[:2]).detach()] for loss in both(negative_mode="both")), within=1e-6)
    for loss, error in zip(both(negative_mode="both"), (ValueError, UnboundLocalError), strict=True):
        with pytest.raises(error, match="negative"):
            loss(*batch)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_trains_the_same(kind):
    def run(package):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).double()
        model.temperature = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        loss = package.InfoNCE(model.temperature, negative_mode=mode(kind))

        def step(model, i):
            batch = drawn(i, torch.float64, *shapes(kind, 8, 5, 6))
            return loss(*(model(x.detach()) for x in batch))

        return trained(model, step)

    same(run(ours), run(theirs), 1e-8)
