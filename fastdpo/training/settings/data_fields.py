"""Settings of the data: which columns, which rows, which tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastdpo.training.settings.choices import ROW_COLUMNS
from fastdpo.training.settings.row_checks import may_stay


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _column(what: str) -> Any:
    return field(default=None, metadata=_help(f"Column to read {what} from, in place of one of that name."))


@dataclass
class DataSettings:
    """What ``PreferenceConfig`` says of the data."""

    max_length: int | None = field(
        default=1024, metadata=_help("Longest prompt + answer, in tokens; 0 for no limit.")
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata=_help(
            "What happens to what is too long: keep_start cuts the answer's end, keep_end the prompt's "
            "start, skip leaves the row out."
        ),
    )
    on_bad_row: str = field(
        default="skip",
        metadata=_help(
            "Rows nothing can be learnt from (empty, identical, too long): skip and count, or error."
        ),
    )
    beta_column: str | None = field(default=None, metadata=_help("Column with a beta per pair."))
    margin_column: str | None = field(default=None, metadata=_help("Column with a margin per pair."))
    pair_weight_column: str | None = field(default=None, metadata=_help("Column with a weight per pair."))
    soft_label_column: str | None = field(
        default=None, metadata=_help("Column with the probability that chosen is the better answer.")
    )
    reward_gap_column: str | None = field(
        default=None, metadata=_help("Column with the chosen answer's reward less the rejected one's.")
    )
    chosen_win_rate_column: str | None = field(default=None, metadata=_help("Column with SPPO's win rate."))
    rejected_win_rate_column: str | None = field(default=None, metadata=_help("The same of the rejected."))
    chosen_is_reference_column: str | None = field(
        default=None,
        metadata=_help("Column with 1 where the reference gave the chosen answer, else 0 (XPO)."),
    )
    assistant_only: bool = field(
        default=True,
        metadata=_help(
            "Score only the assistant's turns of answers that are messages of several turns: those that the "
            "chat template marks as its generation, or what they add to the text before. False: all turns."
        ),
    )
    allow_bad_rows: list[str] | None = field(
        default=None,
        metadata=_help(f"Checks whose rows are trained on all the same: some of {', '.join(may_stay())}."),
    )
    max_bad_rows: float = field(
        default=0.1,
        metadata=_help("Share of the rows that may be left out before the run is refused; 1 for any."),
    )
    ignore_columns: list[str] | None = field(
        default=None, metadata=_help("Columns to read as if they were not there.")
    )
    image_folder: str | None = field(
        default=None,
        metadata=_help("Folder that paths of images are relative to. Default: that of the data file."),
    )
    image_conditional_pairs: bool = field(
        default=False,
        metadata=_help(
            "mDPO: a row with images_rejected makes two pairs: its own, with its images, and its chosen "
            "answer with them over the same answer with images_rejected."
        ),
    )
    images_column: str | None = _column("the images (one, or a list)")
    images_rejected_column: str | None = _column("the images that the rejected answer's prompt has")
    prompt_column: str | None = _column("the prompt")
    chosen_column: str | None = _column("the chosen answer")
    rejected_column: str | None = _column("the rejected answer")
    completion_column: str | None = _column("the completion")
    completions_column: str | None = _column("the completions")
    label_column: str | None = _column("the label")
    scores_column: str | None = _column("the scores")
    ranks_column: str | None = _column("the ranks")
    advantages_column: str | None = _column("the advantages")
    win_rate_column: str | None = _column("the win rate")

    @property
    def column_names(self) -> dict[str, str]:
        """Names of what a row holds -> the columns that the settings give them."""
        given = {name: getattr(self, f"{name}_column") for name in ROW_COLUMNS}
        return {name: column for name, column in given.items() if column is not None}
