"""What `similarity_lse` computes, with the matrix stored, in any dtype; and the bound for the error of a kernel."""

import math

import torch


def scores(q, k, scale, q_ids=None, k_ids=None, pairs="different", k_bias=None, q_limit=None):
    """S in the softmax's type (fp32, or fp64 for fp64) after a product in the type of q; -inf where left out."""
    keys = q if k is None else k
    s = scale * (q @ keys.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
    keep = torch.ones_like(s, dtype=torch.bool)
    if k_bias is not None:
        s = s + k_bias.to(s.dtype).unsqueeze(-2)
        keep &= k_bias.unsqueeze(-2) != -math.inf
    if q_limit is not None:
        keep &= s <= q_limit.to(s.dtype).unsqueeze(-1)
    if k is None:
        keep &= ~torch.eye(s.shape[-1], dtype=torch.bool)
    if q_ids is not None:
        equal = q_ids.unsqueeze(-1) == (q_ids if k is None else k_ids).unsqueeze(-2)
        keep &= equal if pairs == "same" else ~equal
    return s.masked_fill(~keep, -math.inf)


def lse(s, dim):
    """logsumexp whose gradient is zero, not NaN, where nothing is left."""
    empty = (s == -math.inf).all(dim)
    return s.masked_fill(empty.unsqueeze(dim), 0).logsumexp(dim).masked_fill(empty, -math.inf)


def similarity_lse(q, k=None, scale=1.0, *, columns=False, best=False, **options):
    s = scores(q, k, scale, **options)
    out = [lse(s, -1), lse(s, -2)] if columns else [lse(s, -1)]
    if best:
        tops = [s.amax(-1), s.amax(-2)] if columns else [s.amax(-1)]
        out.append(torch.cat(tops, -1).detach())
    return out[0] if len(out) == 1 else tuple(out)


def within(result, exact, plain, what="", scale=0.0, moved=0.0):
    """err(result) <= 2 err(plain) + 1 fp32 ulp of the result's scale, and equal where not finite.

    That scale is the largest result, or `scale` where the result is a sum of larger terms that cancel. moved: what
    rounding is known to make of the result; plain may have been lucky.
    """
    exact = exact.double()
    finite = exact.isfinite()
    assert torch.equal(result.double()[~finite].nan_to_num(nan=7), exact[~finite].nan_to_num(nan=7)), what
    if finite.any():
        exact = exact[finite]
        error = (result.double()[finite] - exact).abs().max().item()
        yardstick = max((plain.double()[finite] - exact).abs().max().item(), moved)
        allowed = 2 * yardstick + 2**-23 * max(scale, exact.abs().max().item())
        assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
