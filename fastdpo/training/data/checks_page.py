"""The tables of ``docs/data.md``, from the table of checks.

python -m fastdpo.training.data.checks_page docs/data.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastdpo.training.settings.row_checks import CHECKS, EFFECTS, LEFT_OUT, MENDED, NAMED, REFUSED

BEGIN, END = "<!-- checks:begin -->", "<!-- checks:end -->"
_SECTIONS = {
    LEFT_OUT: (
        "Rows left out",
        "Nothing can be learnt from the row, or not what it says. Skipped and counted, or an error.",
    ),
    MENDED: ("Rows mended", "There is one way to read the row. It is read so, and counted."),
    NAMED: ("Rows named", "The row is used as it is."),
    REFUSED: (
        "Refused",
        "An error whatever `on_bad_row` says: the file or the settings are at fault, not a row.",
    ),
}


def with_checks(page: str) -> str:
    """The page with its tables between the markers."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{checks_tables()}{END}{rest.partition(END)[2]}"


def checks_tables() -> str:
    """A table for each effect, as Markdown."""
    parts = []
    for effect in EFFECTS:
        title, text = _SECTIONS[effect]
        checks = [check for check in CHECKS.values() if check.effect == effect]
        may_stay = any(check.may_stay for check in checks)
        head = ["check", "message: rows with", "what is looked at", "what to do", *["may stay"] * may_stay]
        lines = [head, ["---"] * len(head)]
        for check in checks:
            stays = ["yes" if check.may_stay else ""] * may_stay
            lines.append([f"`{check.name}`", check.message, check.what, check.remedy, *stays])
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        parts.append(f"## {title}\n\n{text}\n\n{table}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_checks(path.read_text(encoding="utf-8")), encoding="utf-8")
