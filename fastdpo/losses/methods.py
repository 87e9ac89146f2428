"""Every method of the field that users ask for by name, and what of fastdpo it is: a table for the docs.

python -m fastdpo.losses.methods docs/methods.md          # rewrites the table between its markers
python -m fastdpo.losses.methods docs/methods.md --check  # fails when it is not what this module gives
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from fastdpo.losses.method_rows import ROWS

# "recipe": the exact call stands in docs/methods.md; "data": how pairs are made, for a loss that is here;
# "nothing": the last column says why.
PROVISIONS = ("loss", "option", "weights", "reference", "term", "head", "state", "recipe", "data", "nothing")
# Where the formula was read: in the authors' code or another's that is named, in the paper, or in neither.
CODES = ("authors' code", "TRL", "HALOs", "OAT", "NeMo-Aligner", "others' code")
CHECKED = (*CODES, "paper", "spec only", "nothing to check")


@dataclass(frozen=True)
class Method:
    """A row of the table. ``use`` is Markdown; ``recipe`` the heading in docs/methods.md, if it has one."""

    id: str
    name: str
    source: str
    provided: str
    checked: str
    use: str
    recipe: str = ""


def _parse(text: str) -> tuple[Method, ...]:
    methods: list[Method] = []
    for line in text.splitlines():
        part = line.strip()
        if not line.startswith(" "):
            identity, name, source, provided, checked = (cell.strip() for cell in line.split("|"))
            methods.append(Method(identity, name, source, provided, checked, use=""))
        elif part.startswith("-> "):
            methods[-1] = replace(methods[-1], recipe=part.removeprefix("-> "))
        else:
            methods[-1] = replace(methods[-1], use=f"{methods[-1].use} {part}".strip())
    return tuple(methods)


METHODS = _parse(ROWS)


def methods_table() -> str:
    """The methods as a Markdown table, a row per method."""
    rows = [
        "| | method | source | what it is here | checked against | use |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        use = method.use
        if method.recipe:
            use += f" ([{method.recipe}](#{anchor_of(method.recipe)}))"
        provided = "data only" if method.provided == "data" else method.provided
        cells = (method.id, method.name, _link(method.source), provided, method.checked, use)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def anchor_of(heading: str) -> str:
    """GitHub's anchor of a heading."""
    kept = "".join(letter for letter in heading.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


def _link(source: str) -> str:
    parts = source.split(", ")
    return ", ".join(
        f"[{part}](https://arxiv.org/abs/{part.split()[0]})" if part[:4].isdigit() else part for part in parts
    )


def render(text: str) -> str:
    """A page with its table replaced. Raises ValueError unless the pair of markers is there once."""
    begin, end = "<!-- methods:begin -->", "<!-- methods:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"page: wanted {begin} and {end} once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{methods_table()}\n{end}{rest.split(end)[1]}"


def main(argv: list[str] | None = None) -> int:
    """Write the page, or with ``--check`` only compare; 1 if it differs."""
    parser = argparse.ArgumentParser(description="Write the table of docs/methods.md.")
    parser.add_argument("page", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    text = arguments.page.read_text(encoding="utf-8")
    wanted = render(text)
    if arguments.check:
        return int(text != wanted)
    arguments.page.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
