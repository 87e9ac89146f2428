"""Prompt tuning, P-tuning and prefix tuning in the loop, against plain torch through PEFT's own model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.training.batches.layouts import layout_of
from fastdpo.training.loop.over_optimisation import OverOptimisationMonitor
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.integrations.peft_cases import with_lora
from tests.integrations.test_virtual_tokens import KINDS, NUM_VIRTUAL, filled
from tests.training.conftest import make_rows, read_metrics, tiny_llama
from tests.training.loop.test_trainer import plain_sums

peft = pytest.importorskip("peft")

MakeArgs = Callable[..., PreferenceConfig]
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.5, "max_grad_norm": 0.0}


def answer_sums(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """``(2P,)`` log-probabilities of the answers from all the logits, of which PEFT has more than labels."""
    logits = model(**batch.sequences.model_inputs()).logits
    assert logits.shape[1] - batch.sequences.labels.shape[1] in (0, NUM_VIRTUAL)
    logp = logits[:, -batch.sequences.labels.shape[1] : -1].log_softmax(-1)
    mask = batch.sequences.labels[:, 1:] != -100
    return (logp.gather(-1, batch.sequences.input_ids[:, 1:, None])[..., 0] * mask).sum(1)


def plain_losses(
    model: Any, batches: list[dict[str, Tensor]], reference: Callable[[dict[str, Tensor]], Tensor]
) -> list[float]:
    """A step of SGD on every batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=SGD["learning_rate"])
    losses = []
    for batch in batches:
        with torch.no_grad():
            ref = reference(batch)
        chosen, rejected = (answer_sums(model, batch) - ref).chunk(2)
        loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("reference", ["auto", "copy", "adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_plain_torch(make_args: MakeArgs, tokenizer: Any, kind: str, reference: str):
    """The reference is the policy as it was, virtual tokens included, or the model without them."""
    model = filled(kind, tiny_llama())
    plain = copy.deepcopy(model)
    args = make_args(reference=reference, train_sampling_strategy="sequential", **SGD)
    trainer = PreferenceTrainer(model, args, train_dataset=make_rows(16), processing_class=tokenizer)
    data = trainer.train_dataset
    batches = [trainer.data_collator([data[i] for i in range(n, n + 4)]) for n in range(0, 16, 4)]
    trainer.train()
    first, base = copy.deepcopy(plain), tiny_llama()
    wanted = plain_losses(
        plain,
        batches,
        (lambda batch: plain_sums(base, batch))
        if reference == "adapter"
        else (lambda b: answer_sums(first, b)),
    )
    logs = read_metrics(args.output_dir)
    # Four sums of at most 25 tokens, each within 1e-5 nats, times beta and the log-sigmoid's slope: 0.1 / 2.
    assert int(data.answers.values.max()) <= 25
    assert [log["loss"] for log in logs] == pytest.approx(wanted, abs=5e-5)
    assert max(wanted) - min(wanted) > 1e-3
    trained = [(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True) if a.requires_grad]
    assert trained
    for ours, theirs in trained:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_saved_is_the_adapter(make_args: MakeArgs, tokenizer: Any):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL)
    args = make_args(max_steps=2)
    trainer = PreferenceTrainer(
        tiny_llama(), args, train_dataset=make_rows(8), eval_dataset=make_rows(4, 2),
        processing_class=tokenizer, peft_config=config,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    again = peft.PeftModel.from_pretrained(tiny_llama(), args.output_dir)
    data = trainer.eval_dataset
    batch = trainer.data_collator([data[i] for i in range(4)])
    with torch.no_grad():
        chosen, _ = answer_sums(again.eval(), batch).chunk(2)
    assert metrics["eval_logps/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_changes_nothing(make_args: MakeArgs, tokenizer: Any, checkpointing: bool):
    args = make_args(max_steps=1, gradient_checkpointing=checkpointing, loss_type="tdpo2")
    trainer = PreferenceTrainer(
        filled("prompt", tiny_llama()), args, train_dataset=make_rows(4), processing_class=tokenizer
    )
    trainer.train()
    (log,) = read_metrics(args.output_dir)
    assert log["loss"] == pytest.approx(0.693147, abs=1e-5) and log["kl/chosen"] == 0.0


def test_a_prefix_in_the_cache_does_not_go_with_checkpointing(make_args: MakeArgs, tokenizer: Any):
    args = make_args(gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing: got True with prefix tuning"):
        PreferenceTrainer(filled("prefix", tiny_llama()), args, processing_class=tokenizer)


@pytest.mark.parametrize("layout", ["packed", "shared_prompt"])
@pytest.mark.parametrize("is_reference", [False, True])
def test_rows_of_several_sequences_are_refused(
    make_args: MakeArgs, tokenizer: Any, layout: str, is_reference: bool
):
    """Also where only the reference has virtual tokens."""
    models = [filled("prompt", tiny_llama()), with_lora(tiny_llama())]
    policy, ref_model = reversed(models) if is_reference else (models[0], None)
    with pytest.raises(ValueError, match=f"batch_layout: got '{layout}'.*virtual tokens before padded rows"):
        PreferenceTrainer(
            policy, make_args(batch_layout=layout), train_dataset=make_rows(4),
            processing_class=tokenizer, ref_model=ref_model,
        )  # fmt: skip


def test_auto_is_padded(make_args: MakeArgs, tokenizer: Any, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, logger="fastdpo")
    trainer = PreferenceTrainer(
        filled("prompt", tiny_llama()), make_args(batch_layout="auto", max_steps=1),
        train_dataset=make_rows(4), processing_class=tokenizer,
    )  # fmt: skip
    assert layout_of(trainer.data_collator) == "padded"
    assert "refused: PEFT puts its virtual tokens before padded rows only" in caplog.text
    trainer.train()


@pytest.mark.parametrize("kind", KINDS)
def test_the_most_likely_tokens_are_those_after_virtual_ones(make_args: MakeArgs, tokenizer: Any, kind: str):
    model = filled(kind, tiny_llama())
    plain = copy.deepcopy(model)
    trainer = PreferenceTrainer(
        model, make_args(), eval_dataset=make_rows(4), processing_class=tokenizer,
        callbacks=[OverOptimisationMonitor(topk=7)],
    )  # fmt: skip
    metrics = trainer.evaluate()
    data = trainer.eval_dataset
    batch = trainer.data_collator([data[i] for i in range(4)])
    with torch.no_grad():
        logits = plain(**batch.sequences.model_inputs()).logits
    mass = logits[:4, -batch.sequences.labels.shape[1] : -1].softmax(-1).topk(7).values.sum(-1)
    wanted = mass[batch.sequences.labels[:4, 1:] != -100].mean()
    assert metrics["eval_topk_mass/chosen"] == pytest.approx(wanted.item(), rel=1e-5)
