"""Methods side by side: what runs, in what order, what happens to it, and what the report says of it."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from ssltrain import UsageError, cli, methods
from ssltrain.compare import figures, jobs, studies, tables, tuning
from ssltrain.compare.course import Course
from ssltrain.compare.plan import Entry, Plan, Tuning, settings

DIGITS = {"data": "digits", "epochs": "1", "threads": "1", "precision": "fp32", "device": "cpu"}


def ssltrain(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        cli.main([str(a) for a in arguments])
    return exit.value.code or 0, *capsys.readouterr()


def plan(out: Path, *names: str, **more) -> Plan:
    given = {"seeds": 2, "common": DIGITS, "of_method": {}} | more
    return Plan([Entry.of(name) for name in names], out, **given)


def pretend(job: jobs.Job, linear: float, losses: list[float] | None = None, **more) -> None:
    """Leave what a run would have left."""
    job.folder.mkdir(parents=True, exist_ok=True)
    state = {"losses": losses or [3.0, 2.0, 1.0], "samples": 300}
    torch.save({"state": state}, job.folder / jobs.CHECKPOINT)
    names = ("linear", "knn", "raw_linear", "raw_knn", "untrained_linear", "untrained_knn")
    figures = dict.fromkeys(names, 0.25) | {"linear": linear, "seconds": 10.0, "samples": 300, "encoder_passes": 2.0}
    figures |= {"features": 128, "parameters": 1000, "data": "digits", "device": "cpu", "threads": 1} | more
    job.result.write_text(json.dumps(figures))


def test_entries_and_options():
    entry = Entry.of("moco:queue=1024,version=2")
    assert entry.options == {"queue": "1024", "version": "2"} and entry.name == "moco-queue-1024-version-2"
    some = Entry.of("simclr:augmentations=crop,gray,batch-size=64")
    assert some.options == {"augmentations": "crop,gray", "batch_size": "64"}
    assert some.name == "simclr-augmentations-crop,gray-batch-size-64"
    common, of_method = settings(["lr=1e-3", "moco:queue=64", "encoder=timm:resnet10t", "simclr:flip=no"])
    assert common == {"lr": "1e-3", "encoder": "timm:resnet10t"}
    assert of_method == {"moco": {"queue": "64"}, "simclr": {"flip": "no"}}


def test_the_options_of_a_run_are_those_of_all_of_its_method_and_its_own(tmp_path):
    options = {"common": DIGITS | {"lr": "1e-3"}, "of_method": {"moco": {"queue": "64", "flip": "yes"}}}
    both = plan(tmp_path, "moco", "moco:queue=128", "simclr", **options)
    configs = [both.config(entry, seed=1) for entry in both.entries]
    assert [config.lr for config in configs] == [1e-3] * 3 and all(config.seed == 1 for config in configs)
    assert [config.queue for config in configs[:2]] == [64, 128] and configs[2].flip is None
    job = jobs.Job.training("", "", configs[1], tmp_path / "run")
    assert " ".join(job.command()[2:]).startswith("ssltrain moco --data digits --epochs 1 --lr 0.001 --seed 1")
    assert {"--flip", "--queue", "128"} <= set(job.arguments)


@pytest.mark.parametrize("study", studies.STUDIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_studies_are_of_options_that_methods_take(tmp_path, study, channels):
    entries = studies.of(study, [], epochs=5, shape=[channels, 32, 32])
    there = Plan(entries, tmp_path, 1, DIGITS, {}, study=study)
    there.check()
    axis = studies.STUDIES[study].axis
    assert len(entries) > 1 and all((entry.x is None) == (axis == "") for entry in entries)
    if study == "augmentations":
        from ssltrain import augment

        for entry in entries:
            augment.build(channels, (8, 8), names=entry.options["augmentations"])


def test_a_study_is_of_the_methods_that_are_named():
    assert [entry.name for entry in studies.of("time", ["moco"], 5, [1, 8, 8])] == [
        f"moco-epochs-{e}" for e in (1, 2, 4, 5)
    ]
    assert {entry.method for entry in studies.of("negatives", ["moco"], 5, [1, 8, 8])} == {"moco"}
    with pytest.raises(UsageError, match="^moco: is no method of --study head; choose of simclr.$"):
        studies.of("head", ["moco"], 5, [1, 8, 8])


def test_the_candidates_of_cpc_on_images_are_those_of_the_patches_it_is_given():
    def numbers(**given: str) -> list[float]:
        return [entry.x for entry in studies.of("bound", ["cpc_images"], 5, [3, 32, 32], given)]

    assert numbers()[0] == 16 * 7 and numbers(patch="16")[0] == 16 * 3 and numbers(stride="8")[0] == 16 * 4
    with pytest.raises(UsageError, match="--patch 64: is more than the 32 pixels"):
        numbers(patch="64")


def python_job(tmp_path, name: str, code: str, result: bool = True) -> jobs.Job:
    """A job that is some code."""
    path = tmp_path / name / "result.json"
    code += f"\nopen({str(path)!r}, 'a').write('[1]')" if result else ""
    job = jobs.Job("any", name, (code,), path)
    object.__setattr__(job, "command", lambda: [sys.executable, "-u", "-c", code])
    return job


def test_one_that_fails_is_named_and_the_others_go_on(tmp_path, capsys):
    runner = jobs.Runner(["any"] * 4, 4)
    done = [
        python_job(tmp_path, "good", "print('simclr  50%  loss 1.0  7 s left')"),
        python_job(tmp_path, "mistaken", "import sys; sys.exit('ssltrain: --lr 9: is wrong.')", result=False),
        python_job(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)", result=False),
        python_job(tmp_path, "last", "pass"),
    ]
    with runner.alone(tmp_path):
        for job in done + done[:1]:
            runner.run(job)
    assert runner.failed.keys() == {"mistaken", "killed"}
    assert runner.failed["mistaken"].startswith("--lr 9: is wrong. (see ")
    assert runner.failed["killed"].startswith("killed by signal 9")
    assert done[0].found() == done[3].found() == [1]  # once
    text = capsys.readouterr().out
    assert "[1/4] good: 50%  loss 1.0  7 s left" in text and "[4/4] last: starts" in text
    assert "is wrong" in (done[1].folder / jobs.LOG).read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_goes_to_the_run_which_ends_by_itself(tmp_path, number):
    wait = (
        "import signal, time\nheard = []\nfor n in (2, 15): signal.signal(n, lambda n, _: heard.append(n))\n"
        "print('ready')\nwhile not heard: time.sleep(0.01)\ntime.sleep(0.2)"
    )
    job, runner, log = python_job(tmp_path, "slow", wait), jobs.Runner(["any"], 1), tmp_path / "slow" / jobs.LOG

    def interrupt() -> None:
        while not (log.exists() and "ready" in log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=interrupt, daemon=True).start()
    with runner.alone(tmp_path), pytest.raises(jobs.Stopped):
        runner.run(job)
    assert job.found() == [1] and signal.getsignal(number) is before


def test_what_another_comparison_left_behind_is_waited_for(tmp_path, capsys):
    """It holds the lock as long as the run does that it began."""
    first, second = jobs.Runner(["any"], 1), jobs.Runner([], 0)
    with first.alone(tmp_path):
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, pass_fds=[first.lock.fileno()])
    threading.Timer(0.3, orphan.stdin.close).start()
    with second.alone(tmp_path):
        assert orphan.wait(5) is not None
    assert "is at work there; waiting" in capsys.readouterr().out


def test_a_folder_with_other_options_is_refused(tmp_path):
    there = plan(tmp_path, "moco")
    for job in Course(there).runs(there.entries[0]):
        pretend(job, 0.5)
        from ssltrain.config import write_yaml

        write_yaml(job.folder / "config.yaml", there.config(there.entries[0], int(job.folder.name[-1])))
    Course(plan(tmp_path, "moco", common=DIGITS | {"threads": "2"}, seeds=3))  # computed elsewhere, and one more
    for other in ({"lr": "1"}, {"data": "mnist5k"}):
        with pytest.raises(UsageError, match=f"holds a run with other options: its --{next(iter(other))} was"):
            Course(plan(tmp_path, "moco", common=DIGITS | other))


def test_the_report_has_mean_and_spread_of_what_is_there(tmp_path):
    there = plan(tmp_path, "simclr", "moco:queue=64", "moco", seeds=3)
    course = Course(there)
    for job, linear in zip(course.runs(there.entries[0]), (0.5, 0.6, 0.7), strict=True):
        pretend(job, linear)
    pretend(course.runs(there.entries[1])[0], 0.4, encoder_passes=None)
    course = Course(there)
    course.runner.failed["moco seed 0"] = "no luck"
    course.write()
    page = (tmp_path / "report.md").read_text()
    assert "| simclr | 0.600 ± 0.100 | 0.250 ± 0.000 | 0.250 ± 0.000 | 3 | 10 s | 300 | 2 | 128 | 1,000 |" in page
    assert "| moco-queue-64 | 0.400 | 0.250 | 0.250 | 1 | 10 s | 300 | - |" in page and "| moco | - |" in page
    assert "4 of 9 runs are done" in page and "| raw pixels | 0.250 | 0.250 |" in page and "seed 0: no luck" in page
    report = json.loads((tmp_path / "report.json").read_text())
    linear = [entry["linear"] for entry in report["entries"]]
    assert linear[0] == {"mean": 0.6, "spread": 0.1} and linear[1]["spread"] is None and linear[2]["mean"] is None
    assert len(report["entries"][0]["runs"]) == 3
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert (course.runner.total, course.runner.number) == (9, 4)


def test_the_page_links_to_the_pages_of_runs_and_says_what_is_missing(tmp_path):
    there = plan(tmp_path / "out", "simclr", "moco:queue=64")
    simclr, moco = map(Course(there).runs, there.entries)
    pretend(simclr[0], 0.5)
    (simclr[0].folder / "report.html").write_text("")
    simclr[1].folder.mkdir()
    (simclr[1].folder / jobs.CHECKPOINT).write_text("")
    course = Course(there)
    course.runner.failed["moco-queue-64 seed 0"] = "no <luck>"
    course.write()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<a ") == 1 and '<a href="simclr/seed-0/report.html">' in page and page.count("<svg") == 2
    assert "simclr seed 1</td><td>was begun" in page and "moco-queue-64 seed 1</td><td>is missing" in page
    assert "moco-queue-64 seed 0</td><td>failed: no &lt;luck&gt;" in page and "1 of 4 runs are done" in page
    assert "ssltrain compare simclr moco:queue=64 --data digits --epochs 1" in page
    assert "<script" not in page and "@import" not in page and " src=" not in page


def test_a_page_that_fails_costs_a_warning(tmp_path, capsys, monkeypatch):
    there = plan(tmp_path, "simclr")
    pretend(Course(there).runs(there.entries[0])[0], 0.5)

    def fail(*_: object) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr("ssltrain.compare.plots._draw_bars", fail)
    Course(there).write()
    error = capsys.readouterr().err
    assert all(f"warning: report.{kind} could not be written (" in error for kind in ("png", "html"))
    assert (tmp_path / "report.md").exists() and not (tmp_path / "report.html").exists()


def test_the_command_of_a_plan_makes_it_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Course, "__init__", lambda self, plan: made.append(plan))
    monkeypatch.setattr(Course, "go", lambda self: None)
    options = {"common": {"data": "digits", "epochs": "2", "lr": "1e-3"}, "of_method": {"moco": {"momentum": "0.9"}}}
    studied = [studies.of("negatives", ["moco"], 2, [1, 8, 8]), "negatives"]
    named = [[Entry.of("simclr:augmentations=crop,gray"), Entry.of("moco:queue=64,version=2")], None]
    for entries, study in (studied, named):
        there = Plan(entries, tmp_path, 2, **options, tune=Tuning(3, 90, 1), labels="0.1", study=study)
        with pytest.raises(SystemExit):
            cli.main(there.command()[1:])
        assert made[-1] == there


@pytest.mark.parametrize("study", studies.STUDIES)
def test_every_study_is_drawn(tmp_path, study):
    there = Plan(studies.of(study, [], 4, [1, 8, 8]), tmp_path, 2, DIGITS, {}, study=study)
    course = Course(there)
    for i, entry in enumerate(there.entries[:-1]):
        for job in course.runs(entry):
            pretend(job, 0.1 + 0.02 * i)
    course.write()
    assert (tmp_path / "report.png").stat().st_size > 20_000


def test_the_bound_is_log_n_minus_the_loss_at_the_end(tmp_path):
    there = Plan([Entry("simclr", {"batch_size": "8"}, 15, "simclr")], tmp_path, 1, DIGITS, {}, study="bound")
    job = Course(there).runs(there.entries[0])[0]
    pretend(job, 0.5, losses=[9.0] * 38 + [1.0, 2.0])
    row = figures.Row.of(there, there.entries[0], [job], [])
    assert row.bound() == [pytest.approx(math.log(15) - 1.5)]
    assert row.curves[0][0][-1] == 300 and row.curves[0][1][-2:] == [1.0, 2.0]


def test_labels_and_transfer_are_measured_of_the_runs_that_are_there(tmp_path):
    there = plan(tmp_path, "simclr", "moco", labels="0.01,0.1", transfer="some/flowers.zip")
    course = Course(there)
    simclr, moco = there.entries
    for job in course.runs(simclr):
        pretend(job, 0.5)
    first, second, labels = course.evaluations(simclr)
    run = str(tmp_path / "simclr" / "seed-0")
    result = str(labels.result)
    assert labels.arguments == ("evaluate", run, "--labels", "0.01,0.1", "--json", result) and not labels.begun
    assert first.arguments[:4] == ("evaluate", run, "--data", "some/flowers.zip") and "seed-1" in second.arguments[1]
    assert [getattr(Course(there).runner, name) for name in ("total", "number")] == [10, 2]
    for job, linear in ((first, 0.3), (second, 0.4)):
        job.result.write_text(json.dumps({"linear": linear, "knn": None, "raw_linear": 0.1, "untrained_linear": 0.2}))
    tuned = {"share": 0.01, "images": 14, "draws": 3, "fine_tuned": 0.7, "fine_tuned_spread": 0.01}
    tuned |= {"scratch": 0.6, "scratch_spread": 0.02}
    labels.result.write_text(json.dumps({"linear": 0.5, "knn": 0.5, "fine_tuning": [tuned]}))
    Course(there).write()
    page = (tmp_path / "report.md").read_text()
    assert "| simclr | 1% | 14 | 0.700 ± 0.010 | 0.600 ± 0.020 |" in page
    assert "supcon and supervised have learned from all labels" in page
    assert "## On some/flowers.zip" in page and "| simclr | 0.350 ± 0.071 | - | 0.200 ± 0.000 | 0.100 ± 0.000 |" in page
    report = json.loads((tmp_path / "report.json").read_text())["entries"]
    assert report[0]["fine_tuning"] == [tuned] and len(report[0]["transfer"]) == 2 and report[1]["transfer"] == []


def test_trials_are_drawn_alike_around_the_defaults_and_the_best_one_counts(tmp_path):
    there = plan(tmp_path, "simclr", "moco:lr=0.1", tune=Tuning(5, 300, epochs=7))
    simclr, moco = there.entries
    draws = [[tuning.drawn(there, entry, trial) for trial in range(5)] for entry in (simclr, moco)]
    assert draws[0][0] == {"lr": 2e-3, "temperature": 0.2} and draws[1][0] == {"lr": 0.1, "temperature": 0.1}
    for one, other in zip(*draws, strict=True):
        assert other["lr"] == pytest.approx(50 * one["lr"], rel=0.01)
        assert other["temperature"] == pytest.approx(one["temperature"] / 2, rel=0.01)
        assert 2e-3 / 4 <= one["lr"] <= 2e-3 * 4 and 0.1 <= one["temperature"] <= 0.4
    assert len({one["lr"] for one in draws[0]}) == 5
    trials = tuning.trials(there, simclr)
    assert all({"--held-out", "300", "--epochs", "7"} <= set(job.arguments) for job in trials)
    assert Course(there).runs(simclr) == [] and len(Course(there).trials) == 10
    for job, linear in zip(trials[:4], (0.3, 0.6, 0.6, 0.2), strict=True):  # the last one failed
        pretend(job, linear)
    tuning.choose(there, simclr)
    assert tuning.chosen(there, simclr) == draws[0][1] and tuning.chosen(there, moco) is None
    runs = Course(there).runs(simclr)
    assert str(draws[0][1]["lr"]) in runs[0].arguments and "--held-out" not in runs[0].arguments
    pretend(runs[0], 0.5)
    page = tables.markdown(there, [figures.Row.of(there, simclr, runs, [])], {})
    assert "Options that were chosen" in page and "| 0.600 | 0.200 to 0.600 |" in page
    with pytest.raises(UsageError, match="were chosen among 5 trials"):
        Course(plan(tmp_path, "simclr", tune=Tuning(6, 300)))


def test_list_and_help_name_methods_data_and_studies(capsys):
    code, text, _ = ssltrain(capsys, "list")
    assert code == 0 and all(f"  {name} " in text for name in (*methods.NAMES, "mnist5k", "digits"))
    code, text, _ = ssltrain(capsys, "compare", "--help")
    assert code == 0 and all(f"\n  {name} " in text for name in studies.STUDIES)


def test_list_needs_no_torch():
    code = "import sys; from ssltrain.commands import app; app(['list'], standalone_mode=False)"
    code += "; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"


def test_dry_run_shows_commands(capsys, tmp_path):
    options = ["--data", "digits", "--images", 3000, "--seeds", 1, "--out", tmp_path, "--set", "moco:queue=64"]
    code, text, _ = ssltrain(capsys, "compare", "simclr", "moco", *options, "--dry-run")
    lines = text.splitlines()
    assert code == 0 and len(lines) == 3 and lines[2] == "2 runs in all, 0 of them done"
    assert lines[0].startswith("ssltrain simclr --data digits --epochs 3 ")
    assert lines[1].startswith("ssltrain moco ") and "--queue 64" in lines[1] and not list(tmp_path.iterdir())
    code, text, _ = ssltrain(capsys, "compare", "simclr", *options[:-2], "--tune", 2, "--held-out", 100, "--dry-run")
    assert code == 0 and text.count("--held-out 100") == 2 and "then 1 runs each of simclr, with the options" in text


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "name methods, such as simclr moco, or a --study"),
        (["barlow"], "barlow: is no method; choose of"),
        (["cpc"], "cpc: is not for images"),
        (["moco", "moco"], "moco: is there twice"),
        (["moco:queue"], "'queue' is no option with its value"),
        (["moco:queue=0"], "--queue 0: must be 1 or more"),
        (["simclr:queue=4"], "queue is no option of simclr"),
        (["simclr", "--set", "seed=4"], "seed cannot be set for a comparison; give --seeds"),
        (["simclr", "--set", "moco:queue=4"], "moco is not compared here"),
        (["simclr", "--set", "lr=fast"], "--lr 'fast': must be a number"),
        (["simclr", "--epochs", "1", "--images", "9"], "not both"),
        (["--study", "all"], "--study all: choose one of survey"),
        (["simclr", "--labels", "1%"], "--labels 1%: must be shares"),
        (["simclr", "--tune", "2"], "--held-out 5000: there are 1438 training images"),
    ],
)
def test_mistakes_are_one_sentence(capsys, tmp_path, arguments, expected):
    code, _, error = ssltrain(capsys, "compare", *arguments, "--data", "digits", "--out", tmp_path)
    assert code == 2 and expected in error and error.startswith("ssltrain: ") and error.count("\n") == 1


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_stopped_and_started_again_it_goes_on(tmp_path):
    out = tmp_path / "out"
    options = ["--data", "digits", "--epochs", "15", "--seeds", "1", "--out", str(out), "--set", "save_every=0"]
    sets = [f"{name}={value}" for name, value in DIGITS.items() if name not in ("data", "epochs")]
    command = [sys.executable, "-m", "ssltrain", "compare", "simclr:batch_size=64", "moco", *options]
    command += [part for text in sets for part in ("--set", text)]
    first, second = (out / name / "seed-0" for name in ("simclr-batch-size-64", "moco"))

    def start_and_end(number: int, once: Path) -> str:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not once.exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(number)
        return process.communicate()[0]

    start_and_end(signal.SIGKILL, once=first / jobs.CHECKPOINT)
    text = start_and_end(signal.SIGINT, once=second / jobs.CHECKPOINT)
    assert "Stopped. The same command goes on." in text and not (second / "result.json").exists()
    assert (first / "result.json").exists() and "simclr-batch-size-64" in (out / "report.md").read_text()
    before = (first / "result.json").stat().st_mtime_ns
    step = torch.load(second / jobs.CHECKPOINT, weights_only=True)["state"]["step"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (first / "result.json").stat().st_mtime_ns == before and "[2/2] moco seed 0" in run.stdout
    assert 0 < step < json.loads((second / "result.json").read_text())["steps"]
    report = json.loads((out / "report.json").read_text())
    assert all(len(entry["runs"]) == 1 and entry["linear"]["mean"] > 0.9 for entry in report["entries"])
    assert not report["failed"]
