"""``pytest benchmarks --benchmark-only``: the same cases and checks under pytest-benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.rows import RowProblem, bench_rows

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny sizes are a CPU's")
def test_the_entry_points_run_under_pytest_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    words = [
        "benchmarks",
        "--benchmark-only",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--bench-rounds",
        "2",
    ]
    chosen = "(pairs and not frozen and (gemm or cpu or cce-exact)) or test_row"
    command = [
        sys.executable,
        "-m",
        "pytest",
        *words,
        "-k",
        chosen,
        f"--benchmark-json={tmp_path / 'out.json'}",
    ]
    # What a test-runner above this one put there would be taken for this one's.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "runs on CUDA GPUs only" in done.stdout
    found = {bench["name"]: bench for bench in json.loads((tmp_path / "out.json").read_text())["benchmarks"]}
    ours = next(bench for name, bench in found.items() if "pairs-fastdpo-cpu" in name)
    assert ours["stats"]["rounds"] == 2 and ours["stats"]["median"] > 0
    assert ours["extra_info"]["dweight_relative_error"] < 2**-13 and ours["extra_info"]["gemm_passes"] == 3
    assert any("pairs-gemm" in name for name in found)
    rows = [bench for name, bench in found.items() if name.startswith("test_row")]
    assert len(rows) == 2 and all(bench["extra_info"]["gb_per_s"] > 0 for bench in rows)


def test_a_row_kernel_that_writes_a_wrong_d_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RowProblem.run

    def wrong(self: RowProblem, backend: str) -> None:
        right(self, backend)
        self.d[:, -1] += 0.5

    monkeypatch.setattr(RowProblem, "run", wrong)
    result = bench_rows(
        torch.device("cpu"), ["reference"], vocab=101, logits_dtype=torch.float32, rows=32, repeats=1
    )
    assert set(result["contenders"]) == {"copy"} and "D is off by" in result["failed"]["reference"]
