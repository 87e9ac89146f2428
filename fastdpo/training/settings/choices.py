"""The words that settings are chosen from, and the names of what a row holds."""

from fastdpo.types import MODES

BAD_ROW_POLICIES = ("skip", "error")
TRUNCATION_MODES = ("keep_start", "keep_end", "skip")
ARRANGEMENTS = ("separate", "bucketed", "one_row")
# Padding is for sequences, not for trees of them.
ARRANGEMENTS_OF = {"packed": ARRANGEMENTS, "shared_prompt": ("separate", "one_row")}
# Texts and judgements of a row, each read from another column where the settings name one (`prompt_column`).
ROW_COLUMNS = (
    "prompt", "chosen", "rejected", "completion", "completions", "label", "scores", "ranks", "advantages",
    "win_rate", "images", "images_rejected",
)  # fmt: skip
# "score" has no backward pass. `pairs` is what `auto` takes wherever a loss and a trained head let it; the
# reference and some losses (of ranks, with a beta of the step) want log-probabilities, which it has none of.
TRAINING_MODES = tuple(mode for mode in MODES if mode not in ("score", "pairs"))
