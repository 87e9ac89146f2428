"""``docs/licences.md``: what an installation is made of, by version and licence, as packages themselves say.

python -m benchmarks.licences            # writes docs/licences.md, of what is installed beside this Python
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

from benchmarks.results import ROOT

PAGE = ROOT / "docs" / "licences.md"
EXTRAS = ("images", "peft", "plot", "trl", "deepspeed")
HEAD = """# Licences

fastdpo is under the Apache License 2.0. What it needs, and what that needs in turn, stands below with the
licence that each package states in its own metadata, in the versions that the tests run with (Linux,
x86_64, Python {python}, torch without CUDA). With a CUDA build of torch come NVIDIA's libraries, under
NVIDIA's own terms. A wheel for manylinux has the OpenMP runtime of GCC beside it (GPL-3.0 with the GCC
Runtime Library Exception).

`python -m benchmarks.licences` writes this page from what is installed.
"""


def licence_of(found: Distribution) -> str:
    """What a package's metadata says: the SPDX name, else its classifiers, else its text's first line."""
    data = found.metadata
    if expression := data.get("License-Expression"):
        return str(expression)
    classifiers = data.get_all("Classifier") or []
    named = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License ::")]
    named = [name for name in named if name != "OSI Approved"]
    text = (data.get("License") or "").strip().partition("\n")[0]
    return ", ".join(named) or text[:60] or "not stated"


def closure(name: str, extra: str = "") -> dict[str, Distribution | None]:
    """A package's dependencies here, and theirs; None for one that is not installed."""
    found: dict[str, Distribution | None] = {}
    todo = [(name, frozenset({extra}))]
    while todo:
        parent, extras = todo.pop()
        for line in distribution(parent).requires or []:
            need = Requirement(line)
            wanted = [need.marker is None or need.marker.evaluate({"extra": e}) for e in extras or {""}]
            key = re.sub(r"[-_.]+", "-", need.name).lower()
            if not any(wanted) or key in found or key == "fastdpo":
                continue
            try:
                found[key] = distribution(need.name)
            except PackageNotFoundError:
                found[key] = None
                continue
            todo.append((need.name, frozenset(need.extras | {""})))
    return found


def table(found: dict[str, Distribution | None]) -> str:
    """Package, version, licence."""
    lines = ["| package | version | licence |", "|---|---|---|"]
    for name in sorted(found):
        one = found[name]
        cells = ("not installed", "not looked at") if one is None else (one.version, licence_of(one))
        lines.append(f"| {name} | {cells[0]} | {cells[1].replace('|', '/')} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    needed = closure("fastdpo")
    parts = [HEAD.format(python=".".join(map(str, sys.version_info[:2]))), "## Needed", table(needed)]
    for extra in EXTRAS:
        more = {name: one for name, one in closure("fastdpo", extra).items() if name not in needed}
        parts += [f"## With `fastdpo[{extra}]`, beside these", table(more)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
