"""A step never waits for the GPU; runs there resume at the same bits, and their results have all figures."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ssltrain import checkpoints, cli, data, loop, speech
from ssltrain.methods.cmc import CMCConfig
from ssltrain.methods.cpc import CPCConfig
from ssltrain.methods.cpc_images import CPCImagesConfig
from ssltrain.methods.deep_infomax import DeepInfoMaxConfig
from ssltrain.methods.instdisc import InstDiscConfig
from ssltrain.methods.moco import MoCoConfig
from ssltrain.methods.nnclr import NNCLRConfig
from ssltrain.methods.simclr import SimCLRConfig
from ssltrain.methods.supcon import SupConConfig
from ssltrain.methods.supervised import SupervisedConfig
from ssltrain.stopwatch import Stopwatch
from torch.utils import backend_registration

from .test_loop import stop_at

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU by CUDA")
COMMON = dict(epochs=6, batch_size=64, precision="fp32", threads=1, device="cuda")
SPEECH = CPCConfig(**COMMON, width=32, units=32)
METHODS = {
    "simclr": SimCLRConfig(**COMMON, dim=32),
    "simclr bf16": SimCLRConfig(**{**COMMON, "precision": "bf16"}, dim=32),
    "simclr resnet18": SimCLRConfig(**COMMON, dim=32, encoder="resnet18"),
    "moco": MoCoConfig(**COMMON, dim=32, queue=256),
    "moco v3": MoCoConfig(**COMMON, dim=32, version=3),
    "cmc": CMCConfig(**COMMON, dim=32),
    "cmc bank": CMCConfig(**COMMON, dim=32, candidates="bank", negatives=64),
    "deep_infomax": DeepInfoMaxConfig(**COMMON, dim=32, prior=0.1),
    "cpc_images": CPCImagesConfig(**COMMON, patch=4, steps=1, context_width=32),
    "cpc": SPEECH,
    "instdisc": InstDiscConfig(**COMMON, dim=32, negatives=64),
    "nnclr": NNCLRConfig(**COMMON, dim=32, support=256),
    "supcon": SupConConfig(**COMMON, dim=32),
    "supervised": SupervisedConfig(**COMMON),
}
per_method = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs a newer torch"
)
@pytest.mark.parametrize("cases", [["brief"], pytest.param([], marks=pytest.mark.long)], ids=["brief", "all"])
def test_no_step_waits_for_a_pretended_gpu(cases):
    """`pretend_gpu.py`, which a machine without a GPU can run: all work on the device, no copy that waits, no value."""
    command = [sys.executable, "-m", "tests.ssltrain.pretend_gpu", *cases]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_on_a_gpu_the_stopwatch_reads_events_and_waits_for_the_last_one_only(monkeypatch):
    ticks, waited = iter(range(100)), []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "the stream of cuda:1"
            self.at = next(ticks)

        def synchronize(self) -> None:
            waited.append(self.at)

        def elapsed_time(self, later) -> float:
            return 1000 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    criterion = torch.nn.Linear(3, 1)
    with Stopwatch(criterion, torch.device("cuda:1")) as stopwatch:
        for _ in range(2):
            criterion(torch.ones(1, 3, requires_grad=True)).sum().backward()
        assert stopwatch.read() == 4 and waited == [7]  # two passes, forward and backward, a tick each
        assert stopwatch.read() == 0 and waited == [7]


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """As the command line sets it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(False)  # which would fill new tensors, a kernel each


@pytest.fixture(scope="module", params=[1, 3], ids=["gray", "colour"])
def images(request):
    """300 digits."""
    loaded = data.load("digits", limit=300)
    return dataclasses.replace(loaded, train=loaded.train.expand(-1, request.param, -1, -1).contiguous())


def run(images, out, options, **more):
    torch.manual_seed(0)
    if options.method == "cpc":
        draw = torch.Generator().manual_seed(0)
        sounds = [torch.randint(-999, 999, (3000 + i,), generator=draw).short() for i in range(300)]
        method, train = options.build(None), speech.Clips.of(sounds)
    else:
        method, train = options.build(images), images.train
    state = loop.train(method, train, options, out, **more)
    return {name: x.cpu() for name, x in method.state_dict().items()}, state


@on_gpu
@per_method
def test_it_trains_without_waiting_and_resumes_at_the_same_bits(images, tmp_path, options):
    def report(state, progress) -> None:
        """The figures are read, and waited for, at every tenth step."""
        assert loop.READ_EVERY == 10
        torch.cuda.set_sync_debug_mode("error" if 11 <= state.step < 19 else "default")

    try:
        whole, state = run(images, tmp_path / "whole", options, report=report)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.step == len(state.losses) == 24 and 0 < state.loss_share < 1
    assert state.losses[-1] < state.losses[0] or options.method in ("moco", "nnclr")  # whose queue is easy at first
    with pytest.raises(loop.Interrupted):
        run(images, tmp_path / "cut", options, report=stop_at(7))
    torch.cuda.manual_seed(123)  # the state of another process
    resumed, resumed_state = run(images, tmp_path / "cut", options, checkpoint=checkpoints.load(tmp_path / "cut"))
    assert resumed_state.losses == state.losses
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@on_gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["simclr bf16", "moco", "cpc"])
def test_compiled_or_not_it_learns_the_same(images, tmp_path, name):
    torch.compiler.reset()
    plain, state = run(images, tmp_path / "plain", METHODS[name])
    compiled, compiled_state = run(images, tmp_path / "compiled", dataclasses.replace(METHODS[name], compile=True))
    assert compiled.keys() == plain.keys() and 0 < compiled_state.loss_share < 1
    assert compiled_state.losses[0] == pytest.approx(state.losses[0], rel=0.02)
    assert compiled_state.losses[-1] == pytest.approx(state.losses[-1], rel=0.1)


@on_gpu
def test_the_result_names_the_gpu_and_its_memory(tmp_path):
    out = tmp_path / "run"
    for command in (
        ["simclr", "--data", "digits", "--epochs", "2", "--device", "cuda", "--out", out],
        ["evaluate", out, "--labels", "0.05"],
        ["export", out, "--out", tmp_path / "encoder.safetensors"],
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main([str(part) for part in command])
        assert not exit.value.code
    result = json.loads((out / "result.json").read_text())
    assert result["device"] == "cuda" and result["device_name"] == torch.cuda.get_device_name()
    assert result["peak_memory_mib"] > 0 and result["images_per_s"] > 0 and 0 < result["loss_share"] < 1
    assert (out / "report.png").exists()
