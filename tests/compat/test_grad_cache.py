import contextlib
import functools
import warnings
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sslkern.compat import grad_cache as ours
from sslkern.compat import info_nce

from . import peer
from .agreement import drawn, errs_no_more, random_configurations, same, stepped
from .ranks import as_world, three  # noqa: F401

LOSSES = "SimpleContrastiveLoss", "DistributedContrastiveLoss", "ContrastiveLossWithQueryClosure"
DECORATORS = "cached", "cat_input_tensor", "gather_input_tensor"
modules = {name: peer(f"grad_cache.{name}") for name in ("context_managers", "functional", "grad_cache", "loss")}
theirs = SimpleNamespace(
    GradCache=modules["grad_cache"].GradCache,
    RandContext=modules["context_managers"].RandContext,
    **{name: getattr(modules["loss"], name) for name in LOSSES},
    **{name: getattr(modules["functional"], name) for name in DECORATORS},
)
PACKAGES = {"ours": ours, "theirs": theirs}
each_package = pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
DENSE = pytest.mark.filterwarnings("ignore:sslkern.compat.grad_cache.* takes the dense path")


@pytest.fixture(autouse=True)
def small_batches_as_large_ones(request, monkeypatch):
    """But in the test of just that, which theirs is quicker for."""
    if "small_batches" not in request.node.name:
        monkeypatch.setattr(ours, "FEW_SCORES", -1)


class Encoder(nn.Module):
    """It drops at random, and keeps in a buffer what it has seen, in order."""

    def __init__(self, width=6):
        super().__init__()
        self.layer, self.drop = nn.Linear(width, 4), nn.Dropout(0.4)
        self.register_buffer("seen", torch.zeros(width))

    def forward(self, x, factor=None):
        self.seen.mul_(0.9).add_(x.detach().mean(0))
        x = self.drop(self.layer(x))
        return x if factor is None else x * factor


def encoders(*widths):
    torch.manual_seed(0)
    return [Encoder(width).double() for width in widths]


def state(models):
    """Gradients and buffers, and the random state."""
    found = [x.grad.clone() for model in models for x in model.parameters()]
    return [*found, *(x.clone() for model in models for x in model.buffers()), torch.get_rng_state()]


INPUTS = {
    "tensor": lambda x, factor: x,
    "list": lambda x, factor: [x, factor],
    "dict": lambda x, factor: {"x": x, "factor": factor},
    "UserDict": lambda x, factor: UserDict(factor=factor, x=x),
    "call": lambda x, factor: ([x], {"factor": factor}),
}


# ---- the step --------------------------------------------------------------------------------------------------------


@random_configurations(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 9),
    hard=st.integers(0, 2),
    chunk_sizes=st.integers(1, 12) | st.lists(st.integers(1, 12), min_size=2, max_size=2),
    kinds=st.lists(st.sampled_from(list(INPUTS)), min_size=2, max_size=2),
    tied=st.booleans(),
    reps=st.sampled_from([None, lambda out: out[:, :3]]),
    options=st.sampled_from([{}, {"reduction": "mean"}, {"reduction": "sum"}]),
)
def test_step(seed, N, hard, chunk_sizes, kinds, tied, reps, options):
    """Five steps, whose gradients add up: losses, gradients, buffers, and what random numbers come next."""
    found = []
    for package in PACKAGES.values():
        models = encoders(6, 6)
        if tied:
            models[1] = models[0]
        step = package.GradCache(models, chunk_sizes, package.SimpleContrastiveLoss(hard), get_rep_fn=reps)
        torch.manual_seed(seed)
        found.append([])
        for i in range(5):
            sizes = (N, 6), (N, 4), (N * (1 + hard), 6), (N * (1 + hard), 4)
            x = [x.detach() for x in drawn(seed + i, torch.float64, *sizes)]
            inputs = [INPUTS[kind](*pair) for kind, pair in zip(kinds, (x[:2], x[2:]), strict=True)]
            loss = step(*inputs, **options)
            assert not loss.requires_grad
            found[-1] += [loss, *state(models)]
    same(*found)


