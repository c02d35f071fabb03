import math

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import clamp_logit_scale_, clip

from .agreement import agrees_exactly, agrees_on_kernels, compiles, peer, product, refuses, unit


def dense(image, text, temperature, ids=None):
    """[N] losses, both directions of one row averaged."""
    s, N = product(unit(image), unit(text)) / temperature, len(image)
    if ids is not None:
        s = s.masked_fill((ids[:, None] == ids) & ~torch.eye(N, dtype=torch.bool), -math.inf)
    own = torch.arange(N)
    return (F.cross_entropy(s, own, reduction="none") + F.cross_entropy(s.T, own, reduction="none")) / 2


def loss(image, text, temperature, **options):
    return clip(image, text, 1 / temperature, reduction="none", **options)


@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_dense(temperature):
    agrees_exactly(loss, dense, [torch.randn(9, 4), torch.randn(9, 4)], temperature, ids=torch.arange(9) // 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature, N, D", [(0.2, 17, 33), (0.07, 130, 64), (0.01, 65, 3)])
def test_kernels(backend, dtype, temperature, N, D):
    agrees_on_kernels(loss, dense, [torch.randn(N, D), torch.randn(N, D)], temperature, dtype)


def test_open_clip():
    criterion = peer("open_clip.loss").ClipLoss()
    image, text = unit(torch.randn(20, 8)), unit(torch.randn(20, 8))
    assert torch.allclose(clip(image, text, 14.0), criterion(image, text, 14.0))


def test_row_without_negatives(backend):
    image = torch.randn(4, 3, requires_grad=True)
    loss = clip(image, torch.randn(4, 3), 10.0, ids=torch.zeros(4, dtype=torch.long))
    (grad,) = torch.autograd.grad(loss, image)
    assert loss == 0 and (grad == 0).all()


def test_gradcheck():
    a, b, scale = (x.double().requires_grad_() for x in (torch.randn(4, 3), torch.randn(4, 3), torch.tensor(5.0)))
    assert torch.autograd.gradcheck(lambda a, b, s: clip(a, b, s, label_smoothing=0.1), (a, b, scale))


def test_compiles_without_a_break(backend):
    compiles(clip, torch.randn(9, 8), torch.randn(9, 8), torch.tensor(5.0), label_smoothing=0.1)


def test_clamp():
    scale = torch.nn.Parameter(torch.tensor(7.0))
    assert clamp_logit_scale_(scale) is scale and scale.exp().item() == pytest.approx(100) and scale.requires_grad
    assert clamp_logit_scale_(torch.tensor(1.0)) == 1 and clamp_logit_scale_(torch.tensor(3.0), max=2.0) == 2
    # from below as well, as OpenCLIP does
    scales = torch.tensor([-9.0, -1.0, 3.0, 9.0, math.nan])
    assert clamp_logit_scale_(scales.clone(), min=-1.0)[:3].tolist() == [-1, -1, 3]
    assert clamp_logit_scale_(scales.clone(), max=None, min=0.0)[:4].tolist() == [0, 0, 3, 9]
    kept = clamp_logit_scale_(scales.clone(), 2.0, 2.0)
    assert kept[:4].tolist() == [2] * 4 and kept[4].isnan()
    assert torch.equal(clamp_logit_scale_(scales.clone(), max=None)[:4], scales[:4])


def test_module():
    image, text = torch.randn(5, 3), torch.randn(5, 3)
    criterion = sslkern.CLIPLoss(reduction="sum")
    assert list(criterion.state_dict()) == ["log_scale"]
    criterion(image, text).backward()
    assert torch.allclose(criterion(image, text), clip(image, text, 1 / 0.07, reduction="sum"))
    assert criterion.log_scale.grad != 0
    assert torch.equal(criterion(image, text, logit_scale=3.0), clip(image, text, 3.0, reduction="sum"))
    torch.nn.init.constant_(criterion.log_scale, 9.0)
    assert torch.allclose(criterion(image, text), clip(image, text, 100.0, reduction="sum"))
    assert criterion.log_scale.exp().item() == pytest.approx(100) and "reduction='sum'" in repr(criterion)
    with pytest.raises(ValueError, match="logit_scale"):
        sslkern.CLIPLoss(logit_scale=0)


def test_module_keeps_its_scale_between_both_bounds():
    image, text = torch.randn(5, 3), torch.randn(5, 3)
    criterion = sslkern.CLIPLoss(min_scale=2.0)
    torch.nn.init.constant_(criterion.log_scale, -3.0)
    assert torch.allclose(criterion(image, text), clip(image, text, 2.0))
    assert criterion.log_scale.exp().item() == pytest.approx(2)
    criterion.eval()  # evaluation changes no parameter
    torch.nn.init.constant_(criterion.log_scale, -3.0)
    assert torch.allclose(criterion(image, text), clip(image, text, math.exp(-3.0)))
    for bad in (-1.0, 20.0, math.nan, "1"):
        with pytest.raises(ValueError, match="min_scale must"):
            sslkern.CLIPLoss(min_scale=bad)


def test_bad_arguments_are_named():
    z = torch.randn(4, 3)
    refuses(
        clip,
        [
            ("logit_scale must", (z, z, math.nan), {}),
            ("text must", (z, z[:3], 1.0), {}),
            ("logit_scale must", (z, z, None), {}),
        ],
    )
    log_scale = torch.tensor(1.0)
    refuses(
        clamp_logit_scale_,
        [
            ("log_scale must", (3.0,), {}),
            ("log_scale must", (log_scale.long(),), {}),
            ("max must", (log_scale, "2"), {}),
            ("max must", (log_scale, math.nan), {}),
            ("min must", (log_scale,), {"min": [0]}),
            ("min must not exceed max", (log_scale,), {"min": 5.0}),
        ],
    )
