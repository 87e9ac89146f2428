"""AlignDistil in the loop: a teacher made of two models beside the policy, on single answers."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from fastdpo import LMHead, fused_preference_loss
from fastdpo.cli import main
from fastdpo.integrations.model import unpatch_model
from fastdpo.testing import assert_close_to_fp64
from fastdpo.training.loop.step import BatchCounts, batch_loss
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.types import PreferenceLossOutput
from tests.training.conftest import make_rows, read_metrics, tiny_llama
from tests.training.loop.accumulation import assert_accumulation_changes_nothing
from tests.training.loop.kinds_data import real_rows
from tests.training.loop.test_trainer import KeepGradients

MakeArgs = Callable[..., PreferenceConfig]
LAYOUTS = ["padded", "packed", "shared_prompt"]
DISTIL: dict[str, Any] = {"loss_type": "aligndistil", "loss_options": {"beta2": 2.0}}


def made_trainer(args: PreferenceConfig, rows: Any, tokenizer: Any, **options: Any) -> PreferenceTrainer:
    """A policy, and as its teachers two other models."""
    options = {"teacher_model": tiny_llama(3), "ref_model": tiny_llama(2), **options}
    options = {"train_dataset": rows, "processing_class": tokenizer, **options}
    return PreferenceTrainer(tiny_llama(1), args, **options)


def whole_batch(trainer: PreferenceTrainer) -> Any:
    data = trainer.train_dataset
    return trainer.data_collator([data[i] for i in range(len(data))])


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_function(models: Any, batch: Any, mode: str) -> tuple[Any, dict[str, Tensor]]:
    """``fused_preference_loss`` on plain calls of a padded batch."""
    policy, *others = models
    inputs = batch.sequences.model_inputs()
    with torch.no_grad():
        first, second = (model.model(**inputs).last_hidden_state for model in others)
    heads = [LMHead.from_model(model) for model in models]
    out = fused_preference_loss(
        policy.model(**inputs).last_hidden_state, heads[0], batch.sequences.labels, loss_type="aligndistil",
        teacher_hidden=first, teacher_lm_head=heads[1], ref_hidden=second, ref_lm_head=heads[2],
        beta2=2.0, teacher_mode=mode,
    )  # fmt: skip
    return out, gradients(policy, out.loss)


def by_logits(models: Any, batch: Any, mode: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The authors' code with all the logits, in plain torch."""
    inputs = batch.sequences.model_inputs()
    policy, *others = models
    log_p = policy(**inputs).logits.log_softmax(-1)
    with torch.no_grad():
        first, second = (model(**inputs).logits.log_softmax(-1) for model in others)
        distance = (first.exp() - second.exp()).abs().sum(-1, keepdim=True)
        w = 2.0 * distance + 1e-3 if mode == "aligndistil" else torch.full_like(distance, 0.1 / 2.0)
        teacher = (w * (first - second) + first).log_softmax(-1)
        scale = 0.1 / w if mode == "aligndistil" else torch.full_like(w, 2.0)
    kl = (scale * log_p.exp() * (log_p - teacher)).sum(-1)[:, :-1]
    mask = batch.sequences.labels[:, 1:] >= 0
    loss = ((kl * mask).sum(1) / mask.sum(1)).mean()
    return loss.detach(), gradients(policy, loss)


