import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from hypothesis import strategies as st
from torch import nn

from sslkern.compat import lightly as ours

from ..distributed.pool import preload
from . import peer
from .agreement import drawn, errs_no_more, random_configurations, same, stepped, trained
from .ranks import as_world, three  # noqa: F401

losses, modules = peer("lightly.loss"), peer("lightly.models.modules")
theirs = SimpleNamespace(
    **{name: getattr(losses, name) for name in ("NTXentLoss", "DCLLoss", "DCLWLoss")},
    MemoryBankModule=modules.memory_bank.MemoryBankModule,
    NNMemoryBankModule=modules.NNMemoryBankModule,
)
preload(__name__)  # lightly takes seconds to import
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct")  # theirs, of torch.tensor(a tensor)


def both(name, *args, dtype=torch.float64, **options):
    """Ours and theirs, made with the same seed."""
    made = []
    for package in (ours, theirs):
        torch.manual_seed(0)
        made.append(getattr(package, name)(*args, **options).to(dtype))
    return made


def squared_distance(out0, out1):
    return ((out0 - out1) ** 2).sum(1)


# ---- the numbers -----------------------------------------------------------------------------------------------------


@random_configurations(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 9),
    D=st.integers(1, 12),
    K=st.sampled_from([0, 0, 1, 5, 8, 30]),
    temperature=st.sampled_from([0.5, 0.07, 1, 7.0, -0.3]),
    learns=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_nt_xent(seed, N, D, K, temperature, learns):
    found = []
    for loss in both("NTXentLoss", temperature, (K, D) if K else 0):
        batches = [drawn(seed + i, torch.float64, (N, D), (N, D)) for i in range(5)]
        for batch in batches:
            for x, of in zip(batch, learns, strict=True):
                x.requires_grad_(of)
        found.append(stepped(loss, batches)[: -2 if K == 0 else None])  # bank_ptr of no bank is nothing
    same(*found)


@random_configurations(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 9),
    D=st.integers(1, 12),
    temperature=st.sampled_from([0.5, 0.07, 1, -0.3]),
    weights=st.sampled_from([("DCLLoss", {}), ("DCLLoss", {"weight_fn": squared_distance})])
    | st.sampled_from([0.5, 0.05, 1e-7, 1e4]).map(lambda sigma: ("DCLWLoss", {"sigma": sigma})),
)
def test_dcl(seed, N, D, temperature, weights):
    name, options = weights
    batches = [drawn(seed, torch.float64, (N, D), (N, D))]
    same(*(stepped(loss, batches) for loss in both(name, temperature, **options)))


@random_configurations(
    seed=st.integers(0, 2**31), N=st.integers(1, 9), D=st.integers(1, 12), K=st.sampled_from([1, 5, 30])
)
def test_nearest_neighbours(seed, N, D, K):
    found = []
    for bank in both("NNMemoryBankModule", (K, D)):
        outputs = [x.detach() for x in drawn(seed, torch.float64, *5 * [(N, D)])]
        found.append([*(bank(x, update=i % 2 == 0) for i, x in enumerate(outputs)), *bank.buffers()])
    same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name, args", [("NTXentLoss", (0.1,)), ("NTXentLoss", (0.1, (64, 32))), ("DCLLoss", (0.1,)), ("DCLWLoss", (0.1,))]
)
def test_errs_no_more_than_theirs(name, args, dtype):
    def results(loss, seed, of):
        torch.manual_seed(seed)
        loss = loss(*args).to(dtype).to(of)
        return stepped(loss, [[x.detach().to(of).requires_grad_() for x in drawn(seed, dtype, (48, 32), (48, 32))]])[:3]

    errs_no_more(results, getattr(ours, name), getattr(theirs, name), dtype)


def test_temperature_learns():
    found = []
    for loss in both("NTXentLoss", nn.Parameter(torch.tensor(0.2, dtype=torch.float64))):
        assert [name for name, _ in loss.named_parameters()] == ["temperature"]
        found.append(stepped(loss, [drawn(0, torch.float64, (6, 4), (6, 4))], loss.parameters())[:-2])
    same(*found)


def test_one_sample_has_no_negatives():
    """NT-Xent is 0 then, DCL -inf with a gradient."""
    batch = drawn(0, torch.float64, (1, 4), (1, 4))
    for name, value in (("NTXentLoss", 0), ("DCLLoss", -torch.inf), ("DCLWLoss", -torch.inf)):
        results = [stepped(loss, [batch])[:3] for loss in both(name)]
        same(*results)
        assert results[0][0] == value and (results[0][1] == 0).all() == (name == "NTXentLoss")


