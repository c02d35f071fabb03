"""How good are the features: linear probes and nearest neighbours on frozen ones, or fine-tuning on a few labels.

Everything is fitted on the training set alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkern


@dataclass
class Evaluation:
    """Accuracies by key, prefix of a row + name of a column, and what a picture of the features needs.

    An accuracy is NaN where there are fewer than two labels to tell apart.
    """

    accuracies: dict[str, float]
    rows: dict[str, str]  # prefix of the key: what was given to the classifiers
    columns: dict[str, str]  # the rest of the key: what they had to tell
    features: Tensor
    labels: Tensor
    classes: list[str]
    part: str = "test"  # of which these are; "training" where there is no test set


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, iterations: int = 200
) -> float:
    """Test accuracy in [0, 1] of multinomial logistic regression on standardised features, float [N, F] and [M, F].

    The L2 penalty is that of scikit-learn's default (C = 1: half the squared weights over N); nothing is tuned. The
    problem is convex and solved by full-batch L-BFGS from zero, so the result does not depend on a seed. NaN where the
    training labels are all the same: there is nothing to tell.
    """
    if (train_labels == train_labels[:1]).all():
        return math.nan
    mean, std = train.mean(0), train.std(0, correction=0)
    std = torch.where(std > 1e-6, std, torch.ones_like(std))  # a feature that never moves says nothing
    train, test = (train - mean).div_(std), (test - mean).div_(std)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    weight = train.new_zeros(classes, train.shape[1], requires_grad=True)
    bias = train.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), train_labels)
        loss = loss + weight.square().sum() / (2 * len(train))
        loss.backward()
        return loss

    solver.step(objective)
    with torch.no_grad():
        return (F.linear(test, weight, bias).argmax(1) == test_labels).float().mean().item()


@torch.no_grad()
def knn(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, neighbours: int = 20) -> float:
    """Test accuracy in [0, 1] of the plain majority among the `neighbours` training features nearest by cosine.

    NaN where the training labels are all the same.
    """
    if (train_labels == train_labels[:1]).all():
        return math.nan
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    scores, nearest = sslkern.ops.similarity_topk(test, train, min(neighbours, len(train)))
    votes = scores.new_zeros(len(test), classes).scatter_add_(1, train_labels[nearest], torch.ones_like(scores))
    return int((votes.argmax(1) == test_labels).sum()) / len(test)
