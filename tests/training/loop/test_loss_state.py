"""What losses carry from step to step: however a step is cut up, and over an interruption, the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from fastdpo.losses.controllers import BetaController, RunningMean
from fastdpo.training.batches.forward import sequence_logps
from fastdpo.training.loop.loss_state import STATE_FILE
from fastdpo.training.loop.reference_sync import REFERENCE_FILE
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows, read_metrics, tiny_llama
from tests.training.loop.test_resume import Interrupt
from tests.training.loop.test_trainer import KeepGradients

MakeArgs = Callable[..., PreferenceConfig]
BETA_DPO = {"dynamic_beta": {"alpha": 0.6, "rho": 0.3}}
# Its own reference model: rewards of a first step are 0 without one, and nothing to carry.
UNPAIRED = {"loss_type": "bco"}


def made_trainer(
    args: PreferenceConfig, tokenizer: Any, *callbacks: Any, count: int = 16
) -> PreferenceTrainer:
    return PreferenceTrainer(
        tiny_llama(1), args, train_dataset=make_rows(count), eval_dataset=make_rows(3, 2),
        processing_class=tokenizer, ref_model=tiny_llama(2), callbacks=list(callbacks),
    )  # fmt: skip


@pytest.mark.parametrize("settings", [BETA_DPO, UNPAIRED], ids=["beta-DPO", "BCO"])
def test_two_steps_however_they_are_cut(make_args: MakeArgs, tokenizer: Any, tmp_path: Path, settings: Any):
    results, size = [], 8
    for batch, accumulate, layout in ((size, 1, "padded"), (2, 4, "padded"), (4, 2, "packed")):
        kept = KeepGradients()
        args = make_args(
            output_dir=str(tmp_path / f"{batch}"), per_device_train_batch_size=batch, batch_layout=layout,
            gradient_accumulation_steps=accumulate, max_steps=2, max_grad_norm=0.0, **settings,
        )  # fmt: skip
        trainer = made_trainer(args, tokenizer, kept)
        trainer.train()
        results.append((kept.steps, trainer.loss_state, read_metrics(args.output_dir)))
    (steps, state, logs), *others = results
    largest = max(gradient.abs().max().item() for gradient in steps[0].values())
    for other_steps, other_state, other_logs in others:
        for name, gradient in steps[0].items():
            torch.testing.assert_close(other_steps[0][name], gradient, rtol=0, atol=2e-6 * max(largest, 1.0))
        for log, other in zip(logs, other_logs, strict=True):
            # The second step is after one of Adam, which makes of rounding in small gradients one in weights.
            assert other["loss"] == pytest.approx(log["loss"], rel=1e-4, abs=1e-4)
        if state.shift is not None:
            assert float(other_state.shift.value) == pytest.approx(float(state.shift.value), rel=1e-4)
        else:
            wanted, got = state.betas.state_dict(), other_state.betas.state_dict()
            assert torch.equal(wanted.pop("generator"), got.pop("generator"))
            assert got == pytest.approx(wanted, rel=1e-4)


def test_beta_dpo_is_the_controllers(make_args: MakeArgs, tokenizer: Any):
    """One step's loss, against the controller and the formula on the gaps of the batch."""
    args = make_args(
        per_device_train_batch_size=10,
        max_steps=1,
        beta=0.2,
        train_sampling_strategy="sequential",
        **BETA_DPO,
    )
    trainer = made_trainer(args, tokenizer, count=10)
    trainer.train()
    data = trainer.train_dataset
    batch = trainer.data_collator([data[i] for i in range(10)])
    sums = []
    for model in (tiny_llama(1), tiny_llama(2)):
        logits = model(**batch.sequences.model_inputs()).logits[:, :-1]
        picked = logits.double().log_softmax(-1).gather(-1, batch.sequences.input_ids[:, 1:, None])[..., 0]
        sums.append((picked * (batch.sequences.labels[:, 1:] != -100)).sum(1).detach())
    chosen, rejected = (sums[0] - sums[1]).chunk(2)
    step = BetaController(0.2, alpha=0.6, rho=0.3, seed=args.seed).step(chosen - rejected)
    losses = -torch.nn.functional.logsigmoid(step.beta * (chosen - rejected))
    wanted = (step.pair_weights * losses).sum() / step.num_pairs
    assert step.num_pairs == 7 and float(step.beta) != pytest.approx(0.2, rel=1e-3)
    assert read_metrics(args.output_dir)[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_bco_takes_the_steps_rewards_before_its_loss(make_args: MakeArgs, tokenizer: Any):
    args = make_args(
        loss_type="bco", per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1
    )
    trainer = made_trainer(args, tokenizer, count=4)
    trainer.train()
    log = read_metrics(args.output_dir)[0]
    # As many desirable rows as undesirable ones: the mean of all is the mean of both means.
    wanted = (log["rewards/chosen"] + log["rewards/rejected"]) / 2
    assert log["reward_shift"] == pytest.approx(wanted, rel=1e-5) and abs(wanted) > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        BETA_DPO,
        UNPAIRED,
        {"loss_type": "kto"},
        {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
    ],
    ids=["beta-DPO", "BCO", "KTO", "TR-DPO"],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Path, settings: Any
):
    def args(name: str) -> PreferenceConfig:
        return make_args(
            output_dir=str(tmp_path / name), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_steps=6, save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=2, **settings,
        )  # fmt: skip

    straight = made_trainer(args("whole"), tokenizer)
    straight.train()
    made_trainer(args("parts"), tokenizer, Interrupt("stopped")).train()
    kept = {path.name for path in (tmp_path / "parts" / "checkpoint-3").iterdir()}
    assert (REFERENCE_FILE in kept) == ("sync_ref_model" in settings) == (STATE_FILE not in kept)
    resumed = made_trainer(args("parts"), tokenizer)
    resumed.train(resume_from_checkpoint=True)
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")
    for name, value in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 4, 6])
