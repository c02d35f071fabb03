"""The loss of SupContrast (https://github.com/HobbitLong/SupContrast), as it is since December 2023.

    from sslkern.compat.sup_contrast import SupConLoss   # was: from losses import SupConLoss

It does not need SupContrast. docs/migrate_sup_contrast.md has the differences.
"""

import math

import torch
from torch import Tensor, nn

from ..common.autocast import product
from ..common.sums import mean, times
from ..common.tensors import wide
from ..distributed import similarity_lse, sum_of_equal
from ..functional import nt_xent, sup_con
from ..functional.checks import scale_of
from ._dense import few, warn_once

NO_POSITIVE = 1e-6  # a row whose positives weigh less is divided by 1

# Up to which, on a CPU, storing the similarities is quicker, forward and backward; measured from 32 to 512 features. Of
# two views without labels they are symmetric, and fewer.
FEW_PAIRS, FEW_OF_VIEWS = 2**17, 2**12


class SupConLoss(nn.Module):
    """The supervised contrastive loss, and without labels that of SimCLR, of features that are normalised already.
    Formula: `sslkern.functional.sup_con`, times temperature / base_temperature.

    A row without positives adds 0 and counts in the mean.

    Args:
        temperature: divides the similarities.
        contrast_mode: "all": each view is an anchor. "one": the first view of each sample alone.
        base_temperature: the temperature at which the factor is 1.

    Example:
        >>> from sslkern.compat.sup_contrast import SupConLoss
        >>> features = torch.nn.functional.normalize(torch.randn(64, 2, 32, requires_grad=True), dim=2)
        >>> SupConLoss(temperature=0.1)(features, labels=torch.randint(10, (64,))).backward()
    """

    def __init__(
        self, temperature: float | Tensor = 0.07, contrast_mode: str = "all", base_temperature: float | Tensor = 0.07
    ):
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            features: [B, V, ...], V views of each of B samples; what follows is one dimension.
            labels: [B], of any type. Samples with equal labels are positives of each other.
            mask: [B, B], how much sample j weighs among the positives of sample i; it need not be symmetric. Without
                labels and mask the positives are the other views of a sample.
        """
        if features.ndim < 3:
            raise ValueError(f"features must be [B, V, ...], with 3 dimensions or more, not {list(features.shape)}")
        features = features.flatten(2)
        B, V, _ = features.shape
        if B * V == 0:
            raise ValueError(f"features must have samples and views, not {list(features.shape)}; skip empty batches")
        if labels is not None and mask is not None:
            raise ValueError("labels and mask cannot both be given; leave one out")
        if labels is not None:
            labels = labels.to(features.device).reshape(-1)
            if labels.shape[0] != B:
                raise ValueError(f"labels must have a label for each of {B} samples of features, not {len(labels)}")
            if labels.is_floating_point() or labels.is_complex():
                mask, labels = labels.unsqueeze(1) == labels, None  # as NaN is not equal to itself
            else:
                labels = labels.long()
        elif mask is not None and mask.shape != (B, B):
            raise ValueError(f"mask must be [{B}, {B}], for each pair of samples of features, not {list(mask.shape)}")
        if self.contrast_mode not in ("all", "one"):
            raise ValueError(f"contrast_mode must be 'all' or 'one', not {self.contrast_mode!r}")
        without_scale = not isinstance(self.temperature, Tensor) and self.temperature == 0
        if without_scale:
            warn_once(self, "temperature is 0; pass another number")
        all_views = self.contrast_mode == "all"
        of_views = labels is None and mask is None and V == 2 and all_views
        pairs, most = B * (V if all_views else 1) * B * V, FEW_OF_VIEWS if of_views else FEW_PAIRS
        if without_scale or few(features, pairs, most) or B * V == 1:
            loss = self._dense(features, labels, mask)
        elif of_views:
            first, second = features.unbind(1)
            loss = nt_xent(first, second, self.temperature, normalize=False, group="self")
        elif mask is not None or not all_views:
            loss = self._of_weights(features, labels, mask)
        else:
            loss = sup_con(features, labels, self.temperature, normalize=False, group="self")
        return (self.temperature / self.base_temperature * loss).reshape(())

    def _of_weights(self, features: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
        """The loss of a mask [B, B], or of labels for the first views as anchors.

        Of a row i with weights m, and a over all rows but itself, it is

            sum_j m_ij (log sum_a exp(s_ia) - s_ij) / sum_j m_ij

        where sum_j m_ij s_ij is one product of row i, with a sum of rows that the views of its sample share.
        """
        B, V, D = features.shape
        anchors, keys = self._rows(features)
        scale = scale_of(self.temperature, None, features)
        if self.contrast_mode == "all":
            log_sum = similarity_lse(keys, scale=scale)
        else:
            rows = torch.arange(B * V, device=features.device)
            log_sum = similarity_lse(anchors, keys, scale, q_ids=rows[:B], k_ids=rows)
        of_views = wide(features).sum(1)
        own = of_views.new_ones(B)
        if mask is not None:
            weights = mask.to(features.device).float().to(of_views.dtype)
            positives, weight, own = product(weights, of_views), weights.sum(1), weights.diagonal()
        elif labels is not None:
            positives, count = sum_of_equal(of_views, labels, labels)
            weight = count.to(of_views.dtype)
        else:
            positives, weight = of_views, own
        by_view = wide(anchors).view(-1, B, D)
        score = times((by_view * (positives - own.unsqueeze(1) * by_view)).sum(2), scale)  # but for the row itself
        weight = V * weight - own
        return mean((weight * log_sum.view_as(score) - score) / _at_least(weight))

    def _dense(self, features: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
        """The same with all similarities in memory."""
        B, V, _ = features.shape
        anchors, keys = map(wide, self._rows(features))
        if labels is not None:
            mask = labels.unsqueeze(1) == labels
        elif mask is None:
            mask = torch.eye(B, device=features.device)
        weights = mask.to(features.device).float().repeat(len(anchors) // B, V).fill_diagonal_(0)
        weight = weights.sum(1)
        scores = anchors / self.temperature @ keys.T
        # A row alone is NaN.
        scores.fill_diagonal_(torch.finfo(scores.dtype).min if B * V > 1 else -math.inf)
        scores = (weights * scores.log_softmax(1)).sum(1)
        return -mean(scores / _at_least(weight))

    def _rows(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Anchors and keys, view after view; the first of both are the same."""
        keys = features.transpose(0, 1).flatten(0, 1)
        return keys if self.contrast_mode == "all" else features[:, 0], keys


def _at_least(weight: Tensor) -> Tensor:
    return weight.masked_fill(weight < NO_POSITIVE, 1)
