"""fastdpo: the LM head of preference optimisation, fast, exact and light on memory.

Importing it changes nothing and loads no library at all: torch, and what few names need beside it, is loaded
when a name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import fastdpo.doctor  # noqa: F401  (see below)

if TYPE_CHECKING:
    from fastdpo.doctor.diagnosis import doctor
    from fastdpo.functional.pairs import dpo_loss_from_logps, fused_dpo_loss, shift_labels
    from fastdpo.functional.preference import fused_preference_loss, preference_loss_from_logps
    from fastdpo.integrations.forest.rows import forest_batch
    from fastdpo.integrations.forest.segments import Forest
    from fastdpo.integrations.fused_output import HeadStates, Teachers
    from fastdpo.integrations.llama_factory import patch_llama_factory, unpatch_llama_factory
    from fastdpo.integrations.model import FusedLMOutput, patch_model, unpatch_model
    from fastdpo.integrations.trl import patch_trl, unpatch_trl
    from fastdpo.losses import LOSSES, ReferenceCombination, preference_loss
    from fastdpo.ops.linear_logprob import linear_logprob
    from fastdpo.ops.token_divergence import token_divergence
    from fastdpo.plan.explain import explain_plan
    from fastdpo.plan.plan import Plan
    from fastdpo.training.loop.trainer import PreferenceTrainer
    from fastdpo.training.settings.config import PreferenceConfig
    from fastdpo.types import (
        CarriedContext,
        DPOLossOutput,
        Execution,
        LinearLogprobOutput,
        LMHead,
        PackedLayout,
        PreferenceLossOutput,
        TeacherCombination,
        TokenDivergenceOutput,
        TokenLayout,
        VocabShard,
    )

__version__ = "0.1.0"
__all__ = [
    "LOSSES",
    "CarriedContext",
    "DPOLossOutput",
    "Execution",
    "Forest",
    "FusedLMOutput",
    "HeadStates",
    "LMHead",
    "LinearLogprobOutput",
    "PackedLayout",
    "Plan",
    "PreferenceConfig",
    "PreferenceLossOutput",
    "PreferenceTrainer",
    "ReferenceCombination",
    "TeacherCombination",
    "Teachers",
    "TokenDivergenceOutput",
    "TokenLayout",
    "VocabShard",
    "doctor",
    "dpo_loss_from_logps",
    "explain_plan",
    "forest_batch",
    "fused_dpo_loss",
    "fused_preference_loss",
    "linear_logprob",
    "patch_llama_factory",
    "patch_model",
    "patch_trl",
    "preference_loss",
    "preference_loss_from_logps",
    "shift_labels",
    "token_divergence",
    "unpatch_llama_factory",
    "unpatch_model",
    "unpatch_trl",
]

# A package of the same name as the function: it is imported here, and only here can its name be given up.
del doctor

_LOADED_ON_USE = {
    "LOSSES": "fastdpo.losses",
    "ReferenceCombination": "fastdpo.losses",
    "preference_loss": "fastdpo.losses",
    "CarriedContext": "fastdpo.types",
    "DPOLossOutput": "fastdpo.types",
    "Execution": "fastdpo.types",
    "LinearLogprobOutput": "fastdpo.types",
    "LMHead": "fastdpo.integrations.lm_head",  # which teaches it `from_model`
    "PackedLayout": "fastdpo.types",
    "PreferenceLossOutput": "fastdpo.types",
    "TeacherCombination": "fastdpo.types",
    "TokenDivergenceOutput": "fastdpo.types",
    "TokenLayout": "fastdpo.types",
    "VocabShard": "fastdpo.types",
    "Plan": "fastdpo.plan.plan",
    "explain_plan": "fastdpo.plan.explain",
    "doctor": "fastdpo.doctor.diagnosis",
    "dpo_loss_from_logps": "fastdpo.functional.pairs",
    "fused_dpo_loss": "fastdpo.functional.pairs",
    "shift_labels": "fastdpo.functional.pairs",
    "fused_preference_loss": "fastdpo.functional.preference",
    "preference_loss_from_logps": "fastdpo.functional.preference",
    "linear_logprob": "fastdpo.ops.linear_logprob",
    "token_divergence": "fastdpo.ops.token_divergence",
    "Forest": "fastdpo.integrations.forest.segments",
    "forest_batch": "fastdpo.integrations.forest.rows",
    "FusedLMOutput": "fastdpo.integrations.model",
    "HeadStates": "fastdpo.integrations.fused_output",
    "Teachers": "fastdpo.integrations.fused_output",
    "patch_llama_factory": "fastdpo.integrations.llama_factory",
    "unpatch_llama_factory": "fastdpo.integrations.llama_factory",
    "patch_model": "fastdpo.integrations.model",
    "unpatch_model": "fastdpo.integrations.model",
    "patch_trl": "fastdpo.integrations.trl",
    "unpatch_trl": "fastdpo.integrations.trl",
    "PreferenceConfig": "fastdpo.training.settings.config",
    "PreferenceTrainer": "fastdpo.training.loop.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_ON_USE:
        raise AttributeError(f"module 'fastdpo' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_LOADED_ON_USE[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
