"""Tables and plots are what the results give; a CPU's numbers never stand in a GPU's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, memory, run, tables
from benchmarks.head_tables import PEER_TARGETS
from benchmarks.op import METHODS
from benchmarks.plots import PLOTS, check_plots, memory_data, plot_files, write_plots
from benchmarks.problem import PASSES
from benchmarks.results import label, read_results, slug, write_results

NO_PAGES = {name: "".join(f"<!-- {table}:begin -->\n<!-- {table}:end -->\n" for table in found)
            for name, found in tables.tables_of([]).items()}  # fmt: skip


def write_pages(folder: Path) -> list[str]:
    """Pages with empty tables; the words that name them."""
    (folder / "docs").mkdir()
    for name, text in NO_PAGES.items():
        (folder / ("" if name == "README.md" else "docs") / name).write_text(text)
    return ["--readme", str(folder / "README.md"), "--docs", str(folder / "docs")]


def payload(ratio: float, date: str = "2026-01-01T00:00:00+00:00", **more: Any) -> dict[str, Any]:
    cell = {"median_ms": 10.0, "noise": 0.01, "ratio_to_gemm": ratio, "peak_mib": 512.0, "samples_ms": [10.0]}
    peer = {**cell, "median_ms": 15.0, "ratio_to_gemm": 1.5 * ratio}
    key = {"model": "llama-3-8b", "num_tokens": 16384, "dtype": "bfloat16", "task": "stash"}
    result = {
        "suite": "op", "key": "op/llama/stash", "ignored_percent": 0, "hidden_size": 4096,
        "vocab_size": 128256, "failed": {}, "not_run": {"cce-exact": "not installed"}, **key,
        "contenders": {
            "gemm": {**cell, "ratio_to_gemm": 1.0}, "fastdpo-triton": cell, "trl": peer,
            "fastdpo-bf16-logits": {**cell, "ratio_to_gemm": 1.001},
        },
    } | more  # fmt: skip
    info = {
        "date": date, "device": "NVIDIA TEST", "nvidia_smi": {}, "commit": "0" * 40,
        "has_uncommitted_changes": False, "packages": {"torch": "2.13.0", "trl": None},
    }  # fmt: skip
    return {"environment": info, "results": [result]}


def of_cpu(ratio: float) -> dict[str, Any]:
    cpu = payload(ratio)
    del cpu["environment"]["nvidia_smi"]
    cpu["environment"]["device"] = "CPU test"
    return cpu


def test_the_table_shows_the_newest_measurement_and_what_was_not_run(tmp_path: Path) -> None:
    assert tables.head_table([]).count("*not run*") == 12
    assert tables.peer_targets_table([]).count("*not run*") == len(PEER_TARGETS)
    write_results(payload(1.5, "2026-01-01T00:00:00+00:00"), tmp_path)
    write_results(payload(1.125, "2026-01-02T00:00:00+00:00"), tmp_path)
    results = read_results(tmp_path)
    table = tables.head_table(results)
    # The opt-in for rounded logits is faster, and not what the table is about.
    assert "| best 1.125 (fastdpo-triton, 10.0 ms, 0.50 GiB) |" in table and "1.500" not in table
    assert table.count("*not run*") == 11
    peers = tables.peer_targets_table(results)
    assert "| `trl` | `stash` | 1.45 x | best 1.50 +- 0.02 (fastdpo-triton) |" in peers
    assert "| `cce-exact` | `stash` | 3.00 x | not installed |" in peers


def test_two_gpus_do_not_share_a_table(tmp_path: Path) -> None:
    """The same case, measured later on another GPU, takes nothing away from the first."""
    write_results(payload(1.1, "2026-01-01T00:00:00+00:00"), tmp_path)
    later = payload(1.3, "2026-01-02T00:00:00+00:00")
    later["environment"]["device"] = "NVIDIA OTHER"
    write_results(later, tmp_path)
    results = read_results(tmp_path)
    other, test = tables.head_table(results).split("**NVIDIA TEST**")
    assert "**NVIDIA OTHER**" in other and "1.300" in other and "1.100" not in other
    assert "1.100" in test and "1.300" not in test
    peers = tables.peer_targets_table(results)
    assert "| peer | task | target | NVIDIA OTHER | NVIDIA TEST |" in peers
    page = tables.document(results)
    assert (
        page.index("### NVIDIA OTHER")
        < page.index("1.30 x")
        < page.index("### NVIDIA TEST")
        < page.index("1.10 x")
    )
    found = {device: list(cases.values()) for device, cases in tables.newest(results, of_gpu=True).items()}
    assert set(plot_files(found)) == {"other-time.svg", "test-time.svg"}


def test_the_head_tables_report_what_a_user_gets_who_sets_nothing(tmp_path: Path) -> None:
    """The best backend stands beside it, and does not stand in for it."""
    result = payload(1.125)
    cells = result["results"][0]["contenders"]
    cells["fastdpo-default"] = {**cells["fastdpo-triton"], "ratio_to_gemm": 1.25, "median_ms": 12.0}
    write_results(result, tmp_path)
    results = read_results(tmp_path)
    said = "1.250 (fastdpo-default, 12.0 ms, 0.50 GiB); best 1.125 (fastdpo-triton, 10.0 ms, 0.50 GiB)"
    assert said in tables.head_table(results)
    said = "1.25 +- 0.02 (fastdpo-default); best 1.50 +- 0.02 (fastdpo-triton)"
    assert said in tables.peer_targets_table(results)
    for method in METHODS:
        if method.name == "fastdpo-default":
            assert set(method.tasks) == set(PASSES)

    del cells["fastdpo-default"]
    result["results"][0]["failed"] = {"fastdpo-default": "dhidden is off"}
    write_results({**result, "environment": {**result["environment"], "date": "2026-01-02"}}, tmp_path)
    assert "fastdpo-default failed: dhidden is off; best" in tables.head_table(read_results(tmp_path))


def test_a_case_skipped_later_does_not_hide_its_measurement(tmp_path: Path) -> None:
    write_results(payload(1.1, "2026-01-01T00:00:00+00:00"), tmp_path)
    write_results(payload(1.1, "2026-01-02T00:00:00+00:00", skipped="given up", contenders={}), tmp_path)
    assert "1.100" in tables.head_table(read_results(tmp_path))


def test_a_point_measured_once_lies_on_every_curve_it_is_of() -> None:
    case = {
        "suite": "memory", "key": "memory/N", "axes": ["N", "V", "T"], "model": "small", "task": "pairs",
        "dtype": "float32", "num_tokens": 64, "vocab_size": 99, "length": 16, "failed": {}, "not_run": {},
        "contenders": {"torch": {"peak_mib": 3.0}},
    }  # fmt: skip
    panels = memory_data([case])
    assert {panel: series["torch"] for panel, series in panels.items()} == {
        "pairs against N, small": [(64, 3.0)],
        "pairs against V, small": [(99, 3.0)],
        "pairs against T, small": [(16, 3.0)],
    }
    del case["axes"]
    assert set(memory_data([{**case, "axis": "N"}])) == {"pairs against N, small"}  # an older file
    environment = {
        "date": "2026", "device": "CPU", "packages": {}, "commit": None, "has_uncommitted_changes": None
    }  # fmt: skip
    results = [{"file": "a.json", "environment": environment, "results": [{**case, "axes": ["N", "T"]}]}]
    page = tables.document(results)
    assert "| N = 64 |" in page and "| T = 16 |" in page and "V = 99 |" not in page
    assert "commit unknown, not known whether changed" in page


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 2, "environment": {}}'])
def test_a_file_that_is_no_result_file_is_named(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign.json").write_text(text)
    assert tables.main([*write_pages(tmp_path), "--results", str(tmp_path)]) == 2
    assert "error: foreign.json: " in capsys.readouterr().err
    for words in (["--resume"], ["--compare"]):
        assert run.main([*words, str(tmp_path / "foreign.json")]) == 2
        assert "error: foreign.json: " in capsys.readouterr().err
    words = ["--device", "cpu", "--quick", "--part", "1", "--results", str(tmp_path)]
    assert gpu.main(words) == 2
    assert "error: foreign.json: " in capsys.readouterr().err


def test_a_cpu_result_does_not_fill_a_gpu_table(tmp_path: Path) -> None:
    write_results(of_cpu(1.1), tmp_path)
    results = read_results(tmp_path)
    assert tables.head_table(results).count("*not run*") == 12
    assert tables.peer_targets_table(results).count("*not run*") == len(PEER_TARGETS)
    gpu, cpu = tables.document(results).split("## On a CPU")
    assert "*not run*: `make gpu`" in gpu and "| `trl`" not in gpu
    assert "numbers of a CPU" in cpu and "1.65 x" in cpu


def test_steps_are_compared_by_each_ones_fastest_round(tmp_path: Path) -> None:
    assert tables.steps_table([]).count("*not run*") == 2
    cell = {"backbone_positions_per_pair": 100.0, "peak_mib": None}
    contenders = {
        # Three rounds of two steps; the second round was disturbed.
        "trl-compacted": {**cell, "samples_ms": [4000.0, 2000.0, 9000.0, 9000.0, 4000.0, 2000.0]},
        "packed": {**cell, "samples_ms": [2000.0, 1000.0, 2000.0, 1000.0, 8000.0, 8000.0]},
    }
    more = {"suite": "step", "key": "step/mini/fp32", "model": "mini", "steps": 2, "contenders": contenders}
    result = of_cpu(1.0)
    result["results"][0] |= more
    write_results(result, tmp_path)
    table = tables.steps_table(read_results(tmp_path))
    assert "| CPU test | mini | `trl-compacted` | 3.00 | 3.00 +- " in table
    assert "% | 1.00 x | 100 |  |" in table and "% | 2.00 x | 100 |  |" in table
    assert "| CPU test | mini | `packed` | 1.50 | 1.50 +- " in table
    assert "| GPU | *not run* |" in table and table.count("*not run*") == 1


def test_what_failed_and_what_was_skipped_stand_in_the_page(tmp_path: Path) -> None:
    write_results(payload(1.1, failed={"quack": "RuntimeError: no kernel image"}), tmp_path)
    skipped = payload(1.1, key="op/other", skipped="does not fit: needs at least 99 bytes", contenders={})
    write_results(skipped, tmp_path)
    page = tables.document(read_results(tmp_path))
    assert "* `quack`: FAILED: RuntimeError: no kernel image" in page
    assert "* `cce-exact`: not installed" in page
    assert "* skipped: does not fit: needs at least 99 bytes" in page


@pytest.mark.promise(57)
def test_the_readme_the_page_and_the_plots_are_what_the_results_give() -> None:
    assert tables.main(["--check"]) == 0


def test_a_page_without_markers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="losses:begin"):
        tables.render("losses.md", "no markers", [])
    words = [*write_pages(tmp_path), "--results", str(tmp_path)]
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    assert tables.main(words) == 2
    assert "README.md: wanted <!-- memory:begin -->" in capsys.readouterr().err
    assert readme.read_text() == "no markers" and len(list((tmp_path / "docs").iterdir())) == 2


@pytest.mark.slow  # four suites, and all plots six times
def test_one_command_gives_json_tables_and_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    methods = {method.name: method for method in METHODS}
    # Not in a process of its own for each: `test_a_wrong_kernel_has_no_peak_memory` has these.
    monkeypatch.setattr(
        memory,
        "_in_a_process",
        lambda size, task, device, name: memory.measure(methods[name], size, task, device),
    )
    left_out = [m.name for m in METHODS if m.name not in ("fastdpo-cpu", "torch", "cce")]
    brief = ["--device", "cpu", "--preset", "tiny", "--repeats", "2", "--tasks", "stash", "pairs"]
    words = ["op", "row", "accuracy", "memory", *brief, "--without", *left_out]
    page = tmp_path / "page"
    assert run.main([*words, "--results", str(tmp_path / "results"), "--page", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "x GEMM" in shown and "cce                    not run: runs on CUDA GPUs only" in shown
    (result,) = read_results(tmp_path / "results")
    assert {r["suite"] for r in result["results"]} == {"op", "row", "accuracy", "memory"}
    assert result["environment"]["packages"]["torch"] and result["settings"]["preset"] == "tiny"
    timed = next(r for r in result["results"] if r["key"].endswith("/stash") and r["suite"] == "op")
    assert len(timed["contenders"]["torch"]["samples_ms"]) == 2
    # The one command has written them all.
    device = slug(label(result["environment"]))
    plots = [plot for plot in PLOTS if not plot.name.startswith("context")]
    assert f"`{tmp_path}/results/{result['file']}`" in (page / "benchmarks.md").read_text()
    assert {path.name for path in (page / "plots").iterdir()} == {f"{device}-{p.name}.svg" for p in plots}

    docs = tmp_path / "docs"
    places = [*write_pages(tmp_path), "--results", str(tmp_path / "results")]
    assert tables.main([*places, "--check"]) == 1
    assert tables.main(places) == 0 and tables.main([*places, "--check"]) == 0
    page = (docs / "benchmarks.md").read_text()
    for plot in plots:
        assert f"plots/{device}-{plot.name}.svg" in page
        assert "</svg>" in (docs / "plots" / f"{device}-{plot.name}.svg").read_text()
    assert len(list((docs / "plots").iterdir())) == len(plots)

    # One number changed by hand, in the results or in the page, is found.
    (docs / "benchmarks.md").write_text(page.replace("ms", "s", 1))
    assert tables.main([*places, "--check"]) == 1
    assert tables.main(places) == 0
    path = tmp_path / "results" / result["file"]
    changed = json.loads(path.read_text())
    next(r for r in changed["results"] if r["key"] == timed["key"])["contenders"]["torch"][
        "ratio_to_gemm"
    ] += 1
    path.write_text(json.dumps(changed))
    capsys.readouterr()
    assert tables.main([*places, "--check"]) == 1
    assert f"{device}-time.svg" in capsys.readouterr().err


def test_a_plot_of_results_that_are_gone_is_removed_and_others_are_left(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cases = {"gpu": payload(1.1)["results"], "cpu": []}
    assert set(plot_files(cases)) == {"gpu-time.svg"}
    (tmp_path / "mine.svg").write_text("<svg/>")
    assert check_plots(cases, tmp_path) == ["gpu-time.svg"]
    assert [path.name for path in write_plots(cases, tmp_path)] == ["gpu-time.svg"]
    assert write_plots(cases, tmp_path) == [] and check_plots(cases, tmp_path) == []
    write_plots({"gpu": [], "cpu": []}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.svg"]
