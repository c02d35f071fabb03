"""Draws docs/figures/<method>.svg: which pairs each method contrasts, read off its loss.

    python -m docs.figures

Rows are anchors, columns are candidates. Of each pair the sign of the derivative of the anchor's loss by their
similarity is drawn: where it is negative, training makes them more alike, where it is positive less, and where it is
zero the pair is not counted. The losses are those of the engine; candidates are orthonormal, so that a derivative by
an anchor, multiplied with a candidate, is that by their similarity alone.
"""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from sslkern.functional import cpc, deep_infomax, info_nce, moco, moco_v3, nce, nnclr, nt_xent, sup_con

FOLDER = Path(__file__).with_name("figures")
CELL, GAP, EDGE, LINE, LETTER = 26, 16, 16, 18, 6.8  # pixels: a pair, between groups, around all, of text, a letter
MARKS = {"positive": "+", "negative": "−", "unused": ""}
STYLE = """
<style>
text { font: 12px sans-serif; text-anchor: middle; fill: #333; }
.left { text-anchor: start; } .right { text-anchor: end; } .head { font-weight: bold; }
rect { stroke: #fff; } .positive { fill: #1f5fa8; } .negative { fill: #f3c9a5; } .unused { fill: #f4f6f8; }
.light { fill: #fff; }
</style>"""


@dataclass
class Pairs:
    """Groups of anchors and of candidates, each with the names in it; how they stand to each other; a caption."""

    anchors: dict[str, str]
    candidates: dict[str, str]
    derivatives: Tensor  # [anchors, candidates]
    caption: str


def derivatives(losses_of: Callable[[Tensor], Tensor], anchors: Tensor, candidates: Tensor) -> Tensor:
    """[A, C]: of the loss of each anchor, by its similarity with each candidate; `losses_of` gives one or the sum."""
    anchors = anchors.clone().requires_grad_()
    losses = losses_of(anchors)
    if losses.ndim == 0:
        return torch.autograd.grad(losses, anchors)[0] @ candidates.T
    rows = [torch.autograd.grad(loss, anchors, retain_graph=True)[0][row] for row, loss in enumerate(losses)]
    return torch.stack(rows) @ candidates.T


def simclr() -> Pairs:
    z = torch.eye(8)
    found = derivatives(lambda z: nt_xent(*z.chunk(2), reduction="none"), z, z)
    views = {"first views": "abcd", "second views": "abcd"}
    return Pairs(views, views, found, "Candidates are all other views of the batch.")


def supcon() -> Pairs:
    z, labels = torch.eye(8), torch.tensor([0, 0, 1, 2] * 2)
    found = derivatives(lambda z: sup_con(z, labels, reduction="none"), z, z)
    views = {"first views": "aabc", "second views": "aabc"}
    return Pairs(views, views, found, "Candidates are all other views of the batch; letters are classes.")


def moco_with_queue() -> Pairs:
    keys = torch.eye(14)
    query = torch.zeros(4, 14)
    found = derivatives(lambda q: moco(q, keys[:4], keys[4:], normalize=False, reduction="none"), query, keys)
    candidates = {"keys of the batch": "abcd", "queue: keys of earlier batches": "·" * 10}
    caption = "Candidates are the own key and the queue; keys of the batch enter it after the step. Versions 1 and 2."
    return Pairs({"queries": "abcd"}, candidates, found, caption)


def moco_without_queue() -> Pairs:
    keys = torch.eye(8)
    query = torch.zeros(8, 8)

    def losses(query: Tensor) -> Tensor:
        return moco_v3(*query.chunk(2), *keys.chunk(2), normalize=False, reduction="sum")

    anchors = {"queries of first views": "abcd", "queries of second views": "abcd"}
    candidates = {"keys of first views": "abcd", "keys of second views": "abcd"}
    caption = "Candidates are the keys of the batch, of the other view each. Version 3."
    return Pairs(anchors, candidates, derivatives(losses, query, keys), caption)


