"""The loop: the loss curve of the unpatched model, exact means, TRL's metrics, and what it leaves on disk."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from fastdpo.integrations.model import unpatch_model
from fastdpo.training.batches.batch import PaddedBatch
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows, read_metrics, tiny_llama

MakeArgs = Callable[..., PreferenceConfig]
TRL_METRICS = {
    "entropy",
    "num_tokens",
    "logits/chosen",
    "logits/rejected",
    "mean_token_accuracy",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
}


def plain_logps(model: LlamaForCausalLM, batch: PaddedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-softmax of the full logits (2P, T-1, V), mask (2P, T-1)) of an ordinary forward pass."""
    logits = model(**batch.sequences.model_inputs()).logits
    return logits[:, :-1].float().log_softmax(-1), batch.sequences.labels[:, 1:] != -100


def plain_sums(model: LlamaForCausalLM, batch: PaddedBatch) -> torch.Tensor:
    logp, mask = plain_logps(model, batch)
    picked = logp.gather(-1, batch.sequences.input_ids[:, 1:, None]).squeeze(-1)
    return (picked * mask).sum(1)


class PlainTrainer(PreferenceTrainer):
    """The same loop on an unpatched model: full logits, and DPO's formula as the paper has it."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        policy, reference = unpatch_model(self.model), unpatch_model(self.reference.model)
        chosen, rejected = plain_sums(policy, inputs).chunk(2)
        with torch.no_grad():
            ref_chosen, ref_rejected = plain_sums(reference, inputs).chunk(2)
        margin = (chosen - ref_chosen) - (rejected - ref_rejected)
        return -F.logsigmoid(0.1 * margin).mean()


@pytest.mark.promise(52)
def test_the_loss_curve_is_that_of_the_unpatched_model(make_args: MakeArgs, tokenizer: Any, tmp_path: Path):
    curves = []
    for kind in (PreferenceTrainer, PlainTrainer):
        args = make_args(output_dir=str(tmp_path / kind.__name__), max_steps=50, learning_rate=3e-3)
        trainer = kind(tiny_llama(), args, train_dataset=make_rows(24), processing_class=tokenizer)
        trainer.train()
        curves.append([entry["loss"] for entry in read_metrics(args.output_dir)])
    fused, plain = curves
    assert len(fused) == 50
    assert fused[0] == pytest.approx(math.log(2), abs=1e-7)
    assert fused[-1] < 0.1  # it has learnt, so the curves had something to differ in
    assert max(abs(a - b) for a, b in zip(fused, plain, strict=True)) < 1e-4


class KeepGradients(TrainerCallback):
    """The gradients just before each optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.steps.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )


# Micro-batches of 8; 4 and 3; 1 at a time: 7 pairs of unlike length, so that the last is smaller.
@pytest.mark.promise(47)
@pytest.mark.parametrize("loss_type", [["sigmoid"], ["sigmoid", "sft"], ["simpo"], ["ipo", "sft"]])
def test_accumulation_changes_nothing(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Path, loss_type: list[str]
):
    results = []
    for batch, accumulate in ((8, 1), (4, 2), (1, 8)):
        kept = KeepGradients()
        args = make_args(
            output_dir=str(tmp_path / f"{batch}"),
            loss_type=loss_type,
            loss_weights=[1.0, 0.5][: len(loss_type)],
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            train_sampling_strategy="sequential",
            max_steps=1,
            max_grad_norm=0.0,
        )
        trainer = PreferenceTrainer(
            tiny_llama(), args, train_dataset=make_rows(7), processing_class=tokenizer, callbacks=[kept]
        )
        trainer.train()
        results.append((kept.steps[0], read_metrics(args.output_dir)[0]))
    (whole, whole_log), *others = results
    for gradients, log in others:
        for name, gradient in whole.items():
            # ipo's gradients here are of size 30: of the largest entry where that is above 1. Products of
            # other sizes add up in another order: 1.6e-6 of it on a CPU with AVX-512, below 1e-6 on others.
            size = max(gradient.abs().max().item(), 1.0)
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=4e-6 * size)
        for name in TRL_METRICS | {"loss"}:
            assert log[name] == pytest.approx(whole_log[name], rel=1e-6, abs=2e-6), name


