"""Settings of what changes from step to step: beta, the reference, and what a loss takes for its batch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fastdpo.losses import LossSpec, PairLogps
from fastdpo.losses.controllers import BetaController
from fastdpo.ops.backends import DIVERGENCE_BACKENDS
from fastdpo.training.settings.fields import SettingFields

# Per-pair numbers of the losses, and the field that names the column they are read from.
COLUMN_FIELDS = {
    "beta": "beta_column",
    "margin": "margin_column",
    "pair_weights": "pair_weight_column",
    "soft_labels": "soft_label_column",
    "reward_gap": "reward_gap_column",
    "chosen_win_rate": "chosen_win_rate_column",
    "rejected_win_rate": "rejected_win_rate_column",
    "chosen_is_reference": "chosen_is_reference_column",
}
# What a loss may refuse, by a number that any loss with a use for it takes.
_STAND_INS = {
    "margin": 0.0,
    "soft_labels": 0.5,
    "reward_gap": 0.0,
    "chosen_win_rate": 0.5,
    "rejected_win_rate": 0.5,
    "chosen_is_reference": 0.0,
}


def check_step_settings(args: SettingFields) -> None:
    """Raise ValueError for settings that do not go with the losses or with each other."""
    if args.dynamic_beta is not None:
        _check_dynamic_beta(args.dynamic_beta, args.losses, args.beta)
    if args.beta_column is not None:
        _check_beta_column(args)
    _check_ld_alpha(args)
    _check_weighting(args)
    if args.sync_ref_model:
        if args.reference not in ("auto", "copy") or not args.needs_reference:
            got = f"reference={args.reference!r}" if args.needs_reference else ", ".join(args.loss_type)
            raise ValueError(f"sync_ref_model: got True with {got}, wanted reference='copy'")
        if not 0 < args.ref_model_mixup_alpha <= 1:
            got = repr(args.ref_model_mixup_alpha)
            raise ValueError(f"ref_model_mixup_alpha: got {got}, wanted a number in (0, 1]")
    if args.needs_divergences:
        _check_divergences(args)
    monitor_options(args.over_optimisation_monitor)
    if args.gather_batch_losses:
        if all(spec.scope != "batch" for spec in args.losses):
            raise ValueError("gather_batch_losses: got True, wanted a loss that compares a whole batch (aot)")
        for column in COLUMN_FIELDS.values():
            if getattr(args, column):
                raise ValueError(f"{column}: got a value with gather_batch_losses, wanted None")


def stand_ins(args: SettingFields) -> dict[str, float]:
    """Numbers that say there will be a value per pair; the values are checked with the data.

    Raises:
        ValueError: a loss cannot be computed without a column that is not named.
    """
    for spec in args.losses:
        for name in COLUMN_FIELDS.keys() & set(spec.needs):
            if getattr(args, COLUMN_FIELDS[name]) is None:
                raise ValueError(
                    f"{COLUMN_FIELDS[name]}: got None, wanted the column to read for {spec.name}"
                )
    return {name: number for name, number in _STAND_INS.items() if getattr(args, COLUMN_FIELDS[name])}


def _check_ld_alpha(args: SettingFields) -> None:
    """Raise ValueError for a weight of tokens that is none, or that the losses have no use for."""
    alpha = args.ld_alpha
    if alpha is None:
        return
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"ld_alpha: got {alpha!r}, wanted a number in [0, 1]")
    if any(spec.inputs is not PairLogps for spec in args.losses) or all(spec.is_nll for spec in args.losses):
        names = ", ".join(args.loss_type)
        wanted = "losses that compare the log-probabilities of a pair's two answers"
        raise ValueError(f"ld_alpha: got {alpha!r} with {names}, wanted {wanted}")


def _check_weighting(args: SettingFields) -> None:
    """Raise ValueError for WPO's weights where losses are not of one pair each."""
    if not args.use_weighting:
        if args.wpo_max_weight is not None:
            raise ValueError(
                f"wpo_max_weight: got {args.wpo_max_weight!r} without use_weighting, wanted None"
            )
        return
    bound = args.wpo_max_weight
    if bound is not None and (isinstance(bound, bool) or not bound > 0):
        raise ValueError(f"wpo_max_weight: got {bound!r}, wanted a number above 0")
    for spec in args.losses:
        if spec.inputs is not PairLogps or spec.scope == "batch":
            wanted = "losses of pairs, each of one pair's log-probabilities"
            raise ValueError(f"use_weighting: got True with {spec.name}, wanted {wanted}")


def _check_beta_column(args: SettingFields) -> None:
    """Raise ValueError unless a beta per pair is the only one, and some loss has one."""
    for name in ("beta", "dynamic_beta"):
        if getattr(args, name) is not None:
            raise ValueError(f"beta_column: got {args.beta_column!r} with {name}, wanted one of the two")
    if not args.data_kind.is_paired or all(spec.default_beta is None for spec in args.losses):
        names = ", ".join(args.loss_type)
        raise ValueError(f"beta_column: got a value with {names}, wanted losses of pairs that have a beta")


def _check_divergences(args: SettingFields) -> None:
    """Raise ValueError for a way to run the head, or a reference, that gives no divergences."""
    names = ", ".join(args.loss_type)
    if args.reference == "precomputed":
        raise ValueError(
            f"reference: got 'precomputed', wanted 'auto', 'copy' or 'adapter': {names} needs the "
            "reference's whole distribution at every token, which log-probabilities do not tell"
        )
    for name, wanted in (
        ("mode", ("auto", "stash", "cache", "recompute")),
        ("backend", ("auto", *DIVERGENCE_BACKENDS)),
        ("logits_dtype", (None, "fp32")),
    ):
        if getattr(args, name) not in wanted:
            raise ValueError(
                f"{name}: got {getattr(args, name)!r} with {names}, wanted one of {wanted}: divergences over "
                "the vocabulary have no other"
            )


def _check_dynamic_beta(options: Any, losses: list[LossSpec], beta: float | None) -> None:
    """Raise ValueError unless the losses have a beta and no mean of their own, and the options are known."""
    for spec in losses:
        if (
            spec.inputs is not PairLogps
            or spec.default_beta is None
            or not spec.uses_reference
            or spec.nll_weight
            or spec.scope != "pair"
        ):
            wanted = "losses of pairs with a beta and a reference, no NLL term, and no look at other pairs"
            raise ValueError(f"dynamic_beta: got a value with {spec.name}, wanted {wanted}")
    known = ("alpha", "rho", "momentum", "min_beta", "warm_start")
    for name in options:
        if name not in known:
            raise ValueError(f"dynamic_beta: got the option {name!r}, wanted some of {', '.join(known)}")
    BetaController(0.1 if beta is None else beta, **options)


def monitor_options(options: Any) -> MonitorOptions | None:
    """Of the monitor that is asked for, if any. Raises ValueError for one that it does not have."""
    if options is None:
        return None
    known = tuple(item.name for item in fields(MonitorOptions))
    for name in options:
        if name not in known:
            wanted = f"some of {', '.join(known)}"
            raise ValueError(f"over_optimisation_monitor: got the option {name!r}, wanted {wanted}")
    return MonitorOptions(**options)


@dataclass(kw_only=True, eq=False)
class MonitorOptions:
    """Options of ``OverOptimisationMonitor``, whose docstring says what they are."""

    topk: int = 10
    num_rows: int = 64
    renormalize: bool = False
    patience: int = 2
    stop: bool = False

    def __post_init__(self) -> None:
        for name in ("topk", "num_rows", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, wanted a whole number from 1")