@pytest.mark.parametrize("name, args", [("NTXentLoss", ()), ("NTXentLoss", (0.5, (8, 4))), ("DCLLoss", ())])
def test_the_type_is_that_of_the_features(name, args):
    for dtype in (torch.bfloat16, torch.float16):
        mine, other = (loss(*drawn(0, dtype, (6, 4), (6, 4))) for loss in both(name, *args, dtype=dtype))
        assert mine.dtype == other.dtype == dtype


def test_autocast_meets_a_bank_in_fp32():
    batch = drawn(0, torch.bfloat16, (6, 4), (6, 4))
    mine, other = both("NTXentLoss", 0.5, (8, 4), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = mine(*batch), other(*batch)
    assert a.dtype == b.dtype == torch.float32 and torch.allclose(a, b, atol=1e-2)
    assert mine.memory_bank.bank.dtype == torch.float32 and torch.allclose(
        *(x.memory_bank.bank for x in (mine, other)), atol=1e-2
    )


# ---- constructors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [ours, theirs], ids=["ours", "theirs"])
def test_temperatures_near_zero_are_refused(package):
    for temperature in (0, 9e-9, -9e-9):
        with pytest.raises(ValueError):
            package.NTXentLoss(temperature)
    package.NTXentLoss(1e-8)


@pytest.mark.parametrize("name, args", [("NTXentLoss", ()), ("NTXentLoss", ((8, 4),)), ("DCLLoss", ())])
def test_temperatures_may_be_negative(name, args):
    batches = [drawn(0, torch.float64, (6, 4), (6, 4))]
    same(*(stepped(loss, batches)[:3] for loss in both(name, -0.3, *args)))


@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "DCLWLoss"])
def test_torch_without_distributed_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    for package in (ours, theirs):
        getattr(package, name)()
        with pytest.raises(ValueError):
            getattr(package, name)(gather_distributed=True)


@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "DCLWLoss", "MemoryBankModule", "NNMemoryBankModule"])
def test_attributes_are_theirs(name):
    args = () if name.endswith("Loss") else ((8, 4),)
    mine, other = both(name, *args)
    unused = {"cross_entropy", "eps"}  # what theirs is computed with
    assert set(vars(other)) - unused <= set(vars(mine)) and set(dict(other.named_modules())) - unused == set(
        dict(mine.named_modules())
    )
    public = [each for each in vars(other) if not each.startswith("_") and each not in unused | {"weight_fn"}]
    assert public and all(getattr(mine, each) == getattr(other, each) for each in public)


# ---- memory banks ----------------------------------------------------------------------------------------------------


def test_bank_size_zero_is_no_bank():
    x = torch.randn(3, 2)
    for size in (0, (0,), (0, 2)):
        for bank in both("MemoryBankModule", size, dtype=torch.float32):
            assert bank(x, update=True)[0] is x and bank(x)[1] is None
    for bank in both("NNMemoryBankModule", 0):
        with pytest.raises(AssertionError):
            bank(x)


@pytest.mark.parametrize("size", [-1, (10, -1), (5,), (5, 2, 2)])
def test_bank_sizes_that_are_refused(size):
    for package in (ours, theirs):
        with pytest.raises(ValueError, match="Illegal memory bank size"):
            package.MemoryBankModule(size)


def test_bank_of_a_bare_size_takes_its_dimension_from_the_first_batch():
    """As lightly had it before 1.6, which raises a ValueError."""
    with pytest.warns(UserWarning, match="'size=5' does not specify feature dimension"):
        bank = ours.MemoryBankModule(5)
    assert bank.bank.shape == (5,) and bank.size == (5,)
    x = torch.randn(3, 2)
    _, before = bank(x, update=True)
    assert before.shape == (2, 5) and bank.bank.shape == (5, 2) and torch.equal(bank.bank[:3], x)
    assert torch.allclose(before.norm(dim=0), torch.ones(5)) and not torch.equal(before.t()[:3], x)
    with pytest.warns(UserWarning, match="size=8"):
        loss = ours.NTXentLoss(memory_bank_size=8)
    loss(*drawn(0, torch.float32, (3, 4), (3, 4))).backward()
    assert loss.memory_bank.bank.shape == (8, 4) and loss.memory_bank.bank_ptr == 3
    with pytest.raises(ValueError):
        theirs.MemoryBankModule(5)


def test_bank_buffers_are_theirs_and_not_saved():
    mine, other = both("NTXentLoss", 0.5, (8, 4), dtype=torch.float32)
    for (name, a), (other_name, b) in zip(mine.named_buffers(), other.named_buffers(), strict=True):
        assert name == other_name and a.dtype == b.dtype and torch.equal(a, b)
    assert [name for name, _ in mine.named_buffers()] == ["memory_bank.bank", "memory_bank.bank_ptr"]
    assert mine.state_dict() == other.state_dict() == {}
    mine.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(mine.state_dict(), strict=True)


