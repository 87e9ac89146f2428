"""What a part of `benchmarks.gpu` is run with: said before it begins, with what is missing or too old."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from benchmarks.harness import package_version
from benchmarks.results import ROOT


def wanted_versions() -> dict[str, SpecifierSet]:
    """Of the packages that pyproject.toml asks for: what builds fastdpo, and what it depends on."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:requires|dependencies) = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    found = [Requirement(each) for each in re.findall(r'"([^"]+)"', " ".join(lists))]
    return {requirement.name: requirement.specifier for requirement in found}


def versions_of(packages: Sequence[str]) -> str:
    """One line: the versions of Python and of packages; of each that is not as wanted, what is."""
    wanted, found = wanted_versions(), [f"Python {platform.python_version()}"]
    for name in packages:
        have, want = package_version(name), wanted.get(name, SpecifierSet())
        if have is None:
            found.append(f"{name}: not installed")
        elif not want.contains(have, prereleases=True):
            found.append(f"{name} {have}: TOO OLD, wanted {want}")
        else:
            found.append(f"{name} {have}")
    return ", ".join(found)
