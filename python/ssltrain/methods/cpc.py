"""CPC: van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018, arXiv
1807.03748, on sound as in section 3.1, scaled down.

Strided convolutions turn a window of sound into frames z_t of 10 ms, a GRU sums up the past of each in a context c_t,
and from c_t a bilinear form W_k for each k = 1 ... K tells the frame z_(t+k) that will come from other frames (equation
4):

    loss = mean over t, k of -log( exp(z_(t+k)' W_k c_t) / sum over j of exp(z_j' W_k c_t) )

The candidates j are the frames of the batch at all times, or with --negatives time those of the own window alone, which
the speaker does not tell apart. What it learns is what stays the same over some frames: who speaks, and which sound.
Features for later use are the contexts, and of a clip their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import sslkern
from ssltrain import UsageError
from ssltrain.config import SpeechConfig, at_least, one_of, option, positive
from ssltrain.methods._method import Method
from ssltrain.speech import Clips, Speech

STRIDES = (
    (10, 5),
    (8, 4),
    (4, 2),
    (4, 2),
)  # kernel and stride of each layer; no padding, which would be easy to predict
HOP = 80  # samples between frames: 10 ms at 8 kHz


@dataclass(frozen=True)
class CPCConfig(SpeechConfig):
    """CPC: the context of a sound tells its next frames from all others (van den Oord et al. 2018).

    --data names a folder, zip or tar of wav files. Then linear probes on the mean of a clip's contexts tell word and
    speaker, beside those on the last context, the untrained encoder and log-mel statistics.
    """

    method: ClassVar[str] = "cpc"
    presets: ClassVar[dict] = {  # section 3.1
        "librispeech": dict(window=20480, steps=12, width=512, units=256, batch_size=64, lr=2e-4),
    }

    temperature: float = option(1.0, "Divides the scores of the bilinear form.", **positive())
    negatives: str = option(
        "all",
        "What a frame to come is told from: all frames of the batch, time (other frames of its own window, which have "
        "the same speaker) or sample (the frames of other windows at the same time).",
        **one_of("all", "sample", "time"),
    )
    steps: int = option(8, "How many frames ahead are predicted.", **at_least(1))
    width: int = option(128, "Channels of the convolutions.", **at_least(1))
    units: int = option(128, "Units of the GRU, the width of a context.", **at_least(1))

    def build(self, data: Speech) -> CPC:
        return CPC(self.window, self.steps, self.width, self.units, self.temperature, self.negatives)

    def build_encoder(self, shape: Sequence[int]) -> ContextEncoder:
        return ContextEncoder(self.width, self.units)


class CPC(Method):
    """CPC on windows of `window` samples; `width` channels, a GRU of `context` units, `steps` predictions.

    >>> from ssltrain.speech import Clips
    >>> clips = Clips.of([torch.randint(-999, 999, (4000,), dtype=torch.int16) for _ in range(8)])
    >>> method = CPC()
    >>> loss, stats = method.loss(method.views(clips))
    >>> loss.backward()
    """

    encoder: ContextEncoder
    criterion: sslkern.CPCLoss
    networks = ("frames_and_contexts",)

    def __init__(
        self,
        window: int = 2048,
        steps: int = 8,
        width: int = 128,
        context: int = 128,
        temperature: float = 1.0,
        negatives: str = "all",
    ):
        super().__init__()
        self.window = window
        self.encoder = ContextEncoder(width, context)
        frames = self.encoder.frame_count(window)
        if frames <= steps:
            raise UsageError(
                f"--steps {steps}: a --window of {window} samples has {frames} frames; predict fewer steps ahead, or "
                "cut longer windows."
            )
        self.criterion = sslkern.CPCLoss(
            context, width, steps, temperature, negatives=negatives, stats=True, group="world"
        )

    @torch.no_grad()
    def views(self, clips: Clips) -> Tensor:
        """B clips -> float [B, window]: a random piece of each. Added silence would be easy to predict."""
        return clips.crop(self.window)

    def loss(self, windows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over frames and steps, and `top1`: how often the frame to come beats all others."""
        frames, contexts = self.frames_and_contexts(windows)
        with torch.autocast(windows.device.type, enabled=False):  # the engine chooses its own precision
            dtype = self.criterion.predictors.dtype
            loss, top1 = self.criterion(contexts.to(dtype), frames.to(dtype))
        return loss, {"top1": top1.mean()}

    def frames_and_contexts(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder.frames_and_contexts(windows)


class ContextEncoder(nn.Module):
    """Sound, float [B, samples] in [-1, 1] -> contexts [B, `frame_count(samples)`, context], every `HOP` samples."""

    def __init__(self, width: int, context: int):
        super().__init__()
        layers, c_in = [], 1
        for kernel, stride in STRIDES:
            layers += [nn.Conv1d(c_in, width, kernel, stride, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
            c_in = width
        self.convolutions = nn.Sequential(*layers)
        self.recurrent = nn.GRU(width, context, batch_first=True)
        self.features = context

    def frame_count(self, samples: int) -> int:
        """How many frames a sound of that length gives."""
        for kernel, stride in STRIDES:
            samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
        return samples

    def frames_and_contexts(self, sound: Tensor) -> tuple[Tensor, Tensor]:
        frames = self.convolutions(sound.unsqueeze(1)).transpose(1, 2)
        return frames, self.recurrent(frames)[0]

    def forward(self, sound: Tensor) -> Tensor:
        return self.frames_and_contexts(sound)[1]
