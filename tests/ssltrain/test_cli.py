"""The command line from end to end, and what it says about mistakes: one sentence, exit code 2, no traceback."""

import json
import os
import signal
import subprocess
import sys
import types

import pytest
from ssltrain import cli, methods

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


@pytest.fixture
def no_picture(monkeypatch):
    """For runs that are about something else: it takes longer than the training."""
    from ssltrain import page, report

    monkeypatch.setattr(report, "draw", lambda *_: None)
    monkeypatch.setattr(page, "write", lambda *_: None)


def test_a_run_leaves_accuracies_json_and_report_and_is_not_lost_unasked(capsys, tmp_path, request):
    out, figures = tmp_path / "run", tmp_path / "new" / "figures.json"
    code, text, _ = ssltrain(capsys, *SHORT, "--out", out, "--json", figures)
    assert code == 0 and "linear probe" in text and str(out / "report.png") in text
    result = json.loads(figures.read_text())
    assert KEYS <= result.keys() and result == json.loads((out / "result.json").read_text())
    assert result["method"] == "simclr" and result["data"] == "digits" and result["precision"] == "fp32"
    assert (result["samples"], result["encoder_passes"]) == (2 * 5 * 256, 2)
    assert (result["features"], result["parameters"]) == (128, 92_896)
    assert result["linear"] > 0.9 and result["raw_linear"] > 0.9 and 0 < result["loss_share"] < 1
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG" and str(out / "report.html") in text
    page = (out / "report.html").read_text("utf-8")
    assert f"<td>{result['linear']:.3f}" in page.replace(' class="number"', "")
    assert "ssltrain simclr --data digits --epochs 2 --threads 1 --device cpu --precision fp32" in page
    assert "nearest to it" in page and "What the linear probe takes for what" in page and page.count("<svg") == 5
    assert "epochs: 2" in (out / "config.yaml").read_text() and any((out / "tensorboard").iterdir())

    request.getfixturevalue("no_picture")
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


def test_ctrl_c_saves_and_says_how_to_go_on(capsys, tmp_path, monkeypatch, no_picture):
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


@pytest.fixture(scope="module")
def moco_run(tmp_path_factory):
    """A finished run of MoCo and its folder."""
    out = tmp_path_factory.mktemp("moco") / "run"
    options = ["--epochs", "3", "--queue", "512", "--threads", "1", "--precision", "fp32", "--limit", "600"]
    with pytest.raises(SystemExit) as exit, pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssltrain.report.draw", lambda *_: None)
        patch.setattr("ssltrain.page.write", lambda *_: None)
        cli.main(["moco", "--data", "digits", *options, "--out", str(out)])
    assert not exit.value.code
    return out


def test_evaluate_says_what_the_run_said(capsys, tmp_path, monkeypatch, moco_run):
    from ssltrain import finetune

    monkeypatch.setattr(finetune, "RECIPES", [finetune.Recipe(1e-3, 40, 0), finetune.Recipe(1e-7, 1, 0)])
    path = tmp_path / "figures.json"
    labels = ["--labels", "0.05,0.1", "--draws", 2]
    code, text, _ = ssltrain(capsys, "evaluate", moco_run, *labels, "--beside", moco_run, "--json", path)
    figures, result = json.loads(path.read_text()), json.loads((moco_run / "result.json").read_text())
    accuracies = [row + column for row in ("", "raw_", "untrained_") for column in ("linear", "knn")]
    assert code == 0 and all(figures[key] == result[key] for key in accuracies)
    assert all(figures["beside_" + key] == figures[key] for key in ("linear", "knn")) and "other run" in text
    assert [(of["share"], of["images"], of["draws"]) for of in figures["fine_tuning"]] == [(0.05, 30, 2), (0.1, 59, 2)]
    for of in figures["fine_tuning"]:
        assert 0.1 < of["scratch"] < 1 and 0.1 < of["fine_tuned"] < 1 and of["beside"] == of["fine_tuned"]
        assert of["trials"] == 2 and of["scratch_recipe"]["steps"] == of["fine_tuned_recipe"]["steps"] == 40
        assert f"{of['fine_tuned']:.3f} ± {of['fine_tuned_spread']:.3f}" in text


