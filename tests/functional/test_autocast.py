"""Inside autocast every loss computes in the type of its features, forward and backward, whichever of them is inside;
features of several types in the widest of them."""

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import info_nce, nt_xent_multi_view

from ..examples import LOSSES, OPS, Example, value_and_gradients

ALL = {name: make for name, make in (LOSSES | OPS).items() if name != "CachedLoss"}  # its encoder is the user's
FEATURES = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)]


def same_bits(got, want) -> bool:
    pairs = list(zip(got, want, strict=True))
    return all((a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


@pytest.mark.parametrize("name", ALL)
def test_autocast_changes_no_bit(backend, name):
    for dtype, rounded in FEATURES:
        want = value_and_gradients(ALL[name](dtype=dtype))
        with torch.autocast("cpu", dtype=rounded):
            got = value_and_gradients(ALL[name](dtype=dtype))
        assert same_bits(got, want), (dtype, rounded)


@pytest.mark.parametrize("name", [name for name in LOSSES if name in ALL])
def test_a_backward_outside(name):
    want, example = value_and_gradients(LOSSES[name]()), LOSSES[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = example()
    assert same_bits([loss.detach(), *torch.autograd.grad(loss, example.leaves(), allow_unused=True)], want)


def features(example: Example) -> list[int]:
    """Which of its tensors are features."""
    return [i for i, x in enumerate(example.tensors()) if x.ndim > 1 and x.is_floating_point()]


# Modules with memories say in which type they compute; the prefixes of one tensor are normalised in its own.
SEVERAL = [name for name in LOSSES if name[0].islower() and name != "matryoshka" and len(features(LOSSES[name]())) > 1]


@pytest.mark.parametrize("name", SEVERAL)
def test_the_widest_of_several_types(name):
    """An encoder's output in bf16 beside a queue, a bank, or other features in fp32."""

    def lowered(i, dtype) -> Example:
        example = LOSSES[name]()
        x = example.tensors()[i]
        return example.with_tensor(i, x.detach().bfloat16().to(dtype).requires_grad_(x.requires_grad))

    for i in features(LOSSES[name]()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = value_and_gradients(lowered(i, torch.bfloat16))
        want = value_and_gradients(lowered(i, torch.float32))
        assert same_bits(got, [b if a is None else b.to(a.dtype) for a, b in zip(got, want, strict=True)]), i


@pytest.mark.parametrize("name", SEVERAL)
def test_several_types_are_refused_outside(name):
    """In one sentence, the same of all. What is no features of the batch is cast: predictors, a guide."""
    said = r"^\S+ must have the dtype of \S+, torch\.\w+, not torch\.\w+; convert one$"
    own = 2 if "guide" in name or name.startswith("cpc") else None
    for i in features(LOSSES[name]())[:own]:
        example = LOSSES[name]()
        example = example.with_tensor(i, example.tensors()[i].detach().bfloat16())
        with pytest.raises(TypeError, match=said):
            example()


def test_products_beyond_fp16(backend):
    """Scores of 90,000 overflow fp16, where the positives became infinite and the loss 0."""
    torch.manual_seed(0)
    x = 300 * F.normalize(torch.randn(4, 8), dim=1)
    for positives, right in (("separate", 0.155812), ("joint", 0.776582)):
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype=dtype):
                loss = nt_xent_multi_view([x, x, x], logit_scale=1e-4, normalize=False, positives=positives)
            assert loss.item() == pytest.approx(right, rel=1e-5)


def test_own_negatives_beyond_fp16(backend):
    query, key, negatives = (300 * F.normalize(torch.randn(*shape, 8), dim=-1) for shape in ((4,), (4,), (4, 3)))
    ids, negative_ids = torch.arange(4), torch.arange(12).view(4, 3) % 5
    options = dict(logit_scale=1e-4, normalize=False, label_smoothing=0.1, ids=ids, negative_ids=negative_ids)
    with sslkern.use_backend("reference"):
        right = info_nce(query.double(), key.double(), negatives.double(), **options)
    with torch.autocast("cpu", dtype=torch.float16):
        assert info_nce(query, key, negatives, **options).item() == pytest.approx(right.item(), rel=1e-5)


def test_the_lines_of_the_readme():
    """MoCo: queries and keys as an encoder returns them inside autocast, against a queue in fp32."""
    encoder, queue = torch.nn.Linear(16, 8), sslkern.FeatureQueue(dim=8, size=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query, key = encoder(torch.randn(4, 16)), encoder(torch.randn(4, 16)).detach()
        loss = info_nce(query, key, negatives=queue.queue.t(), temperature=0.07)
        queue.push(key)
    assert query.dtype == torch.bfloat16 and loss.dtype == queue.queue.dtype == torch.float32
    loss.backward()
    assert encoder.weight.grad.isfinite().all()
    with pytest.raises(TypeError, match="negatives must have the dtype of query"):
        info_nce(query, key, negatives=queue.queue.t())


def test_features_of_other_types_than_autocast_takes():
    """torch's own cat and stack refuse those on the CPU."""
    others = (torch.float64, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)
    for name, make in ALL.items():
        for dtype, rounded in others:
            want = value_and_gradients(make(N=4, D=4, dtype=dtype))
            with torch.autocast("cpu", dtype=rounded):
                got = value_and_gradients(make(N=4, D=4, dtype=dtype))
            assert same_bits(got, want), (name, dtype, rounded)
