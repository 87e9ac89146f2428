"""What tests claim, on a GPU that is not there: asserted where it hangs on no value that was made up.

Modules under ``tests`` and ``fastdpo.testing`` are compiled with their ``assert`` statements, and what raises
an `AssertionError`, asking here first.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType
from typing import Any

PACKAGES = ("tests", "fastdpo.testing", "benchmarks.problem", "benchmarks.rows")
REFUTED = "__refuted__"
ERRORS = ("AssertionError", "Wrong")


class Claims:
    """Whether what a test claims is to be believed, which is asked when it does not hold.

    Args:
        made_up: how many values were made up so far.
    """

    def __init__(self, made_up: Callable[[], int]) -> None:
        self._made_up, self._before = made_up, 0
        self.left_aside = 0

    def begin(self) -> None:
        """Of a test: from now on, what holds hangs on no made-up value."""
        self._before = self._made_up()

    def refuted(self, error: type[AssertionError], *message: Any) -> None:
        if self._made_up() == self._before:
            raise error(*message)
        self.left_aside += 1

    def install(self) -> None:
        setattr(builtins, REFUTED, self.refuted)
        sys.meta_path.insert(0, _Finder())


class _Asking(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.If:
        message = [] if node.msg is None else [node.msg]
        call = _call(
            node, ast.Name("AssertionError", ast.Load()), message or [ast.Constant(ast.unparse(node))]
        )
        return ast.copy_location(ast.If(ast.UnaryOp(ast.Not(), node.test), [call], []), node)

    def visit_Raise(self, node: ast.Raise) -> ast.stmt:
        error = node.exc
        if isinstance(error, ast.Call) and isinstance(error.func, ast.Name) and error.func.id in ERRORS:
            return _call(node, error.func, error.args)
        return node


def _call(node: ast.stmt, error: ast.expr, arguments: list[ast.expr]) -> ast.stmt:
    call = ast.Expr(ast.Call(ast.Name(REFUTED, ast.Load()), [error, *arguments], []))
    return ast.fix_missing_locations(ast.copy_location(call, node))


class _Loader(SourceFileLoader):
    def get_code(self, name: str) -> CodeType:
        path = self.get_filename(name)  # never from, or into, the cache of compiled modules
        tree = _Asking().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if not any(name == package or name.startswith(f"{package}.") for package in PACKAGES):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            places = spec.submodule_search_locations
            spec.loader = _Loader(name, spec.origin)
            spec.submodule_search_locations = places
        return spec
