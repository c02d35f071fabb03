import copy
import math
import os
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import sslkern
from sslkern import CachedLoss, InfoNCELoss, NTXentLoss


def encoder(dropout=0.3):
    return nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Dropout(dropout), nn.Linear(20, 5)).double()


def in_chunks(encode, x, size):
    """With the graph of all chunks at once, in the order in which CachedLoss draws random numbers."""
    return torch.cat([encode(part) for part in x.split(size)])


def close(got, want):
    return torch.allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 4, 7, 11, 50])  # 11 rows: one at a time, uneven last chunks, one chunk
def test_gradients_are_those_of_the_whole_batch(size):
    model, criterion = encoder(), NTXentLoss(nn.Parameter(torch.tensor(0.2, dtype=torch.float64)))
    x0, x1 = torch.randn(2, 11, 6, dtype=torch.float64)
    leaves = [*model.parameters(), criterion.temperature]
    torch.manual_seed(1)
    want = criterion(in_chunks(model, x0, size), in_chunks(model, x1, size))
    after = torch.rand(3)
    grads = torch.autograd.grad(want, leaves)
    torch.manual_seed(1)
    loss = CachedLoss(model, criterion, size)(x0, x1)
    assert torch.equal(torch.rand(3), after)
    state = torch.get_rng_state()
    (-3 * loss).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert close(loss, want)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert close(leaf.grad, -3 * grad)


def test_two_encoders_and_structured_inputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = encoder(), encoder(0.5)
            self.log_scale = nn.Parameter(torch.tensor(2.0).double())

        def encode_image(self, x):
            return self.image(x)

        def encode_text(self, tokens):
            tokens["x"] *= tokens.pop("mask")  # it writes into its input
            return {"features": (self.text(tokens["x"]),), "length": tokens["x"].norm(dim=1)}

    def loss_of(image, text, scale):
        text = text["features"][0] * text["length"][:, None]
        return InfoNCELoss(two_way=True, stats=True)(image, text, logit_scale=scale)

    model, images = Model(), torch.randn(9, 6, requires_grad=True, dtype=torch.float64)
    x, mask = torch.randn(9, 6, dtype=torch.float64), torch.rand(9, 1, dtype=torch.float64).round()
    leaves = [*model.parameters(), images]

    def text_of(rows):
        return model.encode_text({"x": x[rows].clone(), "mask": mask[rows]})

    torch.manual_seed(1)
    image = in_chunks(model.encode_image, images, 4)
    parts = [text_of(slice(i, i + 4)) for i in (0, 4, 8)]
    text = {
        "features": (torch.cat([p["features"][0] for p in parts]),),
        "length": torch.cat([p["length"] for p in parts]),
    }
    want, want_share = loss_of(image, text, model.log_scale.exp())
    grads = torch.autograd.grad(want, leaves)

    torch.manual_seed(1)
    cached = CachedLoss((model.encode_image, model.encode_text), loss_of, 4)
    tokens = {"x": x.clone(), "mask": mask, "language": "en"}
    loss, share = cached(images, tokens, scale=model.log_scale.exp())
    assert close(loss, want) and share == want_share and torch.equal(tokens["x"], x) and "mask" in tokens
    for got, grad in zip(torch.autograd.grad(loss, leaves), grads, strict=True):
        assert close(got, grad)


def test_frozen_encoder_and_evaluation():
    """The keys of MoCo: an encoder without gradient, features without graph."""
    model, frozen = encoder(), encoder().requires_grad_(False)
    calls = []
    frozen.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(10, 6, dtype=torch.float64)
    cached = CachedLoss((model, frozen), InfoNCELoss(0.2), 3)
    loss = cached(x, x)
    loss.backward()
    assert len(calls) == 4 and all(p.grad.abs().sum() > 0 for p in model.parameters())  # not embedded again
    model.eval(), frozen.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = cached(x, x)
            assert not loss.requires_grad and close(loss, InfoNCELoss(0.2)(model(x), frozen(x)))


