"""Who may import whom: packages in layers, and private names within their package. What every file begins with."""

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import sslkern

ROOT = Path(sslkern.__file__).parent
# The lowest first. The native module (sslkern._cpu) stands below all.
LAYERS = [
    "sslkern.common",
    "sslkern.backends.problem",
    "sslkern.backends.reference",
    "sslkern.backends",
    "sslkern.ops",
    "sslkern.distributed",
    "sslkern.functional",
    "sslkern",
    "sslkern.compat",
]
NOT_FOR = {"sslkern.functional": "sslkern.backends"}  # a loss takes primitives
NATIVE = {"sslkern._cpu"}
FILES = sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)


def module_of(path: Path) -> str:
    parts = ("sslkern", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def package_of(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def layer_of(module: str) -> int:
    within = (layer for layer in LAYERS if module == layer or module.startswith(layer + "."))
    return LAYERS.index(max(within, key=len))


def imports(module: str, nodes: Callable[[ast.Module], Iterable[ast.AST]] = ast.walk) -> list[tuple[str, str]]:
    """(module, name) of what of sslkern the module imports, wherever it does; name "" for the module itself."""
    found = []
    for node in nodes(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package_of(module).split(".")
            source = ".".join([*above[: len(above) - node.level + 1], *([node.module] if node.module else [])])
            source = source if node.level else node.module
            for name in (alias.name for alias in node.names):
                inner = f"{source}.{name}"
                found.append((inner, "") if inner in MODULES or inner in NATIVE else (source, name))
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(source, name) for source, name in found if source.partition(".")[0] == "sslkern"]


def wrong(module: str, source: str, name: str) -> str | None:
    if source in NATIVE:
        return None
    if layer_of(source) > layer_of(module) and not (package_of(module) + ".").startswith(package_of(source) + "."):
        return f"imports {source}, which is above it"
    for package, kept_from in NOT_FOR.items():
        if package_of(module) == package and (source + ".").startswith(kept_from + "."):
            return f"imports {source}, which is not for {package}"
    private = [part for part in (*source.split("."), name) if part.startswith("_") and not part.startswith("__")]
    if private and (name in private or package_of(module) != package_of(source)):
        return f"imports {'.'.join(private)} of {source}, which is private there"
    return None


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_down_and_take_no_private_names(module):
    """A name with an underscore stays in its file, a file with one in its folder."""
    said = [wrong(module, source, name) for source, name in imports(module)]
    assert not any(said), "; ".join(filter(None, said))


def test_the_checks_above_find_what_they_look_for():
    assert wrong("sslkern.backends.cpu.similarity_lse", "sslkern.ops", "similarity_lse")
    assert wrong("sslkern.ops.similarity_lse", "sslkern.functional", "nt_xent")
    assert wrong("sslkern.common.sums", "sslkern.backends", "resolve")
    assert wrong("sslkern.functional.nt_xent", "sslkern.ops._dense", "dense")
    assert wrong("sslkern.ops.similarity_topk", "sslkern.ops.similarity_lse", "_forward")
    assert wrong("sslkern.functional.nt_xent", "sslkern.backends", "resolve")
    assert not wrong("sslkern.ops.similarity_topk", "sslkern.ops._dense", "dense")
    assert not wrong("sslkern.functional.nt_xent", "sslkern.ops", "similarity_lse")
    assert ("sslkern.common.sums", "times") in imports("sslkern.functional.nt_xent")
    assert ("sslkern._cpu", "") in imports("sslkern.backends.cpu.similarity_lse")


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("sslkern.compat.")])
def test_stand_ins_say_whose_rows_a_loss_has(module):
    """Without a group a loss takes those of its own process, and warns where there are others."""
    losses = {name for source, name in imports(module) if source == "sslkern.functional"}
    calls = (node for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Call))
    for call in calls:
        if isinstance(call.func, ast.Name) and call.func.id in losses:
            takes_group = "group" in inspect.signature(getattr(sslkern.functional, call.func.id)).parameters
            assert not takes_group or "group" in {keyword.arg for keyword in call.keywords}, f"line {call.lineno}"


