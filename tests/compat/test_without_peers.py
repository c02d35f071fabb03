"""What stand-ins that import no package compute, beside the formula, for where the packages are not installed."""

import pytest
import torch
import torch.nn.functional as F

from sslkern.compat import info_nce

from .agreement import drawn, same


def results(value, leaves):
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves, retain_graph=True)]


# ---- info_nce --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("kind, sizes", [("unpaired", []), ("unpaired", [(7, 4)]), ("paired", [(6, 3, 4)])])
def test_info_nce(kind, sizes, small, monkeypatch):
    for name in ("FEW_PRODUCTS", "FEW_SCORES", "FEW_FEATURES"):
        monkeypatch.setattr(info_nce, name, 2**20 if small else -1)
    batch = drawn(0, torch.float64, (6, 4), (6, 4), *sizes)
    query, key, *negatives = (F.normalize(x, dim=-1) for x in batch)
    positive = torch.einsum("nd,nd->n", query, key).exp().pow(5)  # of temperature 0.2
    if negatives:
        scores = torch.einsum("nd,nmd->nm", query, negatives[0].expand(6, -1, 4)).exp().pow(5)
    else:
        scores = torch.einsum("nd,md->nm", query, key).exp().pow(5) * (1 - torch.eye(6))
    losses = -(positive / (positive + scores.sum(1))).log()
    for reduction, want in (("none", losses), ("sum", losses.sum()), ("mean", losses.mean())):
        got = info_nce.InfoNCE(0.2, reduction, kind)(*batch)
        same(results(got, batch), results(want, batch))
