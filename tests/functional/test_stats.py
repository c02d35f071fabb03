"""What `stats=True` counts as found: a positive that beats every negative, and no tie."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from sslkern.functional import cpc, info_nce, nce

from ..examples import LOSSES, Example


def options_of(name: str) -> set[str]:
    return set(inspect.signature(LOSSES[name]().target).parameters)


# A guide leaves out all negatives of some rows, and these have found their positive.
COUNTING = [name for name in LOSSES if name[0].islower() and "stats" in options_of(name) and "guide" not in name]


def collapsed(name: str, D: int, dtype: torch.dtype) -> Example:
    """The example, of an encoder that has made the same row of every sample."""
    row = 3 * F.normalize(torch.randn(D, dtype=torch.float64, device="cpu"), dim=0)
    example = LOSSES[name](D=D, dtype=dtype)
    return example.map(lambda x: row.to(x).expand_as(x).contiguous() if x.shape[-1:] == (D,) else x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_collapsed_encoder_finds_nothing(backend, dtype):
    """Its scores are equal, but a kernel and the sum of one pair round them differently: the share was 1 or 0."""
    for name in COUNTING:
        for D, normalize in ((7, True), (128, True), (128, False), (512, False)):
            example = collapsed(name, D, dtype)
            example.options |= dict(stats=True, normalize=normalize)
            assert (example()[1] == 0).all(), (name, D, normalize)


def test_a_tie_is_no_win(backend):
    """Row 0 has an equal negative, row 1 only smaller ones."""
    query, key = torch.eye(2, 4), torch.eye(2, 4)
    negatives = torch.stack((query[0], -query[1]))
    assert info_nce(query, key, negatives, stats=True)[1] == 0.5
    assert nce(query, torch.cat((key, key[:1])), torch.tensor([[0, 2], [1, 2]]), stats=True)[1] == 0.5


def test_a_tie_of_cpc_is_no_win_wherever_the_positive_stands(backend):
    """Where it comes first, as in CPC_audio, an argmax finds it."""
    targets = torch.ones(3, 4, 2)
    assert (cpc(targets, targets, torch.eye(2)[None], reduction="none", stats=True)[1] == 0).all()


def test_a_small_lead_is_a_win(backend):
    """In the cosine 5e-5, which is more than any rounding."""
    query = torch.eye(2, 64)
    negatives = F.normalize(query + 0.01 * torch.eye(64)[2:4], dim=1)
    assert info_nce(query, query, negatives, stats=True)[1] == 1
    assert info_nce(query, query, negatives, normalize=False, stats=True)[1] == 1
    assert info_nce(1000 * query, query, negatives, normalize=False, logit_scale=1e-3, stats=True)[1] == 1
