"""Padded, packed and shared-prompt batches give the same loss, log-probabilities and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastdpo.integrations.model import patch_model
from fastdpo.testing import assert_close_to_fp64, assert_logps_close
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.report import DataReport
from fastdpo.training.loop.step import BatchCounts, batch_loss
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.config import PreferenceConfig
from tests.integrations.tiny import make_model
from tests.training.batches.layout_cases import PAIRS, ROW_CASES, Step, make_batch, make_pairs, run_step
from tests.training.conftest import VOCABULARY, make_rows, read_metrics, tiny_llama

MakeArgs = Callable[..., PreferenceConfig]
LAYOUTS = ["packed", "shared_prompt"]
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


def true_step(model: Any) -> Step:
    """The padded step in fp64. Padding on the right is not masked: no token before it sees it.

    With the mask, padding beyond a sliding window sees nothing at all, which is NaN in fp64 eager attention.
    """
    batch = make_batch("padded")
    whole = replace(batch.sequences, attention_mask=torch.ones_like(batch.sequences.attention_mask))
    return run_step(patch_model(copy.deepcopy(model).double()), replace(batch, sequences=whole))


def eager_step(model: Any, truth: Step) -> Step:
    """The padded fp32 step: pairs together or one at a time, for each gradient the one that is further off.

    The rule's unit is eager's error. Of a gradient of eight entries a single way to sum it up may be exact
    by luck; of two ways, both plain padded training, the worse one is what users have to live with.
    """
    whole = run_step(model, make_batch("padded"))
    single = [run_step(model, make_batch("padded", pairs=[pair]), num_pairs=len(PAIRS)) for pair in PAIRS]
    grads = {}
    for name, gradient in whole.grads.items():
        parts = torch.stack([step.grads[name] for step in single]).sum(0)
        grads[name] = max(gradient, parts, key=lambda value: (value - truth.grads[name]).abs().max())
    return whole._replace(grads=grads)


def assert_steps_close(ours: Step, truth: Step, eager: Step) -> None:
    """Tokens to 1e-5 nats, gradients by the rule."""
    assert_logps_close(ours.tokens, truth.tokens.double(), torch.float32)
    # The loss is a mean of log-sigmoids of sums of at most 20 tokens of 1e-5 nats each, times beta = 0.1.
    assert ours.loss.item() == pytest.approx(truth.loss.item(), abs=2e-5)
    assert ours.grads.keys() == eager.grads.keys()
    for name, gradient in ours.grads.items():
        assert_close_to_fp64(gradient, truth.grads[name].double(), eager.grads[name], name=name)


@pytest.mark.promise(59)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gpt2", {}),
        ("mistral", {"sliding_window": 6}),
        ("gemma2", {"sliding_window": 6}),
        ("gemma3", {"sliding_window": 6}),
        ("gemma4", {}),
        ("llama", {"attn_implementation": "eager"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "default",
)
def test_every_layout_is_the_padded_step(family: str, options: dict[str, Any]):
    model = make_model(family, **options)
    truth = true_step(model)
    patch_model(model)
    eager = eager_step(model, truth)
    for case in ROW_CASES:
        assert_steps_close(run_step(model, make_batch(*case)), truth, eager)


@pytest.mark.parametrize("family", ["falcon-h1", "mamba2"])
def test_recurrent_models_in_rows_of_one_sequence(family: str):
    """Without padding, or with some on the right, which no token before it sees."""
    model = make_model(family)
    truth = true_step(model)
    eager = eager_step(patch_model(model), truth)
    for arrangement in ("separate", "bucketed"):
        assert_steps_close(run_step(model, make_batch("packed", arrangement)), truth, eager)


def test_a_wrong_forest_would_show():
    """The same comparison with an answer that sees another one, and with positions that run on."""
    model = make_model("llama")
    truth = true_step(model)
    patch_model(model)
    eager = eager_step(model, truth)
    for changed in ("forest", "position_ids"):
        batch = make_batch("shared_prompt", "one_row")
        (call,) = batch.calls
        parents = call["forest"].parents
        assert parents[:3] == (-1, 0, 0)
        wrong = {"forest": replace(call["forest"], parents=(-1, 0, 1, *parents[3:]))}
        call |= wrong if changed == "forest" else {"position_ids": torch.arange(70)[None]}
        with pytest.raises(AssertionError):
            assert_steps_close(run_step(model, batch), truth, eager)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(layout: str, reentrant: bool):
    model = patch_model(make_model("llama")).train()
    for arrangement in ("separate", "one_row"):
        batch = make_batch(layout, arrangement)
        plain = run_step(model, batch)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        checkpointed = run_step(model, batch)
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        assert torch.equal(plain.loss, checkpointed.loss)
        for name, gradient in plain.grads.items():
            torch.testing.assert_close(checkpointed.grads[name], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_and_its_reference_run_in_the_same_layout(layout: str):
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules="all-linear"))
    patch_model(model)
    pairs = [replace(pair, numbers={}) for pair in PAIRS]
    args = PreferenceConfig(output_dir="unused", use_cpu=True)
    for case in ("padded", layout):
        batch, counts = make_batch(case, pairs=pairs), BatchCounts(len(pairs), 1)
        result = batch_loss(model, model, batch, counts, args, Reference("adapter"))
        # The adapter is fresh, so policy and reference are one: exactly, in every layout.
        assert result.loss.item() == pytest.approx(math.log(2), abs=1e-7)
        assert not result.rewards.any()


@pytest.mark.parametrize("case", ROW_CASES, ids="-".join)
def test_what_the_loop_asks_of_a_batch(case: tuple[str, str]):
    padded, batch = make_batch("padded"), make_batch(*case)
    assert batch.num_rows == padded.num_rows == 4
    for side in (slice(4), slice(4, None)):
        assert batch.tokens_of(side) == int(padded.tokens_of(side))
    assert batch.sequence_tokens == padded.sequence_tokens
    assert torch.equal(batch.rows, padded.rows) and torch.equal(batch.ref_logps, padded.ref_logps)


@pytest.mark.parametrize("case", ROW_CASES, ids="-".join)
def test_the_first_pairs_of_a_batch(case: tuple[str, str]):
    model = patch_model(make_model("llama"))
    for count in (1, 3):
        ours = run_step(model, make_batch(*case).first(count))
        alone = run_step(model, make_batch("padded", pairs=PAIRS[:count]))
        torch.testing.assert_close(ours.tokens, alone.tokens, rtol=0, atol=1e-5)
        assert ours.loss.item() == pytest.approx(alone.loss.item(), abs=2e-5)


@pytest.mark.parametrize("case", ROW_CASES, ids="-".join)
def test_empty_prompts_and_answers_are_as_in_padded_batches(case: tuple[str, str]):
    model = patch_model(make_model("llama"))
    pairs = make_pairs([(0, 3, 4), (4, 0, 3), (3, 5, 0), (0, 1, 2), (2, 3, 1)])
    ours, padded = (
        run_step(model, make_batch(*case, pairs)),
        run_step(model, make_batch("padded", pairs=pairs)),
    )
    torch.testing.assert_close(ours.tokens, padded.tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.logps, padded.logps, rtol=0, atol=5e-5)
    for name, gradient in padded.grads.items():
        torch.testing.assert_close(ours.grads[name], gradient, rtol=1e-4, atol=1e-5)


def test_empty_prompts_and_answers_are_named(make_args: MakeArgs, caplog: pytest.LogCaptureFixture):
    tokens = torch.arange(3, 15, dtype=torch.int32)
    bounds = torch.tensor([[0, 2, 4, 6], [6, 6, 7, 8], [8, 9, 9, 12]])
    rows = torch.tensor([4, 7, 9])
    data = RowDataset.of_pairs(tokens, bounds, rows, {}, DataReport("made", 3, 3))
    trainer = PreferenceTrainer(tiny_llama(), make_args(batch_layout="shared_prompt"), train_dataset=data)
    assert "row 7: an empty prompt, so its first token is not scored" in caplog.text
    assert "row 9: an empty answer, so it has log-probability 0" in caplog.text
    trainer.train()
    assert len(read_metrics(trainer.args.output_dir)) == 4


def train(args: PreferenceConfig, tokenizer: Any, count: int = 24, **options: Any) -> Any:
    trainer = PreferenceTrainer(
        tiny_llama(), args, train_dataset=make_rows(count), processing_class=tokenizer, **options
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "family",
    ["llama", pytest.param("qwen2", marks=pytest.mark.slow), pytest.param("gemma2", marks=pytest.mark.slow)],
)
def test_the_curve_of_fifty_steps_is_the_same(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Any, family: str
):
    # A window that no sequence fits into: they have 9 to 20 tokens.
    window = {"sliding_window": 6} if family == "gemma2" else {}
    curves = {}
    for layout in ("padded", "packed", "shared_prompt"):
        args = make_args(
            output_dir=str(tmp_path / layout), batch_layout=layout, max_steps=50, learning_rate=3e-3
        )
        model = tiny_llama()
        if family != "llama":
            model = make_model(family, vocab_size=VOCABULARY, max_position_embeddings=2048, **window)
        trainer = PreferenceTrainer(model, args, train_dataset=make_rows(24), processing_class=tokenizer)
        assert trainer.train_dataset.lengths.min() > window.get("sliding_window", 0)
        trainer.train()
        curves[layout] = read_metrics(args.output_dir)
    assert curves["padded"][-1]["loss"] < 0.1  # it has learnt, so the curves had something to differ in
    for layout in LAYOUTS:
        assert len(curves[layout]) == 50
        for entry, wanted in zip(curves[layout], curves["padded"], strict=True):
            # Rounding errors of 1e-6 in a gradient grow over fifty steps of a learning rate of 3e-3.
            assert entry["loss"] == pytest.approx(wanted["loss"], abs=1e-4)
            assert entry["num_tokens"] == wanted["num_tokens"]
            for name in ("rewards/margins", "entropy", "mean_token_accuracy", "logits/chosen"):
                assert entry[name] == pytest.approx(wanted[name], rel=1e-3, abs=2e-3), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_evaluation_is_that_of_padded_batches(make_args: MakeArgs, tokenizer: Any, layout: str):
    metrics, rewards = [], []
    for name in ("padded", layout):
        args = make_args(batch_layout=name, per_device_eval_batch_size=5)
        trainer = PreferenceTrainer(tiny_llama(1), args, processing_class=tokenizer, ref_model=tiny_llama(2))
        metrics.append(trainer.evaluate(make_rows(12)))
        rewards.append(torch.from_numpy(trainer.predict(make_rows(12)).predictions))
    torch.testing.assert_close(rewards[1], rewards[0], rtol=1e-5, atol=1e-5)
    for name, value in metrics[0].items():
        if not name.endswith(("runtime", "per_second", "preparation_time")):
            assert metrics[1][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_precomputed_references_in_the_layout(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Any, layout: str
):
    logs, caches = [], []
    for name, budget in (("padded", None), (layout, None), (layout, 300)):
        cache = tmp_path / f"{name}{budget}"
        args = make_args(
            output_dir=str(tmp_path / f"run{name}{budget}"), batch_layout=name, max_tokens_per_batch=budget,
            reference="precomputed", reference_cache_dir=str(cache), max_steps=1, learning_rate=1e-5,
        )  # fmt: skip
        trainer = train(args, tokenizer, count=6)
        logs.append(trainer.train_dataset.numbers["ref_logps"].values)
        caches.append({path.name for path in cache.iterdir()})
    for scores in logs[1:]:
        torch.testing.assert_close(scores, logs[0], rtol=1e-6, atol=1e-5)
    assert not caches[0] & caches[1]  # rows round otherwise, so they are kept under another name


def test_a_layout_in_bfloat16(make_args: MakeArgs, tokenizer: Any, tmp_path: Any):
    for layout in LAYOUTS:
        args = make_args(output_dir=str(tmp_path / layout), batch_layout=layout, bf16=True, max_steps=2)
        train(args, tokenizer, count=8)
        first, *_ = read_metrics(args.output_dir)
        assert first["rewards/chosen"] == first["rewards/margins"] == 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointing_in_the_loop_changes_nothing(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Any, layout: str
):
    logs = []
    for changes in ({}, {"gradient_checkpointing": True}, REENTRANT):
        folder = str(tmp_path / str(len(logs)))
        args = make_args(
            output_dir=folder, batch_layout=layout, max_steps=3, max_tokens_per_batch=300, **changes
        )
        train(args, tokenizer, count=12)
        logs.append(read_metrics(folder))
    for other in logs[1:]:
        for entry, wanted in zip(other, logs[0], strict=True):
            assert entry == pytest.approx(wanted, rel=1e-5, abs=1e-5)
