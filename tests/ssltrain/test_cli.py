"""The command line from end to end, and what it says about mistakes: one sentence, exit code 2, no traceback."""

import json
import subprocess
import sys

import pytest
from ssltrain import cli

KEYS = {"method", "data", "linear", "knn", "raw_linear", "raw_knn", "untrained_linear", "untrained_knn"} | {
    "images_per_s",
    "loss_share",
    "seconds",
    "seed",
}
SHORT = ["simclr", "--data", "digits", "--epochs", "2", "--threads", "1", "--precision", "fp32"]


def ssltrain(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        cli.main([str(a) for a in arguments])
    return exit.value.code or 0, *capsys.readouterr()


def test_a_run_leaves_accuracies_json_and_report_and_is_not_lost_unasked(capsys, tmp_path):
    out, figures = tmp_path / "run", tmp_path / "new" / "figures.json"
    code, text, _ = ssltrain(capsys, *SHORT, "--out", out, "--json", figures)
    assert code == 0 and "linear probe" in text and str(out / "report.png") in text
    result = json.loads(figures.read_text())
    assert KEYS <= result.keys() and result == json.loads((out / "result.json").read_text())
    assert result["method"] == "simclr" and result["data"] == "digits" and result["precision"] == "fp32"
    assert result["linear"] > 0.9 and result["raw_linear"] > 0.9 and 0 < result["loss_share"] < 1
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"

    code, _, error = ssltrain(capsys, *SHORT, "--out", out, "--seed", 1)
    assert code == 2 and "holds a run with other options" in error
    code, text, _ = ssltrain(capsys, *SHORT, "--out", out)
    assert code == 0 and "is replaced" in text
    again = json.loads((out / "result.json").read_text())
    assert all(again[k] == result[k] for k in ("linear", "knn", "untrained_linear", "untrained_knn", "loss"))
    code, _, error = ssltrain(capsys, "simclr", "--resume", "--out", out, "--epochs", 3)
    assert code == 2 and "--epochs was 2" in error
    code, _, _ = ssltrain(capsys, "simclr", "--resume", "--out", out)
    assert code == 0 and json.loads((out / "result.json").read_text())["linear"] == result["linear"]


def test_ctrl_c_saves_and_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    import os
    import signal

    from ssltrain import report

    def interrupt(self, state, progress):
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(report.Progress, "update", interrupt)
        code, text, _ = ssltrain(capsys, *SHORT, "--out", out)
    assert code == 130 and f"ssltrain simclr --resume --out {out}" in text
    code, _, error = ssltrain(capsys, *SHORT, "--out", out)
    assert code == 2 and "unfinished" in error
    code, text, _ = ssltrain(capsys, "simclr", "--resume", "--out", out)
    assert code == 0 and json.loads((out / "result.json").read_text())["steps"] == 10


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["simclr", "--epochs", "many"], "--epochs"),
        (["simclr", "--epoch-count", "3"], "--epoch-count"),
        (["simclr", "--epochs", "1", "--minutes", "1"], "not both"),
        (["simclr", "--data", "/no/such/folder"], "/no/such/folder"),
        (["simclr", "--temperature", "0"], "--temperature"),
        (["simclr", "--resume", "--out", "/no/such/run"], "holds no run"),
        (["simclr", "--data", "digits", "--out", "/dev/null/run"], "--out"),
        (["simclr", "--data", "digits", "--out", "{tmp}", "--json", "{tmp}"], "--json"),
        (["barlow"], "barlow"),
    ],
)
def test_mistakes_are_one_sentence(capsys, tmp_path, arguments, expected):
    code, _, error = ssltrain(capsys, *[a.format(tmp=tmp_path) for a in arguments])
    assert code == 2 and expected in error
    assert error.startswith("ssltrain: ") and error.count("\n") == 1


def test_help_names_every_flag(capsys):
    assert "simclr" in ssltrain(capsys)[1]
    code, text, _ = ssltrain(capsys, "simclr", "--help")
    flags = "data epochs minutes batch-size temperature seed threads resume out json encoder lr dim device precision"
    assert code == 0 and all(f"--{flag} " in text or f"--{flag}\n" in text for flag in flags.split())


def test_without_the_extra_one_sentence_says_what_to_install():
    hide = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda name: None if name == 'kornia' else f(name)"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"{hide}; from ssltrain.cli import main; main(['simclr'])"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert (
        run.stderr == "ssltrain: kornia not found; install what the trainers need with: pip install 'sslkern[train]'\n"
    )
