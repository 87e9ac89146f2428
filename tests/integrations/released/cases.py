"""What is run in which environment, and what each case trains; no library is needed to read it."""

from __future__ import annotations

from typing import Any, NamedTuple

STEPS = 20
PAIRS_PER_STEP = 2


class Case(NamedTuple):
    """One run of a trainer.

    Args:
        kind: of TRL's trainers, or of `loops.LOOPS`.
        options: of the trainer's config. A release that has one of them not has no such case.
        rows: that are trained: ``labelled``; ``twice`` where the likelihood of the chosen answers is a second
            loss, of the same tokens or of their prompts too; ``all`` positions.
        hook: ``patch_model``; ``patch_trl``, or the plugin of ``axolotl`` or ``ms-swift``, instead.
        is_lora: whether the reference is the policy without its adapter.
    """

    kind: str
    options: dict[str, Any] = {}
    rows: str = "labelled"
    is_lora: bool = False
    hook: str = "patch_model"


TRL_CASES: dict[str, Case] = {
    "dpo": Case("dpo"),
    "dpo-rpo": Case("dpo", {"rpo_alpha": 0.5}, rows="twice"),
    "dpo-sft": Case("dpo", {"loss_type": ["sigmoid", "sft"]}, rows="twice"),
    "dpo-weighted": Case("dpo", {"use_weighting": True}),
    "dpo-ipo": Case("dpo", {"loss_type": "ipo"}),
    "dpo-padding-free": Case("dpo", {"padding_free": True}),
    "dpo-ld": Case("dpo", {"ld_alpha": 0.5}),
    "dpo-lora": Case("dpo", is_lora=True),
    "dpo, patch_trl": Case("dpo", hook="patch_trl"),
    "kto": Case("kto"),
    "kto, patch_trl": Case("kto", hook="patch_trl"),
    "cpo": Case("cpo", rows="twice"),
    "simpo": Case("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "orpo": Case("orpo", rows="twice"),
    "orpo, patch_trl": Case("orpo", rows="twice", hook="patch_trl"),
    "tpo": Case("tpo", rows="twice"),
}
LOOP_CASES: dict[str, Case] = {
    "dpo-repository": Case("dpo-repository"),
    "simpo-repository": Case("simpo-repository"),
    "openrlhf": Case("openrlhf", rows="all"),  # it writes the logsumexp of all rows into a tensor
    "ms-swift": Case("ms-swift"),
    "ms-swift, plugin": Case("ms-swift-trainer", hook="ms-swift"),
}


AXOLOTL_CASES: dict[str, Case] = {
    "dpo": Case("dpo", hook="axolotl"),
    "kto": Case("kto", hook="axolotl"),
    "orpo": Case("orpo", rows="twice", hook="axolotl"),
}


def cases_of(environment: str) -> dict[str, Case]:
    """The cases of an environment, by its requirements' file."""
    if environment.startswith("trl-"):
        return TRL_CASES
    if environment == "axolotl":
        return AXOLOTL_CASES
    if environment in LOOP_CASES:
        return {name: case for name, case in LOOP_CASES.items() if name.startswith(environment)}
    return {name: case for name, case in LOOP_CASES.items() if name.endswith("-repository")}


def rows_of(environment: str, case: str) -> str:
    """Which rows are trained; see `Case`."""
    if environment == "trl-0.9" and case.startswith("dpo"):
        return "twice"  # it makes that loss whether it is asked for or not
    rows = cases_of(environment)[case].rows
    # It leaves out the last column of a batch where rows are moved to the left.
    return "cut" if environment == "trl-0.12" and rows == "labelled" and case.startswith("dpo") else rows