def test_without_dropout_it_is_the_gradient_of_the_whole_batch():
    models = [model.eval() for model in encoders(6, 5)]
    x, y = drawn(0, torch.float64, (7, 6), (14, 5))
    whole = theirs.SimpleContrastiveLoss(1)(models[0](x), models[1](y))
    parameters = [p for model in models for p in model.parameters()]
    want = torch.autograd.grad(whole, parameters)
    loss = ours.GradCache(models, [2, 3], ours.SimpleContrastiveLoss(1))(x, y)
    same([loss, *(p.grad for p in parameters)], [whole.detach(), *want])


@each_package
def test_an_input_cut_by_split_input_fn(package):
    """Which is asked in the place of all rules, and may return anything that the model takes."""
    (model,), asked = encoders(6), []

    def split(x, size):
        asked.append(size)
        return [x["rows"][:3], x["rows"][3:]]

    step = package.GradCache([model], 5, lambda x: x.square().sum(), split_input_fn=split)
    assert torch.equal(step.split_inputs({"rows": torch.arange(4)}, 2)[1], torch.tensor([3]))
    step.chunk_sizes = [3]
    step({"rows": torch.ones(6, 6, dtype=torch.float64)})
    assert asked == [2, 3] and model.layer.weight.grad is not None


def test_chunks_of_another_size_than_the_gradients():
    """The rest of what is longer is left out: of the gradients, cut by chunk_sizes, here the last."""
    found = []
    for package in PACKAGES.values():
        (model,) = encoders(6)
        (x,) = drawn(0, torch.float64, (6, 6))
        split = lambda x, size: [x[:2], x[2:4]]  # noqa: E731
        step = package.GradCache([model], 2, lambda z: z.square().sum(), split_input_fn=split)
        found.append([step(x.detach()), *state([model])])
        step.chunk_sizes = [3]
        with pytest.raises(RuntimeError):
            step(x.detach())
    same(*found)


@each_package
def test_inputs_without_a_model_are_not_looked_at(package):
    (model,) = encoders(6)
    step = package.GradCache([model], 2, lambda x: x.sum())
    step(torch.ones(4, 6, dtype=torch.float64), "another")
    assert model.layer.weight.grad is not None


@each_package
def test_buffers_are_written_by_both_forwards(package):
    model = nn.BatchNorm1d(3)
    package.GradCache([model], 4, lambda x: x.square().sum())(torch.randn(8, 3))
    assert model.num_batches_tracked == 4


@each_package
def test_hooks_run_for_each_chunk(package):
    (model,), runs = encoders(6), []
    model.register_forward_hook(lambda *args: runs.append("forward"))
    model.layer.weight.register_hook(lambda gradient: runs.append("backward"))
    package.GradCache([model], 4, lambda x: x.sum())(torch.ones(8, 6, dtype=torch.float64))
    assert runs == 2 * ["forward"] + 2 * ["forward", "backward"]


@each_package
def test_inputs_may_learn(package):
    (model,) = encoders(6)
    (x,) = drawn(0, torch.float64, (5, 6))
    package.GradCache([model.eval()], 2, lambda z: z.sum())(x)
    assert torch.allclose(x.grad, model.layer.weight.sum(0).expand(5, 6))


@each_package
def test_a_loss_that_learns_has_its_gradient(package):
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    package.GradCache(encoders(6), 2, lambda z: (scale * z).sum())(torch.ones(5, 6, dtype=torch.float64))
    assert scale.grad is not None


@each_package
def test_a_model_that_the_loss_leaves_out_is_an_error(package):
    step = package.GradCache(encoders(6, 6), 2, lambda x, y: x.sum())
    with pytest.raises(AttributeError):
        step(*torch.ones(2, 4, 6, dtype=torch.float64))


