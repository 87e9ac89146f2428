"""What the site has beside docs/: pages and files of the checkout that pages link to, as they are there.

A page links to a file of the checkout as it does on disk (``../DESIGN.md``, ``../recipes/fsdp2.yaml``). Here
such a file becomes a page or a file of the site, under its path in the checkout, and the link is bent to it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("DESIGN.md", "CHANGELOG.md", "CONTRIBUTING.md")
_LINK = re.compile(r"\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def linked_files() -> set[str]:
    """Paths in the checkout, of files that are no pages, that a page links to."""
    sources = [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in PAGES)]
    targets = {target for path in sources for target in map(_in_checkout(path), _targets(path)) if target}
    return {target for target in targets if not target.startswith("docs/") and target not in PAGES}


def _targets(path: Path) -> list[str]:
    return [match["target"] for match in _LINK.finditer(path.read_text(encoding="utf-8"))]


def _in_checkout(page: Path) -> Any:
    def resolve(target: str) -> str | None:
        path = (page.parent / target).resolve()
        return str(path.relative_to(ROOT)) if path.is_file() and path.is_relative_to(ROOT) else None

    return resolve


def bend(text: str, of_checkout: bool) -> str:
    """The links of a page, from where it lies in the checkout to where it lies in the site."""

    def bent(match: re.Match[str]) -> str:
        prefix = "docs/" if of_checkout else "../"
        return f"]({match['target'].removeprefix(prefix)}{match['anchor'] or ''})"

    return _LINK.sub(bent, text)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and files of the checkout."""
    from mkdocs.structure.files import File, InclusionLevel

    for name in [*PAGES, *sorted(linked_files())]:
        file = File.generated(config, name, abs_src_path=str(ROOT / name))
        if name not in PAGES:
            file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Bend links."""
    return bend(markdown, page.file.src_uri in PAGES)
