"""``patch_trl``: TRL's own trainers on fastdpo's log-probabilities.

TRL >= 1.15 has one function behind its DPO, KTO, GRPO, RLOO and SFT trainers that turns hidden states and
a head into log-probabilities. It is private, and so are the methods of the CPO, ORPO and TPO trainers that
build logits: what is replaced is known by a hash of its source, and anything else is refused. TRL looks all
of it up when it is called, so a patch also reaches trainers that were made before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdpo.integrations import trl_0_24
from fastdpo.integrations.source_patch import (
    AppliedPatch,
    Around,
    Replaced,
    find,
    installed_version,
    put_back,
    replace,
    unknown_source,
)
from fastdpo.integrations.trl_logprob import APPLY_SIGNATURE, FusedLogProb, drop_unlabelled
from fastdpo.ops.checks import check_execution
from fastdpo.types import Execution

SEAM = "trl.trainer.utils:_ChunkedLogProbFunction"
COMPACTION = "trl.trainer.utils:_use_triton"  # since 1.16; 1.15 drops unlabelled tokens everywhere
CPO = "trl.experimental.cpo.cpo_trainer:CPOTrainer.concatenated_forward"
ORPO = "trl.experimental.orpo.orpo_trainer:ORPOTrainer.concatenated_forward"
TPO = "trl.experimental.tpo.tpo_trainer:TPOTrainer._compute_loss"
FIRST_VERSION = "1.15"

# sha256 of the source, by the releases that have it: of what is replaced, and of what calls it or takes its
# results. `source_patch.source_hash` makes them.
SEAM_SOURCES: dict[str, dict[str, str]] = {
    "trl.trainer.utils:_ChunkedLogProbFunction": {"6a4578b8e7f201fa": "1.15", "17b8716d26881cf9": "1.16"},
    "trl.trainer.utils:_use_triton": {"8bdca0eb73925ed1": "1.16"},
    "trl.trainer.utils:add_fused_lm_head": {"65d22e63e4870d0f": "1.15", "c309684c7d7599a8": "1.16"},
}
EXPERIMENTAL_SOURCES: dict[str, dict[str, str]] = {
    "trl.experimental.cpo.cpo_trainer:CPOTrainer.concatenated_forward": {"82174637bb3a754c": "1.15, 1.16"},
    "trl.experimental.cpo.cpo_trainer:CPOTrainer.concatenated_inputs": {"250554a6316a0578": "1.15, 1.16"},
    "trl.experimental.cpo.cpo_trainer:CPOTrainer.get_batch_logps": {"8e2f11045d9b27ac": "1.15, 1.16"},
    "trl.experimental.cpo.cpo_trainer:CPOTrainer.get_batch_loss_metrics": {"9ebac25cac59bd55": "1.15, 1.16"},
    "trl.experimental.orpo.orpo_trainer:ORPOTrainer.concatenated_forward": {"fa124d24498b5de6": "1.15, 1.16"},
    "trl.experimental.orpo.orpo_trainer:ORPOTrainer.concatenated_inputs": {"250554a6316a0578": "1.15, 1.16"},
    "trl.experimental.orpo.orpo_trainer:ORPOTrainer.get_batch_logps": {"a2a2d0dce79ae143": "1.15, 1.16"},
    "trl.experimental.orpo.orpo_trainer:ORPOTrainer.get_batch_loss_metrics": {
        "76eec8e950bfc1b0": "1.15, 1.16"
    },
    "trl.experimental.tpo.tpo_trainer:TPOTrainer._compute_loss": {"bdd4b26fb93e6835": "1.15, 1.16"},
    "trl.experimental.tpo.tpo_trainer:TPOTrainer.prediction_step": {"fd7735f8e9461ead": "1.15, 1.16"},
}


@dataclass(frozen=True)
class _Options:
    execution: Execution
    experimental: bool


@dataclass(frozen=True)
class _Active:
    options: _Options
    replaced: tuple[Replaced, ...]


_active: _Active | None = None


def patch_trl(*, execution: Execution | None = None, experimental: bool = True) -> AppliedPatch:
    """Run TRL's trainers on `linear_logprob`: DPO, KTO, GRPO, RLOO and SFT, and CPO/SimPO, ORPO and TPO.

    The first five call one log-prob function, which is replaced; all loss code, options and metrics stay
    TRL's. On a CPU unlabelled tokens are dropped as well, which TRL does on GPUs only. Of CPO, ORPO and TPO,
    which build the logits of the batch, the methods that do so are replaced; then the metrics
    ``logits/chosen`` and ``logits/rejected`` of CPO and ORPO are means over the answers' tokens, not over all
    positions. Losses, gradients and every other metric are TRL's up to rounding.

    Of TRL 0.24.0, which has no such function, the DPO, KTO, CPO and ORPO trainers run without logits; the
    rest (SFT, GRPO, RLOO, BCO ...) is left as it is, as ``use_liger_loss`` is, and KTO's ``logits/chosen``
    and ``logits/rejected`` are sums over the answers' tokens. `doctor` lists what is replaced and what not.

    A head that TRL's trainers refuse (LoRA on ``lm_head``) they still refuse. What fastdpo cannot run (a head
    under ZeRO-3 or quantised; for the experimental trainers and TRL 0.24 encoder-decoders and what
    `patch_model` refuses) goes on in TRL's own code, and one line says so and why.

    Under FSDP2 the head is whole where the op runs, in the root's unit or as accelerate wraps it; in a unit
    of its own TRL gathers it in a way that loses the other ranks' gradients, which raises.

    Args:
        execution: how to run the head; see `Execution`.
        experimental: also CPO, ORPO and TPO, which are in ``trl.experimental``, and of TRL 0.24 CPO and ORPO.
            Imports them.

    Returns:
        `AppliedPatch`, also a context manager: ``with patch_trl(): trainer.train()``. Patching again with the
        same options changes nothing.

    Raises:
        ModuleNotFoundError: TRL is not installed.
        RuntimeError: this TRL is not one whose sources are known; the message says what was found.
        ValueError: TRL is patched with other options.

    Example:
        >>> fastdpo.patch_trl()
        >>> DPOTrainer(model, args=DPOConfig(...), train_dataset=dataset).train()
    """
    global _active
    if not isinstance(experimental, bool):
        raise TypeError(f"experimental: got {experimental!r}, wanted a bool")
    options = _Options(check_execution(execution), experimental)
    if _active is not None:
        if _active.options != options:
            raise ValueError(
                f"patch_trl: got {options}, wanted unpatch_trl() first: TRL is patched with {_active.options}"
            )
        return _describe(_active, is_new=False)
    if reason := refusal(experimental=experimental):
        raise RuntimeError(f"patch_trl: {reason}")
    _active = _Active(options, replace(_replacements(options)))
    return _describe(_active, is_new=True)


def unpatch_trl() -> None:
    """Put the very objects back that `patch_trl` replaced; nothing to do where it replaced none.

    Raises:
        RuntimeError: something else has been put in the place of a replacement since; nothing is changed.
    """
    global _active
    if _active is None:
        return
    put_back(_active.replaced, "patch_trl")
    _active = None


def trl_status(trainer: type | None = None) -> list[tuple[str, str]]:
    """``(name, finding)`` lines for `fastdpo.doctor`: whether TRL is patched, can be, or would be refused.

    ``trainer``: of which class to say as well whether the patch reaches it.
    """
    version = _installed_version()
    if version is None:
        return [("patch_trl", "TRL is not installed")]
    if _active is not None:
        lines = [("patch_trl", f"TRL {version} is patched")]
        lines += [("replaced", entry.path) for entry in _active.replaced]
        if version == trl_0_24.VERSION:
            lines.append(("not replaced", f"{trl_0_24.NOT_REPLACED}; use_liger_loss=True"))
        return lines if trainer is None else [*lines, *_not_reached(_active, trainer)]
    for experimental in (True, False):
        try:
            reason = refusal(experimental=experimental)
        except Exception as error:  # a TRL that fails to import is a finding
            reason = f"trl {version} cannot be imported ({type(error).__name__}: {error})"
        if reason is None:
            break
        refused = reason
    else:
        return [("patch_trl", f"refused: {refused}")]
    if experimental:
        return [("patch_trl", f"TRL {version} is not patched; fastdpo.patch_trl() would")]
    return [("patch_trl", f"refused: {refused}"), ("remedy", "patch_trl(experimental=False) runs")]


def _not_reached(active: _Active, trainer: type) -> list[tuple[str, str]]:
    """A trainer that keeps code of its own: because it overrides what is replaced, or was never replaced."""
    own = [entry for entry in active.replaced if entry.owner in trainer.__mro__]
    # A replacement of ours that is another one's: LLaMA-Factory overrides DPO's, and has a patch of its own.
    over = [e.name for e in own if not getattr(trainer, e.name).__module__.startswith("fastdpo.")]
    if over:
        return [("not fused", f"{trainer.__name__} has a {' and a '.join(over)} of its own")]
    if not own and _installed_version() == trl_0_24.VERSION:
        return [("not fused", f"{trainer.__name__} of TRL {trl_0_24.VERSION} is not one that is replaced")]
    return []


def refusal(*, experimental: bool = True) -> str | None:
    """Why `patch_trl` would refuse, or None.

    Raises:
        ModuleNotFoundError: TRL is not installed.
    """
    from packaging.version import InvalidVersion, Version

    version = _installed_version()
    if version is None:
        raise ModuleNotFoundError(
            f"patch_trl: got no installed TRL, wanted trl >= {FIRST_VERSION}", name="trl"
        )
    if version == trl_0_24.VERSION:
        if reason := trl_0_24.why_not_importable():
            return reason
        known = {**trl_0_24.SOURCES, **(trl_0_24.CPO_SOURCES if experimental else {})}
        return _refusal_of_sources(version, known, trl_0_24.CPO_SOURCES)
    try:
        is_old = Version(version) < Version(FIRST_VERSION)
    except InvalidVersion:
        return f"trl has the version {version!r}, which cannot be compared with {FIRST_VERSION}"
    if is_old:
        return (
            f"trl {version} has no log-prob function that its trainers share, so there is nothing to "
            f"replace; wanted trl >= {FIRST_VERSION}, or {trl_0_24.VERSION}"
        )
    try:
        owner, _, function = find(SEAM)
    except (ModuleNotFoundError, AttributeError) as error:
        return f"trl {version} has no {SEAM} ({error}); this TRL is newer than this fastdpo"
    if function is None:
        return f"trl {version} found no Triton, without which it has no log-prob function; wanted trl >= 1.16"
    forward = getattr(function, "forward", None)
    found = tuple(inspect.signature(forward).parameters) if callable(forward) else ()
    if found != APPLY_SIGNATURE:
        return (
            f"trl {version}: {SEAM} takes {found}, wanted {APPLY_SIGNATURE}; it was replaced, or this TRL is "
            "newer than this fastdpo"
        )
    known = {**SEAM_SOURCES, **(EXPERIMENTAL_SOURCES if experimental else {})}
    if not hasattr(owner, "_use_triton"):
        del known[COMPACTION]
    return _refusal_of_sources(version, known, EXPERIMENTAL_SOURCES)


def _refusal_of_sources(
    version: str, known: Mapping[str, Mapping[str, str]], experimental: Mapping[str, Mapping[str, str]]
) -> str | None:
    if (unknown := unknown_source(f"trl {version}", known)) is None:
        return None
    path, reason = unknown
    if path in experimental:
        reason += "; patch_trl(experimental=False) leaves it as it is"
    return reason


def _installed_version() -> str | None:
    return installed_version("trl")


def _replacements(options: _Options) -> dict[str, Any]:
    if _installed_version() == trl_0_24.VERSION:
        return trl_0_24.replacements(options.execution, experimental=options.experimental)
    made: dict[str, Any] = {SEAM: Around(lambda own: FusedLogProb(options.execution, own))}
    if hasattr(find(SEAM)[0], "_use_triton"):
        made[COMPACTION] = Around(drop_unlabelled)
    if options.experimental:
        from fastdpo.integrations.trl_trainers import make_methods

        methods = make_methods(options.execution)
        made |= {CPO: methods["cpo"], ORPO: methods["orpo"], TPO: methods["tpo"]}
    return made


def _describe(active: _Active, *, is_new: bool) -> AppliedPatch:
    paths = tuple(entry.path for entry in active.replaced)
    return AppliedPatch("trl", _installed_version() or "?", paths, is_new, unpatch_trl)