def recorded(base):
    """A class that inherits and replaces every public method of theirs, and the calls that these get."""
    calls = []

    def replaced(name):
        def method(self, *args, **options):
            calls.append((name, len(args), sorted(options)))
            return getattr(super(Mine, self), name)(*args, **options)

        return method

    Mine = type("Mine", (base,), {name: replaced(name) for name in vars(theirs.GradCache) if name[0] != "_"})
    return Mine, calls


def test_every_method_may_be_replaced():
    """They are called in the same order, with as many arguments."""
    found = []
    for package in PACKAGES.values():
        Mine, calls = recorded(package.GradCache)
        step = Mine(encoders(6, 6), 3, package.SimpleContrastiveLoss())
        step(*torch.ones(2, 4, 6, dtype=torch.float64), reduction="sum")
        found.append(calls)
    assert len({name for name, *_ in found[0]}) == 9 and found[0] == found[1]


@each_package
def test_what_goes_in_and_out_of_the_methods(package):
    step = package.GradCache(encoders(6), 2, lambda x, **options: x.square().sum())
    x = torch.ones(3, 6, dtype=torch.float64)
    reps, states = step.forward_no_grad(step.models[0], [x[:2], x[2:]])
    assert reps.shape == (3, 4) and [type(each) for each in states] == 2 * [package.RandContext]
    (gradient,), loss = step.build_cache(reps, reduction="sum")
    assert torch.equal(gradient, 2 * reps) and loss == reps.square().sum()
    assert step.forward_backward(step.models[0], [x[:2], x[2:]], gradient.split(2), states) is None
    assert step.models[0].layer.weight.grad is not None


@each_package
def test_the_tensors_of_an_input(package):
    step = package.GradCache([], 2, None)
    a, b, c = torch.ones(3, 1)
    found = step.get_input_tensors([a, (b, {"x": UserDict(y=c), "text": "none"}), None])
    assert all(x is y for x, y in zip(found, (a, b, c), strict=True))
    step._get_input_tensors_strict = True
    with pytest.raises(NotImplementedError):
        step.get_input_tensors([a, None])


def test_how_inputs_are_cut():
    x, y = torch.arange(10).view(5, 2), torch.arange(5)
    given = [x, [x, y], {"x": x, "y": y}, UserDict(x=x, y=y), ([x, y], {"z": y}), [x, y[:2]], []]
    found = [[package.GradCache([], 2, None).split_inputs(each, 2) for each in given] for package in PACKAGES.values()]
    for mine, other in zip(*found, strict=True):
        assert type(mine) is type(other) is list and repr(mine) == repr(other)


@each_package
@pytest.mark.parametrize("given", ["text", (torch.ones(4),), {"x": torch.ones(4), "y": 1}, [1, 2]], ids=repr)
def test_inputs_that_cannot_be_cut(package, given):
    with pytest.raises(NotImplementedError):
        package.GradCache([], 2, None).split_inputs(given, 2)


@each_package
def test_inputs_that_no_model_is_called_with(package):
    with pytest.raises(NotImplementedError):
        package.GradCache([], 2, None).model_call(nn.Identity(), "text")


def test_attributes_are_theirs():
    for options in ({}, {"fp16": True, "scaler": object()}):
        made = [package.GradCache((1, 2), 3, len, abs, max, **options) for package in PACKAGES.values()]
        assert vars(made[0]) == vars(made[1]) and made[0].chunk_sizes == [3, 3]
    assert ours.GradCache((1, 2), [3, 4], len).chunk_sizes == [3, 4]


# ---- 16 bits ---------------------------------------------------------------------------------------------------------


@each_package
def test_fp16_needs_a_scaler(package):
    with pytest.raises(AssertionError):
        package.GradCache([], 2, None, fp16=True)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*CUDA is not available")
