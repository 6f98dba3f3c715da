"""The house rules, read off the syntax trees: who may import whom, and what nobody does."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mpcserve"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(), str(path)) for path in FILES}

LOW = {"errors", "version", "ring", "units"}
IMPORTS = {
    "errors": set[str](),
    "units": set[str](),
    "version": set[str](),
    "arrays": {"errors"},
    "bundled": {"errors"},
    "config": {"errors"},
    "ring": {"errors"},
    "plan": LOW,
    "reference": LOW | {"plan"},
    "compiler": LOW | {"arrays", "plan", "reference"},
    "kernels": LOW,
    "randomness": LOW | {"kernels"},
    "protocol": LOW | {"kernels", "plan", "randomness"},
    "messages": set[str](),
    "wire": {"errors", "messages", "version"},
    "transport": {"config", "errors", "kernels", "wire"},
    "serving": LOW | {"config", "plan", "protocol", "randomness", "transport", "wire"},
    "cli": LOW
    | {"arrays", "bundled", "compiler", "config", "plan", "protocol", "reference", "serving"}
    | {"transport"},
    "onnx_backend": LOW | {"compiler", "plan", "protocol"},
    "__main__": {"cli"},
    "__init__": LOW | {"bundled", "compiler", "config", "plan", "protocol", "serving"},
}
"""Part of the package → the parts it may import, besides itself."""

ONLY_IN = {
    "numba": {"kernels"},
    "llvmlite": {"kernels"},
    "onnx": {"compiler", "cli", "onnx_backend"},
    "onnxruntime": {"compiler", "cli"},
    "click": {"cli"},
    "rich": {"cli"},
    "yaml": {"config"},
    "sqlite3": {"serving"},
    "ctypes": {"serving"},
    "cryptography": {"config", "randomness", "serving", "transport"},
    "socket": {"serving", "transport", "cli"},
    "ssl": set(),
    "OpenSSL": {"transport"},
    "threading": {"serving", "transport", "cli"},
    "subprocess": {"cli", "serving"},
    "logging": {"serving", "transport", "cli"},
    "time": {"compiler", "serving", "transport", "cli"},
    "os": {"config", "compiler", "plan", "serving", "transport", "cli"},
}
"""Module → the parts of the package that may import it."""

NEVER_IMPORTED = {
    *("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "random", "imp"),
    *("telnetlib", "tests", "models", "benchmarks"),
}
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "globals", "breakpoint", "input"}

MAX_FILE, MAX_FUNCTION = 500, 60


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import that runs, inside functions too."""
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in types_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            module = node.module or ""
            if module == "mpcserve":
                yield from ((node.lineno, f"mpcserve.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def breaches(check: Callable[[Path, ast.AST], Iterator[str]]) -> list[str]:
    """`file:line: what` of every breach in the package."""
    found = []
    for path, tree in TREES.items():
        found += [f"{path.relative_to(PACKAGE.parent)}:{text}" for text in check(path, tree)]
    return found


def test_the_import_table_has_no_cycle() -> None:
    order: list[str] = []
    left = dict(IMPORTS)
    while left:
        ready = [part for part, below in left.items() if below <= set(order)]
        assert ready, f"a cycle among {sorted(left)}"
        for part in ready:
            order.append(part)
            del left[part]


def test_every_file_belongs_to_a_part_of_the_table() -> None:
    assert {part_of(path) for path in FILES} <= set(IMPORTS)


def test_parts_import_only_what_lies_below_them() -> None:
    def check(path: Path, tree: ast.AST) -> Iterator[str]:
        part = part_of(path)
        for line, module in imports_of(tree):
            if module.startswith("mpcserve."):
                other = module.split(".")[1]
                if other != part and other not in IMPORTS[part]:
                    yield f"{line}: {part} imports {other}"

    assert breaches(check) == []


def test_libraries_are_imported_only_where_they_belong() -> None:
    def check(path: Path, tree: ast.AST) -> Iterator[str]:
        for line, module in imports_of(tree):
            top = module.split(".")[0]
            if top in NEVER_IMPORTED:
                yield f"{line}: imports {top}"
            if part_of(path) not in ONLY_IN.get(top, {part_of(path)}):
                yield f"{line}: {part_of(path)} imports {top}"

    assert breaches(check) == []


def test_nobody_runs_text_as_code() -> None:
    def check(path: Path, tree: ast.AST) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                if isinstance(node.func, ast.Name) and node.func.id in NEVER_CALLED:
                    yield f"{node.lineno}: {node.func.id}()"
                for word in node.keywords:
                    on = isinstance(word.value, ast.Constant) and word.value.value is True
                    if word.arg in ("allow_pickle", "shell") and on:
                        yield f"{node.lineno}: {word.arg}=True"
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                *("yaml.load", "yaml.UnsafeLoader", "yaml.FullLoader", "os.system", "os.popen"),
            ):
                yield f"{node.lineno}: {ast.unparse(node)}"

    assert breaches(check) == []


def test_nobody_draws_from_a_generator_that_is_not_for_secrets() -> None:
    def check(path: Path, tree: ast.AST) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("random", "default_rng"):
                yield f"{node.lineno}: {ast.unparse(node)}"
        for line, module in imports_of(tree):
            if module.startswith("numpy.random"):
                yield f"{line}: imports {module}"

    assert breaches(check) == []


def test_no_error_is_swallowed_unseen() -> None:
    def check(path: Path, tree: ast.AST) -> Iterator[str]:
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = ast.unparse(node.type) if node.type else "everything"
            idle = all(isinstance(s, ast.Pass | ast.Continue) for s in node.body)
            if node.type is None or (caught in ("Exception", "BaseException") and idle):
                yield f"{node.lineno}: swallows {caught}"

    assert breaches(check) == []


MUTABLE_CALLS = {
    *("list", "dict", "set", "bytearray", "defaultdict", "deque", "OrderedDict", "Counter"),
    *("Queue", "Lock", "RLock", "Event", "Condition", "count", "local", "WeakValueDictionary"),
}


MUTATORS = {
    *("append", "extend", "insert", "remove", "pop", "popitem", "clear", "add", "discard"),
    *("update", "setdefault", "sort", "reverse"),
}


def _is_made_mutable(value: ast.expr) -> bool:
    """Made by a call of something mutable: state, whatever it is called."""
    name = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
    return name.split(".")[-1].split("[")[0] in MUTABLE_CALLS


def _changed_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that are written into: `X[k] = v`, `del X[k]`, `X.append(v)` …"""
    for node in ast.walk(tree):
        target: ast.expr | None = None
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            target = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            target = node.func.value if node.func.attr in MUTATORS else None
        if isinstance(target, ast.Name):
            yield node.lineno, target.id


def test_modules_hold_no_mutable_state() -> None:
    """A module's names are constants: tables may be written down, never written into."""

    def check(path: Path, tree: ast.AST) -> Iterator[str]:
        assert isinstance(tree, ast.Module)
        constants = set()
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AnnAssign):
                targets = [node.target]
            names = {ast.unparse(t) for t in targets}
            constants |= names
            if not targets or node.value is None:  # type: ignore[union-attr]
                continue
            display = isinstance(node.value, ast.Dict | ast.List | ast.Set)  # type: ignore[union-attr]
            named_as_state = display and not all(n.isupper() or n == "__all__" for n in names)
            if named_as_state or _is_made_mutable(node.value):  # type: ignore[union-attr]
                yield f"{node.lineno}: {', '.join(names)}"
        for line, name in _changed_names(tree):
            if name in constants and name.isupper():
                yield f"{line}: writes into {name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                yield f"{node.lineno}: global {', '.join(node.names)}"

    assert breaches(check) == []


def test_files_and_functions_stay_short() -> None:
    def check(path: Path, tree: ast.AST) -> Iterator[str]:
        lines = path.read_text().count("\n")
        if lines >= MAX_FILE:
            yield f"{lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length >= MAX_FUNCTION:
                    yield f"{node.lineno}: {node.name} has {length} lines"

    assert breaches(check) == []


def test_every_file_says_what_it_owns() -> None:
    empty = [path for path, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]
    assert empty == []


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("mpcserve", ["numpy", "onnx", "numba", "OpenSSL"]),
        ("mpcserve.cli", ["numpy", "onnx", "numba", "rich", "yaml", "cryptography"]),
        ("mpcserve.serving", ["onnx", "onnxruntime", "mpcserve.compiler", "click", "rich"]),
        ("mpcserve.compiler", ["numba", "mpcserve.protocol", "mpcserve.transport", "OpenSSL"]),
    ],
)
def test_an_import_loads_no_more_than_it_needs(imported: str, absent: list[str]) -> None:
    code = f"import sys, {imported}; print(*(m for m in {absent} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
