"""The Python that stands in docs/, as it stands there."""

import re
from pathlib import Path
from types import SimpleNamespace

DOCS = Path(__file__).parents[2] / "docs"


def run(page: str, heading: str) -> SimpleNamespace:
    """Runs the first block of Python between a heading and the next one; returns what it defines."""
    section = re.search(rf"^##? {re.escape(heading)}\n(.*?)(?=^## |\Z)", (DOCS / page).read_text(), re.M | re.S)
    block = re.search(r"^```python\n(.*?)^```", section[1], re.M | re.S)
    defined: dict = {}
    exec(compile(block[1], f"{page}, {heading}", "exec"), defined)
    return SimpleNamespace(**defined)
