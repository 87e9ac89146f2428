"""The benchmark of whole steps: every contender computes the same losses, and a wrong one is not timed."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step, step_contenders
from benchmarks.harness import even_steps
from benchmarks.results import read_results
from benchmarks.run import _line
from fastdpo.training.batches.layouts import layout_of
from fastdpo.training.loop.trainer import PreferenceTrainer
from tests.training.conftest import make_rows, write_jsonl

OPTIONS = ["--size", "tiny", "--steps", "1", "--rounds", "1", "--check_steps", "2"]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "pairs.jsonl", make_rows(6)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_all_contenders_agree(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("trl", minversion="1.15")
    pytest.importorskip("datasets")
    assert step.main(["--data", data, *OPTIONS, "--results", str(tmp_path / "results")]) == 0
    (payload,) = read_results(tmp_path / "results")
    (result,) = payload["results"]
    assert set(result["contenders"]) == set(step.CONTENDERS) and not result["failed"]
    cells = result["contenders"]
    for cell in cells.values():
        assert cell["losses"] == pytest.approx(cells["trl"]["losses"], abs=1e-5)
        assert len(cell["samples_ms"]) == 1 and cell["useful_tokens_per_s"] > 0
        # fp32 beside fp64: far below what is allowed.
        assert cell["loss_error_nats"] < 1e-4 and cell["gradient_norm_relative_error"] < 2e-4
    assert result["truth"]["dtype"] == "float64" and len(result["truth"]["losses"]) == 2
    assert abs(cells["trl"]["losses"][0] - 0.6931) > 1e-3  # there is something to agree on
    positions = {name: cells[name]["backbone_positions_per_pair"] for name in step.OURS}
    auto = positions.pop("auto")
    assert list(positions.values()) == sorted(positions.values(), reverse=True)
    assert cells["plain"]["backbone_positions_per_pair"] == positions["padded"]
    assert auto == positions["shared_prompt"]  # what the planner takes for prompts as long as these
    assert result["losses"] == {name: cell["losses"] for name, cell in cells.items()}
    *_, heading, first, second = capsys.readouterr().out.splitlines()[:-1]
    assert heading.split() == ["loss", "at", "step", *step.CONTENDERS]
    assert first.split() == ["1", *(f"{cell['losses'][0]:.5f}" for cell in cells.values())]
    assert second.split() == ["2", *(f"{cell['losses'][1]:.5f}" for cell in cells.values())]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_all_contenders_agree_on_an_adapter_and_pairs_made_up():
    pytest.importorskip("trl", minversion="1.15")
    pytest.importorskip("peft")
    names = ("plain", "trl-compacted", "shared_prompt", "auto")
    brief = {"check_steps": 2, "steps": 1, "rounds": 1}
    result = step.bench_step("tiny-lora", torch.device("cpu"), "fp32", contenders=names, **brief)
    assert not result["failed"] and set(result["contenders"]) == set(names)
    losses = [cell["losses"] for cell in result["contenders"].values()]
    # fp32 sums of some thousand tokens of 1e-5 nats, times beta: as LOSS_BOUND has it, a tenth of that.
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-4)
    assert abs(losses[0][0] - 0.6931) > 1e-3
    assert "made up" in result["data"]


def test_a_wrong_contender_is_not_timed(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    right = PreferenceTrainer.compute_loss

    def wrong(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = right(self, model, inputs, *args, **kwargs)
        return loss * 1.1 if layout_of(self.data_collator) == "shared_prompt" else loss

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", wrong)
    names = ["--contenders", "padded", "packed", "shared_prompt"]
    assert step.main(["--data", data, *OPTIONS, *names, "--results", str(tmp_path / "results")]) == 1
    (result,) = read_results(tmp_path / "results")[0]["results"]
    assert set(result["contenders"]) == {"padded", "packed"}
    assert "not timed" in result["failed"]["shared_prompt"]
    printed = capsys.readouterr().out
    assert "shared_prompt  FAILED" in printed
    assert list(result["losses"]) == ["padded", "packed", "shared_prompt"]
    assert "  ".join(f"{result['losses'][name][0]:.5f}" for name in ("padded", "packed")) in printed


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (lambda loss: loss * 1.01, "its losses are off by"),
        # The value stays as it is, and Adam and clipping take a factor out of the steps.
        (lambda loss: loss + 0.01 * (loss - loss.detach()), "its gradient's norm is off by 1.0e-02"),
    ],
)
def test_a_mistake_that_all_of_ours_share_is_no_truth(
    planted: Any, said: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Three against one: the truth is fp64, not the middle."""
    right = PreferenceTrainer.compute_loss
    monkeypatch.setattr(PreferenceTrainer, "compute_loss", lambda *args, **kw: planted(right(*args, **kw)))
    names = ["--contenders", "plain", "padded", "packed", "shared_prompt"]
    assert step.main(["--data", data, *OPTIONS, *names, "--results", str(tmp_path / "results")]) == 1
    (result,) = read_results(tmp_path / "results")[0]["results"]
    assert set(result["contenders"]) == {"plain"} and set(result["failed"]) == set(names[2:])
    assert all(said in reason and "not timed" in reason for reason in result["failed"].values())


