"""The contrastive losses of open_clip 3.3.0 (https://github.com/mlfoundations/open_clip).

    from sslkern.compat.open_clip import ClipLoss, SigLipLoss

It is open_clip.loss, and does not import open_clip. docs/migrate_open_clip.md has the differences.
"""

import importlib

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.autocast import autocast_active
from ..common.rows import dots
from ..common.sums import mean, pair_loss, softplus, times, total
from ..distributed import ranks_of, row_ids, similarity_lse, similarity_softplus
from ..functional import clip, siglip
from ..functional.checks import check_pair, promoted, scalar
from ._dense import few, warn_once
from ._types import typed_as

Losses = Tensor | dict[str, Tensor]
Scale = float | Tensor

# Up to which, of one process on a CPU, storing the logits is quicker, forward and backward; measured from 64 to 768
# features. Of CLIP there are N x N x D products, and N rows; of SigLIP N x N pairs.
FEW_PRODUCTS, FEW_ROWS = 2**22, 256
FEW_PAIRS = 2**17


class ClipLoss(nn.Module):
    """The loss of CLIP. Formula: `sslkern.functional.clip`, of features that are normalised already.

    Args:
        local_loss: the loss of a rank is that of its own rows, not of all.
        gather_with_grad: features that come from other ranks have a gradient.
        cache_labels: `get_ground_truth` keeps its labels.
        rank, world_size: the place of this process; 1 for this process alone.
        use_horovod: gather by horovod, on the dense path.

    Example:
        >>> from sslkern.compat.open_clip import ClipLoss
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 64, 32), dim=-1)
        >>> loss = ClipLoss()(image, text, logit_scale=torch.tensor(14.3), output_dict=True)["contrastive_loss"]
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column of the positive of each row of the logits."""
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        labels = torch.arange(num_logits, device=device)
        if self.world_size > 1 and self.local_loss:
            labels += num_logits * self.rank
        if self.cache_labels:
            self.labels[device], self.prev_num_logits = labels, num_logits
        return labels

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Scale, logit_bias: Scale | None = None
    ) -> tuple[Tensor, Tensor]:
        """All logits, those of the images and those of the texts; the loss by itself does without them."""
        image, text = image_features, text_features
        if self.world_size == 1:
            per_image, per_text = logit_scale * image @ text.T, logit_scale * text @ image.T
        else:
            how = self.local_loss, self.gather_with_grad, self.rank, self.world_size, self.use_horovod
            images, texts = gather_features(image, text, *how)
            if self.local_loss:
                per_image, per_text = logit_scale * image @ texts.T, logit_scale * text @ images.T
            else:
                per_image = logit_scale * images @ texts.T
                per_text = per_image.T
        if logit_bias is not None:
            per_image += logit_bias
            per_text += logit_bias  # twice where they are one, as there
        return per_image, per_text

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Scale,
        logit_bias: Scale | None = None,
        output_dict: bool = False,
    ) -> Losses:
        loss = self._contrastive(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _contrastive(self, image: Tensor, text: Tensor, logit_scale: Scale, logit_bias: Scale | None = None) -> Tensor:
        why = self._why_dense(logit_scale, logit_bias)
        if why:
            warn_once(self, why)
            return self._of_logits(*self.get_logits(image, text, logit_scale, logit_bias))
        # The mean over nothing is NaN.
        small = (
            self.world_size == 1
            and image.shape[0] <= FEW_ROWS
            and few(image, image.shape[0] * text.numel(), FEW_PRODUCTS)
        )
        if small or image.shape[0] == 0:
            loss = self._of_logits(*self.get_logits(image, text, logit_scale))
        else:
            if self.cache_labels:
                ranks = 1 if self.local_loss else self.world_size
                self.get_ground_truth(image.device, image.shape[0] * ranks)
            loss = typed_as(self._fused(image, text, logit_scale), image)
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
            loss = loss + 0 * logit_bias.sum().to(loss.dtype)  # a softmax does not change with it
        return loss

    def _why_dense(self, logit_scale: Scale, logit_bias: Scale | None) -> str | None:
        if self.use_horovod and self.world_size > 1:
            return "use_horovod=True gathers by horovod; use torch.distributed instead"
        return _why_dense(self, ClipLoss, logit_scale, logit_bias)

    def _of_logits(self, per_image: Tensor, per_text: Tensor) -> Tensor:
        labels = self.get_ground_truth(per_image.device, per_image.shape[0])
        return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2

    def _fused(self, image: Tensor, text: Tensor, logit_scale: Scale) -> Tensor:
        if self.world_size == 1:
            return clip(image, text, logit_scale, normalize=False, group="self")
        _check_place(self.rank, self.world_size)
        if not self.local_loss:
            if not self.gather_with_grad:  # only these rows have one, which is not summed over the losses of all ranks
                image, text = (_with_part_of_gradient(x, 1 / self.world_size) for x in (image, text))
            return clip(image, text, logit_scale, normalize=False, group="world")
        # The gradient of a row that others take as key is the sum of what they make of it.
        ranks = ranks_of("world", "auto", "sum", type(self).__name__, image_features=image, text_features=text)
        image, text = check_pair("image_features", image, "text_features", text, ranks)
        keys = (text, image) if self.gather_with_grad else (text.detach(), image.detach())
        scale, ids = scalar("logit_scale", logit_scale, image), row_ids(image.shape[0], image.device, ranks)
        losses = []
        for query, key in zip((image, text), keys, strict=True):
            negative = similarity_lse(query, key, scale, q_ids=ids, k_ids=ids, ranks=ranks)
            losses.append(mean(pair_loss(negative, times(dots(query, key), scale))))
        return (losses[0] + losses[1]) / 2


class CoCaLoss(ClipLoss):
    """The losses of CoCa: that of CLIP, and the cross-entropy of captions.

    Args:
        caption_loss_weight, clip_loss_weight: multiply them; without a clip_loss_weight its loss is the integer 0.
        pad_id: the token that does not count in captions.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as in `ClipLoss`.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]  # as there
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Scale,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        clip_loss = torch.tensor(0, device=logits.device)
        if self.clip_loss_weight:
            clip_loss = self.clip_loss_weight * self._contrastive(image_features, text_features, logit_scale)
        caption_loss = self.caption_loss_weight * self.caption_loss(logits.transpose(1, 2), labels)
        if output_dict:
            return {"contrastive_loss": clip_loss, "caption_loss": caption_loss}
        return clip_loss, caption_loss


class DistillClipLoss(ClipLoss):
    """The loss of CLIP, and the cross-entropy of its softmax with that of a teacher, which needs all logits of both.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as in `ClipLoss`.
    """

    # The student's features weighted by the teacher's softmax are a gradient of its log-sum-exp, so that no logits need
    # be stored; but that is 13 products of N x N x D, forward and backward, where storing them takes 8.
    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        return -(teacher_logits.softmax(1) * student_logits.log_softmax(1)).sum(1).mean(0)

    def forward(  # type: ignore[override]  # as there
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Scale,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Scale,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        warn_once(self, "the softmax of the teacher needs its logits; there is nothing to change")
        logits = self.get_logits(image_features, text_features, logit_scale)
        taught = self.get_logits(dist_image_features, dist_text_features, dist_logit_scale)
        contrastive_loss = self._of_logits(*logits)
        distill_loss = (self.dist_loss(taught[0], logits[0]) + self.dist_loss(taught[1], logits[1])) / 2
        if output_dict:
            return {"contrastive_loss": contrastive_loss, "distill_loss": distill_loss}
        return contrastive_loss, distill_loss


class SigLipLoss(nn.Module):
    """The loss of SigLIP. Formula: `sslkern.functional.siglip`, of features that are normalised already.

    Args:
        cache_labels: kept, and not used.
        rank, world_size: the place of this process; 1 for this process alone. The loss of a rank is that of its images
            with the texts of all, and gradients of texts are the sum over the losses of all ranks.
        dist_impl: "bidir" (the default) and "shift": texts go round; "gather" and "reduce": all come at once.
        chunk_size: of later versions, which store the logits of so many rows at a time: if not 0, none are stored of
            small batches either (but inside autocast), and as there the loss of 16-bit features is in fp32.

    Example:
        >>> from sslkern.compat.open_clip import SigLipLoss
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 64, 32), dim=-1)
        >>> loss = SigLipLoss()(image, text, logit_scale=torch.tensor(10.0), logit_bias=torch.tensor(-10.0))
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        assert self.dist_impl in _STRATEGIES, f"dist_impl must be one of {', '.join(_STRATEGIES)}, not {dist_impl!r}"
        self.chunk_size = chunk_size
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """[N, N], 1 for the pairs that belong together and -1 for all others."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        if not negative_only:
            labels.fill_diagonal_(1)
        return labels

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Scale, logit_bias: Scale | None = None
    ) -> Tensor:
        """All logits; the loss by itself does without them."""
        logits = logit_scale * image_features @ text_features.T
        if logit_bias is not None:
            logits += logit_bias
        return logits

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Scale,
        logit_bias: Scale | None,
        output_dict: bool = False,
    ) -> Losses:
        if self.world_size == 1:
            loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        else:
            loss = self._over_ranks(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Scale,
        logit_bias: Scale | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """Of N images and M texts, of which the first min(N, M) belong together, or none with `negative_only`."""
        image, text = image_features, text_features
        why = _why_dense(self, SigLipLoss, logit_scale, logit_bias)
        if why:
            warn_once(self, why)
        # Inside autocast, where products are in 16 bits, theirs are near to each other with a chunk_size and without.
        stored = not self.chunk_size or autocast_active(image.device.type)
        if why or stored and image.shape == text.shape and few(image, image.shape[0] * text.shape[0], FEW_PAIRS):
            logits = self.get_logits(image, text, logit_scale, logit_bias)
            labels = self.get_ground_truth(image.device, image.dtype, image.shape[0], negative_only)
            return -F.logsigmoid(labels * logits).sum() / image.shape[0]
        bias = 0.0 if logit_bias is None else logit_bias
        if image.shape == text.shape and not negative_only and image.shape[0]:
            return self._typed(siglip(image, text, logit_scale, bias, normalize=False, group="self"), image_features)
        image, text = promoted(image, text)
        scale, bias = scalar("logit_scale", logit_scale, image), scalar("logit_bias", bias, image)
        if negative_only:
            loss = similarity_softplus(image, text, scale, bias)
        else:
            ids = torch.arange(max(len(image), len(text)), device=image.device)
            loss = similarity_softplus(image, text, scale, bias, q_ids=ids[: len(image)], k_ids=ids[: len(text)])
            both = min(len(image), len(text))
            loss = loss + total(softplus(-(times(dots(image[:both], text[:both]), scale) + bias)))
        return self._typed(loss / len(image), image_features)

    def _typed(self, loss: Tensor, features: Tensor) -> Tensor:
        return loss if self.chunk_size else typed_as(loss, features)

    def _over_ranks(self, image: Tensor, text: Tensor, logit_scale: Scale, logit_bias: Scale | None) -> Tensor:
        _check_place(self.rank, self.world_size)
        why = _why_dense(self, SigLipLoss, logit_scale, logit_bias)
        if why:
            warn_once(self, why)
            texts = torch.distributed.nn.all_gather(text)
            losses = [
                self._loss(image, texts[i], logit_scale, logit_bias, negative_only=i != self.rank)
                for i in range(self.world_size)
            ]
            return torch.stack(losses).sum()
        strategy = _STRATEGIES[self.dist_impl]
        ranks = ranks_of("world", strategy, "sum", type(self).__name__, image_features=image, text_features=text)
        images, texts = check_pair("image_features", image, "text_features", text, ranks)
        scale = scalar("logit_scale", logit_scale, images)
        bias = scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, images)
        ids = row_ids(images.shape[0], images.device, ranks)
        positives = total(softplus(-(times(dots(images, texts), scale) + bias)))
        negatives = similarity_softplus(images, texts, scale, bias, q_ids=ids, k_ids=ids, ranks=ranks)
        return self._typed((positives + negatives) / images.shape[0], image)


_STRATEGIES = {"bidir": "ring", "shift": "ring", "reduce": "all_gather", "gather": "all_gather"}


# ---- what they share -------------------------------------------------------------------------------------------------


def gather_features(
    image_features: Tensor,
    text_features: Tensor,
    local_loss: bool = False,
    gather_with_grad: bool = False,
    rank: int = 0,
    world_size: int = 1,
    use_horovod: bool = False,
) -> tuple[Tensor, Tensor]:
    """The features of all ranks, with gradient if `gather_with_grad` says so. Else those of this rank alone have one,
    and with `local_loss` none."""
    gathered = []
    for x in (image_features, text_features):
        rows = _gathered(x, gather_with_grad, world_size, use_horovod)
        if not gather_with_grad and not local_loss:
            first = rank * len(x)
            rows = torch.cat((rows[:first], x, rows[first + len(x) :]))
        gathered.append(rows)
    return gathered[0], gathered[1]


def _gathered(x: Tensor, with_grad: bool, world_size: int, use_horovod: bool) -> Tensor:
    if use_horovod:
        try:
            horovod = importlib.import_module("horovod.torch")
        except ImportError:
            raise AssertionError("use_horovod=True needs horovod; install it, or use torch.distributed") from None
        with torch.set_grad_enabled(with_grad and torch.is_grad_enabled()):
            return horovod.allgather(x)
    if with_grad:
        return torch.cat(torch.distributed.nn.all_gather(x))
    rows = [torch.zeros_like(x) for _ in range(world_size)]
    dist.all_gather(rows, x.detach())
    return torch.cat(rows)


def _why_dense(loss: nn.Module, base: type, logit_scale: Scale, logit_bias: Scale | None) -> str | None:
    """What the fused loss cannot do, if anything, and what to change."""
    for name in ("get_logits", "get_ground_truth"):
        if getattr(type(loss), name) is not getattr(base, name):
            return f"{name} is that of {type(loss).__name__}; leave it as it is"
    for name, value in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if isinstance(value, Tensor) and value.numel() != 1:
            return f"{name} has {value.numel()} elements; pass one"
    return None


def _check_place(rank: int, world_size: int) -> None:
    place = dist.get_rank(), dist.get_world_size()
    if place != (rank, world_size):
        raise ValueError(f"rank and world_size must be those of torch.distributed, {place}, not {(rank, world_size)}")


def _with_part_of_gradient(x: Tensor, part: float) -> Tensor:
    if x.requires_grad:
        x = x.view_as(x)
        x.register_hook(lambda gradient: gradient * part)
    return x