@pytest.mark.parametrize("mode", ["aligndistil", "theorem1_contrast"])
def test_every_layout_is_the_function_on_the_padded_batch(
    make_args: MakeArgs, tokenizer: Any, mode: str
) -> None:
    """Loss and gradients by the rule, on real answers; the truth is plain torch's in fp64."""
    rows, got = real_rows("preference_en.jsonl", 4), {}
    options = {"beta2": 2.0, "teacher_mode": mode}
    for layout in LAYOUTS:
        args = make_args(loss_type="aligndistil", loss_options=options, batch_layout=layout)
        trainer = made_trainer(args, rows, tokenizer)
        batch, policy = whole_batch(trainer), trainer.model
        result = batch_loss(policy, policy, batch, BatchCounts(4, 1), args, trainer.reference)
        assert isinstance(result, PreferenceLossOutput)
        got[layout] = (result, gradients(policy, result.loss))
        if layout == "padded":
            padded, policies = batch, [policy, trainer.reference.teacher, trainer.reference.model]
            plain = [unpatch_model(copy.deepcopy(model)) for model in policies]
    wide = [copy.deepcopy(model).double() for model in plain]
    dense_loss, truth = by_logits(wide, padded, mode)
    by_op, from_op = by_function(wide, padded, mode)
    assert by_op.loss.item() == pytest.approx(dense_loss.item(), rel=1e-12)
    for name, gradient in truth.items():
        torch.testing.assert_close(from_op[name], gradient, rtol=1e-9, atol=1e-12)
    _, eager = by_logits(plain, padded, mode)
    tokens = int((padded.sequences.labels >= 0).sum())
    for layout, (result, grads) in got.items():
        # Every token's KL is right to 1e-5 nats, and counts at most 2 times (0.1 / 1e-3 where they agree).
        limit = tokens / 4 * 1e-5 * (2.0 if mode == "theorem1_contrast" else 100.0)
        assert abs(result.loss.item() - dense_loss.item()) < limit, layout
        assert result.metrics["kl/teacher"].item() == pytest.approx(
            by_op.metrics["kl/teacher"].item(), rel=1e-5
        )
        for name, gradient in grads.items():
            assert_close_to_fp64(gradient, truth[name], eager[name], name=f"{name} {layout}")


@pytest.mark.parametrize(
    "said", [{"loss_type": "gkd", "loss_options": {"jsd_beta": 0.3}}, {"loss_type": "minillm"}], ids=str
)
def test_one_teacher_in_every_layout(make_args: MakeArgs, tokenizer: Any, said: dict[str, Any]) -> None:
    """GKD and MiniLLM: the function on a padded batch, and no reference anywhere."""
    losses, metrics = [], []
    for layout in LAYOUTS:
        trainer = made_trainer(
            make_args(batch_layout=layout, **said), make_rows(4), tokenizer, ref_model=None
        )
        batch, policy = whole_batch(trainer), trainer.model
        result = batch_loss(policy, policy, batch, BatchCounts(4, 1), trainer.args, trainer.reference)
        losses.append((result.loss.detach(), gradients(policy, result.loss)))
        metrics.append(result.metrics["kl/teacher"].item())
        if layout == "padded":
            plain = [unpatch_model(copy.deepcopy(model)) for model in (policy, trainer.reference.teacher)]
            inputs = batch.sequences.model_inputs()
            student, teacher = (model.model(**inputs).last_hidden_state for model in plain)
            heads = [LMHead.from_model(model) for model in plain]
            out = fused_preference_loss(
                student, heads[0], batch.sequences.labels, loss_type=said["loss_type"],
                teacher_hidden=teacher, teacher_lm_head=heads[1], **said.get("loss_options", {}),
            )  # fmt: skip
            want, want_grads = out.loss.detach(), gradients(plain[0], out.loss)
    assert metrics == pytest.approx([metrics[0]] * 3, rel=1e-5) and metrics[0] > 0
    for loss, grads in losses:
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for name, gradient in want_grads.items():
            size = max(gradient.abs().max().item(), 1.0)
            torch.testing.assert_close(grads[name], gradient, rtol=0, atol=2e-6 * size)


def test_the_other_way_round_would_show(make_args: MakeArgs, tokenizer: Any) -> None:
    """The teacher that the loss distils is ``teacher_model``, and the one it leaves is the reference."""
    trainer = made_trainer(make_args(**DISTIL), make_rows(4), tokenizer)
    batch, policy, args = whole_batch(trainer), trainer.model, trainer.args
    counts = BatchCounts(4, 1)
    right = batch_loss(policy, policy, batch, counts, args, trainer.reference).loss.item()
    turned = Reference("copy", trainer.reference.teacher, teacher=trainer.reference.model)
    wrong = batch_loss(policy, policy, batch, counts, args, turned).loss.item()
    assert abs(wrong - right) > 0.01 * right


