"""One rank of a two-process run on the CPU; writes what it saw to the folder it is given."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import TrainerCallback

from fastdpo.training.config import PreferenceConfig
from fastdpo.training.data import DataReport, PreferenceDataset
from fastdpo.training.trainer import PreferenceTrainer
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


def pairs(count: int, seed: int) -> PreferenceDataset:
    """Random pairs of unlike length."""
    torch.manual_seed(seed)
    sizes = torch.randint(1, 9, (count, 3))
    ends = sizes.flatten().cumsum(0).view(-1, 3)
    bounds = torch.column_stack([torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1, 2]]), ends])
    tokens = torch.randint(3, 300, (int(ends[-1, 2]),), dtype=torch.int32)
    return PreferenceDataset(
        tokens, bounds, torch.arange(1, count + 1), {}, DataReport("random", count, count)
    )


def run(folder: Path, *, per_device: int, accumulate: int) -> None:
    kept = KeepGradients()
    args = PreferenceConfig(
        output_dir=str(folder / "run"),
        use_cpu=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        loss_type=["sigmoid", "sft"],
        reference="precomputed",
        reference_cache_dir=str(folder / "reference"),
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
    "shared_prompt": ("shared_prompt", 16, 40),
    "filler": ("packed", 3, 24),
}


def run_budget(folder: Path, name: str) -> None:
    """One optimiser step over all pairs, in batches of so many tokens; a process alone takes one batch.

    Of the 7 pairs to evaluate, the ranks' last round repeats one.
    """
    layout, count, tokens = BUDGETS[name]
    is_alone = "WORLD_SIZE" not in os.environ
    kept = KeepGradients()
    args = PreferenceConfig(
        output_dir=str(folder / name),
        use_cpu=True,
        ddp_backend=None if is_alone else "gloo",
        loss_type=["sigmoid", "sft"],
        reference="copy",
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
    )
    trainer = PreferenceTrainer(
        tiny_llama(1),
        args,
        train_dataset=pairs(count, 0),
        eval_dataset=pairs(7, 1),
        ref_model=tiny_llama(2),
        callbacks=[kept],
    )
    if not is_alone:
        sampler = trainer.get_train_dataloader().batch_sampler.batch_sampler
        assert len(sampler) == (4 if name == "filler" else 6), len(sampler)
        assert any(not batch for batch in sampler) == (name == "filler")
    trainer.train()
    torch.save(kept.gradients, folder / f"{name}{trainer.accelerator.process_index}.pt")


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
    run(Path(sys.argv[1]), per_device=2, accumulate=2)
    for case in BUDGETS:
        run_budget(Path(sys.argv[1]), case)
    if CPU_RANKS_CAN_RESUME:
        interrupt_and_resume(Path(sys.argv[1]), "", train_sampling_strategy="group_by_length")
        interrupt_and_resume(Path(sys.argv[1]), "packed_", batch_layout="packed", max_tokens_per_batch=36)
