"""How good are the features: linear probes and nearest neighbours on frozen ones.

Everything is fitted on the training set alone, and nothing is chosen.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkern
from ssltrain import logistic


@dataclass
class Evaluation:
    """Accuracies by key, prefix of a row + name of a column, and what pictures of the trained features need.

    An accuracy is NaN where there are fewer than two labels to tell apart.
    """

    accuracies: dict[str, float]
    rows: dict[str, str]  # prefix of the key: what was given to the classifiers
    columns: dict[str, str]  # the rest of the key: what they had to tell
    widths: dict[str, int]  # prefix of the key: how many features
    train_features: Tensor  # [N, F]
    features: Tensor  # [M, F], of the test set
    labels: Tensor
    classes: list[str]
    predictions: Tensor | None = None  # of the linear probe, int64 [M] as the labels
    part: str = "test"  # of which the features are; "training" where there is no test set

    def nearest(self, rows: Tensor, count: int = 8) -> Tensor:
        """int64 [R, count]: of each of these rows of `features` the training samples most like it, by cosine."""
        chosen = self.features[rows.to(self.features.device)]
        return _nearest(chosen, self.train_features, count)[1].cpu()


def predicted(train: Tensor, train_labels: Tensor, test: Tensor) -> Tensor | None:
    """What multinomial logistic regression on standardised features, float [N, F], says of others, float [M, F].

    None where the training labels are all the same: there is nothing to tell.
    """
    if (train_labels == train_labels[:1]).all():
        return None
    mean, std = train.mean(0), train.std(0, correction=0)
    std = torch.where(std > 1e-6, std, torch.ones_like(std))  # a feature that never moves says nothing
    train, test = ((x - mean).div_(std).nan_to_num_(0, 0, 0) for x in (train, test))  # nor what is no number
    weight, bias = logistic.fit(train, train_labels, int(train_labels.max()) + 1)
    return torch.addmm(bias, test, weight.T).argmax(1)


def accuracy(predictions: Tensor | None, labels: Tensor) -> float:
    """The share of the labels that were predicted, NaN where nothing was."""
    return math.nan if predictions is None else int((predictions == labels).sum()) / len(labels)


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Test accuracy in [0, 1] of multinomial logistic regression, NaN where the training labels are all the same."""
    return accuracy(predicted(train, train_labels, test), test_labels)


@torch.no_grad()
def knn(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, neighbours: int = 20) -> float:
    """Test accuracy in [0, 1] of the plain majority among the `neighbours` training features nearest by cosine.

    NaN where the training labels are all the same.
    """
    if (train_labels == train_labels[:1]).all():
        return math.nan
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    scores, nearest = _nearest(test, train, neighbours)
    votes = scores.new_zeros(len(test), classes).scatter_add_(1, train_labels[nearest], torch.ones_like(scores))
    return accuracy(votes.argmax(1), test_labels)


def _nearest(of: Tensor, among: Tensor, count: int) -> tuple[Tensor, Tensor]:
    of, among = F.normalize(of, dim=1), F.normalize(among, dim=1)
    return sslkern.ops.similarity_topk(of, among, min(count, len(among)))


def version() -> str:
    """Changes with whatever the accuracies of given features depend on."""
    return "".join(inspect.getsource(part) for part in (logistic, predicted, accuracy, knn, _nearest))
