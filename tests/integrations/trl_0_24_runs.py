"""Trainers of TRL 0.24 for its tests, and a run of each with the patch and without it.

LLaMA-Factory makes that release importable with transformers 5, whose test for packages returns another type:
it has to come first. Where the two are not installed, a test file that imports this one is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llamafactory.extras.packages", reason="needs TRL 0.24: make test-llama-factory")
pytest.importorskip("trl.trainer.cpo_trainer")  # not in the release of the other tests

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.cpo_trainer import CPOConfig, CPOTrainer
from trl.trainer.kto_trainer import KTOConfig, KTOTrainer
from trl.trainer.orpo_trainer import ORPOConfig, ORPOTrainer

from fastdpo import patch_trl, unpatch_trl
from tests.integrations import trl_runs as runs

STEPS = 30
# transformers 5.6 logs a loss to four places; the losses of all calls are compared in full.
ROUNDED = ("loss",)


def for_trl(model: Any) -> Any:
    """With the attribute that TRL 0.24 writes to, and transformers 5 no longer has."""
    model.warnings_issued = {}
    return model


def policy(family: str = "llama", **options: Any) -> Any:
    return for_trl(runs.policy(family, **options))


def reference(family: str = "llama") -> Any:
    return for_trl(runs.reference(family))


def make_dpo(folder: Path, *, family: str = "llama", model: Any = None, **changes: Any) -> DPOTrainer:
    keywords = {name: changes.pop(name) for name in ("eval_dataset", "peft_config") if name in changes}
    data = changes.pop("train_dataset", None) or runs.pairs()
    tokenizer = changes.pop("processing_class", None) or runs.make_tokenizer()
    model = model or policy(family)
    if changes.get("use_weighting"):
        model.lm_head.weight.data.mul_(0.1)  # else nothing is left of random answers
    return DPOTrainer(
        model,
        ref_model=None if "peft_config" in keywords else reference(family),
        args=DPOConfig(**runs.settings(folder, **changes)),
        train_dataset=data,
        processing_class=tokenizer,
        **keywords,
    )


def make_kto(folder: Path, **changes: Any) -> KTOTrainer:
    keywords = {name: changes.pop(name) for name in ("eval_dataset", "peft_config") if name in changes}
    family = changes.pop("family", "llama")
    model = changes.pop("model", None) or policy(family)
    return KTOTrainer(
        model,
        ref_model=None if "peft_config" in keywords else reference(family),
        args=KTOConfig(**runs.settings(folder, **{"max_length": 32, "max_prompt_length": 16, **changes})),
        train_dataset=changes.pop("train_dataset", None) or runs.unpaired(),
        processing_class=runs.make_tokenizer(),
        **keywords,
    )


def make_cpo_or_orpo(kind: str, folder: Path, **changes: Any) -> Any:
    trainer, config = {"cpo": (CPOTrainer, CPOConfig), "orpo": (ORPOTrainer, ORPOConfig)}[kind]
    keywords = {name: changes.pop(name) for name in ("eval_dataset",) if name in changes}
    family = changes.pop("family", "llama")
    options = {"max_length": 32, "max_prompt_length": 16, **changes}
    return trainer(
        model=policy(family, **({"output_router_logits": True} if family == "mixtral" else {})),
        args=config(**runs.settings(folder, **options)),
        train_dataset=runs.pairs(),
        processing_class=runs.make_tokenizer(),
        **keywords,
    )


def make_sft(folder: Path) -> SFTTrainer:
    return SFTTrainer(
        policy(),
        args=SFTConfig(**runs.settings(folder)),
        train_dataset=runs.completions(),
        processing_class=runs.make_tokenizer(),
    )


def compare(make: Callable[[], Any], *, but: tuple[str, ...] = ()) -> tuple[runs.Run, runs.Run]:
    ours, theirs = runs.side_by_side(make, patch_trl)
    gap, what = runs.largest_difference(ours, theirs, but=(*ROUNDED, *but))
    print(f"largest difference {gap:.1e} ({what})")
    runs.assert_alike(ours, theirs, but=(*ROUNDED, *but))
    return ours, theirs


@pytest.fixture
def unpatched() -> Iterator[None]:
    yield
    unpatch_trl()
