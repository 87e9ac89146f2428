"""TDPO in the loop: pairs whose loss looks at the reference's whole distributions, in every batch layout."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

from fastdpo import LMHead, fused_preference_loss
from fastdpo.integrations.model import patch_model
from fastdpo.testing import assert_close_to_fp64
from fastdpo.training.batches.batch import PaddedBatch
from fastdpo.training.data.row import REF_COLUMNS
from fastdpo.training.loop.step import BatchCounts, batch_loss
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.config import PreferenceConfig
from tests.integrations.tiny import make_model
from tests.training.batches.layout_cases import PAIRS, ROW_CASES, make_batch, make_pairs
from tests.training.conftest import make_rows, read_metrics, tiny_llama
from tests.training.loop.accumulation import assert_accumulation_changes_nothing
from tests.training.loop.kinds_data import real_rows
from tests.training.loop.test_trainer import KeepGradients

MakeArgs = Callable[..., PreferenceConfig]
LAYOUTS = ["padded", "packed", "shared_prompt"]
# An answer has 12 tokens at the most; each of log p, log q and the KL of a token is right to 1e-5 nats at
# this width, and the margin of a pair has six sums of them, whose log-sigmoid moves by beta times as much.
BETA = 0.4
LOSS_LIMIT = 6 * 12 * 1e-5 * BETA


class Step(NamedTuple):
    loss: Tensor
    grads: dict[str, Tensor]


def gradients(model: Any, loss: Tensor) -> Step:
    model.zero_grad(set_to_none=True)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(loss.detach(), grads)


def looped(model: Any, reference: Any, batch: PaddedBatch, name: str, **settings: Any) -> Step:
    """The step of the loop."""
    args = PreferenceConfig(output_dir="unused", use_cpu=True, loss_type=name, beta=BETA, **settings)
    counts = BatchCounts(len(PAIRS), 40)
    result = batch_loss(model, model, batch, counts, args, Reference("copy", reference))
    return gradients(model, result.loss)


def hidden_states(model: Any, batch: PaddedBatch) -> Tensor:
    # Padding on the right is not masked: no token before it sees it.
    states: Tensor = model.model(input_ids=batch.sequences.input_ids).last_hidden_state
    return states


def by_function(model: Any, reference: Any, batch: PaddedBatch, name: str) -> Step:
    """``fused_preference_loss`` on the padded batch."""
    with torch.no_grad():
        ref_hidden = hidden_states(reference, batch)
    out = fused_preference_loss(
        hidden_states(model, batch), LMHead.from_model(model), batch.sequences.labels,
        loss_type=name, beta=BETA, ref_hidden=ref_hidden, ref_lm_head=LMHead.from_model(reference),
    )  # fmt: skip
    return gradients(model, out.loss)


def by_logits(model: Any, reference: Any, batch: PaddedBatch, name: str, num_pairs: int) -> Step:
    """The paper's formulas with all the logits, in plain torch."""
    labels = F.pad(batch.sequences.labels[:, 1:], (0, 1), value=-100)
    mask, target = labels >= 0, labels.clamp(min=0)[..., None]
    log_p = model.lm_head(hidden_states(model, batch)).log_softmax(-1)
    with torch.no_grad():
        log_q = reference.lm_head(hidden_states(reference, batch)).log_softmax(-1)
    u_w, u_l = ((log_p - log_q).gather(-1, target)[..., 0] * mask).sum(1).chunk(2)
    k_w, k_l = ((log_q.exp() * (log_q - log_p)).sum(-1) * mask).sum(1).chunk(2)
    gap = k_l - k_w if name == "tdpo1" else 0.5 * (k_l - k_w.detach())
    return gradients(model, -F.logsigmoid(BETA * (u_w - u_l - gap)).sum() / num_pairs)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_every_layout_is_the_function_on_the_padded_batch(name: str) -> None:
    """Loss and gradients by the rule; the truth is the function's in fp64, whose maths is dense fp64's."""
    model, reference = make_model("llama"), make_model("llama", seed=1)
    padded = make_batch("padded")
    wide = [copy.deepcopy(one).double() for one in (model, reference)]
    truth = by_function(*wide, padded, name)
    dense = by_logits(*wide, padded, name, len(PAIRS))
    assert truth.loss.item() == pytest.approx(dense.loss.item(), abs=1e-12)
    # Plain torch in fp32, all pairs at once or one at a time: of each gradient the one that is further off.
    whole = by_logits(model, reference, padded, name, len(PAIRS))
    single = [
        by_logits(model, reference, make_batch("padded", pairs=[pair]), name, len(PAIRS)) for pair in PAIRS
    ]
    eager = {}
    for key, gradient in whole.grads.items():
        parts = torch.stack([step.grads[key] for step in single]).sum(0)
        eager[key] = max(gradient, parts, key=lambda value: (value - truth.grads[key]).abs().max())
    patch_model(model)
    patch_model(reference)
    for case in (("padded", "auto"), *ROW_CASES):
        ours = looped(model, reference, make_batch(*case), name)
        assert abs(ours.loss.item() - truth.loss.item()) < LOSS_LIMIT, case
        assert ours.grads.keys() == truth.grads.keys()
        for key, gradient in ours.grads.items():
            assert_close_to_fp64(gradient, truth.grads[key], eager[key], name=f"{key} {case}")


