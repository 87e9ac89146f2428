"""Whether a run that is resumed is the one that its checkpoint is of: the same losses, data and adapter.

With others, what a checkpoint has (the place in the data, running means, the optimiser) is another run's.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME

from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.ragged import Ragged
from fastdpo.training.data.row import WRITTEN_COLUMNS
from fastdpo.training.data.stream import known_rows
from fastdpo.training.loop.checkpoint_files import RUN_FILE, check_checkpoint, layout_of, read_state
from fastdpo.training.loop.engines import engine_of, is_split_as_loaded
from fastdpo.training.loop.run_record import settings_of
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.steps import COLUMN_FIELDS

# What is minimised. Everything else may change between two parts of a run, and is said.
_LOSS = (
    "loss_type",
    "loss_weights",
    "beta",
    "loss_options",
    "ld_alpha",
    "use_weighting",
    "wpo_max_weight",
    "nll_on_prompt",
    "gold_column",
    "dynamic_beta",
    "gather_batch_losses",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    *COLUMN_FIELDS.values(),
)
_ADAPTER = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "use_rslora", "use_dora")
# How many steps there are, and of which rows: free for another part of a run, not for another rank.
_STEPS = ("max_steps", "num_train_epochs", "data_seed")
# Of the machine, or of how long the run is: the steps that are done stay what they were.
_FREE = (
    *_STEPS,
    "use_cpu",
    "disable_tqdm",
    "report_to",
    "run_name",
    "dataset_num_proc",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
)
# In the place of an engine's name: transformers' tensor parallelism, whose optimiser is kept by names.
TENSORS = "tensor parallelism"
logger = logging.getLogger(__name__)


def description(trainer: Any) -> dict[str, Any]:
    """What a checkpoint is of."""
    return {**_description(trainer), "ranks": ranks_of(trainer)}


def ranks_of(trainer: Any) -> dict[str, Any]:
    """Over what a run is spread, and of how many rows a step is; rows are None where tokens decide."""
    args, ranks = trainer.args, trainer.accelerator.num_processes
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.ranks.count
    engine = TENSORS if is_split_as_loaded(trainer.accelerator) else engine_of(trainer.accelerator)
    is_by_rows = args.max_tokens_per_batch is None and args.train_sampling_strategy in (
        "random",
        "sequential",
    )
    return {"engine": engine, "ranks": ranks, "rows": rows if is_by_rows else None}


def check_same_ranks(trainer: Any) -> None:
    """Hold the ranks to each other before the first step: one run has one loss, adapter, data and settings.

    Raises:
        ValueError: on every rank, where one differs from the first; names the rank and what differs.
    """
    if trainer.accelerator.num_processes == 1 or trainer.train_dataset is None:
        return
    steps = {name: getattr(trainer.args, name) for name in _STEPS}
    own = json.loads(json.dumps({**_description(trainer), "steps": steps}, default=str))
    told: list[Any] = [None] * trainer.accelerator.num_processes
    torch.distributed.all_gather_object(told, own)
    for rank, other in enumerate(told):
        for part, theirs in other.items():
            if theirs != told[0][part]:
                raise ValueError(
                    f"{part}: rank {rank} has others than rank 0: "
                    f"{_differences(told[0][part], theirs)}; wanted the same on every rank"
                )


def check_same_run(trainer: Any, folder: Path) -> None:
    """Hold a checkpoint to the run that goes on from it; say which other settings differ.

    Raises:
        ValueError: it is of other losses, data or adapters, says which, then and now; or it is at the end.
    """
    then = check_checkpoint(folder)
    _check_unfinished(trainer.args, folder)
    if layout_of(folder) == "whole" and not (folder / OPTIMIZER_NAME).is_file():
        logger.warning("%s has no %s: the optimiser and its schedule start anew", folder, OPTIMIZER_NAME)
    if then is None:
        logger.warning(
            "%s is missing: whether losses and data are those of the checkpoint is not known",
            folder / RUN_FILE,
        )
        return
    now = json.loads(json.dumps(_description(trainer), default=str))
    for part, what in (("loss", "another loss"), ("adapter", "another adapter"), ("data", "other data")):
        if then.get(part) != now[part]:
            differences = _differences(then.get(part), now[part])
            if part == "data":
                kinds = [" of a stream" * bool(run["data"].get("is_stream")) for run in (then, now)]
                is_text = then["data"].get("hash") != now["data"].get("hash")
                others = "or other tokens" if is_text else "with other labels, scores or other numbers"
                differences = f"{then['data'].get('rows')} rows{kinds[0]} -> "
                differences += f"{now['data'].get('rows')}{kinds[1]}, {others}"
            raise ValueError(
                f"resume_from_checkpoint: {folder} is of {what}: {differences}; wanted the same, or a new "
                "run from its weights, with the checkpoint's folder as the model"
            )
    if now["data"].get("is_stream"):
        logger.info(
            "resuming on a stream, which is read again up to where the run was: its first %d rows are those "
            "of the checkpoint, and the others are taken on trust",
            now["data"]["rows"],
        )
    ranks = ranks_of(trainer)
    engines = (then.get("ranks") or ranks)["engine"], ranks["engine"]
    if TENSORS in engines and engines[0] != engines[1]:
        raise ValueError(
            f"resume_from_checkpoint: {folder} is of {engines[0] or 'whole models'}, this run of "
            f"{engines[1] or 'whole models'}; wanted the same tp_size, or a new run from its weights, with "
            "the checkpoint's folder as the model"
        )
    _tell_of_ranks(then.get("ranks"), ranks, folder)
    changed = _differences(then.get("settings"), now["settings"])
    if changed:
        logger.warning("resuming with other settings than the checkpoint's: %s", changed)


def _tell_of_ranks(then: Any, now: dict[str, Any], folder: Path) -> None:
    """Say what another number of ranks, or another batch, does to the order of the data."""
    if then is None or then == now:
        return
    if then["ranks"] != now["ranks"]:
        logger.warning(
            "resuming on %d ranks a checkpoint of %d: what is drawn at random (dropout) is drawn anew",
            now["ranks"],
            then["ranks"],
        )
    step = read_state(folder).get("global_step", 0)
    if then["rows"] is not None and then["rows"] == now["rows"]:
        logger.info("steps are of the same %d rows as before: the data go on where they were", now["rows"])
    elif then["rows"] is not None and now["rows"] is not None:
        logger.warning(
            "a step was of %d rows and is of %d: the data go on behind %d steps of those, at row %d of what "
            "was read in %d, so some rows of this epoch come twice, or not at all",
            then["rows"], now["rows"], step, step * now["rows"], step * then["rows"],
        )  # fmt: skip
    else:
        logger.warning(
            "batches depend on the number of ranks here (max_tokens_per_batch, group_by_length), so some "
            "rows of this epoch come twice, or not at all"
        )


def _check_unfinished(args: PreferenceConfig, folder: Path) -> None:
    """Raise ValueError where there is nothing left to train: transformers would make one more step."""
    state = read_state(folder)
    step, epoch = state.get("global_step", 0), state.get("epoch") or 0.0
    is_over, limit = epoch >= args.num_train_epochs, f"num_train_epochs is {args.num_train_epochs:g}"
    if args.max_steps > 0:
        is_over, limit = step >= args.max_steps, f"max_steps is {args.max_steps}"
    if is_over:
        where = f"{folder} is at step {step}, epoch {epoch:.2f}"
        raise ValueError(f"resume_from_checkpoint: {where}, and {limit}: nothing is left to train")


def _description(trainer: Any) -> dict[str, Any]:
    args = trainer.args
    settings = {name: value for name, value in settings_of(args).items() if name not in (*_LOSS, *_FREE)}
    return {
        "loss": {name: getattr(args, name) for name in _LOSS},
        "data": _data(trainer),
        "adapter": _adapters(getattr(trainer.model, "peft_config", {})),
        "settings": {**settings, "reference": _reference(trainer)},
    }


def _data(trainer: Any) -> dict[str, Any]:
    """How many rows, and hashes: of tokens (texts, template, tokenizer, ``max_length``), and of numbers.

    Of a stream those that it begins with, which are all that can be held to each other.
    """
    dataset = known_rows(trainer.train_dataset)
    if dataset is None:
        return {}
    # Once a run: of many rows it takes a while.
    if trainer.data_hash is None:
        trainer.data_hash = dataset.fingerprint()
    found = {"rows": len(dataset), "hash": trainer.data_hash, "numbers": _numbers_hash(dataset)}
    return found if dataset is trainer.train_dataset else {**found, "is_stream": True}


def _numbers_hash(dataset: RowDataset) -> str:
    """Of labels, scores, margins and the like; the reference's may be made anew, in other bits."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(set(dataset.numbers) - set(WRITTEN_COLUMNS)):
        found: Tensor | Ragged = dataset.numbers[name]
        values = found.values if isinstance(found, Ragged) else found
        digest.update(name.encode() + values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _reference(trainer: Any) -> str:
    model = trainer.reference.model if trainer.has_ref_model else None
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return f"{trainer.reference.kind} of {name}" if name else str(trainer.reference.kind)


def _adapters(configs: Any) -> dict[str, Any]:
    """Of each adapter what decides on what its weights mean."""
    found = {}
    for adapter, config in configs.items():
        for name in _ADAPTER:
            value = getattr(config, name, None)
            found[f"{adapter}.{name}"] = sorted(value) if isinstance(value, (set, list)) else value
    return found


def _differences(then: Any, now: Any) -> str:
    """``name: then -> now`` of each that differs."""
    then, now = then or {}, now or {}
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return ", ".join(f"{name} {then.get(name)!r} -> {now.get(name)!r}" for name in names)
