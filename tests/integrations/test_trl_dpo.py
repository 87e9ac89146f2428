"""TRL's DPOTrainer with the patch and without it: the same losses, gradients and metrics by every option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from fastdpo import Execution, patch_trl
from fastdpo.integrations.trl_logprob import FusedLogProb
from tests.integrations import trl_runs as runs
from tests.ops.test_memory import largest_allocation

LOSSES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {"beta": 2.0},
}


def make_trainer(folder: Path, *, family: str = "llama", model: Any = None, **changes: Any) -> DPOTrainer:
    keywords = {name: changes.pop(name) for name in ("eval_dataset", "peft_config") if name in changes}
    data = {"train_dataset": changes.pop("train_dataset", None) or runs.pairs()}
    data["processing_class"] = changes.pop("processing_class", None) or runs.make_tokenizer()
    is_peft = "peft_config" in keywords
    model = model or runs.policy(family)
    if changes.get("use_weighting"):
        # WPO weighs pairs by their probability: with peaked distributions nothing is left of random answers.
        model.lm_head.weight.data.mul_(0.1)
    return DPOTrainer(
        model,
        ref_model=None if is_peft else runs.reference(family),
        args=DPOConfig(**runs.settings(folder, **changes)),
        **data,
        **keywords,
    )


def compare(folder: Path, **changes: Any) -> tuple[runs.Run, runs.Run]:
    ours, theirs = runs.side_by_side(lambda: make_trainer(folder, **changes), patch_trl)
    runs.assert_alike(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_every_loss_type(loss_type: str, tmp_path: Path) -> None:
    ours, _ = compare(tmp_path, loss_type=[loss_type], **LOSSES[loss_type])
    assert {"rewards/margins", "logits/chosen", "entropy", "mean_token_accuracy", "logps/rejected"} <= (
        ours.logs[0].keys()
    )


def test_the_loss_types_are_trls() -> None:
    """One that TRL adds has to be added here."""
    assert runs.loss_types(DPOTrainer._compute_loss) == set(LOSSES)


@pytest.mark.parametrize(
    "changes",
    [
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        {"ld_alpha": 0.5},
        {"ld_alpha": 0.0, "precompute_ref_log_probs": True},
        {"use_weighting": True},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["sigmoid", "ipo"], "use_weighting": True, "f_divergence_type": "js_divergence"},
        {"precompute_ref_log_probs": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"max_length": 8},
        {"max_length": 8, "truncation_mode": "keep_end"},
        {"pad_to_multiple_of": 16},
        {"beta": 0.5, "disable_dropout": False},
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)
def test_every_option(changes: dict[str, Any], tmp_path: Path) -> None:
    compare(tmp_path, **changes)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "phi", "llama-tied"])
def test_softcap_scale_bias_and_tied_heads(family: str, tmp_path: Path) -> None:
    compare(tmp_path, family=family)


def test_the_auxiliary_loss_of_a_mixture_of_experts(tmp_path: Path) -> None:
    ours, _ = compare(tmp_path, family="mixtral", router_aux_loss_coef=0.5)
    assert ours.logs[0]["aux_loss"] > 0


def test_evaluation(tmp_path: Path) -> None:
    ours, _ = compare(tmp_path, eval_dataset=runs.pairs(seed=3))
    assert any("eval_rewards/margins" in entry for entry in ours.logs)


def test_adapters(tmp_path: Path) -> None:
    """The reference is the model without its adapter, and the head is frozen."""
    peft = pytest.importorskip("peft")
    ours, _ = compare(tmp_path, peft_config=peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    assert all("lora" in name for name in ours.grads)


@pytest.mark.promise(52)
@pytest.mark.slow
def test_curves_of_thirty_steps(tmp_path: Path) -> None:
    ours, _ = compare(tmp_path, max_steps=30)
    assert len(ours.losses) == 30 and ours.losses[0] > ours.losses[-1] + 0.01


@pytest.mark.slow
def test_curves_on_real_pairs(preference_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"][-1]["content"]}
        | {name: " " + row[name][-1]["content"] for name in ("chosen", "rejected")}
        for row in preference_rows[:64]
    ]
    tokenizer = runs.word_tokenizer([text for row in rows for text in row.values()])
    ours, _ = compare(
        tmp_path,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        max_length=64,  # the longest position that the tiny models have
        max_steps=30,
        learning_rate=1e-3,
        loss_type=["sigmoid_norm", "sft"],
    )
    assert ours.losses[0] > ours.losses[-1]


def test_bf16_autocast(tmp_path: Path) -> None:
    """TRL rounds logits to bf16 and ours are not rounded, so the two may differ as bf16 does."""
    exact = runs.record(make_trainer(tmp_path, max_steps=1, loss_type=["sft"]))
    ours, theirs = runs.side_by_side(
        lambda: make_trainer(tmp_path, max_steps=1, loss_type=["sft"], bf16=True), patch_trl
    )
    # bf16 through two layers: 2^-8 of logits of about 3 for each, averaged over some 30 tokens.
    assert 1e-5 < abs(ours.losses[0] - exact.losses[0]) < 2e-2
    assert abs(ours.losses[0] - theirs.losses[0]) < 2e-2


def test_the_patched_function_runs_on_labelled_tokens_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy and reference each score the answers' tokens, and nothing else, in the modes expected."""
    rows = []
    apply = FusedLogProb.apply

    def counted(self: Any, hidden: Any, weight: Any, *args: Any) -> Any:
        rows.append((hidden.shape[0], torch.is_grad_enabled()))
        return apply(self, hidden, weight, *args)

    monkeypatch.setattr(FusedLogProb, "apply", counted)
    trainer = make_trainer(tmp_path, max_steps=1)
    runs.record(trainer)
    assert rows == []
    with patch_trl():
        trainer = make_trainer(tmp_path, max_steps=1, per_device_train_batch_size=runs.NUM_ROWS)
        runs.record(trainer)
    answers = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trainer.train_dataset)
    assert rows == [(answers, True), (answers, False)]


def test_a_trainer_made_before_the_patch_is_patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    apply = FusedLogProb.apply
    monkeypatch.setattr(FusedLogProb, "apply", lambda self, *args: calls.append(1) or apply(self, *args))
    trainer = make_trainer(tmp_path, max_steps=1)
    with patch_trl():
        runs.record(trainer)
    assert len(calls) == 2


def test_no_logits_of_the_batch(tmp_path: Path) -> None:
    """The largest allocation of a step is below the logits' size; TRL on a CPU makes a tile of them."""
    vocab, batch = 4096, 8
    model = runs.make_model(vocab_size=vocab)

    def largest() -> int:
        trainer = make_trainer(tmp_path, model=model, max_steps=1, per_device_train_batch_size=batch)
        trainer.ref_model = None
        inputs = next(iter(trainer.get_train_dataloader()))
        labelled = int(inputs["completion_mask"][:, 1:].sum())
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)

        def step() -> None:
            out = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels,
                fused_lm_head=True,
            )
            out.log_probs.sum().backward()

        found = largest_allocation(step)
        model.__dict__.pop("forward")
        assert labelled * vocab * 4 > 2**20
        return found

    theirs = largest()
    with patch_trl(execution=Execution(workspace_mib=1, cache_mib=0)):
        ours = largest()
    # The weight's gradient (4096 x 32 in fp32) and one workspace are the largest there are.
    assert ours <= 2**20 < theirs
