import math
import os
import weakref

import pytest
import torch
from torch import nn

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


def test_running_statistics_are_updated_once():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).double()

    x0, x1 = torch.randn(2, 12, 6, dtype=torch.float64)
    plain, cached = build(), build()
    NTXentLoss()(in_chunks(plain, x0, 4), in_chunks(plain, x1, 4)).backward()
    CachedLoss(cached, NTXentLoss(), 4)(x0, x1).backward()
    for a, b in zip((*plain.parameters(), *plain.buffers()), (*cached.parameters(), *cached.buffers()), strict=True):
        assert close(b, a) if a.is_floating_point() else torch.equal(a, b)
        assert a.grad is None or close(b.grad, a.grad)


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


def test_with_a_queue_and_two_backwards():
    model, x, queue = encoder(0), torch.randn(2, 10, 6).double(), torch.randn(30, 5).double()
    loss = CachedLoss(model, lambda a, b: sslkern.functional.info_nce(a, b, queue, in_batch=True), 3)(*x)
    want = sslkern.functional.info_nce(model(x[0]), model(x[1]), queue, in_batch=True)
    grads = torch.autograd.grad(want, list(model.parameters()))
    for times in (1, 2):
        loss.backward(retain_graph=True)
        assert all(close(p.grad, times * g) for p, g in zip(model.parameters(), grads, strict=True))


def _one_rank(rank, path, x, both_done):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    models = [nn.parallel.DistributedDataParallel(encoder(0)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    NTXentLoss()(*models[0](x[rank].flatten(0, 1)).chunk(2)).backward()
    CachedLoss(models[1], NTXentLoss(), 3)(*x[rank]).backward()
    assert all(close(a.grad, b.grad) for a, b in zip(*(model.parameters() for model in models), strict=True))
    both_done.wait(60)
    os._exit(0)  # taking gloo's threads down aborts the process now and then


def test_under_distributed_data_parallel(tmp_path):
    """Each parameter reports to DistributedDataParallel once, with the gradient of all chunks."""
    both_done = torch.multiprocessing.get_context("spawn").Barrier(2)
    x = torch.randn(2, 2, 10, 6).double()
    torch.multiprocessing.spawn(_one_rank, (str(tmp_path / "store"), x, both_done), nprocs=2)


def test_misuse_is_named():
    model, x = encoder(), torch.randn(8, 6).double()
    with pytest.raises(TypeError, match="encoder must be a module"):
        CachedLoss(lambda x: x, NTXentLoss(), 4)
    with pytest.raises(ValueError, match="chunk_size must"):
        CachedLoss(model, NTXentLoss(), 0)
    with pytest.raises(ValueError, match="inputs must be 2"):
        CachedLoss((model, model), NTXentLoss(), 4)(x)
    for bad in (x[:0], {"a": x, "b": x[:3]}, "text", torch.tensor(1.0)):
        with pytest.raises(ValueError, match="inputs must hold"):
            CachedLoss(model, NTXentLoss(), 4)(bad, x)
    with pytest.raises(ValueError, match=r"encoder must return tensors \[4, ...\]"):
        CachedLoss(nn.Flatten(0), NTXentLoss(), 4)(x, x)
    loss = CachedLoss(model, NTXentLoss(), 4)(x, x + 1)
    with torch.no_grad():
        model[0].weight.mul_(math.pi)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()
