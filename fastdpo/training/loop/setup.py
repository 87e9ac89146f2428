"""What a trainer needs before its first step: tokenised pairs, one process a GPU, an output directory."""

from __future__ import annotations

import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from fastdpo.losses.ranges import FINITE, PROBABILITY, check_range
from fastdpo.losses.registry import RANGES
from fastdpo.training.data.answer_encode import AnswerOptions, encode_answers
from fastdpo.training.data.answers import AnswerDataset, Ragged
from fastdpo.training.data.columns import select_columns, survey
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.pairs import PreferenceDataset
from fastdpo.training.data.references import REFERENCE, reference_columns
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
    if data is None or isinstance(data, PreferenceDataset | AnswerDataset):
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
    wanted = None if args.data_kind is None else answer_options(args)
    options = args.encoding_options()
    # Losses with divergences have no use for log-probabilities.
    reads = reads_reference and args.needs_reference and not args.needs_divergences
    if reads and args.reference in ("auto", "precomputed"):
        columns = reference_columns(
            found.filled,
            is_pairs=wanted is None,
            has_mismatched=wanted is not None and wanted.has_mismatched,
            is_trusted=args.reference == "precomputed",
            source=source.name,
        )
        options = replace(options, references=columns)
    if wanted is not None:
        return encode_answers(source, tokenizer, options, wanted, found)
    options = replace(options, gold_column=gold_column(args, found.filled))
    return encode_rows(source, tokenizer, options, found)


def answer_options(args: PreferenceConfig) -> AnswerOptions:
    """What the losses of a run ask of data that are no pairs."""
    needs = {name for spec in args.losses for name in spec.needs}
    assert args.data_kind is not None
    return AnswerOptions(
        args.data_kind, list_size(args.losses), ScoreRules.of(args.losses), has_mismatched="kl" in needs
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
        if name in dataset.columns:
            check_range(f"dataset: {name}", dataset.columns[name], RANGES[name])
    check_weighted_reference(dataset, args)


def _check_answers(dataset: AnswerDataset, args: PreferenceConfig) -> None:
    options = answer_options(args)
    names = {"unpaired": ("is_desirable",), "steps": ("advantages",), "samples": ("win_rates",)}
    needed = [*names.get(options.kind.name, ("scores",) if options.scores is not None else ())]
    needed += ["pair_weights"] if args.pair_weight_column else []
    for name in needed:
        if name not in dataset.numbers:
            raise ValueError(
                f"dataset: the tokenised rows carry {sorted(dataset.numbers)}, wanted {name!r} too"
            )
    if "scores" in dataset.numbers and options.scores is None:
        raise ValueError(
            f"dataset: the tokenised rows carry scores, which {', '.join(args.loss_type)} does not use"
        )
    legal = {"win_rates": PROBABILITY, "advantages": FINITE, "scores": FINITE, **RANGES}
    for name, values in dataset.numbers.items():
        if name in legal:
            numbers = values.values if isinstance(values, Ragged) else values
            check_range(f"dataset: {name}", numbers, legal[name])
    if options.scores is not None:
        _check_scores(dataset, options.scores)
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


def _check_scores(dataset: AnswerDataset, rules: ScoreRules) -> None:
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
