"""Mixtures of experts: the loss that balances their routers, as TRL adds it, in the layouts that have it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fastdpo.integrations.probe import load_balancing_loss
from fastdpo.training.loop.trainer import PreferenceTrainer
from tests.training.conftest import (
    VOCABULARY,
    made_tokenizer,
    make_rows,
    quick_args,
    read_metrics,
    tiny_llama,
)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.3,
}
ROWS = make_rows(24, seed=5)


def mixture(family: str = "mixtral", **changes: Any) -> Any:
    torch.manual_seed(0)
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**{**_SIZES, "num_local_experts": 4, **changes}))
    own = {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "decoder_sparse_step": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**_SIZES, **own, **changes}))


def trained(
    folder: Path, bpe: str, model: Any, rows: Any = ROWS, **settings: Any
) -> tuple[Any, list[dict[str, Any]]]:
    args = quick_args(folder, **{"train_sampling_strategy": "sequential", "max_steps": 3, **settings})
    trainer = PreferenceTrainer(model, args, train_dataset=rows, processing_class=made_tokenizer(bpe))
    trainer.train()
    return trainer, read_metrics(folder)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_twenty_steps_are_trls(family: str, accumulated: int, tmp_path: Path, trained_bpe: str):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    steps = {
        "max_steps": 20 // accumulated,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "gradient_accumulation_steps": accumulated,
    }
    rows = make_rows(80, seed=5)
    _, ours = trained(tmp_path / "ours", trained_bpe, mixture(family), rows, **steps)
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "theirs"), use_cpu=True, bf16=False, report_to="none", logging_steps=1,
        per_device_train_batch_size=4, save_strategy="no", train_sampling_strategy="sequential",
        disable_tqdm=True, gradient_checkpointing=False, **steps,
    )  # fmt: skip
    theirs = trl.DPOTrainer(
        mixture(family), ref_model=mixture(family), args=config, train_dataset=Dataset.from_list(rows),
        processing_class=made_tokenizer(trained_bpe),
    )  # fmt: skip
    theirs.train()
    logged = [entry for entry in theirs.state.log_history if "rewards/margins" in entry]
    assert len(ours) == len(logged) == 20 // accumulated
    for mine, yours in zip(ours, logged, strict=True):
        for name in ("loss", "aux_loss", "rewards/margins", "logps/chosen", "grad_norm"):
            assert mine[name] == pytest.approx(yours[name], rel=1e-5, abs=1e-5), (mine["step"], name)
    assert ours[0]["loss"] == pytest.approx(math.log(2) + 0.3 * ours[0]["aux_loss"], abs=1e-5)


def exact() -> Any:
    """In fp64, which only the plain code of the experts takes."""
    model = mixture().double()
    model.set_experts_implementation("eager")
    return model


def gradients(folder: Path, bpe: str, model: Any, **settings: Any) -> tuple[float, dict[str, torch.Tensor]]:
    args = quick_args(folder, per_device_train_batch_size=6, **settings)
    trainer = PreferenceTrainer(model, args, train_dataset=ROWS[:6], processing_class=made_tokenizer(bpe))
    (batch,) = trainer.get_train_dataloader()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    return float(loss), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_layout": "packed", "row_arrangement": "separate"},
        {"batch_layout": "packed", "row_arrangement": "one_row"},
        {"pad_to_multiple_of": 64},
        {"gradient_checkpointing": True},
    ],
)
def test_padding_counts_in_no_layout(settings: dict[str, Any], tmp_path: Path, trained_bpe: str):
    """The same rows, in fp64: the same loss and gradients, the routers' included."""
    before, wanted = gradients(tmp_path / "a", trained_bpe, exact(), train_sampling_strategy="sequential")
    after, found = gradients(
        tmp_path / "b", trained_bpe, exact(), train_sampling_strategy="sequential", **settings
    )
    # The library's own loss is summed in fp32.
    assert after == pytest.approx(before, abs=2e-6)
    assert wanted.keys() == found.keys() and any("gate" in name for name in wanted)
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-8, name


