"""Spoken words, read once into memory: a folder, zip or tar of wav files named `<word>_<speaker>_<index>.wav`.

The index splits: 0 to 4 is the test set, as in the Free Spoken Digit Dataset.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslkern.functional import cpc
from ssltrain import UsageError, files, panels
from ssltrain.draws import Draws, rand
from ssltrain.encoders import calibrated
from ssltrain.evaluate import Evaluation, accuracy, linear_probe, predicted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ssltrain.methods.cpc import ContextEncoder

TEST_INDICES = 5
LOUDNESS = 0.1  # root mean square of a clip that is levelled


@dataclass
class Clips:
    """Sounds of different lengths, end to end in one tensor."""

    samples: Tensor  # int16 [S]
    start: Tensor  # int64 [N]
    length: Tensor  # int64 [N]
    gain: Tensor  # float [N], what the samples are multiplied with

    @staticmethod
    def of(sounds: Sequence[Tensor], level: bool = False) -> Clips:
        """From int16 tensors, one a clip; with `level` each is made as loud as the others, as a whole."""
        length, gain = torch.tensor([len(sound) for sound in sounds]), torch.ones(len(sounds))
        if level:
            energy = torch.stack([sound.long().square().sum() for sound in sounds])  # exact for any number of threads
            gain = 32768 * LOUDNESS / (energy / length).sqrt().clamp_min(1)  # silence stays silence
        return Clips(torch.cat(list(sounds)), length.cumsum(0) - length, length, gain)

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: Tensor | slice) -> Clips:
        return Clips(self.samples, self.start[rows], self.length[rows], self.gain[rows])

    def to(self, device: torch.device) -> Clips:
        return Clips(*(tensor.to(device) for tensor in vars(self).values()))

    def crop(self, window: int) -> Tensor:
        """float [N, window]: a piece of each clip, where it lies drawn at random. No clip may be shorter."""
        room = self.length - window + 1
        first = self.start + (rand(len(self), device=room.device) * room).long().clamp_max(room - 1)
        return self._cut(first, window)

    def padded(self) -> Tensor:
        """float [N, longest], silence after the end of each clip."""
        sound = self._cut(self.start, int(self.length.max()))
        return sound * (torch.arange(sound.shape[1], device=sound.device) < self.length.unsqueeze(1))

    def _cut(self, first: Tensor, count: int) -> Tensor:
        places = first.unsqueeze(1) + torch.arange(count, device=first.device)
        sound = self.samples[places.clamp_max(len(self.samples) - 1)].float() / 32768
        return sound * self.gain.unsqueeze(1)


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

    shape: ClassVar[list[int]] = []  # clips have none in common

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint keeps about the data."""
        return {}

    @property
    def tensors(self) -> list[Tensor]:
        """What a run trains on."""
        return [self.train.samples, self.train.start, self.train.length]  # the gain follows from them

    def describe(self) -> str:
        """In a line."""
        minutes = int(self.train.length.sum()) / self.rate / 60
        return (
            f"{self.name}: {len(self.train):,} training clips ({minutes:.0f} minutes at {self.rate} Hz) and "
            f"{len(self.test):,} test clips, {len(self.words)} words, {len(self.speakers)} speakers"
        )

    def like(self, shape: Sequence[int]) -> Speech:
        """Clips are alike."""
        return self

    def evaluate(self, encoder: Any, untrained: Any, device: torch.device, beside: Any | None = None) -> Evaluation:
        """Linear probes for word and speaker on the mean of a clip's contexts and on the last alone, beside the
        untrained encoder with its batch normalisation calibrated on training clips, log-mel statistics, and another
        run.

        The third figure is the word said by a speaker whom the probe has not heard, the mean over all speakers in turn.
        """
        networks = {"": encoder, "untrained_": self._calibrated(untrained, device)}
        names = {"": "trained", "untrained_": "untrained encoder"}
        if beside is not None:
            networks["beside_"], names["beside_"] = beside, "other run"
        rows: dict[str, str] = {}
        given: dict[str, tuple[Tensor, Tensor]] = {}  # to the probes, of training and test clips
        for prefix, network in networks.items():
            (train, train_last), (test, test_last) = (features(network, c, device) for c in (self.train, self.test))
            last = f"{prefix}last_"
            rows |= {prefix: names[prefix], last: f"{names[prefix]}, last context"}
            given |= {prefix: (train, test), last: (train_last, test_last)}
        train, test = (log_mel_statistics(clips, self.rate).to(device) for clips in (self.train, self.test))
        rows["log_mel_"], given["log_mel_"] = "log-mel statistics", (train, test)
        columns = {"word": "word", "speaker": "speaker", "word_new_speaker": "word, new speaker"}
        words = self.train_words.to(device), self.test_words.to(device)
        speakers = self.train_speakers.to(device), self.test_speakers.to(device)
        accuracies, said = {}, {}
        for prefix, (train, test) in given.items():
            said[prefix] = predicted(train, words[0], test)
            accuracies[f"{prefix}word"] = accuracy(said[prefix], words[1])
            accuracies[f"{prefix}speaker"] = linear_probe(train, speakers[0], test, speakers[1])
            accuracies[f"{prefix}word_new_speaker"] = self._new_speakers(train, test, words, speakers)
        widths = {prefix: train.shape[1] for prefix, (train, _) in given.items()}
        train, test = given[""]
        return Evaluation(accuracies, rows, columns, widths, train, test, self.test_words, self.words, said[""])

    def _calibrated(self, encoder: Any, device: torch.device, batches: int = 20) -> Any:
        """On pieces of sound as long as the shortest clip, without added silence."""
        window = int(self.train.length.min())

        def pieces() -> Iterator[Tensor]:
            for batch, rows in enumerate(torch.randint(len(self.train), (batches, 64), generator=generator)):
                with Draws(seed=0, epoch=0, batch=batch, rows=rows):
                    yield self.train[rows].crop(window).to(device)

        generator = torch.Generator().manual_seed(0)
        return calibrated(encoder.to(device), pieces())

    def _new_speakers(
        self, train: Tensor, test: Tensor, words: tuple[Tensor, Tensor], speakers: tuple[Tensor, Tensor]
    ) -> float:
        """The accuracy of a word said by a speaker whom the probe has not heard, the mean over all in turn."""
        known = []
        for speaker in range(len(self.speakers)):
            heard, new = speakers[0] != speaker, speakers[1] == speaker
            if heard.any() and new.any():
                known.append(linear_probe(train[heard], words[0][heard], test[new], words[1][new]))
        known = [found for found in known if not math.isnan(found)]
        return sum(known) / len(known) if known else math.nan

    def example(self, row: int, test: bool) -> tuple[str, str, Tensor | None]:
        """What a page shows of a clip: its word and who says it; there is no picture."""
        words, speakers = (self.test_words, self.test_speakers) if test else (self.train_words, self.train_speakers)
        return self.words[int(words[row])], self.speakers[int(speakers[row])], None

    @torch.no_grad()
    def draw(self, method: Any, device: torch.device, axes: Axes) -> None:
        """How often a frame to come is found, by how far ahead it is."""
        long_enough = self.test[self.test.length >= method.window]
        if len(long_enough) < 2:
            axes.set_axis_off()
            return
        method.eval()
        frames, contexts = method.encoder.frames_and_contexts(method.views(long_enough[:256].to(device)))
        loss = method.criterion
        options = loss.options | dict(reduction="none", group=None)
        _, by_step = cpc(contexts, frames, loss.predictors, loss.temperature, **options)
        panels.draw_steps(axes, by_step)