def instdisc() -> Pairs:
    bank = torch.eye(12)
    index = torch.tensor([[2, 0, 4, 5, 11], [5, 1, 3, 8, 11], [9, 0, 2, 6, 7]])  # the own one first
    found = derivatives(lambda q: nce(q, bank, index, normalize=False, reduction="none"), torch.zeros(3, 12), bank)
    caption = "Candidates are the own vector of the bank and some that are drawn from it, for each view others."
    return Pairs({"views": "cfj"}, {"bank: a vector of each image of the data": "abcdefghijkl"}, found, caption)


def cmc() -> Pairs:
    codes = torch.eye(4)
    half = derivatives(lambda q: info_nce(q, codes, normalize=False, reduction="none"), torch.zeros(4, 4), codes)
    found = torch.cat([torch.cat([half, 0 * half], 1), torch.cat([0 * half, half], 1)])
    caption = (
        "Candidates are the codes that the other encoder made of the batch; with --candidates bank, vectors drawn from "
        "a bank with one of each image of the data."
    )
    return Pairs(
        {"lightness": "abcd", "colours": "abcd"}, {"colours of": "abcd", "lightness of": "abcd"}, found, caption
    )


def deep_infomax_pairs() -> Pairs:
    parts = torch.eye(16).view(4, 4, 16)
    found = derivatives(lambda images: deep_infomax(images, parts, "infonce"), torch.zeros(4, 16), parts.flatten(0, 1))
    candidates = {f"parts of {image}": "1234" for image in "abcd"}
    caption = "Candidates are the cells of the last maps of all images of the batch, here four of each."
    return Pairs({"wholes": "abcd"}, candidates, found, caption)


def cpc_images() -> Pairs:
    """Two images of four rows and three columns of patches; contexts in row 0, which overlaps with row 1."""
    patches = torch.eye(24).view(2, 4, 3, 24)  # [image, row, column, D]
    targets = patches[:, 1:].transpose(1, 2).flatten(0, 1)  # [image and column, rows from 1 on, D]
    contexts = torch.zeros(6, 1, 24)

    def losses(contexts: Tensor) -> Tensor:
        later = torch.zeros(6, 2, 24)  # of the rows 1 and 2
        return cpc(torch.cat([contexts, later], 1), targets, torch.eye(24)[None], negatives="sample")

    found = derivatives(losses, contexts, patches.flatten(0, 2)).flatten(0, 1)
    anchors = {f"context of {image}, row 0": "123" for image in "ab"}
    candidates = {f"{image}, row {row}": "123" for image in "ab" for row in range(4)}
    caption = (
        "Candidates are the patches of the row that is predicted, here row 2, the first that shares no pixel with row "
        "0, in all columns of all images of the batch."
    )
    return Pairs(anchors, candidates, found, caption)


def cpc_speech() -> Pairs:
    """Two clips of six frames; contexts at time 1, and the second step from there."""
    frames = torch.eye(12).view(2, 6, 12)
    predictors = torch.stack([torch.zeros(12, 12), torch.eye(12)])

    def losses(contexts: Tensor) -> Tensor:
        all_times = torch.cat([torch.zeros(2, 1, 12), contexts[:, None], torch.zeros(2, 4, 12)], 1)
        return cpc(all_times, frames, predictors)

    found = derivatives(losses, torch.zeros(2, 12), frames.flatten(0, 1))
    candidates = {f"frames of {clip}, by time": "012345" for clip in "ab"}
    caption = (
        "Candidates are the frames of the batch at all times; here the contexts at time 1 predict two steps ahead."
    )
    return Pairs({"contexts": "ab"}, candidates, found, caption)


def nnclr_pairs() -> Pairs:
    support, views = torch.eye(6), torch.eye(6)[:4]
    found = derivatives(  # by the predictions: neighbours have no gradient
        lambda p1: nnclr(views, views, torch.zeros(4, 6), p1, support, normalize=False, reduction="sum"),
        torch.zeros(4, 6),
        views,
    )
    caption = (
        "Anchors are the nearest neighbours, among earlier projections, of first views; candidates are the predictions "
        "of the batch from second views. And likewise with the views exchanged."
    )
    return Pairs({"neighbours of": "abcd"}, {"predictions from": "abcd"}, found.T, caption)