def test_a_reference_of_another_pair_would_show() -> None:
    model, reference = (patch_model(make_model("llama", seed=seed)) for seed in (0, 1))
    batch = make_batch("packed")
    right = looped(model, reference, batch, "tdpo2")
    turned = Reference("copy", reference)
    states = turned.states(model, batch)
    turned.states = lambda *_: type(states)(states.hidden.roll(1, 0), states.lm_head)  # type: ignore[method-assign]
    args = PreferenceConfig(output_dir="unused", use_cpu=True, loss_type="tdpo2", beta=BETA)
    wrong = batch_loss(model, model, batch, BatchCounts(len(PAIRS), 40), args, turned).loss
    assert abs(wrong.item() - right.loss.item()) > 100 * LOSS_LIMIT


@pytest.mark.parametrize("case", ROW_CASES, ids="-".join)
def test_empty_prompts_and_answers_are_as_in_padded_batches(case: tuple[str, str]) -> None:
    model, reference = (patch_model(make_model("llama", seed=seed)) for seed in (0, 1))
    pairs = make_pairs([(0, 3, 4), (4, 0, 3), (3, 5, 0), (0, 1, 2), (2, 3, 1), (4, 0, 0)])
    padded = looped(model, reference, make_batch("padded", pairs=pairs), "tdpo1")
    ours = looped(model, reference, make_batch(*case, pairs), "tdpo1")
    assert abs(ours.loss.item() - padded.loss.item()) < LOSS_LIMIT
    for name, gradient in padded.grads.items():
        torch.testing.assert_close(ours.grads[name], gradient, rtol=1e-4, atol=1e-5)


def test_in_bfloat16(make_args: MakeArgs, tokenizer: Any, tmp_path: Path) -> None:
    """Under autocast a copy still is its policy, to the bit, whatever accelerate casts on the way."""
    for layout in LAYOUTS:
        args = make_args(
            output_dir=str(tmp_path / layout), loss_type="tdpo2", batch_layout=layout, bf16=True, max_steps=2
        )
        made_trainer(args, make_rows(8), tokenizer).train()
        first, second = read_metrics(args.output_dir)
        assert first["kl/chosen"] == first["kl/rejected"] == first["rewards/margins"] == 0.0
        assert second["kl/chosen"] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fresh_policy_is_its_reference(layout: str) -> None:
    """Copy and adapter: ln 2, rewards and KLs of exactly 0."""
    torch.manual_seed(0)
    pairs = [replace(pair, numbers={}) for pair in PAIRS]
    plain = patch_model(make_model("llama"))
    adapted = patch_model(get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules="all-linear")))
    args = PreferenceConfig(output_dir="unused", use_cpu=True, loss_type="tdpo1")
    for model, reference in (
        (plain, Reference("copy", copy.deepcopy(plain))),
        (adapted, Reference("adapter")),
    ):
        batch = make_batch(layout, pairs=pairs)
        result = batch_loss(model, model, batch, BatchCounts(len(pairs), 1), args, reference)
        assert result.loss.item() == pytest.approx(math.log(2), abs=1e-7)
        assert not result.rewards.any()
        assert result.metrics["kl/chosen"] == result.metrics["kl/rejected"] == 0
        assert result.logps.all() and torch.equal(result.logps, result.ref_logps)


