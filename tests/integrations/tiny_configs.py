"""Configs of many families of models, as small as they can be."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import transformers

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
    "gemma4": Family(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 6,
            "final_logit_softcapping": 5.0,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
        },
        remark="each layer's heads have a size of their own",
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
    "llava-next": Family(
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        {
            "text_config": {"model_type": "llama", **_DECODER},
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "num_hidden_layers": 2},
            "image_token_index": IMAGE_TOKEN,
            "image_grid_pinpoints": [[8, 8]],
        },
        {},
        "vision and language",
    ),
    "vipllava": Family(
        "VipLlavaForConditionalGeneration",
        "VipLlavaConfig",
        {
            "text_config": {"model_type": "llama", **_DECODER},
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "num_hidden_layers": 2},
            "image_token_index": IMAGE_TOKEN,
            "vision_feature_layer": [-2, 0],
        },
        {},
        "vision and language; images and text",
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral", **_DECODER},
            "vision_config": {"model_type": "pixtral", **_VISION},
            "image_token_index": IMAGE_TOKEN,
        },
        {},
        "vision and language",
    ),
    "cohere2-vl": Family(
        "Cohere2VisionForConditionalGeneration",
        "Cohere2VisionConfig",
        {
            "text_config": {"model_type": "cohere2", **_DECODER, "logit_scale": 0.25},
            "vision_config": {"model_type": "siglip_vision_model", **_VISION},
            "image_token_id": IMAGE_TOKEN,
            "alignment_intermediate_size": 32,
        },
        {},
        "vision and language; its forward leaves out the `logit_scale` of its language model",
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
