"""Wav files of every kind become clips, bad ones are left out and named, and CPC learns from them."""

import shutil
import signal
import struct

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from ssltrain import UsageError, checkpoints, loop, speech
from ssltrain.methods.cpc import CPC, CPCConfig

RATE = 8000
WORDS, SPEAKERS = ("no", "yes"), ("ann", "bob")


def tone(word: int, speaker: int, seed: int, samples: int = 4000) -> np.ndarray:
    """A sound whose pitch is the speaker's and whose rhythm is the word's."""
    time = np.arange(samples) / RATE
    noise = np.random.default_rng(seed).normal(0, 0.02, samples)
    sound = np.sin(2 * np.pi * (300 + 400 * speaker) * time) * (np.sin(2 * np.pi * (4 + 9 * word) * time) > 0)
    return (20000 * np.clip(0.8 * sound + noise, -1, 1)).astype(np.int16)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "words"
    root.mkdir()
    for w, word in enumerate(WORDS):
        for s, speaker in enumerate(SPEAKERS):
            for i in range(13):
                wavfile.write(root / f"{word}_{speaker}_{i}.wav", RATE, tone(w, s, i))
    return root


@pytest.mark.parametrize("layout", ["folder", "zip", "tar"])
def test_layouts(folder, layout):
    source = folder if layout == "folder" else shutil.make_archive(str(folder), layout, folder.parent, folder.name)
    loaded = speech.load(str(source))
    assert len(loaded.train) == 32 and len(loaded.test) == 20 and loaded.rate == RATE and not loaded.notes
    assert loaded.words == list(WORDS) and loaded.speakers == list(SPEAKERS)
    assert loaded.test_words.bincount().tolist() == loaded.test_speakers.bincount().tolist() == [10, 10]
    first = loaded.test[:1].padded()[0]
    assert torch.equal(first, torch.from_numpy(tone(0, 0, 0)).float() / 32768)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32])
@pytest.mark.parametrize("channels", [1, 2])
def test_kinds_of_samples(tmp_path, kind, channels):
    value = {np.uint8: 192, np.int16: 16384, np.int32: 2**30, np.float32: 0.5}[kind]
    wavfile.write(tmp_path / "a_b_7.wav", RATE, np.full((50, channels), value, kind))
    _, clips, rate, _ = speech.read_files(str(tmp_path))
    assert rate == RATE and torch.equal(clips.padded(), torch.full((1, 50), 0.5))


def wav(bits: int, values: list[int | float], big: bool = False, extensible: bool = False, code: int = 1) -> bytes:
    """A mono wav file, by hand: RIFF or RIFX."""
    order, byte_order, size = *((">", "big") if big else ("<", "little")), bits // 8
    if code == 3:
        samples = struct.pack(f"{order}{len(values)}{'f' if bits == 32 else 'd'}", *values)
    else:
        samples = b"".join(v.to_bytes(size, byte_order, signed=bits > 8) for v in values)
    head = struct.pack(f"{order}HHIIHH", 0xFFFE if extensible else code, 1, RATE, RATE * size, size, bits)
    if extensible:
        head += struct.pack(f"{order}HHIIHH", 22, bits, 4, code, 0, 16) + b"\x80\0\0\xaa\0\x38\x9b\x71"
    chunks = b"WAVE"
    for name, content in ((b"fmt ", head), (b"data", samples)):
        chunks += name + struct.pack(f"{order}I", len(content)) + content + bytes(len(content) % 2)
    return (b"RIFX" if big else b"RIFF") + struct.pack(f"{order}I", len(chunks)) + chunks


@pytest.mark.parametrize("big", [False, True], ids=["RIFF", "RIFX"])
@pytest.mark.parametrize("extensible", [False, True], ids=["plain", "extensible"])
@pytest.mark.parametrize("bits, code", [(8, 1), (16, 1), (24, 1), (32, 1), (64, 1), (32, 3), (64, 3)])
def test_every_width_and_byte_order(tmp_path, bits, code, big, extensible):
    shares = [0.5, -0.5, 0.25, -1.0, 0.0]
    values = shares if code == 3 else [int(x * 2 ** (bits - 1)) + (128 if bits == 8 else 0) for x in shares]
    (tmp_path / "a_b_7.wav").write_bytes(wav(bits, values, big, extensible, code))
    _, clips, rate, notes = speech.read_files(str(tmp_path))
    assert rate == RATE and clips.padded().tolist() == [shares] and not notes


