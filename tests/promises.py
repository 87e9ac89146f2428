"""What is promised, and which tests hold it: ``docs/promises.md`` is made of the table and the tests' marks.

A test says what it holds with ``@pytest.mark.promise(18)``. A promise is kept where such a test is in what CI
runs: always (`make test`), or slow (`make test-slow`). Nothing else counts; a test that needs a GPU was *not
run*. Marks are read from the source, so that the page needs no test to be imported.

    python -m tests.promises docs/promises.md README.md
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests import ROOT
from tests.promise_table import PROMISES, TIERS, Promise

ALWAYS, SLOW, GPU = "always", "slow", "gpu"
LAST_GOAL = 58  # the goals that the project began with; what comes after them was added on the way


@dataclass(frozen=True)
class Holder:
    """A test that is marked, and when it is run."""

    place: str
    numbers: tuple[int, ...]
    runs: str
    tier: str


@cache
def holders() -> tuple[Holder, ...]:
    """All marked tests, in the order of their files.

    Raises:
        ValueError: a mark whose numbers cannot be read from the source.
    """
    found: list[Holder] = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        found += _of_file(path.read_text(encoding="utf-8"), path.relative_to(ROOT / "tests").as_posix())
    return tuple(found)


def _of_file(source: str, name: str) -> Iterator[Holder]:
    tree = ast.parse(source)
    of_all = [
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            numbers = tuple(number for mark in node.decorator_list for number in _numbers(mark, name))
            if numbers:
                # Of a mark on a single case the others are still run.
                marks = [text for text in map(ast.unparse, node.decorator_list) if "parametrize" not in text]
                told = " ".join([*of_all, *marks])
                yield Holder(f"{name}::{node.name}", numbers, _runs(told), _tier(told, name))


def _numbers(mark: ast.expr, name: str) -> list[int]:
    if not (isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.promise"):
        return []
    if not mark.args or not all(isinstance(a, ast.Constant) and isinstance(a.value, int) for a in mark.args):
        raise ValueError(f"{name}: got {ast.unparse(mark)}, wanted numbers of promises")
    return [argument.value for argument in mark.args]  # type: ignore[attr-defined]


def _runs(marks: str) -> str:
    if "pytest.mark.gpu" in marks:
        return GPU
    return SLOW if "pytest.mark.slow" in marks else ALWAYS


def _tier(marks: str, name: str) -> str:
    if "pytest.mark.gpu" in marks:
        return "G"
    if name.endswith("test_sanitized.py"):
        return "S"
    return "M" if "pytest.mark.distributed" in marks else "C"


def is_kept(promise: Promise) -> bool:
    return any(holder.runs != GPU for holder in _of(promise))


def _of(promise: Promise) -> list[Holder]:
    order = (ALWAYS, SLOW, GPU)
    return sorted(
        (holder for holder in holders() if promise.number in holder.numbers),
        key=lambda holder: order.index(holder.runs),
    )


def _state(promise: Promise) -> str:
    if is_kept(promise):
        return "kept"
    return "*not run*" if any(_of(promise)) or promise.not_run else "open"


def _summary() -> Iterator[str]:
    first = [promise for promise in PROMISES if promise.number <= LAST_GOAL]
    later = [promise for promise in PROMISES if promise.number > LAST_GOAL]
    yield f"**Kept: {sum(map(is_kept, first))} of {len(first)}** of the goals that the project began with, "
    yield f"and {sum(map(is_kept, later))} of {len(later)} that were added on the way.\n\n"
    yield "| tier | what it is | promises | a test runs | written, not run |\n|---|---|---|---|---|\n"
    for tier, text in TIERS.items():
        count, held = _count(tier)
        ran, waits = (0, held) if tier == "G" else (held, 0)
        yield f"| {tier} | {text} | {count} | {ran} | {waits} |\n"


def _count(tier: str) -> tuple[int, int]:
    """Promises of a tier, and those with a test of it."""
    mine = [promise for promise in PROMISES if tier in promise.tiers]
    return len(mine), sum(any(holder.tier == tier for holder in _of(promise)) for promise in mine)


def in_readme(text: str) -> str:
    """README with the line that counts what is kept."""
    ran = "; ".join(
        f"{name} {held} of {count}"
        for name, (count, held) in zip(
            ("a CPU", "sanitizers", "several processes"), map(_count, "CSM"), strict=True
        )
    )
    kept = f"**kept {sum(map(is_kept, PROMISES))} of {len(PROMISES)}**, each by a test"
    line = f"[Promises](docs/promises.md): {kept}. By tier: {ran}; a GPU {_count('G')[0]}, *not run*."
    return re.sub(r"^\[Promises\]\(.*$", lambda _: line, text, flags=re.MULTILINE)


def page() -> str:
    """``docs/promises.md``."""
    parts = [_HEAD, *_summary()]
    for promise in PROMISES:
        if promise.group:
            parts.append(f"\n## {promise.group}\n\n{_COLUMNS}")
        tests = "<br>".join(
            f"`{holder.place}`" + ("" if holder.runs == ALWAYS else f" ({holder.runs})")
            for holder in _of(promise)
        )
        text = f"{promise.text}. {promise.instead}".strip() if promise.instead else promise.text
        reason = f"{tests}<br>{promise.not_run}" if tests and promise.not_run else tests or promise.not_run
        cells = [str(promise.number), promise.given, text, " ".join(promise.tiers), _state(promise), reason]
        parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)


_COLUMNS = "| | given | promise | tiers | | held by |\n|---|---|---|---|---|---|\n"
_HEAD = """# What is promised, and which test holds it

Each line is a fault, a bad input or a case at the edge, what fastdpo promises there, and the tests that
hold it: `pytest -m promise` runs them. *Kept* means that such a test is in what CI runs, always or, where it
says so, among the slow ones. What needs a GPU was *not run*, even where a test is written. Where a goal was
wrong for this design, the promise is the better one, and why stands behind it. This page is made of the
tests' marks by `make tables`.

"""

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
    readme = Path(sys.argv[2])
    readme.write_text(in_readme(readme.read_text(encoding="utf-8")), encoding="utf-8")