class Alive(torch.autograd.Function):
    """The identity, which knows how many rows are kept for its backward at a time."""

    rows = most = 0

    @staticmethod
    def forward(ctx, x):
        Alive.rows += len(x)
        Alive.most = max(Alive.most, Alive.rows)
        kept = x.clone()
        weakref.finalize(kept, Alive.drop, len(x))
        ctx.kept = kept
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def drop(rows):
        Alive.rows -= rows


def test_activations_of_one_chunk_at_a_time():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5)

        def forward(self, x):
            return Alive.apply(self.linear(x))

    model, x = Model(), torch.randn(2, 40, 6)
    NTXentLoss()(model(x[0]), model(x[1])).backward()
    assert Alive.most == 80 and Alive.rows == 0
    Alive.most = 0
    CachedLoss(model, NTXentLoss(), 8)(*x).backward()
    assert Alive.most == 8 and Alive.rows == 0


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_and_gradient_scaler(inside):
    """The backward runs under the autocast of the forward, also when it is called within it."""
    model, x = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 5)), torch.randn(2, 32, 6)
    seen = []
    model[2].register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def gradients(loss_of):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of()
            if inside:
                scaler.scale(loss).backward()
        if not inside:
            scaler.scale(loss).backward()
        return [p.grad / 1024 for p in model.parameters()]

    want = gradients(lambda: NTXentLoss(0.5)(model(x[0]), model(x[1])))
    got = gradients(lambda: CachedLoss(model, NTXentLoss(0.5), 8)(x[0], x[1]))
    assert set(seen) == {torch.bfloat16}
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()


class Scaled(nn.Module):
    """What autocast leaves in the type it has."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 6, dtype=torch.float16))

    def forward(self, x):
        return x * self.weight


def test_features_of_another_type_than_autocast_takes():
    model, x = Scaled(), torch.randn(2, 10, 6).half()
    want = torch.autograd.grad(NTXentLoss()(model(x[0]), model(x[1])), model.weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        CachedLoss(model, NTXentLoss(), 4)(*x).backward()
    assert (model.weight.grad - want).norm() < 0.01 * want.norm()


def test_with_a_queue_and_two_backwards():
    model, x, queue = encoder(0), torch.randn(2, 10, 6).double(), torch.randn(30, 5).double()
    loss = CachedLoss(model, lambda a, b: sslkern.functional.info_nce(a, b, queue, in_batch=True), 3)(*x)
    want = sslkern.functional.info_nce(model(x[0]), model(x[1]), queue, in_batch=True)
    grads = torch.autograd.grad(want, list(model.parameters()))
    for times in (1, 2):
        loss.backward(retain_graph=True)
        assert all(close(p.grad, times * g) for p, g in zip(model.parameters(), grads, strict=True))


def _count(reductions, bucket):
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    reductions.append(bucket.buffer().numel())
    return default_hooks.allreduce_hook(None, bucket)


def _one_rank(rank, path, x, both_done):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole, *cached = (
        nn.parallel.DistributedDataParallel(nn.Sequential(encoder(0), nn.BatchNorm1d(5).double().eval()), **options)
        for options in ({}, {}, dict(find_unused_parameters=True), dict(static_graph=True))
    )
    reductions = []
    for model in cached:
        model.load_state_dict(whole.state_dict())
        model.register_comm_hook(reductions, _count)
    size = sum(p.numel() for p in whole.parameters())
    for step in range(3):
        whole.zero_grad()
        NTXentLoss()(*whole(x[rank].flatten(0, 1)).chunk(2)).backward()
        for model in cached:
            model.zero_grad()
            reductions.clear()
            # 7 chunks and 4: no process waits for the other within them
            halves = CachedLoss(model, lambda z: NTXentLoss()(*z.chunk(2)), 3 + 2 * rank)
            if step < 2:
                halves(x[rank].flatten(0, 1)).backward()
            elif not model.static_graph:  # which wants the same forward each time
                CachedLoss(model, NTXentLoss(), 3)(*x[rank]).backward()
            else:
                continue
            assert sum(reductions) == size
            assert all(close(a.grad, b.grad) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    inside = CachedLoss(nn.Sequential(cached[1], nn.Identity()), NTXentLoss(), 3)
    with pytest.raises(TypeError, match="encoder must be the DistributedDataParallel itself"):
        inside(*x[rank])
    both_done.wait(60)
    os._exit(0)  # taking gloo's threads down aborts the process now and then


def _one_rank_of_shards(rank, path, x, both_done):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(encoder(0))
        fully_shard(models[-1][0], mesh=mesh)
        fully_shard(models[-1], mesh=mesh)
    NTXentLoss()(*models[0](x[rank].flatten(0, 1)).chunk(2)).backward()
    CachedLoss(models[1], NTXentLoss(), 3)(*x[rank]).backward()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert close(a.grad.to_local(), b.grad.to_local())
    both_done.wait(60)
    os._exit(0)


def _on_two(one_rank, folder):
    both_done = torch.multiprocessing.get_context("spawn").Barrier(2)
    x = torch.randn(2, 2, 10, 6).double()
    torch.multiprocessing.spawn(one_rank, (str(folder / "store"), x, both_done), nprocs=2)


@pytest.mark.slow
def test_under_distributed_data_parallel(tmp_path):
    """One forward of the wrapper for a batch, one reduction of each parameter with the gradient of all chunks."""
    _on_two(_one_rank, tmp_path)


@pytest.mark.slow
def test_under_fully_shard(tmp_path):
    _on_two(_one_rank_of_shards, tmp_path)


class Reentrant(nn.Module):
    """A checkpoint, of either kind, around the second of two layers."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 5), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.second, self.first(x), use_reentrant=self.reentrant)