@pytest.mark.parametrize("teachers", ["two models", "one model and its start", "an adapter"])
def test_the_loss_falls_on_real_rows(make_args: MakeArgs, tokenizer: Any, teachers: str) -> None:
    args = make_args(loss_type="aligndistil", max_steps=12, learning_rate=2e-3, per_device_train_batch_size=8)
    rows = real_rows("preference_en.jsonl", 8)
    options: dict[str, Any] = {} if teachers == "two models" else {"ref_model": None}
    if teachers == "an adapter":
        options["peft_config"] = LoraConfig(r=4, target_modules="all-linear")
    trainer = made_trainer(args, rows, tokenizer, eval_dataset=rows, **options)
    assert trainer.reference.kind == ("adapter" if teachers == "an adapter" else "copy")
    before = trainer.evaluate()
    teacher = copy.deepcopy(trainer.reference.teacher)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and after["eval_kl/teacher"] < before["eval_kl/teacher"]
    # The teachers stay where they are, and so does how far apart they are.
    key = "eval_teachers/l1_distance"
    assert 0 < after[key] == pytest.approx(before[key], rel=1e-6)
    assert trainer.reference.teacher is not None and teacher is not None
    for kept, now in zip(teacher.parameters(), trainer.reference.teacher.parameters(), strict=True):
        assert torch.equal(kept, now)
    last = read_metrics(args.output_dir)[-2]
    assert last["step"] == 12 and last["kl/teacher"] > 0 and last["logps"] < 0
    assert trainer.predict(rows).predictions.shape == (8, 1)


def test_pairs_are_their_chosen_answers(make_args: MakeArgs, tokenizer: Any) -> None:
    pairs = make_rows(6)
    singles = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    losses = []
    for rows in (pairs, singles):
        trainer = made_trainer(make_args(**DISTIL), rows, tokenizer)
        losses.append(trainer.evaluate(rows)["eval_loss"])
    assert losses[0] == losses[1]


def test_accumulation_changes_nothing(make_args: MakeArgs, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**row, "w": 0.5 + i % 3} for i, row in enumerate(make_rows(7))]

    def make(args: PreferenceConfig, kept: KeepGradients) -> PreferenceTrainer:
        return made_trainer(args, rows, tokenizer, callbacks=[kept])

    assert_accumulation_changes_nothing(make_args, make, tmp_path, pair_weight_column="w", **DISTIL)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_bfloat16(make_args: MakeArgs, tokenizer: Any, layout: str) -> None:
    """A policy that is both its teachers: under autocast too nothing is left to learn."""
    args = make_args(batch_layout=layout, bf16=True, max_steps=1, max_grad_norm=0.0, **DISTIL)
    kept = KeepGradients()
    made_trainer(
        args, make_rows(4), tokenizer, callbacks=[kept], ref_model=tiny_llama(1), teacher_model=tiny_llama(1)
    ).train()
    log = read_metrics(args.output_dir)[0]
    assert log["teachers/l1_distance"] == 0.0 and abs(log["kl/teacher"]) < 1e-5
    assert all(gradient.abs().max() < 1e-3 for gradient in kept.steps[0].values())