def test_an_index_is_a_number(folder):
    for name in ("yes_ann_²", "yes_ann_①", "yes_ann_٣", "yes_ann_", "yes_ann_-1"):
        wavfile.write(folder / f"{name}.wav", RATE, tone(0, 0, 1))
    wavfile.write(folder / f"yes_ann_{'9' * 200}.wav", RATE, tone(0, 0, 1))
    wavfile.write(folder / "yes_ann_0004.wav", RATE, tone(0, 0, 1))
    loaded = speech.load(str(folder))
    assert len(loaded.train) == 33 and len(loaded.test) == 21
    assert loaded.notes[0].startswith("warning: 5 files not named") and "yes_ann_²" in loaded.notes[0]


def test_one_word_or_one_speaker_is_nothing_to_tell(folder):
    for file in folder.glob("*_bob_*"):
        file.unlink()
    loaded = speech.load(str(folder))
    encoder = CPC(width=4, context=4).encoder
    found = loaded.evaluate(encoder, encoder, torch.device("cpu")).accuracies
    assert found["log_mel_word"] > 0.9 and np.isnan([found["speaker"], found["word_new_speaker"]]).all()


def test_bad_files_are_left_out_and_named(folder):
    (folder / "no_ann_30.wav").write_bytes(b"RIFF, but not really")
    (folder / "no_ann_31.wav").write_bytes((folder / "no_ann_5.wav").read_bytes()[:30])
    wavfile.write(folder / "no_ann_32.wav", 16000, tone(0, 0, 1))
    wavfile.write(folder / "no_ann_33.wav", RATE, np.zeros(0, np.int16))
    wavfile.write(folder / "no_ann_34.wav", RATE, np.full(9, np.nan, np.float32))
    wavfile.write(folder / "noname.wav", RATE, tone(0, 0, 1))
    wavfile.write(folder / "no_ann_35.wav", RATE, tone(0, 0, 1, 500))
    loaded = speech.load(str(folder), shortest=2000)
    notes = " ".join(loaded.notes)
    assert len(loaded.train) == 32 and "5 files were left out" in notes and "noname.wav" in notes
    assert all(f"no_ann_{i}.wav" in notes for i in (30, 31, 32, 33, 34)) and "16000 Hz, most have 8000 Hz" in notes
    assert "1 training clips are shorter than the window of 2000 samples and left out: no_ann_35.wav" in notes
    assert len(loaded.left) == 7 and "no_ann_35.wav: shorter than the window of 2000 samples" in loaded.left