def test_kto_is_evaluated_at_the_reference_point_of_all_rows(make_args: MakeArgs, tokenizer: Any, size: int):
    """However they are cut into batches; what training has come to is there again afterwards."""
    trainer = made_trainer(make_args(loss_type="kto"), tokenizer)
    state, data = trainer.loss_state, trainer.eval_dataset
    assert len(data) == 6 and state.kl is not None
    state.kl.update(torch.tensor([0.25]), torch.zeros(1))
    mismatched = trainer.data_collator([data[i] for i in range(6)]).mismatched
    with torch.no_grad():
        ratios = sequence_logps(trainer.model, mismatched) - sequence_logps(
            trainer.reference.model, mismatched
        )
    state.begin_evaluation(trainer.model, data, trainer.data_collator, size)
    assert float(state.kl.value) == pytest.approx(float(ratios.mean()), rel=1e-4) and ratios.mean() > 1e-3
    state.end_evaluation()
    assert float(state.kl.value) == 0.25


class AfterTwoSteps(TrainerCallback):
    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_reference_follows_the_policy(make_args: MakeArgs, tokenizer: Any):
    """0.5 of the policy after each second step: after two steps once, after three still once."""
    for steps in (2, 3):
        args = make_args(
            max_steps=steps, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.5
        )
        args.overwrite_output_dir = True
        kept = AfterTwoSteps()
        trainer = made_trainer(args, tokenizer, kept)
        trainer.train()
        start = dict(tiny_llama(2).named_parameters())
        for name, value in trainer.reference.model.named_parameters():
            torch.testing.assert_close(value, torch.lerp(start[name], kept.weights[name], 0.5))


def test_no_reward_of_a_bad_step_stays(make_args: MakeArgs, tokenizer: Any):
    """NaN in a step that is skipped is not in the running mean of the next."""
    trainer = made_trainer(make_args(loss_type="bco"), tokenizer, count=4)
    state = trainer.loss_state
    assert isinstance(state.shift, RunningMean)
    state._take([torch.tensor([[1.0, 2.0], [2.0, torch.nan]]).double()])
    assert float(state.shift.value) == pytest.approx(0.2)


def test_beta_dpo_leaves_evaluation_alone(make_args: MakeArgs, tokenizer: Any):
    logs = []
    for settings in ({}, BETA_DPO):
        logs.append(made_trainer(make_args(**settings), tokenizer).evaluate()["eval_loss"])
    assert logs[0] == logs[1]
