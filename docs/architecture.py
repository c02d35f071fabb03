"""Draws docs/architecture.svg: the packages in layers, what each is, and who imports whom, read from the code.

    python -m docs.architecture

A package stands one layer below the lowest of those that import it. Of its arrows only those are drawn that do not
follow from others. tests/test_structure.py reads the imports and knows the rules.
"""

import ast
import re
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

from tests.test_structure import MODULES, imports

TARGET = Path(__file__).with_name("architecture.svg")
TRAINERS = Path(__file__).parents[1] / "python" / "ssltrain"
BACKENDS = "reference", "cpu", "triton", "cuda"
WIDTH, BOX, GAP, BETWEEN, LINE = 1200, 340, 20, 44, 15  # pixels: the picture, the widest box, beside and below it, text
LETTER = 6.2  # pixels of a letter, about


def package_of(module: str) -> str:
    """What a module is drawn in: its package, a backend, or, of sslkern and its backends, the file itself."""
    _, *parts = module.split(".")
    if parts[:1] == ["backends"] and len(parts) > 1:
        return f"backends/{parts[1]}" if parts[1] in BACKENDS else f"backends/{parts[1]}.py"
    if not parts:
        return "sslkern"
    return parts[0] if MODULES[f"sslkern.{parts[0]}"].name == "__init__.py" else f"{parts[0]}.py"


def first_sentence(path: Path) -> str:
    words = " ".join(ast.get_docstring(ast.parse(path.read_text())).split()).replace("`", "")
    return re.split(r"[.:;,] |\.$", words)[0]


def packages() -> tuple[dict[str, str], dict[str, set[str]]]:
    """What each package says of itself, and the packages that it imports."""
    said = {"csrc": "The CPU kernels in C++", "ssltrain": first_sentence(TRAINERS / "__init__.py")}
    uses = {"csrc": set(), "ssltrain": set()}
    for module, path in MODULES.items():
        package = package_of(module)
        if path.name == "__init__.py" or package.endswith(".py"):
            said[package] = first_sentence(path)
        found = {"csrc" if source == "sslkern._cpu" else package_of(source) for source, _ in imports(module)}
        uses.setdefault(package, set()).update(found - {package, "sslkern"})  # of sslkern itself: its version
    for path in TRAINERS.rglob("*.py"):
        named = re.findall(r"^\s*(?:from|import) (sslkern[\w.]*)", path.read_text(), re.MULTILINE)
        uses["ssltrain"].update(map(package_of, named))
    return said, uses


def layers_of(uses: dict[str, set[str]]) -> list[list[str]]:
    """The packages from the top down, each one layer below the lowest of those that use it, and near to them."""
    users = {package: [user for user in sorted(uses) if package in uses[user]] for package in sorted(uses)}

    def depth_of(package: str) -> int:
        return 1 + max(map(depth_of, users[package]), default=-1)

    depths = {package: depth_of(package) for package in users}
    layers, place = [], {}
    for depth in range(1 + max(depths.values())):
        layer = [package for package in users if depths[package] == depth]
        layer.sort(key=lambda package: sum(place[user] for user in users[package]) / max(1, len(users[package])))
        place |= {package: (at + 0.5) / len(layer) for at, package in enumerate(layer)}
        layers.append(layer)
    return layers


def reached(package: str, uses: dict[str, set[str]]) -> set[str]:
    """All that a package imports, and what those do."""
    return set().union(*({other} | reached(other, uses) for other in uses[package]))


def drawn() -> str:
    said, uses = packages()
    boxes, shapes, top = {}, [], GAP
    for layer in layers_of(uses):
        wide = min(BOX, (WIDTH - GAP) // len(layer) - GAP)
        left = (WIDTH - len(layer) * (wide + GAP) + GAP) // 2
        texts = [textwrap.wrap(escape(said[package]), int(wide / LETTER) - 2) for package in layer]
        tall = (max(map(len, texts)) + 1) * LINE + 14
        for at, (package, lines) in enumerate(zip(layer, texts, strict=True)):
            x = left + at * (wide + GAP)
            boxes[package] = x + wide // 2, top, top + tall
            shapes.append(f'<rect x="{x}" y="{top}" width="{wide}" height="{tall}" rx="5"/>')
            for number, line in enumerate([package, *lines]):
                weight = ' class="name"' if number == 0 else ""
                shapes.append(f'<text x="{x + wide // 2}" y="{top + 18 + number * LINE}"{weight}>{line}</text>')
        top += tall + BETWEEN
    arrows = []
    for package in sorted(uses):
        further = set().union(*(reached(other, uses) for other in uses[package]))
        for other in sorted(uses[package] - further):
            (x, _, y), (to_x, to_y, _) = boxes[package], boxes[other]
            arrows.append(f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y - 2}" marker-end="url(#head)"/>')
    style = """
<style>
rect { fill: #eef3fa; stroke: #5b7ba6; }
text { font: 11px sans-serif; text-anchor: middle; fill: #333; }
.name { font-weight: bold; font-size: 13px; }
line { stroke: #777; }
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0L8 4L0 8z" fill="#777"/></marker></defs>"""
    height = top - BETWEEN + GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">'
    background = f'<path d="M0 0H{WIDTH}V{height}H0z" fill="white"/>'
    return "\n".join([head + style, background, *arrows, *shapes, "</svg>", ""])


if __name__ == "__main__":
    TARGET.write_text(drawn())
