import copy
import warnings

import pytest
import torch
from hypothesis import strategies as st

from ..distributed.pool import preload
from . import peer
from .agreement import errs_no_more, random_configurations, same, stepped, trained
from .ranks import as_world, three  # noqa: F401

losses = peer("pytorch_metric_learning.losses")
from pytorch_metric_learning import distances, miners, reducers  # noqa: E402
from pytorch_metric_learning.utils import distributed  # noqa: E402
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu  # noqa: E402

from sslkern.compat import pytorch_metric_learning as ours  # noqa: E402

NAMES = ["NTXentLoss", "SupConLoss"]
DISTANCES = {
    "default": lambda: None,
    "cosine": distances.CosineSimilarity,
    "dot": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    "power": lambda: distances.DotProductSimilarity(power=3),
    "1-norm": lambda: distances.DotProductSimilarity(p=1),
    "Euclidean": distances.LpDistance,
    "SNR": distances.SNRDistance,
}
REDUCERS = [
    lambda: None,
    reducers.MeanReducer,
    reducers.AvgNonZeroReducer,
    reducers.SumReducer,
    lambda: reducers.ThresholdReducer(low=0.5, high=3),
    lambda: reducers.ClassWeightedReducer(torch.linspace(1, 2, 100)),
    reducers.PerAnchorReducer,
]
preload(__name__)  # the package takes seconds to import
pytestmark = pytest.mark.filterwarnings("ignore:.*takes the dense path")


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch):
    """The sizes of these tests are left to the package otherwise."""
    monkeypatch.setattr(ours, "SMALL", 0)


def both(name, **options):
    return getattr(ours, name)(**options), getattr(losses, name)(**options)


def results(loss, x, *args, dtype=torch.float64, **options):
    """Value and gradients for x, or for x and the reference x[1]."""

    def of(embeddings, ref_emb=None):
        return loss(embeddings, *args, ref_emb=ref_emb, **options)

    leaves = [z.to(dtype).detach().requires_grad_() for z in x]
    value, *grads = stepped(of, [leaves])
    return [value, *(torch.zeros_like(z) if g is None else g for z, g in zip(leaves, grads, strict=True))]


def equal(pair, x, *args, **options):
    same(*(results(loss, x, *args, **options) for loss in pair))


def tuples(kind, labels, ref_labels):
    """Pairs one by one: all of them, without one positive, or some, of which some more than once."""
    pairs = lmu.get_all_pairs_indices(labels, ref_labels)
    if kind == "all":
        return pairs
    if kind == "all but one":
        return pairs[0][1:], pairs[1][1:], *pairs[2:]
    if kind == "pairs":
        some = [torch.randint(max(1, len(x)), (9,)) if len(x) else x for x in pairs[::2]]
        return pairs[0][some[0]], pairs[1][some[0]], pairs[2][some[1]], pairs[3][some[1]]
    triplets = lmu.get_all_triplets_indices(labels, ref_labels)
    some = torch.randint(max(1, len(triplets[0])), (9,)) if len(triplets[0]) else triplets[0]
    return tuple(x[some] for x in triplets)


# ---- the numbers -----------------------------------------------------------------------------------------------------