def load(source: str | None, limit: int | None = None, shortest: int = 0, level: bool = False) -> Speech:
    """Load the folder, zip or tar at the path `source`; clips shorter than `shortest` samples are not for training.

    A file that does not decode, has another sampling rate than most, or another kind of name is left out and named in
    a warning among the `notes`. Of several channels the mean is used. `limit` keeps a fixed random subset of the
    training clips; `level` makes all equally loud. Raises `UsageError`, one sentence, for whatever cannot be loaded.
    """
    if source is None:
        raise UsageError(
            "--data is needed: name a folder, zip or tar of wav files called <word>_<speaker>_<index>.wav."
        )
    unread = files.Unread()
    names, clips, rate, notes = read_files(source, level, unread)
    labels = [_label(name) for name in names]
    strange = [name for name, label in zip(names, labels, strict=True) if label is None]
    fits = [row for row, label in enumerate(labels) if label is not None]
    if not fits:
        raise UsageError(
            f"--data {source}: no file is named <word>_<speaker>_<index>.wav, for example {files.shown(names[0])}; "
            "rename them."
        )
    clips, names = clips[torch.tensor(fits)], [names[row] for row in fits]
    words, speakers, tests = zip(*(labels[row] for row in fits), strict=True)

    is_test = torch.tensor(tests)
    is_train = ~is_test & (clips.length >= shortest)
    short = [names[row] for row in (~is_test & ~is_train).nonzero().flatten().tolist()]
    for what, rows in (("training", is_train), ("test", is_test)):
        if not rows.any():
            why = f" of at least {shortest} samples" if what == "training" and short else ""
            raise UsageError(
                f"--data {source}: there are no {what} clips{why}; index 0 to {TEST_INDICES - 1} is the test set, the "
                "others are for training."
            )
    all_words, all_speakers = sorted(set(words)), sorted(set(speakers))
    word = torch.tensor([all_words.index(w) for w in words])
    speaker = torch.tensor([all_speakers.index(s) for s in speakers])
    speech = Speech(
        source,
        clips[is_train],
        clips[is_test],
        word[is_train],
        word[is_test],
        speaker[is_train],
        speaker[is_test],
        all_words,
        all_speakers,
        rate,
        notes,
        unread.lines() + [f"{files.shown(name)}: not named <word>_<speaker>_<index>.wav" for name in strange],
    )
    if limit is not None and limit < len(speech.train):
        keep = torch.randperm(len(speech.train), generator=torch.Generator().manual_seed(0))[:limit]
        speech.train = speech.train[keep]
        speech.train_words, speech.train_speakers = speech.train_words[keep], speech.train_speakers[keep]
        speech.notes.append(f"training on a fixed random subset of {limit} clips")
    _note_left_out(speech, short, shortest, strange)
    return speech


