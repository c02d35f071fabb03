"""The loss of few pairs as a whole, by the CUDA kernels: on a GPU where there is one, else emulated."""

import copy
import ctypes
import math
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sslkern
from sslkern.backends import BACKENDS, find, load
from sslkern.backends.cuda import driver, pair_contrast
from sslkern.functional import clip, info_nce, moco, nt_xent, siglip, sup_con

from .conftest import GPU, emulate_cuda
from .functional.agreement import agrees_on_kernels, product, unit

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODES = "views", "one_way", "two_way"


@pytest.fixture(params=["cuda"] if GPU else ["emulated"])
def whole(request, monkeypatch):
    """The calls of the backend: "forward" and "backward"."""
    if request.param == "emulated":
        emulate_cuda(monkeypatch)
    module, calls = load("cuda", "pair_contrast"), []
    for function, name in ((module.pair_contrast_fwd, "forward"), (module.pair_contrast_bwd, "backward")):
        monkeypatch.setattr(module, function.__name__, counted(function, name, calls))
    torch.set_default_device("cuda" if GPU else None)
    yield calls
    torch.set_default_device(None)


def counted(function, name, calls):
    return lambda *inputs: calls.append(name) or function(*inputs)


def loss_of(mode):
    def loss(x, y, temperature, **options):
        if mode == "views":
            return nt_xent(x, y, temperature, **options)
        return info_nce(x, y, temperature=temperature, two_way=mode == "two_way", **options)

    return loss


