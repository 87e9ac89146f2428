"""The site's pages: navigation and files agree, and links lead somewhere, without the tools that build it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from fastdpo.losses.methods import anchor_of
from tests import ROOT

DOCS = ROOT / "docs"
OF_CHECKOUT = ("DESIGN.md", "CHANGELOG.md", "CONTRIBUTING.md")
PAGES = sorted(DOCS.glob("*.md")) + [ROOT / name for name in OF_CHECKOUT]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


def pages_of(nav: list[Any]) -> list[str]:
    found = [next(iter(entry.values())) for entry in nav]
    return [page for one in found for page in (pages_of(one) if isinstance(one, list) else [one])]


def test_the_navigation_has_every_page_once() -> None:
    nav = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert Counter(nav) == Counter([*(path.name for path in DOCS.glob("*.md")), *OF_CHECKOUT])


def prose(path: Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {f"#{anchor_of(line)}" for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_its_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(prose(page)):
        path = (page.parent / target).resolve() if target else page
        assert path.is_file(), f"{page.name}: no {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: no {anchor} in {path.name}"


def test_every_dependency_has_its_licence_in_the_page() -> None:
    tomllib = pytest.importorskip("tomllib")

    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    text = (DOCS / "licences.md").read_text()
    for line in needed:
        row = re.search(rf"^\| {Requirement(line).name} \| \S+ \| (.+) \|$", text, re.MULTILINE)
        assert row and row[1] not in ("not stated", "not looked at"), line
