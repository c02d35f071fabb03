"""Every loss that is exported stands in each table of the tests, the benchmarks and the documentation that
CONTRIBUTING.md tells its author of."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import sslkern

from .distributed import problems, test_contract, test_modules
from .examples import LOSSES, OPS, OTHERS, PUSHES
from .fuzz import INITS
from .fuzz import missing as missing_in_fuzz

CHECKOUT = Path(__file__).parents[1]
EXPORTED = {*sslkern.__all__, *sslkern.functional.__all__, *sslkern.ops.__all__}
FUNCTIONS = set(sslkern.functional.__all__) - OTHERS
MODULES = set(sslkern.losses.__all__)
EXAMPLES = {*LOSSES, *OPS, *PUSHES}


def first_words(names) -> set[str]:
    """Of "sup_con tags" and "mnrl: guide" what comes first: the loss."""
    return {re.match(r"\w+", name).group() for name in names}


def rows(file: str, heading: str) -> str:
    """The rows of the table whose first line begins with `heading`."""
    table = (CHECKOUT / file).read_text().partition(f"\n| {heading} |")[2].partition("\n\n")[0]
    assert table, f"{file} has no table that begins with {heading}"
    return table


def called(text: str) -> set[str]:
    """The names in `name(...)` and `name`."""
    return set(re.findall(r"`(?:sslkern\.)?(\w+)[(`]", text))


def raced() -> set[str]:
    """What the benchmarks take of sslkern.functional."""
    sources = [path.read_text() for path in (CHECKOUT / "benchmarks").glob("*.py")]
    return set(re.findall(r"functional\.(\w+)", "".join(sources)))


# File and table, as CONTRIBUTING.md calls them: the losses that have to stand there, and those that do.
TABLES: dict[str, tuple[set[str], Callable[[], set[str]]]] = {
    "sslkern/__init__.py": (MODULES, lambda: set(sslkern.__all__)),
    "tests/examples.py": (EXPORTED - OTHERS, lambda: first_words(EXAMPLES)),
    "tests/fuzz.py: INITS": (MODULES, lambda: set(INITS)),
    "tests/distributed/problems.py: CASES": (
        FUNCTIONS - {"nt_xent", "info_nce", "clip"},  # these are `of_pairs`, and have tests of their own
        lambda: first_words(problems.CASES),
    ),
    "tests/distributed/test_contract.py: LOSSES": (FUNCTIONS, lambda: first_words(test_contract.LOSSES)),
    "tests/distributed/test_modules.py: MODULES": (MODULES, lambda: set(test_modules.MODULES)),
    "README.md: table of losses": (FUNCTIONS, lambda: called(rows("README.md", "method"))),
    "docs/losses.md": (FUNCTIONS, lambda: called(rows("docs/losses.md", "loss"))),
    "benchmarks/bench_losses.py": (FUNCTIONS - {"alignment", "uniformity"}, raced),  # halves of one that is there
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_has_every_loss(table):
    wanted, found = TABLES[table]
    missing = wanted - found()
    assert not missing, f"add {', '.join(sorted(missing))} to {table}"


@pytest.mark.parametrize("table", TABLES)
def test_contributing_names_the_table(table):
    section = (CHECKOUT / "CONTRIBUTING.md").read_text().partition("\n## A loss\n")[2].partition("\n## ")[0]
    for name in table.split(": "):
        assert name in section, f"say in CONTRIBUTING.md that a new loss goes into {name}"


def test_all_that_is_exported_is_tried_by_the_fuzzer():
    """Primitives, and the methods of memories, too."""
    missing = missing_in_fuzz()
    assert not missing, f"add {missing} to tests/examples.py, or to INITS or EXTRA of tests/fuzz.py"


def test_no_name_is_left_of_what_is_gone():
    """What the tables above leave out, and what they have, is exported."""
    for table in (OTHERS, first_words(EXAMPLES), set(INITS), first_words(problems.CASES), set(test_modules.MODULES)):
        assert table and table <= EXPORTED
