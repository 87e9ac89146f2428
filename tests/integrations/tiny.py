"""Tiny random models of many families, with logits as large as trained ones, and their plain logits path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from fastdpo.integrations.model import FusedLMOutput, require_fused_output
from fastdpo.testing import assert_close_to_fp64, assert_logps_close

VOCAB = 199  # a prime, so that no other dimension equals it
HIDDEN = 32

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}
_MOE = {"output_router_logits": False, "num_experts_per_tok": 2}
_MAMBA = {
    "mamba_d_ssm": HIDDEN,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_TEXT = {
    **_DECODER,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
}
IMAGE_TOKEN = VOCAB - 1
_QWEN_VL = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 197,
    "vision_start_token_id": 196,
    "vision_end_token_id": 195,
}


class Family(NamedTuple):
    """A model class of transformers and what its config needs to be tiny."""

    model: str
    config: str
    options: dict[str, Any]
    base: dict[str, Any] = _DECODER
    remark: str = ""  # in docs/models.md


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", {}),
    "llama-tied": Family("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {}),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8}),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", {**_GEMMA, "final_logit_softcapping": 5.0}),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA),
    "gemma3n": Family(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **_GEMMA,
            "final_logit_softcapping": 5.0,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "recurrent-gemma": Family(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {
            "logits_soft_cap": 5.0,
            "lru_width": HIDDEN,
            "block_types": ["recurrent", "attention"],
            "head_dim": 8,
        },
    ),
    "cohere": Family("CohereForCausalLM", "CohereConfig", {"logit_scale": 0.25}),
    "cohere2": Family("Cohere2ForCausalLM", "Cohere2Config", {"logit_scale": 0.25}),
    "granite": Family("GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 4.0}),
    "hyperclovax": Family(
        "HyperCLOVAXForCausalLM", "HyperCLOVAXConfig", {"logits_scaling": 4.0, "head_dim": 8}
    ),
    "granite-moe": Family(
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {"logits_scaling": 4.0, **_MOE, "num_local_experts": 4},
    ),
    "minicpm3": Family(
        "MiniCPM3ForCausalLM",
        "MiniCPM3Config",
        {**_LATENT, "head_dim": 8, "dim_model_base": 8},
        remark="its hidden states are scaled before the head, the same thing without a bias",
    ),
    "falcon-h1": Family(
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {**_MAMBA, "mamba_n_groups": 1, "lm_head_multiplier": 0.5, "head_dim": 8},
    ),
    "phi": Family("PhiForCausalLM", "PhiConfig", {"num_key_value_heads": 4}),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", {}),
    "olmo": Family("OlmoForCausalLM", "OlmoConfig", {}),
    "olmo3": Family("Olmo3ForCausalLM", "Olmo3Config", {}),
    "smollm3": Family("SmolLM3ForCausalLM", "SmolLM3Config", {}),
    "stablelm": Family("StableLmForCausalLM", "StableLmConfig", {}),
    "starcoder2": Family("Starcoder2ForCausalLM", "Starcoder2Config", {}),
    "glm4": Family("Glm4ForCausalLM", "Glm4Config", {"head_dim": 8}),
    "exaone4": Family("Exaone4ForCausalLM", "Exaone4Config", {}),
    "nemotron": Family("NemotronForCausalLM", "NemotronConfig", {}),
    "falcon": Family("FalconForCausalLM", "FalconConfig", {}),
    "llama4": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    ),
    "deepseek-v3": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_LATENT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 24,
        },
    ),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "olmo2": Family("Olmo2ForCausalLM", "Olmo2Config", {}),
    "gpt-neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", {}, _GPT2),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN},
    ),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", {**_MOE, "num_local_experts": 4}),
    "qwen3-moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_MOE, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    ),
    "qwen2-moe": Family(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_MOE, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    "gpt-oss": Family("GptOssForCausalLM", "GptOssConfig", {**_MOE, "num_local_experts": 4, "head_dim": 8}),
    "qwen2-vl": Family(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            **_QWEN_VL,
            "text_config": _QWEN_TEXT,
            "vision_config": {
                "embed_dim": 16,
                "hidden_size": HIDDEN,
                "depth": 1,
                "num_heads": 2,
                "patch_size": 4,
            },
        },
        {},
        "vision and language; images and text",
    ),
    "qwen2.5-vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            **_QWEN_VL,
            "text_config": _QWEN_TEXT,
            "vision_config": {
                "hidden_size": 16,
                "out_hidden_size": HIDDEN,
                "depth": 1,
                "num_heads": 2,
                "patch_size": 4,
                "intermediate_size": 16,
            },
        },
        {},
        "vision and language; images and text",
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_DECODER},
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "image_token_index": IMAGE_TOKEN,
        },
        {},
        "vision and language; images and text",
    ),
    "gemma3-vl": Family(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**_DECODER, "head_dim": 8, "query_pre_attn_scalar": 8},
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 197,
            "eoi_token_index": 196,
        },
        {},
        "vision and language; images and text",
    ),
}


def make_config(family: str = "llama", **options: Any) -> Any:
    made = FAMILIES[family]
    names = vars(getattr(transformers, made.config)())
    base = {name: value for name, value in made.base.items() if name in names}
    # A copy: configs take dicts of sub-configs to pieces.
    return getattr(transformers, made.config)(**copy.deepcopy({**base, **made.options, **options}))


def make_model(family: str = "llama", *, seed: int = 0, **options: Any) -> Any:
    """A float32 model in evaluation mode whose logits have a standard deviation of about 3."""
    torch.manual_seed(seed)
    config = make_config(family, **options)
    model = getattr(transformers, FAMILIES[family].model)(config)
    model.set_experts_implementation("eager")  # the default has no float64
    head = model.get_output_embeddings()
    with torch.no_grad():
        if head.bias is not None:
            head.bias.normal_()
        spread = model(input_ids=torch.arange(VOCAB)[None, :32]).logits.std()
        # A cap would hide the spread: these heads are scaled by what their uncapped logits need.
        head.weight.mul_(3 / spread if spread > 0.1 else 30.0)
    return model.eval()


class Batch(NamedTuple):
    """Right-padded sequences, the prompt ignored, and what flows back to every log-probability."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    labels: Tensor  # (B, T)
    upstream: Tensor  # (B, T) fp32

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def make_batch(batch: int = 3, length: int = 12, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    for row in range(batch):
        labels[row, : 2 * row] = -100
        if row:
            attention_mask[row, length - row :] = 0
    labels[attention_mask == 0] = -100
    upstream = torch.randn(batch, length, generator=generator)
    return Batch(input_ids, attention_mask, labels, upstream)


BATCH = make_batch()


def fused(model: nn.Module, **arguments: Any) -> FusedLMOutput:
    """A patched model's answer to `BATCH`; ``arguments`` replace or add to the call's."""
    call = {**BATCH.inputs, "labels": BATCH.labels, "return_logps": True, **arguments}
    return require_fused_output(model(**call))


def plain_logps(model: nn.Module, batch: Batch, **inputs: Any) -> Tensor:
    """``(B, T)`` log-probabilities as users make them today, from the unpatched forward's logits."""
    logits = model(**{**batch.inputs, **inputs}).logits
    logits = logits[:, -batch.labels.shape[1] : -1]  # behind the virtual tokens of PEFT's prompt tuning
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    targets = batch.labels[:, 1:]
    picked = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.nn.functional.pad(picked.masked_fill(targets == -100, 0.0), (1, 0))


def fused_logps(model: nn.Module, batch: Batch, **inputs: Any) -> Tensor:
    return model(**{**batch.inputs, **inputs}, labels=batch.labels, return_logps=True).logps


class Step(NamedTuple):
    """Log-probabilities and the gradients of their weighted sum."""

    logps: Tensor
    grads: dict[str, Tensor]


def run_step(model: nn.Module, batch: Batch, logps_of: Callable[..., Tensor], **inputs: Any) -> Step:
    model.zero_grad(set_to_none=True)
    logps = logps_of(model, batch, **inputs)
    (logps * batch.upstream.to(logps.dtype)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(logps.detach(), grads)


class Expected(NamedTuple):
    """The unpatched model's step in (nearly) fp64 and in its own dtype."""

    truth: Step
    eager: Step


def expected_step(model: nn.Module, batch: Batch) -> Expected:
    """Through the logits; ``model`` is not patched, and keeps fp64 as far as its own code does."""
    truth = run_step(copy.deepcopy(model).double(), batch, plain_logps)
    return Expected(truth, run_step(model, batch, plain_logps))


# Parameters of fewer entries are held to the rule together: which of two roundings of one number is the luckier
# says nothing, and with many families and CPUs one of them is always luckier by more than twice.
FEW_ENTRIES = 64
# Of which eager gets less right than this has a gradient of rounding alone, and would hide the others' errors.
ROUNDING_ALONE = 2**-10


def assert_step_close(ours: Step, expected: Expected, *, renamed: Callable[[str], str] = str) -> None:
    """Log-probabilities and every gradient by the rule; ``renamed`` gives a wrapper's names."""
    truth, eager = expected
    assert_logps_close(ours.logps, truth.logps.double(), torch.float32)
    assert ours.grads.keys() == {renamed(name) for name in eager.grads}
    together: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, own in eager.grads.items():
        three = (ours.grads[renamed(name)], truth.grads[name].double(), own)
        largest = three[1].abs().max()
        if own.numel() <= FEW_ENTRIES and (own - three[1]).abs().max() < ROUNDING_ALONE * largest:
            unit = torch.exp2(largest.log2().ceil()).to(own.dtype)  # a power of two: dividing by it is exact
            together[name] = tuple((x / unit).flatten() for x in three)  # type: ignore[assignment]
        else:
            assert_close_to_fp64(*three, name=name)
    if together:
        columns = [torch.cat(column) for column in zip(*together.values(), strict=True)]
        assert_close_to_fp64(*columns, name=f"{', '.join(together)} in one")  # type: ignore[misc]
