"""What a trainer needs before its first step: tokenised pairs, one process a GPU, an output directory."""

from __future__ import annotations

import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME

from fastdpo.losses.ranges import FINITE, PROBABILITY, check_range
from fastdpo.losses.registry import RANGES
from fastdpo.training.data.columns import select_columns, survey
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.formats import Wanted
from fastdpo.training.data.ragged import Ragged
from fastdpo.training.data.references import reference_columns
from fastdpo.training.data.row import REFERENCE
from fastdpo.training.data.row_numbers import row_list, row_name
from fastdpo.training.data.scores import ScoreRules
from fastdpo.training.data.source import RowSource, read_rows
from fastdpo.training.loop.callbacks import METRICS_FILE
from fastdpo.training.loop.curves import CURVES_FILE
from fastdpo.training.reference.sources import check_weighted_reference
from fastdpo.training.settings.config import COLUMN_FIELDS, PreferenceConfig
from fastdpo.training.settings.kinds import list_size
from fastdpo.training.settings.nll import check_gold, gold_column
from fastdpo.training.settings.row_checks import CHECKS

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
logger = logging.getLogger(__name__)


def prepare_pairs(
    data: Any, tokenizer: Any, args: PreferenceConfig, *, reads_reference: bool = True
) -> RowDataset | None:
    """Tokenised pairs (or rows of the losses' kind) from whatever ``read_rows`` reads, or as they come."""
    if data is None or isinstance(data, RowDataset):
        return data
    if tokenizer is None:
        raise ValueError("processing_class: got None, wanted the model's tokenizer")
    return tokenized_pairs(read_rows(data), tokenizer, args, reads_reference=reads_reference)


def tokenized_pairs(
    source: RowSource, tokenizer: Any, args: PreferenceConfig, *, reads_reference: bool = True
) -> RowDataset:
    """Tokenise rows as the settings say, and log what became of them.

    Args:
        reads_reference: the reference's log-probabilities are taken from the rows, where they have some and
            the settings let them; not where a model is given for it.
    """
    dataset = _encode(source, tokenizer, args, reads_reference)
    report = dataset.report
    logger.log(logging.INFO if report.is_clean else logging.WARNING, "%s", report)
    return dataset


def _encode(source: RowSource, tokenizer: Any, args: PreferenceConfig, reads_reference: bool) -> RowDataset:
    source = select_columns(source, args.column_names, args.ignore_columns or ())
    found = survey(source)
    wanted = replace(wanted_data(args), gold_column=gold_column(args, found.filled))
    options = args.encoding_options()
    # Losses with divergences have no use for log-probabilities.
    reads = reads_reference and args.needs_reference and not args.needs_divergences
    if reads and args.reference in ("auto", "precomputed"):
        columns = reference_columns(
            found.filled,
            is_pairs=wanted.kind.is_paired,
            has_mismatched=wanted.has_mismatched,
            is_trusted=args.reference == "precomputed",
            source=source.name,
        )
        options = replace(options, references=columns)
    return encode_rows(source, tokenizer, options, wanted, found)


def wanted_data(args: PreferenceConfig) -> Wanted:
    """What the losses of a run ask of their data, but for the gold answers, which rows may have or not."""
    needs = {name for spec in args.losses for name in spec.needs}
    return Wanted(
        args.data_kind,
        list_size=list_size(args.losses),
        scores=ScoreRules.of(args.losses),
        has_mismatched="kl" in needs,
    )


def check_pairs(dataset: RowDataset, args: PreferenceConfig) -> None:
    """Name pairs with nothing to learn from, which only tokenised data can hold.

    Raises:
        ValueError: the data are of another kind than the losses', or do not carry every number that these and
            the settings need.
    """
    wanted = wanted_data(args)
    if dataset.kind != wanted.kind:
        names = ", ".join(args.loss_type)
        raise ValueError(f"dataset: got tokenised {dataset.kind}, wanted {wanted.kind} for {names}")
    _check_numbers(dataset, args, wanted)
    if dataset.kind.is_paired:
        _check_empty_parts(dataset)
        check_gold(args, has_gold=dataset.has_gold)
        check_weighted_reference(dataset, args)
    if wanted.scores is not None and "scores" in dataset.numbers:
        _check_scores(dataset, wanted.scores)
    is_part = REFERENCE in dataset.numbers and not dataset.has_reference
    if is_part and dataset.has_mismatched and args.reference == "auto":
        raise ValueError(
            "dataset: got rows with reference log-probabilities, but not of the answers that their prompts "
            "are mismatched with, which are others in a part of a data set (held_out); wanted both: score "
            "each part by itself, or say which reference ('copy', 'adapter' or 'precomputed')"
        )
    if dataset.has_mismatched != wanted.has_mismatched:
        got, meant = ("with", "without") if dataset.has_mismatched else ("without", "with")
        raise ValueError(f"dataset: got rows {got} mismatched answers, wanted them {meant}")


