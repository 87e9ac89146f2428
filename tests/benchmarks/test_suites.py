"""The benchmarks own up: a wrong contender is not timed, one that does not run is listed with the reason."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import ours, peers
from benchmarks.compare import agreement, compare_results
from benchmarks.harness import Contender, summarise, summarise_steps
from benchmarks.method import Method
from benchmarks.op import METHODS, bench_task
from benchmarks.problem import IGNORED, MODELS, OF_PAIRS, PASSES, HeadProblem, Outcome, Size, Wrong
from benchmarks.timing import time_interleaved
from fastdpo.testing.accuracy import logps_bound
from fastdpo.testing.simulated_logps import simulated_errors, sums_of
from tests import ROOT

CPU = torch.device("cpu")
TINY = Size("tiny", 256, torch.float32, 50)
BY_NAME = {method.name: method for method in METHODS}
# Runs on any CPU without another package; `torch-compile` takes a compiler's minute.
HERE = ("fastdpo-cpu", "fastdpo-reference", "torch", "torch-compacted", "torch-linear-ce")


def here(*names: str) -> list[Method]:
    return [BY_NAME[name] for name in names]


def test_contenders_take_turns() -> None:
    order: list[str] = []
    contenders = [
        Contender("a", lambda: order.append("a"), prepare=lambda: order.append("prepare")),
        Contender("b", lambda: order.append("b")),
    ]
    samples = time_interleaved(contenders, CPU, repeats=2, warmup=1)
    assert order == ["prepare", "a", "b"] * 3
    assert {name: len(values) for name, values in samples.items()} == {"a": 2, "b": 2}


def test_a_time_limit_leaves_enough_repeats() -> None:
    samples = time_interleaved([Contender("a", lambda: None)], CPU, repeats=50, warmup=1, seconds=0.0)
    assert len(samples["a"]) == 5
    samples = time_interleaved([Contender("a", lambda: None)], CPU, repeats=3, warmup=1, seconds=0.0)
    assert len(samples["a"]) == 3


def test_the_noise_of_a_median_knows_spread_and_drift() -> None:
    assert summarise([10.0] * 20)["noise"] == 0
    steady = summarise([9.0, 9.0, 10.0, 11.0, 11.0] * 4)
    assert steady["median_ms"] == 10 and steady["noise"] == pytest.approx(1.57 * 2 / 20**0.5 / 10)
    # The halves differ by 8: half of that is more than the notch of the whole.
    drifting = summarise([6.0] * 50 + [14.0] * 50)
    assert drifting["noise"] == pytest.approx(0.4)
    # The halves are alike, the quarters are not: 1.69 standard errors of their mean, sd 4.62 of four.
    slow_waves = summarise(([6.0] * 25 + [14.0] * 25) * 2)
    assert slow_waves["noise"] > 1.69 * 4.6 / 2 / 10
    assert summarise([3.0])["noise"] == 1.0  # one sample knows nothing


def test_two_runs_of_one_version_agree_as_often_as_is_said() -> None:
    """Of a hundred pairs of runs of 40 contenders each, made up, some five may have one that is outside."""
    random = Random(0)

    def run() -> dict[str, Any]:
        def cell(count: int) -> dict[str, Any]:
            return summarise([random.gauss(1.0, 0.05) for _ in range(count)])

        def step() -> dict[str, Any]:
            times = [size * random.gauss(1.0, 0.05) for _ in range(3) for size in (1.0, 0.5, 2.0, 1.5, 0.8)]
            return summarise_steps(times, 5)

        kernels = {"gemm": cell(20)} | {f"fastdpo-{k}": cell(20) for k in range(30)}
        steps = {f"step-{k}": step() for k in range(10)}
        results = [
            {"key": key, "failed": {}, "not_run": {}, "contenders": cells}
            for key, cells in (("op", kernels), ("step", steps))
        ]
        return {"environment": {}, "results": results}

    agree = [agreement(compare_results(run(), run()))[1] for _ in range(100)]
    assert sum(agree) >= 85
    # And a version that is slower by more than the noise is told from it, in all of them.
    slower = run()
    for cell in slower["results"][0]["contenders"].values():
        cell["median_ms"] *= 1.25
    assert (
        sum(change.is_regression for change in compare_results(run(), slower).changes) == 0
    )  # as is the floor
    slower["results"][0]["contenders"]["gemm"]["median_ms"] /= 1.25
    assert sum(change.is_regression for change in compare_results(run(), slower).changes) >= 29


def test_the_noise_of_steps_is_not_that_of_their_sizes() -> None:
    assert summarise_steps([1.0, 3.0, 1.0, 3.0], 2)["noise"] == 0
    assert summarise_steps([1.0, 3.0], 2)["noise"] == 1.0  # one round knows nothing
    # Three rounds of 4, 4.4 and 4.8 in all: sd 0.4 of 4.4, by 1.69 x 1.2533 over the root of 3.
    found = summarise_steps([1.0, 3.0, 1.1, 3.3, 1.2, 3.6], 2)
    assert found["noise"] == pytest.approx(1.69 * 1.2533 * 0.4 / 4.4 / 3**0.5)
    assert found["median_ms"] == pytest.approx(2.2)


@pytest.mark.parametrize("task", PASSES)
def test_every_task_is_timed_beside_its_products(task: str) -> None:
    result = bench_task(HeadProblem(TINY, CPU), task, here(*HERE), repeats=2)
    assert not result["failed"] and not result["not_run"]
    assert set(result["contenders"]) == {"gemm", *HERE}
    assert result["contenders"]["gemm"]["ratio_to_gemm"] == 1
    for name in HERE:
        cell = result["contenders"][name]
        assert len(cell["samples_ms"]) == 2
        assert cell["logps_error_nats"] <= 1e-4 and cell["rows"] in ("labelled", "all")
        assert ("dhidden_relative_error" in cell) == (task != "score")
        assert ("dweight_relative_error" in cell) == (task in ("cache", "pairs", "ce"))


@pytest.mark.parametrize("task", ["cache", "pairs"])
def test_16_bit_inputs_hold_ours_to_more_than_peers(task: str) -> None:
    """TRL's and torch's logits are rounded to bf16; the table shows by how much."""
    pytest.importorskip("trl", minversion="1.16")
    problem = HeadProblem(Size("tiny", 256), CPU)
    result = bench_task(problem, task, here("fastdpo-cpu", "torch", "trl"), repeats=1, is_timed=False)
    assert not result["failed"]
    errors = {name: cell["logps_error_nats"] for name, cell in result["contenders"].items()}
    assert errors["fastdpo-cpu"] < errors["torch"] / 100
    assert errors["fastdpo-cpu"] < errors["trl"] / 100
    assert "samples_ms" not in result["contenders"]["torch"]


def test_the_share_of_ignored_labels_is_what_it_says() -> None:
    for share in (0, 50, 80):
        size = Size("tiny", 512, torch.float32, share)
        problem = HeadProblem(size, CPU)
        labelled = (problem.labels != IGNORED).sum().item()
        assert labelled == size.num_labelled == len(problem.targets)
        assert abs(labelled / size.num_tokens - (1 - share / 100)) < 0.01
        assert sum(problem.layout.lengths or ()) == labelled


def test_the_sizes_of_real_models_are_there() -> None:
    assert MODELS["gemma-3-270m"] == (640, 262144) and MODELS["llama-3-70b"] == (8192, 128256)


def planted(name: str, **changes: float) -> Method:
    """A kernel with a mistake: its values moved, or a gradient scaled."""
    right = BY_NAME[name]

    def run(problem: HeadProblem, task: str) -> Outcome:
        out = right.run(problem, task)
        dhidden = None if out.dhidden is None else out.dhidden * changes.get("dhidden", 1)
        dweight = None if out.dweight is None else out.dweight * changes.get("dweight", 1)
        return Outcome(out.values + changes.get("values", 0), dhidden, dweight)

    return replace(right, name=f"planted-{name}", run=run)


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("fastdpo-reference", {"values": 1e-3}, "log-probabilities are off by 1.0"),
        ("fastdpo-reference", {"dhidden": 1.02}, "dhidden is off by 2.0"),
        ("fastdpo-reference", {"dweight": 1.02}, "dweight is off by 2.0"),
        ("fastdpo-reference", {"dhidden": -1}, "dhidden is off by 2.0"),
        ("torch", {"dweight": 1.05}, "dweight is off by 5.0"),
        ("torch", {"values": float("nan")}, "log-probabilities are off by nan"),
    ],
)
def test_a_wrong_kernel_is_refused_not_timed(method: str, changes: dict[str, float], reason: str) -> None:
    wrong = planted(method, **changes)
    result = bench_task(HeadProblem(TINY, CPU), "cache", [wrong, BY_NAME["torch"]], repeats=1)
    assert set(result["contenders"]) == {"gemm", "torch"}
    assert reason in result["failed"][wrong.name] and "not timed" in result["failed"][wrong.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("task", ["pairs", "pairs-frozen"])
def test_a_wrong_gradient_of_a_peer_is_refused_in_pairs(task: str, dtype: torch.dtype) -> None:
    """A margin off by rounded logits moves the gradient too; a mistake of 5 % is told from it."""
    problem = HeadProblem(Size("tiny", 256, dtype), CPU)
    right = BY_NAME["torch"].run(problem, task)
    problem.check(task, right, is_exact=False)
    with pytest.raises(Wrong, match="dhidden is off by"):
        assert right.dhidden is not None
        problem.check(task, right._replace(dhidden=right.dhidden * 1.05), is_exact=False)


@pytest.mark.parametrize(
    ("task", "mistake"),
    [
        ("ce", lambda values: values + 0.2),
        ("score", lambda values: values + 0.05),  # within a token's rounding, never their mean's
        ("pairs", lambda values: torch.cat(values.chunk(2)[::-1])),  # chosen and rejected swapped
        ("pairs", lambda values: values + 100.0),
        ("pairs", lambda values: values - torch.tensor([100.0] + [0.0] * (len(values) - 1))),
    ],
)
def test_a_wrong_value_of_a_peer_is_told_from_rounding_in_bf16(
    task: str, mistake: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Rounding has random signs: a sum is off by the root of its length, not by its length."""
    problem = HeadProblem(Size("tiny", 2048), CPU)
    for name in ("torch", "torch-linear-ce", "fastdpo-bf16-logits"):
        right = BY_NAME[name].run(problem, task)
        problem.check(task, right, is_exact=False)
        with pytest.raises(Wrong, match=r"off by .* nats"):
            problem.check(task, right._replace(values=mistake(right.values.float())), is_exact=False)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_ours_may_err_as_the_hardwares_sums_do_and_no_more(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated errors of tensor cores at H = 4096 are refused on a CPU, and 1.5 times them everywhere."""
    problem = HeadProblem(Size("llama-3-8b", 256, vocab=512), CPU)
    sums = sums_of(torch.bfloat16, capability)
    errors = torch.cat(simulated_errors(4096, torch.bfloat16, sums, num_states=2, num_labels=48))
    truth = (problem.hidden.double() @ problem.weight.double().t()).log_softmax(1)
    truth = truth.gather(1, problem.targets[:, None])[:, 0]
    errors = errors[torch.linspace(0, len(errors) - 1, len(truth)).long()]
    with pytest.raises(Wrong, match="off by .* nats"):
        problem.check("score", Outcome((truth + errors).float()), is_exact=True)
    monkeypatch.setattr("benchmarks.problem.capability_of", lambda device: capability)
    problem = HeadProblem(problem.size, CPU)
    problem.check("score", Outcome((truth + errors).float()), is_exact=True)
    with pytest.raises(Wrong, match="off by .* nats"):
        problem.check("score", Outcome((truth + 1.5 * errors).float()), is_exact=True)
    # A shift of all tokens that none of them shows is told by their mean.
    worst = logps_bound(4096, torch.bfloat16, capability)
    with pytest.raises(Wrong, match="on average"):
        problem.check("score", Outcome((truth + 0.8 * worst).float()), is_exact=True)


def test_what_a_peer_imports_only_when_it_is_called_is_not_installed_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRL's kernels load without `datasets`; the chunk size its trainers call them with does not."""
    pytest.importorskip("trl", minversion="1.16")
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)

    def lazy(problem: HeadProblem, task: str) -> Outcome:
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    methods = [*here("trl"), replace(BY_NAME["torch"], name="lazy", run=lazy)]
    methods.append(replace(BY_NAME["fastdpo-reference"], run=lazy))
    result = bench_task(HeadProblem(TINY, CPU), "score", methods, repeats=1, is_timed=False)
    assert "not installed" in result["not_run"]["trl"] and "trl==1.16.0" in result["not_run"]["trl"]
    assert result["not_run"]["lazy"] == "not installed: no module datasets"
    assert "ModuleNotFoundError" in result["failed"]["fastdpo-reference"]  # ours has no such excuse