def test_a_peer_that_does_not_fit_is_no_failure(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("Tried to allocate 80.00 GiB.\nMore text.")

    monkeypatch.setattr(step_contenders, "answer_logps", full)
    names = ["--contenders", "plain", "padded"]
    assert step.main(["--data", data, *OPTIONS, *names, "--results", str(tmp_path / "results")]) == 0
    assert "not run: OutOfMemoryError: Tried to allocate 80.00 GiB.\n" in capsys.readouterr().out
    monkeypatch.setattr(PreferenceTrainer, "compute_loss", full)
    assert step.main(["--data", data, *OPTIONS, *names, "--results", str(tmp_path / "results")]) == 1


def test_the_suite_prints_the_curves():
    losses = {"plain": [0.7, 0.61234567], "padded": [0.7]}
    printed = _line(
        {"key": "step/tiny", "contenders": {}, "failed": {}, "not_run": {}, "losses": losses}, set()
    )
    assert printed.splitlines()[1:] == [
        "  loss at step    plain   padded",
        "             1  0.70000  0.70000",
        "             2  0.61235",
    ]


@pytest.mark.parametrize("when", ["check", "round"])
def test_a_contender_that_raises_costs_the_others_nothing(
    when: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever it raises, and then its model is gone."""
    right, held, calls = step_contenders.Contender.step, [], []

    def raises(self: Any, inputs: Any) -> torch.Tensor:
        if self.name == "packed":
            calls.append(self.name)
            if when == "check" or len(calls) > 3:  # two steps of the check and its peak
                held.append(weakref.ref(self.model))
                raise AttributeError("no such kernel")
        return right(self, inputs)

    monkeypatch.setattr(step_contenders.Contender, "step", raises)
    names = ["--contenders", "padded", "packed", "shared_prompt"]
    assert step.main(["--data", data, *OPTIONS, *names, "--results", str(tmp_path / "results")]) == 1
    (result,) = read_results(tmp_path / "results")[0]["results"]
    assert set(result["contenders"]) == {"padded", "shared_prompt"}
    where = "" if when == "check" else "in round 1: "
    assert result["failed"] == {"packed": f"{where}AttributeError: no such kernel"}
    assert held and held[0]() is None


def test_a_contender_of_nan_takes_no_other_with_it(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    right = step_contenders.Contender.step
    monkeypatch.setattr(
        step_contenders.Contender,
        "step",
        lambda self, inputs: right(self, inputs) * (float("nan") if self.name == "packed" else 1.0),
    )
    names = ["--contenders", "padded", "packed", "shared_prompt"]
    assert step.main(["--data", data, *OPTIONS, *names, "--results", str(tmp_path / "results")]) == 1
    (result,) = read_results(tmp_path / "results")[0]["results"]
    assert set(result["contenders"]) == {"padded", "shared_prompt"} and set(result["failed"]) == {"packed"}


def test_results_on_other_data_or_batches_are_other_cases():
    keys = {
        step.step_key("tiny", "fp32"),
        step.step_key("tiny", "fp32", Path("a/pairs.jsonl")),
        step.step_key("tiny", "fp32", Path("a/other.jsonl")),
        step.step_key("tiny", "fp32", pairs=3),
        step.step_key("tiny", "fp32", max_length=512),
        step.step_key("tiny", "fp32", attention="eager"),
    }
    assert len(keys) == 6


def test_steps_of_unlike_size_are_no_noise():
    # Two rounds of a short and a long step, the second round a tenth slower.
    assert even_steps([1.0, 3.0, 1.1, 3.3], 2) == pytest.approx([2.0, 2.0, 2.2, 2.2])