def _check_numbers(dataset: RowDataset, args: PreferenceConfig, wanted: Wanted) -> None:
    """Raise ValueError unless rows carry all numbers that losses and settings use, in range, and no scores
    that nothing uses."""
    names = {"unpaired": ("is_desirable",), "steps": ("advantages",), "samples": ("win_rates",)}
    is_list = wanted.kind.name in ("listwise", "ranking")
    needed = {name: "" for name in names.get(wanted.kind.name, ())}
    needed |= {"scores": ""} if is_list and wanted.scores is not None else {}
    needed |= {
        name: f"{getattr(args, field)}: " for name, field in COLUMN_FIELDS.items() if getattr(args, field)
    }
    for name, setting in needed.items():
        if name not in dataset.numbers:
            raise ValueError(
                f"{setting or 'dataset: '}the tokenised {dataset.kind.unit} carry {sorted(dataset.numbers)}, "
                f"wanted {name!r} too"
            )
    if "scores" in dataset.numbers and wanted.scores is None:
        raise ValueError(
            f"dataset: the tokenised rows carry scores, which {', '.join(args.loss_type)} does not use"
        )
    legal = {"win_rates": PROBABILITY, "advantages": FINITE, "scores": FINITE, **RANGES}
    for name, values in dataset.numbers.items():
        if name in legal:
            check_range(
                f"dataset: {name}", values.values if isinstance(values, Ragged) else values, legal[name]
            )


def _check_empty_parts(dataset: RowDataset) -> None:
    """Name pairs with nothing to learn from."""
    shortest = torch.stack([dataset.answers.values[dataset.answers.offsets[:-1] + i] for i in (0, 1)]).amin(0)
    for part, is_empty in (("prompt", dataset.prompt_lengths == 0), ("answer", shortest == 0)):
        if is_empty.any():
            effect = "its first token is not scored" if part == "prompt" else "it has log-probability 0"
            rows = row_list(dataset.rows[is_empty].tolist())
            logger.warning("%s: an empty %s, so %s", rows, part, effect)


def _check_scores(dataset: RowDataset, rules: ScoreRules) -> None:
    """Raise ValueError for tokenised rows with scores that losses would misread, or learn nothing from."""
    scores = dataset.numbers["scores"]
    if rules == ScoreRules() or not isinstance(scores, Ragged):
        return
    flat = []
    for index, row in enumerate(dataset.rows.tolist()):
        rules.check(scores[index].tolist(), "scores", f"dataset, row {row_name(row)}")
        if rules.are_flat(scores[index].tolist()):
            flat.append(row)
    if flat:
        raise ValueError(
            f"dataset: got {CHECKS['one_level'].message} in {row_list(flat)}, wanted such rows left out"
        )


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
        ValueError: there is none, or none that was written to its end.
    """
    if resume is None or str(resume).lower() == "false":
        return None
    if str(resume).lower() != "true":
        folder = Path(str(resume)).expanduser()
        inside = _checkpoints(folder)
        if inside:
            raise ValueError(
                f"resume_from_checkpoint: got {resume}, wanted a checkpoint in it, as {inside[0]}"
            )
        if not _is_whole(folder):
            what = f"which has no {TRAINER_STATE_NAME}" if folder.is_dir() else "and there is no such folder"
            raise ValueError(f"resume_from_checkpoint: got {resume}, {what}, wanted a checkpoint's folder")
        return str(folder)
    found = _checkpoints(Path(args.output_dir or "."))
    whole = [folder for folder in found if _is_whole(folder)]
    if not whole:
        raise ValueError(f"resume_from_checkpoint: there is no checkpoint in {args.output_dir}")
    return str(whole[0])


def warn_of_unfinished(args: PreferenceConfig, checkpoint: Path) -> None:
    """Log which checkpoint behind the one that a run goes on from was not written to its end."""
    later = [folder for folder in _checkpoints(Path(args.output_dir or ".")) if not _is_whole(folder)]
    if later and checkpoint.parent == later[0].parent:
        logger.warning("%s was not written to its end", later[0])


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in an output directory, the last one first."""
    entries = [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    steps = {entry: match for entry in entries if (match := _CHECKPOINT.fullmatch(entry.name)) is not None}
    return sorted(steps, key=lambda entry: -int(steps[entry][1]))


def _is_whole(checkpoint: Path) -> bool:
    return (checkpoint / TRAINER_STATE_NAME).is_file()  # what transformers writes at the end


def is_unused(output_dir: str | None) -> bool:
    """Whether a directory does not exist or is empty."""
    path = Path(output_dir or ".")
    return not path.is_dir() or not any(path.iterdir())


def check_output_dir(args: PreferenceConfig) -> None:
    """Make sure that a run can be written, and mixes with no other, or goes on. Nothing is made.

    Raises:
        ValueError: it is no directory, or one that cannot be written; or it has content, and the run neither
            resumes nor overwrites; or there is no checkpoint to go on from.
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
    find_checkpoint(args, args.resume_from_checkpoint)


def clear_output_dir(args: PreferenceConfig) -> None:
    """Remove the checkpoints and metrics that another run left."""
    path = Path(args.output_dir or ".")
    for entry in path.iterdir() if path.exists() else ():
        if entry.is_dir() and _CHECKPOINT.fullmatch(entry.name):
            shutil.rmtree(entry)
        elif entry.name in (METRICS_FILE, CURVES_FILE):
            entry.unlink()
