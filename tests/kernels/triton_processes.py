"""Triton's interpreter in a process of its own: its first import settles whether kernels are interpreted."""

from __future__ import annotations

import os
import re
import subprocess
import sys


def run_interpreted(*tests: str, at_least: int, chosen: str | None = None) -> None:
    """Run files of tests, or tests by their names, under Triton's interpreter.

    Args:
        at_least: how many of its tests have to pass, so that a choice of none does not.
        chosen: an expression for ``-k``.
    """
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-W", "ignore::RuntimeWarning"]
    command += ["-p", "no:cacheprovider", *(() if chosen is None else ("-k", chosen))]
    result = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= at_least, result.stdout
