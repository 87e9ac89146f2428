"""One contender that raises, runs out of memory or takes the device with it costs the others nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import op, run, suites
from benchmarks.harness import Contender, DeviceLost, environment
from benchmarks.method import WHOLE, Method
from benchmarks.op import METHODS, bench_task, reason_not_to_run
from benchmarks.problem import HeadProblem, Outcome, Size
from benchmarks.results import ResultFile, read_result
from benchmarks.rows import RowProblem, bench_rows
from benchmarks.suites import Case
from benchmarks.timing import time_interleaved

CPU = torch.device("cpu")
TINY = Size("tiny", 256, torch.float32, 50)
BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(autouse=True)
def known_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPO_COMMIT", "0" * 40)


def after(calls: int, error: Exception) -> Method:
    """Right for so many calls, the check among them; then it raises."""
    count = 0

    def run(problem: HeadProblem, task: str) -> Outcome:
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return BY_NAME["torch"].run(problem, task)

    return replace(BY_NAME["torch"], name="failing", run=run)


def case(key: str, run: Callable[[], dict[str, Any]]) -> Case:
    return Case(key, "op", run, 1.0)


def measured(key: str) -> dict[str, Any]:
    return {"suite": "op", "key": key, "failed": {}, "not_run": {}, "contenders": {}}


def raising(error: BaseException) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        raise error

    return run


def test_one_that_raises_while_it_is_timed_is_out_of_the_turns_alone() -> None:
    calls = {"a": 0, "b": 0}

    def count(name: str) -> None:
        calls[name] += 1
        if name == "a" and calls["a"] == 2:
            raise RuntimeError("no more\nof it")

    contenders = [Contender("a", lambda: count("a")), Contender("b", lambda: count("b"))]
    failed: dict[str, str] = {}
    samples = time_interleaved(contenders, CPU, repeats=3, warmup=1, failed=failed)
    assert failed == {"a": "raised while it was timed: RuntimeError: no more"}
    assert {name: len(values) for name, values in samples.items()} == {"b": 3}
    with pytest.raises(RuntimeError, match="no more"):
        time_interleaved([Contender("a", raising(RuntimeError("no more")))], CPU)
    assert time_interleaved(contenders[:1], CPU, failed=failed)  # goes again


@pytest.mark.parametrize(
    "error", [RuntimeError("no kernel image\nis there"), torch.OutOfMemoryError("20 GiB\nmore")]
)
def test_a_case_goes_on_without_the_contender_that_failed_while_timed(error: Exception) -> None:
    methods = [after(2, error), BY_NAME["torch"]]
    result = bench_task(HeadProblem(TINY, CPU), "score", methods, repeats=3)
    assert set(result["contenders"]) == {"gemm", "torch"}
    assert len(result["contenders"]["torch"]["samples_ms"]) == 3
    said = f"raised while it was timed: {type(error).__name__}: {str(error).splitlines()[0]}"
    assert result["failed"] == {"failing": said}


def test_without_room_for_the_floor_times_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeadProblem, "floor", lambda self, task: raising(torch.OutOfMemoryError("34 GiB"))())
    result = bench_task(HeadProblem(TINY, CPU), "score", [BY_NAME["torch"]], repeats=2)
    cell = result["contenders"]["torch"]
    assert len(cell["samples_ms"]) == 2 and "ratio_to_gemm" not in cell
    assert result["failed"] == {"gemm": "OutOfMemoryError: 34 GiB"}


def test_what_does_not_fit_beside_the_floor_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3-8B, N = 65536, plain torch on 141 GB: 118 GB of its own, and 34 GB of the floor's."""
    size = Size("llama-3-8b", 65536)
    assert size.floor_bytes("pairs") > 33e9 and BY_NAME["torch"].bytes_needed(size) > 117e9
    problem = HeadProblem(TINY, CPU)
    needed, floor = BY_NAME["torch"].bytes_needed(TINY), TINY.floor_bytes("pairs")
    monkeypatch.setattr(op, "free_bytes", lambda device: needed + floor - 1)
    assert reason_not_to_run(BY_NAME["torch"], problem) is None
    said = f"needs about {needed + floor} bytes .*, {floor} of them for the floor"
    result = bench_task(problem, "pairs", [BY_NAME["torch"], BY_NAME["fastdpo-cpu"]], repeats=1)
    assert set(result["contenders"]) == {"gemm", "fastdpo-cpu"}
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(result["not_run"]["torch"])
    assert not bench_task(problem, "pairs", [BY_NAME["torch"]], repeats=1, is_timed=False)["not_run"]


def test_a_row_kernel_that_raises_is_shown_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RowProblem.run

    def run(self: RowProblem, backend: str) -> None:
        if backend == "cpu":
            raise RuntimeError("no kernel image")
        right(self, backend)

    monkeypatch.setattr(RowProblem, "run", run)
    result = bench_rows(CPU, ["cpu", "reference"], vocab=101, logits_dtype=torch.float32, rows=32, repeats=1)
    assert result["failed"] == {"cpu": "RuntimeError: no kernel image"}
    assert set(result["contenders"]) == {"copy", "reference"}


