"""`--compile` changes the speed of a run and nothing else; where it cannot be, one sentence says so."""

import copy
import dataclasses
import json

import pytest
import torch
from ssltrain import UsageError, checkpoints, cli, data, loop, speech
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

from .test_loop import COMMON, WITHOUT_DIM, stop_at

COMMON, WITHOUT_DIM = {**COMMON, "epochs": 2}, {**WITHOUT_DIM, "epochs": 2}
METHODS = [
    CMCConfig(**COMMON),
    pytest.param(CMCConfig(**COMMON, candidates="bank", negatives=64), marks=pytest.mark.long),
    pytest.param(DeepInfoMaxConfig(**COMMON, prior=0.1), marks=pytest.mark.slow),
    pytest.param(CPCImagesConfig(**COMMON, patch=4, steps=1, context_width=32), marks=pytest.mark.slow),
    SimCLRConfig(**COMMON),
    MoCoConfig(**COMMON, queue=256),
    MoCoConfig(**COMMON, version=3),
    pytest.param(MoCoConfig(**COMMON, queue=256, shuffle_bn=8), marks=pytest.mark.long),
    CPCConfig(batch_size=16, epochs=2, width=8, units=8, precision="fp32", threads=1, device="cpu"),
    pytest.param(InstDiscConfig(**COMMON, negatives=64), marks=pytest.mark.slow),
    pytest.param(NNCLRConfig(**COMMON, support=256), marks=pytest.mark.slow),
    pytest.param(SupConConfig(**COMMON), marks=pytest.mark.slow),
    pytest.param(SupervisedConfig(**WITHOUT_DIM), marks=pytest.mark.slow),
]
IDS = ["cmc", "cmc bank", "deep_infomax", "cpc_images"]
IDS += ["simclr", "moco", "moco v3", "moco shuffled", "cpc", "instdisc", "nnclr", "supcon", "supervised"]


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were compiled, by a backend that leaves them as they are."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


def run(out, options, **more):
    torch.manual_seed(0)
    if options.method == "cpc":
        sounds = [torch.randint(-999, 999, (3000 + i,)).short() for i in range(64)]
        method, train = options.build(None), speech.Clips.of(sounds)
    else:
        images = data.load("digits", limit=300)
        method, train = options.build(images), images.train
    state = loop.train(method, train, options, out, **more)
    return method.state_dict(), state


@pytest.mark.parametrize("options", METHODS, ids=IDS)
def test_checkpoints_do_not_tell_and_runs_resume(graphs, tmp_path, options):
    plain, plain_state = run(tmp_path / "plain", options)
    assert not graphs
    options = dataclasses.replace(options, compile=True)
    whole, state = run(tmp_path / "whole", options)
    assert graphs and 0 < state.loss_share < 1
    assert whole.keys() == plain.keys() == checkpoints.load(tmp_path / "whole")["method"].keys()
    assert all(torch.equal(whole[name], plain[name]) for name in plain) and state.losses == plain_state.losses
    with pytest.raises(loop.Interrupted):
        run(tmp_path / "cut", options, report=stop_at(3))
    checkpoint = checkpoints.load(tmp_path / "cut")
    for resumed_by in (options, dataclasses.replace(options, compile=False)):
        resumed, _ = run(tmp_path / "cut", resumed_by, checkpoint=copy.deepcopy(checkpoint))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_where_nothing_compiles_one_sentence_says_so(monkeypatch, tmp_path):
    torch.compiler.reset()
    options = SimCLRConfig(**COMMON, compile=True)

    def backend(graph, inputs):
        raise RuntimeError("no compiler found.\nA long explanation follows.")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **more: compile(function, backend=backend, **more))
    with pytest.raises(UsageError, match=r"^--compile: .*no compiler found\); leave it out\.$"):
        run(tmp_path, options)

    def refuse(function, **more):
        raise RuntimeError("torch.compile is not supported on this Python")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(UsageError, match=r"^--compile: .*not supported on this Python\); leave it out\.$"):
        run(tmp_path, options)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_compiled_run_from_end_to_end(capsys, tmp_path):
    torch.compiler.reset()
    out = tmp_path / "run"
    common = ["--data", "digits", "--epochs", "3", "--threads", "1", "--precision", "fp32", "--out", out]
    for command in (
        ["simclr", *common, "--compile"],
        ["evaluate", out, "--json", tmp_path / "figures.json"],
        ["export", out, "--out", tmp_path / "encoder.safetensors"],
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main([str(part) for part in command])
        assert not exit.value.code, capsys.readouterr().err
    result, figures = (json.loads(path.read_text()) for path in (out / "result.json", tmp_path / "figures.json"))
    assert result["linear"] == figures["linear"] > 0.9 and 0 < result["loss_share"] < 1
    assert "compile: true" in (out / "config.yaml").read_text()
