"""``fastdpo bench``: what is measured is kept case by case, resumed, compared, and never overwritten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, run
from benchmarks.compare import compare_results, report
from benchmarks.harness import environment, peak_mib
from benchmarks.memory import bench_memory
from benchmarks.problem import Size
from benchmarks.results import ResultFile, read_result, read_results, write_results
from benchmarks.sizes import PRESETS
from benchmarks.suites import SUITES, Case, Options, make_cases

CPU = torch.device("cpu")
BRIEF = ["--device", "cpu", "--preset", "tiny", "--repeats", "2", "--tasks", "score"]
PEERS = ["--contenders", "fastdpo-cpu", "fastdpo-reference", "torch"]


def result(key: str, **more: Any) -> dict[str, Any]:
    cells = {"gemm": cell(10.0), "fastdpo-cpu": cell(11.0)}
    return {"suite": "op", "key": key, "failed": {}, "not_run": {}, "contenders": cells} | more


def cell(median: float, noise: float = 0.01) -> dict[str, Any]:
    return {"median_ms": median, "noise": noise, "samples_ms": [median]}


def case(key: str, run: Callable[[], dict[str, Any]] | None = None, needs: int = 0) -> Case:
    return Case(key, "op", run or (lambda: result(key)), 1.0, needs)


def new_file(folder: Path) -> ResultFile:
    return ResultFile(folder, environment(CPU), {"suites": ["op"]})


def interrupt() -> dict[str, Any]:
    raise KeyboardInterrupt


def test_a_run_that_is_interrupted_keeps_what_it_measured_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [case("a"), case("b", interrupt), case("c")]
    monkeypatch.setattr(run, "make_cases", lambda suite, options: cases)
    assert run.main(["op", *BRIEF, "--results", str(tmp_path)]) == 130
    (path,) = tmp_path.iterdir()
    assert [r["key"] for r in read_result(path)["results"]] == ["a"]
    assert f"--resume {path}" in capsys.readouterr().out

    measured: list[str] = []

    def measure(key: str) -> dict[str, Any]:
        measured.append(key)
        return result(key)

    cases[:] = [case(key, lambda key=key: measure(key)) for key in "abc"]  # type: ignore[misc]
    assert run.main(["--resume", str(path)]) == 0
    assert measured == ["b", "c"] and list(tmp_path.iterdir()) == [path]
    assert [r["key"] for r in read_result(path)["results"]] == ["a", "b", "c"]


def test_a_run_of_other_circumstances_is_not_mixed_in(tmp_path: Path) -> None:
    file = new_file(tmp_path)
    path = file.add(result("a"))
    before = path.read_text()
    with pytest.raises(ValueError, match="commit was .*, is another"):
        ResultFile.resume(path, {**environment(CPU), "commit": "another"}, {})
    assert path.read_text() == before


def test_a_run_that_has_no_time_left_stops_before_a_case(tmp_path: Path) -> None:
    file = new_file(tmp_path)
    assert not run.run_cases([case("a"), case("b")], file, CPU, max_seconds=0.0)
    assert not file.results
    assert run.run_cases([case("a"), case("b")], file, CPU, max_seconds=60.0)
    assert file.done == {"a", "b"}


def test_a_size_that_does_not_fit_is_skipped_with_its_bytes_and_tried_again(tmp_path: Path) -> None:
    file = new_file(tmp_path)

    def out_of_memory() -> dict[str, Any]:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB\nmore")

    assert run.run_cases([case("a", needs=2**60), case("b", out_of_memory), case("c")], file, CPU)
    skipped = {r["key"]: r.get("skipped", "") for r in file.results}
    assert str(2**60) in skipped["a"] and "GiB" in skipped["a"]
    assert skipped["b"].startswith("out of memory") and "20 GiB" in skipped["b"]
    assert file.done == {"c"}
    run.run_cases([case("a")], file, CPU)
    assert file.done == {"a", "c"} and len(file.results) == 3


def test_a_wrong_contender_of_ours_fails_the_run_and_a_peer_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code in (("fastdpo-cpu", 1), ("trl", 0)):
        failed = {name: "dhidden is off by 2.0e-02 of its norm; not timed"}
        cases = [case("a", lambda failed=failed: result("a", failed=failed))]  # type: ignore[misc]
        monkeypatch.setattr(run, "make_cases", lambda suite, options, cases=cases: cases)
        assert run.main(["op", *BRIEF, "--results", str(tmp_path)]) == code


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    paths = {new_file(tmp_path).add(result(key)) for key in "abc"}
    assert len(paths) == 3 == len(read_results(tmp_path))


def test_a_file_of_another_schema_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"schema": 1}))
    with pytest.raises(ValueError, match="old.json: schema 1, this version reads 2"):
        read_results(tmp_path)
    for arguments in (["--resume", str(old)], ["--compare", str(old)], ["op", *BRIEF, "--compare", str(old)]):
        assert run.main(arguments) == 2
        assert "old.json: schema 1" in capsys.readouterr().err
    (tmp_path / "none.json").write_text("no json")
    with pytest.raises(ValueError, match="none.json: is no result file"):
        read_result(tmp_path / "none.json")
    assert old.read_text() == json.dumps({"schema": 1})


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "make_cases", lambda suite, options: [case("a", interrupt)])
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    assert run.main(["op", *BRIEF, "--results", str(blocked / "results")]) == 2
    assert f"cannot write to {blocked}" in capsys.readouterr().err
    assert blocked.read_text() == "kept"


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["op", "--device", "cuda", "--results", str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert gpu.main(["--results", str(tmp_path)]) == 1
    assert "sees no CUDA GPU; nothing was run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_name_that_there_is_not_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["nope"], ["op", "--tasks", "nope"], []):
        with pytest.raises(SystemExit):
            run.main(words)
    assert "wanted one of op, row" in capsys.readouterr().err
    assert run.main(["op", *BRIEF, "--contenders", "nope", "--results", str(tmp_path)]) == 2
    assert "contender: got 'nope'" in capsys.readouterr().err
    assert run.main(["op", *BRIEF, "--models", "nope", "--results", str(tmp_path)]) == 2
    assert "--models: got 'nope', wanted some of tiny" in capsys.readouterr().err


def test_every_suite_has_cases_at_every_preset() -> None:
    for preset in PRESETS:
        for suite in SUITES:
            cases = make_cases(suite, Options(CPU, preset, repeats=3, seconds=1.0))
            assert len({case.key for case in cases}) == len(cases) > 0
    full = make_cases("op", Options(CPU, "full", repeats=3, seconds=1.0))
    for words in (
        "gemma-3-270m",
        "llama-3-70b",
        "N=1024/",
        "N=65536/",
        "50% ignored",
        "80% ignored",
        "/pairs",
    ):
        assert any(words in case.key for case in full), words
    steps = [case.key for case in make_cases("step", Options(CPU, "gpu", repeats=3, seconds=1.0))]
    models = ["qwen2.5-0.5b", "llama-3.2-1b", "llama-3-8b-lora"]
    assert [key.split("/")[:3] for key in steps] == [["step", model, "bf16"] for model in models]


def test_no_point_of_memory_is_measured_twice() -> None:
    for preset, count in (("small", 14), ("gpu", 14)):
        cases = make_cases("memory", Options(CPU, preset, 3, 1.0))
        assert len(cases) == count
        points = [case.key.split("/", 2)[2] for case in cases]
        assert len(set(points)) == len(points)


def test_the_parts_on_a_gpu_are_the_whole_preset() -> None:
    everything, parts = set(), []
    for suite in SUITES:
        if suite == "context":  # steps of minutes: for who asks
            continue
        everything |= {case.key for case in make_cases(suite, Options(CPU, "gpu", 3, 1.0))}
    for part in gpu.PARTS.values():
        if not part.suites:
            continue
        args = run.parse(part.suites)
        options = Options(CPU, "gpu", 3, 1.0, models=args.models, tokens=args.tokens)
        parts += [case.key for suite in args.suites for case in make_cases(suite, options)]
    assert sorted(parts) == sorted(everything)


def test_without_tqdm_the_time_left_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "tqdm", None)
    assert run.run_cases([case("a"), case("b")], new_file(tmp_path), CPU)
    assert "50 %, about" in capsys.readouterr().out


def payload(median: float, noise: float = 0.01, **more: Any) -> dict[str, Any]:
    cells = {"gemm": cell(10.0, noise), "fastdpo-cpu": cell(median, noise)}
    info = {"device": "CPU test", "threads": 1, "cuda": None, "date": "2026-01-01"}
    return {"file": "x.json", "environment": info, "results": [result("a", contenders=cells, **more)]}


@pytest.mark.promise(58)
@pytest.mark.parametrize(
    ("median", "noise", "code", "said"),
    [
        (11.0, 0.01, 0, "same"),
        (11.2, 0.01, 0, "same"),
        (12.0, 0.01, 1, "SLOWER"),
        (12.0, 0.10, 0, "same"),
        (9.0, 0.01, 0, "faster"),
    ],
)
def test_a_change_is_a_regression_only_beyond_its_noise(
    median: float, noise: float, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = compare_results(payload(11.0, noise), payload(median, noise))
    (change,) = compared.changes
    assert change.ratio == pytest.approx(median / 11) and change.noise == pytest.approx(max(0.02, 2 * noise))
    assert report(compared) == code
    assert said in capsys.readouterr().out


def test_a_clock_that_slows_floor_and_kernel_alike_is_no_regression() -> None:
    slow = payload(22.0)
    slow["results"][0]["contenders"]["gemm"] = cell(20.0)
    (change,) = compare_results(payload(11.0), slow).changes
    assert change.per_floor and change.ratio == pytest.approx(1.0)


def test_a_contender_that_broke_is_a_regression_and_one_of_another_machine_is_not() -> None:
    broken = payload(11.0, failed={"fastdpo-cpu": "raised"})
    assert report(compare_results(payload(11.0), broken)) == 1
    elsewhere = payload(30.0)
    elsewhere["environment"]["device"] = "another"
    assert report(compare_results(payload(11.0), elsewhere)) == 0
    with pytest.raises(ValueError, match="no timed case in common"):
        compare_results(payload(11.0), {**payload(11.0), "results": []})


def test_compare_runs_again_what_is_in_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(median: float) -> dict[str, Any]:
        return result("a", contenders={"gemm": cell(10.0), "fastdpo-cpu": cell(median)})

    times = iter([11.0, 12.0])
    cases = [case("a", lambda: measured(next(times))), case("b", interrupt)]
    monkeypatch.setattr(run, "make_cases", lambda suite, options: cases)
    folder = ["--results", str(tmp_path)]
    old = new_file(tmp_path)
    run.run_cases(cases[:1], old, CPU)
    assert run.main(["--compare", str(old.path), *folder]) == 1
    assert "SLOWER" in capsys.readouterr().out
    (new,) = set(tmp_path.iterdir()) - {old.path}
    assert run.main(["--compare", str(old.path), "--with", str(new)]) == 1
    assert run.main(["--compare", str(new), "--with", str(old.path)]) == 0


def test_peak_memory_of_a_cpu_is_that_of_the_run() -> None:
    peak = peak_mib(lambda: torch.ones(64 * 2**18).sum(), CPU)  # 64 MiB, freed before it returns
    if peak is None:
        pytest.skip("this system does not let a process reset its peak")
    assert 60 < peak < 100


@pytest.mark.slow  # `test_a_wrong_kernel_has_no_peak_memory` starts such processes in every run
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    """32 MiB of logits in fp32 per copy: full logits need several, ours a budget."""
    size = Size("tiny", 1024, torch.float32, vocab=8000)
    names = ("fastdpo-cpu", "torch")
    left_out = {m.name: "left out" for m in run_methods() if m.name not in names}
    found = bench_memory(["N", "V"], size, "pairs", CPU, left_out)
    assert found["axes"] == ["N", "V"] and found["key"].startswith("memory/N/")
    if set(found["not_run"]) & set(names):
        pytest.skip("this system does not let a process reset its peak")
    assert not found["failed"] and set(found["contenders"]) == set(names)
    assert found["contenders"]["torch"]["peak_mib"] > 2 * 31
    assert found["contenders"]["torch"]["logps_error_nats"] < 1e-3


def run_methods() -> Any:
    from benchmarks.op import METHODS

    return METHODS


def test_a_whole_file_is_written_at_once(tmp_path: Path) -> None:
    info = environment(CPU)
    path = write_results({"environment": info, "results": [result("a"), result("b")]}, tmp_path)
    assert [r["key"] for r in read_result(path)["results"]] == ["a", "b"]
    assert not list(tmp_path.glob("*.part"))
