"""Settings of NLL terms: on which tokens they train."""

from __future__ import annotations

import logging
from collections.abc import Collection

from fastdpo.training.settings.fields import SettingFields

logger = logging.getLogger(__name__)
# Their NLL term is of a third answer, under this name in TRL's TPO trainer.
GOLD_LOSSES = ("tpo", "tpo_l")
GOLD_COLUMN = "reference"


def trains_on_prompt(args: SettingFields, *, has_nll: bool) -> bool:
    """Whether NLL terms train on the prompts too; None in the settings is yes for ORPO's alone.

    Raises:
        ValueError: it is asked for of losses without such a term or with a gold answer, or a gold answer is
            of losses that have no use for it.
    """
    names = _nll_losses(args)
    is_gold = any(name in GOLD_LOSSES for name in names)
    if args.gold_column is not None and not (has_nll and is_gold):
        raise ValueError(
            f"gold_column: got {args.gold_column!r} with {', '.join(args.loss_type)}, wanted a loss of "
            f"{', '.join(GOLD_LOSSES)} with its NLL term"
        )
    if args.nll_on_prompt is None:
        return has_nll and all(name == "orpo" for name in names)
    if args.nll_on_prompt and (is_gold or not has_nll):
        wanted = "losses with an NLL term, and of the chosen answers"
        raise ValueError(f"nll_on_prompt: got True with {', '.join(args.loss_type)}, wanted {wanted}")
    return bool(args.nll_on_prompt)


def gold_column(args: SettingFields, columns: Collection[str]) -> str | None:
    """The column that gold answers are read from; None where none are there, or wanted.

    Args:
        columns: of the data, that hold something.

    Raises:
        ValueError: other losses beside have an NLL term, of the chosen answers.
    """
    if not _wants_gold(args):
        return None
    found = args.gold_column or (GOLD_COLUMN if GOLD_COLUMN in columns else None)
    others = [name for name in _nll_losses(args) if name not in GOLD_LOSSES]
    if found is not None and others:
        raise ValueError(
            f"loss_type: got {', '.join(args.loss_type)} with gold answers in the column {found!r}, "
            f"wanted no other NLL term beside theirs: {', '.join(others)} has one, of the chosen answers"
        )
    return found


def check_gold(args: SettingFields, *, has_gold: bool) -> None:
    """Warn of TPO on pairs without gold answers. Raises ValueError for such answers without a use."""
    if has_gold and not _wants_gold(args):
        raise ValueError(
            f"dataset: got tokenised pairs with gold answers, which {', '.join(args.loss_type)} has no use "
            "for, wanted pairs alone"
        )
    if _wants_gold(args) and not has_gold:
        if args.gold_column is not None:
            raise ValueError(
                f"gold_column: got {args.gold_column!r} with tokenised pairs that have no gold answers, "
                "wanted them tokenised with it"
            )
        logger.warning(
            "%s: pairs have no third, gold answer (a column %r, or gold_column), so the NLL term is of the "
            "chosen ones, as in CPO",
            ", ".join(args.loss_type),
            GOLD_COLUMN,
        )


def _nll_losses(args: SettingFields) -> list[str]:
    """Names of the losses that have an NLL term, or are one."""
    return [spec.name for spec in args.losses if spec.is_nll or spec.nll_weight is not None]


def _wants_gold(args: SettingFields) -> bool:
    # With a weight of 0 the term is not there, as in TRL.
    is_gold = any(name in GOLD_LOSSES for name in _nll_losses(args))
    return is_gold and args.options.get("nll_weight") != 0