def test_evaluate_on_other_images_makes_them_as_those_of_the_run(capsys, tmp_path, moco_run):
    draw_images(tmp_path / "set", [f"{c}/{i}" for c in ("ant", "bee") for i in range(20)], size=12)
    path = tmp_path / "figures.json"
    code, text, _ = ssltrain(capsys, "evaluate", moco_run, "--data", tmp_path / "set", "--json", path)
    figures = json.loads(path.read_text())
    assert code == 0 and "the images are made 8 x 8, of 1 channels, as those of the run are" in text
    assert all(0 <= figures[row + "linear"] <= 1 for row in ("", "raw_", "untrained_"))


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_embed(capsys, tmp_path, moco_run, suffix):
    import numpy as np
    import safetensors
    from PIL import Image

    for i in range(3):
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 70 * i, 3)).save(tmp_path / "images" / "a" / f"{i}.png")
    (tmp_path / "images" / "a" / "3.png").write_bytes(b"no image")
    out = tmp_path / f"features.{suffix}"
    code, _, error = ssltrain(capsys, "embed", moco_run, "--data", tmp_path / "images", "--out", out)
    assert code == 0 and "a/3.png" in error
    if suffix == "npz":
        found = np.load(out)
        features, names = found["features"], found["names"].tolist()
    else:
        with safetensors.safe_open(out, "np") as file:
            features, names = file.get_tensor("features"), json.loads(file.metadata()["names"])
    assert names == ["a/0.png", "a/1.png", "a/2.png"] and features.shape == (3, 128) and features.std(0).max() > 0


def test_embed_takes_what_a_run_takes(capsys, tmp_path, moco_run):
    import numpy as np

    out = tmp_path / "features.npz"
    code, text, _ = ssltrain(capsys, "embed", moco_run, "--data", "digits", "--out", out)
    found = np.load(out)
    assert code == 0 and found["features"].shape == (1797, 128) and "1,797 x 128 features of digits" in text
    assert found["names"][0] == "train/0" and found["names"][-1] == "test/358"
    code, _, error = ssltrain(capsys, "embed", moco_run, "--data", "mnist5k", "--out", out)
    assert code == 2 and "its images are of 28 x 28 pixels, those of the run of 8 x 8" in error


def test_export(capsys, tmp_path, moco_run):
    from safetensors.torch import load_file
    from ssltrain.encoders import ConvNet

    out = tmp_path / "encoder.safetensors"
    assert ssltrain(capsys, "export", moco_run, "--out", out)[0] == 0
    ConvNet(1).load_state_dict(load_file(out))


def test_a_run_of_a_gpu_that_is_not_here_can_be_used(capsys, tmp_path, moco_run):
    import shutil

    import torch
    from ssltrain import checkpoints

    run = shutil.copytree(moco_run, tmp_path / "run")
    checkpoint = torch.load(run / checkpoints.CHECKPOINT, weights_only=True)
    checkpoint["config"]["device"] = "cuda:63"
    torch.save(checkpoint, run / checkpoints.CHECKPOINT)
    assert ssltrain(capsys, "export", run, "--out", tmp_path / "encoder.safetensors")[0] == 0
    code, _, error = ssltrain(capsys, "moco", "--resume", "--out", run)
    assert code == 2 and "--device cuda:63" in error


TINY = ["--batch-size", 8, "--threads", 1, "--precision", "fp32", "--device", "cpu", "--dim", 8, "--epochs", 2]


def draw_images(folder, names: list[str], size: int = 8) -> None:
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for name in names:
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (size, size), np.uint8)).save(path)