class Fading(nn.Module):
    """Its output depends on buffers that a call replaces, or changes in place; one is not in the state_dict."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.register_buffer("replaced", torch.ones(5), persistent=False)
        self.register_buffer("changed", torch.ones(5))

    def forward(self, x):
        out = self.linear(x) * self.replaced.clone() + self.changed.clone() * x.sum(1, keepdim=True)
        self.replaced = 0.9 * self.replaced
        self.changed.data.mul_(0.8)  # no version tells of it
        return out


class Late(nn.Module):
    """A buffer that is None before the first chunk."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.register_buffer("factor", None)

    def forward(self, x):
        self.factor = torch.ones_like(x[0, :1]) if self.factor is None else self.factor + 1
        return self.linear(x) * self.factor.clone() + x[:, :5]


class Growing(nn.Module):
    """It makes what is given when it is first called."""

    def __init__(self, make):
        super().__init__()
        self.linear, self.make = nn.Linear(6, 5), make

    def forward(self, x):
        if self.make is not None:
            self.make = self.make(self)
        return self.linear(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())

    def encode(self, x):
        return self(x)


class Recurrent(nn.Module):
    """It keeps lists of its parameters."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 5, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        return self.lstm(x.view(-1, 2, 3))[0][:, -1]


def normalised(norm):
    return nn.Sequential(norm(nn.Linear(6, 8)), nn.GELU(), nn.Linear(8, 5))


ENCODERS = {
    "checkpoint": lambda: Reentrant(False),
    "reentrant checkpoint": lambda: Reentrant(True),
    "spectral norm": lambda: normalised(parametrizations.spectral_norm),
    "spectral norm by hooks": lambda: normalised(nn.utils.spectral_norm),
    "weight norm": lambda: normalised(parametrizations.weight_norm),
    "batch norm": lambda: normalised(lambda linear: nn.Sequential(linear, nn.BatchNorm1d(8))),
    "average of all batches": lambda: normalised(
        lambda linear: nn.Sequential(linear, nn.BatchNorm1d(8, momentum=None))
    ),
    "fading": Fading,
    "late": Late,
    "tied": Tied,
    "a method": Tied,
    "lstm": Recurrent,
    "data parallel": lambda: nn.DataParallel(normalised(nn.Identity().forward)),
    "script": lambda: torch.jit.script(normalised(lambda linear: nn.Sequential(linear, nn.BatchNorm1d(8)))),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:`torch.jit", "ignore:.*deprecated")
@pytest.mark.parametrize("name", ENCODERS)
def test_each_chunk_is_embedded_again_as_it_was(name):
    """Gradients and buffers are those of a graph of all chunks, twice, and the module is left as it is."""

    def build():
        torch.manual_seed(0)
        model = ENCODERS[name]().double()
        return model, model.encode if name == "a method" else model

    x, criterion = torch.randn(2, 11, 6).double(), NTXentLoss()
    (plain, encode), (cached, by_chunks) = build(), build()
    torch.manual_seed(1)
    want = criterion(*(in_chunks(encode, each, 4) for each in x))
    torch.manual_seed(1)
    got = CachedLoss(by_chunks, criterion, 4)(*x)
    assert close(got, want)
    buffers = [b.clone() for b in cached.buffers()]
    want.backward()
    parameters = list(cached.parameters())
    for training in (True, False):
        cached.zero_grad()
        cached.train(training)  # the chunks were embedded in training, whatever is set by now
        got.backward(retain_graph=True)
        assert not any(module.training ^ training for module in cached.modules())
        for p, q, r in zip(cached.parameters(), parameters, plain.parameters(), strict=True):
            assert p is q and close(p.grad, r.grad)
    for a, b, c in zip(cached.buffers(), buffers, plain.buffers(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_parametrised_weights_that_torch_keeps():
    model, x = normalised(parametrizations.weight_norm).double(), torch.randn(2, 11, 6).double()
    want = torch.autograd.grad(NTXentLoss()(model(x[0]), model(x[1])), list(model.parameters()))
    with parametrize.cached():
        CachedLoss(model, NTXentLoss(), 4)(*x).backward()
        assert model[0].weight.requires_grad and model[0].weight is model[0].weight
    assert all(close(p.grad, g) for p, g in zip(model.parameters(), want, strict=True))


def test_only_buffers_that_change_are_kept_for_each_chunk():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6).eval())
    cache = sslkern.cached._Cache(model, torch.randn(10, 6), 2)
    cache.embed()
    kept = {name: {id(buffers[name]) for buffers in cache.buffers} for name in cache.buffers[0]}
    assert {name.rpartition(".0.")[0]: len(x) for name, x in kept.items()} == {"module": 5, "": 1}
    frozen = sslkern.cached._Cache(model.requires_grad_(False), torch.randn(10, 6), 2)
    frozen.embed()
    assert not frozen.buffers and not frozen.random


def test_hooks_on_parameters_run_once():
    """Those that scale, and those that run when a gradient is there, over two inputs and accumulated backwards."""
    plain, cached = (encoder(0) for _ in range(2))
    cached.load_state_dict(plain.state_dict())
    calls, x = [], torch.randn(2, 10, 6).double()
    for model in (plain, cached):
        model[0].weight.register_hook(lambda g: 0.1 * g)
        model[3].weight.register_post_accumulate_grad_hook(calls.append)
    for _ in range(2):
        NTXentLoss()(plain(x[0]), plain(x[1])).backward()
        CachedLoss(cached, NTXentLoss(), 3)(*x).backward()
    assert calls == [plain[3].weight, cached[3].weight] * 2
    for a, b in zip(plain.parameters(), cached.parameters(), strict=True):
        assert close(b.grad, a.grad)


def test_gradients_of_inputs_and_of_some_parameters():
    model, x = encoder(0), torch.randn(2, 10, 6).double().requires_grad_()
    model[3].requires_grad_(False)
    leaves = [x, model[0].bias]
    want = torch.autograd.grad(NTXentLoss()(*model(x)), leaves)
    for a, b in zip(torch.autograd.grad(CachedLoss(model, NTXentLoss(), 3)(*x), leaves), want, strict=True):
        assert close(a, b)


def test_sparse_gradients():
    model = nn.EmbeddingBag(20, 5, sparse=True).double()
    x = torch.randint(20, (2, 11, 3))
    NTXentLoss()(model(x[0]), model(x[1])).backward()
    want, model.weight.grad = model.weight.grad, None
    CachedLoss(model, NTXentLoss(), 4)(*x).backward()
    assert model.weight.grad.is_sparse and close(model.weight.grad.to_dense(), want.to_dense())


def _compiled(backend):
    from torch._dynamo.testing import CompileCounterWithBackend  # late: processes of other tests import this module

    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    plain = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 5)).double()
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, model)]
    counts = []
    for _ in range(4):
        x = torch.randn(2, 11, 6).double()  # the last chunk is shorter
        NTXentLoss()(*(in_chunks(plain, each, 4) for each in x)).backward()
        CachedLoss(compiled, NTXentLoss(), 4)(*x).backward()
        for a, b in zip((*model.parameters(), *model.buffers()), (*plain.parameters(), *plain.buffers()), strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
            assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-11)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4  # one step compiles all that is needed


def test_compiled_encoder():
    _compiled("aot_eager")


@pytest.mark.slow
def test_encoder_compiled_by_inductor():
    _compiled("inductor")


class Nothing(nn.Module):
    def forward(self, x):
        return None


class Prototypes(nn.Linear):
    """As in SwAV: unit rows, made in the forward."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.copy_(nn.functional.normalize(self.weight))
        return super().forward(x)


