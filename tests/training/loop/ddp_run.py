"""One rank of a two-process run on the CPU; writes what it saw to the folder it is given."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import TrainerCallback

from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.ragged import Ragged
from fastdpo.training.data.report import DataReport
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.reference import scoring
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.kinds import KINDS
from tests.training.conftest import tiny_llama

# Before, transformers looked for the optimiser's state on a device "cpu:0", which torch does not know.
CPU_RANKS_CAN_RESUME = Version(transformers.__version__) >= Version("5.23")


class KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if not self.gradients:
            self.gradients = {
                name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
            }


def pairs(count: int, seed: int, *, is_even: bool = False, has_gold: bool = False) -> RowDataset:
    """Random pairs of unlike length, or of one."""
    torch.manual_seed(seed)
    parts = 4 if has_gold else 3
    sizes = torch.full((count, parts), 6) if is_even else torch.randint(1, 9, (count, parts))
    ends = sizes.flatten().cumsum(0).view(-1, parts)
    bounds = torch.column_stack([torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1, -1]]), ends])
    tokens = torch.randint(3, 300, (int(ends[-1, -1]),), dtype=torch.int32)
    rows, report = torch.arange(1, count + 1), DataReport("random", count, count)
    return RowDataset.of_pairs(tokens, bounds, rows, {}, report)


def run(folder: Path, *, per_device: int, accumulate: int) -> None:
    kept = KeepGradients()
    args = PreferenceConfig(
        output_dir=str(folder / "run"),
        use_cpu=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        loss_type=["sigmoid", "sft"],
        reference="precomputed",
        reference_cache_dir=str(folder / "reference"),
        longest_batch_first=True,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulate,
        per_device_eval_batch_size=per_device,
        train_sampling_strategy="sequential",
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
    )
    # Another model as the reference: rewards around 0 would make the accuracy a matter of rounding.
    trainer = PreferenceTrainer(
        tiny_llama(1),
        args,
        train_dataset=pairs(16, 0),
        eval_dataset=pairs(7, 1),
        ref_model=tiny_llama(2),
        callbacks=[kept],
    )
    trainer.train()
    torch.save(kept.gradients, folder / f"gradients{trainer.accelerator.process_index}.pt")


# Layout, pairs, tokens in a batch: on two ranks three batches each; two each, of which one has no pair.
BUDGETS = {
    "packed": ("packed", 16, 52),
    "shared_prompt": ("shared_prompt", 16, 52),
    "filler": ("packed", 3, 24),
    "orpo": ("shared_prompt", 16, 52),
    "orpo-filler": ("packed", 3, 24),
    "tpo": ("packed", 16, 90),
    "weights": ("packed", 16, 52),
    "carried": ("packed", 16, 52),
}
# What is not as it is in the others.
BUDGET_SETTINGS: dict[str, dict[str, Any]] = {
    "orpo": {"loss_type": "orpo", "reference": "none"},
    "orpo-filler": {"loss_type": "orpo", "reference": "none"},
    "tpo": {"loss_type": "tpo", "reference": "none"},
    "weights": {"ld_alpha": 0.3, "use_weighting": True, "nll_on_prompt": True},
    "carried": {"context_chunk": 5},
}


def run_budget(folder: Path, name: str) -> None:
    """One optimiser step over all pairs, in batches of so many tokens; a process alone takes one batch.

    Of the 7 pairs to evaluate, the ranks' last round repeats one; of 2 one rank has none.
    """
    layout, count, tokens = BUDGETS[name]
    is_alone = "WORLD_SIZE" not in os.environ
    kept = KeepGradients()
    settings = {"loss_type": ["sigmoid", "sft"], "reference": "copy", **BUDGET_SETTINGS.get(name, {})}
    if is_alone:
        settings.pop("context_chunk", None)
    args = PreferenceConfig(
        output_dir=str(folder / name),
        use_cpu=True,
        ddp_backend=None if is_alone else "gloo",
        batch_layout="padded" if is_alone else layout,
        max_tokens_per_batch=None if is_alone else tokens,
        per_device_train_batch_size=count,
        gradient_accumulation_steps=1 if is_alone else 3,
        per_device_eval_batch_size=7 if is_alone else 2,
        eval_strategy="steps",
        eval_steps=1,
        longest_batch_first=not is_alone,
        max_steps=1,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    has_gold = name == "tpo"
    trainer = PreferenceTrainer(
        tiny_llama(1),
        args,
        train_dataset=pairs(count, 0, has_gold=has_gold),
        eval_dataset=pairs(2 if name == "filler" else 7, 1, has_gold=has_gold),
        ref_model=tiny_llama(2) if args.needs_reference else None,
        callbacks=[kept],
    )
    if not is_alone:
        has_filler = name.endswith("filler")
        sampler = trainer.get_train_dataloader().batch_sampler.batch_sampler
        assert len(sampler) == (4 if has_filler else 6), len(sampler)
        assert any(not batch for batch in sampler) == has_filler
    trainer.train()
    torch.save(kept.gradients, folder / f"{name}{trainer.accelerator.process_index}.pt")


def answers(kind: str, count: int, seed: int) -> RowDataset:
    """Random rows of unlike length: of single answers, or lists of two to four."""
    torch.manual_seed(seed)
    sizes = torch.randint(2, 5, (count,)) if kind == "listwise" else torch.ones(count, dtype=torch.int64)
    prompts, lengths = torch.randint(1, 9, (count,)), torch.randint(1, 9, (int(sizes.sum()),))
    of_rows = Ragged.of_counts(lengths, sizes)
    ends = (prompts + of_rows.sums()).cumsum(0)
    numbers: dict[str, Any] = {}
    if kind == "unpaired":
        numbers = {"is_desirable": (torch.arange(count) % 3 > 0).float()}
    if kind == "listwise":
        numbers = {"scores": Ragged.of_counts(torch.randn(int(sizes.sum())), sizes)}
    return RowDataset(
        KINDS[kind],
        torch.randint(3, 300, (int(ends[-1]),), dtype=torch.int32),
        torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]]),
        prompts,
        of_rows,
        torch.arange(1, count + 1),
        numbers,
        DataReport("random", count, count),
        has_mismatched=kind == "unpaired",
    )


# Loss, data, how many micro-batches a rank's step is, further settings. AOT compares what is there at once;
# two models rank pairs of unlike length alike, by length, and then a part is matched as the whole is.
STATES: dict[str, tuple[str, str | None, int, dict[str, Any]]] = {
    "kto": ("kto", "unpaired", 2, {}),
    "bco": ("bco", "unpaired", 2, {}),
    "lists": ("sdpo", "listwise", 2, {}),
    "tdpo": ("tdpo2", None, 2, {}),
    "distilled": ("aligndistil", "prompt-completion", 2, {}),
    "beta": ("sigmoid", None, 2, {"dynamic_beta": {"rho": 0.3}}),
    "beta at once": ("sigmoid", None, 1, {"dynamic_beta": {"rho": 0.3}}),
    "aot": ("aot", "even", 1, {"gather_batch_losses": True}),
    "aot unpaired": ("aot_unpaired", "even", 1, {"gather_batch_losses": True}),
}


def run_state(folder: Path, name: str) -> None:
    """Two steps of eight rows each: on two ranks, or in a process alone all at once."""
    loss_type, kind, accumulate, changes = STATES[name]
    is_alone = "WORLD_SIZE" not in os.environ
    kept = KeepGradients()
    args = PreferenceConfig(
        output_dir=str(folder / name),
        use_cpu=True,
        ddp_backend=None if is_alone else "gloo",
        loss_type=loss_type,
        reference="copy",
        per_device_train_batch_size=8 if is_alone else 4 // accumulate,
        gradient_accumulation_steps=1 if is_alone else accumulate,
        per_device_eval_batch_size=7 if is_alone else 2,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
        max_grad_norm=0.0,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **changes,
    )
    data: list[Any]
    if kind in (None, "even"):
        data = [pairs(*size, is_even=kind == "even") for size in ((16, 0), (7, 1))]
    else:
        data = [_without_mismatched(answers(kind, *size), loss_type) for size in ((16, 0), (7, 1))]
    trainer = PreferenceTrainer(
        tiny_llama(1),
        args,
        train_dataset=data[0],
        eval_dataset=data[1],
        ref_model=tiny_llama(2),
        teacher_model=tiny_llama(3) if args.needs_teacher else None,
        callbacks=[kept],
    )
    trainer.train()
    torch.save(kept.gradients, folder / f"{name}{trainer.accelerator.process_index}.pt")


def _without_mismatched(data: RowDataset, loss_type: str) -> RowDataset:
    data.has_mismatched = loss_type == "kto"
    return data


def resume_scoring(folder: Path) -> None:
    """A scoring that breaks off on both ranks, and another run that goes on with it; then the whole alone."""
    score, left = scoring.batch_scores, 2
    counts: list[int] = []

    def counted(*args: Any) -> torch.Tensor:
        nonlocal left
        if left == 0:
            raise InterruptedError
        left, counts[-1] = left - 1, counts[-1] + 1
        return score(*args)

    scoring.batch_scores = counted
    data = pairs(24, 0)
    for name, allowed in (("cache", 2), ("cache", 99), ("whole", 99)):
        left = allowed
        counts.append(0)
        args = PreferenceConfig(
            output_dir=str(folder / "unused"),
            use_cpu=True,
            ddp_backend="gloo",
            reference="precomputed",
            reference_cache_dir=str(folder / "scoring" / name),
            per_device_eval_batch_size=4,
            disable_tqdm=True,
        )
        trainer = PreferenceTrainer(tiny_llama(1), args)
        try:
            scored = trainer._precomputed.add_to(data)
        except InterruptedError:
            trainer.accelerator.wait_for_everyone()
            continue
        rank = trainer.accelerator.process_index
        torch.save(
            (scored.numbers["ref_logps"].values, list(counts)), folder / "scoring" / f"{name}{rank}.pt"
        )
    scoring.batch_scores = score


class StopAfterSaving(TrainerCallback):
    def on_save(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = True


def interrupt_and_resume(folder: Path, prefix: str, **changes: Any) -> None:
    """The same run whole, and stopped and resumed in its second epoch, with dropout."""

    def make_trainer(name: str, *callbacks: TrainerCallback) -> PreferenceTrainer:
        args = PreferenceConfig(
            output_dir=str(folder / name),
            use_cpu=True,
            ddp_backend="gloo",
            per_device_train_batch_size=2,
            **changes,
            max_steps=8,
            learning_rate=1e-3,
            logging_steps=2,
            save_strategy="steps",
            save_steps=5,
            disable_dropout=False,
            disable_tqdm=True,
        )
        model = tiny_llama(1, attention_dropout=0.2)
        return PreferenceTrainer(model, args, train_dataset=pairs(16, 0), callbacks=list(callbacks))

    make_trainer(f"{prefix}whole").train()
    make_trainer(f"{prefix}parts", StopAfterSaving()).train()
    make_trainer(f"{prefix}parts").train(resume_from_checkpoint=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # each trainer ends with a collection, which needs not look at what was imported
    run(Path(sys.argv[1]), per_device=2, accumulate=2)
    resume_scoring(Path(sys.argv[1]))
    for case in BUDGETS:
        run_budget(Path(sys.argv[1]), case)
    for case in STATES:
        run_state(Path(sys.argv[1]), case)
    if CPU_RANKS_CAN_RESUME:
        interrupt_and_resume(Path(sys.argv[1]), "", train_sampling_strategy="group_by_length")
        interrupt_and_resume(Path(sys.argv[1]), "packed_", batch_layout="packed", max_tokens_per_batch=36)
