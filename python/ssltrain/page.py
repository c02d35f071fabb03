"""A run as one HTML page: what was run, how good it is, and pictures of how it went and of what was learned.

All is in the file, `page.html` filled in: pictures as SVG, whose lines and letters have the colours of the page, or as
PNG; there is nothing to load and no script. Names come from the disk, so that all text goes through `text`.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ssltrain import config, report
from ssltrain.checkpoints import replacing
from ssltrain.evaluate import Evaluation
from ssltrain.files import shown
from ssltrain.loop import State
from ssltrain.panels import BLUE
from ssltrain.report import Panel

if TYPE_CHECKING:
    from ssltrain.images import Images
    from ssltrain.speech import Speech

INK = "#010203"  # stands for the colour of the page's text
COLOURS = {INK: "currentColor", BLUE: "var(--blue)"}
STYLE: Any = {  # of matplotlib
    name: INK for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
} | {"figure.facecolor": "none", "axes.facecolor": "none", "svg.fonttype": "none", "svg.hashsalt": "ssltrain"}
SHOWN, NEAREST = 10, 6  # test samples, and how many training samples beside each
SIDE = 48  # pixels of a picture at most


def write(
    path: Path,
    options: config.Config,
    result: dict,
    state: State,
    data: Images | Speech,
    evaluation: Evaluation,
    panels: dict[str, Panel],
) -> None:
    """Write the page to `path`; `panels` are those of `report.panels`."""
    stats = [lambda axes, of=of: report.draw_stat(axes, *of) for of in state.stats.items() if of[0] != "top1"]
    predictions = evaluation.predictions
    learned = [panels["embedding"]]
    if predictions is not None:
        learned.append(lambda axes: report.draw_confusion(axes, evaluation, predictions))
    sections = {
        "What was run": _what_was_run(options, result, state, data),
        "Accuracies": _accuracies(evaluation) + figures([panels["accuracies"]]),
        "Training": figures([panels["curve"], panels["views"], *stats]),
        "What was learned": figures(learned),
        "Nearest training samples": _nearest(data, evaluation),
    }
    fill(path, report.title(result), report.headline(result, state), sections)


def fill(path: Path, title: str, headline: str, sections: dict[str, str]) -> None:
    """Write the template to `path`, with sections in HTML by their titles; those without content are left out."""
    page = Template(Path(__file__).with_name("page.html").read_text("utf-8")).substitute(
        title=text(title),
        headline=text(headline),
        across=1 + NEAREST,
        sections="\n".join(f"<h2>{text(name)}</h2>\n{content}" for name, content in sections.items() if content),
    )
    with replacing(path) as file:
        file.write(page.encode())


def text(anything: object) -> str:
    """It as it can stand in HTML."""
    return escape(shown(str(anything)))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """Cells are HTML, of which those of the last `numbers` columns are numbers."""
    kinds = [""] * (len(head) - numbers) + [' class="number"'] * numbers

    def line(cells: Sequence[str], tag: str = "td") -> str:
        inside = "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{inside}</tr>"

    lines = "\n".join([line(head, "th"), *map(line, rows)])
    return f'<div class="wide"><table>\n{lines}\n</table></div>'


def _what_was_run(options: config.Config, result: dict, state: State, data: Images | Speech) -> str:
    """The data, the command, and the options that are not the default."""
    processes = result.get("processes", 1)
    start = "ssltrain" if processes == 1 else f"torchrun --nproc-per-node {processes} -m ssltrain"
    exact = dataclasses.replace(options, precision=state.precision)
    command = f"{start} {options.method} {shlex.join(config.as_flags(exact))}"
    options_of = config.fields(type(options)).items()
    rows = [
        (text(config.flag(name)), text(value), text(field.metadata["help"]))
        for name, field in options_of
        if (value := getattr(options, name)) not in (field.default, None)
    ]
    about = f"{data.describe()}. Encoder: {result['parameters']:,} parameters, {result['features']:,} features."
    return f"<p>{text(about)}</p>\n<pre>{text(command)}</pre>\n" + table(["option", "value", ""], rows)


def _accuracies(evaluation: Evaluation) -> str:
    """The table that the run prints."""
    columns = evaluation.columns
    rows = []
    for prefix, name in evaluation.rows.items():
        figures = [evaluation.accuracies[prefix + key] for key in columns]
        shares = ["-" if math.isnan(x) else f"{x:.3f}" for x in figures]
        rows.append([text(name), f"{evaluation.widths[prefix]:,}", *shares])
    head = ["test accuracy", "features", *map(text, columns.values())]
    note = f"<p>{report.NO_LABELS}</p>" if any(map(math.isnan, evaluation.accuracies.values())) else ""
    return table(head, rows, numbers=1 + len(columns)) + note


def figures(panels: Iterable[Panel], height: float = 3.9) -> str:
    """Panels beside each other, where there is the room; `height` is in inches at a width of 5.2."""
    return f'<div class="figures">\n{"".join(_figure(panel, height) for panel in panels)}</div>'


@report.drawing()
def _figure(panel: Panel, height: float) -> str:
    """A panel as SVG, with its title above."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, height), layout="constrained")
        axes: Axes = figure.add_subplot()
        panel(axes)
        title = axes.get_title()
        axes.set_title("")
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<g id="[\w.]+">', "<g>", svg)  # the same in every picture
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, of_page in COLOURS.items():
        svg = svg.replace(colour, of_page)
    return f"<figure><figcaption>{text(title)}</figcaption>\n{svg}</figure>\n"


def _nearest(data: Images | Speech, evaluation: Evaluation) -> str:
    """Some test samples, and beside each the training samples with the most similar features."""
    if evaluation.part != "test":
        return ""
    rows = torch.arange(0, len(evaluation.features), max(1, len(evaluation.features) // SHOWN))[:SHOWN]
    cells = []
    for row, nearest in zip(rows.tolist(), evaluation.nearest(rows, NEAREST).tolist(), strict=True):
        label, detail, pixels = data.example(row, test=True)
        cells.append(_sample(label, detail, pixels))
        for its_label, detail, pixels in (data.example(other, test=False) for other in nearest):
            cells.append(_sample(its_label, detail, pixels, its_label == label if label else None))
        cells += ["<div></div>"] * (NEAREST - len(nearest))
    marked = ", ✓ where the class is right" if evaluation.classes else ""
    about = f"The first of each row is a test sample, the others are nearest to it by the cosine of features{marked}."
    return f'<p>{about}</p>\n<div class="nearest">\n' + "\n".join(cells) + "\n</div>"


def _sample(label: str, detail: str, pixels: Tensor | None, right: bool | None = None) -> str:
    kind, mark = {None: ("sample", ""), True: ("right", "✓&nbsp;"), False: ("wrong", "✗&nbsp;")}[right]
    picture = f'<img src="{_png(pixels)}" alt="{text(label)}">' if pixels is not None else ""
    return f'<div class="{kind}">{picture}{mark}{text(label)}{f"<br>{text(detail)}" if detail else ""}</div>'


def _png(pixels: Tensor) -> str:
    """uint8 [C, H, W] as a data URI, at most SIDE pixels wide and high."""
    plain = pixels.permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(plain if plain.shape[2] == 3 else plain[:, :, 0])
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
