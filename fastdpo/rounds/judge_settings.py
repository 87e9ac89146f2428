"""Settings of ``fastdpo judge``: who judges, and what is made of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from fastdpo.rounds.settings import (
    SOURCES,
    FileArguments,
    check_at_least,
    check_one_of,
    help_text,
    parse_settings,
)
from fastdpo.training.settings.words import ArgumentError

FORMATS = ("pairs", "lists", "samples")
PAIRS = ("best_worst", "best_random", "all")
COMPARISONS = ("all", "tournament")
JUDGES = ("reward_model", "function", "pairwise", "judge_model")
_OF_JUDGE_MODEL = (
    "judge_prompt",
    "judge_pattern",
    "judge_samples",
    "judge_temperature",
    "judge_top_p",
    "judge_max_new_tokens",
)
DEFAULT_JUDGE_PATTERN = r"[Ss]core:\s*([0-9]+(?:\.[0-9]+)?)"


@dataclass
class JudgeArguments(FileArguments):
    """Who judges, and what is made of it."""

    reward_model: str | None = field(
        default=None,
        metadata=help_text(
            "Judge: path or hub id of a sequence classifier with one label, read with its own tokenizer."
        ),
    )
    function: str | None = field(
        default=None,
        metadata=help_text(
            "Judge: module:function or FILE.py:function, which gets prompts and completions (and columns "
            "that it names) and returns a number for each."
        ),
    )
    pairwise: str | None = field(
        default=None,
        metadata=help_text(
            "Judge: a function, named likewise, of prompts, first and second, which returns for each the "
            "probability that the first is better, or whether it is."
        ),
    )
    judge_model: str | None = field(
        default=None,
        metadata=help_text(
            "Judge: path or hub id of a causal model that writes its score after judge_prompt."
        ),
    )
    reward_dtype: str = field(
        default="auto", metadata=help_text("Dtype of the judge's weights; auto: the checkpoint's.")
    )
    trust_remote_code: bool = field(default=False, metadata=help_text("Run code that comes with the judge."))
    reward_max_length: int | None = field(
        default=None,
        metadata=help_text(
            "Longest prompt with answer that the reward model reads, in its tokens. Default: its own limit."
        ),
    )
    judge_batch_size: int = field(default=16, metadata=help_text("Answers judged at once."))
    judge_prompt: str | None = field(
        default=None,
        metadata=help_text("Of judge_model: a text file with {prompt} and {completion} where they go."),
    )
    judge_pattern: str = field(
        default=DEFAULT_JUDGE_PATTERN,
        metadata=help_text("Of judge_model: the pattern whose first group, in its last match, is the score."),
    )
    judge_samples: int = field(
        default=1, metadata=help_text("Of judge_model: judgements an answer, averaged.")
    )
    judge_temperature: float = field(default=0.0, metadata=help_text("Of judge_model."))
    judge_top_p: float = field(default=1.0, metadata=help_text("Of judge_model."))
    judge_max_new_tokens: int = field(default=512, metadata=help_text("Of judge_model: longest judgement."))
    comparisons: str = field(
        default="all",
        metadata=help_text(
            "Of pairwise: all pairs of a list, or a knock-out tournament, of fewer comparisons."
        ),
    )
    both_orders: bool = field(
        default=False,
        metadata=help_text("Of pairwise: ask in both orders and take the mean, against a bias of place."),
    )
    format: str = field(
        default="pairs",
        metadata=help_text(
            "What is written: pairs, lists (with scores), or samples (each answer with a win rate)."
        ),
    )
    pairs: str = field(
        default="best_worst",
        metadata=help_text("Which pairs: best_worst, best_random (of the others that are worse), or all."),
    )
    min_margin: float = field(
        default=0.0,
        metadata=help_text("Least difference of the scores of a pair; equal scores make no pair."),
    )
    max_pairs: int | None = field(
        default=None, metadata=help_text("Of all pairs of a prompt, draw so many. Default: all.")
    )
    win_rate_against: str = field(
        default="others",
        metadata=help_text(
            "Win rates against: others (of the list), all (itself too, as 1/2: SPPO), or the samples of one "
            "source: policy, reference, mixture (Nash-MD)."
        ),
    )
    drop_unfinished: bool = field(
        default=False, metadata=help_text("Leave answers out that max_new_tokens cut off.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        judges = [name for name in JUDGES if getattr(self, name)]
        if len(judges) != 1:
            got = " and ".join(judges) or "none"
            raise ArgumentError(f"judge: got {got}, wanted one of {', '.join(JUDGES)}")
        self._check_unused(judges[0])
        check_one_of("format", self.format, FORMATS)
        check_one_of("pairs", self.pairs, PAIRS)
        check_one_of("comparisons", self.comparisons, COMPARISONS)
        check_one_of("win_rate_against", self.win_rate_against, ("others", "all", *SOURCES))
        check_at_least(
            self,
            1,
            "judge_batch_size",
            "judge_samples",
            "judge_max_new_tokens",
            "max_pairs",
            "reward_max_length",
        )
        if not self.min_margin >= 0:
            raise ArgumentError(f"min_margin: got {self.min_margin}, wanted 0 or more")
        if self.comparisons == "tournament" and (
            self.format == "samples" or self.win_rate_against != "others"
        ):
            raise ArgumentError(
                "comparisons: got 'tournament', wanted 'all': who meets whom is left to chance, so its "
                "shares of won games are no win rates for samples, nor against a source"
            )
        if self.judge_model:
            self._check_judge_model()

    def _check_unused(self, judge: str) -> None:
        """Raise ArgumentError for a setting that this judge, or this format, does not look at."""
        of_others = {
            "judge_model": _OF_JUDGE_MODEL,
            "pairwise": ("comparisons", "both_orders"),
            "reward_model": ("reward_max_length",),
        }
        defaults = {item.name: item.default for item in fields(self)}
        unused = {
            name: f"with {judge}" for owner, names in of_others.items() if owner != judge for name in names
        }
        if judge in ("function", "pairwise"):
            unused |= {"reward_dtype": f"with {judge}", "trust_remote_code": f"with {judge}"}
        if self.format != "pairs":
            unused |= dict.fromkeys(("pairs", "min_margin", "max_pairs"), f"with format {self.format}")
        elif self.pairs != "all":
            unused["max_pairs"] = f"with pairs {self.pairs}"
        if self.format == "lists":
            unused["win_rate_against"] = "with format lists"
        for name, why in unused.items():
            if getattr(self, name) != defaults[name]:
                raise ArgumentError(f"{name}: got {getattr(self, name)!r} {why}, which does not look at it")

    def _check_judge_model(self) -> None:
        if self.judge_prompt is None:
            raise ArgumentError(
                "judge_prompt: got none with judge_model, wanted a text file with {prompt} and {completion}"
            )
        text = self.judge_template()
        missing = [name for name in ("{prompt}", "{completion}") if name not in text]
        if missing:
            raise ArgumentError(f"judge_prompt: {self.judge_prompt} has no {' and no '.join(missing)}")
        try:
            groups = re.compile(self.judge_pattern).groups
        except re.error as error:
            raise ArgumentError(
                f"judge_pattern: got {self.judge_pattern!r}, which is no pattern: {error}"
            ) from None
        if groups < 1:
            raise ArgumentError(
                f"judge_pattern: got {self.judge_pattern!r}, wanted a group (...) around the score"
            )
        if self.judge_samples > 1 and self.judge_temperature == 0:
            raise ArgumentError(
                "judge_samples: got several with judge_temperature 0, wanted one: they would be the same"
            )

    def judge_template(self) -> str:
        """The text of ``judge_prompt``. Raises ArgumentError where there is no such file."""
        path = Path(str(self.judge_prompt)).expanduser()
        if not path.is_file():
            raise ArgumentError(f"judge_prompt: got {self.judge_prompt!r}, and there is no such file")
        return path.read_text(encoding="utf-8")


def parse_judge(argv: Sequence[str]) -> JudgeArguments:
    """The arguments of ``fastdpo judge``. Raises ArgumentError or, for a refused value, ValueError."""
    (judge,) = parse_settings((JudgeArguments,), argv, "fastdpo judge")
    found: JudgeArguments = judge
    return found
