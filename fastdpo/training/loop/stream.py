"""A run on a stream: what its first rows settle, and what is refused of it."""

from __future__ import annotations

import logging
from typing import Any

from fastdpo.training.data.columns import ColumnSelection
from fastdpo.training.data.rows import RowStream
from fastdpo.training.data.source import read_rows
from fastdpo.training.data.stream import StreamDataset, head_of
from fastdpo.training.loop.setup import check_part, row_encoder
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.stream import check_stream_settings

logger = logging.getLogger(__name__)


def prepare_stream(
    data: Any, tokenizer: Any, args: PreferenceConfig, *, reads_reference: bool = True
) -> StreamDataset:
    """Rows that are tokenised while they are trained on, from a stream; logs what became of the first ones.

    Raises:
        ValueError: settings that a stream cannot honour, or a head that rows at hand would be refused for.
    """
    check_stream_settings(args)
    if tokenizer is None:
        raise ValueError("processing_class: got None, wanted the model's tokenizer")
    stream: RowStream = read_rows(data, streaming=True)
    raw = head_of(stream)
    encoder, source = row_encoder(raw, tokenizer, args, reads_reference)
    if encoder.wanted.has_mismatched and encoder.options.references:
        raise ValueError(
            f"{stream.name}: reference log-probabilities of mismatched answers are of other rows, which a "
            "stream does not have at hand: wanted reference 'copy' or 'adapter', or rows that are no stream"
        )
    selection = ColumnSelection(args.column_names, args.ignore_columns or ())
    head = encoder.whole(source)
    dataset = StreamDataset(
        stream, head, encoder, selection, lambda part: check_part(part, args), num_head=len(raw)
    )
    level = logging.INFO if head.report.is_clean else logging.WARNING
    logger.log(level, "a stream, of which the first %d rows: %s", len(raw), head.report)
    return dataset


def check_stream_reference(data: Any, kind: str) -> None:
    """Raise ValueError for a stream whose reference would have to be scored before the first step."""
    if isinstance(data, StreamDataset) and kind == "precomputed" and not data.has_reference:
        raise ValueError(
            "reference: got 'precomputed' with a stream whose rows have no log-probabilities of the "
            "reference (fastdpo score writes them): wanted 'copy' (a second model) or 'adapter' (the model "
            "without its adapter), which score each batch when it comes"
        )


def report_stream(data: Any) -> None:
    """At the end of a run: log what was left out, where the stream had not come to its end before."""
    if isinstance(data, StreamDataset) and data.num_rows is None:
        has_found = getattr(data.report, "num_skipped", 0) > 0
        logger.log(logging.WARNING if has_found else logging.INFO, "read so far: %s", data.report)
