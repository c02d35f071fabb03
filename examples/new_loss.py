"""A new loss in twenty lines: NT-Xent with a margin, by which each positive must beat its negatives.

    python examples/new_loss.py

The log-sum-exp over the negatives is the part that is N x N, and `similarity_lse` does it without storing them; the
rest is plain PyTorch, and so is the gradient. CONTRIBUTING.md says what a loss of the package has beside its formula.
"""

import torch
from torch.nn.functional import normalize, softplus

from sslkern.ops import similarity_lse


def nt_xent_with_margin(z0, z1, temperature=0.5, margin=0.2):
    """-log(e^p / (e^p + sum e^n)) of each row, p = (cosine of its views - margin) / T, n = cosine of a negative / T."""
    z0, z1 = normalize(z0, dim=1), normalize(z1, dim=1)
    sample = torch.arange(len(z0)).repeat(2)  # rows of the same sample are no negatives of each other
    negatives = similarity_lse(torch.cat((z0, z1)), scale=1 / temperature, q_ids=sample)
    positive = ((z0 * z1).sum(1) - margin) / temperature
    return softplus(negatives - positive.repeat(2)).mean()


def dense(z0, z1, temperature=0.5, margin=0.2):
    """The same with all scores in memory."""
    n, z = len(z0), normalize(torch.cat((z0, z1)), dim=1)
    sample, other = torch.arange(n).repeat(2), torch.arange(2 * n).roll(n)
    is_positive = torch.zeros(2 * n, 2 * n).scatter(1, other[:, None], 1).bool()
    scores = (z @ z.T - margin * is_positive) / temperature
    left_out = (sample[:, None] == sample) & ~is_positive
    return torch.nn.functional.cross_entropy(scores.masked_fill(left_out, -torch.inf), other)


def main():
    torch.manual_seed(0)
    z0, z1 = torch.randn(2, 512, 64).requires_grad_()
    ours, theirs = nt_xent_with_margin(z0, z1), dense(z0, z1)
    gradients = torch.autograd.grad(ours, (z0, z1)), torch.autograd.grad(theirs, (z0, z1))
    print(f"loss {ours.item():.6f}, dense {theirs.item():.6f}")
    return ours, theirs, *gradients


if __name__ == "__main__":
    main()
