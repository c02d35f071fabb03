"""Beside a model written here, and MoCo's own file where its checkout is on PYTHONPATH. That needs a process group and
CUDA: here it has a group of one and tensors that stay on the CPU."""

import contextlib
import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from sslkern.compat import moco as ours

from . import peer
from .agreement import drawn, errs_no_more, random_configurations, same, trained
from .ranks import as_world, three  # noqa: F401


class Encoder(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer, self.norm, self.fc = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.norm(self.layer(x)).relu())


class Formula(nn.Module):
    """MoCo in one process, where a shuffled batch has the statistics of the batch."""

    def __init__(self, base_encoder, dim, K, m, T, mlp=False):
        super().__init__()
        self.m, self.T = m, T
        self.encoder_q, self.encoder_k = base_encoder(num_classes=dim), base_encoder(num_classes=dim)
        if mlp:
            width = self.encoder_q.fc.in_features
            self.encoder_q.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), self.encoder_q.fc)
            self.encoder_k.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), self.encoder_k.fc)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q, im_k):
        for key, query in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
            key.copy_(self.m * key + (1 - self.m) * query.detach())
        q, k = (x / x.norm(dim=1, keepdim=True) for x in (self.encoder_q(im_q), self.encoder_k(im_k).detach()))
        keys = torch.cat((k[:, :, None], self.queue.expand(len(k), -1, -1)), 2)
        logits = torch.einsum("nd,ndj->nj", q, keys) / self.T
        self.queue = self.queue.clone()
        self.queue[:, (self.queue_ptr + torch.arange(len(k))) % self.queue.shape[1]] = k.T
        self.queue_ptr = (self.queue_ptr + len(k)) % self.queue.shape[1]
        return logits, torch.zeros(len(k), dtype=torch.long)


@contextlib.contextmanager
def alone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda x, *args, **options: x)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def package():
    return peer("moco.builder").MoCo


def yardsticks():
    """(model, what it needs around it)"""
    try:
        return [(Formula, contextlib.nullcontext), (peer("moco.builder").MoCo, alone)]
    except pytest.skip.Exception:
        return [(Formula, contextlib.nullcontext)]


def fused(*args, **options):
    return ours.MoCo(*args, **options, fused=True)