def _label(name: str) -> tuple[str, str, bool] | None:
    """Word, speaker and whether it is for testing, of the name of a file; None for another kind of name."""
    *who, index = PurePosixPath(name).stem.rsplit("_", 2)
    if len(who) != 2 or not (index.isascii() and index.isdigit()):  # also ² is a digit, but no number
        return None
    index = index.lstrip("0")
    return who[0], who[1], len(index) <= 1 and int(index or 0) < TEST_INDICES


def _note_left_out(speech: Speech, short: list[str], shortest: int, strange: list[str]) -> None:
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


def read_files(
    source: str, level: bool = False, unread: files.Unread | None = None
) -> tuple[list[str], Clips, int, list[str]]:
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
    clips = Clips.of([torch.from_numpy(sounds[name][1]) for name in names], level)
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
        sound = F.pad(sound, (0, max(0, size - len(sound))))
        power = (
            torch.stft(sound, size, hop, window=torch.hann_window(size), center=False, return_complex=True).abs() ** 2
        )
        bands_ = (filters @ power + 1e-6).log()
        features.append(torch.cat([bands_.mean(1), bands_.std(1, correction=0)]))
    return torch.stack(features)


@torch.no_grad()
def features(encoder: ContextEncoder, clips: Clips, device: torch.device, batch: int = 256) -> tuple[Tensor, Tensor]:
    """The mean of the contexts of each clip, and the last one: float32 [N, F] on `device`; of a clip too short, 0."""
    training = encoder.training
    encoder.eval()
    means, lasts = [], []
    for rows in torch.arange(len(clips)).split(batch):
        part = clips[rows]
        count = torch.tensor([encoder.frame_count(n) for n in part.length.tolist()], device=device).unsqueeze(1)
        sound = F.pad(part.padded(), (0, 400)).to(device)  # at least a frame
        contexts = encoder(sound).float()
        place = torch.arange(contexts.shape[1], device=device)
        means.append((contexts * (place < count).unsqueeze(2)).sum(1) / count.clamp_min(1))
        lasts.append((contexts * (place == count - 1).unsqueeze(2)).sum(1))
    encoder.train(training)
    return torch.cat(means), torch.cat(lasts)
