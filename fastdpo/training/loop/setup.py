"""The rows of a run: read, tokenised, and held to what its losses and settings ask; and one process a GPU."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from fastdpo.losses.ranges import FINITE, PROBABILITY, check_range
from fastdpo.losses.registry import RANGES
from fastdpo.training.data.columns import select_columns, survey
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.encode import RowEncoder
from fastdpo.training.data.formats import Wanted
from fastdpo.training.data.ragged import Ragged
from fastdpo.training.data.references import reference_columns
from fastdpo.training.data.row import REFERENCE
from fastdpo.training.data.row_numbers import row_list, row_name
from fastdpo.training.data.scores import ScoreRules
from fastdpo.training.data.source import RowSource, read_rows
from fastdpo.training.data.stream import has_images
from fastdpo.training.reference.sources import check_weighted_reference
from fastdpo.training.settings.config import COLUMN_FIELDS, PreferenceConfig
from fastdpo.training.settings.kinds import list_size
from fastdpo.training.settings.nll import check_gold, gold_column
from fastdpo.training.settings.row_checks import CHECKS

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
    encoder, source = row_encoder(source, tokenizer, args, reads_reference)
    dataset = encoder.whole(source)
    report = dataset.report
    logger.log(logging.INFO if report.is_clean else logging.WARNING, "%s", report)
    return dataset


def row_encoder(
    source: RowSource, tokenizer: Any, args: PreferenceConfig, reads_reference: bool
) -> tuple[RowEncoder, RowSource]:
    """What tokenises rows as the settings say, and the rows with the columns that they name."""
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
    return RowEncoder(source.name, tokenizer, options, wanted, found), source


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
    check_part(dataset, args)
    wanted = wanted_data(args)
    if dataset.kind.is_paired:
        check_gold(args, has_gold=dataset.has_gold)
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


def check_part(dataset: RowDataset, args: PreferenceConfig) -> None:
    """``check_pairs`` of what each row has by itself, as of a part of a stream's rows."""
    wanted = wanted_data(args)
    if dataset.kind != wanted.kind:
        names = ", ".join(args.loss_type)
        raise ValueError(f"dataset: got tokenised {dataset.kind}, wanted {wanted.kind} for {names}")
    _check_numbers(dataset, args, wanted)
    if dataset.kind.is_paired:
        _check_empty_parts(dataset)
        check_weighted_reference(dataset, args)
    if wanted.scores is not None and "scores" in dataset.numbers:
        _check_scores(dataset, wanted.scores)


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


def find_unused_weights(args: PreferenceConfig, data: Any) -> None:
    """Where rows have images, DDP looks for weights that a batch of text alone leaves without a gradient."""
    if has_images(data) and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = True


def check_machine(args: PreferenceConfig) -> None:
    """Raise ValueError for several GPUs in one process."""
    if args.n_gpu > 1:
        raise ValueError(
            f"got {args.n_gpu} GPUs in one process, wanted one: start with `accelerate launch` or "
            f"`torchrun --nproc_per_node {args.n_gpu}`, or set CUDA_VISIBLE_DEVICES"
        )
