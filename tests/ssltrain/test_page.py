"""The page of a run: what is in it, that it needs nothing else, and what it makes of names and of much data."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from ssltrain import config, page, panels, report
from ssltrain.evaluate import Evaluation
from ssltrain.images import Images
from ssltrain.loop import State
from ssltrain.speech import Clips, Speech

NAMES = ["<script>alert(1)</script>", "a&b\"'", "\udcff\ntwo $lines", "\u65e5\u672c"]
RESULT = {"parameters": 1000, "features": 16, "seed": 0, "data": NAMES[0]}


def pretend_run(data, steps=40, **options):
    """The arguments of `page.write` for a run whose features are noise around the centre of a class."""
    train, test = data.train_labels, data.test_labels
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(len(NAMES), 16, generator=random)
    features = [centres[rows] + torch.randn(len(rows), 16, generator=random) for rows in (train, test)]
    columns = {"linear": "linear probe", "knn": "20-NN"}
    rows = {"": "trained", "raw_": "raw pixels"}
    accuracies = {row + column: 0.5 for row in rows for column in columns}
    predictions = (test + (torch.rand(len(test), generator=random) < 0.5)) % len(NAMES)
    evaluation = Evaluation(
        accuracies, rows, columns, {"": 16, "raw_": 192}, *features, test, data.classes, predictions
    )
    losses = torch.rand(steps, generator=random).tolist()
    state = State("fp32", steps, 1.0, samples=100, losses=losses, stats={"top1": losses, "purity": losses})
    wanted = config.from_dict({"method": "simclr", "data": NAMES[0]} | options, "")
    views = torch.rand(2 * panels.PAIRS, *data.train.shape[1:], generator=random)
    result = RESULT | {"method": "simclr"}
    drawn = report.panels("simclr", state, evaluation, lambda axes: panels.draw_pairs(axes, views))
    return wanted, result, state, data, evaluation, drawn


def images(count, size):
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) * len(NAMES) // count
    return Images(NAMES[0], pixels, labels, pixels[::2], labels[::2], NAMES)


class Tags(HTMLParser):
    """Which tags there are, and all addresses."""

    def __init__(self, content: str):
        super().__init__()
        self.tags, self.addresses = [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]


def test_a_page_is_whole_and_needs_nothing_else(tmp_path):
    run = pretend_run(images(40, 8), epochs=3)
    page.write(tmp_path / "report.html", *run)
    content = (tmp_path / "report.html").read_text("utf-8")
    found = Tags(content)
    assert "script" not in found.tags and "link" not in found.tags and "@import" not in content
    assert len(found.addresses) > 70 and all(re.match("data:image/png|#", address) for address in found.addresses)
    assert not re.search(r"url\((?!#)", content)
    for svg in re.findall("<svg.*?</svg>", content, re.DOTALL):
        ElementTree.fromstring(svg)
    assert found.tags.count("svg") == 6 and "<figcaption>purity</figcaption>" in content
    headings = re.findall("<h2>(.*?)</h2>", content)
    assert headings == ["What was run", "Accuracies", "Training", "What was learned", "Nearest training samples"]
    assert "--epochs 3 --precision fp32" in content and "<td>--epochs</td><td>3</td>" in content
    assert (
        "&lt;script&gt;alert(1)" in content and "a&amp;b&quot;&#x27;" in content and "\\udcff\\ntwo $lines" in content
    )


def test_the_nearest_images_are_marked_by_their_class(tmp_path):
    *_, data, evaluation, _ = run = pretend_run(images(40, 8))
    page.write(tmp_path / "report.html", *run)
    content = (tmp_path / "report.html").read_text("utf-8")
    rows = torch.arange(0, 20, 2)
    right = data.train_labels[evaluation.nearest(rows, 6)] == data.test_labels[rows, None]
    assert 0 < right.sum() < 60
    assert [mark == "right" for mark in re.findall('<div class="(right|wrong)">', content)] == right.flatten().tolist()
    assert content.count("✓&nbsp;") == right.sum()


@pytest.mark.slow
def test_much_noise_stays_below_two_megabytes(tmp_path):
    """As PNG cannot make noise smaller, and of a line of noise no point can be left out, this is the most there is."""
    page.write(tmp_path / "report.html", *pretend_run(images(2400, 96), steps=20_000))
    assert 300_000 < (tmp_path / "report.html").stat().st_size < 2_000_000


def test_of_speech_there_are_words_and_speakers(tmp_path):
    clips = Clips.of([torch.zeros(100, dtype=torch.int16)] * 12)
    words, speakers = torch.arange(12) % 2, torch.arange(12) % 3
    data = Speech("said", clips, clips, words, words, speakers, speakers, ["no", "<yes>"], ["ann", "bob", "eve"], 8000)
    features = torch.eye(12) + 0.5 * words[:, None]
    evaluation = Evaluation(
        {"word": 0.5, "speaker": float("nan")},
        {"": "trained"},
        {"word": "word", "speaker": "speaker"},
        {"": 12},
        features,
        features,
        words,
        data.words,
        words,
    )
    state = State("fp32", 4, 1.0, losses=[3.0, 2.0, 1.0, 0.5])
    wanted = config.from_dict({"method": "cpc", "data": "said"}, "")
    drawn = report.panels("cpc", state, evaluation, lambda axes: panels.draw_steps(axes, torch.tensor([0.5, 0.25])))
    page.write(tmp_path / "report.html", wanted, RESULT | {"method": "cpc"}, state, data, evaluation, drawn)
    content = (tmp_path / "report.html").read_text("utf-8")
    assert "✓&nbsp;&lt;yes&gt;<br>bob" in content and "How often the frame to come" in content and "<img" not in content
    assert '<td class="number">-</td>' in content and report.NO_LABELS in content


def test_the_confusion_is_that_of_the_predictions():
    from matplotlib.figure import Figure

    *_, evaluation, _ = pretend_run(images(40, 8))
    axes = Figure().add_subplot()
    report.draw_confusion(axes, evaluation, evaluation.predictions)
    shares = axes.images[0].get_array()
    assert np.allclose(shares.sum(1), 100)
    is_second = evaluation.labels == 1
    taken_for_third = (evaluation.predictions[is_second] == 2).float().mean()
    assert shares[1, 2] == pytest.approx(100 * float(taken_for_third)) and taken_for_third > 0
