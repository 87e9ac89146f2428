"""Bases of 4 and 8 bits, made ready for an adapter."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastdpo.integrations.lm_head import unwrap
from fastdpo.training.settings.checkpointing import recomputes_activations
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.engines import told_engine


def is_quantised(model: Any) -> bool:
    """Whether transformers loaded a model's weights, or a peft model's base, in fewer than 16 bits."""
    return bool(getattr(unwrap(model), "is_quantized", False))


def prepare_quantised(model: Any, args: PreferenceConfig, *, is_adapted: bool) -> None:
    """Make a base of few bits ready for an adapter, with peft's ``prepare_model_for_kbit_training``.

    That freezes it and makes what is of 16 bits fp32: norms are small. Head and embeddings are not: under
    autocast they go back to the dtype that they were loaded in, whose products the head makes anyway.

    Raises:
        ValueError: no adapter, which alone can be trained, or an engine that would split the base.
    """
    if not is_adapted:
        raise ValueError(
            "model: got one of 4 or 8 bits without an adapter, wanted one, or peft_config: weights of so few "
            "bits cannot be trained"
        )
    engine = told_engine(args)
    if engine in ("FSDP2", "ZeRO-3"):
        raise ValueError(
            f"model: got one of 4 or 8 bits under {engine}, wanted DDP or ZeRO-2: what is packed is not split"
        )
    from peft import prepare_model_for_kbit_training

    inner: Any = unwrap(model)
    compute_alike(inner)
    kept: dict[Any, Any] = {layer: layer.weight.dtype for layer in _ends_of(inner)}
    how = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
    trained = [p for p in model.parameters() if p.requires_grad] if model is not inner else []
    prepare_model_for_kbit_training(
        inner, use_gradient_checkpointing=recomputes_activations(args), gradient_checkpointing_kwargs=how
    )
    for layer, dtype in kept.items() if args.bf16 or args.fp16 else ():
        layer.weight.data = layer.weight.data.to(dtype)
    for parameter in trained:  # of an adapter that came with the model
        parameter.requires_grad_(True)


def compute_alike(model: nn.Module) -> None:
    """Let bitsandbytes' layers compute the same in training and in evaluation.

    On a CPU they have other products in evaluation, and the policy would not equal its reference.
    """
    for layer in model.modules():
        is_theirs = type(layer).__module__.startswith("bitsandbytes.")
        if is_theirs and _in_training not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_in_training)


def _in_training(layer: nn.Module, _: Any) -> None:
    layer.training = True


def _ends_of(model: Any) -> list[nn.Module]:
    """Embeddings and head, which bitsandbytes leaves as they are; tied ones twice."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [end for end in ends if isinstance(getattr(end, "weight", None), nn.Parameter)]
