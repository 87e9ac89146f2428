"""The table over the share of ignored labels: who projects all rows is told from who drops them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.padding import padding_of, padding_tables
from benchmarks.results import read_results, write_results


def cell(median: float, rows: str = "labelled") -> dict[str, Any]:
    return {"median_ms": median, "noise": 0.03, "ratio_to_gemm": 1.1, "rows": rows, "samples_ms": [median]}


def case(share: int, task: str = "pairs", **more: Any) -> dict[str, Any]:
    labelled = 16384 * (100 - share) // 100
    contenders = {
        "gemm": cell(labelled / 1200),
        "fastdpo-triton": cell(labelled / 1001),
        "fastdpo-default": cell(labelled / 1000),
        "trl": cell(1.3 * labelled / 1000),
        "liger-dpo": cell(1.25 * 16.384, "all"),
    }
    return {
        "suite": "op", "key": f"op/llama-3-8b/{share}/{task}", "model": "llama-3-8b", "num_tokens": 16384,
        "num_labelled": labelled, "hidden_size": 4096, "vocab_size": 128256, "ignored_percent": share,
        "dtype": "bfloat16", "task": task, "failed": {}, "not_run": {}, "contenders": contenders,
    } | more  # fmt: skip


def payload(*results: dict[str, Any], is_gpu: bool = True) -> dict[str, Any]:
    info = {
        "date": "2026-01-01T00:00:00+00:00", "device": "NVIDIA TEST" if is_gpu else "CPU test", "commit": "0",
        "has_uncommitted_changes": False, "packages": {}, **({"nvidia_smi": {}} if is_gpu else {}),
    }  # fmt: skip
    return {"environment": info, "results": list(results)}


def row(table: str, task: str, name: str) -> list[str]:
    (line,) = (x for x in table.splitlines() if x.startswith(f"| `{task}` | ") and name in x.split("|")[2])
    return [word.strip() for word in line.strip("|").split("|")][2:]


def test_the_multiple_of_who_projects_all_rows_grows_with_the_padding(tmp_path: Path) -> None:
    write_results(payload(case(0), case(50), case(80)), tmp_path)
    table = padding_tables(read_results(tmp_path))
    assert "**NVIDIA TEST, llama-3-8b, N = 16384, bfloat16**" in table
    assert row(table, "pairs", "all rows") == ["", "1.00", "2.00", "5.00"]
    assert row(table, "pairs", "liger-dpo") == ["all", "1.25 x +- 0.05", "2.50 x +- 0.11", "6.25 x +- 0.27"]
    assert row(table, "pairs", "trl") == ["labelled", *["1.30 x +- 0.06"] * 3]
    assert row(table, "pairs", "fastdpo-default")[1:] == [
        "16.4 ms +- 3 %",
        "8.19 ms +- 3 %",
        "3.28 ms +- 3 %",
    ]
    # What was not measured is said, and not left away.
    assert row(table, "stash", "trl") == ["", *["*not run*"] * 3]
    page = tables.document(read_results(tmp_path))
    assert "#### Time over the share of ignored labels" in page and "6.25 x +- 0.27" in page


def test_where_no_file_has_it_it_is_not_run(tmp_path: Path) -> None:
    assert padding_tables([]).count("*not run*") == 27
    # One share alone is no change over the share.
    write_results(payload(case(0)), tmp_path)
    assert padding_tables(read_results(tmp_path)).count("*not run*") == 27
    assert padding_of([case(0)]) == ["*not run* on this device: one size over the share of ignored labels."]
    assert "over the share of ignored labels." in tables.document(read_results(tmp_path))


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("liger-dpo", {"failed": {"liger-dpo": "dhidden is off"}}, "failed"),
        ("liger-dpo", {"not_run": {"liger-dpo": "not installed"}}, "*not run*"),
        ("fastdpo-default", {"failed": {"fastdpo-default": "dhidden is off"}}, "1.25 x +- 0.05"),
    ],
)
def test_who_is_missing_at_one_share(name: str, more: dict[str, Any], said: str) -> None:
    """Beside the best of ours where what sets nothing is not there."""
    first = case(0, **more)
    del first["contenders"][name]
    table = padding_of([first, case(50)])[-1]
    assert row(table, "pairs", "liger-dpo")[1] == said
    without_ours = case(0, contenders={"trl": cell(1.0)}, failed={"fastdpo-default": "raised"})
    table = padding_of([without_ours, case(50)])[-1]
    assert row(table, "pairs", "trl")[1] == "ours failed" and "1.30 x" in row(table, "pairs", "trl")[2]


def test_a_cpu_has_a_table_of_its_own(tmp_path: Path) -> None:
    cpu = payload(
        case(0, model="small", num_tokens=1024), case(80, model="small", num_tokens=1024), is_gpu=False
    )
    write_results(cpu, tmp_path)
    gpu, table = padding_tables(read_results(tmp_path)).split("**CPU test, small")
    assert gpu.count("*not run*") == 27 and "liger-dpo" in table
    assert row(table, "pairs", "liger-dpo")[2] == "*not run*"  # nobody measured 50 %