def test_a_gradient_at_an_ignored_label_is_refused() -> None:
    problem = HeadProblem(TINY, CPU)
    right = BY_NAME["torch"].run(problem, "stash")
    assert right.dhidden is not None
    right.dhidden[(problem.labels == IGNORED).nonzero()[0, 0]] = 1e-6
    with pytest.raises(Wrong, match="not 0 where there is no label"):
        problem.check("stash", right, is_exact=False)


def test_a_peer_that_raises_is_shown_as_such() -> None:
    def run(problem: HeadProblem, task: str) -> Outcome:
        raise RuntimeError("no kernel image\nis available")

    broken = replace(BY_NAME["torch"], name="broken", run=run)
    result = bench_task(HeadProblem(TINY, CPU), "score", [broken, BY_NAME["torch"]], repeats=1)
    assert result["failed"] == {"broken": "RuntimeError: no kernel image"}
    assert "torch" in result["contenders"]


def test_a_peer_that_does_not_fit_is_listed_with_its_bytes() -> None:
    huge = replace(BY_NAME["torch"], bytes_needed=lambda size: 2**60)
    result = bench_task(HeadProblem(TINY, CPU), "score", [huge], repeats=1)
    needed = 2**60 + TINY.floor_bytes("score")
    assert f"needs about {needed} bytes" in result["not_run"]["torch"]