def dense_of(mode):
    def loss(x, y, temperature, ids=None, normalize=True, reduction="mean"):
        N = len(x)
        x, y = (unit(x), unit(y)) if normalize else (x, y)
        q, k = (torch.cat((x, y)),) * 2 if mode == "views" else (x, y)
        positive = torch.arange(len(q)).roll(N) if mode == "views" else torch.arange(N)
        s = product(q, k) / temperature
        ids = (torch.arange(N) if ids is None else ids).repeat(len(q) // N)
        out = ids[:, None] == ids
        out[torch.arange(len(q)), positive] = False
        s = s.masked_fill(out, -math.inf)
        ways = [s, s.T] if mode == "two_way" else [s]
        losses = torch.stack([torch.nn.functional.cross_entropy(way, positive, reduction="none") for way in ways])
        return losses.mean() if reduction == "mean" else losses.mean(0).sum()

    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "N, D", [(17, 9), (33, 64), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((70, 129), (40, 520)))]
)
def test_value_and_gradients(whole, mode, N, D, dtype):
    if dtype == torch.float32 and D > 128:
        N, D = N // 3, min(D, 500)  # which take longest
    x, y = torch.randn(2, N, D)
    y = x + y
    for temperature, options in (
        (0.5, {}),
        (0.05, {"reduction": "sum"}),
        (0.3, {"ids": torch.arange(N) // 3}),
        (-0.7, {"normalize": False}),
    ):
        features = (x, y) if options.get("normalize", True) else (x / D**0.5, y / D**0.5)
        agrees_on_kernels(loss_of(mode), dense_of(mode), features, temperature, dtype, **options)
    assert whole == ["forward", "backward"] * 4


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_do_not_begin_on_16_bytes(whole, mode):
    x, y = torch.randn(2, 19, 41).bfloat16()[:, :, 1:]
    want = loss_of(mode)(x.contiguous(), y.contiguous(), 0.1)
    assert torch.equal(loss_of(mode)(x, y, 0.1), want) and whole == ["forward"] * 2


@pytest.mark.parametrize("mode", MODES)
def test_ids_with_gaps(whole, mode):
    for N in (3, 17, 60):
        x, y = torch.randn(2, N, 16)
        ids = torch.arange(2 * N)[::2] // 4
        want = loss_of(mode)(x, y, 0.1, ids=ids.contiguous())
        assert torch.equal(loss_of(mode)(x, y, 0.1, ids=ids), want)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits(whole, mode):
    x, y = torch.randn(2, 50, 48).half()

    def step():
        leaves = [side.clone().requires_grad_() for side in (x, y)]
        scale = torch.tensor(20.0, requires_grad=True)
        loss = loss_of(mode)(*leaves, temperature=1.0, logit_scale=scale)
        return [loss.detach(), *torch.autograd.grad(loss, (*leaves, scale))]

    for one, other in zip(step(), step(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_duplicates_zeros_and_single_rows(whole, mode, dtype):
    x, y = torch.randn(2, 21, 24).to(dtype)
    x[5], y[5] = x[4], x[4]
    x[7], y[9] = 0, 0
    leaves = [side.requires_grad_() for side in (x, y)]
    loss = loss_of(mode)(*leaves, temperature=0.01)
    grads = torch.autograd.grad(loss, leaves)
    with sslkern.use_backend("reference"):
        other = loss_of(mode)(*leaves, temperature=0.01)
        others = torch.autograd.grad(other, leaves)
    assert torch.allclose(loss, other, rtol=1e-4)
    for ours, theirs in zip(grads, others, strict=True):
        for i in (4, 5, 7, 9):
            assert (ours[i].float() - theirs[i].float()).norm() <= 0.02 * theirs.float().norm()
            ours[i], theirs[i] = 0, 0  # some are divided by 1e-12
        assert (ours.float() - theirs.float()).norm() <= 0.02 * theirs.float().norm()
    one = x[:1].detach().requires_grad_()
    loss = loss_of(mode)(one, y[:1].detach(), temperature=0.1)
    loss.backward()
    assert loss == 0 and (one.grad == 0).all()


def test_what_is_not_a_number_stays_so(whole):
    x, y = torch.randn(2, 20, 16).bfloat16()
    x[3, 2] = math.nan
    for mode in MODES:
        loss, share = loss_of(mode)(x, x, 0.1, stats=True)
        with sslkern.use_backend("reference"):
            _, expected = loss_of(mode)(x, x, 0.1, stats=True)
        assert loss.isnan() and torch.allclose(share, expected) and share < 0.6


@pytest.mark.parametrize("mode", MODES)
def test_a_positive_of_minus_infinity(whole, mode):
    x = torch.tensor([[1e20, 0.0], [0.0, 1.0], [0.0, 1.0]]).bfloat16()
    assert loss_of(mode)(x, -x, 1.0, normalize=False) == math.inf


@pytest.mark.parametrize("arriving", [math.nan, math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_rows_without_negatives_get_zero_whatever_arrives(whole, mode, arriving):
    x, y = torch.randn(2, 3, 8).bfloat16()
    leaves = [leaf.requires_grad_() for leaf in (x, y, torch.tensor(2.0))]
    loss = loss_of(mode)(x, y, 1.0, logit_scale=leaves[2], ids=torch.zeros(3, dtype=torch.int64))
    assert loss == 0 and all((grad == 0).all() for grad in torch.autograd.grad(loss, leaves, torch.tensor(arriving)))


@pytest.mark.parametrize("temperature", [0.05, 0.03, 0.01])
@pytest.mark.parametrize("mode", MODES)
def test_losses_near_zero(whole, mode, temperature):
    x, noise = torch.randn(2, 32, 64)
    leaves = [side.half().requires_grad_() for side in (x, x + 0.1 * noise)]

    def gradients():
        loss = loss_of(mode)(*leaves, temperature=temperature)
        return torch.autograd.grad(loss / loss.detach(), leaves)

    ours = gradients()
    with sslkern.use_backend("reference"):
        theirs = gradients()
    for one, other in zip(ours, theirs, strict=True):
        assert (one.float() - other.float()).norm() <= 0.005 * other.float().norm()


def test_statistics(whole):
    x, y = torch.randn(2, 30, 16).bfloat16()
    y = x + 2 * y
    for mode in MODES:
        loss, share = loss_of(mode)(x, y, 0.2, stats=True)
        with sslkern.use_backend("reference"):
            other, others = loss_of(mode)(x, y, 0.2, stats=True)
        assert torch.allclose(loss, other, rtol=1e-4) and torch.allclose(share, others) and 0 < share < 1


@pytest.mark.parametrize("mode", MODES)
def test_compiled(whole, monkeypatch, mode):
    # On a CPU, where it is emulated, compiled code has a formula for so few rows.
    monkeypatch.setattr(sys.modules["sslkern.ops.pair_contrast"], "few_pairs", lambda *_: False)
    x, y = torch.randn(2, 20, 16).bfloat16()
    scale = torch.tensor(3.0)

    def step(loss):
        leaves = [side.clone().requires_grad_() for side in (x, y, scale)]
        value = loss(*leaves[:2], temperature=1.0, logit_scale=leaves[2])
        return [value.detach(), *torch.autograd.grad(2 * value, leaves)]

    torch.compiler.reset()
    compiled = torch.compile(loss_of(mode), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(step(compiled), step(loss_of(mode)), strict=True):
        assert torch.equal(ours, eager)
    assert whole == ["forward", "backward"] * 2


def test_compiled_once_for_batches_of_any_size(whole, monkeypatch):
    monkeypatch.setattr(sys.modules["sslkern.ops.pair_contrast"], "few_pairs", lambda *_: False)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(nt_xent, fullgraph=True, backend=counter)
    for N in (5, 6, 7, 20):
        x, y = torch.randn(2, N, 8).bfloat16()
        assert torch.equal(compiled(x.requires_grad_(), y), nt_xent(x, y))
    assert counter.frame_count == 2 and whole == ["forward"] * 8  # the first is for its size alone


def test_opcheck(whole):
    x, y = torch.randn(2, 6, 8).bfloat16()
    scale = torch.tensor(2.0, requires_grad=True)
    args = (x.requires_grad_(), y, None, scale, 1.0, scale, 2.0, None, None)
    for mode in ("two_way", "sigmoid"):
        args = (*args[:9], mode, True, False, mode == "two_way", "mean", True, False, True, mode == "sigmoid", "cuda")
        torch.library.opcheck(torch.ops.sslkern.small_pair_contrast.default, args)
        *_, kept = torch.ops.sslkern.small_pair_contrast.default(x.detach(), *args[1:])
        by = scale.detach()
        back = (
            torch.tensor(1.0),
            x.detach(),
            None,
            by,
            by if mode == "sigmoid" else None,
            kept.detach(),
            x.dtype,
            "cuda",
        )
        torch.library.opcheck(torch.ops.sslkern.small_pair_contrast_bwd.default, back)


def test_which_it_takes(whole):
    def found(N, D, dtype=torch.bfloat16, views=False, keys=None):
        rows = 2 * N if views else N
        sizes = 1, rows, rows if keys is None else keys, D
        return find("pair_contrast", torch.zeros(N, D, dtype=dtype), sizes=sizes, bank=keys is not None, mode="one_way")

    assert found(1024, 1024) == found(512, 7, views=True) == found(8, 512, torch.float32) == "cuda"
    assert found(1025, 8) is found(513, 8, views=True) is found(8, 1025) is found(8, 513, torch.float32) is None
    assert found(256, 128, keys=65536) == found(8, 512, torch.float32, keys=1) == found(8, 8, keys=0) == "cuda"
    assert found(257, 128, keys=65536) is found(8, 513, keys=1) is found(1025, 8, keys=1) is None


def test_a_gpu_with_little_shared_memory_takes_fewer_features(whole, monkeypatch):
    monkeypatch.setattr(driver, "shared_memory", lambda index: 99 << 10)
    z = torch.zeros(8, 600, dtype=torch.bfloat16)
    assert "shared memory" in pair_contrast.lacks(z, (1, 8, 8, 600), False, "views")
    assert pair_contrast.lacks(z[:, :512], (1, 8, 8, 512), False, "views") is None
    assert "shared memory" in pair_contrast.lacks(z[:, :128], (1, 8, 8, 128), True, "one_way")


# ---- over a bank that does not learn ---------------------------------------------------------------------------------


def over_bank(bank):
    """InfoNCE and its dense form; where rows are normalised those of the bank are."""

    def loss(x, y, temperature, **options):
        return info_nce(x, y, bank.to(x.dtype), temperature, **options)

    def dense(x, y, temperature, normalize=True, reduction="mean"):
        x, y, negatives = (unit(z) if normalize else z for z in (x, y, bank.to(x.dtype)))
        positive = (x * y).sum(1, keepdim=True) if x.dtype == torch.float64 else (x.float() * y.float()).sum(1, True)
        s = torch.cat((positive, product(x, negatives)), 1) / temperature
        return torch.nn.functional.cross_entropy(s, torch.zeros_like(s[:, 0], dtype=torch.long), reduction=reduction)

    return loss, dense


LARGER = (70, 300, 64), (9, 230, 300)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N, M, D", [(5, 3, 9), (17, 700, 24), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in LARGER)]
)
def test_a_bank(whole, N, M, D, dtype):
    x, y = torch.randn(2, N, D)
    y, bank = x + y, torch.randn(M, D).to(dtype)
    for temperature, options in ((0.5, {}), (0.05, {"reduction": "sum"}), (-0.7, {"normalize": False})):
        size = 1 if options.get("normalize", True) else D**0.5
        agrees_on_kernels(*over_bank(bank / size), (x / size, y / size), temperature, dtype, **options)
    assert whole == ["forward", "backward"] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_of_moco_get_no_gradient_and_the_queue_may_change_before_the_backward(whole, dtype):
    x, y = torch.randn(2, 9, 40).to(dtype)
    queue = torch.nn.functional.normalize(torch.randn(300, 40)).to(dtype)
    leaves = [leaf.requires_grad_() for leaf in (x, y, torch.tensor(0.07))]

    def step():
        bank = queue.clone()
        loss, share = moco(x, y, bank, leaves[2], stats=True)
        bank.fill_(math.nan)
        return loss.detach(), share, *torch.autograd.grad(loss, leaves, allow_unused=True)

    ours = step()
    with sslkern.use_backend("reference"):
        theirs = step()
    assert ours[3] is None and whole == ["forward", "backward"]
    for one, other in zip(ours, theirs, strict=True):
        assert one is other or (one - other).float().norm() <= 0.01 * other.float().norm()


@pytest.mark.parametrize("M", [0, 1, 20])
def test_duplicates_and_zeros_in_a_bank(whole, M):
    for dtype in DTYPES:
        x, bank = torch.randn(6, 24).to(dtype), torch.randn(M, 24).to(dtype)
        x[1], bank[2:5], bank[7:8] = 0, x[3], 0
        leaves = [side.clone().requires_grad_() for side in (x, x + torch.randn(6, 24).to(dtype))]

        def step(leaves=leaves, bank=bank):
            loss = info_nce(*leaves, bank, temperature=0.01)
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]

        ours = step()
        with sslkern.use_backend("reference"):
            theirs = step()
        for one, other in zip(ours, theirs, strict=True):
            assert (one.float() - other.float()).norm() <= 0.02 * other.float().norm()
    assert whole == ["forward", "backward"] * 3


def test_what_is_not_a_number_in_a_bank_stays_so(whole):
    x, bank = torch.randn(20, 16).bfloat16(), torch.randn(20, 16).bfloat16()
    for place in x[3], bank[4]:
        place[2] = math.nan
        loss, share = moco(x, x, bank, 0.1, stats=True, normalize=False)
        with sslkern.use_backend("reference"):
            _, expected = moco(x, x, bank, 0.1, stats=True, normalize=False)
        assert loss.isnan() and torch.allclose(share, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [16, 33])
def test_the_queue_is_written_with_the_loss(whole, dtype, D):
    criterion = sslkern.MoCoLoss(D, 20, temperature=0.1).to(dtype)
    for N, pointer in ((7, 0), (7, 17), (45, 3), (5, -2)):
        q, k = torch.randn(2, N, D).to(dtype)
        criterion.memory.queue_ptr.fill_(pointer)
        other = copy.deepcopy(criterion)
        versions = [x._version for x in (criterion.memory.queue, criterion.memory.queue_ptr)]
        loss = criterion(q.requires_grad_(), k)
        loss.backward()
        expected = other.eval()(q, k)
        with sslkern.use_backend("cuda"):
            other.memory.push(k)
        assert torch.equal(loss, expected) and torch.equal(criterion.memory.queue, other.memory.queue)
        assert criterion.memory.queue_ptr == other.memory.queue_ptr == (pointer + N) % 20
        assert versions < [x._version for x in (criterion.memory.queue, criterion.memory.queue_ptr)]
    assert whole == ["forward", "backward", "forward"] * 4


def test_a_queue_that_cannot_be_written_with_the_loss(whole):
    """As keys lie in it, it has gaps, or smoothing reads it once more."""
    for case in ("keys of its own", "gaps", "smoothing"):
        memory, q = sslkern.FeatureQueue(16, 20), torch.randn(6, 16)
        k = memory.queue.t()[2:8] if case == "keys of its own" else q + 1
        if case == "gaps":
            memory.queue = memory.queue.contiguous()
        other = copy.deepcopy(memory)
        expected = moco(q, k.clone(), other.queue.t(), label_smoothing=0.1 * (case == "smoothing"))
        other.push(k.clone())
        options = dict(label_smoothing=0.1 * (case == "smoothing"), ptr=memory.queue_ptr)
        assert torch.equal(moco(q, k, memory.queue.t(), **options), expected)
        assert torch.allclose(memory.queue, other.queue) and memory.queue_ptr == 6


def test_compiled_with_a_queue(whole):
    criterion = sslkern.MoCoLoss(16, 50)
    other, (q, k) = copy.deepcopy(criterion), torch.randn(2, 8, 16)
    q.requires_grad_()
    torch.compiler.reset()
    loss, expected = torch.compile(criterion, fullgraph=True, backend="aot_eager")(q, k), other(q, k)
    assert torch.equal(loss, expected)
    assert torch.equal(*(torch.autograd.grad(x, q)[0] for x in (loss, expected)))
    assert torch.allclose(criterion.memory.queue, other.memory.queue) and criterion.memory.queue_ptr == 8
    assert whole == ["forward"] * 2 + ["backward"] * 2


# ---- SigLIP ---------------------------------------------------------------------------------------------------------


def sigmoids(bias):
    def loss(x, y, temperature, **options):
        return siglip(x, y, 1 / temperature, bias, **options)

    def dense(x, y, temperature, ids=None, normalize=True, reduction="mean"):
        x, y = (unit(x), unit(y)) if normalize else (x, y)
        logits, own = product(x, y) / temperature + bias, torch.eye(len(x), dtype=torch.bool)
        out = own if ids is None else own | (ids[:, None] == ids)
        negatives = torch.nn.functional.softplus(logits).masked_fill(out, 0).sum()
        whole = torch.nn.functional.softplus(-logits.diagonal()).sum() + negatives
        return whole / len(x) if reduction == "mean" else whole

    return loss, dense


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, D", [(17, 9), (33, 64), pytest.param(20, 300, marks=pytest.mark.slow)])
def test_siglip(whole, N, D, dtype):
    x, y = torch.randn(2, N, D)
    y = x + y
    for temperature, bias, options in (
        (0.1, -10.0, {}),
        (0.5, 2.0, {"reduction": "sum"}),
        (0.3, -4.0, {"ids": torch.arange(N) // 3}),
        (-0.7, 0.0, {"normalize": False}),
    ):
        features = (x, y) if options.get("normalize", True) else (x / D**0.5, y / D**0.5)
        agrees_on_kernels(*sigmoids(bias), features, temperature, dtype, scores=N, **options)
    assert whole == ["forward", "backward"] * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_learns_of_siglip(whole, dtype):
    x, y = torch.randn(2, 21, 24).to(dtype)
    tensors = x, y, torch.tensor(5.0), torch.tensor(-4.0)
    for chosen in ((0,), (1,), (2,), (3,), (1, 3), (0, 1, 2, 3)):
        leaves = [x.clone().requires_grad_(i in chosen) for i, x in enumerate(tensors)]
        ours = torch.autograd.grad(siglip(*leaves), [leaves[i] for i in chosen])
        with sslkern.use_backend("reference"):
            theirs = torch.autograd.grad(siglip(*leaves), [leaves[i] for i in chosen])
        for one, other in zip(ours, theirs, strict=True):
            assert (one.float() - other.float()).norm() <= 0.01 * other.float().norm()
    assert whole == ["forward", "backward"] * 6


# ---- SupCon ---------------------------------------------------------------------------------------------------------


def labels_of(labels):
    def loss(z, temperature, **options):
        return sup_con(z, labels, temperature, **options)

    def dense(z, temperature, normalize=True, reduction="mean"):
        z = unit(z) if normalize else z
        s, own = product(z, z) / temperature, torch.eye(len(z), dtype=torch.bool)
        same = (labels[:, None] == labels) & ~own
        row = s.masked_fill(own, -math.inf).logsumexp(1)
        losses = row - s.masked_fill(~same, 0).sum(1) / same.sum(1).clamp_min(1)
        losses = losses.masked_fill(~same.any(1), 0)
        return losses.mean() if reduction == "mean" else losses.sum()

    return loss, dense


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N, D", [(17, 9), (50, 64), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((140, 129), (40, 500)))]
)
def test_sup_con(whole, N, D, dtype):
    z, some = torch.randn(N, D), torch.randint(N // 4, (N,))  # some of them alone
    for temperature, labels, options in (
        (0.5, some, {}),
        (0.1, torch.arange(N) // 2, {"reduction": "sum"}),
        (0.3, torch.full((N,), -7), {}),
        (-0.7, some, {"normalize": False}),
    ):
        features = z if options.get("normalize", True) else z / D**0.5
        agrees_on_kernels(*labels_of(labels), (features,), temperature, dtype, **options)
    assert whole == ["forward", "backward"] * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_supervised_losses_near_zero(whole, dtype):
    x, noise = torch.randn(2, 20, 64)
    z = torch.cat((x, x + 0.1 * noise)).to(dtype).requires_grad_()
    labels = torch.arange(20).repeat(2)

    def step():
        loss = sup_con(z, labels, 0.03)
        return loss.detach(), torch.autograd.grad(loss / loss.detach(), z)[0]

    ours = step()
    with sslkern.use_backend("reference"):
        theirs = step()
    for one, other in zip(ours, theirs, strict=True):
        assert (one.float() - other.float()).norm() <= 0.01 * other.float().norm()


@pytest.mark.parametrize("arriving", [math.nan, math.inf])
def test_rows_without_positives_get_zero_whatever_arrives(whole, arriving):
    leaves = [leaf.requires_grad_() for leaf in (torch.randn(5, 8).bfloat16(), torch.tensor(2.0))]
    loss = sup_con(leaves[0], torch.arange(5), logit_scale=leaves[1])
    assert loss == 0 and all((grad == 0).all() for grad in torch.autograd.grad(loss, leaves, torch.tensor(arriving)))
    assert whole == ["forward", "backward"]


def test_labels_with_gaps_and_features_that_do_not_begin_on_16_bytes(whole):
    z, labels = torch.randn(19, 41).bfloat16()[:, 1:], torch.arange(38)[::2] // 8
    z[3] = 0
    want = sup_con(z.contiguous(), labels.contiguous())
    assert torch.equal(sup_con(z, labels), want) and whole == ["forward"] * 2
    with sslkern.use_backend("reference"):
        assert torch.allclose(sup_con(z, labels), want, rtol=1e-4)
    z[4, 2] = math.nan
    assert sup_con(z, labels).isnan()


def test_what_it_takes_of_sup_con(whole):
    views, labels = torch.randn(6, 2, 16, requires_grad=True), torch.arange(6) // 2
    for given in (labels, None):  # several views are rows of their own
        for reduction in ("mean", "sum"):
            ours = torch.autograd.grad(sup_con(views, given, reduction=reduction), views)[0]
            with sslkern.use_backend("reference"):
                theirs = torch.autograd.grad(sup_con(views, given, reduction=reduction), views)[0]
            assert torch.allclose(ours, theirs, atol=1e-5)
    assert whole == ["forward", "backward"] * 4
    z = views.flatten(0, 1).detach()
    for options in (dict(form="in"), dict(reduction="none"), dict(weights=torch.ones(12))):
        sup_con(z, labels.repeat(2), **options)
    sup_con(z, torch.rand(12, 3) < 0.5)
    sup_con(torch.randn(6, 513), labels)
    assert whole == ["forward", "backward"] * 4


def test_sup_con_compiled(whole):
    z, labels, scale = torch.randn(20, 16).bfloat16(), torch.arange(20) // 3, torch.tensor(3.0)

    def step(loss):
        leaves = [x.clone().requires_grad_() for x in (z, scale)]
        value = loss(leaves[0], labels, logit_scale=leaves[1])
        return [value.detach(), *torch.autograd.grad(2 * value, leaves)]

    torch.compiler.reset()
    compiled = torch.compile(sup_con, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(step(compiled), step(sup_con), strict=True):
        assert torch.equal(ours, eager)
    assert whole == ["forward", "backward"] * 2


# ---- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(GPU, reason="counted by the emulated driver")
@pytest.mark.parametrize("loss", ["nt_xent", "info_nce", "clip", "bank", "moco", "siglip", "sup_con"])
def test_four_nodes_in_a_step(whole, monkeypatch, loss):
    library = driver.library()
    count = lambda: (numbers := (ctypes.c_int64 * 7)(), library.emulated_last(numbers))[0][4]  # noqa: E731
    x, y = (torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    scale, bank = torch.tensor(10.0, requires_grad=True), torch.randn(300, 32).bfloat16()
    criterion, labels = sslkern.MoCoLoss(32, 300).bfloat16(), torch.arange(64) // 3
    call = {
        "nt_xent": lambda: nt_xent(x, y, 0.1),
        "info_nce": lambda: info_nce(x, y, temperature=0.1),
        "clip": lambda: clip(x, y, scale),
        "bank": lambda: info_nce(x, y, bank, temperature=0.1),
        "moco": lambda: criterion(x, y.detach()),
        "siglip": lambda: siglip(x, y, scale, -scale),
        "sup_con": lambda: sup_con(x, labels, logit_scale=scale),
    }[loss]
    before = count()
    call()
    assert count() - before == 2
    step = call()
    step.backward()
    assert count() - before == 2 + 3
    assert BACKENDS["cuda"].MISSING is None and whole == ["forward", "forward", "backward"]