def made_trainer(args: PreferenceConfig, rows: Any, tokenizer: Any, **options: Any) -> PreferenceTrainer:
    options = {"train_dataset": rows, "processing_class": tokenizer, **options}
    return PreferenceTrainer(tiny_llama(1), args, **options)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_the_loss_falls_on_real_rows(make_args: MakeArgs, tokenizer: Any, name: str) -> None:
    args = make_args(loss_type=name, max_steps=12, learning_rate=2e-3, per_device_train_batch_size=8)
    rows = real_rows("preference_en.jsonl", 8)
    trainer = made_trainer(args, rows, tokenizer, eval_dataset=rows)
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["eval_kl/chosen"] == before["eval_kl/rejected"] == 0
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and after["eval_rewards/accuracies"] > 0.8
    assert after["eval_kl/chosen"] > 0 and after["eval_kl/rejected"] > 0
    last = read_metrics(args.output_dir)[-2]
    assert last["step"] == 12 and last["kl/chosen"] > 0 and last["rewards/margins"] > 0


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_accumulation_changes_nothing(make_args: MakeArgs, tokenizer: Any, tmp_path: Path, name: str) -> None:
    def make(args: PreferenceConfig, kept: KeepGradients) -> PreferenceTrainer:
        return made_trainer(args, make_rows(7), tokenizer, callbacks=[kept], ref_model=tiny_llama(2))

    log = assert_accumulation_changes_nothing(make_args, make, tmp_path, loss_type=name)
    assert log["kl/chosen"] > 1 and log["kl/rejected"] > 1


def test_references_agree(make_args: MakeArgs, tokenizer: Any, tmp_path: Path) -> None:
    """A copy, the same model given, and the adapter switched off, in layouts of their own: the same run."""
    logs = []
    for reference, layout in (("copy", "padded"), ("given", "packed"), ("adapter", "shared_prompt")):
        args = make_args(
            output_dir=str(tmp_path / reference),
            loss_type="tdpo2",
            reference="auto" if reference == "given" else reference,
            batch_layout=layout,
            max_steps=3,
            max_tokens_per_batch=600 if layout == "packed" else None,
        )
        torch.manual_seed(0)
        trainer = made_trainer(
            args, make_rows(4), tokenizer, peft_config=LoraConfig(r=4, target_modules="all-linear"),
            ref_model=tiny_llama(1) if reference == "given" else None, eval_dataset=make_rows(5, 2),
        )  # fmt: skip
        assert trainer.reference.kind == ("adapter" if reference == "adapter" else "copy")
        trainer.train()
        logs.append([*read_metrics(args.output_dir), trainer.evaluate()])
    first, *others = logs
    assert first[-1]["eval_kl/chosen"] > 0
    for other in others:
        for wanted, got in zip(first, other, strict=True):
            for name in wanted.keys() & got.keys():
                if not name.endswith(("runtime", "second", "time")):
                    assert got[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-4), name


