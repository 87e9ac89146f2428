"""Tiny runs of TRL's trainers on a CPU, recorded, so that two of them can be held side by side."""

from __future__ import annotations

import functools
import inspect
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from accelerate.utils import imports as accelerate_imports
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

from tests.integrations.tiny import VOCAB, make_model

NUM_ROWS = 8


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token: ``w7`` is token 7."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """The most frequent words of real text; all others are one token."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    trainer = trainers.WordLevelTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(f"w{rng.randrange(3, VOCAB)}" for _ in range(rng.randint(low, high)))


def pairs(count: int = NUM_ROWS, seed: int = 0, *, with_reference: bool = False) -> Dataset:
    rng = random.Random(seed)
    names = ["prompt", "chosen", "rejected"] + ["reference"] * with_reference
    rows = [
        {name: words(rng, *((2, 6) if name == "prompt" else (1, 9))) for name in names} for _ in range(count)
    ]
    # A leading space where the answer goes on, as data has it.
    return Dataset.from_list([{n: v if n == "prompt" else f" {v}" for n, v in row.items()} for row in rows])


def unpaired(count: int = NUM_ROWS) -> Dataset:
    rows = pairs(count)
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completion": row["chosen" if i % 2 else "rejected"],
                "label": bool(i % 2),
            }
            for i, row in enumerate(rows)
        ]
    )


def prompts(count: int = NUM_ROWS) -> Dataset:
    return pairs(count).select_columns(["prompt"])


def completions(count: int = NUM_ROWS) -> Dataset:
    return Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs(count)])


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments for fp32 on a CPU, and an epoch of `NUM_ROWS`: the second step sees what the first did.

    SGD: AdamW would divide rounding where a gradient is zero by itself.
    """
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }


class Run(NamedTuple):
    """What a run leaves: the loss of every call, the first step's gradients, and all that was logged."""

    losses: list[float]
    grads: dict[str, Tensor]
    logs: list[dict[str, float]]


class _FirstGrads(TrainerCallback):
    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.grads:
            named = model.named_parameters()
            self.grads = {name: p.grad.clone() for name, p in named if p.grad is not None}


def record(trainer: Any) -> Run:
    losses: list[float] = []
    compute_loss = trainer.compute_loss

    def recorded(*args: Any, **kwargs: Any) -> Any:
        found = compute_loss(*args, **kwargs)
        losses.append((found[0] if isinstance(found, tuple) else found).item())
        return found

    trainer.compute_loss = recorded
    first = _FirstGrads()
    trainer.add_callback(first)
    torch.manual_seed(0)
    # accelerate reads whether peft is installed from the disk several times a step.
    looked_up = functools.cache(accelerate_imports._is_package_available)
    with mock.patch.object(accelerate_imports, "_is_package_available", looked_up):
        trainer.train()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    return Run(losses, first.grads, trainer.state.log_history)


_CLOCK = ("runtime", "per_second", "step_time", "total_flos", "time")

# Log-probabilities of fp32 operands of this width are within 1e-5 nats of fp64, TRL's have the same rounding,
# and the losses here have slopes of about 1 in a token's mean log-probability: 1e-5 relative to what is
# compared, or absolute below 1. Sums over an answer's tokens (10 at most) are as large as their number.
METRIC_TOLERANCE = 1e-5


def assert_alike(ours: Run, theirs: Run, *, but: tuple[str, ...] = ()) -> None:
    """The same losses, gradients and metrics up to fp32 rounding, but for the metrics named."""
    assert len(ours.losses) == len(theirs.losses) > 0
    for step, (mine, other) in enumerate(zip(ours.losses, theirs.losses, strict=True)):
        assert_number(mine, other, f"loss of call {step}")
    assert ours.grads.keys() == theirs.grads.keys()
    assert theirs.grads and any(grad.abs().max() > 1e-4 for grad in theirs.grads.values())
    for name, grad in theirs.grads.items():
        assert_gradient(ours.grads[name], grad, name)
    assert len(ours.logs) == len(theirs.logs)
    for mine, other in zip(ours.logs, theirs.logs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            if not name.endswith(_CLOCK) and name.removeprefix("eval_") not in but:
                assert_number(mine[name], value, name)


def largest_difference(ours: Run, theirs: Run, *, but: tuple[str, ...] = ()) -> tuple[float, str]:
    """Of all losses and logged metrics, in the measure of `assert_number`; and what it is of."""
    found = [(_gap(a, b), "loss") for a, b in zip(ours.losses, theirs.losses, strict=True)]
    for mine, other in zip(ours.logs, theirs.logs, strict=True):
        found += [
            (_gap(mine[name], value), name)
            for name, value in other.items()
            if not name.endswith(_CLOCK) and name.removeprefix("eval_") not in but
        ]
    return max(found)


def _gap(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(1.0, abs(theirs))


def assert_number(ours: float, theirs: float, name: str) -> None:
    assert _gap(ours, theirs) <= METRIC_TOLERANCE, (name, ours, theirs)


def assert_gradient(ours: Tensor, theirs: Tensor, name: str) -> None:
    """By `assert_close_to_fp64`'s floor for fp32, 2^-13 of the norm, once for each side."""
    error = (ours.double() - theirs.double()).norm()
    assert error <= 2 * 2**-13 * theirs.double().norm() + 1e-9, (name, error, theirs.norm())


def loss_types(method: Callable[..., Any]) -> set[str]:
    """The names that a method of TRL's knows, from its source."""
    return set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(method)))


def policy(family: str = "llama", **options: Any) -> Any:
    return make_model(family, **options).train()


def reference(family: str = "llama", **options: Any) -> Any:
    """Another model: a reference equal to the policy makes every log-ratio 0, and much go unseen."""
    return make_model(family, seed=1, **options)


def side_by_side(make_trainer: Callable[[], Any], patch: Callable[[], Any]) -> tuple[Run, Run]:
    """The same run with the patch and without it."""
    theirs = record(make_trainer())
    with patch():
        ours = record(make_trainer())
    return ours, theirs