PAIRS: dict[str, Callable[[], Pairs]] = {
    "simclr": simclr,
    "moco": moco_with_queue,
    "moco_v3": moco_without_queue,
    "instdisc": instdisc,
    "cmc": cmc,
    "deep_infomax": deep_infomax_pairs,
    "cpc": cpc_speech,
    "cpc_images": cpc_images,
    "nnclr": nnclr_pairs,
    "supcon": supcon,
}


def places(groups: Sequence[str], start: float, narrowest: float = 0) -> list[list[float]]:
    """Where the cells of each group begin."""
    found = []
    for names in groups:
        wide = max(len(names) * CELL, narrowest)
        found.append([start + (wide - len(names) * CELL) / 2 + at * CELL for at in range(len(names))])
        start += wide + GAP
    return found


def text(x: float, y: float, content: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{f" class={kind!r}" if kind else ""}>{escape(content)}</text>'.replace("'", '"')


def cell(x: float, y: float, kind: str) -> str:
    square = f'<rect x="{x:g}" y="{y:g}" width="{CELL}" height="{CELL}" class="{kind}"/>'
    ink = "light" if kind == "positive" else ""
    return square + (text(x + CELL / 2, y + CELL / 2 + 5, MARKS[kind], ink) if MARKS[kind] else "")


def drawn(pairs: Pairs) -> str:
    """As SVG."""
    shapes = []
    left = EDGE + LETTER * max(map(len, pairs.anchors)) + 28
    top = EDGE + 2 * LINE + 4
    head = max(LETTER * len(name) for name in pairs.candidates) if len(pairs.candidates) < 8 else 0
    across = places(list(pairs.candidates.values()), left, head)
    down = places(list(pairs.anchors.values()), top)
    for (group, names), xs in zip(pairs.candidates.items(), across, strict=True):
        shapes.append(text((xs[0] + xs[-1] + CELL) / 2, EDGE + LINE - 6, group, "head"))
        shapes += [text(x + CELL / 2, top - 6, name) for x, name in zip(xs, names, strict=True)]
    for (group, names), ys in zip(pairs.anchors.items(), down, strict=True):
        shapes.append(text(left - 28, (ys[0] + ys[-1] + CELL) / 2 + 4, group, "head right"))
        shapes += [text(left - 14, y + CELL / 2 + 4, name) for y, name in zip(ys, names, strict=True)]
    for y, row in zip(sum(down, []), pairs.derivatives.tolist(), strict=True):
        for x, by in zip(sum(across, []), row, strict=True):
            shapes.append(cell(x, y, "unused" if abs(by) < 1e-6 else "negative" if by > 0 else "positive"))
    right = max(across[-1][-1] + CELL + EDGE + head / 4, 560)
    y = down[-1][-1] + CELL + GAP
    for x, kind, meaning in zip(
        (EDGE, EDGE + 140, EDGE + 270), MARKS, ("pulled together", "pushed apart", "not counted"), strict=True
    ):
        shapes += [cell(x, y, kind), text(x + CELL + 6, y + CELL / 2 + 4, meaning, "left")]
    y += CELL + LINE
    for line in textwrap.wrap(pairs.caption, int((right - 2 * EDGE) / LETTER)):
        shapes.append(text(EDGE, y, line, "left"))
        y += LINE
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right:g} {y:g}" width="{right:g}">'
    background = f'<path d="M0 0H{right:g}V{y:g}H0z" fill="white"/>'
    return "\n".join([opening + STYLE, background, *shapes, "</svg>", ""])


def figures() -> dict[Path, str]:
    """The files, and what is in them."""
    return {FOLDER / f"{name}.svg": drawn(pairs()) for name, pairs in PAIRS.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, content in figures().items():
        path.write_text(content)