def test_an_evaluation_is_the_mean_over_pairs(make_args: MakeArgs, tokenizer: Any) -> None:
    metrics, rewards = [], []
    for layout, size in (("padded", 12), ("padded", 5), ("packed", 5), ("shared_prompt", 4)):
        args = make_args(loss_type="tdpo1", batch_layout=layout, per_device_eval_batch_size=size)
        trainer = made_trainer(args, None, tokenizer, ref_model=tiny_llama(2))
        metrics.append(trainer.evaluate(make_rows(12)))
        rewards.append(torch.as_tensor(trainer.predict(make_rows(12)).predictions))
    for other, values in zip(metrics[1:], rewards[1:], strict=True):
        torch.testing.assert_close(values, rewards[0], rtol=1e-5, atol=1e-5)
        for name, value in metrics[0].items():
            if not name.endswith(("runtime", "per_second", "time")):
                assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_margins_and_weights_of_pairs(make_args: MakeArgs, tokenizer: Any) -> None:
    """Columns are honoured: -log sigmoid(h - margin), and a pair of weight 0 is as if it were not there."""
    rows = [{**row, "gap": 2.0 * i, "w": float(i > 0)} for i, row in enumerate(make_rows(2))]

    def loss(rows: Any, **columns: Any) -> Any:
        args = make_args(loss_type="tdpo1", **columns)
        trainer = made_trainer(args, rows, tokenizer, ref_model=tiny_llama(2))
        data = trainer.train_dataset
        batch = trainer.data_collator([data[i] for i in range(len(data))])
        return batch_loss(trainer.model, trainer.model, batch, BatchCounts(1, 1), args, trainer.reference)

    both = loss(rows)
    second, with_gap = loss(rows[1:]), loss(rows[1:], margin_column="gap")
    assert loss(rows, pair_weight_column="w").loss.item() == pytest.approx(second.loss.item(), rel=1e-5)
    assert both.loss.item() > second.loss.item()
    h = -math.log(math.expm1(second.loss.item()))  # of -log sigmoid(h)
    assert with_gap.loss.item() == pytest.approx(math.log1p(math.exp(2.0 - h)), rel=1e-4)


def test_what_auto_chooses(make_args: MakeArgs, tokenizer: Any) -> None:
    """Nothing precomputed: columns of the data are no distributions, and a trained adapter is copied."""
    scored = [{**row, **dict.fromkeys(REF_COLUMNS, -1.0)} for row in make_rows(2)]
    trainer = made_trainer(make_args(loss_type="tdpo1"), scored, tokenizer)
    assert trainer.reference.kind == "copy" and not trainer.train_dataset.has_reference
    lora = LoraConfig(r=4, target_modules="all-linear")
    trainer = made_trainer(make_args(loss_type="tdpo1"), None, tokenizer, peft_config=lora)
    assert trainer.reference.kind == "adapter"
    model = get_peft_model(tiny_llama(), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer = PreferenceTrainer(
        model, make_args(loss_type="tdpo1"), train_dataset=make_rows(4), processing_class=tokenizer
    )
    assert trainer.reference.kind == "copy"
    trainer.train()
    assert read_metrics(trainer.args.output_dir)[0]["kl/chosen"] == 0


def test_a_reference_that_moves(make_args: MakeArgs, tokenizer: Any) -> None:
    """TR-DPO with the policy as the next step's reference: no step sees a difference."""
    logs = []
    for sync in (False, True):
        args = make_args(
            loss_type="tdpo2", sync_ref_model=sync, ref_model_mixup_alpha=1.0, ref_model_sync_steps=1,
            overwrite_output_dir=True,
        )  # fmt: skip
        made_trainer(args, make_rows(4), tokenizer).train()
        logs.append(read_metrics(args.output_dir))
    assert [entry["kl/chosen"] for entry in logs[1]] == [0.0] * 4
    assert logs[0][-1]["kl/chosen"] > 0


def test_batches_of_so_many_tokens_on_real_rows(make_args: MakeArgs, tokenizer: Any) -> None:
    args = make_args(
        loss_type="tdpo1", batch_layout="shared_prompt", max_tokens_per_batch=900, longest_batch_first=True,
        max_steps=-1, num_train_epochs=1.0,
    )  # fmt: skip
    trainer = made_trainer(args, real_rows("preference_en.jsonl", 10), tokenizer)
    trainer.train()
    assert trainer.state.global_step > 1
    assert all(entry["loss"] > 0 for entry in read_metrics(args.output_dir))


def test_an_adapter_on_the_head_is_refused(make_args: MakeArgs, tokenizer: Any) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head: got LoRA on it with tdpo1, wanted none"):
        made_trainer(make_args(loss_type="tdpo1"), make_rows(4), tokenizer, peft_config=lora)
