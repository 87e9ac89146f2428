"""Steps against context length: all contenders agree, a wrong one is not timed, and the page shows them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import context, run, tables
from benchmarks.plots import context_memory_data, context_time_data, plot_files
from benchmarks.results import read_results
from benchmarks.suites import Case, Options, contenders_of, make_cases

CPU = torch.device("cpu")
OURS = ["plain", "checkpointed", "carried", "carried-disk"]


def cases(preset: str, **picks: Any) -> list[Case]:
    return make_cases("context", Options(CPU, preset, repeats=3, seconds=1.0, **picks))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process for each, which takes seconds to import trainers."""
    monkeypatch.setattr(context, "in_a_process", lambda module, job, seconds: context.measure(job))


def bench(tokens: int, names: list[str], model: str = "tiny", **more: Any) -> dict[str, Any]:
    return context.bench_context(model, tokens, "fp32", CPU, names, shortest=64, steps=1, **more)


def test_cases_are_lengths_of_a_row() -> None:
    assert [case.key for case in cases("tiny")] == ["context/tiny/T=64/fp32", "context/tiny/T=128/fp32"]
    small = [f"context/mini-llama/T={tokens}/fp32" for tokens in (2048, 4096, 8192, 16384)]
    assert [case.key for case in cases("small")] == small
    (last,) = cases("gpu", models=["llama-3-8b-lora"], tokens=[2**18])
    assert last.key == "context/llama-3-8b-lora/T=262144/bf16" and last.num_tokens == 2**18
    assert contenders_of("context") == (*OURS[:3], "carried-host", "carried-disk", "trl")
    assert context.names_for(CPU) == [*OURS, "trl"]
    assert context.names_for(torch.device("cuda")) == [*OURS[:3], "carried-host", "trl"]
    for tokens in (64, 2048, 2**18):
        prompt, answer = context.lengths_of(tokens)
        assert prompt + 2 * answer == tokens and answer == min(tokens // 8, 512)


@pytest.mark.parametrize("model", ["tiny", "tiny-lora"])
def test_all_contenders_take_the_same_step(model: str, here: None) -> None:
    if model == "tiny-lora":
        pytest.importorskip("peft")
    result = bench(128, context.names_for(CPU), model)
    assert not result["failed"] and set(result["not_run"]) <= {"trl"}
    assert set(result["contenders"]) >= set(OURS)
    for name, cell in result["contenders"].items():
        held_to = "fp64 at T = 64" if name == "plain" else "plain at T = 128"
        assert cell["held_to"] == held_to and len(cell["samples_ms"]) == 1
        assert cell["loss_error_nats"] < 1e-4 and cell["gradient_norm_relative_error"] < 1e-3
        assert cell["loss"] > 0.1 and (cell["peak_mib"] is None or cell["peak_mib"] >= 0)


@pytest.mark.parametrize(("name", "times"), [("plain", 1), ("checkpointed", 2), ("carried", 8), ("trl", 2)])
def test_layers_run_as_often_as_is_said(name: str, times: int) -> None:
    """Once more where activations are not kept; of a carried context for each of four chunks, and again."""
    if name == "trl":
        pytest.importorskip("trl")
    job = {"name": name, "model": "tiny", "precision": "fp32"}
    contender, batch = context.build(job, 64, CPU)
    calls: list[str] = []
    model: Any = contender.model
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: calls.append(name))
    context.first_step(contender, batch)
    assert len(calls) == times


