"""Training over several processes is training in one: the same batches, statistics, losses and weights."""

import dataclasses
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ssltrain import UsageError, checkpoints, cli, data, loop, ranks, speech
from ssltrain.methods.cmc import CMCConfig
from ssltrain.methods.cpc import CPCConfig
from ssltrain.methods.cpc_images import CPCImagesConfig
from ssltrain.methods.deep_infomax import DeepInfoMaxConfig
from ssltrain.methods.instdisc import InstDiscConfig
from ssltrain.methods.moco import MoCoConfig
from ssltrain.methods.nnclr import NNCLRConfig
from ssltrain.methods.simclr import SimCLRConfig
from ssltrain.methods.supcon import SupConConfig

from ..distributed.pool import Pool
from .test_cli import draw_images

COMMON = dict(epochs=6, batch_size=50, precision="fp64", optimizer="sgd", lr=0.1, threads=1, device="cpu")  # 30 steps
IMAGES = dict(data="digits", limit=270, dim=16)
METHODS = {
    "simclr": SimCLRConfig(**COMMON, **IMAGES),
    "simclr v2": SimCLRConfig(**COMMON, **IMAGES, version=2),
    "moco": MoCoConfig(**COMMON, **IMAGES, queue=128),
    "moco v3": MoCoConfig(**COMMON, **IMAGES, version=3),
    "moco symmetric": MoCoConfig(**COMMON, **IMAGES, queue=128, symmetric=True),
    "moco shuffled": MoCoConfig(**COMMON | dict(epochs=5, batch_size=40), **IMAGES, queue=128, shuffle_bn=4),
    "instdisc": InstDiscConfig(**COMMON, **IMAGES, negatives=64),
    "instdisc nce": InstDiscConfig(**COMMON, **IMAGES, negatives=64, form="nce", temperature=0.5),
    "nnclr": NNCLRConfig(**COMMON, **IMAGES, support=128),
    "supcon": SupConConfig(**COMMON, **IMAGES),
    "cmc": CMCConfig(**COMMON, **IMAGES),
    "cmc bank": CMCConfig(**COMMON, **IMAGES, candidates="bank", negatives=64),
    "deep_infomax": DeepInfoMaxConfig(**COMMON, **IMAGES),
    "cpc_images": CPCImagesConfig(**COMMON | dict(lr=0.02), **IMAGES, patch=4, steps=1, context_width=8),
    "cpc": CPCConfig(**COMMON | dict(batch_size=10), window=1600, steps=2, width=8, units=8),
}


@pytest.fixture(scope="module")
def worlds():
    """Pools of so many ranks that are all there are."""
    made = {size: Pool(size, range(1, size + 1)) for size in (2, 3, 4)}
    yield made
    for pool in made.values():
        pool.close()


def train(group, options, folders, stop=None):
    """Losses, other figures and weights of a run, or where it stood when this rank was told to stop at a step."""
    out = folders[dist.get_rank()] if dist.is_initialized() else folders[0]

    def report(state, progress):
        if stop == (ranks.rank(), state.step):
            os.kill(os.getpid(), signal.SIGINT)

    torch.manual_seed(options.seed)
    if options.method == "cpc":
        method, samples = options.build(None), speech.Clips.of(torch.randint(-999, 999, (54, 2000)).short())
    else:
        images = data.load("digits", limit=options.limit)
        method, samples = options.build(images), images.train
    checkpoint = ranks.of_first(checkpoints.load(folders[0]))
    try:
        state = loop.train(method, samples, options, out, checkpoint, report)
    except loop.Interrupted:
        return None
    return state.losses, state.stats, method.state_dict()


def difference(a, b) -> float:
    """The largest between the losses, figures and weights of two runs."""
    losses = [abs(x - y) for x, y in zip(a[0], b[0], strict=True)]
    weights = [(a[2][name] - b[2][name]).abs().max().item() for name in a[2]]
    figures = [abs(x - y) for name in a[1] for x, y in zip(a[1][name], b[1][name], strict=True)]
    return max(losses + weights + figures)


@functools.cache
def of_one_process(name):
    """The run that the others are to be."""
    with tempfile.TemporaryDirectory() as out:
        return train(None, METHODS[name], [Path(out)])


CI = "moco", 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, size",
    [pytest.param(*x, marks=() if x == CI else pytest.mark.long) for x in itertools.product(METHODS, (2, 4))],
)
def test_as_many_processes_as_one_likes_train_the_same(worlds, tmp_path, name, size):
    options, whole = METHODS[name], of_one_process(name)
    assert len(whole[0]) == 30 and whole[0][-1] != whole[0][0]
    if "criterion.memory.queue_ptr" in whole[2]:  # all in the queue are keys of this run, and compared below
        keys = options.batch_size * (2 if options.symmetric else 1)
        assert whole[2]["criterion.memory.queue_ptr"] == 30 * keys % options.queue
    folders = [tmp_path / str(rank) for rank in range(size)]
    runs = worlds[size].run(train, options, folders, ranks=size)
    assert all(difference(whole, run) < 1e-9 for run in runs)
    assert all(run[0] == runs[0][0] and all(torch.equal(run[2][k], runs[0][2][k]) for k in run[2]) for run in runs)
    assert [folder.exists() for folder in folders] == [True] + (size - 1) * [False]
    assert checkpoints.load(folders[0])["state"]["finished"]


