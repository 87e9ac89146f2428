"""Preference pairs from the Python standard library: which docstring belongs to a function's signature?

The sources are read with ``ast``; no module is imported. Every documented function whose summary (the
first paragraph of its docstring) is unique becomes one row or a few: the prompt is its signature,
``chosen`` its own summary, ``rejected`` the summary of another function.

Functions are matched in twos of like summary length, and each of the two rejects the other's summary. So
every text is chosen exactly as often as it is rejected, and whoever looks at the answer alone, at its length
or at its style, is right in exactly half of the pairs.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Tests and demonstrations, what pip installed, and the build configuration.
LEFT_OUT = {"test", "tests", "idle_test", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
SUMMARY_CHARS = (16, 240)
SIGNATURE_CHARS = 120
# Among this many functions of neighbouring summary length a partner is drawn.
LIKE_LENGTH = 40


@dataclass(frozen=True)
class Function:
    """A documented function or method of the standard library."""

    module: str  # the top-level module, by which the data is split
    name: str
    signature: str
    summary: str


def stdlib_files() -> list[tuple[str, Path]]:
    """``(dotted module name, path)`` of every source file of the standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not any(part in LEFT_OUT or part.startswith("config-") for part in parts):
            files.append((".".join(parts).removesuffix(".__init__"), path))
    return files


def read_sources() -> dict[str, str]:
    """The text of every module; a file that is no UTF-8 is left out."""
    sources = {}
    for name, path in stdlib_files():
        try:
            sources[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return sources


def documented_functions(sources: dict[str, str]) -> list[Function]:
    """Functions with a signature and a summary that no other function has."""
    found = []
    for module, source in sources.items():
        try:
            tree = ast.parse(source)
        except SyntaxError:  # lib2to3 carries Python 2 files
            continue
        found += [function for function in _functions(tree, module) if _is_usable(function)]
    summaries = Counter(function.summary for function in found)
    return [function for function in found if summaries[function.summary] == 1]


def _functions(node: ast.AST, module: str, scope: str = "") -> Iterator[Function]:
    """Those of a module and of its classes, also under ``if`` and ``try``; not those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(child)
            if docstring:
                signature = f"def {module}.{scope}{child.name}({ast.unparse(child.args)}):"
                summary = " ".join(docstring.split("\n\n")[0].split())
                yield Function(module.partition(".")[0], child.name, signature, summary)
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, module, f"{scope}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from _functions(child, module, scope)


def _is_usable(function: Function) -> bool:
    least, most = SUMMARY_CHARS
    return least <= len(function.summary) <= most and len(function.signature) <= SIGNATURE_CHARS


def split_by_module(
    functions: Sequence[Function], held_out: float, rng: random.Random
) -> tuple[list[Function], list[Function]]:
    """``(training, held-out)`` functions, no module in both; a share of about ``held_out`` in the second."""
    modules = sorted({function.module for function in functions})
    rng.shuffle(modules)
    sizes = Counter(function.module for function in functions)
    chosen, count = set(), 0
    for module in modules:
        if count + sizes[module] <= held_out * len(functions):
            chosen.add(module)
            count += sizes[module]
    return (
        [function for function in functions if function.module not in chosen],
        [function for function in functions if function.module in chosen],
    )


def make_pairs(functions: Sequence[Function], rounds: int, rng: random.Random) -> list[dict[str, str]]:
    """``rounds`` preference rows per function, each time with another partner; see the module's docstring."""
    rows = []
    for _ in range(rounds):
        for one, other in _partners(functions, rng):
            rows += [_row(one, other), _row(other, one)]
    return rows


def _partners(functions: Sequence[Function], rng: random.Random) -> Iterator[tuple[Function, Function]]:
    """Functions in twos: neighbours by summary length, shuffled among ``LIKE_LENGTH``, of unlike names."""
    ordered = sorted(functions, key=lambda function: (len(function.summary), function.signature))
    # The first window is shortened at random, so that rounds do not share their windows' edges.
    start = rng.randrange(LIKE_LENGTH)
    bounds = [0, *range(start, len(ordered), LIKE_LENGTH), len(ordered)]
    for first, last in zip(bounds, bounds[1:], strict=False):
        window = ordered[first:last]
        rng.shuffle(window)
        while len(window) > 1:
            one = window.pop()
            match = next((i for i, other in enumerate(window) if other.name != one.name), None)
            if match is not None:
                yield one, window.pop(match)


def _row(own: Function, other: Function) -> dict[str, str]:
    # The space makes the answer start with a token of its own, so that the prompt ends where it should.
    return {"prompt": own.signature, "chosen": f" {own.summary}", "rejected": f" {other.summary}"}