@pytest.mark.parametrize("feature_dim_first", [True, False])
def test_bank_is_returned_as_it_was_before(feature_dim_first):
    for bank in both("MemoryBankModule", (5, 2), feature_dim_first=feature_dim_first, dtype=torch.float32):
        before, x = bank.bank.clone(), torch.randn(3, 2, requires_grad=True)
        out, returned = bank(x, labels=torch.arange(3), update=True)
        rows = returned.t() if feature_dim_first else returned
        assert out is x and not returned.requires_grad and torch.equal(rows, before)
        assert torch.equal(bank.bank[:3], x) and not torch.equal(rows[:3], x)


def test_bank_cuts_the_batch_that_passes_its_end():
    """The next one starts at the first row."""
    found = []
    for bank in both("MemoryBankModule", (5, 2), dtype=torch.float32):
        batches = torch.arange(22.0).view(-1, 2).split([3, 3, 2, 3])
        pointers = []
        for x in batches:
            bank(x, update=True)
            pointers.append(int(bank.bank_ptr))
        assert pointers == [3, 0, 2, 0]
        bank(torch.ones(9, 2), update=True)
        assert bank.bank_ptr == 0
        found.append([bank.bank])
    same(*found)


def test_bank_is_written_only_where_out0_requires_a_gradient():
    def written(loss, learns, mode):
        before = loss.memory_bank.bank.clone()
        x, y = torch.randn(2, 3, 4, dtype=torch.float64)
        with mode():
            loss(x.requires_grad_(learns[0]), y.requires_grad_(learns[1]))
        return not torch.equal(before, loss.memory_bank.bank)

    for loss in both("NTXentLoss", 0.5, (8, 4)):
        assert written(loss, (True, False), torch.enable_grad)
        assert not written(loss, (False, True), torch.enable_grad)
        assert not written(loss, (True, True), torch.no_grad)


def test_bank_may_be_written_before_the_backward():
    found = []
    for loss in both("NTXentLoss", 0.5, (8, 4)):
        x, y = drawn(0, torch.float64, (8, 4), (8, 4))
        first = loss(x, y)
        loss(*drawn(1, torch.float64, (8, 4), (8, 4)))
        found.append(torch.autograd.grad(first, (x, y)))
    same(*found)


def test_bank_goes_with_copies_and_types():
    loss = ours.NTXentLoss(0.5, (8, 4))
    twin = copy.deepcopy(loss).double()
    assert twin.memory_bank.bank.dtype == torch.float64 and twin.memory_bank.bank_ptr.dtype == torch.int64
    twin(*drawn(0, torch.float64, (3, 4), (3, 4))).backward()
    assert loss.memory_bank.bank_ptr == 0 and twin.memory_bank.bank_ptr == 3


def test_bank_of_another_width_is_refused():
    with pytest.raises(ValueError, match="memory_bank must"):
        ours.NTXentLoss(0.5, (8, 5))(*drawn(0, torch.float32, (3, 4), (3, 4)))


def test_bank_can_be_inherited():
    class Mine(ours.MemoryBankModule):
        def forward(self, output):
            return super().forward(output, update=True)[1]

    bank = Mine((8, 4))
    assert bank(torch.randn(3, 4)).shape == (4, 8) and bank.bank_ptr == 3


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_weight_fn_gets_the_normalised_features_in_both_orders():
    seen = []

    def weight_fn(out0, out1):
        seen.append((out0, out1))
        return squared_distance(out0, out1)

    x, y = drawn(0, torch.float64, (5, 3), (5, 3))
    ours.DCLLoss(weight_fn=weight_fn)(x, y)
    (a, b), (c, d) = seen
    assert torch.equal(a, d) and torch.equal(b, c) and torch.allclose(a, nn.functional.normalize(x, dim=1))


def test_weight_fn_of_any_shape():
    """A number, and [N, 1], which makes [N, N] of the losses."""
    batches = [drawn(0, torch.float64, (5, 3), (5, 3))]
    for weight_fn in (lambda a, b: 0.5, lambda a, b: squared_distance(a, b).unsqueeze(1)):
        same(*(stepped(loss, batches) for loss in both("DCLLoss", 0.2, weight_fn)))


def test_weights_of_a_sigma_near_zero():
    x, y = drawn(0, torch.float32, (5, 3), (5, 3))
    weights = ours.negative_mises_fisher_weights(x, y, 1e-7)
    assert not weights.requires_grad and weights.isfinite().all() and weights.min() == -3 and (weights == 2).sum() == 4
    assert torch.equal(weights, losses.dcl_loss.negative_mises_fisher_weights(x, y, 1e-7))


# ---- over ranks ------------------------------------------------------------------------------------------------------