def test_heads_padded_to_different_sizes(
    make_args: MakeArgs, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As Qwen's are: what lies behind the tokenizer's tokens is left out of every distribution."""
    losses = []
    for name, teacher in (("aligndistil", True), ("tdpo2", False)):
        for size in (tiny_llama().lm_head.out_features, 384):
            other, third = (tiny_llama(seed) for seed in (2, 3))
            for model in (other, third):
                model.resize_token_embeddings(size, mean_resizing=False)
            options = {"ref_model": other} | (
                {"teacher_model": third} if teacher else {"teacher_model": None}
            )
            with caplog.at_level(logging.WARNING, "fastdpo"):
                trainer = made_trainer(make_args(loss_type=name), make_rows(4), tokenizer, **options)
            losses.append(trainer.evaluate(make_rows(4))["eval_loss"])
            assert ("divergences are over the first 360" in caplog.text) == (size == 384)
            caplog.clear()
    assert losses[0] == losses[1] and losses[2] == losses[3]


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(make_args: MakeArgs, tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match="vocabulary: got heads of 360, 300, 360 rows and a tokenizer of 329"
    ):
        made_trainer(make_args(**DISTIL), make_rows(4), tokenizer, ref_model=tiny_llama(2, vocab_size=300))
    tokens = made_trainer(make_args(**DISTIL), make_rows(4), tokenizer).train_dataset
    with pytest.raises(ValueError, match="rows and no tokenizer, wanted one size"):
        made_trainer(make_args(**DISTIL), tokens, None, ref_model=tiny_llama(2, vocab_size=384))


def test_what_is_refused(make_args: MakeArgs, tokenizer: Any) -> None:
    rows = make_rows(4)
    with pytest.raises(
        ValueError, match="teacher_model: got None, wanted the model that aligndistil distils"
    ):
        made_trainer(make_args(**DISTIL), rows, tokenizer, teacher_model=None)
    with pytest.raises(ValueError, match="teacher_model: got a model, but sigmoid distils none"):
        made_trainer(make_args(), rows, tokenizer)
    policy = tiny_llama(1)
    with pytest.raises(ValueError, match="teacher_model: got the model that is trained"):
        PreferenceTrainer(
            policy, make_args(**DISTIL), train_dataset=rows, processing_class=tokenizer, teacher_model=policy
        )
    for changes, message in (
        (
            {"reference": "precomputed"},
            "reference: got 'precomputed'.* aligndistil needs the reference's whole",
        ),
        ({"reference": "none"}, "reference: got 'none', but aligndistil needs one"),
        ({"backend": "cuda"}, "backend: got 'cuda' with aligndistil"),
        ({"loss_type": ["aligndistil", "tdpo1"]}, "wanted losses of one kind of data"),
        ({"margin_column": "m"}, "margin_column: got a value, wanted None"),
        ({"loss_options": {"teacher_mode": "kd"}}, "teacher_mode: got 'kd', wanted one of aligndistil"),
    ):
        with pytest.raises(ValueError, match=message):
            made_trainer(make_args(**DISTIL | changes), rows, tokenizer)
    with pytest.raises(ValueError, match="no column 'completion'.*prompt-completion data"):
        made_trainer(make_args(**DISTIL), [{"prompt": "a", "text": "b"}], tokenizer)


def test_from_the_command_line(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for seed, name in enumerate(("sft", "dpo", "reverse"), start=1):
        tiny_llama(seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, make_rows(6))))
    model, dpo, reverse = (tmp_path / name for name in ("sft", "dpo", "reverse"))
    run = f"--model {model} --dataset {data} --use_cpu --max_steps 2 --logging_steps 1 --save_strategy no"
    words = [*run.split(), "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "True"]
    losses = "--loss_type aligndistil --beta2 15 --teacher_mode theorem1_adaptive --length_normalize".split()
    teachers = f"--teacher_model {dpo} --ref_model {reverse}".split()
    assert main(["doctor", *words, *losses, *teachers]) == 0
    assert main(["train", *words, *losses, *teachers]) == 0
    first, second = read_metrics(tmp_path / "out")[:2]
    assert first["kl/teacher"] > 0 and second["loss"] != first["loss"]
    capsys.readouterr()
    assert main(["train", *words, *losses]) == 2
    assert "--teacher_model is required for aligndistil, which distils it" in capsys.readouterr().err
    for command in ("train", "score"):
        assert main([command, *words, *teachers]) == 2
        assert f"--teacher_model: got {dpo}, but sigmoid distils no model" in capsys.readouterr().err
    for given in (teachers, []):
        assert main(["score", *words, *losses, *given]) == 2
        assert "--loss_type: got aligndistil, which has no use for" in capsys.readouterr().err
