"""The report of a comparison as one HTML page, by the template and the helpers of the page of a run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from ssltrain import page
from ssltrain.compare import plots, tables
from ssltrain.compare.figures import Row
from ssltrain.compare.jobs import Job
from ssltrain.compare.plan import Plan


def write(path: Path, plan: Plan, rows: list[Row], failed: dict[str, str], left: Sequence[Job]) -> None:
    """Write the page to `path`; `left` are the runs and evaluations that are not done."""
    links = {row.entry.name: _linked(plan, row, path.parent) for row in rows}
    first, *others = (_section(table, links) for table in tables.tables(plan, rows))
    sections = {
        first[0]: first[1] + _pictures([row for row in rows if row.runs], plan.study),
        **dict(others),
        "Not done": _not_done(plan, rows, failed, left),
        "The command that repeats it": f"<pre>{page.text(shlex.join(plan.command()))}</pre>",
    }
    page.fill(path, tables.title(plan, rows), tables.headline(plan, rows), sections)


def _section(table: tables.Table, links: dict[str, str]) -> tuple[str, str]:
    """Its title, and the table in HTML, where the first column has the links of an entry."""
    head, *lines = table.lines
    cells = [[links.get(name, page.text(name)), *map(page.text, others)] for name, *others in lines]
    drawn = page.table(list(map(page.text, head)), cells, numbers=len(head) - table.numbers)
    return table.title, f"<p>{page.text(table.about)}</p>\n{drawn}"


def _linked(plan: Plan, row: Row, start: Path) -> str:
    """The name of an entry, and the pages of its runs by their seeds."""
    pages = [(seed, plan.folder(row.entry, f"seed-{seed}") / "report.html") for seed in range(plan.seeds)]
    links = [
        f'<a href="{page.text(quote(os.path.relpath(path, start)))}">seed&nbsp;{seed}</a>'
        for seed, path in pages
        if path.exists()
    ]
    return "<br>".join(filter(None, (page.text(row.entry.name), " ".join(links))))


def _pictures(rows: list[Row], study: str | None) -> str:
    """Of the entries of which something is there."""
    if not rows:
        return ""
    of_study = plots.draw_study(rows, study)
    panels = [plots.draw_bars(rows), plots.draw_losses(rows)]
    return page.figures([*([of_study] if of_study else []), *panels], height=3.9 + 0.3 * len(rows))


def _not_done(plan: Plan, rows: list[Row], failed: dict[str, str], left: Sequence[Job]) -> str:
    """What has failed and why, what was begun, what is missing."""
    states = {job.title: "was begun, and goes on from its checkpoint" if job.begun else "is missing" for job in left}
    states |= {title: f"failed: {why}" for title, why in failed.items()}
    lines = [(page.text(title), page.text(state)) for title, state in states.items()]
    return page.table(("run", ""), lines) if lines else ""