def over_ranks(group, package, name, options, learned):
    """Three steps: losses, gradients, buffers."""
    of = ours if package == "ours" else peer("lightly.loss")
    with as_world(group), warnings.catch_warnings():
        warnings.filterwarnings("error", "group=None")
        torch.manual_seed(0)
        loss = getattr(of, name)(**options)
        if learned:
            loss.temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        loss = loss.double()
        batches = [drawn(10 * i + group.rank(), torch.float64, (4, 3), (4, 3)) for i in range(3)]
        # What multiplies a loss may differ from rank to rank.
        factor = 1.0 + group.rank()
        found = stepped(_Times(loss, factor), batches, [loss.temperature] if learned else [])
    return found if options.get("memory_bank_size") else found[: 9 + 3 * learned]


class _Times(nn.Module):
    def __init__(self, loss, factor):
        super().__init__()
        self.loss, self.factor = loss, factor

    def forward(self, *args):
        return self.factor * self.loss(*args)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "name, options",
    [
        ("NTXentLoss", {}),
        ("NTXentLoss", {"memory_bank_size": (10, 3)}),
        ("DCLLoss", {}),
        ("DCLLoss", {"weight_fn": squared_distance}),
        ("DCLWLoss", {"sigma": 0.3}),
    ],
    ids=str,
)
def test_gather_distributed(three, name, options, learned, ranks):  # noqa: F811
    """The loss of each rank, and the gradients that the losses of all ranks have."""
    for gather_distributed in (False, True):
        job = dict(options, gather_distributed=gather_distributed)
        mine, other = (three.run(over_ranks, of, name, job, learned, ranks=ranks) for of in ("ours", "theirs"))
        for a, b in zip(mine, other, strict=True):
            same(a, b)


def own_rows(group):
    batch = drawn(group.rank(), torch.float64, (4, 3), (4, 3))
    with as_world(group):
        return torch.autograd.grad(ours.NTXentLoss(gather_distributed=True)(*batch), batch)


@pytest.mark.slow
def test_what_ddp_makes_of_the_gradients_is_exact(three):  # noqa: F811
    """Their mean over the ranks is that of the loss of all rows."""
    rows = zip(*(drawn(rank, torch.float64, (4, 3), (4, 3)) for rank in range(2)), strict=True)
    batch = [torch.cat(x).detach().requires_grad_() for x in rows]
    exact = torch.autograd.grad(theirs.NTXentLoss()(*batch), batch)
    same([torch.cat(x) / 2 for x in zip(*three.run(own_rows, ranks=2), strict=True)], list(exact))


# ---- in lightly's own models -----------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8)), head

    def forward(self, x):
        return self.head(self.backbone(x))


def views(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 6, dtype=torch.float64, generator=generator)
    return (x + 0.1 * torch.randn(x.shape, dtype=torch.float64, generator=generator) for _ in range(2))


def simclr(package):
    torch.manual_seed(0)
    model, criterion = Encoder(modules.SimCLRProjectionHead(8, 8, 4)).double(), package.NTXentLoss(0.2)
    return trained(model, lambda model, step: criterion(*map(model, views(step))))


def dclw(package):
    torch.manual_seed(0)
    model, criterion = Encoder(modules.SimCLRProjectionHead(8, 8, 4)).double(), package.DCLWLoss(0.2)
    return trained(model, lambda model, step: criterion(*map(model, views(step))))


def moco(package):
    utils = peer("lightly.models.utils")
    torch.manual_seed(0)
    model = Encoder(modules.MoCoProjectionHead(8, 8, 4)).double()
    momentum = copy.deepcopy(model)
    utils.deactivate_requires_grad(momentum)
    criterion = package.NTXentLoss(memory_bank_size=(32, 4)).double()

    def step(model, i):
        utils.update_momentum(model, momentum, 0.99)
        x0, x1 = views(i)
        return criterion(model(x0), momentum(x1).detach())

    return trained(model, step) + [criterion.memory_bank.bank, criterion.memory_bank.bank_ptr]


def nnclr(package):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        dict(encoder=Encoder(modules.NNCLRProjectionHead(8, 8, 4)), predictor=modules.NNCLRPredictionHead(4, 8, 4))
    ).double()
    criterion, bank = package.NTXentLoss(), package.NNMemoryBankModule(size=(32, 4)).double()

    def step(model, i):
        z0, z1 = map(model["encoder"], views(i))
        p0, p1 = map(model["predictor"], (z0, z1))
        z0, z1 = bank(z0.detach(), update=False), bank(z1.detach(), update=True)
        return 0.5 * (criterion(z0, p1) + criterion(z1, p0))

    return trained(model, step)


@pytest.mark.slow
@pytest.mark.parametrize("method", [simclr, dclw, moco, nnclr], ids=lambda method: method.__name__)
def test_trains_the_same(method):
    same(method(ours), method(theirs), 1e-8)
