"""``patch_trl``: TRL's own trainers without the logits of the batch.

TRL >= 1.15 has one function behind its DPO, KTO, GRPO, RLOO and SFT trainers that turns hidden states and
a head into log-probabilities. It is private: what is replaced is known by a hash of its source, and anything
else is refused. Its CPO, ORPO and TPO trainers, and the DPO, KTO, CPO, ORPO and TPO trainers of releases
before it, take the logits of a model: theirs are lazy (`trainer_steps.py`), and nothing of their code is
replaced. TRL looks all of it up when it is called, so a patch also reaches trainers that were made before it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

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
from fastdpo.integrations.trainer_steps import steps_of
from fastdpo.integrations.trl_logprob import APPLY_SIGNATURE, FusedLogProb, drop_unlabelled
from fastdpo.integrations.trl_releases import (
    COMPACTION,
    FIRST_VERSION,
    SEAM,
    SEAM_SOURCES,
    is_before_the_seam,
    said_by_version,
)
from fastdpo.ops.checks import check_execution
from fastdpo.types import Execution

# Trainers that take a model's logits, where releases have them.
BEFORE_THE_SEAM = (
    *("trl.trainer.dpo_trainer:DPOTrainer", "trl.trainer.kto_trainer:KTOTrainer"),
    "trl.experimental.kto.kto_trainer:KTOTrainer",
)
EXPERIMENTAL = (
    *("trl.trainer.cpo_trainer:CPOTrainer", "trl.trainer.orpo_trainer:ORPOTrainer"),
    *("trl.experimental.cpo.cpo_trainer:CPOTrainer", "trl.experimental.orpo.orpo_trainer:ORPOTrainer"),
    "trl.experimental.tpo.tpo_trainer:TPOTrainer",
)


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
    """Run TRL's trainers without the logits of the batch: DPO, KTO, CPO/SimPO, ORPO, TPO, of any release.

    Of TRL >= 1.15 the DPO, KTO, GRPO, RLOO and SFT trainers call one log-prob function, which is replaced by
    `linear_logprob`. On a CPU unlabelled tokens are dropped as well, which TRL does on GPUs only. All other
    trainers named here run their own code on lazy logits (docs/lazy.md), made inside their loss: of TRL below
    1.15 the SFT, GRPO and RLOO trainers are left as they are. Losses, gradients and metrics are TRL's up to
    rounding. `doctor` lists what is replaced.

    A head that TRL's trainers refuse (LoRA on ``lm_head``) they still refuse. What fastdpo cannot run (a
    quantised head) goes on in TRL's own code, and one line says so and why.

    Under ZeRO-3 the head is gathered for its call and for its backward pass, as TRL does. Under FSDP2 it is
    whole where the op runs, in the root's unit or as accelerate wraps it; in a unit of its own TRL gathers it
    in a way that loses the other ranks' gradients, which raises.

    Args:
        execution: how to run the head; see `Execution`.
        experimental: also CPO, ORPO and TPO, which newer releases have in ``trl.experimental``. Imports them.

    Returns:
        `AppliedPatch`, also a context manager: ``with patch_trl(): trainer.train()``. Patching again with the
        same options changes nothing.

    Raises:
        ModuleNotFoundError: TRL is not installed.
        RuntimeError: this TRL has another log-prob function than those known, or does not import; the message
            says what was found.
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
    if reason := refusal():
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
    if _active is not None:
        lines = [("patch_trl", f"TRL {version} is patched")]
        lines += [("replaced", entry.path) for entry in _active.replaced]
        return lines if trainer is None else [*lines, *_not_reached(_active, trainer)]
    if (said := said_by_version(version)) is not None:
        return said
    try:
        reason = refusal()
    except Exception as error:  # a TRL that fails to import is a finding
        reason = f"trl {version} cannot be imported ({type(error).__name__}: {error})"
    if reason is not None:
        return [("patch_trl", f"refused: {reason}")]
    return [("patch_trl", f"TRL {version} is not patched; fastdpo.patch_trl() would")]


def _not_reached(active: _Active, trainer: type) -> list[tuple[str, str]]:
    """A trainer of a release without the function, of a kind that is not in `BEFORE_THE_SEAM`."""
    is_reached = any(entry.path == SEAM or entry.owner in trainer.__mro__ for entry in active.replaced)
    return [] if is_reached else [("not fused", f"{trainer.__name__} is not one that is replaced")]


def refusal() -> str | None:
    """Why `patch_trl` would refuse, or None.

    Raises:
        ModuleNotFoundError: TRL is not installed.
    """
    from packaging.version import InvalidVersion, Version

    version = _installed_version()
    if version is None:
        raise ModuleNotFoundError("patch_trl: got no installed TRL, wanted trl", name="trl")
    try:
        Version(version)
    except InvalidVersion:
        return f"trl has the version {version!r}, which cannot be compared with {FIRST_VERSION}"
    if is_before_the_seam(version):
        return None
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
    known = dict(SEAM_SOURCES)
    if not hasattr(owner, "_use_triton"):
        del known[COMPACTION]
    unknown = unknown_source(f"trl {version}", known)
    return None if unknown is None else unknown[1]


def _installed_version() -> str | None:
    return installed_version("trl")


def _replacements(options: _Options) -> dict[str, Any]:
    version = _installed_version()
    assert version is not None
    made: dict[str, Any] = {}
    classes = EXPERIMENTAL if options.experimental else ()
    if is_before_the_seam(version):
        return steps_of((*BEFORE_THE_SEAM, *classes), options.execution)
    made[SEAM] = Around(lambda own: FusedLogProb(options.execution, own))
    if hasattr(find(SEAM)[0], "_use_triton"):
        made[COMPACTION] = Around(drop_unlabelled)
    return made | steps_of(classes, options.execution)


def _describe(active: _Active, *, is_new: bool) -> AppliedPatch:
    paths = tuple(entry.path for entry in active.replaced)
    return AppliedPatch("trl", _installed_version() or "?", paths, is_new, unpatch_trl)
