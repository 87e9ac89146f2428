"""What PEFT put on a head: the copy it trains whole, or LoRA, as the layer's own forward would use it now.

PEFT is not imported: its layers are recognised by what they are made of. The one layer whose forward is
known, ``base(x) + sum of B(A(dropout(x))) * scaling`` over the active adapters, is `peft.tuners.lora`'s
``Linear`` without a variant; all else on a head is refused by its name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from fastdpo.integrations.probe import refuse
from fastdpo.types import HeadAdapter

_LORA_LINEAR = ("peft.tuners.lora.layer", "Linear")


def trained_copy(wrapper: Any) -> Any:
    """The copy in use of a head that PEFT trains whole (``modules_to_save``): its own forward's choice."""
    names = wrapper.active_adapters
    if wrapper.disable_adapters or not names or names[0] not in wrapper.modules_to_save:
        return wrapper.original_module
    return wrapper.modules_to_save[names[0]]


def is_trained_copy(head: Any) -> bool:
    return hasattr(head, "modules_to_save") and hasattr(head, "original_module")


def has_adapter(head: Any) -> bool:
    """Whether PEFT put a layer of its own around the head."""
    return hasattr(head, "base_layer")


def check_adapter_layer(model: nn.Module, layer: Any, *, may_have_hooks: bool) -> None:
    """Refuse every layer around a head but PEFT's LoRA ``Linear``, and what would not run inside it.

    Args:
        may_have_hooks: an engine's, which run where the layer is called.
    """
    kind = next(k for k in type(layer).__mro__ if not k.__qualname__.startswith("FSDP"))
    if (kind.__module__, kind.__qualname__) != _LORA_LINEAR:
        refuse(
            model,
            f"its head carries {kind.__module__}.{kind.__qualname__}; of the adapters of a head only LoRA on "
            "a floating-point nn.Linear is supported. Leave lm_head out of target_modules",
        )
    parts = [layer, *layer.lora_A.values(), *layer.lora_B.values()]
    has_hooks = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    if (has_hooks and not may_have_hooks) or "forward" in vars(layer):
        refuse(model, "the LoRA layer of its head has forward hooks or a forward of its own. Remove them")


class FoundAdapter(NamedTuple):
    """The modules of a LoRA; their weights may be elsewhere, and are not read before `weights`."""

    down: nn.Linear
    up: nn.Linear
    scale: float
    dropout: float

    def weights(self) -> HeadAdapter:
        return HeadAdapter(self.down.weight, self.up.weight, self.scale, self.dropout)


def find_adapter(model: nn.Module, layer: Any) -> FoundAdapter | None:
    """The LoRA that ``layer`` (checked) adds to its base layer now; None where it adds nothing.

    Raises:
        ValueError: several adapters at once, a variant (DoRA ...), a bias, or merged weights switched off.
    """
    if layer.disable_adapters:
        if layer.merged:
            refuse(model, "the adapter of its head is merged and switched off. Call unmerge_adapter() first")
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or not names:
        return None
    if len(names) > 1:
        refuse(model, f"its head has several active adapters ({', '.join(names)}). Activate one at a time")
    (name,) = names
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name]).__name__
        why = "DoRA's norms need W + B A whole" if variant.startswith("Dora") else "its product is not LoRA's"
        refuse(
            model,
            f"the adapter of its head is a variant of LoRA ({variant}; {why}). Use plain LoRA there, or "
            "leave lm_head out of target_modules",
        )
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    for part, module in (("lora_A", down), ("lora_B", up)):
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            refuse(model, f"{part} of its head is no plain nn.Linear")
        if module.bias is not None:
            refuse(model, f"{part} of its head has a bias (lora_bias=True). Train the head's LoRA without it")
    if type(dropout) not in (nn.Dropout, nn.Identity):
        refuse(model, f"the dropout of its head's adapter is a {type(dropout).__name__}, wanted nn.Dropout")
    rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return FoundAdapter(down, up, float(layer.scaling[name]), rate)