@pytest.mark.parametrize("classes", [["."], ["ant"]], ids=["none", "one"])
def test_without_labels_it_trains_and_says_that_there_is_nothing_to_probe(capsys, tmp_path, classes):
    draw_images(tmp_path / "set", [f"{c}/{i}" for c in classes for i in range(20)])
    out = tmp_path / "run"
    code, text, _ = ssltrain(capsys, "simclr", "--data", tmp_path / "set", *TINY, "--out", out)
    assert code == 0 and "20 training images of 8 x 8 pixels, grayscale, no labels" in text
    assert text.count("there are no labels to probe with") == 2 and (out / "report.png").stat().st_size > 10_000
    result = json.loads((out / "result.json").read_text())
    assert result["linear"] is None and result["raw_knn"] is None and "no labels to probe with" in result["note"]
    assert result["steps"] == 4 and result["loss"] > 0
    code, text, _ = ssltrain(capsys, "evaluate", out, "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert code == 0 and figures["knn"] is None and "no labels to probe with" in figures["note"]
    code, _, error = ssltrain(capsys, "evaluate", out, "--labels", 0.5)
    assert code == 2 and "has no labels to train on" in error and error.count("\n") == 1
    features = tmp_path / "features.npz"
    code, text, _ = ssltrain(capsys, "embed", out, "--data", tmp_path / "set", "--out", features)
    assert code == 0 and "20 x 128 features" in text


def test_names_that_cannot_be_drawn_or_printed_cost_neither_figures_nor_report(capsys, tmp_path):
    names = ["$5_$10", "$\\bad{", "_hidden", "\udcff\udcfe", "two\nlines", "日本", "long" * 40]
    draw_images(tmp_path / "$set_$1\udcff", [f"{c}/{i}" for c in names for i in range(5)])
    out = tmp_path / "run"
    code, text, error = ssltrain(capsys, "simclr", "--data", tmp_path / "$set_$1\udcff", *TINY, "--out", out)
    assert code == 0 and "7 classes" in text and not error
    assert (out / "report.png").stat().st_size > 10_000 and "$5_$10" in (out / "report.html").read_text("utf-8")
    assert 0 <= json.loads((out / "result.json").read_text())["linear"] <= 1


def test_a_picture_that_fails_costs_no_figures(capsys, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(*_, **__):
        raise ValueError("no such\nfont")

    draw_images(tmp_path / "set", [f"{c}/{i}" for c in ("ant", "bee") for i in range(10)])
    monkeypatch.setattr(Figure, "savefig", fail)
    out, figures = tmp_path / "run", tmp_path / "figures.json"
    code, text, error = ssltrain(capsys, "simclr", "--data", tmp_path / "set", *TINY, "--out", out, "--json", figures)
    assert code == 0 and "linear probe" in text and "raw pixels" in text
    names = "report.png", "report.html"
    assert error == "".join(f"warning: {name} could not be drawn (no such font).\n" for name in names)
    assert 0 <= json.loads(figures.read_text())["linear"] <= 1 and not any((out / name).exists() for name in names)


def test_every_file_that_is_left_out_is_named_in_the_run(capsys, tmp_path, no_picture):
    draw_images(tmp_path / "set", [f"{c}/{i}" for c in ("train/ant", "train/bee", "extra/ant") for i in range(10)])
    for i in range(9):
        (tmp_path / "set" / "train" / "ant" / f"bad{i}.png").write_bytes(b"no image")
    (tmp_path / "set" / "labels.csv").write_text("1")
    out = tmp_path / "run"
    code, text, error = ssltrain(capsys, "simclr", "--data", tmp_path / "set", *TINY, "--out", out)
    assert code == 0 and "warning: 9 files that do not decode were left out" in error
    assert f"all 20 files that are left out: {out / 'left_out.txt'}" in text
    lines = (out / "left_out.txt").read_text().splitlines()
    expected = [f"extra/ant/{i}.png: outside of the train and test class folders" for i in range(10)]
    expected += [f"train/ant/bad{i}.png (UnidentifiedImageError): that do not decode" for i in range(9)]
    assert lines == [*expected, "labels.csv: hidden or of another kind"]
    draw_images(tmp_path / "set", [f"train/ant/bad{i}" for i in range(9)])
    for gone in (*(tmp_path / "set" / "extra" / "ant").iterdir(), tmp_path / "set" / "labels.csv"):
        gone.unlink()
    assert ssltrain(capsys, "simclr", "--data", tmp_path / "set", *TINY, "--out", out)[0] == 0
    assert not (out / "left_out.txt").exists()


def test_16_bit_images_are_read_with_the_range_of_the_run(capsys, tmp_path, no_picture):
    import numpy as np
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 4096, (20, 8, 8)).astype(np.uint16)
    for part, scale in (("set", 1), ("dark", 8)):  # the latter would be taken as 10 bits
        (tmp_path / part).mkdir()
        for i, pixels in enumerate(values // scale):
            Image.fromarray(pixels).save(tmp_path / part / f"{i:02}.png")
    out = tmp_path / "run"
    assert ssltrain(capsys, "simclr", "--data", tmp_path / "set", *TINY, "--out", out)[0] == 0
    code, text, _ = ssltrain(capsys, "embed", out, "--data", tmp_path / "dark", "--out", tmp_path / "f.npz")
    assert (
        code == 0 and "20 images of integer values of more than 8 bits were scaled: 0 to 4096 became 0 to 256" in text
    )


def test_a_run_goes_on_on_another_device_with_moved_data_and_other_threads(capsys, tmp_path, monkeypatch, no_picture):
    import torch
    from ssltrain import checkpoints, report

    draw_images(tmp_path / "set", [str(i) for i in range(24)])
    start = ["simclr", "--data", tmp_path / "set", *TINY, "--out"]
    assert ssltrain(capsys, *start, tmp_path / "whole")[0] == 0

    def interrupt(self, state, progress):
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(report.Progress, "update", interrupt)
        assert ssltrain(capsys, *start, run)[0] == 130
    checkpoint = torch.load(run / checkpoints.CHECKPOINT, weights_only=True)  # as a GPU would have left it
    checkpoint["config"]["device"] = "cuda:63"
    checkpoint["rng"]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    for group in checkpoint["optimizer"]["param_groups"]:
        group["fused"] = True
    torch.save(checkpoint, run / checkpoints.CHECKPOINT)
    (tmp_path / "set").rename(tmp_path / "moved")
    draw_images(tmp_path / "fewer", [str(i) for i in range(23)])
    draw_images(tmp_path / "others", [str(i) for i in range(1, 25)][::-1])

    def resumed(*more) -> tuple[int, str]:
        code, _, error = ssltrain(capsys, "simclr", "--resume", "--out", run, *more)
        assert error.count("\n") == error.count(".\n")
        return code, error

    code, error = resumed()
    assert code == 2 and "--device cuda:63, which torch cannot use here; name another, such as --device cpu." in error
    code, error = resumed("--device", "cpu")
    assert code == 2 and "no such folder" in error
    code, error = resumed("--device", "cpu", "--data", tmp_path / "fewer")
    assert code == 2 and "are 23 samples of (1, 8, 8), those of the run 24 of (1, 8, 8); name the same data" in error
    code, error = resumed("--device", "cpu", "--data", tmp_path / "moved", "--lr", 1)
    assert code == 2 and "--lr was 0.002" in error
    before = {file.name: file.read_bytes() for file in run.glob("*.[ps]*t*")}
    code, error = resumed("--device", "cpu", "--threads", 2, "--data", tmp_path / "others")
    assert code == 0 and "warning: --device cpu and --threads 2 may round otherwise than the run did" in error
    assert "are not to the bit those that the run was started with" in error
    for file in run.glob("weights-*"):
        file.unlink()
    for name, content in before.items():
        (run / name).write_bytes(content)
    code, error = resumed("--device", "cpu", "--data", tmp_path / "moved")
    assert code == 0 and "it will not end at the same bits" in error and "not to the bit" not in error
    ends = [checkpoints.load(folder) for folder in (tmp_path / "whole", run)]
    assert all(torch.equal(ends[0]["method"][k], ends[1]["method"][k]) for k in ends[0]["method"])
    assert ends[1]["config"]["device"] == "cpu" and ends[1]["config"]["data"] == str(tmp_path / "moved")
    assert ssltrain(capsys, "simclr", "--resume", "--out", run)[2] == ""  # of the moved data, unasked


def test_yaml_gives_options_and_flags_count_before_it(capsys, tmp_path, no_picture):
    file, out = tmp_path / "options.yaml", tmp_path / "run"
    file.write_text("method: simclr\ndata: digits\nepochs: 7\nlr: 1e-3\nbatch-size: 128\nlimit: 300\nthreads: 1\n")
    code, _, _ = ssltrain(capsys, "simclr", "--config", file, "--epochs", 2, "--precision", "fp32", "--out", out)
    text = (out / "config.yaml").read_text()
    assert code == 0 and all(line in text for line in ("epochs: 2\n", "lr: 0.001\n", "batch_size: 128\n"))
    assert ssltrain(capsys, "simclr", "--config", out / "config.yaml", "--out", out)[0] == 0  # the run again
    code, _, error = ssltrain(capsys, "simclr", "--preset", "cifar10", "--config", file, "--out", out)
    assert code == 2 and "holds a run with other options" in error
    preset = ["--preset", "cifar10", "--config", file, "--epochs", 2, "--precision", "fp32", "--batch-size", 200]
    code, _, _ = ssltrain(capsys, "simclr", *preset, "--out", tmp_path / "preset")
    text = (tmp_path / "preset" / "config.yaml").read_text()
    expected = ("optimizer: lars\n", "temperature: 0.5\n", "lr: 0.001\n", "batch_size: 200\n", "epochs: 2\n")
    assert code == 0 and all(line in text for line in expected)  # the preset, the file, the flags
    for content, expected in (
        ("epoch: 3", "epoch is no option of simclr"),
        ("method: moco", "is for moco"),
        ("- 3", "option: value"),
        ("lr: [1", "cannot be read as YAML"),
        ("lr: fast", "--lr 'fast': must be a number"),
        ("epochs: true", "--epochs True: must be a whole number"),
    ):
        file.write_text(content)
        code, _, error = ssltrain(capsys, "simclr", "--config", file)
        assert code == 2 and expected in error and error.count("\n") == 1


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_at_random_moments_and_resumed_it_ends_at_the_same_bits(tmp_path):
    import random
    import time

    import torch
    from ssltrain import checkpoints

    options = ["--data", "digits", "--epochs", "150", "--threads", "1", "--precision", "fp32", "--save-every", "0.2"]
    command = [sys.executable, "-m", "ssltrain", "moco", *options, "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    longest = time.monotonic() - start
    draw, kills, arguments = random.Random(0), 0, []
    while kills < 20:
        process = subprocess.Popen([*command, str(killed), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            _, error = process.communicate(timeout=draw.uniform(0.3, 1) * longest / 2)
            assert process.returncode == 0, error
            arguments = ["--overwrite"]  # it was done: begin again
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            arguments = ["--resume"] if (killed / checkpoints.CHECKPOINT).exists() else []
    process = subprocess.run([*command, str(killed), *arguments], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    ends = [checkpoints.load(folder) for folder in (whole, killed)]
    assert all(torch.equal(ends[0]["method"][k], ends[1]["method"][k]) for k in ends[0]["method"])
    assert ends[0]["state"]["losses"] == ends[1]["state"]["losses"]
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, killed)]
    timed = {"seconds", "images_per_s", "loss_share", "evaluation_seconds"}
    assert all(results[0][k] == results[1][k] for k in results[0].keys() - timed)


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
        (["simclr", "--width", "3"], "--width 3: choose one of 1, 2, 4"),
        (["simclr", "--width", "2", "--encoder", "timm:resnet10t"], "--width 2: is for convnet and resnet18"),
        (
            ["simclr", "--data", "digits", "--held-out", "1438"],
            "--held-out 1438: would leave no training image of class",
        ),
        (["moco", "--resume", "--out", "/no/such/run"], "holds no run"),
        (["moco", "--queue", "0"], "--queue"),
        (["moco", "--shuffle-bn", "3"], "--shuffle-bn 3: does not cut a --batch-size of 256 into equal parts"),
        (["moco", "--shuffle-bn", "8", "--version", "3"], "--shuffle-bn 8: is for versions 1 and 2"),
        (["moco", "--symmetric", "--version", "3"], "--symmetric: is for versions 1 and 2"),
        (["cpc"], "--data is needed"),
        (["cpc", "--data", "/no/such/folder"], "/no/such/folder"),
        (["simclr", "--config", "/no/such/file.yaml"], "--config /no/such/file.yaml"),
        (["simclr", "--encoder", "timm:no_such_model", "--out", "{tmp}"], "--encoder timm:no_such_model"),
        (["evaluate", "/no/such/run"], "holds no run"),
        (["evaluate", "{tmp}", "--from-middle"], "--from-middle: says where fine-tuning starts; give --labels"),
        (["evaluate", "{tmp}", "--labels", "0.1,2"], "--labels 0.1,2: must be shares"),
        (["evaluate", "{tmp}", "--labels", "some"], "--labels some: must be shares"),
        (["evaluate", "{tmp}", "--draws", "0"], "--draws 0"),
        (["embed", "{tmp}", "--data", "x", "--out", "a.txt"], "--out"),
        (["export", "{tmp}"], "holds no run"),
        (["barlow"], "barlow"),
        (["simclr", "--data", "{tmp}/" + 300 * "long"], "File name too long."),
        (["simclr", "--resume", "--out", "{tmp}/" + 300 * "long"], "File name too long."),
        (["evaluate", "{tmp}/" + 300 * "long"], "File name too long."),
    ],
)
def test_mistakes_are_one_sentence(capsys, tmp_path, arguments, expected):
    code, _, error = ssltrain(capsys, *[a.format(tmp=tmp_path) for a in arguments])
    assert code == 2 and expected in error
    assert error.startswith("ssltrain: ") and error.count("\n") == 1


@pytest.mark.parametrize("method", methods.NAMES)
def test_help_names_every_flag(capsys, method):
    assert method in ssltrain(capsys)[1]
    code, text, _ = ssltrain(capsys, method, "--help")
    assert all(f"\n  {name}: " in text for name in methods.config_of(method).presets)
    flags = "data epochs minutes batch-size seed threads resume out json lr device precision compile config save-every"
    flags += " temperature" if method != "supervised" else ""
    assert code == 0 and all(f"--{flag} " in text or f"--{flag}\n" in text for flag in flags.split())


def test_a_file_that_is_no_method_is_named(monkeypatch, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("class Options:\n    'Help.'\n")
    monkeypatch.setitem(methods._FILES, "mine", path)
    with pytest.raises(TypeError, match="mine.py must have a class named ..Config"):
        methods.summary_of("mine")
    monkeypatch.setitem(sys.modules, "ssltrain.methods.mine", types.ModuleType("mine"))
    with pytest.raises(TypeError, match="mine.py must have a configuration whose method is 'mine'"):
        methods.config_of("mine")


def test_help_ends_every_sentence(capsys):
    code, text, _ = ssltrain(capsys, "--help")
    lines = " ".join(text.partition("Commands:")[2].split())
    commands = ("simclr", "moco", "cpc", "evaluate", "embed", "export")
    assert code == 0 and "..." not in lines
    for command, following in zip(commands, (*commands[1:], None), strict=True):
        about = lines.partition(f"{command} ")[2].partition(f" {following} ")[0] if following else lines
        assert about.rstrip().endswith("."), about


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