@pytest.mark.promise(27)
def test_metrics_mean_what_trl_means_by_them(make_args: MakeArgs, tokenizer: Any):
    """Evaluation in batches of 5 of 12 pairs, against one pass over the logits of all 12."""
    rows = make_rows(12, seed=5)
    args = make_args(beta=0.3, per_device_eval_batch_size=5)
    trainer = PreferenceTrainer(
        tiny_llama(1), args, eval_dataset=rows, processing_class=tokenizer, ref_model=tiny_llama(2)
    )
    metrics = trainer.evaluate()

    data = trainer.eval_dataset
    batch = trainer.data_collator([data[i] for i in range(12)])
    with torch.no_grad():
        logp, mask = plain_logps(tiny_llama(1), batch)
        logits = tiny_llama(1)(**batch.sequences.model_inputs()).logits[:, :-1]
        chosen, rejected = plain_sums(tiny_llama(1), batch).chunk(2)
        ref_chosen, ref_rejected = plain_sums(tiny_llama(2), batch).chunk(2)
    entropy = -(logp.exp() * logp).sum(-1)
    mean_logit, top = logits.mean(-1), logits.argmax(-1) == batch.sequences.input_ids[:, 1:]
    rewards = 0.3 * (chosen - ref_chosen), 0.3 * (rejected - ref_rejected)
    wanted = {
        "loss": -F.logsigmoid(rewards[0] - rewards[1]).mean(),
        "entropy": entropy[mask].mean(),
        "logits/chosen": mean_logit[:12][mask[:12]].mean(),
        "logits/rejected": mean_logit[12:][mask[12:]].mean(),
        "mean_token_accuracy": top[:12][mask[:12]].float().mean(),
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/accuracies": (rewards[0] > rewards[1]).float().mean(),
        "rewards/margins": (rewards[0] - rewards[1]).mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
    }
    assert {f"eval_{name}" for name in TRL_METRICS} <= set(metrics)
    for name, value in wanted.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-5, abs=1e-5), name


def test_logs_cover_every_pair_since_the_last_one(make_args: MakeArgs, tokenizer: Any, tmp_path: Path):
    """One log over an epoch of 4 + 4 + 2 pairs with a learning rate of 0 is an evaluation of the ten."""
    rows = make_rows(10)
    args = make_args(max_steps=3, logging_steps=3, learning_rate=0.0)
    trainer = PreferenceTrainer(
        tiny_llama(1), args, train_dataset=rows, processing_class=tokenizer, ref_model=tiny_llama(2)
    )
    trainer.train()
    (log,) = read_metrics(args.output_dir)
    metrics = trainer.evaluate(rows)
    for name in TRL_METRICS - {"num_tokens"}:
        assert log[name] == pytest.approx(metrics[f"eval_{name}"], rel=1e-6, abs=1e-6), name
    assert TRL_METRICS | {"loss", "grad_norm", "learning_rate", "epoch", "step"} == set(log)
    lengths = [trainer.train_dataset[i] for i in range(10)]
    tokens = sum(2 * len(p.prompt) + sum(len(x.ids) for x in p.answers) for p in lengths)
    assert log["num_tokens"] == tokens


@pytest.mark.promise(53)
def test_the_first_step_has_rewards_of_zero(make_args: MakeArgs, tokenizer: Any):
    args = make_args(max_steps=1)
    PreferenceTrainer(tiny_llama(), args, train_dataset=make_rows(4), processing_class=tokenizer).train()
    (log,) = read_metrics(args.output_dir)
    assert log["rewards/chosen"] == log["rewards/rejected"] == log["rewards/margins"] == 0.0
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("logits_dtype", [None, "bf16"])
def test_bfloat16_autocast(make_args: MakeArgs, tokenizer: Any, logits_dtype: str | None):
    args = make_args(bf16=True, logits_dtype=logits_dtype, max_steps=3)
    trainer = PreferenceTrainer(tiny_llama(), args, train_dataset=make_rows(4), processing_class=tokenizer)
    trainer.train()
    first, *_, last = read_metrics(args.output_dir)
    assert first["rewards/chosen"] == first["rewards/margins"] == 0.0
    assert last["loss"] < first["loss"]
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    wide = PreferenceTrainer(
        tiny_llama(), make_args(), eval_dataset=make_rows(4), processing_class=tokenizer
    ).evaluate()
    # The backbone's own bfloat16 rounding, of a sum over some 20 tokens.
    assert first["logps/chosen"] == pytest.approx(wide["eval_logps/chosen"], rel=2e-2)
    assert first["logps/chosen"] != wide["eval_logps/chosen"]