def test_misuse_is_named():
    model, x = encoder(), torch.randn(8, 6).double()
    with pytest.raises(TypeError, match="encoder must be a module"):
        CachedLoss(lambda x: x, NTXentLoss(), 4)
    for bad in (0, None, 2.0):
        with pytest.raises(ValueError, match="chunk_size must"):
            CachedLoss(model, NTXentLoss(), bad)
    with pytest.raises(TypeError, match="loss must be"):
        CachedLoss(model, None, 4)
    with pytest.raises(ValueError, match="encoder must return tensors"):
        CachedLoss(nn.Sequential(model, Nothing()), NTXentLoss(), 4)(x, x)
    with pytest.raises(ValueError, match="inputs must be 2"):
        CachedLoss((model, model), NTXentLoss(), 4)(x)
    for bad in ({"a": x, "b": x[:3]}, "text", torch.tensor(1.0)):
        with pytest.raises(ValueError, match="inputs must hold"):
            CachedLoss(model, NTXentLoss(), 4)(bad, x)
    with pytest.raises(ValueError, match="z0 is empty"):  # as the loss says; a rank among others may have no rows
        CachedLoss(model, NTXentLoss(), 4)(x[:0], x[:0])
    with pytest.raises(TypeError, match="inputs must be a dense"):
        CachedLoss(model, NTXentLoss(), 4)(x, x.to_sparse())
    with pytest.raises(ValueError, match=r"encoder must return tensors \[4, ...\]"):
        CachedLoss(nn.Flatten(0), NTXentLoss(), 4)(x, x)
    with pytest.raises(RuntimeError, match="encoder must not change its parameters"):
        CachedLoss(Prototypes(6, 5).double(), NTXentLoss(), 4)(x, x + 1)
    for grow in (
        lambda model: model.register_buffer("late", torch.ones(1)),
        lambda model: model.register_parameter("late", nn.Parameter(torch.ones(1))),
        lambda model: model.add_module("late", nn.Linear(1, 1)),
    ):
        with pytest.raises(RuntimeError, match="encoder must not make parameters"):
            CachedLoss(Growing(grow).double(), NTXentLoss(), 4)(x, x + 1)
    with pytest.raises(ValueError, match="encoder must know the shapes"):
        CachedLoss(nn.Sequential(nn.LazyLinear(5)), NTXentLoss(), 4)(x, x + 1)
    loss = CachedLoss(model, NTXentLoss(), 4)(x, x + 1)
    with torch.no_grad():
        model[0].weight.mul_(math.pi)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()