def test_a_peer_that_is_not_installed_or_does_not_run_here_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.kernels", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", None)
    names = ("trl", "liger-dpo", "cce", "cce-exact", "liger-scaled-ce-sm90", "torch-compacted")
    result = bench_task(HeadProblem(TINY, CPU), "pairs", here(*names), repeats=1)
    assert set(result["contenders"]) == {"gemm", "torch-compacted"}
    assert "not installed" in result["not_run"]["trl"] and "trl==1.16.0" in result["not_run"]["trl"]
    assert "liger-kernel==0.8.5" in result["not_run"]["liger-dpo"]
    for name in ("cce", "cce-exact", "liger-scaled-ce-sm90"):
        assert result["not_run"][name] == "runs on CUDA GPUs only"


def test_ligers_adapter_hands_over_pairs_as_liger_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss written down in plain torch stands in: chosen rows first, targets (2P, T), no reference."""
    module = ModuleType("liger_kernel.chunked_loss")

    class Loss:
        def __init__(self, *, ignore_index: int, beta: float, use_ref_model: bool, compiled: bool) -> None:
            assert not use_ref_model and not compiled
            self.ignored, self.beta = ignore_index, beta

        def __call__(self, weight: Any, hidden: Any, target: Any) -> Any:
            logps = (hidden @ weight.t()).log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
            chosen, rejected = (logps * (target != self.ignored)).sum(1).chunk(2)
            loss = -torch.nn.functional.logsigmoid(self.beta * (chosen - rejected)).mean()
            return loss, (chosen, rejected, None)

    module.LigerFusedLinearDPOLoss = Loss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", module)
    for task in OF_PAIRS:
        result = bench_task(HeadProblem(TINY, CPU), task, here("liger-dpo"), repeats=1)
        assert not result["failed"] and "liger-dpo" in result["contenders"]


def test_every_peer_of_the_suite_has_an_adapter() -> None:
    assert {peer.name for peer in peers.PEERS} == {
        "torch", "torch-compacted", "torch-compile", "torch-linear-ce", "torch-linear-ce-cute", "unsloth",
        "trl", "liger-dpo", "liger-scaled-ce-sm90", "liger-cute", "cce", "cce-exact", "quack",
    }  # fmt: skip
    modes = {ours.MODE[task] for task in PASSES} | {"recompute", "lean"}
    assert modes == {"score", "stash", "cache", "pairs", "recompute", "lean"}


def test_the_pins_of_the_peers_are_those_of_the_extra() -> None:
    """What a reason tells a reader to install is what the project names."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    source = Path(peers.__file__).read_text()
    for pin in ("liger-kernel==0.8.5", "cut-cross-entropy==25.1.1", "quack-kernels==0.6.5", "trl==1.16.0"):
        assert pin in pyproject and pin.split("==")[1] in source
    # Called where a user has installed them: a licence of its own, a runtime that pip cannot choose.
    assert "unsloth==" in source and "liger-cute-kernels[cu13]==" in source
    assert "unsloth" not in pyproject and "liger-cute" not in pyproject
