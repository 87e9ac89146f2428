"""The monitor of the most likely tokens: what it measures, and when it warns."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdpo import linear_logprob
from fastdpo.training.loop.over_optimisation import OverOptimisationMonitor
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows, read_metrics, tiny_llama

MakeArgs = Callable[..., PreferenceConfig]
needs_topk = pytest.mark.skipif(
    "topk" not in inspect.signature(linear_logprob).parameters,
    reason="linear_logprob has no top-k statistics",
)


@needs_topk
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("loss_type", ["sigmoid", "bco"])
def test_means_over_the_answers_tokens(
    make_args: MakeArgs, tokenizer: Any, loss_type: str, renormalize: bool
):
    monitor = OverOptimisationMonitor(topk=7, num_rows=5, renormalize=renormalize)
    args = make_args(loss_type=loss_type, per_device_eval_batch_size=2, batch_layout="packed")
    trainer = PreferenceTrainer(
        tiny_llama(1), args, eval_dataset=make_rows(8), processing_class=tokenizer, callbacks=[monitor]
    )
    metrics = trainer.evaluate()
    assert read_metrics(args.output_dir)[-1]["eval_topk_mass/chosen"] == metrics["eval_topk_mass/chosen"]
    # Five pairs, or of single answers the first five of chosen, rejected, chosen, ...
    rows = make_rows(8)
    chosen = [row["prompt"] + row["chosen"] + "<eos>" for row in rows]
    rejected = [row["prompt"] + row["rejected"] + "<eos>" for row in rows]
    texts = {"chosen": chosen[:5], "rejected": rejected[:5]}
    if loss_type == "bco":
        texts = {"chosen": chosen[:3], "rejected": rejected[:2]}
    for side, whole in texts.items():
        masses, entropies = [], []
        for text, row in zip(whole, rows, strict=False):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            start = len(tokenizer(row["prompt"])["input_ids"])
            logits = tiny_llama(1)(input_ids=ids).logits[0, start - 1 : -1].double()
            top = logits.softmax(-1).topk(7).values.detach()
            masses.append(top.sum(-1))
            top = top / top.sum(-1, keepdim=True) if renormalize else top
            entropies.append(-(top * top.log()).sum(-1))
        for name, values in (("mass", masses), ("entropy", entropies)):
            wanted = torch.cat(values).mean().item()
            assert metrics[f"eval_topk_{name}/{side}"] == pytest.approx(wanted, rel=1e-5)


def evaluations(
    monitor: OverOptimisationMonitor, *numbers: tuple[float, float, float], prefix: str = "eval_"
) -> list[bool]:
    """Whether training is to stop after each evaluation of (mass, entropy, margin)."""
    control, state = (
        SimpleNamespace(should_training_stop=False),
        SimpleNamespace(is_world_process_zero=True, global_step=3),
    )
    stops = []
    for mass, entropy, margin in numbers:
        names = [prefix + name for name in ("topk_mass/chosen", "topk_entropy/chosen", "rewards/margins")]
        monitor.on_evaluate(None, state, control, dict(zip(names, (mass, entropy, margin), strict=True)))  # type: ignore[arg-type]
        stops.append(control.should_training_stop)
    return stops


def test_it_warns_of_both_falling_while_the_margin_grows(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    falling = [(0.9, 2.0, 0.1), (0.8, 1.9, 0.2), (0.7, 1.8, 0.3)]
    assert evaluations(OverOptimisationMonitor(stop=True), *falling) == [False, False, True]
    assert "over-optimisation" in caplog.text
    assert evaluations(OverOptimisationMonitor(), *falling) == [False] * 3
    caplog.clear()
    for change in ((0.85, 1.8, 0.3), (0.7, 1.95, 0.3), (0.7, 1.8, 0.15)):
        assert not any(evaluations(OverOptimisationMonitor(stop=True), *falling[:2], change))
    assert caplog.text == ""


@pytest.mark.parametrize("changes", [{"topk": 0}, {"num_rows": 1.5}, {"patience": True}])
def test_wrong_numbers_are_refused(changes: dict[str, Any]):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: got"):
        OverOptimisationMonitor(**changes)


def test_several_evaluation_sets_are_counted_apart() -> None:
    """One after the other at every evaluation, each is compared with itself."""
    monitor, stops = OverOptimisationMonitor(stop=True), []
    for mass, entropy, margin in ((0.9, 2.0, 0.1), (0.8, 1.9, 0.2), (0.7, 1.8, 0.3)):
        stops += evaluations(monitor, (0.5, 1.0, 0.0), prefix="eval_steady_")
        stops += evaluations(monitor, (mass, entropy, margin), prefix="eval_falling_")
    assert stops == [False] * 5 + [True]


def test_a_resumed_run_remembers_the_evaluations_before() -> None:
    """Two signs, one on either side of the checkpoint, are two evaluations running."""
    names = ("eval_topk_mass/chosen", "eval_topk_entropy/chosen", "eval_rewards/margins")
    seen = [(0.9, 2.0, 0.1), (0.8, 1.9, 0.2)]
    history = [{"loss": 1.0}, *(dict(zip(names, numbers, strict=True)) for numbers in seen)]
    monitor = OverOptimisationMonitor(stop=True)
    monitor.on_train_begin(None, SimpleNamespace(log_history=history), None)  # type: ignore[arg-type]
    assert evaluations(monitor, (0.7, 1.8, 0.3)) == [True]


def test_the_setting_adds_it_and_the_curves_have_its_panels(
    make_args: MakeArgs, tokenizer: Any, curves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Axes = pytest.importorskip("matplotlib.axes").Axes
    titles: list[str] = []
    drawn = Axes.set_title

    def set_title(axes: Any, label: str) -> Any:
        titles.append(label)
        return drawn(axes, label)

    monkeypatch.setattr(Axes, "set_title", set_title)
    settings = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    for monitor, expected in ((None, 4), ('{"topk": 5, "num_rows": 2}', 6)):
        titles.clear()
        args = make_args(over_optimisation_monitor=monitor, overwrite_output_dir=True, **settings)
        trainer = PreferenceTrainer(
            tiny_llama(1), args, train_dataset=make_rows(4), eval_dataset=make_rows(2),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        assert len(titles) == expected
        assert ("eval_topk_mass/chosen" in read_metrics(args.output_dir)[-1]) == (expected == 6)
    assert titles[-2:] == ["mass of the most likely tokens", "entropy of the most likely tokens (nats)"]