def test_mistakes(folder, tmp_path):
    def sentence(source, **options) -> str:
        with pytest.raises(UsageError) as error:
            speech.load(source if source is None else str(source), **options)
        text = str(error.value)
        assert "\n" not in text and text.endswith(".") and text.startswith("--data")
        return text

    assert "is needed" in sentence(None)
    assert "no such folder" in sentence(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "no wav files" in sentence(tmp_path / "empty")
    (tmp_path / "text.zip").write_text("not an archive")
    assert "can be read" in sentence(tmp_path / "text.zip")
    assert "no training clips of at least 9000" in sentence(folder, shortest=9000)
    for file in folder.glob("*_[01234].wav"):
        file.unlink()
    assert "no test clips" in sentence(folder)
    for file in folder.glob("*.wav"):
        file.rename(file.with_name(file.name.replace("_", "-")))
    assert "rename" in sentence(folder)
    for file in folder.glob("*.wav"):
        file.write_bytes(struct.pack("<I", 7))
    assert "none of its 32 wav files" in sentence(folder)


def test_crops_lie_within_their_clips_and_add_no_silence():
    clips = speech.Clips.of([torch.arange(1, 101, dtype=torch.int16), torch.arange(1001, 1041, dtype=torch.int16)])
    torch.manual_seed(0)
    starts = set()
    for _ in range(200):
        pieces = (clips.crop(40) * 32768).long()
        assert (pieces.diff(dim=1) == 1).all() and 1 <= pieces[0, 0] <= 61 and pieces[1, 0] == 1001
        starts.add(int(pieces[0, 0]))
    assert {1, 61} <= starts and len(starts) > 50


def test_levelled_clips_are_equally_loud(folder):
    quiet = tone(0, 0, 0)
    both = speech.Clips.of(
        [torch.from_numpy(quiet), torch.from_numpy(quiet // 8), torch.zeros(900).short()], level=True
    )
    for clips in (both, both[torch.arange(3)], both.to(torch.device("cpu"))):
        loud, soft, silent = clips.padded()
        assert loud.square().mean().sqrt().item() == pytest.approx(speech.LOUDNESS) and not silent.any()
        assert torch.allclose(loud, soft, atol=1e-3) and not torch.allclose(loud, torch.from_numpy(quiet) / 32768)
    whole = both[:2].crop(4000)
    assert torch.equal(whole, both[:2].padded())
    assert (speech.load(str(folder)).train.gain == 1).all()
    assert (speech.load(str(folder), level=True).train.gain != 1).all()
    assert torch.equal(CPCConfig(data=str(folder)).load().train.gain, speech.load(str(folder), level=True).train.gain)


def test_padding_after_a_clip_does_not_change_its_features(folder):
    loaded, method, cpu = speech.load(str(folder)), CPC(width=8, context=8), torch.device("cpu")
    sounds = [loaded.test.samples[:1500], loaded.test.samples[:4000], loaded.test.samples[:100]]
    mean, last = speech.features(method.encoder, speech.Clips.of(sounds), cpu)
    method.eval()
    for row, sound in enumerate(sounds[:2]):
        contexts = method.encoder(sound.float().unsqueeze(0) / 32768)[0]
        assert torch.allclose(mean[row], contexts.mean(0), atol=1e-6) and torch.allclose(last[row], contexts[-1])
    assert method.encoder.frame_count(100) == 0 and not mean[2].any() and not last[2].any()


@pytest.mark.parametrize("negatives", ["all", "sample", "time"])
def test_which_frames_are_the_negatives(negatives):
    method = CPCConfig(negatives=negatives, width=8, units=8).build(None).eval()
    windows = torch.randn(3, 2048)
    together, alone = method.loss(windows)[0], [method.loss(window)[0] for window in windows.split(1)]
    assert torch.allclose(together, sum(alone) / 3) == (negatives == "time")
    assert (alone[0] == 0) == (negatives == "sample")  # nothing to tell a frame from


def test_frames_are_counted_as_the_convolutions_give_them():
    method = CPC(width=4, context=4)
    for samples in (465, 1000, 2048, 3001):
        frames, contexts = method.encoder.frames_and_contexts(torch.randn(2, samples))
        assert frames.shape[1] == contexts.shape[1] == method.encoder.frame_count(samples)
    with pytest.raises(UsageError, match="--steps 8: a --window of 800 samples has"):
        CPC(window=800)


def train_cpc(folder, out, epochs, negatives="all", **more):
    options = CPCConfig(
        data=str(folder),
        negatives=negatives,
        epochs=epochs,
        batch_size=16,
        width=32,
        units=32,
        precision="fp32",
        threads=1,
        device="cpu",
    )
    loaded = options.load()
    torch.manual_seed(0)
    method = options.build(loaded)
    return method, loop.train(method, loaded.train, options, out, **more), options, loaded


def test_cpc_repeats_and_goes_through_the_engine(folder, tmp_path):
    ends = []
    for _ in range(2):
        with torch.profiler.profile() as profile:
            method, state, *_ = train_cpc(folder, tmp_path, 3)
        ends.append(method.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    engine = [e.count for e in profile.key_averages() if e.key.startswith("sslkern::similarity_lse")]
    assert max(engine) >= state.step


@pytest.mark.parametrize("negatives", ["all", "time"])
def test_cpc_resumes_at_the_same_bits(folder, tmp_path, negatives):
    def stop(state, progress) -> None:
        if state.step == 3:
            signal.raise_signal(signal.SIGINT)

    whole, state, *_ = train_cpc(folder, tmp_path / "whole", 3, negatives)
    with pytest.raises(loop.Interrupted):
        train_cpc(folder, tmp_path / "cut", 3, negatives, report=stop)
    resumed, again, *_ = train_cpc(
        folder, tmp_path / "cut", 3, negatives, checkpoint=checkpoints.load(tmp_path / "cut")
    )
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert again.losses == state.losses and len(state.losses) == 6


@pytest.mark.timeout(120)
def test_cpc_learns_word_and_speaker(folder, tmp_path):
    method, state, options, loaded = train_cpc(folder, tmp_path, 60)
    assert sum(state.losses[-5:]) < sum(state.losses[:5]) - 2 and len(state.stats["top1"]) == state.step
    found = loaded.evaluate(method.encoder, options.build(loaded).encoder, torch.device("cpu"))
    assert found.accuracies["speaker"] > 0.9 and found.accuracies["log_mel_speaker"] == 1
    keys = {
        row + column
        for row in ("", "last_", "untrained_", "untrained_last_", "log_mel_")
        for column in ("word", "speaker", "word_new_speaker")
    }
    assert found.accuracies.keys() == keys and all(0 <= x <= 1 for x in found.accuracies.values())
