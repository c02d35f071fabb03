"""Spoken words, read once into memory: a folder, zip or tar of wav files named `<word>_<speaker>_<index>.wav`.

The index splits: 0 to 4 is the test set, as in the Free Spoken Digit Dataset.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from ssltrain import UsageError, files
from ssltrain.draws import rand

TEST_INDICES = 5


@dataclass
class Clips:
    """Sounds of different lengths, end to end in one tensor."""

    samples: Tensor  # int16 [S]
    start: Tensor  # int64 [N]
    length: Tensor  # int64 [N]

    @staticmethod
    def of(sounds: Sequence[Tensor]) -> Clips:
        """From int16 tensors, one a clip."""
        length = torch.tensor([len(sound) for sound in sounds])
        return Clips(torch.cat(list(sounds)), length.cumsum(0) - length, length)

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: Tensor | slice) -> Clips:
        return Clips(self.samples, self.start[rows], self.length[rows])

    def to(self, device: torch.device) -> Clips:
        return Clips(self.samples.to(device), self.start.to(device), self.length.to(device))

    def crop(self, window: int) -> Tensor:
        """float [N, window] in [-1, 1]: a piece of each clip, where it lies drawn at random. No clip may be shorter."""
        room = self.length - window + 1
        first = self.start + (rand(len(self), device=room.device) * room).long().clamp_max(room - 1)
        return self._cut(first, window)

    def padded(self) -> Tensor:
        """float [N, longest] in [-1, 1], silence after the end of each clip."""
        sound = self._cut(self.start, int(self.length.max()))
        return sound * (torch.arange(sound.shape[1], device=sound.device) < self.length.unsqueeze(1))

    def _cut(self, first: Tensor, count: int) -> Tensor:
        places = first.unsqueeze(1) + torch.arange(count, device=first.device)
        return self.samples[places.clamp_max(len(self.samples) - 1)].float() / 32768


@dataclass
class Speech:
    """Clips with the word that is said and who says it. Labels serve the evaluation only; training never sees them."""

    name: str
    train: Clips
    test: Clips
    train_words: Tensor  # int64 [N]
    test_words: Tensor
    train_speakers: Tensor
    test_speakers: Tensor
    words: list[str]
    speakers: list[str]
    rate: int  # samples per second
    notes: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # every file that is not in it, and why


def load(source: str | None, limit: int | None = None, shortest: int = 0) -> Speech:
    """Load the folder, zip or tar at the path `source`; clips shorter than `shortest` samples are not for training.

    A file that does not decode, has another sampling rate than most, or another kind of name is left out and named in
    a warning among the `notes`. Of several channels the mean is used. `limit` keeps a fixed random subset of the
    training clips. Raises `UsageError`, one sentence, for whatever cannot be loaded.
    """
    if source is None:
        raise UsageError(
            "--data is needed: name a folder, zip or tar of wav files called <word>_<speaker>_<index>.wav."
        )
    unread = files.Unread()
    names, clips, rate, notes = read_files(source, unread)
    fits, labels, strange = [], [], []
    for row, name in enumerate(names):
        *who, index = PurePosixPath(name).stem.rsplit("_", 2)
        if len(who) == 2 and index.isascii() and index.isdigit():  # also ² is a digit, but no number
            fits.append(row)
            index = index.lstrip("0")
            labels.append((*who, len(index) <= 1 and int(index or 0) < TEST_INDICES))
        else:
            strange.append(name)
    if not fits:
        raise UsageError(
            f"--data {source}: no file is named <word>_<speaker>_<index>.wav, for example {files.shown(names[0])}; "
            "rename them."
        )
    clips, names = clips[torch.tensor(fits)], [names[row] for row in fits]

    sides = [sorted({label[i] for label in labels}) for i in (0, 1)]
    is_test = torch.tensor([label[2] for label in labels])
    is_train = ~is_test & (clips.length >= shortest)
    short = [names[row] for row in (~is_test & ~is_train).nonzero().flatten().tolist()]
    for what, rows in (("training", is_train), ("test", is_test)):
        if not rows.any():
            why = f" of at least {shortest} samples" if what == "training" and short else ""
            raise UsageError(
                f"--data {source}: there are no {what} clips{why}; index 0 to {TEST_INDICES - 1} is the test set, the "
                "others are for training."
            )
    words, speakers = (torch.tensor([sides[i].index(label[i]) for label in labels]) for i in (0, 1))
    speech = Speech(
        source,
        clips[is_train],
        clips[is_test],
        words[is_train],
        words[is_test],
        speakers[is_train],
        speakers[is_test],
        *sides,
        rate,
        notes,
        unread.lines() + [f"{files.shown(name)}: not named <word>_<speaker>_<index>.wav" for name in strange],
    )
    if limit is not None and limit < len(speech.train):
        keep = torch.randperm(len(speech.train), generator=torch.Generator().manual_seed(0))[:limit]
        speech.train = speech.train[keep]
        speech.train_words, speech.train_speakers = speech.train_words[keep], speech.train_speakers[keep]
        speech.notes.append(f"training on a fixed random subset of {limit} clips")
    if short:
        speech.notes.append(
            f"{len(short)} training clips are shorter than the window of {shortest} samples and left out: "
            f"{files.listed(short)}"
        )
        speech.left += [f"{files.shown(name)}: shorter than the window of {shortest} samples" for name in short]
    if strange:
        left = files.listed(strange)
        speech.notes.append(
            f"warning: {len(strange)} files not named <word>_<speaker>_<index>.wav were left out: {left}"
        )
    return speech


def read_files(source: str, unread: files.Unread | None = None) -> tuple[list[str], Clips, int, list[str]]:
    """The names of all wav files, their sounds, the rate of all, and notes about what is left out.

    `unread` gets what that is.
    """
    sounds, unread = {}, unread or files.Unread()
    for name, content in files.read(Path(source), {".wav", ".wave"}, unread):
        try:
            rate, samples = _decode(content)
        except Exception as error:  # a broken header leads to nearly anything
            unread.leave(name, detail=files.reason(error))
            continue
        if len(samples) == 0:
            unread.leave(name, detail="no samples")
        else:
            sounds[name] = rate, samples
    if not sounds:
        found = "it holds no wav files"
        if unread.count:
            found = f"none of its {unread.count} wav files can be used, for example {unread.example}"
        raise UsageError(f"--data {source}: {found}; expected <word>_<speaker>_<index>.wav.")
    common = Counter(rate for rate, _ in sounds.values()).most_common(1)[0][0]
    for name, (rate, _) in sounds.items():
        if rate != common:
            unread.leave(name, detail=f"{rate} Hz, most have {common} Hz")
    names = sorted(name for name, (rate, _) in sounds.items() if rate == common)
    clips = Clips.of([torch.from_numpy(sounds[name][1]) for name in names])
    return names, clips, common, unread.notes("wav file")


def _decode(content: bytes) -> tuple[int, np.ndarray]:
    """Rate and int16 samples of a wav file of whole or floating point numbers, any number of channels.

    Little-endian (RIFF) or big-endian (RIFX); 8 to 64 bits, of which the upper 16 are kept.
    """
    from scipy.io import wavfile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks that it does not know
        rate, samples = wavfile.read(io.BytesIO(content))
    kind, size = samples.dtype.kind, samples.dtype.itemsize  # of either byte order
    samples = samples.astype(np.float32 if size <= 2 else np.float64)
    if kind == "u":
        samples = (samples - 128) * 256
    elif kind == "i":
        samples *= 2.0 ** (16 - 8 * size)
    else:
        samples *= 32768
    if samples.ndim == 2:
        samples = samples.mean(1)
    if not np.isfinite(samples).all():
        raise ValueError("not all samples are finite")
    return rate, samples.round().clip(-32768, 32767).astype(np.int16)


def log_mel_statistics(clips: Clips, rate: int, bands: int = 40) -> Tensor:
    """float [N, 2 * bands]: mean and deviation over time of the logarithms of mel bands, as a plain baseline."""
    size, hop = 256, 80
    hertz = torch.linspace(0, rate / 2, size // 2 + 1)
    mel = 2595 * torch.log10(1 + hertz / 700)
    edges = torch.linspace(0, float(mel[-1]), bands + 2)
    rising = (mel - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - mel) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp_min(0)
    features = []
    for row in range(len(clips)):
        sound = clips[row : row + 1].padded()[0]
        sound = torch.nn.functional.pad(sound, (0, max(0, size - len(sound))))
        power = (
            torch.stft(sound, size, hop, window=torch.hann_window(size), center=False, return_complex=True).abs() ** 2
        )
        bands_ = (filters @ power + 1e-6).log()
        features.append(torch.cat([bands_.mean(1), bands_.std(1, correction=0)]))
    return torch.stack(features)
