"""PEFT's ways to change a model, as a table: what is computed, and what is refused and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tests.integrations.tiny import make_model

BACKBONE = ["q_proj", "v_proj"]
HEAD = [*BACKBONE, "lm_head"]


def with_lora(model: nn.Module, **options: Any) -> Any:
    """``model`` under LoRA whose B is not 0, in evaluation mode."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "target_modules": BACKBONE, "task_type": "CAUSAL_LM", **options})
    wrapped = peft.get_peft_model(model, config)
    fill_adapters(wrapped)
    return wrapped.eval()


def fill_adapters(model: nn.Module) -> None:
    """What starts at 0, random: nothing would reach the other half, nor differ from the base model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("lora_B" in name or "lora_embedding_A" in name) and not parameter.any():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))


def with_peft(kind: str, model: nn.Module | None = None, **options: Any) -> Any:
    """``model`` under another of PEFT's configs."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(make_model() if model is None else model, config).eval()


class Case(NamedTuple):
    """One row of the PEFT table; ``refused`` is a pattern of the reason, or None where it is computed."""

    text: str
    make: Callable[[], Any]
    refused: str | None = None
    remark: str = ""


def _with_head_copy() -> Any:
    model = with_lora(make_model(), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    return model


def _with_two_adapters(active: str) -> Any:
    peft = pytest.importorskip("peft")
    model = with_lora(make_model(), target_modules=HEAD)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=HEAD, task_type="CAUSAL_LM"))
    fill_adapters(model)
    model.set_adapter(active)
    return model.eval()


def _with_both_adapters() -> Any:
    model = _with_two_adapters("other")
    model.base_model.set_adapter(["default", "other"])
    return model


def _merged() -> Any:
    model = with_lora(make_model(), target_modules=HEAD)
    model.merge_adapter()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("base_layer" in name)  # PEFT itself trains nothing that is merged
    return model


class QuantisedLinear(nn.Linear):
    """Stands for the linear layers of the 8-bit and 4-bit libraries, which need a GPU."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", None)
        scale = linear.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), False)
        self.register_buffer("weight_scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.weight_scale.to(x.dtype))


def quantised(*names: str) -> Any:
    """A Llama whose layers of these names are `QuantisedLinear`."""
    model = make_model()
    for path, module in list(model.named_modules()):
        if path.rsplit(".", 1)[-1] in names:
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rsplit(".", 1)[-1], QuantisedLinear(module))
    return model


CASES = {
    "lora": Case("LoRA on the backbone", lambda: with_lora(make_model())),
    "dora": Case("DoRA on the backbone", lambda: with_lora(make_model(), use_dora=True)),
    "rslora": Case("rsLoRA on the backbone", lambda: with_lora(make_model(), use_rslora=True)),
    "ia3": Case(
        "IA3 on the backbone",
        lambda: with_peft(
            "IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "modules_to_save": Case('`modules_to_save=["lm_head"]`', _with_head_copy),
    "quantised backbone": Case(
        "LoRA beside quantised layers of the backbone",
        lambda: with_lora(quantised("up_proj", "down_proj")),
        remark="what the backbone is made of does not concern the head; tested with a stand-in, on a CPU",
    ),
    "tied": Case("LoRA on the backbone, tied embeddings", lambda: with_lora(make_model("llama-tied"))),
    "tied, embeddings": Case(
        "LoRA on `embed_tokens`, tied embeddings",
        lambda: with_lora(make_model("llama-tied"), target_modules=[*BACKBONE, "embed_tokens"]),
        remark="the head keeps the plain weight, as in PEFT's forward",
    ),
    "tied, both": Case(
        "LoRA on `embed_tokens` and `lm_head`, tied embeddings",
        lambda: with_lora(make_model("llama-tied"), target_modules=[*HEAD, "embed_tokens"]),
    ),
    "head": Case(
        "LoRA on `lm_head`",
        lambda: with_lora(make_model(), target_modules=HEAD),
        remark="fused: `W + BA` is never made; modes `score`, `cache`, `recompute`",
    ),
    "head, rslora": Case(
        "rsLoRA on `lm_head`",
        lambda: with_lora(make_model(), target_modules=HEAD, use_rslora=True, lora_alpha=6),
    ),
    "head, capped": Case(
        "LoRA on a head with a softcap", lambda: with_lora(make_model("gemma2"), target_modules=HEAD)
    ),
    "head, bias": Case(
        "LoRA on a head with a bias", lambda: with_lora(make_model("phi"), target_modules=HEAD)
    ),
    "head, several": Case(
        "LoRA on `lm_head`, several adapters, one active", lambda: _with_two_adapters("other")
    ),
    "head, merged": Case("LoRA on `lm_head`, merged", _merged, remark="a plain weight"),
    "head, both": Case(
        "LoRA on `lm_head`, several active adapters", _with_both_adapters, "several active adapters"
    ),
    "head, dora": Case(
        "DoRA on `lm_head`",
        lambda: with_lora(make_model(), target_modules=HEAD, use_dora=True),
        "DoraLinearVariant.*norms need W",
        "its norms need the sum of weight and adapter",
    ),
    "head, bias of B": Case(
        "LoRA on `lm_head` with `lora_bias=True`",
        lambda: with_lora(make_model("phi"), target_modules=["lm_head"], lora_bias=True),
        "lora_bias=True",
    ),
    "head, loha": Case(
        "another adapter on `lm_head` (LoHa ...)",
        lambda: with_peft("LoHaConfig", target_modules=HEAD),
        "peft.tuners.loha.*only LoRA",
    ),
    "head, quantised": Case(
        "a quantised `lm_head`", lambda: quantised("lm_head"), "quantised .*Leave the head out"
    ),
    "tokens": Case(
        "`trainable_token_indices` of tied embeddings",
        lambda: with_lora(make_model("llama-tied"), trainable_token_indices={"embed_tokens": [1, 2]}),
        "TrainableTokens",
    ),
    "prompt": Case(
        "prompt tuning",
        lambda: with_peft("PromptTuningConfig", num_virtual_tokens=3),
        remark="results are of the caller's own tokens, the first of which is not scored",
    ),
    "prompt, capped": Case(
        "prompt tuning before a head with a softcap, tied",
        lambda: with_peft("PromptTuningConfig", make_model("gemma2"), num_virtual_tokens=3),
    ),
    "prompt, bias": Case(
        "prompt tuning before a head with a bias",
        lambda: with_peft("PromptTuningConfig", make_model("phi"), num_virtual_tokens=5),
    ),
    "prompt, lora": Case(
        "prompt tuning around LoRA on `lm_head`",
        lambda: with_peft(
            "PromptTuningConfig", with_lora(make_model(), target_modules=HEAD), num_virtual_tokens=3
        ),
    ),
    "p-tuning": Case(
        "P-tuning",
        lambda: with_peft("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=16),
    ),
    "prefix": Case("prefix tuning", lambda: with_peft("PrefixTuningConfig", num_virtual_tokens=3)),
    "cpt": Case(
        "CPT",
        lambda: with_peft("CPTConfig", cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
        "CPT: its loss is its own",
        "its loss is its own, made from logits",
    ),
}
