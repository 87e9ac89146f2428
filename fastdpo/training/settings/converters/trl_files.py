"""TRL's files, and alignment-handbook's and SimPO's, which are TRL's with a few names more."""

from __future__ import annotations

from typing import Any

from fastdpo.training.settings.converters.parts import Theirs
from fastdpo.training.settings.names import ELSEWHERE, UNSUPPORTED, our_names
from fastdpo.training.settings.trl_options import CPO_LOSSES

MARKS = ("dataset_name", "model_name_or_path", "dataset_train_split", "lora_target_modules", "use_peft")
HANDBOOK_MARKS = (
    "dataset_mixer",
    "dataset_mixture",
    "dataset_splits",
    "hub_model_revision",
    "max_prompt_length",
)


def convert(given: dict[str, Any], known: list[str], trainer: str | None) -> Theirs:
    """Ours of theirs.

    Args:
        known: our names.
        trainer: TRL's trainer, which such a file does not name; None for what its settings tell.
    """
    theirs = Theirs(given)
    trainer = trainer or _trainer_of(theirs.given)
    _losses(theirs, trainer)
    splits = theirs.take("dataset_splits")
    if splits:
        theirs.put("dataset_split", splits[0])
        if len(splits) > 1:
            theirs.put("eval_dataset_split", splits[1])
    for name in ("max_prompt_length", "max_completion_length", "hub_model_revision"):
        if name in theirs.given:
            theirs.leave(name, ELSEWHERE.get(name) or UNSUPPORTED[name])
    for name, value in list(theirs.given.items()):
        theirs.take(name)
        ours, problems = our_names({name: value}, known)
        for key, meant in ours.items():
            theirs.ours.setdefault(key, meant)
        for problem in problems:
            text = problem.partition(": ")[2].removeprefix("not a setting of fastdpo; ")
            theirs.leave(name, text)
    theirs.default(num_train_epochs=3.0, learning_rate=1e-6, gradient_checkpointing=True)
    if not theirs.ours.get("fp16"):
        theirs.default(bf16=True)
    if str(theirs.ours.get("use_peft", False)).lower() == "true":
        theirs.default(lora_dropout=0.05, dtype="float32")
        if "lora_target_modules" not in theirs.ours:
            theirs.left_out["lora_target_modules"] = (
                "none is peft's choice for the model there, all-linear here"
            )
    return theirs


def _trainer_of(given: dict[str, Any]) -> str:
    """The trainer that settings are of."""
    losses = given.get("loss_type") or ""
    if {"cpo_alpha", "simpo_gamma"} & given.keys() or losses in ("simpo", "alphapo"):
        return "cpo"
    if {"desirable_weight", "undesirable_weight"} & given.keys() or losses in ("kto", "apo_zero_unpaired"):
        return "kto"
    # Recipes of ORPO say it in what they are called.
    names = (
        f"{given.get('output_dir', '')} {given.get('run_name', '')} {given.get('hub_model_id', '')}".lower()
    )
    return next((name for name in ("orpo", "kto", "cpo") if name in names), "dpo")


def _losses(theirs: Theirs, trainer: str) -> None:
    if "gamma_beta_ratio" in theirs.given:  # SimPO's own code, without an NLL term by default
        ratio, beta = float(theirs.take("gamma_beta_ratio")), float(theirs.given.get("beta", 2.0))
        weight = float(theirs.take("sft_weight", 0.0))
        theirs.put("loss_type", ["simpo", "sft"] if weight else "simpo")
        if weight:
            theirs.put("loss_weights", [1.0, weight])
        theirs.put("beta", beta)
        theirs.put("gamma", ratio * beta)
        theirs.take("loss_type")
        return
    if trainer == "cpo":
        loss = str(theirs.take("loss_type", "sigmoid"))
        weight, gamma = theirs.take("cpo_alpha", 1.0), theirs.take("simpo_gamma", 0.5)
        found = dict(CPO_LOSSES["alphapo" if loss == "simpo" and not float(weight) else loss])
        theirs.ours |= found
        if found["loss_type"] in ("simpo", "cpo_simpo"):
            theirs.put("gamma", gamma)
        if found["loss_type"] != "simpo":
            theirs.put("nll_weight", weight)
        theirs.ours.setdefault("beta", theirs.take("beta", 0.1))
    elif trainer in ("kto", "orpo"):
        theirs.put("loss_type", theirs.take("loss_type", trainer))
        theirs.put("beta", theirs.take("beta", 0.1))
    else:
        theirs.put("loss_type", theirs.take("loss_type", "sigmoid"))
        theirs.put("beta", theirs.take("beta", 0.1))
