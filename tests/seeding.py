"""Seed a fault in a copy of the tree, and run the test that must turn red; the faults are listed in `mutants`.

A fault is anchored by a function and an operation on its syntax tree, never by the text of a line: a refactor that
keeps the function and what it does keeps the fault. An operation fits some places of a function, in the order of the
source; a fault says which of how many it takes, and is stale as soon as there are not so many.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import copy
import importlib
import importlib.util
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent
COMPILED = "kernels/cpu", "kernels/formulas"  # what machine code on disk is made of


class Fault(NamedTuple):
    words: str
    file: str
    function: str  # qualified by its class; "f:x" is what f assigns to x, "f:return" what it returns
    operation: tuple[Any, ...]  # one of those below, and what it takes beside a node
    test: str  # or one case of it
    place: tuple[int, int] = (1, 1)  # which of how many
    seen_in: str = ""  # the peer that had it


class Stale(Exception):
    """The source has no such place any more, or several."""


# --- operations: what a node becomes, None where they do not fit -----------------------------------------------------


def _with(node: Any, **fields: Any) -> Any:
    node = copy.copy(node)
    node.__dict__.update(fields)
    return node


def _callee(node: Any) -> str | None:
    function = getattr(node, "func", None)
    return getattr(function, "attr", getattr(function, "id", None))


def operator(x: Any, old: type, new: type) -> ast.AST | None:
    """Make ``a old b`` or ``a old= b`` the new one."""
    return _with(x, op=new()) if isinstance(getattr(x, "op", None), old) else None


def compare(x: Any, old: type, new: type) -> ast.AST | None:
    """Make ``a old b`` a comparison by the new one."""
    return _with(x, ops=[new()]) if isinstance(x, ast.Compare) and isinstance(x.ops[0], old) else None


def constant(x: Any, old: Any, new: Any) -> ast.AST | None:
    """Make the literal ``old`` another."""
    is_old = isinstance(x, ast.Constant) and type(x.value) is type(old) and x.value == old
    return ast.Constant(new) if is_old else None


def name(x: Any, old: str, new: str) -> ast.AST | None:
    """Make the variable or attribute ``old`` another."""
    if isinstance(x, ast.Name) and x.id == old:
        return _with(x, id=new)
    return _with(x, attr=new) if isinstance(x, ast.Attribute) and x.attr == old else None


def operand(x: Any, kind: type, i: int) -> ast.AST | None:
    """Leave of ``a kind b`` the ``i``-th alone."""
    if isinstance(x, ast.AugAssign) or not isinstance(getattr(x, "op", None), kind):
        return None
    return x.values[i] if isinstance(x, ast.BoolOp) else (x.left, x.right)[i]


def argument(x: Any, function: str, i: int) -> ast.AST | None:
    """Leave of a call its ``i``-th argument alone: a guard is gone, a choice made."""
    return x.args[i] if _callee(x) == function and len(x.args) > i else None


def receiver(x: Any, method: str) -> ast.AST | None:
    """Make ``x.method(...)`` plain ``x``."""
    return x.func.value if _callee(x) == method and isinstance(x.func, ast.Attribute) else None


def without(x: Any, function: str) -> ast.AST | None:
    """Drop the statement that calls it."""
    return ast.Pass() if isinstance(x, ast.Expr) and _callee(x.value) == function else None


def branch(x: Any, taken: bool) -> ast.AST | None:
    """Take, or do not, the first branch of an ``if`` or of a choice, whatever is asked there."""
    return _with(x, test=ast.Constant(taken)) if isinstance(x, ast.If | ast.IfExp) else None


def regrouped(x: Any) -> ast.AST | None:
    """Make ``(a - b) - c`` ``a - (b + c)``."""
    if not all(isinstance(getattr(y, "op", None), ast.Sub) for y in (x, getattr(x, "left", None))):
        return None
    return ast.BinOp(x.left.left, ast.Sub(), ast.BinOp(x.left.right, ast.Add(), x.right))


# --- places -----------------------------------------------------------------------------------------------------------


def seeded(source: str, fault: Fault) -> str:
    """Return the source with the fault in it; raises Stale."""
    tree = ast.parse(source)
    operation, *args = fault.operation
    places = list(_places(_scope(tree, fault), lambda node: operation(node, *args)))
    which, n = fault.place
    if len(places) != n:
        words = ", ".join([operation.__name__, *(getattr(arg, "__name__", repr(arg)) for arg in args)])
        raise Stale(f"stale: ({words}) fits {len(places)} places in {fault.function} of {fault.file}, not {n}")
    siblings, key, new = places[which - 1]
    siblings[key] = new
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _scope(tree: Any, fault: Fault) -> Any:
    function, _, variable = fault.function.partition(":")
    for part in function.split("."):
        found = [x for x in tree.body if getattr(x, "name", None) == part]
        if len(found) != 1:
            raise Stale(f"stale: {fault.file} has {len(found)} of {function}")
        (tree,) = found
    return ast.Module([x for x in ast.walk(tree) if variable in _given(x)], []) if variable else tree


def _given(statement: Any) -> set[str]:
    """Return the names of the variables and attributes that a statement gives a value, or "return"."""
    if isinstance(statement, ast.Return):
        return {"return"}
    if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        return set()
    targets = [y for x in getattr(statement, "targets", None) or [statement.target] for y in getattr(x, "elts", [x])]
    targets = [x.value if isinstance(x, ast.Subscript) else x for x in targets]
    return {getattr(x, "id", getattr(x, "attr", "")) for x in targets}


def _places(node: ast.AST, change: Callable[[Any], ast.AST | None]) -> Iterator[tuple[Any, Any, ast.AST]]:
    """Yield what holds a node, by which key, and what the node becomes."""
    for field, value in ast.iter_fields(node):
        holder, keys = (value, range(len(value))) if isinstance(value, list) else (node.__dict__, [field])
        for key in keys:
            child = holder[key]
            if isinstance(child, ast.AST):
                new = change(child)
                if new is not None:
                    yield holder, key, new
                yield from _places(child, change)


# --- runs -------------------------------------------------------------------------------------------------------------


class Named:
    """Runs the named tests alone, those of the fast suite first, and notes of each the suite and the name."""

    def __init__(self, tests: set[str], note: pathlib.Path) -> None:
        self.tests, self.note = tests, note

    @pytest.hookimpl(trylast=True)  # all cases of a test are collected, and marked by which are slow
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        named = [x for x in items if {x.nodeid, x.nodeid.split("[")[0]} & self.tests]
        items[:] = sorted(named, key=_suite)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.note.write_text(f"{_suite(item)} {item.nodeid}")


def _suite(item: pytest.Item) -> str:
    return "full" if item.get_closest_marker("slow") else "fast"


def outcome(fault: Fault | None, tests: set[str], seconds: float = 120) -> str:
    """Run ``tests`` on a copy of the tree; return "survived", "killed" by which suite, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        tree, note = pathlib.Path(folder), pathlib.Path(folder, "suite")
        for room in ("bonus_ops", "kernels", "tests", "bench"):
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / room, tree / room, symlinks=True, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", tree)
        if fault is None or not fault.file.startswith(COMPILED):  # the machine code is that of the tree without a fault
            kept = ROOT / "kernels/cpu/__pycache__"
            kept.mkdir(exist_ok=True)
            (tree / "kernels/cpu/__pycache__").symlink_to(kept)
        if fault is not None:
            try:
                (tree / fault.file).write_text(seeded((ROOT / fault.file).read_text(), fault))
            except Stale as stale:
                return str(stale)
        process = multiprocessing.get_context("fork").Process(target=_run, args=(tree, tests, note))
        process.start()
        process.join(timeout=seconds)
        code = process.exitcode  # None: it never ends, 1: a test failed, below 0: a crash; else nothing was tested
        if code is None:
            process.kill()
        elif code > 1:
            return f"pytest exited with {code}: {' '.join(sorted(tests))}"
        suite, _, test = note.read_text().partition(" ") if note.exists() else ("at once", "", "pytest")
        return "survived" if code == 0 else f"killed ({suite})" if fault else f"{test} fails"


def _run(tree: pathlib.Path, tests: set[str], note: pathlib.Path) -> None:
    os.chdir(tree)
    sys.path[0] = str(tree)
    functions = sorted({test.split("[")[0] for test in tests})
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *functions], plugins=[Named(tests, note)])
    os._exit(int(code))


def run(faults: tuple[Fault, ...], done: Callable[[str], None] = lambda line: None) -> dict[str, str]:
    """Return what became of each fault, and of the tests without one; ``done`` is told of each as it is known."""
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    for slow in ("torch._dynamo", "triton.runtime.interpreter", "numba", "hypothesis"):  # once, not in every fork
        if importlib.util.find_spec(slow.split(".")[0]) is not None:
            importlib.import_module(slow)
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        running = {pool.submit(outcome, None, {fault.test for fault in faults}, 240): "no fault at all"}
        running |= {pool.submit(outcome, fault, {fault.test}): fault.words for fault in faults}
        for i, future in enumerate(concurrent.futures.as_completed(running), 1):
            done(f"{i} of {len(running)}: {future.result():13}  {running[future]}")
    return {words: future.result() for future, words in running.items()}