@pytest.mark.slow
def test_a_stop_of_any_rank_is_one_of_all_and_others_go_on(worlds, tmp_path):
    options = METHODS["simclr"]
    folders = 3 * [tmp_path / "run"]
    assert worlds[2].run(train, options, folders, (1, 7), ranks=2) == [None, None]
    assert checkpoints.load(folders[0])["state"]["step"] == 7
    assert worlds[3].run(train, options, folders, (0, 19), ranks=3) == [None, None, None]
    assert difference(of_one_process("simclr"), train(None, options, folders)) < 1e-9


def speak(group, wrong, about):
    with ranks.one_voice():
        if ranks.rank() in wrong:
            raise UsageError("--data x: no such folder.")
    ranks.check_same("the data", about if ranks.rank() == 1 else 0)


@pytest.mark.slow
def test_a_mistake_of_some_is_one_of_all(worlds):
    def said(*args):
        return [str(outcome) for outcome in worlds[2].outcomes(speak, *args, ranks=2)]

    assert said([0, 1], 0) == 2 * ["--data x: no such folder."]
    assert said([1], 0) == 2 * ["in process 1: --data x: no such folder."]
    assert said([], 1) == 2 * ["the data of process 1 are others than those of process 0; give all the same."]
    assert said([], 0) == 2 * ["None"]


def test_what_cannot_be_split(worlds, tmp_path):
    for name, wrong, size, said in (
        ("simclr", dict(batch_size=3), 4, "--batch-size 3: there are 4 processes; use that"),
        ("moco shuffled", {}, 3, "--shuffle-bn 4: there are 3 processes; choose a multiple"),
    ):
        options = dataclasses.replace(METHODS[name], **wrong)
        for error in worlds[size].outcomes(train, options, size * [tmp_path], ranks=size):
            assert isinstance(error, UsageError) and str(error).startswith(said)


OPTIONS = "--batch-size 10 --epochs 40 --dim 8 --precision fp64 --optimizer sgd --lr 0.1 --threads 1 --device cpu"
KILLED = {
    "moco": "--queue 32",
    "moco shuffled": "--queue 32 --batch-size 30 --epochs 120 --shuffle-bn 6",
    "moco v3": "--version 3",
    "simclr": "",
}


class Torchrun:
    """`torchrun` of `ssltrain` with so many processes; what it prints goes to a file."""

    def __init__(self, processes: int, log, *arguments):
        launch = f"-m torch.distributed.run --standalone --nproc-per-node {processes} --max-restarts 1 -m ssltrain"
        command = [sys.executable, *launch.split(), *map(str, arguments)]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def wait_for(self, condition) -> None:
        until = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)

    def workers(self) -> list[int]:
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", KILLED)
def test_torchrun_starts_anew_what_was_killed_and_goes_on_with_another_number(tmp_path, monkeypatch, name):
    draw_images(tmp_path / "set", [str(i) for i in range(30)])
    options = f"{name.split()[0]} {OPTIONS} {KILLED[name]}".split()
    arguments = [*options, "--data", tmp_path / "set", "--out"]
    out = tmp_path / "run"

    def step() -> int:
        path = out / checkpoints.CHECKPOINT
        return torch.load(path, weights_only=True)["state"]["step"] if path.exists() else 0

    run = Torchrun(2, tmp_path / "first.log", *arguments, out, "--save-every", 0)
    run.wait_for(lambda: step() > 3)
    workers = run.workers()
    os.kill(workers[1], signal.SIGKILL)
    run.wait_for(lambda: "it goes on" in run.log.read_text())
    killed_at = step()
    run.wait_for(lambda: step() > killed_at + 3)
    workers += run.workers()
    run.process.terminate()
    assert run.process.wait(timeout=60) != 0
    stopped_at = step()
    assert 3 < killed_at < stopped_at < 120 and not any(os.path.exists(f"/proc/{pid}") for pid in workers)

    run = Torchrun(3, tmp_path / "second.log", *arguments, out)
    assert run.process.wait(timeout=120) == 0, run.log.read_text()
    said = run.log.read_text()
    assert f"holds this run up to step {stopped_at}; it goes on." in said and said.count("report.png") == 1
    monkeypatch.setattr("ssltrain.report.draw", lambda *_: None)
    with pytest.raises(SystemExit) as exit:
        cli.main([*map(str, arguments), str(tmp_path / "alone")])
    assert not exit.value.code
    alone, ended = (checkpoints.load(folder) for folder in (tmp_path / "alone", out))
    runs = [(end["state"]["losses"], end["state"]["stats"], end["method"]) for end in (alone, ended)]
    assert len(runs[1][0]) == 120 and difference(*runs) < 1e-9
    assert json.loads((out / "result.json").read_text())["processes"] == 3
