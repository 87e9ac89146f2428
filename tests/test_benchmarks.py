"""The benchmarks own up: a wrong contender is not timed, nothing is overwritten, tables say *not run*."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, head, tables
from benchmarks.harness import Contender, read_results, time_interleaved, write_results
from benchmarks.head import HeadProblem, Size, bench_mode

CPU = torch.device("cpu")
TINY = Size("tiny", 512, torch.float32)
ROOT = Path(__file__).resolve().parent.parent


def test_contenders_take_turns() -> None:
    order: list[str] = []
    contenders = [
        Contender("a", lambda: order.append("a"), prepare=lambda: order.append("prepare")),
        Contender("b", lambda: order.append("b")),
    ]
    samples = time_interleaved(contenders, CPU, repeats=2, warmup=1)
    assert order == ["prepare", "a", "b"] * 3
    assert {name: len(values) for name, values in samples.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("mode", ["score", "stash", "cache", "pairs"])
def test_a_mode_is_timed_beside_its_products(mode: str) -> None:
    result = bench_mode(HeadProblem(TINY, CPU), mode, ["reference"], repeats=2)
    assert not result["failed"]
    assert set(result["contenders"]) == {"gemm", "reference"}
    ours = result["contenders"]["reference"]
    assert len(ours["samples_ms"]) == 2 and ours["logps_error_nats"] <= (1e-5 if mode != "pairs" else 128e-5)
    assert result["contenders"]["gemm"]["ratio_to_gemm"] == 1


def test_a_wrong_kernel_is_refused_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = head.linear_logprob

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = right(*args, **kwargs)
        return out._replace(logps=out.logps + 1e-3)

    monkeypatch.setattr(head, "linear_logprob", wrong)
    result = bench_mode(HeadProblem(TINY, CPU), "stash", ["reference"], repeats=1)
    assert set(result["contenders"]) == {"gemm"}
    assert "off by 1.0" in result["failed"]["reference"]


@pytest.mark.parametrize("mode", ["stash", "cache", "pairs"])
def test_a_wrong_gradient_is_refused_not_timed(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """2 % too large, which no look at the log-probabilities tells."""
    right = HeadProblem.step

    def wrong(self: HeadProblem, *args: str) -> Any:
        logps, dhidden, *others = right(self, *args)
        return (logps, dhidden * 1.02, *others)

    monkeypatch.setattr(HeadProblem, "step", wrong)
    result = bench_mode(HeadProblem(TINY, CPU), mode, ["reference"], repeats=1)
    assert set(result["contenders"]) == {"gemm"}
    assert "dhidden is off by 2.0" in result["failed"]["reference"]


def test_the_whole_script_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--quick", "--repeats", "1", "--results", str(tmp_path)]) == 0
    (payload,) = read_results(tmp_path)
    assert {result["suite"] for result in payload["results"]} == {"head", "rows"}
    assert payload["environment"]["packages"]["torch"]
    assert "ms" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--results", str(tmp_path)]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def payload(ratio: float, date: str = "2026-01-01T00:00:00+00:00") -> dict[str, Any]:
    cell = {"median_ms": 10.0, "ratio_to_gemm": ratio, "peak_mib": 512.0, "samples_ms": [10.0]}
    result = {
        "suite": "head", "model": "llama-3-8b", "num_tokens": 16384, "dtype": "bfloat16", "mode": "stash",
        "failed": {}, "contenders": {"gemm": {**cell, "ratio_to_gemm": 1.0}, "triton": cell},
    }  # fmt: skip
    return {"environment": {"date": date, "device": "NVIDIA TEST", "nvidia_smi": {}}, "results": [result]}


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    paths = [write_results(payload(ratio), tmp_path) for ratio in (1.1, 1.2, 1.3)]
    assert len(set(paths)) == 3
    ratios = [read["results"][0]["contenders"]["triton"]["ratio_to_gemm"] for read in read_results(tmp_path)]
    assert sorted(ratios) == [1.1, 1.2, 1.3]


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="old.json: schema 0"):
        read_results(tmp_path)


def test_the_table_shows_the_newest_measurement_and_what_was_not_run(tmp_path: Path) -> None:
    assert tables.head_table([]).count("*not run*") == 12
    write_results(payload(1.5, "2026-01-01T00:00:00+00:00"), tmp_path)
    write_results(payload(1.125, "2026-01-02T00:00:00+00:00"), tmp_path)
    table = tables.head_table(read_results(tmp_path))
    assert "1.125 (triton, 10.0 ms, 0.50 GiB)" in table and "1.500" not in table
    assert table.count("*not run*") == 11


def test_a_cpu_result_does_not_fill_the_gpu_table(tmp_path: Path) -> None:
    cpu = payload(1.1)
    del cpu["environment"]["nvidia_smi"]
    write_results(cpu, tmp_path)
    assert tables.head_table(read_results(tmp_path)).count("*not run*") == 12


def test_the_readme_is_what_the_results_give() -> None:
    assert tables.main(["--check"]) == 0


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="losses:begin"):
        tables.render("no markers", [])
