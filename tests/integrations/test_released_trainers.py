"""Released trainers, unmodified, on lazy logits: the curve of a run without the hook, and no logits made.

Each release has an environment of its own, which ``make test-trainers`` creates; without it its tests are
skipped. `tests.integrations.released` runs there, and what it prints is judged here.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SHARED_DATA
from tests.integrations.released.cases import STEPS, cases_of, rows_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HERE = "this one"
ENVIRONMENTS = [HERE, *sorted(path.stem for path in (ROOT / "tests/integrations/released").glob("*.txt"))]
FOLDER = Path(os.environ.get("FASTDPO_TRAINERS", ROOT / ".venv-trainers"))
# fp32, SGD, losses of about 1 to 30: rounding, and what twenty steps make of it.
TOLERANCE = 1e-5


@functools.cache
def reports(environment: str) -> dict[str, Any]:
    """What the cases of an environment printed, by name."""
    python = sys.executable if environment == HERE else str(FOLDER / environment / "bin" / "python")
    command = [python, "-W", "ignore", "-m", "tests.integrations.released", environment]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case": ')]
    assert done.returncode == 0 and lines, done.stderr[-2000:]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize(
    ("environment", "case"), [(name, case) for name in ENVIRONMENTS for case in cases_of(name)]
)
def test_a_released_trainer(environment: str, case: str) -> None:
    if environment != HERE and not (FOLDER / environment / ".ready").exists():
        pytest.skip(f"needs {FOLDER / environment}: make test-trainers")
    if not SHARED_DATA.exists():
        pytest.skip(f"needs the shared data, none at {SHARED_DATA}")
    report = reports(environment)[case]
    if "not_run" in report:
        pytest.skip(report["not_run"])
    assert "failed" not in report, report["failed"]
    assert len(report["plain"]) == len(report["hooked"]) == STEPS
    assert report["largest_gap"] <= TOLERANCE
    assert max(report["plain"]) - min(report["plain"]) > 0.01  # there was something to compare
    assert report["materialised"] == 0, report["materialised_by"]
    rows_of_logits, rows_of_logits_hooked = report["largest_logits"]
    assert rows_of_logits > 0 and rows_of_logits_hooked == 0
    rows = rows_of(environment, case)
    for trained, labelled in zip(report["trained"], report["labelled"], strict=True):
        allowed = {
            "labelled": trained == labelled,
            "cut": labelled - 4 <= trained <= labelled,
            "twice": labelled < trained <= 3 * labelled,
            "all": labelled < trained,
        }
        assert allowed[rows], (trained, labelled)