def test_every_function_has_its_module_in_a_file_of_the_same_name():
    files = {package: {path.stem for path in (ROOT / package).glob("[!_]*.py")} for package in ("functional", "losses")}
    assert files["losses"] - {"base"} == files["functional"] - {"checks", "formulas"}


def test_what_is_exported_is_annotated():
    """Functions, and the constructors and public methods of classes, for type checkers."""
    exported = [
        getattr(package, name) for package in (sslkern, sslkern.functional, sslkern.ops) for name in package.__all__
    ]
    functions = []
    for one in exported:
        functions += vars(one).values() if inspect.isclass(one) else [one]
    public = [f for f in functions if inspect.isfunction(f) and (f.__name__ == "__init__" or f.__name__[0] != "_")]
    bare = [f.__qualname__ for f in public if unannotated(f)]
    assert len(public) > 50 and not bare


def unannotated(function: Callable) -> list[str]:
    signature = inspect.signature(function)
    names = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
    if signature.return_annotation is signature.empty and function.__name__ != "__init__":
        names.append("return")
    return names


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("sslkern.backends.triton.")])
def test_beside_kernels_all_is_annotated(module):
    """mypy does not look for annotations in files with kernels of Triton (pyproject.toml)."""
    for function in ast.walk(ast.parse(MODULES[module].read_text())):
        if not isinstance(function, ast.FunctionDef) or is_kernel(function):
            continue
        arguments = [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]
        bare = [one.arg for one in arguments if one.annotation is None and one.arg not in ("self", "cls")]
        assert not bare and (function.returns or function.name == "__init__"), f"{module}.{function.name}: {bare}"


def is_kernel(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def sources(*folders: str, suffixes: tuple[str, ...]) -> list[Path]:
    checkout = Path(__file__).parents[1]
    return [path for folder in folders for path in (checkout / folder).rglob("*") if path.suffix in suffixes]


def test_every_file_opens_with_what_it_is():
    python = sources("sslkern", "python", "csrc", suffixes=(".py",))
    others = sources("csrc", "sslkern", "tests/cpp", "tests/cuda_emulation", suffixes=(".h", ".cpp", ".cu"))
    silent = [path for path in python if not ast.get_docstring(ast.parse(path.read_text()))]
    silent += [path for path in others if not path.read_text().startswith("// ")]
    assert python and others and not silent


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("sslkern.backends.")])
def test_no_function_is_longer_than_sixty_lines(module):
    """Without its signature and its docstring. (Kernels of a backend may be.)"""
    for function in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(function, ast.FunctionDef):
            first = function.body[ast.get_docstring(function) is not None :]
            lines = function.end_lineno - first[0].lineno + 1 if first else 0
            assert lines <= 60, f"{module}.{function.name} has {lines} lines: split it by what its parts mean"


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs when the module is imported: not what is within functions."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            waiting += ast.iter_child_nodes(node)


def circle(imported: dict[str, set[str]]) -> list[str]:
    """Modules each of which imports the next, and the last the first; empty if there are none."""
    done, path = set(), []

    def visit(module: str) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        path.append(module)
        found = next(filter(None, map(visit, sorted(imported[module]))), [])
        path.pop()
        done.add(module)
        return found

    return next(filter(None, map(visit, imported)), [])


def test_no_module_imports_one_that_imports_it():
    """Neither when it is imported nor, but for its package, later."""
    first = {module: {source for source, _ in imports(module, at_import) if source in MODULES} for module in MODULES}
    ever = {module: {source for source, _ in imports(module) if source in MODULES} for module in MODULES}
    assert not circle(first)
    assert not circle({module: {x for x in ever[module] if not module.startswith(x + ".")} for module in MODULES})
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d"]
