"""The model of MoCo v1 and v2 by its authors, moco/builder.py of https://github.com/facebookresearch/moco at its last
version.

    from sslkern.compat.moco import MoCo   # was: from moco.builder import MoCo
    loss, acc1, acc5 = MoCo(resnet50, fused=True)(im_q, im_k)   # without the logits

It does not need that code, and runs without torch.distributed and on a CPU too. docs/migrate_moco.md has the
differences.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.autocast import cat
from ..common.rows import dots, unit
from ..distributed import Ranks, all_rows, gather, members_of
from ..distributed.collectives import stacked
from ..distributed.ranks import group_object
from ..distributed.shuffled import placed
from ..functional import moco
from ..functional.checks import promoted
from ..functional.formulas import tie, wins
from ..ops import queue_push_, similarity_topk


class Contrast(NamedTuple):
    """What a model with `fused=True` returns."""

    loss: Tensor  # 0-d, what nn.CrossEntropyLoss makes of the logits
    acc1: Tensor  # [1], per cent of the queries whose key is the most similar of all
    acc5: Tensor  # [1], whose key is among the five most similar


class MoCo(nn.Module):
    """A query encoder, a key encoder that follows it, and the queue of the keys of the last batches.

    Checkpoints are the same, and load with or without the `module.` that DistributedDataParallel puts before the names.
    Buffers: `queue` (dim, K), whose memory is laid out by key, and `queue_ptr` int64 (1,).

    Args:
        base_encoder: makes an encoder, `base_encoder(num_classes=dim)`.
        dim: features per key.
        K: keys that the queue keeps, a multiple of the batch.
        m: what stays of the key encoder in each step.
        T: the temperature.
        mlp: a hidden layer before the last one, `fc`, as in version 2.
        fused: return the loss and the accuracies, `Contrast`, in the place of logits and labels; of N queries the
            N x K logits are not stored then. Not an option there.

    Example:
        >>> from sslkern.compat.moco import MoCo
        >>> model = MoCo(lambda num_classes: torch.nn.Linear(8, num_classes), dim=16, K=512)
        >>> im_q, im_k = torch.randn(2, 32, 8)
        >>> logits, labels = model(im_q, im_k)
        >>> torch.nn.CrossEntropyLoss()(logits, labels).backward()
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = False,
        *,
        fused: bool = False,
    ):
        super().__init__()
        self.K = K
        self.m = m
        self.T = T
        self.fused = fused
        self.encoder_q = base_encoder(num_classes=dim)
        self.encoder_k = base_encoder(num_classes=dim)
        if mlp:
            for encoder in (self.encoder_q, self.encoder_k):
                last: Any = encoder.fc
                width = last.weight.shape[1]
                encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), last)
        for key, query in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
            key.data.copy_(query.data)
            key.requires_grad = False
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0).t().contiguous().t())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor] | Contrast:
        """Logits [N, 1 + K], the positive first, and labels int64 [N], all 0; with `fused` a `Contrast`. Keys are
        written to the queue afterwards."""
        q = unit(self.encoder_q(im_q))
        with torch.no_grad():
            self._momentum_update_key_encoder()
            im_k, idx_unshuffle = self._batch_shuffle_ddp(im_k)
            k = self._batch_unshuffle_ddp(unit(self.encoder_k(im_k)), idx_unshuffle)
        out = self._contrast(q, k) if self.fused else self._logits(q, k)
        self._dequeue_and_enqueue(k)
        return out

    def _logits(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        negatives = q @ self.queue.clone()  # which is written to before the backward reads it
        positives = dots(q, k).unsqueeze(1).to(negatives.dtype)
        logits = cat((positives, negatives), 1)
        logits /= self.T
        return logits, torch.zeros(q.shape[0], dtype=torch.long, device=q.device)

    def _contrast(self, q: Tensor, k: Tensor) -> Contrast:
        q, k, queue = promoted(q, k, self.queue.t())
        loss = moco(q, k, queue, self.T, normalize=False, group="self")
        with torch.no_grad():
            best, _ = similarity_topk(q, queue, 5)
            found = 100 * wins(best, dots(q, k).unsqueeze(1), tie(1.0, q, k, normalized=True)).mean(0)
        return Contrast(loss, found[:1], found[4:])

    @torch.no_grad()
    def _momentum_update_key_encoder(self) -> None:
        keys: list[Tensor] = [*self.encoder_k.parameters()]
        queries: list[Tensor] = [*self.encoder_q.parameters()]
        if keys:  # an encoder may learn nothing
            torch._foreach_mul_(keys, self.m)
            torch._foreach_add_(keys, queries, alpha=1 - self.m)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys: Tensor) -> None:
        keys = concat_all_gather(keys)
        rows = keys.shape[0]
        assert self.K % rows == 0, f"K must be a multiple of the batch of all processes, {rows}, and is {self.K}"
        queue_push_(self.queue.t(), self.queue_ptr, keys)

    @torch.no_grad()
    def _batch_shuffle_ddp(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As many rows as in x, drawn from those of all processes, for batch normalisation; and the way back."""
        ranks = _ranks(x)
        order = torch.randperm(all_rows(x.shape[0], ranks))
        if ranks is not None:
            order = stacked(order, ranks.group)[0]
        return _placed(x, order, ranks), order.argsort()

    @torch.no_grad()
    def _batch_unshuffle_ddp(self, x: Tensor, idx_unshuffle: Tensor) -> Tensor:
        return _placed(x, idx_unshuffle, _ranks(x))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        parallel = prefix + "module."
        for name in [name for name in state_dict if name.startswith(parallel)]:
            state_dict[prefix + name.removeprefix(parallel)] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def concat_all_gather(tensor: Tensor) -> Tensor:
    """The rows of all processes, in their order, without gradient."""
    return gather(tensor, _ranks(tensor))


def _ranks(x: Tensor) -> Ranks | None:
    """All processes, each with as many rows as this one: they are not asked, as there."""
    members, rank = members_of("world")
    if len(members) == 1:
        return None
    size = len(members)
    return Ranks(group_object("world").group_name, size, rank, size * (x.shape[0],), "auto", "sum")


def _placed(x: Tensor, order: Tensor, ranks: Ranks | None) -> Tensor:
    """This process's rows of x[order], of the rows x of all of them."""
    if ranks is None:
        return x[order.to(x.device)]
    return placed(x, order.cpu(), ranks.group, ranks.counts)