def test_fp16_scales_the_loss():
    found = []
    for package in PACKAGES.values():
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        models = encoders(6, 6)
        step = package.GradCache(models, 3, package.SimpleContrastiveLoss(), fp16=True, scaler=scaler)
        torch.manual_seed(0)
        x, y = (x.detach() for x in drawn(0, torch.float64, (7, 6), (7, 6)))
        found.append([step(x, y), *state(models)])
    same(*found)


# ---- random state ----------------------------------------------------------------------------------------------------


@each_package
def test_the_random_state_is_repeated_and_then_as_before(package):
    context = package.RandContext(torch.ones(2))
    first, second = torch.rand(2)
    with context:
        assert torch.rand(1) == first
    with context:
        assert torch.rand(1) == first
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with contextlib.suppress(KeyError), context:
        torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state) and second != first


# ---- losses ----------------------------------------------------------------------------------------------------------


@random_configurations(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 9),
    hard=st.integers(0, 3),
    D=st.integers(1, 12),
    M=st.integers(1, 15),
    targets=st.sampled_from([None, "any", "some of -100", "all of -100"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_loss(seed, N, hard, D, M, targets, reduction):
    target = None
    if targets is not None:
        target = torch.randint(0, M, (N,), generator=torch.Generator().manual_seed(seed))
        target[: {"any": 0, "some of -100": N // 2, "all of -100": N}[targets]] = -100
    x, y = drawn(seed, torch.float64, (N, D), (M if targets else N * (1 + hard), D))
    found = []
    for package in PACKAGES.values():
        losses = package.SimpleContrastiveLoss(hard)(x, y, target, reduction)
        weighted = (losses * torch.linspace(-1, 2, losses.numel(), dtype=losses.dtype)).sum()
        found.append([losses.detach(), *torch.autograd.grad(losses.sum() if losses.ndim == 0 else weighted, (x, y))])
    same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hard", [0, 2])
def test_errs_no_more_than_theirs(hard, dtype):
    def results(package, seed, of):
        x, y = drawn(seed, dtype, (48, 32), (48 * (1 + hard), 32))
        return stepped(package.SimpleContrastiveLoss(hard), [[x.detach().to(of).requires_grad_() for x in (x, y)]])

    errs_no_more(results, ours, theirs, dtype)


@pytest.mark.parametrize("hard", [0, 1])
def test_small_batches_are_computed_as_they_do(hard):
    """To the bit, in 16 bits too, and without a word."""
    batch = drawn(0, torch.bfloat16, (6, 4), (6 * (1 + hard), 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine, other = (stepped(package.SimpleContrastiveLoss(hard), [batch]) for package in PACKAGES.values())
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_the_type_is_that_of_the_features():
    for hard in (0, 1):
        for dtype in (torch.bfloat16, torch.float16):
            batch = drawn(0, dtype, (6, 4), (6 * (1 + hard), 4))
            mine, other = (package.SimpleContrastiveLoss(hard)(*batch) for package in PACKAGES.values())
            assert mine.dtype == other.dtype == dtype
        with torch.autocast("cpu", dtype=torch.bfloat16):
            batch = drawn(0, torch.float32, (6, 4), (6 * (1 + hard), 4))
            mine, other = (package.SimpleContrastiveLoss(hard)(*batch) for package in PACKAGES.values())
        assert mine.dtype == other.dtype == torch.float32 and torch.allclose(mine, other, rtol=0.02)


@each_package
def test_an_empty_batch_is_nan(package):
    assert package.SimpleContrastiveLoss()(torch.ones(0, 4), torch.ones(0, 4)).isnan()


@each_package
def test_passages_that_are_no_multiple_are_refused(package):
    with pytest.raises(AssertionError):
        package.SimpleContrastiveLoss(1)(torch.ones(3, 4), torch.ones(3, 4))


@each_package
@pytest.mark.parametrize("target", [-1, 3])
def test_targets_that_are_no_passage_are_refused(package, target):
    with pytest.raises(IndexError):
        package.SimpleContrastiveLoss()(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, target]))


@DENSE
def test_targets_of_probabilities():
    x, y, target = drawn(0, torch.float64, (5, 4), (6, 4), (5, 6))
    target = target.detach().softmax(1)
    losses = [package.SimpleContrastiveLoss() for package in PACKAGES.values()]
    same(*(stepped(functools.partial(loss, target=target), [(x, y)]) for loss in losses))


@pytest.mark.parametrize(
    "sizes, target, why",
    [
        (((5, 4), (6, 4)), torch.ones(5, 6) / 6, r"target .* pass int64 \[N\]"),
        (((4,), (6, 4)), torch.tensor(1), r"x and y are no floating-point tensors \[N, D\]"),
    ],
)
def test_the_dense_path_says_why_once(sizes, target, why):
    loss, batch = ours.SimpleContrastiveLoss(), [torch.ones(size) for size in sizes]
    with pytest.warns(UserWarning, match=f"grad_cache.SimpleContrastiveLoss takes the dense path.*: {why}"):
        value = loss(*batch, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss(*batch, target) == value == theirs.SimpleContrastiveLoss()(*batch, target)


@DENSE
@each_package
def test_several_types_are_refused(package):
    with pytest.raises(RuntimeError):
        package.SimpleContrastiveLoss()(torch.ones(3, 4), torch.ones(3, 4, dtype=torch.float64))


def test_autocast_meets_passages_in_fp32():
    x, y = drawn(0, torch.float32, (6, 4), (12, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, other = (package.SimpleContrastiveLoss(1)(x.bfloat16(), y) for package in PACKAGES.values())
    assert mine.dtype == other.dtype == torch.float32 and torch.allclose(mine, other, rtol=0.02)


def test_queries_from_a_function():
    x, y = drawn(0, torch.float64, (5, 4), (10, 4))
    found = []
    for package in PACKAGES.values():
        loss = package.ContrastiveLossWithQueryClosure(1)
        found.append(
            stepped(loss, [(x, y)]) + stepped(lambda y, loss=loss: loss(y, query_closure=lambda: x), [(y,)], [x])
        )
        found[-1].append(loss(x, y, target=torch.arange(5), reduction="sum").detach())
        for reps in ((), (x, y, y)):
            with pytest.raises(ValueError):
                loss(*reps)
        for reps, closure in (((x, y), lambda: x), ((y,), None)):
            with pytest.raises(AssertionError):
                loss(*reps, query_closure=closure)
    same(*found)


# ---- decorators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
def test_cached(several):
    """The functions of the README: chunks embedded, one loss of their lists, and each chunk once more."""
    found = []
    for package in PACKAGES.values():
        models = encoders(6, 5)

        @package.cached
        def call(model, x, factor=1.0):
            return (model(x), model(x) * factor) if several else model(x) * factor  # noqa: B023

        loss_of = package.cat_input_tensor(package.SimpleContrastiveLoss())
        torch.manual_seed(1)
        reps, again = [[], []], []
        for of, (model, width) in enumerate(zip(models, (6, 5), strict=True)):
            for x in drawn(of, torch.float64, (3, width), (2, width)):
                *chunk, forward_backward = call(model, x.detach(), factor=2.0)
                assert all(each.is_leaf and each.requires_grad for each in chunk)
                reps[of] += chunk
                again.append((forward_backward, chunk if several else chunk[0]))
        loss = loss_of(*reps)
        loss.backward()
        for forward_backward, chunk in again:
            assert forward_backward(chunk) is None
        found.append([loss.detach(), *state(models)])
    same(*found)
    assert call.__name__ == "call"


@each_package
def test_cached_functions_are_given_what_they_returned(package):
    *leaves, again = package.cached(lambda x: (x, x))(torch.ones(2, requires_grad=True))
    sum(x.sum() for x in leaves).backward()
    with pytest.raises(AssertionError):
        again(leaves[:1])
    with pytest.raises(AssertionError):
        package.cached(lambda x: (x, 1))(torch.ones(2))


@each_package
def test_cached_functions_need_the_gradient_of_what_they_returned(package):
    leaf, again = package.cached(lambda x: 2 * x)(torch.ones(2, requires_grad=True))
    with pytest.raises(AttributeError):
        again(leaf)


def test_cached_repeats_the_random_state_of_gpus_by_an_option(monkeypatch):
    """Theirs, and ours without it, does so of the CPU alone."""
    asked = []
    monkeypatch.setattr(ours, "get_device_states", lambda *tensors: asked.append(tensors) or ([], []))
    x = torch.ones(2)
    ours.cached(lambda x: x)(x)
    ours.cached(lambda x: x, devices_of=iter([x]))(x)
    assert asked == [(), (x,)]


@each_package
def test_lists_of_tensors_are_joined(package):
    x, y = torch.ones(2, 3), torch.zeros(1, 3)
    out = package.cat_input_tensor(lambda *args: args)([x, y], x, [], [1, x], (x, y))
    assert torch.equal(out[0], torch.cat((x, y))) and out[1] is x and out[2:] == ([], [1, x], (x, y))


def test_keyword_arguments_of_decorated_losses():
    """Joined like others, where theirs, which means to, is an error."""
    x, y = drawn(0, torch.float64, (5, 4), (5, 4))
    loss = ours.cat_input_tensor(ours.SimpleContrastiveLoss())
    want = loss(x, y, reduction="sum")
    assert loss(x=list(x.split(2)), y=list(y.split(3)), reduction="sum") == want
    with pytest.raises((ValueError, TypeError)):
        theirs.cat_input_tensor(theirs.SimpleContrastiveLoss())(x, y, reduction="sum")


# ---- over ranks ------------------------------------------------------------------------------------------------------


def losses_over_ranks(group, name, hard, options, gathers):
    """The loss on each rank and its gradients, of what may differ from rank to rank in all else than the default."""
    package = PACKAGES[name]
    with as_world(group), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loss = package.DistributedContrastiveLoss(hard)
        assert (loss.word_size, loss.rank, loss.target_per_qry) == (group.size(), group.rank(), hard + 1)
        if gathers:
            loss = package.gather_input_tensor(package.SimpleContrastiveLoss(hard))
        batch = drawn(group.rank(), torch.float64, (4, 3), (4 * (1 + hard), 3))
        value = loss(*batch, **options) if options else loss(*batch)
        weighted = value.sum() if value.ndim == 0 else (value * torch.linspace(-1, 2, len(value))).sum()
        return [value.detach(), *torch.autograd.grad(weighted, batch)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("hard", [0, 2])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"target": "reversed"}], ids=str)
def test_distributed_loss(three, options, hard, ranks):  # noqa: F811
    if "target" in options:
        options = dict(target=torch.arange(4 * ranks).flip(0))
    found = [three.run(losses_over_ranks, name, hard, options, False, ranks=ranks) for name in PACKAGES]
    for mine, other in zip(*found, strict=True):
        same(mine, other)


@pytest.mark.slow
def test_inputs_gathered_by_the_decorator(three):  # noqa: F811
    found = [three.run(losses_over_ranks, name, 1, {}, True, ranks=3) for name in PACKAGES]
    for mine, other in zip(*found, strict=True):
        same(mine, other)


class Reversed(ours.DistributedContrastiveLoss):
    def gather_tensor(self, t):
        return super().gather_tensor(t).flip(0)


def replaced_gather(group):
    with as_world(group):
        batch = drawn(group.rank(), torch.float64, (4, 3), (4, 3))
        return [stepped(loss(), [batch]) for loss in (Reversed, ours.DistributedContrastiveLoss)]


@pytest.mark.slow
def test_the_gathering_of_a_class_that_inherits(three):  # noqa: F811
    for reversed_rows, plain in three.run(replaced_gather, ranks=2):
        same(reversed_rows, plain)


def alone(group):
    """Losses of a rank's own rows among others: without a warning of those."""
    with as_world(group), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        x, y = drawn(0, torch.float64, (300, 3), (300, 3))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ours, "FEW_SCORES", -1)
            patch.setattr(info_nce, "FEW_PRODUCTS", -1)
            ours.SimpleContrastiveLoss()(x, y).backward()
            info_nce.InfoNCE()(x, y).backward()


@pytest.mark.slow
def test_losses_of_one_process_among_others(three):  # noqa: F811
    three.run(alone, ranks=2)


def step_over_ranks(group, name, no_sync_except_last, W=None):
    """The step's loss, gradients and buffers, and how often gradients were reduced."""
    package, reductions = PACKAGES[name], []

    def counted(_, bucket):
        reductions.append(1)
        work = dist.all_reduce(bucket.buffer().div_(group.size()), group=group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    with as_world(group):
        models = [DistributedDataParallel(model, process_group=group) for model in encoders(6, 5)]
        for model in models:
            model.register_comm_hook(None, counted)
        torch.manual_seed(group.rank())
        step = package.GradCache(models, [2, 3], package.DistributedContrastiveLoss(1))
        x, y = (x.detach() for x in drawn(group.rank(), torch.float64, (5, 6), (10, 5)))
        loss = step(x, y, no_sync_except_last=no_sync_except_last, reduction="mean")
        return [loss, *state(models), torch.tensor(len(reductions))]


@pytest.mark.slow
@pytest.mark.parametrize("no_sync_except_last", [False, True])
def test_step_over_ranks(three, no_sync_except_last):  # noqa: F811
    """With no_sync_except_last gradients are reduced once for each model, else for each chunk."""
    found = [three.run(step_over_ranks, name, no_sync_except_last, ranks=2) for name in PACKAGES]
    for mine, other in zip(*found, strict=True):
        same(mine, other)
        assert mine[-1] == (2 if no_sync_except_last else 3 + 4)


def undropped(group):
    with as_world(group):
        models = [DistributedDataParallel(model.eval(), process_group=group) for model in encoders(6, 5)]
        x, y = (x.detach() for x in drawn(group.rank(), torch.float64, (5, 6), (5, 5)))
        ours.GradCache(models, 2, ours.DistributedContrastiveLoss())(x, y)
        return [p.grad for model in models for p in model.parameters()]


@pytest.mark.slow
def test_gradients_over_ranks_are_those_of_the_batch_divided_by_their_number(three):  # noqa: F811
    models, ranks = [model.eval() for model in encoders(6, 5)], 3
    x, y = (
        torch.cat(x).detach() for x in zip(*(drawn(i, torch.float64, (5, 6), (5, 5)) for i in range(3)), strict=True)
    )
    whole = ours.SimpleContrastiveLoss()(models[0](x), models[1](y))
    want = torch.autograd.grad(whole, [p for model in models for p in model.parameters()])
    for gradients in three.run(undropped, ranks=ranks):
        same(gradients, [gradient / ranks for gradient in want])


@each_package
def test_no_sync_except_last_needs_distributed_models(package):
    step = package.GradCache(encoders(6), 2, lambda x: x.sum())
    with pytest.raises(AssertionError):
        step(torch.ones(4, 6, dtype=torch.float64), no_sync_except_last=True)


@each_package
def test_the_distributed_loss_needs_processes(package, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(AssertionError):
        package.DistributedContrastiveLoss()


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [0, 1])
def test_trains_the_same(hard):
    def run(package):
        models = encoders(6, 6)
        parameters = [p for model in models for p in model.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        step = package.GradCache(models, [4, 5], package.SimpleContrastiveLoss(hard))
        torch.manual_seed(2)
        for i in range(20):
            x, y = (x.detach() for x in drawn(i, torch.float64, (9, 6), (9 * (1 + hard), 6)))
            optimizer.zero_grad()
            step(x, y)
            optimizer.step()
        return [p.detach() for p in parameters]

    same(run(ours), run(theirs), 1e-8)
