"""Runs of three steps of every kind of data, in every layout, with every reference: what they logged.

    python -m tests.training.loop.golden            # records golden.json anew, after a change that was meant
    python -m tests.training.loop.golden --check    # all of them; the tests hold some

A change of the loop that is not meant to change results is held to them (``test_golden.py``).
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig

from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import bpe_text, made_tokenizer, make_rows, sentence, tiny_llama
from tests.training.loop.kinds_data import rows_of

RECORD = Path(__file__).with_name("golden.json")
LAYOUTS = ("padded", "packed", "shared_prompt")


class Case(NamedTuple):
    """Rows, settings, and with which references beside a second model."""

    rows: Callable[[int], list[Any]]
    settings: dict[str, Any]
    references: tuple[str, ...] = ()


def _numbered(count: int) -> list[Any]:
    numbers = (
        {"m": 0.1 * (i % 3), "w": 1.0 + i % 2, "s": 0.7, "b": 0.1 + 0.05 * (i % 3)} for i in range(count)
    )
    return [{**row, **more} for row, more in zip(make_rows(count), numbers, strict=True)]


def _gold(count: int) -> list[Any]:
    return [
        {**row, "reference": " " + sentence(random.Random(i), 5)} for i, row in enumerate(make_rows(count))
    ]


def _turns(count: int) -> list[Any]:
    def talk(text: str) -> list[dict[str, str]]:
        said = (("assistant", text.strip()), ("user", "more please"), ("assistant", text.strip()[::-1]))
        return [{"role": role, "content": content} for role, content in said]

    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": talk(row["chosen"]),
            "rejected": talk(row["rejected"]),
        }
        for row in make_rows(count)
    ]


def _of(kind: str) -> Callable[[int], list[Any]]:
    return lambda count: rows_of(kind, count, characters=200)


_BOTH = ("precomputed", "adapter")
CASES = {
    "sigmoid": Case(make_rows, {}, _BOTH),
    "ipo": Case(make_rows, {"loss_type": "ipo"}),
    "simpo": Case(make_rows, {"loss_type": "simpo"}),
    "sft beside": Case(make_rows, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
    "orpo": Case(make_rows, {"loss_type": "orpo"}),
    "tpo": Case(_gold, {"loss_type": "tpo"}),
    "columns": Case(_numbered, {"margin_column": "m", "pair_weight_column": "w", "soft_label_column": "s"}),
    "beta column": Case(_numbered, {"beta_column": "b"}),
    "ld": Case(make_rows, {"ld_alpha": 0.3}, _BOTH),
    "wpo": Case(make_rows, {"use_weighting": True}),
    "dynamic beta": Case(make_rows, {"dynamic_beta": {}}),
    "turns": Case(_turns, {}, _BOTH),
    "aot": Case(make_rows, {"loss_type": "aot"}),
    "tdpo": Case(make_rows, {"loss_type": "tdpo2"}, ("adapter",)),
    "kto": Case(_of("unpaired"), {"loss_type": "kto"}, _BOTH),
    "kto of pairs": Case(make_rows, {"loss_type": "kto"}),
    "bco": Case(_of("unpaired"), {"loss_type": "bco"}),
    "lists": Case(_of("listwise"), {"loss_type": "sdpo"}, _BOTH),
    "ranking": Case(_of("ranking"), {"loss_type": "in_context_ranking"}, _BOTH),
    "steps": Case(_of("steps"), {"loss_type": "direct_advantage"}, _BOTH),
    "samples": Case(_of("samples"), {"loss_type": "nash_md"}, _BOTH),
    "distilled": Case(make_rows, {"loss_type": "gkd"}),
}


def runs() -> Iterator[tuple[str, str, str]]:
    """Case, layout and reference of each run."""
    for name, case in CASES.items():
        for layout in LAYOUTS:
            for reference in ("auto", *case.references):
                yield name, layout, reference


def logged(name: str, layout: str, reference: str, tokenizer: Any, **settings: Any) -> dict[str, list[float]]:
    """Losses and gradient norms of three steps of two micro-batches, then an evaluation and predictions."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        args = PreferenceConfig(
            output_dir=f"{folder}/run", use_cpu=True, per_device_train_batch_size=4, max_steps=3,
            gradient_accumulation_steps=2, learning_rate=1e-3, logging_steps=1, save_strategy="no",
            disable_tqdm=True, report_to="none", reference_cache_dir=f"{folder}/reference", max_length=400,
            batch_layout=layout, reference=reference, **case.settings, **settings,
        )  # fmt: skip
        models: dict[str, Any] = {}
        if reference == "adapter":
            adapter = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
            models["peft_config"] = LoraConfig(**adapter, init_lora_weights=False)
        elif args.needs_reference:
            models["ref_model"] = tiny_llama(2)
        if args.needs_teacher:
            models["teacher_model"] = tiny_llama(3)
        rows = case.rows(16)
        trainer = PreferenceTrainer(
            tiny_llama(1), args, train_dataset=rows, processing_class=tokenizer, **models
        )
        trainer.train()
        evaluated = trainer.evaluate(rows[:6])
        predicted = trainer.predict(rows[:4]).predictions
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "losses": [entry["loss"] for entry in steps],
        "gradient norms": [entry["grad_norm"] for entry in steps],
        "evaluation": [evaluated["eval_loss"]],
        "rewards": [x for x in predicted.ravel().tolist() if x == x],
    }


def main() -> None:
    """Write the record, or say how many runs are as it has them."""
    tokenizer = made_tokenizer(bpe_text())
    record = {"/".join(run): _rounded(logged(*run, tokenizer)) for run in runs()}
    if "--check" in sys.argv:
        known = json.loads(RECORD.read_text())
        others = [name for name, found in record.items() if found != known.get(name)]
        print(f"{len(record) - len(others)} of {len(record)} runs log the same", *others, sep="\n")
        return
    lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in record.items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _rounded(found: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [float(f"{value:.8g}") for value in values] for name, values in found.items()}


if __name__ == "__main__":
    main()