def test_a_case_that_raises_is_recorded_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [case("a", raising(RuntimeError("broken\nthing"))), case("b", lambda: measured("b"))]
    monkeypatch.setattr(run, "make_cases", lambda suite, options: cases)
    words = ["op", "--device", "cpu", "--preset", "tiny", "--results", str(tmp_path)]
    assert run.main(words) == 1  # a case that nobody can measure is a mistake to mend
    (path,) = tmp_path.iterdir()
    first, second = read_result(path)["results"]
    assert first["failed"] == {WHOLE: "RuntimeError: broken"} and second == {**measured("b"), "settings": {}}


def test_a_lost_device_is_left_to_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contender that it was lost to has failed; the others, and the next cases, are measured."""
    started: list[list[str]] = []
    monkeypatch.setattr(run.os, "execve", lambda program, words, environment: started.append(words))
    right = op.recover
    monkeypatch.setattr(op, "checked", in_place_of(op.checked, "torch", {"failed": "CUDA error: 700"}))

    def recover(device: torch.device, contender: str, reason: str) -> None:
        right(device, contender, reason)
        if contender == "torch":
            raise DeviceLost(contender, reason)

    monkeypatch.setattr(op, "recover", recover)
    words = ["op", "--device", "cpu", "--preset", "tiny", "--tasks", "score", "stash", "--repeats", "1"]
    words += ["--contenders", "torch", "fastdpo-reference", "--max_seconds", "500"]
    run.main([*words, "--results", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    (lost,) = read_result(path)["results"]
    assert lost["skipped"].startswith("the device was lost to torch: CUDA error: 700")
    (command,) = started
    assert command[1:3] == ["-m", "benchmarks.run"] and command[-4:-1] == [
        "--resume",
        str(path),
        "--max_seconds",
    ]
    assert 0 < float(command[-1]) <= 500
    for _ in range(2):  # each process loses the device once, and is followed by another
        run.main(started[-1][3:])
    assert len(started) == 2
    results = read_result(path)["results"]
    assert len(results) == 2
    for result in results:
        assert result["failed"] == {"torch": "CUDA error: 700; the device answered no more"}
        assert set(result["contenders"]) == {"gemm", "fastdpo-reference"}


def in_place_of(right: Callable[..., Any], name: str, outcome: dict[str, Any]) -> Callable[..., Any]:
    def checked(method: Method, *args: Any, **options: Any) -> Any:
        return outcome if method.name == name else right(method, *args, **options)

    return checked


def test_a_device_lost_to_no_contender_is_not_tried_for_ever(tmp_path: Path) -> None:
    for key, contender in (("a", "gemm"), ("b", "torch")):
        cases = [case(key, raising(DeviceLost(contender, "CUDA error")))]
        file = ResultFile(tmp_path / key, environment(CPU), {"suites": ["op"]})
        for expected in ([], ["torch"])[: 1 if key == "a" else 2]:
            with pytest.raises(DeviceLost):
                run.run_cases(cases, file, CPU)
            (result,) = file.results
            assert list(result["failed"]) == (["gemm"] if key == "a" else expected)
        assert file.done == {key}


def test_the_first_case_too_is_given_up_when_the_time_is_over(tmp_path: Path) -> None:
    file = ResultFile(tmp_path, environment(CPU), {"suites": ["op"]})
    order: list[str] = []

    def quick(key: str) -> dict[str, Any]:
        order.append(key)
        return measured(key)

    def slow() -> dict[str, Any]:
        try:
            time.sleep(60)
        except Exception as error:  # what a contender may do; the time being over is not of its kind
            raise AssertionError from error
        return measured("a")

    cases = [case("a", slow), case("b", lambda: quick("b"))]
    assert not run.run_cases(cases, file, CPU, max_seconds=0.5)
    (result,) = file.results
    assert result["skipped"].startswith("given up") and not file.done
    # Gone on with, what was given up comes last: it may never fit.
    cases[0] = case("a", lambda: quick("a"))
    assert run.run_cases(cases, file, CPU, max_seconds=60.0)
    assert order == ["b", "a"]


def test_a_case_that_lacks_a_package_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As LoRA without peft: neither begun nor failed, and the reason kept."""
    monkeypatch.setattr(suites, "package_version", lambda name: None)
    options = suites.Options(CPU, "tiny", repeats=1, seconds=1.0)
    lacking = {case.model: case for case in suites.step_cases(options) if case.lacking}
    assert lacking.keys() == {"tiny-lora"}
    file = ResultFile(tmp_path, environment(CPU), {})
    assert run.run_cases([*lacking.values(), case("b", lambda: measured("b"))], file, CPU)
    skipped, ran = file.results
    assert skipped["skipped"] == "needs peft, which is not installed" and skipped["failed"] == {}
    assert "skipped" not in ran
