"""What several losses share: weights of samples, label smoothing, prefixes of the features, digits of tiny losses."""

import collections
import math

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import clip, info_nce, matryoshka, mnrl, moco_v3, nt_xent, nt_xent_multi_view, sup_con

from ..fuzz import Wrapper
from .agreement import agrees_exactly, agrees_on_kernels, compiles, none, product, refuses, unit

IDS = torch.arange(10) // 3
SMOOTHING = 0.2


def smoothed(s, positive):
    """Cross-entropy of scores s with the smoothed target over the classes that count, those with s > -inf."""
    log_prob = s - s.logsumexp(1, keepdim=True)
    classes = s != -math.inf
    mean = log_prob.where(classes, 0).sum(1) / classes.sum(1)
    return -(1 - SMOOTHING) * log_prob[torch.arange(len(s)), positive] - SMOOTHING * mean


def dense_nt_xent(z0, z1, temperature, ids=None, **_):
    N = len(z0)
    z, positive = unit(torch.cat((z0, z1))), torch.arange(2 * N).roll(N)
    ids = (torch.arange(N) if ids is None else ids).repeat(2)
    out = (ids[:, None] == ids).scatter(1, positive[:, None], False)
    return smoothed((product(z, z) / temperature).masked_fill(out, -math.inf), positive)


def dense_info_nce(query, key, temperature, two_way=False, ids=None, **_):
    own, s = torch.arange(len(query)), product(unit(query), unit(key)) / temperature
    if ids is not None:
        s = s.masked_fill((ids[:, None] == ids) & (own[:, None] != own), -math.inf)
    losses = smoothed(s, own)
    return (losses + smoothed(s.T, own)) / 2 if two_way else losses


def dense_negatives(query, key, negatives, temperature, in_batch=False, ids=None, negative_ids=None, **_):
    query, key, negatives = unit(query), unit(key), unit(negatives)
    row_ids = torch.arange(len(query)) if ids is None else ids
    each = negatives if negatives.ndim == 3 else negatives.expand(len(query), *negatives.shape)
    s = product(query.unsqueeze(1), each).squeeze(1) / temperature
    if negative_ids is not None:
        s = s.masked_fill(row_ids[:, None] == negative_ids, -math.inf)
    parts = [product(query.unsqueeze(1), key.unsqueeze(1)).view(-1, 1) / temperature, s]
    if in_batch:
        parts.append((product(query, key) / temperature).masked_fill(row_ids[:, None] == row_ids, -math.inf))
    return smoothed(torch.cat(parts, 1), torch.zeros(len(query), dtype=torch.long))


def given(query, key, negatives, **options):
    return info_nce(query, key, negatives, reduction="none", **options)


