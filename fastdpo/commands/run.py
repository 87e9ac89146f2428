"""What a run is made of: models, tokenizer and rows, from the arguments of a command."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdpo.training.data.dataset import RowDataset
    from fastdpo.training.data.source import RowSource, RowStream
    from fastdpo.training.data.stream import StreamDataset
    from fastdpo.training.settings.command_line import DataArguments, RunArguments
    from fastdpo.training.settings.config import PreferenceConfig


def load_run(arguments: RunArguments) -> dict[str, Any]:
    """What `PreferenceTrainer` takes."""
    from fastdpo.training.data.stream import has_images
    from fastdpo.training.loop.models import load_model, told_tokenizer
    from fastdpo.training.settings.parallel import check_same_settings, loading_of

    # What is cheap comes first: a wrong name or a broken row shows before gigabytes of weights are read.
    arguments.check_there()
    adapter = arguments.adapter.peft_config()
    tokenizer = told_tokenizer(arguments.model, or_processor=True)
    _, train_pairs, eval_pairs = load_pairs(
        arguments.data, tokenizer, arguments.config, reads_reference=arguments.model.ref_model is None
    )
    _ = arguments.config.device  # ranks know of each other before a model is split over them
    check_same_settings(arguments.config)
    loading = arguments.loading_options() | loading_of(arguments.config)
    loading["with_images"] = has_images(train_pairs, eval_pairs)
    # A revision is of the model that is trained.
    others = {name: value for name, value in loading.items() if name != "revision"}
    ref_name, teacher_name = arguments.model.ref_model, arguments.model.teacher_model
    return {
        "model": load_model(arguments.model.name, **loading),
        "args": arguments.config,
        "train_dataset": train_pairs,
        "eval_dataset": eval_pairs,
        "processing_class": tokenizer,
        "ref_model": load_model(ref_name, what="ref_model", **others) if ref_name else None,
        "teacher_model": load_model(teacher_name, what="teacher_model", **others) if teacher_name else None,
        "peft_config": adapter,
    }


def load_pairs(
    data: DataArguments, tokenizer: Any, config: PreferenceConfig, *, reads_reference: bool
) -> tuple[Any, Any, RowDataset | None]:
    """The rows of ``--dataset``, and the pairs to train, which may be a stream, and to evaluate on."""
    from fastdpo.training.data.dataset import split_rows
    from fastdpo.training.data.source import read_rows
    from fastdpo.training.data.stream import StreamDataset
    from fastdpo.training.loop.setup import tokenized_pairs
    from fastdpo.training.loop.stream import prepare_stream

    source: RowSource | RowStream
    pairs: RowDataset | StreamDataset
    if data.dataset_streaming:
        source = read_rows(
            data.dataset, split=data.dataset_split, weights=data.dataset_weights, streaming=True
        )
        pairs = prepare_stream(source, tokenizer, config, reads_reference=reads_reference)
    else:
        source = read_rows(data.dataset, split=data.dataset_split, weights=data.dataset_weights)
        pairs = tokenized_pairs(source, tokenizer, config, reads_reference=reads_reference)
    if data.eval_dataset is not None:
        eval_rows = read_rows(data.eval_dataset, split=data.eval_dataset_split or "test")
        if data.eval_dataset_split is not None and eval_rows.name == source.name:
            raise ValueError(
                f"eval_dataset_split: got {data.eval_dataset_split!r}, but the rows of {source.name} are "
                "trained on (a file has no splits): give --eval_dataset another, or --held_out"
            )
        held_out = tokenized_pairs(eval_rows, tokenizer, config, reads_reference=reads_reference)
        return source, pairs, held_out
    if data.held_out and not isinstance(pairs, StreamDataset):
        return source, *split_rows(pairs, data.held_out, seed=config.data_seed or config.seed)
    return source, pairs, None


def write_scored(path: Path, source: RowSource, scored: Sequence[RowDataset]) -> int:
    """Write the rows that were scored, in their order, each with its log-probabilities and no others."""
    from fastdpo.rounds.partial import write_rows
    from fastdpo.training.data.references import scores_by_row
    from fastdpo.training.data.row import WRITTEN_COLUMNS

    scores: dict[int, dict[str, Any]] = {}
    for dataset in scored:
        for place, values in scores_by_row(dataset):
            # Of a pair taken apart: one after the other.
            known = scores.get(place, {})
            scores[place] = {
                name: known[name] + value if name in known else value for name, value in values.items()
            }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(
        path,
        (
            {**{n: value for n, value in row.items() if n not in WRITTEN_COLUMNS}, **scores[number]}
            for number, row in source
            if number in scores
        ),
    )
    return len(scores)


def set_up_logging(process_index: int, *, level: int = logging.INFO) -> None:
    """Our own lines on standard error; other libraries have handlers of their own."""
    log = logging.getLogger("fastdpo")
    for handler in [handler for handler in log.handlers if handler.name == "fastdpo"]:
        log.removeHandler(handler)
    handler = logging.StreamHandler()
    handler.name = "fastdpo"
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(level if process_index == 0 else logging.ERROR)