def made(of, *args, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return of(Encoder, *args, **options).to(dtype)


def images(step, N=4, dtype=torch.float64):
    return [x.detach() for x in drawn(step, dtype, (N, 6), (N, 6))]


def accuracy(logits, labels, k):
    """[1], per cent, as the training script has it of the logits."""
    found = (logits.topk(k, 1).indices == labels[:, None]).any(1)
    return found.float().mean(0, keepdim=True) * 100


def contrasted(model, batch):
    """The loss of the next batch, the accuracies, and logits and labels if there are."""
    out = model(*batch)
    if isinstance(out, ours.Contrast):
        return out.loss, [out.acc1, out.acc5], []
    return F.cross_entropy(*out), [accuracy(*out, k) for k in (1, 5)], [x.detach() for x in out]


def steps(model, batches):
    """Of each batch loss, accuracies, gradients, and afterwards the state; queries learn in between. Then logits."""
    found, logits = [], []
    for batch in batches:
        loss, accuracies, of_batch = contrasted(model, batch)
        learned = [*model.encoder_q.parameters()]
        gradients = torch.autograd.grad(loss, learned)
        found += [loss.detach(), *accuracies, *gradients]
        logits += of_batch
        with torch.no_grad():
            torch._foreach_sub_(learned, gradients, alpha=0.3)
    return found + [*model.state_dict().values()], logits


# ---- the numbers -----------------------------------------------------------------------------------------------------


@random_configurations(
    seed=st.integers(0, 2**31),
    N=st.integers(2, 6),
    batches=st.integers(1, 4),
    dim=st.integers(2, 8),
    m=st.sampled_from([0.999, 0.5, 0.0]),
    T=st.sampled_from([0.07, 0.2, 1]),
    mlp=st.booleans(),
)
def test_numbers(seed, N, batches, dim, m, T, mlp):
    def found(of):
        model = made(of, dim, N * max(batches, -(-5 // N)), m, T, mlp, seed=seed)
        return steps(model, [images(seed + i, N) for i in range(5)])

    (mine, logits), (of_fused, _) = found(ours.MoCo), found(fused)
    for of, around in yardsticks():
        with around():
            theirs, their_logits = found(of)
        same(mine, theirs)
        same(logits, their_logits)
        same(of_fused, theirs)


class Scaled(nn.Module):
    """Features as they come, times a number that learns."""

    def __init__(self, num_classes):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("of, dtype", [(ours.MoCo, torch.float32), (ours.MoCo, torch.bfloat16), (fused, torch.float32)])
def test_errs_no_more_than_theirs(package, of, dtype):
    def results(of, seed, to):
        torch.manual_seed(seed)
        model = of(Scaled, 32, 64).to(dtype).to(to)
        batch = [x.detach().to(to).requires_grad_() for x in drawn(seed, dtype, (32, 32), (32, 32))]
        loss, *_ = contrasted(model, batch)
        return [loss.detach(), *torch.autograd.grad(loss, batch[:1])]

    with alone():
        errs_no_more(results, of, package, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("of", [ours.MoCo, fused], ids=["logits", "fused"])
def test_trains_the_same(of):
    def weights(of):
        model = made(of, 4, 32, 0.9, 0.2, True)
        return [*trained(model, lambda model, i: contrasted(model, images(i, 8))[0]), model.queue, model.queue_ptr]

    mine = weights(of)
    for of, around in yardsticks():
        with around():
            same(mine, weights(of), 1e-8)


# ---- what it keeps ---------------------------------------------------------------------------------------------------


def test_the_package_is_compared_with(package):
    assert yardsticks() == [(Formula, contextlib.nullcontext), (package, alone)]


def test_encoders_may_learn_nothing():
    model, x = ours.MoCo(lambda num_classes: nn.Identity(), dim=6, K=8), torch.randn(4, 6, requires_grad=True)
    logits, labels = model(x, x)
    F.cross_entropy(logits, labels).backward()
    assert logits.shape == (4, 9) and x.grad is not None


def test_defaults_and_attributes_are_theirs():
    for of in (ours.MoCo, *(of for of, _ in yardsticks()[1:])):
        model = of(base_encoder=Encoder)
        assert (model.K, model.m, model.T, model.queue.shape) == (65536, 0.999, 0.07, (128, 65536))
        model = of(Encoder, 4, 8, 0.9, 0.2, True)
        assert (model.K, model.m, model.T, model.encoder_k.fc[2].out_features) == (8, 0.9, 0.2, 4)
        assert not any(x.requires_grad for x in model.encoder_k.parameters())
        assert all(x.requires_grad for x in model.encoder_q.parameters())


def test_a_seed_makes_the_same_weights_and_the_same_queue():
    mine, theirs = (made(of, 4, 8, 0.9, 0.2, True, dtype=torch.float32) for of in (ours.MoCo, yardsticks()[-1][0]))
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert mine.queue.t().is_contiguous() and mine.queue_ptr.dtype == torch.int64


def published(model):
    """The checkpoint of a model that was wrapped in DistributedDataParallel, from its file."""
    file = io.BytesIO()
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": nn.ModuleDict(dict(module=model)).state_dict()}, file)
    file.seek(0)
    return torch.load(file)


def test_published_checkpoints_load_strictly():
    """With `module.` before each name, and without; the queue stays laid out by key."""
    other = made(yardsticks()[-1][0], 4, 8, 0.9, 0.2, seed=1)
    assert "module.encoder_q.fc.weight" in published(other)["state_dict"]
    for state in (published(other)["state_dict"], other.state_dict()):
        mine, given = made(ours.MoCo, 4, 8, 0.9, 0.2), dict(state)
        mine.load_state_dict(state, strict=True)
        assert all(torch.equal(x, other.state_dict()[name]) for name, x in mine.state_dict().items())
        assert mine.queue.t().is_contiguous() and state.keys() == given.keys()
        around = nn.ModuleDict(dict(model=made(ours.MoCo, 4, 8, 0.9, 0.2)))
        around.load_state_dict({f"model.{name}": x for name, x in state.items()}, strict=True)
        assert torch.equal(around["model"].queue, other.queue)


def test_their_model_loads_what_was_saved_here():
    mine, other = made(ours.MoCo, 4, 8, 0.9, 0.2), made(yardsticks()[-1][0], 4, 8, 0.9, 0.2, seed=1)
    other.load_state_dict(mine.state_dict(), strict=True)
    assert torch.equal(other.queue, mine.queue)
    nn.ModuleDict(dict(module=other)).load_state_dict(published(mine)["state_dict"], strict=True)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_does_not_fit_a_checkpoint_is_said(prefix):
    state = {prefix + name: x for name, x in made(ours.MoCo, 4, 8).state_dict().items()}
    del state[prefix + "encoder_q.fc.bias"]
    state[prefix + "extra"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*encoder_q.fc.bias.*Unexpected key.*extra"):
        made(ours.MoCo, 4, 8).load_state_dict(state)


def test_k_must_be_a_multiple_of_the_batch():
    """And is an AssertionError of the call, of which the encoder has heard already."""
    for of, around in [(ours.MoCo, contextlib.nullcontext), (fused, contextlib.nullcontext), *yardsticks()[1:]]:
        model = made(of, 4, 10)
        before = model.queue.clone()
        with around(), pytest.raises(AssertionError):
            model(*images(0))
        assert torch.equal(model.queue, before) and model.queue_ptr == 0
        assert model.encoder_k.norm.num_batches_tracked == 1


def test_queue_is_a_ring():
    model, pointers = made(ours.MoCo, 4, 8), []
    for i in range(3):
        model(*images(i))
        pointers.append(int(model.queue_ptr))
    assert pointers == [4, 0, 4]
    model.K = 9  # and another number of keys passes the end, which is an error there
    model(*images(3, 3)), model(*images(4, 3))
    assert model.queue_ptr == 2


def test_keys_are_enqueued_wherever_it_is_called():
    for of, around in [(ours.MoCo, contextlib.nullcontext), *yardsticks()[1:]]:
        model = made(of, 4, 8).eval()
        with around(), torch.no_grad():
            model(*images(0))
        assert model.queue_ptr == 4


def test_batches_may_follow_each_other_before_the_backward():
    found = []
    for of in (ours.MoCo, fused):
        model = made(of, 4, 8)
        losses = [contrasted(model, images(i))[0] for i in range(3)]
        found.append(torch.autograd.grad(sum(losses), [*model.encoder_q.parameters()]))
    same(*found)


def test_a_queue_that_is_laid_out_otherwise():
    found = []
    for contiguous in (False, True):
        for of in (ours.MoCo, fused):
            model = made(of, 4, 8)
            if contiguous:
                model.queue = model.queue.contiguous()
            found.append(steps(model, [images(i) for i in range(3)])[0])
    for other in found[1:]:
        same(found[0], other)


def test_an_encoder_that_has_collapsed_finds_nothing():
    model = made(fused, 4, 8)
    for encoder in (model.encoder_q, model.encoder_k):
        nn.init.zeros_(encoder.fc.weight)
    for i in range(3):
        found = model(*images(i))
    assert found.acc1 == found.acc5 == 0 and torch.allclose(found.loss, torch.tensor(9.0).double().log())


def test_methods_can_be_inherited():
    """Forks replace the shuffle by one of their own."""

    class Mine(ours.MoCo):
        def _batch_shuffle_ddp(self, x):
            return x.flip(0), None

        def _batch_unshuffle_ddp(self, x, idx_unshuffle):
            return x.flip(0)

    same(*(steps(made(of, 4, 8), [images(0)])[0] for of in (ours.MoCo, Mine)))


def test_order_is_drawn_as_theirs(package):
    """So that dropout, and all that is drawn afterwards, is the same."""
    found = []
    for of, around in ((ours.MoCo, contextlib.nullcontext), (package, alone)):
        model = made(of, 4, 8)
        with around():
            torch.manual_seed(5)
            x, back = model._batch_shuffle_ddp(images(0)[0])
            found.append([x, back, model._batch_unshuffle_ddp(x, back), torch.rand(3)])
    same(*found)
    assert torch.equal(found[0][2], images(0)[0]) and not torch.equal(found[0][0], images(0)[0])


@pytest.mark.parametrize("of", [ours.MoCo, fused], ids=["logits", "fused"])
def test_autocast(of):
    model = made(of, 4, 8, dtype=torch.float32)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, *_ = contrasted(model, images(0, dtype=torch.float32))
    loss.backward()
    assert torch.allclose(loss.float(), contrasted(twin, images(0, dtype=torch.float32))[0], rtol=3e-2)
    assert model.queue.dtype == torch.float32 and torch.allclose(model.queue, twin.queue, atol=3e-2)


# ---- over ranks ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_there(group):
    """Rank 0, from which the order comes, is that of the group."""
    broadcast = dist.broadcast
    with as_world(group), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda x, *args, **options: x)
        patch.setattr(dist, "broadcast", lambda x, src: broadcast(x, group=group, group_src=src))
        yield


def shuffled_rows(group):
    model, x = made(ours.MoCo, 4, 24), images(group.rank())[0]
    torch.manual_seed(group.rank())
    with as_there(group):
        rows, back = model._batch_shuffle_ddp(x)
        for i in range(2):
            model(*images(10 * i + group.rank()))
        return rows, model._batch_unshuffle_ddp(rows, back), model.queue, model.queue_ptr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_are_shuffled_over_ranks(three, ranks):  # noqa: F811
    """In the order that the first draws; every rank has the keys of all."""
    found = three.run(shuffled_rows, ranks=ranks)
    given = [images(rank)[0] for rank in range(ranks)]
    order = torch.randperm(4 * ranks, generator=torch.Generator().manual_seed(0))
    for (rows, back, queue, ptr), x, want in zip(found, given, torch.cat(given)[order].chunk(ranks), strict=True):
        assert torch.equal(rows, want) and torch.equal(back, x)
        assert ptr == 8 * ranks % 24 and torch.equal(queue, found[0][2])
    assert torch.allclose(found[0][2][:, : 8 * ranks].norm(dim=0), torch.ones(8 * ranks).double())


def trained_over_ranks(group, name, fused):
    """Twenty steps in DistributedDataParallel, and what each rank has then."""
    of = ours.MoCo if name == "ours" else peer("moco.builder").MoCo
    with as_there(group):
        options = dict(fused=True) if fused else {}
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(of(Encoder, 4, 24, 0.9, 0.2, **options).double())
        torch.manual_seed(group.rank())
        step = lambda model, i: contrasted(model, images(10 * i + group.rank()))[0]  # noqa: E731
        return [*trained(model, step), *(x.clone() for x in model.state_dict().values())]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_trains_the_same_over_ranks(package, three, ranks):  # noqa: F811
    theirs = three.run(trained_over_ranks, "theirs", False, ranks=ranks)
    for with_fused in (False, True):
        mine = three.run(trained_over_ranks, "ours", with_fused, ranks=ranks)
        for a, b in zip(mine, theirs, strict=True):
            same(a, b, 1e-8)
