"""One file per method: the mathematics in its docstring, a module, and a configuration.

A method is a `Method`; `_method.py` says what that has. Its configuration, a dataclass named ..Config whose `method` is
the name of the file, has its options, `build(data)`, which gives the method, and as docstring the help of its command.
A file that is here is a command: there is no list to add it to.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssltrain.config import Config

_FILES = {path.stem: path for path in sorted(Path(__file__).parent.glob("[!_]*.py"))}
NAMES = tuple(_FILES)


def config_of(name: str) -> type[Config]:
    """The configuration of a method."""
    for x in vars(importlib.import_module(f"{__name__}.{name}")).values():
        if _is_of(x, name):
            return x
    raise TypeError(f"{_FILES[name]} must have a configuration whose method is {name!r}; see ssltrain.methods")


def _is_of(x: object, name: str) -> bool:
    return isinstance(x, type) and vars(x).get("method") == name


def summary_of(name: str) -> str:
    """The first paragraph of the help of a method, without importing it: torch takes two seconds, and a list of
    methods should not."""
    classes = (node for node in ast.parse(_FILES[name].read_text("utf-8")).body if isinstance(node, ast.ClassDef))
    about = next((ast.get_docstring(node) for node in classes if node.name.endswith("Config")), None)
    if about is None:
        raise TypeError(f"{_FILES[name]} must have a class named ..Config with a docstring, the help of its command")
    return " ".join(about.partition("\n\n")[0].split())