@random_configurations(
    name=st.sampled_from(NAMES),
    temperature=st.sampled_from([0.07, 0.5, 0.01, 1, -0.3]),
    distance=st.sampled_from(sorted(DISTANCES)),
    reducer=st.sampled_from(REDUCERS),
    reference=st.sampled_from([None, "labels", "the same labels", "none"]),
    given_pairs=st.sampled_from([None, None, None, "all", "all but one", "pairs", "triplets"]),
    sizes=st.tuples(st.integers(1, 17), st.integers(1, 6), st.sampled_from([1, 2, 4, 100])),
    seed=st.integers(0, 10**6),
)
def test_value_and_gradients(name, temperature, distance, reducer, reference, given_pairs, sizes, seed):
    N, D, classes = sizes
    torch.manual_seed(seed)
    x, labels, options = [torch.randn(N, D)], torch.randint(classes, (N,)), {}
    if reference is not None:
        x.append(torch.randn(N if reference != "labels" else N + 3, D))
        other = torch.randint(classes, (N + 3,))
        options["ref_labels"] = {"labels": other, "the same labels": labels, "none": None}[reference]
    if given_pairs is not None:
        options["indices_tuple"] = tuples(given_pairs, labels, options.get("ref_labels"))
    if reference is not None and reducer is reducers.PerAnchorReducer:
        return  # it takes none
    made = dict(temperature=temperature, distance=DISTANCES[distance](), reducer=reducer and reducer())
    equal(both(name, **made), x, labels, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_errs_no_more_than_theirs(name, dtype):
    labels = torch.arange(40) % 13

    def of_seed(loss, seed, dtype):
        x = torch.randn(40, 24, generator=torch.Generator().manual_seed(seed)).bfloat16()
        return results(loss, [x], labels, dtype=dtype)

    errs_no_more(of_seed, *both(name, temperature=0.1), dtype)


@pytest.mark.parametrize("name", NAMES)
def test_inside_autocast(name):
    x, labels = torch.randn(24, 16), torch.arange(24) % 7
    exact = both(name)[1](x.double(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = (loss(x, labels) for loss in both(name))
    assert got.dtype == torch.float32
    assert (got - exact).abs() <= 2 * (plain - exact).abs() + torch.finfo(torch.bfloat16).eps * exact


@pytest.mark.parametrize("temperature", [0.01, 0.001])
def test_the_loss_of_a_pair_ends_where_its_type_does(temperature):
    """At 87 in fp32, with no gradient beyond."""
    x, labels = torch.tensor([[1.0, 0], [-1, 0.1], [1, 0.2], [-1, 0.3]]), torch.tensor([0, 0, 1, 1])
    got, want = (results(loss, [x], labels, dtype=torch.float32) for loss in both(NAMES[0], temperature=temperature))
    assert torch.allclose(got[0], want[0], rtol=1e-5) and torch.allclose(got[1], want[1], rtol=1e-3, atol=1e-3)
    assert got[0] < 88


def test_losses_that_rounding_makes_zero_are_left_out_of_the_average():
    """SupCon's: of these rows two are far from all others, and one pair is not."""
    x = torch.eye(6)[[0, 0, 1, 1, 2, 3]] + 0.3 * torch.eye(6)[[0, 0, 1, 1, 3, 4]]
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    for dtype, temperature in (torch.float64, 0.02), (torch.float32, 0.05):
        got, want = (results(loss, [x], labels, dtype=dtype) for loss in both(NAMES[1], temperature=temperature))
        assert torch.allclose(got[0], want[0], rtol=1e-5) and torch.allclose(got[1], want[1], rtol=1e-4, atol=1e-5)


# ---- what there may be besides ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("distance", DISTANCES)
def test_every_distance(name, distance):
    x, labels = torch.randn(12, 4), torch.arange(12) % 3
    equal(both(name, distance=DISTANCES[distance]()), [x], labels)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reducer", REDUCERS[1:])
def test_every_reducer(name, reducer):
    equal(both(name, reducer=reducer()), [torch.randn(12, 4)], torch.arange(12) % 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ref_labels", [torch.arange(9) % 3, None])
def test_ref_emb(name, ref_labels):
    """Without labels of its own it has those of the rows, and no row is then a positive of the row in its place."""
    equal(both(name), [torch.randn(9, 4), torch.randn(9, 4)], torch.arange(9) % 4, ref_labels=ref_labels)


def test_a_pair_named_twice_counts_twice():
    """In NTXent, as a loss and as a negative; in SupCon, which asks whether it is named, once."""
    x, labels = torch.randn(8, 4), torch.arange(8) % 3
    pairs = lmu.get_all_pairs_indices(labels)
    for times in (2, 1), (1, 2):
        again = *(z[:3].repeat(times[0] - 1) for z in pairs[:2]), *(z[:3].repeat(times[1] - 1) for z in pairs[2:])
        more = tuple(torch.cat(z) for z in zip(pairs, again, strict=True))
        for name in NAMES:
            equal(both(name), [x], labels, indices_tuple=more)
            values = [both(name)[0](x, labels, given) for given in (pairs, more)]
            assert torch.isclose(*values, rtol=1e-5) == (name == "SupConLoss")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [1, 100])
def test_no_positives_or_no_negatives_is_a_loss_of_zero(name, classes):
    x, labels = torch.randn(8, 4), torch.arange(8) % classes
    equal(both(name), [x], labels)
    assert both(name)[0](x.requires_grad_(), labels) == 0


@pytest.mark.parametrize("name", NAMES)
def test_one_positive_and_one_negative_pair_are_a_loss_of_zero_too(name):
    """Theirs takes no less than two pairs of either."""
    x = [torch.randn(1, 4), torch.randn(2, 4)]
    got = results(both(name)[0], x, torch.tensor([1]), ref_labels=torch.tensor([1, 0]))
    assert got[0] == 0
    equal(both(name), x, torch.tensor([1]), ref_labels=torch.tensor([1, 0]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32, torch.bool])
def test_labels_of_any_type(name, dtype):
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    labels = labels / 3 if dtype == torch.float32 else labels.to(dtype)
    equal(both(name), [torch.randn(6, 4)], labels)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_an_anchor_without_negatives(name):
    labels, ref_labels = torch.tensor([0, 1, 0]), torch.tensor([0, 0, 0, 0])
    equal(both(name), [torch.randn(3, 4), torch.randn(4, 4)], labels, ref_labels=ref_labels)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("miner", [miners.MultiSimilarityMiner, miners.TripletMarginMiner, miners.BatchHardMiner])
def test_miners(name, miner):
    x, labels = torch.randn(16, 4), torch.randint(4, (16,))
    with pytest.warns(UserWarning, match="dense path.*one by one"):
        equal(both(name), [x], labels, indices_tuple=miner()(x, labels))


def test_the_order_of_what_is_not_reduced():
    x, labels = torch.randn(9, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 1])
    for name in NAMES:
        mine, of_peer = (
            loss(x, labels)["loss"] for loss in both(name, reducer=reducers.DoNothingReducer(), temperature=0.5)
        )
        assert torch.allclose(mine["losses"], of_peer["losses"], rtol=1e-9)
        assert mine["reduction_type"] == of_peer["reduction_type"]
        pairs = (mine["indices"], of_peer["indices"])
        assert all(map(torch.equal, *pairs)) if isinstance(pairs[0], tuple) else torch.equal(*pairs)


@pytest.mark.parametrize("name", NAMES)
def test_regularizers(name):
    from pytorch_metric_learning.regularizers import LpRegularizer

    options = dict(embedding_regularizer=LpRegularizer(), embedding_reg_weight=0.3)
    equal(both(name, **options), [torch.randn(8, 4)], torch.arange(8) % 3)


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_theirs(name):
    x, labels = torch.randn(6, 4), torch.arange(6) % 2
    for args in [(x, labels[:4]), (x, None), (x, labels[:, None]), (x[None].expand(6, 6, 4), labels)]:
        found = []
        for loss in both(name):
            with pytest.raises((ValueError, RuntimeError, AssertionError)) as error:
                loss(*args)
            found.append((error.type, str(error.value)))
        assert found[0] == found[1]


def test_they_are_theirs_to_who_asks():
    for name in [*NAMES, "CrossBatchMemory"]:
        assert issubclass(getattr(ours, name), getattr(losses, name)) and getattr(ours, name).__name__ == name
    assert ours.SelfSupervisedLoss is losses.SelfSupervisedLoss
    assert issubclass(ours.DistributedLossWrapper, distributed.DistributedLossWrapper)
    with pytest.raises(AttributeError, match="NoSuchLoss"):
        ours.NoSuchLoss  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_inside_self_supervised_loss(name, symmetric):
    x = [torch.randn(9, 4), torch.randn(9, 4)]
    mine, of_peer = (
        stepped(losses.SelfSupervisedLoss(loss, symmetric), [[z.double().requires_grad_() for z in x]])
        for loss in both(name)
    )
    same(mine, of_peer)


# ---- the memory ------------------------------------------------------------------------------------------------------


def memories(name, size, **options):
    return (ours.CrossBatchMemory(both(name)[0], 4, size, **options), losses.CrossBatchMemory(both(name)[1], 4, size))


@random_configurations(
    name=st.sampled_from(NAMES),
    sizes=st.tuples(st.integers(1, 9), st.integers(9, 25)),
    how=st.sampled_from(["plain", "plain", "pairs", "mask", "miner"]),
    types=st.sampled_from([torch.int64, torch.int32, torch.float32]),
    seed=st.integers(0, 10**6),
)
def test_five_batches_through_a_memory(name, sizes, how, types, seed):
    (N, size), found = sizes, []
    if how == "pairs" and name == "SupConLoss":
        return  # a pair that is of both kinds is refused
    miner = miners.MultiSimilarityMiner() if how == "miner" else None
    for package in (ours, losses):
        torch.manual_seed(seed)
        loss = package.CrossBatchMemory(getattr(package, name)(), 4, size, miner)
        results = []
        for _ in range(5):
            x = torch.randn(N, 4, dtype=torch.float64, requires_grad=True)
            labels, options = torch.randint(3, (N,)).to(types), {}
            if how == "pairs":
                options["indices_tuple"] = lmu.get_all_pairs_indices(labels)
            if how == "mask":
                options["enqueue_mask"] = torch.arange(N) % 2 == 0
            value = loss(x, labels, **options)
            results += [value.detach(), torch.autograd.grad(value, x)[0]]
        found.append([*results, loss.embedding_memory, loss.label_memory])
        assert loss.embedding_memory.dtype == torch.float64 and loss.label_memory.dtype == types
    same(*found)


def test_a_memory_wraps_and_is_written_before_the_loss():
    """So a row finds itself in it, which is left out."""
    loss, of_peer = memories("SupConLoss", 8)
    x, labels = torch.randn(3, 5, 4), torch.arange(5) % 2
    for batch in x:
        assert torch.allclose(loss(batch, labels), of_peer(batch, labels), rtol=1e-5)
    assert torch.equal(loss.embedding_memory, of_peer.embedding_memory) and loss.queue_idx == 15 - 8
    assert torch.equal(loss.embedding_memory[2:7], x[2])


def test_enqueue_mask():
    """What is enqueued is contrasted with nothing, and only that is."""
    loss, of_peer = memories("NTXentLoss", 8)
    x, labels, mask = torch.randn(6, 4), torch.arange(6) % 2, torch.arange(6) > 2
    assert torch.allclose(*(one(x, labels, enqueue_mask=mask) for one in (loss, of_peer)), rtol=1e-5)
    assert torch.equal(loss.embedding_memory[:3], x[3:]) and (loss.embedding_memory[3:] == 0).all()


def test_a_memory_is_recognised_and_no_pairs_are_listed(monkeypatch):
    """The usual case is fused; a batch of one row, too, whose pair with itself theirs keeps."""
    monkeypatch.setattr(lmu, "get_all_pairs_indices", None)
    for name in NAMES:
        for N in (8, 1):
            loss = memories(name, 32)[0]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert all(loss(torch.randn(N, 4), torch.arange(N) % 3).isfinite() for _ in range(5))


def test_a_memory_that_is_set():
    """Zeros at first; what is assigned to it, of any size and type, is used."""
    found = []
    for loss in memories(NAMES[0], 16):
        assert (loss.embedding_memory == 0).all() and loss.embedding_memory.shape == (16, 4)
        torch.manual_seed(1)
        loss.embedding_memory, loss.label_memory = torch.randn(16, 4), torch.arange(16) % 4
        loss.has_been_filled = True
        found.append([loss(torch.randn(6, 4).double(), torch.arange(6) % 4), loss.embedding_memory])
    same(*found)


@pytest.mark.parametrize("name", NAMES)
def test_small_batches_are_left_to_the_package(name, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(ours, "similarity_lse", None)
    equal(both(name), [torch.randn(128, 4)], torch.arange(128) % 5)
    x, labels = torch.randn(129, 4), torch.arange(129) % 5
    equal(both(name), [x], labels, lmu.get_all_pairs_indices(labels))
    with pytest.raises(TypeError):
        both(name)[0](x, labels)


def in_silence(function, *args, **options):
    """Called where a warning, as of the dense path, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("N", [6, 1])
def test_their_memory_around_our_loss(name, N):
    """It names one by one all pairs of the batch and the memory, but those of rows with themselves: the usual case."""
    found = []
    for package in (ours, losses):
        torch.manual_seed(0)
        loss = losses.CrossBatchMemory(getattr(package, name)(), 4, 16)
        found.append([in_silence(loss, torch.randn(N, 4).double(), torch.arange(N) % 3) for _ in range(4)])
    same(*found)


@pytest.mark.parametrize("name", NAMES)
def test_the_pairs_of_their_distributed_wrapper_are_the_usual_case(name):
    """With `efficient` it names those of its own rows and of all."""
    labels = torch.randint(4, (24,))
    pairs = distributed.get_indices_tuple(labels[:12], labels)
    x = [torch.randn(12, 4), torch.randn(24, 4)]
    in_silence(equal, both(name), x, labels[:12], indices_tuple=pairs, ref_labels=labels)


@pytest.mark.parametrize("name", NAMES)
def test_all_negatives_one_by_one_are_the_usual_case(name):
    """Whatever the positives are, if they stand in order and once."""
    labels, ref_labels = torch.randint(4, (2, 12), generator=torch.Generator().manual_seed(0))
    x = [torch.randn(12, 4), torch.randn(12, 4)]
    a, p, b, n = lmu.get_all_pairs_indices(labels, ref_labels)
    twice = torch.arange(len(b)).clamp_min(1)  # the second negative, and never the first
    for pairs in (a, p, b, n), (a[1:], p[1:], b, n), (a[::3], p[::3], b.flip(0), n.flip(0)):
        in_silence(equal, both(name), x, labels, indices_tuple=pairs, ref_labels=ref_labels)
    for pairs in (a, p, b[1:], n[1:]), (a, p, b[twice], n[twice]), (a.flip(0), p.flip(0), b, n), (a, p, a, n[: len(a)]):
        if pairs[2] is a and name == "SupConLoss":
            continue  # it refuses a pair that is of both kinds
        with pytest.warns(UserWarning, match="one by one"):
            equal(both(name), x, labels, indices_tuple=pairs, ref_labels=ref_labels)


def test_what_a_memory_refuses():
    loss = memories(NAMES[0], 16)[0]
    x, labels = torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(ValueError, match="mutually exclusive"):
        loss(x, labels, lmu.get_all_pairs_indices(labels), torch.ones(6, dtype=torch.bool))
    with pytest.raises(AssertionError):
        loss(torch.randn(17, 4), torch.arange(17))


def test_state_dict_loads_both_ways():
    mine, of_peer = memories(NAMES[1], 16)
    mine(torch.randn(6, 4), torch.arange(6) % 3)
    of_peer.load_state_dict(mine.state_dict(), strict=True)
    assert torch.equal(of_peer.embedding_memory, mine.embedding_memory)
    mine.load_state_dict(of_peer.state_dict(), strict=True)
    copy.deepcopy(mine)


# ---- with models, over processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("memory", [False, True])
def test_twenty_steps_of_sgd(name, memory):
    weights = []
    for package in (ours, losses):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).double()
        loss = getattr(package, name)()
        if memory:
            loss = package.CrossBatchMemory(loss, 4, 32)

        def step(model, i, loss=loss):
            torch.manual_seed(i)
            return loss(model(torch.randn(12, 6).double()), torch.randint(4, (12,)))

        weights.append(trained(model, step))
    same(*weights, within=1e-8)


def test_the_wrapper_in_one_process():
    x, labels = torch.randn(6, 4).double(), torch.arange(6) % 3
    for package in (ours, distributed):
        loss = package.DistributedLossWrapper(both(NAMES[0])[0])
        with pytest.warns(UserWarning, match="non-distributed"):
            assert loss(x, labels).item() == pytest.approx(both(NAMES[0])[1](x, labels).item())
    with pytest.raises(TypeError):
        ours.DistributedLossWrapper(torch.nn.Identity())
    with pytest.raises(ValueError):
        ours.DistributedLossWrapper(memories(NAMES[0], 16)[0], efficient=True)


def wrapped(group, cases, x, labels):
    """On each rank: value and gradients of its rows, ours and theirs."""
    ours.SMALL = 0
    with as_world(group):
        rank, found = torch.distributed.get_rank(), []
        for name, efficient, memory in cases:
            of_case = []
            for package, wrapper in ((ours, ours), (losses, distributed)):
                loss = getattr(package, name)()
                if memory:
                    loss = package.CrossBatchMemory(loss, 4, 32)
                loss = wrapper.DistributedLossWrapper(loss, efficient)
                leaf = x[rank].clone().requires_grad_()
                value = loss(leaf, labels[rank])
                of_case.append([value.detach(), *torch.autograd.grad(value, leaf)])
            found.append(of_case)
        return found


@pytest.mark.slow
def test_distributed_loss_wrapper(three):  # noqa: F811
    cases = [(name, *how) for name in NAMES for how in ((False, False), (True, False), (False, True))]
    x, labels = torch.randn(3, 6, 4).double(), torch.randint(4, (3, 6))
    for of_rank in three.run(wrapped, cases, x, labels, ranks=3, within=300):
        for mine, of_peer in of_rank:
            same(mine, of_peer)
