"""Triton in processes of its own: interpreted, or compiling for GPUs that need not be here.

Whether kernels are interpreted is settled when Triton is first imported; what compiles replaces the driver.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_interpreted(file: str, *, at_least: int, chosen: str | None = None) -> None:
    """Run a test file under Triton's interpreter.

    Args:
        at_least: how many of its tests have to pass, so that a choice of none does not.
        chosen: an expression for ``-k``.
    """
    command = [sys.executable, "-m", "pytest", file, "-q", "-W", "ignore::RuntimeWarning"]
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


def compile_reports(module: str, archs: Sequence[int], cache: Path) -> dict[int, Any]:
    """What ``python -m module ARCH`` prints as JSON, for every architecture."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)

    def report(arch: int) -> Any:
        command = [sys.executable, "-m", module, str(arch)]
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(archs, pool.map(report, archs), strict=True))