SMOOTH_CASES = {
    "views": (none(nt_xent), dense_nt_xent, 2, {}),
    "views, ids": (none(nt_xent), dense_nt_xent, 2, dict(ids=IDS)),
    "one way": (none(info_nce), dense_info_nce, 2, {}),
    "two way, ids": (none(info_nce), dense_info_nce, 2, dict(two_way=True, ids=IDS)),
    "shared": (given, dense_negatives, (21, 6), {}),
    "shared, ids": (given, dense_negatives, (21, 6), dict(ids=IDS, negative_ids=torch.arange(21) // 3)),
    "own": (given, dense_negatives, (10, 7, 6), dict(in_batch=True)),
    "own, ids": (given, dense_negatives, (10, 7, 6), dict(ids=IDS, negative_ids=torch.arange(70).view(10, 7) % 6)),
}


@pytest.mark.parametrize("case", SMOOTH_CASES)
def test_label_smoothing(case):
    loss, dense, negatives, options = SMOOTH_CASES[case]
    features = [torch.randn(10, 6), torch.randn(10, 6)] + ([torch.randn(negatives)] if negatives != 2 else [])
    for temperature in (0.3, 0.01):
        agrees_exactly(loss, dense, features, temperature, label_smoothing=SMOOTHING, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["views", "two way, ids", "shared"])
def test_label_smoothing_on_kernels(backend, case, dtype):
    loss, dense, negatives, options = SMOOTH_CASES[case]
    N = 65
    options = options | (dict(ids=torch.arange(N) // 3) if "ids" in options else {})
    features = [torch.randn(N, 6), torch.randn(N, 6)] + ([torch.randn(negatives)] if negatives != 2 else [])
    agrees_on_kernels(loss, dense, features, 0.1, dtype, scores=3, label_smoothing=SMOOTHING, **options)


def test_label_smoothing_without_negatives(backend):
    z0, z1, same = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3), torch.zeros(5, dtype=torch.long)
    for loss in (
        nt_xent(z0, z1, ids=same, label_smoothing=0.1),
        info_nce(z0, z1, ids=same, two_way=True, label_smoothing=0.1),
        info_nce(z0, z1, torch.randn(0, 3), label_smoothing=0.1),
        info_nce(z0, z1, torch.randn(5, 4, 3), ids=same, negative_ids=torch.zeros(5, 4).long(), label_smoothing=0.1),
    ):
        (grad,) = torch.autograd.grad(loss, z0)
        assert loss == 0 and (grad == 0).all()


def test_label_smoothing_compiles(backend):
    z = torch.randn(3, 9, 8)
    compiles(nt_xent, *z[:2], label_smoothing=0.1, weights=torch.rand(9))
    compiles(info_nce, *z[:2], two_way=True, label_smoothing=0.1, ids=torch.arange(9) // 2)
    compiles(info_nce, *z, label_smoothing=0.1, weights=torch.rand(9))


LOSSES = {
    "nt_xent": (nt_xent, 2),
    "one way": (info_nce, 2),
    "two way": (lambda *z, **o: info_nce(*z, two_way=True, **o), 2),
    "negatives": (info_nce, 3),
    "clip": (lambda *z, **o: clip(*z, 3.0, **o), 2),
    "moco v3": (moco_v3, 4),
    "views": (lambda *z, **o: nt_xent_multi_view(z, **o), 3),
    "sup_con": (lambda z, **o: sup_con(z, torch.tensor([0, 1, 0, 2, 2, 2, 3]), **o), 1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_samples(backend, name):
    loss, count = LOSSES[name]
    z, w = torch.randn(count, 7, 4, requires_grad=True), torch.rand(7)
    each = loss(*z, reduction="none")
    spread = w.repeat(each.numel() // 7).view(each.shape)
    assert torch.allclose(loss(*z, weights=w, reduction="none"), spread * each)
    assert torch.allclose(loss(*z, weights=w, reduction="sum"), (spread * each).sum())
    mean, expected = loss(*z, weights=w), (spread * each).sum() / spread.sum()
    assert torch.allclose(mean, expected)
    got, want = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (mean, expected))
    assert torch.allclose(got, want, atol=1e-6)
    assert torch.allclose(loss(*z, weights=torch.full((7,), 3.0)), loss(*z))
    assert loss(*z, weights=torch.zeros(7)) == 0


def test_a_sample_of_weight_zero_has_no_loss_but_is_a_negative(backend):
    z0, z1 = torch.randn(7, 4), torch.randn(7, 4)
    w = torch.ones(7)
    w[2] = 0
    each = nt_xent(z0, z1, reduction="none").view(2, 7)
    assert torch.allclose(nt_xent(z0, z1, weights=w), each[:, w == 1].mean())


def test_matryoshka(backend):
    z0, z1, labels = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8), torch.arange(6) // 2

    def prefix(z, d):
        return F.normalize(z[:, :d])

    expected = sum(m * nt_xent(prefix(z0, d), prefix(z1, d), 0.2) for d, m in ((3, 1), (8, 0.5)))
    loss = matryoshka(nt_xent, [3, 8], [1, 0.5])(z0, z1, temperature=0.2)
    assert torch.allclose(loss, expected)
    for a, b in zip(*(torch.autograd.grad(x, z0) for x in (loss, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    # by name, with labels, modules, and losses that do not normalise
    criterion = sslkern.MatryoshkaLoss(sslkern.SupConLoss(0.2, normalize=False), dims=[3, 8])
    by_hand = sum(sup_con(prefix(z0, d), labels, 0.2, normalize=False) for d in (3, 8))
    assert torch.allclose(criterion(z0, labels), by_hand) and "dims=(3, 8)" in repr(criterion)
    queue = torch.randn(9, 8)
    for weights in (torch.tensor([1.0, 0.5]), Wrapper(torch.tensor([1.0, 0.5]))):
        assert torch.equal(matryoshka(nt_xent, [3, 8], weights)(z0, z1, temperature=0.2), loss)
    both = matryoshka(info_nce, [3])(z0, z1, negatives=queue, weights=torch.ones(6))
    assert torch.allclose(both, info_nce(prefix(z0, 3), prefix(z1, 3), prefix(queue, 3)))
    plain = matryoshka(nt_xent, [3], normalize=False)(z0, z1, normalize=False)
    assert torch.allclose(plain, nt_xent(z0[:, :3], z1[:, :3], normalize=False))


def test_matryoshka_cuts_what_is_nested(backend):
    """Features in lists, tuples and mappings; those of a guide stay whole."""
    loss = matryoshka(nt_xent_multi_view, [4, 16])
    views = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0), device="cpu")
    views = views.to(torch.empty(0).device)
    by_hand = sum(nt_xent_multi_view(F.normalize(views[..., :d], dim=-1)) for d in (4, 16))
    assert torch.allclose(by_hand, torch.tensor(6.507716), atol=1e-5)
    for nested in (views, list(views), tuple(views)):
        assert torch.allclose(loss(nested), by_hand) and torch.allclose(loss(views=nested), by_hand)
    of_mapping = matryoshka(lambda pair: nt_xent(pair["a"], *pair["rest"]), [4, 16])
    by_hand = sum(nt_xent(*F.normalize(views[:2, :, :d], dim=-1)) for d in (4, 16))
    assert torch.allclose(of_mapping({"a": views[0], "rest": (views[1],)}), by_hand)
    pair = collections.namedtuple("Pair", "a b")(*views[:2])
    assert torch.allclose(matryoshka(lambda pair: nt_xent(pair.a, pair.b), [4, 16])(pair), by_hand)

    (anchor, positive, *hard), other = views.unbind(), torch.randn(3, 6, 16)
    hard.append(hard[0].flip(0))
    for guide in (None, (*other[:2], list(other[1:].flip(2))), (*other[:2, :, :3], other[:2, :, :3].transpose(0, 1))):
        got, shares = matryoshka(mnrl, [4, 16])(anchor, positive, hard, guide=guide, stats=True)
        each = [
            mnrl(anchor[:, :d], positive[:, :d], [x[:, :d] for x in hard], guide=guide, stats=True) for d in (4, 16)
        ]
        assert torch.allclose(got, sum(loss for loss, _ in each))
        assert torch.equal(shares, torch.stack([share for _, share in each]))


def test_matryoshka_compiles(backend):
    compiles(matryoshka(nt_xent, [3, 8]), torch.randn(6, 8), torch.randn(6, 8))


def test_matryoshka_of_nested_features_compiles():
    criterion = sslkern.MatryoshkaLoss(sslkern.NTXentMultiViewLoss(), [3, 8])
    compiles(lambda *views: criterion(views), torch.randn(6, 8), torch.randn(6, 8))


def test_gradcheck():
    z0, z1 = (torch.randn(4, 3).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(matryoshka(nt_xent, [2, 3], [0.5, 2]), (z0, z1))


def test_tiny_losses_keep_their_digits(backend):
    """A true loss of 1e-7: ours is within 1 %, dense cross-entropy in fp32 is not."""
    T, N = 0.05, 25  # orthogonal samples: exp(-1 / T) = 2.1e-9 for each of some 50 negatives
    z, own = torch.eye(N, 32), torch.arange(N)
    queue = torch.eye(32)[torch.randint(N, 32, (48,))]
    views = torch.cat((z, z)) @ torch.cat((z, z)).T / T
    to_queue = torch.cat(((z * z).sum(1, keepdim=True), z @ queue.T), 1) / T
    twice = torch.cat((z @ z.T, z @ z.T - 2 * torch.eye(N)), 1) / T  # for the shape only: N - 1 negatives count
    cases = {
        "nt_xent": (nt_xent(z, z, T), 2 * N - 2, views.fill_diagonal_(-math.inf), torch.arange(2 * N).roll(N)),
        "queue": (info_nce(z, z, queue, T), 48, to_queue, own * 0),
        "two views": (nt_xent_multi_view([z, z], T), 2 * N - 2, views, torch.arange(2 * N).roll(N)),
        "sup_con": (sup_con(torch.cat((z, z)), own.repeat(2), T), 2 * N - 2, views, torch.arange(2 * N).roll(N)),
        "clip": (clip(z, z, 1 / T), N - 1, twice[:, :N], own),
    }
    for name, (ours, negatives, logits, target) in cases.items():
        exact = math.log1p(negatives * math.exp(-1 / T))
        assert 4e-8 < exact < 1.1e-7
        assert abs(ours.item() - exact) < 0.01 * exact, name
        assert abs(F.cross_entropy(logits, target).item() - exact) > 0.01 * exact, name


def test_bad_arguments_are_named():
    z = torch.randn(4, 3)
    for loss in (nt_xent, info_nce):
        refuses(
            loss,
            [
                ("weights must", (z, z), {"weights": torch.ones(8)}),
                ("weights must", (z, z), {"weights": [1.0] * 4}),
                ("weights must be floating", (z, z), {"weights": torch.ones(4).long()}),
                ("weights is on meta", (z, z), {"weights": torch.ones(4, device="meta")}),
                ("label_smoothing must", (z, z), {"label_smoothing": 1.0}),
                ("label_smoothing must", (z, z), {"label_smoothing": "0.1"}),
            ],
        )
    for of in (matryoshka, sslkern.MatryoshkaLoss):
        refuses(of, [("dims must", (nt_xent, dims), {}) for dims in (None, 3, "3", [], [0], [2.0], [True], [None])])
        weights = (1.0, [1.0], [1.0, None], [1.0, math.nan], "12", torch.ones(3))
        refuses(of, [("weights must", (nt_xent, [2, 3], w), {}) for w in weights])
        refuses(of, [("loss_fn must", (None, [2]), {})])
    refuses(sslkern.MatryoshkaLoss, [("loss must not", (sslkern.MoCoLoss(3, 8), [2]), {})])
    refuses(matryoshka(nt_xent, [4]), [("dims must not exceed", (z, z), {})])