def test_what_a_run_leaves_on_disk(make_args: MakeArgs, tokenizer: Any, curves: None):
    model = tiny_llama()
    args = make_args(eval_strategy="steps", eval_steps=2)
    trainer = PreferenceTrainer(
        model, args, train_dataset=make_rows(8), eval_dataset=make_rows(4, 2), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()
    folder = Path(args.output_dir)
    steps = [(entry["step"], "eval_loss" in entry) for entry in read_metrics(folder)]
    assert steps == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is LlamaForCausalLM
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
    assert not hasattr(type(loaded), "_fastdpo_hook")


def test_several_evaluation_sets(make_args: MakeArgs, tokenizer: Any):
    sets = {"near": make_rows(4, 2), "far": make_rows(3, 3)}
    trainer = PreferenceTrainer(tiny_llama(), make_args(), eval_dataset=sets, processing_class=tokenizer)
    metrics = trainer.evaluate()
    for name in ("near", "far"):
        assert metrics[f"eval_{name}_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert f"eval_{name}_rewards/accuracies" in metrics


def test_compute_metrics_and_predict_get_the_rewards(make_args: MakeArgs, tokenizer: Any):
    def share_positive(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape == (6, 2)
        return {"positive": float((prediction.predictions[:, 0] > 0).mean())}

    trainer = PreferenceTrainer(
        tiny_llama(1),
        make_args(per_device_eval_batch_size=4),
        processing_class=tokenizer,
        ref_model=tiny_llama(2),
        compute_metrics=share_positive,
    )
    output = trainer.predict(make_rows(6))
    assert output.metrics["test_positive"] == pytest.approx((output.predictions[:, 0] > 0).mean())
    margins = output.predictions[:, 0] - output.predictions[:, 1]
    assert output.metrics["test_rewards/margins"] == pytest.approx(margins.mean(), rel=1e-5)


def test_numbers_of_the_pairs_reach_the_loss(make_args: MakeArgs, tokenizer: Any):
    rows = [{**row, "gap": 0.25 * i, "weight": float(i), "soft": 0.75} for i, row in enumerate(make_rows(4))]
    args = make_args(margin_column="gap", pair_weight_column="weight", soft_label_column="soft", beta=0.2)
    trainer = PreferenceTrainer(tiny_llama(1), args, processing_class=tokenizer, ref_model=tiny_llama(2))
    metrics = trainer.evaluate(rows)
    predictions = torch.from_numpy(trainer.predict(rows).predictions)
    margin = predictions[:, 0] - predictions[:, 1] - 0.25 * torch.arange(4)
    loss = -0.75 * F.logsigmoid(margin) - 0.25 * F.logsigmoid(-margin)
    assert metrics["eval_loss"] == pytest.approx((torch.arange(4) * loss).mean().item(), rel=1e-5)


def test_win_rates_of_the_pairs_reach_sppo(make_args: MakeArgs, tokenizer: Any):
    rows = [{**row, "w": 0.25 * i, "l": 1 - 0.125 * i} for i, row in enumerate(make_rows(4))]
    args = make_args(loss_type="sppo", chosen_win_rate_column="w", rejected_win_rate_column="l", beta=0.2)
    trainer = PreferenceTrainer(tiny_llama(1), args, processing_class=tokenizer, ref_model=tiny_llama(2))
    predictions = torch.from_numpy(trainer.predict(rows).predictions)
    rates = torch.tensor([[row["w"], row["l"]] for row in rows])
    # With rewards r = beta u: half of (r - (P - 1/2))^2 / beta^2 of each answer.
    loss = 0.5 * ((predictions - (rates - 0.5)) / 0.2).square().sum(1).mean()
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("layout", ["padded", "shared_prompt"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "tdpo1"])
def test_a_beta_per_pair(make_args: MakeArgs, tokenizer: Any, loss_type: str, layout: str):
    """Rewards and the loss of each pair have its own beta, and so has a step's gradient."""
    rows = [{**row, "b": 0.1 * (i + 1)} for i, row in enumerate(make_rows(4))]
    rewards = {}
    for name, own in (("column", {"beta_column": "b"}), ("number", {"beta": 1.0})):
        args = make_args(loss_type=loss_type, batch_layout=layout, max_steps=1, **own)
        options = {"train_dataset": rows, "processing_class": tokenizer, "ref_model": tiny_llama(2)}
        trainer = PreferenceTrainer(tiny_llama(1), args, **options)
        rewards[name] = torch.from_numpy(trainer.predict(rows).predictions)
        if name == "column":
            trainer.train()
            logged = read_metrics(args.output_dir)[0]
    torch.testing.assert_close(rewards["column"], 0.1 * torch.arange(1, 5)[:, None] * rewards["number"])
    if loss_type == "sigmoid":
        loss = -F.logsigmoid(rewards["column"][:, 0] - rewards["column"][:, 1]).mean()
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["rewards/chosen"] == pytest.approx(rewards["column"][:, 0].mean().item(), rel=1e-4)
    bad = [{**rows[0], "b": 0.0}]
    with pytest.raises(ValueError, match="row 1: column 'b': got 0.0, wanted a number in .0, inf."):
        PreferenceTrainer(
            tiny_llama(1), make_args(beta_column="b"), train_dataset=bad, processing_class=tokenizer
        )


def test_pairs_grouped_by_length(make_args: MakeArgs, tokenizer: Any):
    args = make_args(train_sampling_strategy="group_by_length", per_device_train_batch_size=2, max_steps=1)
    trainer = PreferenceTrainer(tiny_llama(), args, train_dataset=make_rows(24), processing_class=tokenizer)
    trainer.train()
    lengths = trainer.train_dataset.lengths
    order = list(trainer._get_train_sampler())
    gaps = [abs(int(lengths[a]) - int(lengths[b])) for a, b in zip(order[::2], order[1::2], strict=True)]
    assert sorted(order) == list(range(24))
    assert sum(gaps) / len(gaps) < 2.5  # of pairs at random: about 6


def test_gradient_checkpointing_changes_nothing(make_args: MakeArgs, tokenizer: Any, tmp_path: Path):
    logs = []
    for is_on in (False, True):
        args = make_args(output_dir=str(tmp_path / str(is_on)), gradient_checkpointing=is_on, max_steps=3)
        PreferenceTrainer(tiny_llama(), args, train_dataset=make_rows(12), processing_class=tokenizer).train()
        logs.append(read_metrics(args.output_dir))
    assert logs[0] == logs[1]


def test_dropout_is_switched_off_unless_wanted(make_args: MakeArgs, tokenizer: Any):
    noisy = tiny_llama(attention_dropout=0.3)
    calm = PreferenceTrainer(copy.deepcopy(noisy), make_args(), processing_class=tokenizer).model
    assert {layer.self_attn.attention_dropout for layer in calm.model.layers} == {0.0}
    left = PreferenceTrainer(noisy, make_args(disable_dropout=False), processing_class=tokenizer).model
    assert {layer.self_attn.attention_dropout for layer in left.model.layers} == {0.3}


def test_a_missing_tokenizer_is_named(make_args: MakeArgs):
    with pytest.raises(ValueError, match="processing_class"):
        PreferenceTrainer(tiny_llama(), make_args(), train_dataset=make_rows(4))


def test_a_model_by_path_brings_its_tokenizer(make_args: MakeArgs, tokenizer: Any, tmp_path: Path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = PreferenceTrainer(str(tmp_path / "model"), make_args(max_steps=1), train_dataset=make_rows(4))
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_wrong_arguments(make_args: MakeArgs, tokenizer: Any):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="PreferenceConfig"):
        PreferenceTrainer(tiny_llama(), TrainingArguments("x", use_cpu=True), processing_class=tokenizer)
    with pytest.raises(ValueError, match="model: got './no/such-model', and there is no such folder"):
        PreferenceTrainer("./no/such-model", make_args(), processing_class=tokenizer)


def test_sixteen_bit_weights_are_warned_about(
    make_args: MakeArgs, tokenizer: Any, caplog: pytest.LogCaptureFixture
):
    PreferenceTrainer(tiny_llama().to(torch.bfloat16), make_args(), processing_class=tokenizer)
    assert "lost in rounding" in caplog.text


def test_unusable_rows_are_counted_in_the_log(
    make_args: MakeArgs, tokenizer: Any, caplog: pytest.LogCaptureFixture
):
    rows = [*make_rows(9), {"prompt": "a", "chosen": "", "rejected": "b"}]
    trainer = PreferenceTrainer(tiny_llama(), make_args(), train_dataset=rows, processing_class=tokenizer)
    assert len(trainer.train_dataset) == 9
    assert "skipped 1 with an empty completion (row 10)" in caplog.text
