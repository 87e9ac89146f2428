"""PEFT's virtual tokens: embeddings in front of every row (prompt tuning ...), or a prefix in the cache.

PEFT is not imported: its models are recognised by what they are made of. ``PeftModelForCausalLM.forward``
puts ``num_virtual_tokens`` embeddings before those of ``input_ids``, lengthens mask and labels, and calls the
causal LM inside, which cannot know how many there are. So the class of the PEFT model is exchanged as well,
for one whose forward says so; all results are then of the caller's own tokens again. A prefix in the cache
(prefix tuning) leaves the rows as long as they were.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from fastdpo.integrations.patched_class import make_subclass
from fastdpo.integrations.probe import refuse

_IN_FRONT = ("PROMPT_TUNING", "P_TUNING")
_IN_THE_CACHE = ("PREFIX_TUNING",)


def is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def has_virtual_tokens(model: Any) -> bool:
    """Whether it is a PEFT model of prompt tuning or its kin, rather than of adapters in the layers."""
    return is_peft(model) and any(config.is_prompt_learning for config in model.peft_config.values())


def check_virtual_tokens(model: Any) -> None:
    """Refuse a PEFT model of virtual tokens whose forward is not the one described above."""
    if not has_virtual_tokens(model):
        return
    kinds = sorted({_kind(config) for config in model.peft_config.values()})
    known = (*_IN_FRONT, *_IN_THE_CACHE)
    if unknown := [kind for kind in kinds if kind not in known]:
        why = "its loss is its own, made from logits" if unknown == ["CPT"] else "its forward is not known"
        refuse(model, f"{', '.join(unknown)}: {why}. Wanted one of {', '.join(known)}, or LoRA")
    if type(model).forward.__qualname__ != "PeftModelForCausalLM.forward":
        refuse(
            model, 'its virtual tokens are not added by PeftModelForCausalLM. Wanted task_type="CAUSAL_LM"'
        )


def num_in_front(model: Any) -> int:
    """How many virtual tokens the forward of a PEFT model puts before every row."""
    config = model.active_peft_config
    return int(config.num_virtual_tokens) if _kind(config) in _IN_FRONT else 0


def has_prefix(model: Any) -> bool:
    """Whether it is a PEFT model with virtual tokens in the cache."""
    return is_peft(model) and any(_kind(config) in _IN_THE_CACHE for config in model.peft_config.values())


def describe_virtual_tokens(model: Any) -> str:
    """For `fastdpo.doctor`."""
    config = model.active_peft_config
    where = "before every row" if num_in_front(model) else "in the cache before every row"
    return f"{config.num_virtual_tokens} {where} ({_kind(config)})"


def is_patched_wrapper(model: nn.Module) -> bool:
    return hasattr(type(model), "_fastdpo_counts_virtual_tokens")


@functools.cache
def patched_wrapper(original: Any) -> Any:
    """The subclass of a PEFT model's class that says how many virtual tokens there are."""

    def forward(
        self: Any, *args: Any, return_logps: bool = False, return_states: bool = False, **kwargs: Any
    ) -> Any:
        if not (return_logps or return_states):
            return original.forward(self, *args, **kwargs)
        if kwargs.get("row_batches") is not None:
            raise ValueError(
                "row_batches: got a value for a PEFT model with virtual tokens, which PEFT puts before "
                "padded rows only; wanted input_ids and labels"
            )
        kwargs["num_virtual_tokens"] = num_in_front(self)
        asked = {"return_logps": return_logps, "return_states": return_states}
        return original.forward(self, *args, **asked, **kwargs)

    return make_subclass(original, forward, (_rebuild, original), _fastdpo_counts_virtual_tokens=True)


def _rebuild(original: Any) -> Any:
    patched = patched_wrapper(original)
    return patched.__new__(patched)


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))