def test_the_gradient_is_that_of_the_sum(tmp_path: Path, trained_bpe: str):
    """Of the loss without it, and of the library's own loss of the same batch."""
    _, whole = gradients(tmp_path / "a", trained_bpe, exact())
    _, without = gradients(tmp_path / "b", trained_bpe, exact(), router_aux_loss_coef=0.0)
    model = exact()
    args = quick_args(tmp_path / "c", per_device_train_batch_size=6)
    trainer = PreferenceTrainer(
        exact(), args, train_dataset=ROWS[:6], processing_class=made_tokenizer(trained_bpe)
    )
    (batch,) = trainer.get_train_dataloader()
    out = model(**batch.model_inputs(model), output_router_logits=True)
    (0.3 * out.aux_loss).backward()
    for name, parameter in model.named_parameters():
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(whole[name], without[name] + own, rtol=1e-5, atol=1e-7)


def test_other_losses_adapters_and_evaluations_have_it_too(tmp_path: Path, trained_bpe: str):
    from peft import LoraConfig

    args = quick_args(tmp_path / "run", eval_strategy="steps", eval_steps=2, max_steps=2)
    trainer = PreferenceTrainer(
        mixture(), args, train_dataset=ROWS[:8], eval_dataset=ROWS[8:13],
        processing_class=made_tokenizer(trained_bpe),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "eval_aux_loss" in entry]
    assert found and 0.5 < found[0]["eval_aux_loss"] < 4
    for loss in ("kto", "tdpo2", "simpo"):
        _, metrics = trained(tmp_path / loss, trained_bpe, mixture(), loss_type=loss, max_steps=1)
        _, without = trained(
            tmp_path / f"{loss}_0",
            trained_bpe,
            mixture(),
            loss_type=loss,
            max_steps=1,
            router_aux_loss_coef=0,
        )
        more = metrics[0]["loss"] - without[0]["loss"]
        assert more == pytest.approx(0.3 * metrics[0]["aux_loss"], abs=1e-5) and "aux_loss" not in without[0]


def test_the_loss_is_that_of_the_model_whose_class_an_engine_replaced():
    model = mixture()
    wanted = load_balancing_loss(model)
    model.__class__ = type("FSDPMixtral", (type(model),), {"__module__": "torch.distributed.fsdp"})
    assert wanted is not None and load_balancing_loss(model) is wanted


def test_what_is_saved_is_as_it_was(tmp_path: Path, trained_bpe: str):
    trainer, _ = trained(tmp_path / "run", trained_bpe, mixture(), max_steps=1)
    assert trainer.model.config.output_router_logits is False


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (tiny_llama, {"router_aux_loss_coef": 0.1}, "got 0.1, but LlamaForCausalLM gives no router logits"),
        (mixture, {"router_aux_loss_coef": -1}, "router_aux_loss_coef: got -1, wanted a number from 0"),
        (mixture, {"batch_layout": "shared_prompt"}, "batch_layout: got 'shared_prompt' with a router loss"),
        (
            mixture,
            {"batch_layout": "packed", "row_arrangement": "bucketed"},
            "row_arrangement: got 'bucketed'",
        ),
        (
            mixture,
            {"batch_layout": "packed", "pad_to_multiple_of": 8},
            "pad_to_multiple_of: got 8 with a router",
        ),
        (
            mixture,
            {"batch_layout": "packed", "context_chunk": 16},
            "context_chunk: got 16 with a router loss",
        ),
    ],
)
def test_what_it_does_not_go_with(
    model: Any, settings: dict[str, Any], said: str, tmp_path: Path, trained_bpe: str
):
    with pytest.raises(ValueError, match=said):
        trained(tmp_path / "run", trained_bpe, model(), **settings)


def test_zero_is_none_and_auto_finds_a_layout(tmp_path: Path, trained_bpe: str):
    _, metrics = trained(
        tmp_path / "a",
        trained_bpe,
        mixture(),
        batch_layout="shared_prompt",
        router_aux_loss_coef=0,
        max_steps=1,
    )
    assert "aux_loss" not in metrics[0] and metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    trainer, metrics = trained(tmp_path / "b", trained_bpe, mixture(), batch_layout="auto", max_steps=1)
    assert "aux_loss" in metrics[0] and getattr(trainer.data_collator, "layout", "padded") != "shared_prompt"
