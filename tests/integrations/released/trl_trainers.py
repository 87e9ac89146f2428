"""TRL's preference trainers of many releases: how each wants to be built, and what of a batch is labelled."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from tests.integrations.released.cases import PAIRS_PER_STEP, STEPS, Case
from tests.integrations.released.recorder import (
    Run,
    hooked_models,
    load_rows,
    make_tokenizer,
    recorded,
)

_NAMES = {
    kind: (f"{kind.upper()}Trainer", f"{kind.upper()}Config") for kind in ("dpo", "kto", "cpo", "orpo", "tpo")
}


def find(kind: str) -> tuple[Any, Any] | None:
    """Trainer and config where this release has them, its main package first."""
    for module in (f"trl.trainer.{kind}_trainer", f"trl.experimental.{kind}"):
        try:
            found = importlib.import_module(module)
            return tuple(getattr(found, name) for name in _NAMES[kind])  # type: ignore[return-value]
        except (ImportError, AttributeError):
            continue
    return None


def why_not(case: Case) -> str | None:
    """Why this release has no such case, or None."""
    kind, options = case.kind, case.options
    found = find(kind)
    if found is None:
        return "the release has no such trainer"
    names = {one.name for one in dataclasses.fields(found[1])}
    if options.keys() - names:
        return f"the release has no {sorted(options.keys() - names)}"
    if isinstance(options.get("loss_type"), list) and "loss_weights" not in names:
        return "the release takes one loss_type"
    if isinstance(options.get("loss_type"), list) and "sft" not in inspect.getsource(found[0]):
        return "the release has no loss_type 'sft'"
    return None


def run(case: Case, is_lazy: bool, into: Run) -> None:
    """Train `STEPS` steps in fp32 on real rows."""
    kind = case.kind
    rows = load_rows("unpaired_en.jsonl" if kind == "kto" else "preference_en.jsonl")
    tokenizer = make_tokenizer([value for row in rows for value in row.values() if isinstance(value, str)])
    if kind == "tpo":
        rows = [{**row, "reference": row["chosen"]} for row in rows]
    with hooked_models(case.hook if is_lazy else None) as models:
        _train(case, models, rows, tokenizer, into)


def _train(
    case: Case, models: tuple[Any, Any], rows: list[dict[str, Any]], tokenizer: Any, into: Run
) -> None:
    kind, options = case.kind, case.options
    trainer_class, config_class = find(kind)  # type: ignore[misc]
    policy, reference = models
    if options.get("use_weighting"):
        for model in (policy, reference):
            model.lm_head.weight.data.mul_(0.1)  # else the weights of random answers are 0
    for model in (policy, reference):
        if not hasattr(model, "warnings_issued"):
            model.warnings_issued = {}  # which TRL below 1 writes to, and transformers 5 no longer has
    with tempfile.TemporaryDirectory() as folder:
        wanted = {
            "output_dir": folder,
            "use_cpu": True,
            "bf16": False,
            "fp16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 2 * PAIRS_PER_STEP if kind == "kto" else PAIRS_PER_STEP,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "optim": "sgd",  # AdamW divides rounding where a gradient is next to nothing
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "max_length": 128,  # cuts nothing: what is labelled is counted in what a trainer has not cut yet
            "max_prompt_length": 64,
            "seed": 0,
            "remove_unused_columns": False,
            **options,
        }
        names = {one.name for one in dataclasses.fields(config_class)}
        config = config_class(**{name: value for name, value in wanted.items() if name in names})
        given = inspect.signature(trainer_class.__init__).parameters
        keywords: dict[str, Any] = {"args": config, "train_dataset": Dataset.from_list(rows)}
        keywords["processing_class" if "processing_class" in given else "tokenizer"] = tokenizer
        if case.is_lora:
            keywords["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        elif kind in ("dpo", "kto"):
            keywords["ref_model"] = reference
        trainer = trainer_class(policy, **keywords)
        own = trainer.compute_loss
        with recorded(into) as step:

            def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                labelled = count_labelled(inputs)
                found = own(model, inputs, *args, **kwargs)
                step(labelled, (found[0] if isinstance(found, tuple) else found).item())
                return found

            trainer.compute_loss = compute_loss
            torch.manual_seed(0)
            trainer.train()


def count_labelled(batch: dict[str, Any]) -> int:
    """Tokens of the answers that are trained."""

    def labels(name: str) -> int:
        return int((batch[name][:, 1:] != -100).sum())

    def mask(name: str) -> int:
        return int(batch[name].sum())

    counters: list[tuple[Callable[[str], int], tuple[str, ...]]] = [
        (labels, ("chosen_labels", "rejected_labels")),
        (labels, ("completion_labels",)),
        (mask, ("chosen_attention_mask", "rejected_attention_mask")),
        (mask, ("completion_mask",)),
    ]
    for count, names in counters:
        present = [name for name in names if isinstance(batch.get(name), Tensor)]
        if present:
            return sum(count(name) for name in present)
    raise ValueError(f"batch: got {sorted(batch)}, of which none is known to say what is labelled")
