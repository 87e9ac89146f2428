"""``patch_llama_factory``: LLaMA-Factory's DPO and KTO stages without the logits of the batch.

Its trainers run their own code on lazy logits, made inside their loss (`trainer_steps.py`); nothing of that
code is replaced, so that no release is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdpo.integrations.source_patch import AppliedPatch, Replaced, installed_version, put_back, replace
from fastdpo.integrations.trainer_steps import steps_of
from fastdpo.ops.checks import check_execution
from fastdpo.types import Execution

TRAINERS = (
    "llamafactory.train.dpo.trainer:CustomDPOTrainer",
    "llamafactory.train.kto.trainer:CustomKTOTrainer",
)


@dataclass(frozen=True)
class _Active:
    execution: Execution
    replaced: tuple[Replaced, ...]


_active: _Active | None = None


def patch_llama_factory(*, execution: Execution | None = None) -> AppliedPatch:
    """Run LLaMA-Factory's DPO stage (every ``pref_loss``, ``ld_alpha``, ``pref_ftx``) and KTO on lazy logits.

    Call it before training starts, in the process that trains: a script that imports fastdpo, patches and
    calls ``llamafactory.train.tuner.run_exp``. Losses, gradients and metrics are LLaMA-Factory's up to
    rounding.

    Args:
        execution: how to run the head; see `Execution`.

    Returns:
        `AppliedPatch`, also a context manager. Patching again with the same execution changes nothing.

    Raises:
        ModuleNotFoundError: LLaMA-Factory is not installed.
        RuntimeError: it has no such trainers, or does not import.
        ValueError: it is patched with another execution.

    A model whose head is none that fastdpo knows goes on with its logits; one line says so.

    Example:
        >>> fastdpo.patch_llama_factory()
        >>> llamafactory.train.tuner.run_exp({"stage": "dpo", "pref_loss": "simpo", ...})
    """
    global _active
    run = check_execution(execution)
    if _active is not None:
        if _active.execution != run:
            raise ValueError(
                f"patch_llama_factory: got {run}, wanted unpatch_llama_factory() first: it is patched with "
                f"{_active.execution}"
            )
        return _describe(_active, is_new=False)
    version = installed_version("llamafactory")
    if version is None:
        raise ModuleNotFoundError(
            "patch_llama_factory: got no installed LLaMA-Factory, wanted llamafactory", name="llamafactory"
        )
    try:
        steps = steps_of(TRAINERS, run)
    except Exception as error:
        raise RuntimeError(
            f"patch_llama_factory: llamafactory {version} cannot be imported ({error})"
        ) from error
    if not steps:
        raise RuntimeError(f"patch_llama_factory: llamafactory {version} has none of {TRAINERS}")
    _active = _Active(run, replace(steps))
    return _describe(_active, is_new=True)


def unpatch_llama_factory() -> None:
    """Put the very methods back that `patch_llama_factory` wrapped; nothing to do where it wrapped none.

    Raises:
        RuntimeError: something else has been put in the place of one since; nothing is changed.
    """
    global _active
    if _active is None:
        return
    put_back(_active.replaced, "patch_llama_factory")
    _active = None


def llama_factory_status() -> list[tuple[str, str]]:
    """``(name, finding)`` lines for `fastdpo.doctor`."""
    version = installed_version("llamafactory")
    if _active is not None:
        replaced = [("replaced", entry.path) for entry in _active.replaced]
        return [("patch_llama_factory", f"LLaMA-Factory {version} is patched"), *replaced]
    would = f"LLaMA-Factory {version} is not patched; fastdpo.patch_llama_factory() would"
    return [("patch_llama_factory", would)]


def _describe(active: _Active, *, is_new: bool) -> AppliedPatch:
    paths = tuple(entry.path for entry in active.replaced)
    version = installed_version("llamafactory") or "?"
    return AppliedPatch("llamafactory", version, paths, is_new, unpatch_llama_factory)
