"""``patch_llama_factory``: LLaMA-Factory's DPO trainer, whatever its ``pref_loss``, without logits.

Its ``concatenated_forward`` builds the logits of the batch and turns them into answers' log-probabilities.
That one method is replaced; losses, data and arguments stay LLaMA-Factory's. Its source, and that of the two
functions that feed it and take its results, is held to the releases that were read.

One metric differs: ``logits/chosen`` and ``logits/rejected`` are the mean over the vocabulary at the answers'
tokens. LLaMA-Factory's are over prompts and padding as well, whose logits are what is not computed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo.integrations.model import require_fused_output
from fastdpo.integrations.patched_call import or_own, without_logits
from fastdpo.integrations.source_patch import (
    AppliedPatch,
    Replaced,
    installed_version,
    put_back,
    replace,
    unknown_source,
)
from fastdpo.ops.checks import check_execution
from fastdpo.types import Execution

FORWARD = "llamafactory.train.dpo.trainer:CustomDPOTrainer.concatenated_forward"
# sha256 of the source, by the releases that have it; `source_patch.source_hash` makes them.
SOURCES: dict[str, dict[str, str]] = {
    FORWARD: {"05e88591c3aea459": "0.9.5"},
    "llamafactory.train.dpo.trainer:CustomDPOTrainer.get_batch_loss_metrics": {"1360c990a09f1400": "0.9.5"},
    "llamafactory.train.trainer_utils:get_batch_logps": {"cf2da105797ae861": "0.9.5"},
}
MEANS = ("ipo", "orpo", "simpo")  # losses of an answer's mean log-probability
IGNORED = -100


@dataclass(frozen=True)
class _Active:
    execution: Execution
    replaced: tuple[Replaced, ...]


_active: _Active | None = None


def patch_llama_factory(*, execution: Execution | None = None) -> AppliedPatch:
    """Run LLaMA-Factory's DPO stage on `linear_logprob`: every ``pref_loss``, ``ld_alpha`` and ``pref_ftx``.

    Call it before training starts, in the process that trains: a script that imports fastdpo, patches and
    calls ``llamafactory.train.tuner.run_exp``. Losses, gradients and metrics are LLaMA-Factory's up to
    rounding, but for ``logits/chosen`` and ``logits/rejected``: means over the answers' tokens.

    Args:
        execution: how to run the head; see `Execution`.

    Returns:
        `AppliedPatch`, also a context manager. Patching again with the same execution changes nothing.

    Raises:
        ModuleNotFoundError: LLaMA-Factory is not installed.
        RuntimeError: this LLaMA-Factory is not one whose sources are known; says what was found.
        ValueError: it is patched with another execution.

    A model that `patch_model` refuses goes on in LLaMA-Factory's own method; one line says so.

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
    if reason := llama_factory_refusal():
        raise RuntimeError(f"patch_llama_factory: {reason}")
    _active = _Active(run, replace({FORWARD: or_own(_make_forward(run))}))
    return _describe(_active, is_new=True)


def unpatch_llama_factory() -> None:
    """Put the very method back that `patch_llama_factory` replaced; nothing to do where it replaced none.

    Raises:
        RuntimeError: something else has been put in its place since; nothing is changed.
    """
    global _active
    if _active is None:
        return
    put_back(_active.replaced, "patch_llama_factory")
    _active = None


def llama_factory_refusal() -> str | None:
    """Why `patch_llama_factory` would refuse, or None.

    Raises:
        ModuleNotFoundError: LLaMA-Factory is not installed.
    """
    version = installed_version("llamafactory")
    if version is None:
        raise ModuleNotFoundError(
            "patch_llama_factory: got no installed LLaMA-Factory, wanted llamafactory == 0.9.5",
            name="llamafactory",
        )
    unknown = unknown_source(f"llamafactory {version}", SOURCES)
    return None if unknown is None else unknown[1]


def llama_factory_status() -> list[tuple[str, str]]:
    """``(name, finding)`` lines for `fastdpo.doctor`."""
    version = installed_version("llamafactory")
    if version is None:
        return [("patch_llama_factory", "LLaMA-Factory is not installed")]
    if _active is not None:
        replaced = [("replaced", entry.path) for entry in _active.replaced]
        return [("patch_llama_factory", f"LLaMA-Factory {version} is patched"), *replaced]
    try:
        reason = llama_factory_refusal()
    except Exception as error:  # one that fails to import is a finding
        reason = f"llamafactory {version} cannot be imported ({type(error).__name__}: {error})"
    if reason is not None:
        return [("patch_llama_factory", f"refused: {reason}")]
    would = f"LLaMA-Factory {version} is not patched; fastdpo.patch_llama_factory() would"
    return [("patch_llama_factory", would)]


def _describe(active: _Active, *, is_new: bool) -> AppliedPatch:
    paths = tuple(entry.path for entry in active.replaced)
    version = installed_version("llamafactory") or "?"
    return AppliedPatch("llamafactory", version, paths, is_new, unpatch_llama_factory)


def _make_forward(execution: Execution) -> Callable[..., dict[str, Tensor]]:
    def concatenated_forward(
        self: Any, model: Any, batch: dict[str, Any], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        """`CustomDPOTrainer.concatenated_forward`, from log-probabilities."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch["labels"]  # (2P, T), chosen rows first
        with without_logits(self, model, execution):
            out = require_fused_output(
                model(
                    **inputs,
                    labels=labels,
                    return_logps=True,
                    logps_outputs=("mean_logit",),
                    return_dict=True,
                    use_cache=False,
                )
            )
        assert out.logps is not None and out.mean_logit is not None
        mask = labels[:, 1:] != IGNORED
        weights = mask.to(out.logps.dtype)
        if self.ld_alpha is not None and not is_ref_model:
            weights = torch.where(_shared_part(mask), weights, self.ld_alpha * weights)
        logps, lengths = (out.logps[:, 1:] * weights).sum(-1), mask.sum(-1)
        if self.loss_type in MEANS:
            logps = logps / lengths
        num_pairs = len(labels) // 2
        chosen, rejected = slice(0, num_pairs), slice(num_pairs, None)
        mean_logits = out.mean_logit[:, 1:]
        return {
            "chosen_logps": logps[chosen],
            "rejected_logps": logps[rejected],
            "chosen_logits": mean_logits[chosen][mask[chosen]],  # what takes them takes their mean
            "rejected_logits": mean_logits[rejected][mask[rejected]],
            "chosen_logps_avg": logps[chosen] / (1 if self.loss_type in MEANS else lengths[chosen]),
        }

    return concatenated_forward


def _shared_part(mask: Tensor) -> Tensor:
    """``(2P, T - 1)``: from an answer's first token on, as far as the shorter of the two is long."""
    lengths = mask.sum(-1)
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    ends = mask.int().argmax(dim=1) + shorter
    return torch.arange(mask.shape[1], device=mask.device) < ends[:, None]
