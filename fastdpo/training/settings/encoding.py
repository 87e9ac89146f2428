"""How rows become tokens, as the settings say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EncodingOptions:
    """How rows become tokens.

    Args:
        max_length: the longest prompt + answer, in tokens (at least 2); None for no limit.
        truncation_mode: ``keep_start`` cuts the end of an answer that is too long (a prompt that
            alone fills ``max_length`` is a bad row); ``keep_end`` cuts the start of the prompt, by
            the same amount for both answers, and the end of an answer only when one token of prompt
            is left; ``skip`` treats any longer row as a bad row.
        on_bad_row: ``skip`` leaves rows nothing can be learnt from out, counted; ``error`` raises.
        columns: per-pair numbers to carry along: their name in the data set -> the row's column.
        assistant_only: of answers of several turns only the assistant's are scored.
        allow_bad_rows: names of checks that rows may fail and still be used.
        max_bad_rows: the largest share of rows left out; None for any.
        references: the columns of the reference's log-probabilities to read with each row, if any.
        processes: how many tokenise; None for as many as pay.
        show_progress: whether a bar shows how far they are.
        image_conditional_pairs: rows with ``images_rejected`` make a second pair, of two views.
        image_folder: what paths of images are relative to; None for the folder of their row's file.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    on_bad_row: str = "skip"
    columns: Mapping[str, str] = field(default_factory=dict)
    assistant_only: bool = True
    allow_bad_rows: Sequence[str] = ()
    max_bad_rows: float | None = None
    references: Sequence[str] = ()
    processes: int | None = 1
    show_progress: bool = False
    image_folder: str | None = None
    image_conditional_pairs: bool = False
