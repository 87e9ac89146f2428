"""What a trainer needs before its first step: a model, tokenised pairs, an output directory."""

from __future__ import annotations

import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from fastdpo.integrations.auto_class import auto_class, read_config
from fastdpo.integrations.virtual_tokens import has_prefix
from fastdpo.training.answer_encode import AnswerOptions, encode_answers
from fastdpo.training.answer_reference import reference_columns
from fastdpo.training.answers import REFERENCE, AnswerDataset
from fastdpo.training.callbacks import CURVES_FILE, METRICS_FILE
from fastdpo.training.checkpointing import recomputes_activations
from fastdpo.training.config import COLUMN_FIELDS, PreferenceConfig
from fastdpo.training.data import (
    LD_COLUMN,
    REF_COLUMNS,
    PreferenceDataset,
    RowSource,
    read_rows,
    row_list,
)
from fastdpo.training.dataset import RowDataset
from fastdpo.training.encode import encode_rows
from fastdpo.training.kinds import list_size
from fastdpo.training.nll_settings import check_gold, gold_column
from fastdpo.training.reference import check_weighted_reference, disable_dropout, is_adapter_model

logger = logging.getLogger(__name__)


def load_model(name: str, *, dtype: str | torch.dtype = "auto", **options: Any) -> nn.Module:
    """A causal LM by path or hub id; ``dtype`` "auto" keeps the checkpoint's.

    Raises:
        ValueError: there is no such model, or it cannot be loaded; names it.
    """
    try:
        loader = auto_class(read_config(name, **options))
        model: nn.Module = loader.from_pretrained(name, dtype=dtype, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model: could not load {name!r}{_where(name)}: {first_line(error)}") from error
    return model


def load_tokenizer(name: str, **options: Any) -> Any:
    """A tokenizer by path or hub id. Raises ValueError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer: could not load {name!r}{_where(name)}: {first_line(error)}") from error


def _where(name: str) -> str:
    return "" if Path(name).exists() else ", which is no folder here, from the hub"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages that have to fit on one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def prepare_policy(model: str | nn.Module, args: PreferenceConfig, peft_config: Any | None) -> nn.Module:
    """The model to train: loaded, with its adapter and without dropout.

    Raises:
        ValueError: a model this version cannot train; says which and why.
        ImportError: ``peft_config`` without peft.
    """
    # Weights that are trained are loaded as float32: 16 bits lose small updates.
    dtype = "float32" if peft_config is None else "auto"
    policy = load_model(model, dtype=dtype) if isinstance(model, str) else model
    if args.disable_dropout:
        # Before the adapter is added: a dropout in peft_config is asked for.
        disable_dropout(policy)
    if peft_config is not None:
        policy = _add_adapter(policy, peft_config)
    if is_adapter_model(policy):
        if has_prefix(policy) and recomputes_activations(args):
            raise ValueError(
                "gradient_checkpointing: got True with prefix tuning, whose prefix is in a cache that layers "
                "have to do without where they run again; wanted False, or prompt tuning or P-tuning"
            )
    elif next(policy.parameters()).dtype in (torch.float16, torch.bfloat16):
        logger.warning(
            "the model's weights are %s: at the learning rates of preference training most updates are lost "
            "in rounding; load them as float32 (bf16=True still computes in bfloat16) or train an adapter",
            next(policy.parameters()).dtype,
        )
    if getattr(getattr(policy, "config", None), "output_router_logits", False):
        raise ValueError("model: a router loss (output_router_logits=True) is not supported by this version")
    return policy


def _add_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    if is_adapter_model(model):
        raise ValueError("peft_config: the model has an adapter already; give one or the other")
    try:
        from peft import get_peft_model
    except ImportError:
        raise ImportError(
            "training an adapter needs peft, which is not installed: pip install peft"
        ) from None
    adapted: nn.Module = get_peft_model(model, peft_config)
    return adapted


def prepare_pairs(data: Any, tokenizer: Any, args: PreferenceConfig) -> RowDataset | None:
    """Tokenised pairs (or rows of the losses' kind) from whatever ``read_rows`` reads, or as they come."""
    if data is None or isinstance(data, PreferenceDataset | AnswerDataset):
        return data
    if tokenizer is None:
        raise ValueError("processing_class: got None, wanted the model's tokenizer")
    return tokenized_pairs(read_rows(data), tokenizer, args)


def tokenized_pairs(source: RowSource, tokenizer: Any, args: PreferenceConfig) -> RowDataset:
    """Tokenise rows as the settings say, and log what became of them."""
    dataset = _encode(source, tokenizer, args)
    report = dataset.report
    is_clean = not (report.skipped or report.merged or report.duplicates)
    logger.log(logging.INFO if is_clean else logging.WARNING, "%s", report)
    return dataset


def _encode(source: RowSource, tokenizer: Any, args: PreferenceConfig) -> RowDataset:
    options = args.encoding_options()

    def has(names: tuple[str, ...]) -> bool:
        """Whether the reference is to be read, and is there; losses with divergences have no use for it."""
        reads = args.needs_reference and not args.needs_divergences
        is_wanted = reads and args.reference in ("auto", "precomputed")
        return is_wanted and len(source) > 0 and all(name in source.rows[0] for name in names)

    if args.data_kind is not None:
        wanted = answer_options(args)
        names = reference_columns(has_mismatched=wanted.has_mismatched)
        return encode_answers(source, tokenizer, options, replace(wanted, has_reference=has(names)))
    columns = dict(options.columns)
    if has(REF_COLUMNS):
        names = (*REF_COLUMNS, *(LD_COLUMN for row in source.rows[:1] if LD_COLUMN in row))
        columns |= {name: name for name in names}
    options = replace(options, columns=columns, gold_column=gold_column(args, source.rows))
    return encode_rows(source, tokenizer, options)


def answer_options(args: PreferenceConfig) -> AnswerOptions:
    """What the losses of a run ask of data that are no pairs."""
    needs = {name for spec in args.losses for name in spec.needs}
    assert args.data_kind is not None
    return AnswerOptions(
        args.data_kind, list_size(args.losses), has_scores="scores" in needs, has_mismatched="kl" in needs
    )


def check_pairs(dataset: RowDataset, args: PreferenceConfig) -> None:
    """Name pairs with nothing to learn from, which only tokenised data can hold.

    Raises:
        ValueError: the data are of another kind than the losses', or do not carry every number that these and
            the settings need.
    """
    wanted = args.data_kind
    kind = dataset.kind if isinstance(dataset, AnswerDataset) else None
    if kind != wanted:
        names = ["pairs" if item is None else f"{item.name} data" for item in (kind, wanted)]
        raise ValueError(
            f"dataset: got tokenised {names[0]}, wanted {names[1]} for {', '.join(args.loss_type)}"
        )
    if isinstance(dataset, AnswerDataset):
        _check_answers(dataset, args)
        return
    check_gold(args, has_gold=dataset.has_gold)
    prompt, chosen, rejected = dataset.bounds.diff(dim=1).unbind(1)[:3]
    for part, is_empty in (("prompt", prompt == 0), ("answer", (chosen == 0) | (rejected == 0))):
        if is_empty.any():
            effect = "its first token is not scored" if part == "prompt" else "it has log-probability 0"
            rows = row_list(dataset.rows[is_empty].tolist())
            logger.warning("%s: an empty %s, so %s", rows, part, effect)
    for name, column in COLUMN_FIELDS.items():
        if getattr(args, column) and name not in dataset.columns:
            raise ValueError(
                f"{column}: the tokenised pairs carry {sorted(dataset.columns)}, wanted {name!r} too"
            )
    check_weighted_reference(dataset, args)


def _check_answers(dataset: AnswerDataset, args: PreferenceConfig) -> None:
    options = answer_options(args)
    names = {"unpaired": ("is_desirable",), "steps": ("advantages",), "samples": ("win_rates",)}
    needed = [*names.get(options.kind.name, ("scores",) if options.has_scores else ())]
    needed += ["pair_weights"] if args.pair_weight_column else []
    for name in needed:
        if name not in dataset.numbers:
            raise ValueError(
                f"dataset: the tokenised rows carry {sorted(dataset.numbers)}, wanted {name!r} too"
            )
    if "scores" in dataset.numbers and not options.has_scores:
        raise ValueError(
            f"dataset: the tokenised rows carry scores, which {', '.join(args.loss_type)} does not use"
        )
    is_part = REFERENCE in dataset.numbers and not dataset.has_reference
    if is_part and dataset.has_mismatched and args.reference == "auto":
        raise ValueError(
            "dataset: got rows with reference log-probabilities, but not of the answers that their prompts "
            "are mismatched with, which are others in a part of a data set (held_out); wanted both: score "
            "each part by itself, or say which reference ('copy', 'adapter' or 'precomputed')"
        )
    if dataset.has_mismatched != options.has_mismatched:
        got, wanted = ("with", "without") if dataset.has_mismatched else ("without", "with")
        raise ValueError(f"dataset: got rows {got} mismatched answers, wanted them {wanted}")


def check_machine(args: PreferenceConfig, *, is_sharded: bool) -> None:
    """Raise ValueError for a way to use several GPUs that this version does not support."""
    if is_sharded:
        raise ValueError("FSDP and DeepSpeed are not supported by this version: use one process a GPU (DDP)")
    if args.n_gpu > 1:
        raise ValueError(
            f"got {args.n_gpu} GPUs in one process, wanted one: start with `accelerate launch` or "
            f"`torchrun --nproc_per_node {args.n_gpu}`, or set CUDA_VISIBLE_DEVICES"
        )


def find_checkpoint(args: PreferenceConfig, resume: str | bool | None) -> str | None:
    """The checkpoint to resume from: a path, the last one in the output directory for True, or None.

    Raises:
        ValueError: True, and there is none.
    """
    if resume is None or str(resume).lower() == "false":
        return None
    if str(resume).lower() != "true":
        return str(resume)
    last = None if is_unused(args.output_dir) else get_last_checkpoint(args.output_dir)
    if last is None:
        raise ValueError(f"resume_from_checkpoint: there is no checkpoint in {args.output_dir}")
    return str(last)


def is_unused(output_dir: str | None) -> bool:
    """Whether a directory does not exist or is empty."""
    path = Path(output_dir or ".")
    return not path.is_dir() or not any(path.iterdir())


def check_output_dir(args: PreferenceConfig) -> None:
    """Make sure that a fresh run can be written, and mixes with no other. Nothing is made.

    Raises:
        ValueError: it is no directory, or one that cannot be written; or it has content, and the run neither
            resumes nor overwrites.
    """
    path = Path(args.output_dir or ".").absolute()
    standing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not standing.is_dir():
        raise ValueError(f"output_dir: got {args.output_dir}, wanted a directory: {standing} is a file")
    if not os.access(standing, os.W_OK):
        raise ValueError(
            f"output_dir: got {args.output_dir}, wanted one to write to: {standing} is read-only"
        )
    if not (is_unused(args.output_dir) or args.overwrite_output_dir or args.resume_from_checkpoint):
        raise ValueError(
            f"output_dir: {args.output_dir} is in use: choose another, continue that run with "
            "resume_from_checkpoint=True, or replace it with overwrite_output_dir=True"
        )


def clear_output_dir(args: PreferenceConfig) -> None:
    """Remove the checkpoints and metrics that another run left."""
    path = Path(args.output_dir or ".")
    for entry in path.iterdir() if path.exists() else ():
        if entry.is_dir() and re.fullmatch(r"checkpoint-\d+", entry.name):
            shutil.rmtree(entry)
        elif entry.name in (METRICS_FILE, CURVES_FILE):
            entry.unlink()