@pytest.mark.parametrize("mistake", ["loss", "gradient"])
def test_a_wrong_contender_is_refused_not_timed(
    mistake: str, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    right = context.first_step

    def planted(contender: Any, batch: Any) -> dict[str, float]:
        found = right(contender, batch)
        if contender.name == "carried":
            steps.append(contender.name)
            found["loss"] += 0.01 * (mistake == "loss")
            found["gradient_norm"] *= 1.01 if mistake == "gradient" else 1
        return found

    monkeypatch.setattr(context, "first_step", planted)
    monkeypatch.setattr(context, "peak_mib", lambda run, device: None)
    result = bench(64, ["plain", "carried"])
    assert set(result["contenders"]) == {"plain"} and steps == ["carried"]
    said = "its losses are off by" if mistake == "loss" else "its gradient's norm is off by"
    assert said in result["failed"]["carried"] and "not timed" in result["failed"]["carried"]


def test_who_does_not_fit_is_no_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to the next, or to fp64 at the shortest length; an anchor that nobody asked for is not shown."""
    jobs: list[dict[str, Any]] = []
    fits = {"checkpointed", "carried"}

    def measured(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
        jobs.append(job)
        cell = {"loss": 1.0, "gradient_norm": 2.0, "samples_ms": [1.0]}
        return cell if job["name"] in fits else {"not_run": "does not fit"}

    monkeypatch.setattr(context, "measure_apart", measured)
    result = bench(128, ["plain", "carried"])
    by = {job["name"]: (job["check"][2], job["steps"]) for job in jobs}
    assert by["plain"] == ("fp64 at T = 64", 1)
    assert by["checkpointed"] == ("fp64 at T = 64", 0)
    assert by["carried"] == ("checkpointed at T = 128", 1) and jobs[-1]["check"][1] == [[1.0], [2.0]]
    assert set(result["contenders"]) == {"carried"} and result["not_run"] == {"plain": "does not fit"}
    jobs.clear()
    fits.discard("checkpointed")
    bench(128, ["carried"])
    assert [job["check"][2] for job in jobs] == ["fp64 at T = 64"] * 3
    jobs.clear()
    assert "too long" in bench(128, ["carried"], step_seconds=1e6)["not_run"]["carried"] and not jobs


def test_what_ends_without_a_result_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(code: int) -> Any:
        return lambda *words, **more: subprocess.CompletedProcess(words, code, "", "Traceback\nError: no")

    def late(*words: Any, **more: Any) -> Any:
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(subprocess, "run", ended(-9))
    assert context.measure_apart({}, CPU) == {"not_run": "does not fit: its process was killed"}
    monkeypatch.setattr(subprocess, "run", ended(1))
    assert context.measure_apart({}, CPU) == {"failed": "its process ended with 1: Error: no"}
    monkeypatch.setattr(subprocess, "run", late)
    assert "too long" in context.measure_apart({}, CPU)["not_run"]

    def full(job: Any, device: torch.device) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(context, "_measure", full)
    assert "does not fit" in context.measure({"device": "cpu", "name": "plain"})["not_run"]


def test_the_page_shows_time_and_memory_against_length(tmp_path: Path, here: None) -> None:
    words = ["context", "--device", "cpu", "--preset", "tiny", "--contenders", "plain", "carried"]
    assert run.main([*words, "--results", str(tmp_path)]) == 0
    (file,) = read_results(tmp_path)
    assert [result["tokens"] for result in file["results"]] == [64, 128]
    for number, result in enumerate(file["results"]):  # made up from here on
        for k, cell in enumerate(result["contenders"].values()):
            cell.update(median_ms=10.0 + number, noise=0.01, peak_mib=[8.0, 4.0][k])
    page = tables.document([file])
    assert "**tiny, fp32, one pair a step**" in page and "| | T = 64 | T = 128 |" in page
    assert "| `plain` | 10 ms +- 1 %" in page and "8 MiB" in page and "Equal for all: token ids" in page
    plain, carried = [(64, 10.0), (128, 11.0)], [(64, 4.0), (128, 4.0)]
    assert context_time_data(file["results"])["tiny, fp32"]["plain"] == plain
    assert context_memory_data(file["results"])["tiny, fp32"]["carried"] == carried
    assert set(plot_files({"cpu": file["results"]})) == {"cpu-context-time.svg", "cpu-context-memory.svg"}
    assert not plot_files({"cpu": [{"suite": "context", "skipped": "does not fit", "contenders": {}}]})
