"""``pytest benchmarks --benchmark-only``: the same cases and checks under pytest-benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import peak_mib
from benchmarks.memory import bench_memory
from benchmarks.op import METHODS
from benchmarks.problem import Size
from benchmarks.rows import RowProblem, bench_rows
from tests import ROOT

CPU = torch.device("cpu")
# A mistake in the CPU's row kernel, in whatever process: Python imports it before anything else.
PLANTED = """
import fastdpo.kernels.cpu as module
right = module.row_kernel
def row_kernel(*args, d_out=None, **options):
    right(*args, d_out=d_out, **options)
    if d_out is not None:
        d_out.mul_(1.05)
module.row_kernel = row_kernel
"""
# One of ours a suite, peers, and one that needs a GPU.
CHOSEN = (
    "(test_op and pairs and not frozen and (gemm or fastdpo-cpu or cce-exact)) or test_row "
    "or (test_accuracy and float32-pairs and not frozen and (fastdpo-cpu or torch-compacted)) "
    "or (test_memory and (fastdpo-cpu or torch-compacted)) or (test_step and tiny-fp32 and (plain or packed))"
)
SUITES = ("op", "row", "step", "memory", "accuracy")


def run_pytest(
    folder: Path, chosen: str = CHOSEN, **more: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """What it says, and the rows of its JSON by name."""
    pytest.importorskip("pytest_benchmark")
    words = "benchmarks --benchmark-only -p no:cacheprovider -p no:xdist --bench-rounds 2".split()
    command = [
        sys.executable,
        "-m",
        "pytest",
        *words,
        "-k",
        chosen,
        f"--benchmark-json={folder / 'out.json'}",
    ]
    # What a test-runner above this one put there would be taken for this one's.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**clean, **more})
    text = (folder / "out.json").read_text()
    return done, {bench["name"]: bench for bench in json.loads(text)["benchmarks"]} if text else {}


def of(name: str, found: dict[str, Any]) -> dict[str, Any]:
    (row,) = (row for full, row in found.items() if full.startswith(f"test_{name.split()[0]}[")
              and all(word in full for word in name.split()[1:]))  # fmt: skip
    return row


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny sizes are a CPU's")
def test_every_suite_runs_under_pytest_benchmark(tmp_path: Path) -> None:
    done, found = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "runs on CUDA GPUs only" in done.stdout
    assert {name.partition("[")[0] for name in found} == {f"test_{suite}" for suite in SUITES}
    assert all(row["stats"]["median"] > 0 for row in found.values())
    rounds = {row["stats"]["rounds"] for name, row in found.items() if "accuracy" not in name}
    ours = of("op pairs-fastdpo-cpu", found)
    assert ours["stats"]["rounds"] == 2 and of("op pairs-gemm", found)
    assert ours["extra_info"]["dweight_relative_error"] < 2**-13 and ours["extra_info"]["gemm_passes"] == 3
    rows = [row for name, row in found.items() if name.startswith("test_row")]
    assert len(rows) == 2 and all(row["extra_info"]["gb_per_s"] > 0 for row in rows)
    for name in ("fastdpo-cpu", "torch-compacted"):
        accuracy = of(f"accuracy float32-pairs-{name}", found)
        assert accuracy["extra_info"]["dweight_relative_error"] < 2**-11 and accuracy["stats"]["rounds"] == 1
        if peak_mib(lambda: None, CPU) is not None:
            memory = of(f"memory {name}", found)["extra_info"]
            assert memory["peak_mib"] > 1 and memory["logps_error_nats"] < 1e-3
        assert "no measurement of speed" in accuracy["extra_info"]["timed"]
    plain, packed = (of(f"step tiny-fp32-{name}", found) for name in ("plain", "packed"))
    assert plain["stats"]["rounds"] == packed["stats"]["rounds"] == 2 and 2 in rounds
    assert packed["extra_info"]["loss_error_nats"] < 1e-4
    assert plain["extra_info"]["tokens"] == packed["extra_info"]["tokens"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny sizes are a CPU's")
def test_a_planted_kernel_is_refused_in_every_suite_under_pytest_benchmark(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    # Peers of memory and step are dear, and are timed above.
    chosen = f"({CHOSEN}) and not (test_memory and torch) and not plain"
    done, found = run_pytest(tmp_path, chosen, PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert found and not [name for name in found if "fastdpo" in name or "packed]" in name or "row" in name]
    for suite in SUITES:
        assert f"FAILED benchmarks/test_{suite}.py::test_{suite}[" in done.stdout
    # The contenders beside it are timed all the same.
    assert of("op pairs-gemm", found)
    assert of("accuracy float32-pairs-torch-compacted", found)


def test_a_wrong_kernel_has_no_peak_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU each contender is measured in a process of its own, where a planted one gets in as well."""
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    names = ("fastdpo-cpu", "torch-compacted")
    left_out = {method.name: "left out" for method in METHODS if method.name not in names}
    size = Size("tiny", 128, torch.float32)
    result = bench_memory(["N"], size, "pairs", CPU, left_out)
    if "torch-compacted" in result["not_run"]:
        pytest.skip("this system does not let a process reset its peak")
    assert set(result["contenders"]) == {"torch-compacted"} and set(result["failed"]) == {"fastdpo-cpu"}
    assert "is off by" in result["failed"]["fastdpo-cpu"]


def test_a_row_kernel_that_writes_a_wrong_d_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RowProblem.run

    def wrong(self: RowProblem, backend: str) -> None:
        right(self, backend)
        self.d[:, -1] += 0.5

    monkeypatch.setattr(RowProblem, "run", wrong)
    result = bench_rows(CPU, ["reference"], vocab=101, logits_dtype=torch.float32, rows=32, repeats=1)
    assert set(result["contenders"]) == {"copy"} and "D is off by" in result["failed"]["reference"]
