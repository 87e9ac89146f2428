"""The config of any family that transformers has, made tiny from its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.integrations.tiny_configs import HIDDEN, VOCAB

_LAYERS = 4
_SIZES = (
    (
        HIDDEN,
        "hidden_size d_model n_embd embed_dim embedding_size dim word_embed_proj_dim emb_dim lru_width "
        "hidden_dim projection_dim out_hidden_size mm_hidden_size text_hidden_size decoder_hidden_size "
        "dim_model proj_hidden_size",
    ),
    (
        48,
        "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff encoder_ffn_dim decoder_ffn_dim dim_ff "
        "d_inner_ff intermediate_size_mlp dense_intermediate_size shared_intermediate_size mlp_hidden_size",
    ),
    (
        24,
        "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size "
        "moe_shared_expert_intermediate_size",
    ),
    (
        _LAYERS,
        "num_hidden_layers n_layer num_layers n_layers depth encoder_layers decoder_layers vision_layers "
        "num_decoder_layers num_encoder_layers",
    ),
    (
        4,
        "num_attention_heads n_head num_heads n_heads attention_heads encoder_attention_heads num_experts "
        "decoder_attention_heads num_local_experts n_routed_experts moe_num_experts num_moe_experts",
    ),
    (
        2,
        "num_key_value_heads kv_n_heads n_head_kv num_kv_heads multi_query_group_num num_experts_per_tok "
        "moe_k top_k_experts num_experts_per_token moe_top_k",
    ),
    (
        8,
        "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim kv_lora_rank q_lora_rank "
        "attention_head_dim kv_channels rotary_dim d_kv attention_head_size",
    ),
    (VOCAB, "vocab_size vocab_size_per_layer_input text_vocab_size"),
    (
        64,
        "max_position_embeddings n_positions n_ctx max_seq_len seq_length max_seq_length "
        "max_target_positions context_length",
    ),
    (1, "n_group topk_group num_expert_group topk_groups"),
)
_SIZE_OF = {name: size for size, names in _SIZES for name in names.split()}
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")

_OUT = object()  # the field's default, as the family makes it of the others
_LATENT = {"num_key_value_heads": 4, "qk_head_dim": _OUT}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SECTIONS = [2, 1, 1]  # half of a head's size, 8
_TEXT_SECTIONS = {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": _SECTIONS}}}
_COMPASS = {"rope_parameters": {"full_attention": _ROPE}, "head_dim": _OUT}
_GEMMA4 = {
    "per_layer_config": _OUT,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 6,
}
_GEMMA4_PLAIN = {**_GEMMA4, "hidden_size_per_layer_input": 0}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
_HYBRID = ["hybrid", "linear_attention"] * 2
_QWEN4 = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "hc_lowrank": 8, "indexer_compress_ratio": 4},
}
_DOTS3 = {"per_layer_config": _OUT, "num_key_value_heads": 4}
# What a family asks for besides, by its type.
_EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "bailing_hybrid", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa")
        + ("minicpm3", "sarvam_mla", "youtu"),
        _LATENT,
    ),
    "bamba": {**_MAMBA, "attn_layer_indices": [1], "layer_types": _OUT},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass": {"text_config": _COMPASS, "vision_config": {"deepstack_visual_indexes": [1, 2, 3]}},
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config": {**_GEMMA4_PLAIN, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, "layer_types": _OUT},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": HIDDEN, "mamba_n_heads": 4, "mamba_n_groups": 1},
    "gemma3n_text": {
        **{"num_kv_shared_layers": 0, "layer_types": _OUT, "activation_sparsity_pattern": _OUT},
        **{"laurel_rank": 4, "hidden_size_per_layer_input": 8, "altup_active_idx": 0},
    },
    "gemma4": {
        "text_config": _GEMMA4,
        "vision_config": {
            **{"head_dim": 8, "num_key_value_heads": 4, "position_embedding_size": 64, "hidden_size": HIDDEN},
            **{"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        },
        "audio_config": None,
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4_PLAIN},
    "gemma4_unified_assistant": {"text_config": _GEMMA4_PLAIN},
    "gemma4_unified_text": _GEMMA4_PLAIN,
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_layers_per_stack": _OUT, "num_hidden_layers": 16, "layer_types": _OUT},
    "hunyuan_v1_dense": {"head_dim": 8, "rope_parameters": _ROPE},
    "hunyuan_v1_moe": {"head_dim": 8, "rope_parameters": _ROPE, "num_experts": 4, "moe_topk": [2] * 4},
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": {**_ROPE, "mrope_section": [1] * 4}}},
    "jamba": {"layer_types": _OUT, "layers_block_type": _OUT, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_LATENT, "linear_attn_config": {"num_heads": 4, "head_dim": 8}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {
        **_LATENT,
        **{"n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 24, "moe_topk": 2},
        **{"num_layers": 2, "num_hidden_layers": 4},
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "ministral": {"head_dim": 8, "rope_parameters": _ROPE},
    **dict.fromkeys(("glm5_next", "kimi_k25", "mistral_large4"), {"text_config": _LATENT}),
    **dict.fromkeys(
        ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
        {"vision_start_token_id": 5, "audio_start_token_id": 6, **_TEXT_SECTIONS},
    ),
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl"), _TEXT_SECTIONS),
    "glm4v_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0]}}},
    "mistral4": {
        **_LATENT,
        "rope_parameters": {
            **{**_ROPE, "partial_rotary_factor": 1.0, "llama_4_scaling_beta": 0.1},
            "original_max_position_embeddings": 64,
        },
    },
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "nemotron_h": {
        **{"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 16}
    },
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 8}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [4, 16]},
    "rembert": {"input_embedding_size": HIDDEN, "output_embedding_size": HIDDEN},
    "roc_bert": {
        **{"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
        **{"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    },
    "rwkv": {"attention_hidden_size": HIDDEN, "intermediate_size": 48},
    "xlnet": {"d_head": 8},
    "xlstm": {"embedding_dim": HIDDEN, "num_blocks": 4},
    "zamba": {
        **{"attention_hidden_size": _OUT, "attention_head_dim": _OUT, "layers_block_type": _OUT},
        **{"layer_types": _OUT, "num_hidden_layers": 12},
    },
    "zamba2": {
        **{"n_mamba_heads": 8, "mamba_d_state": 8, "chunk_size": 16, "layer_types": _HYBRID},
        **{"layers_block_type": _HYBRID, "hybrid_layer_ids": _OUT, "attention_hidden_size": _OUT},
        **{"attention_head_dim": _OUT, "head_dim": _OUT, "kv_channels": _OUT, "mamba_headdim": _OUT},
    },
}


def tiny_config(model_type: str, model: Any) -> Any:
    """The config for a model class, as small as its family lets it be.

    Args:
        model_type: as the auto classes have it.
        model: the class, which may want the text part of the type's config only.
    """
    known = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else model.config_class
    fields = _shrunk(known().to_dict())
    for name in ("transformers_version", "dtype", "architectures", "model_type"):
        fields.pop(name, None)
    _overwrite(fields, _EXTRA.get(model_type, {}))
    config = known(**fields)
    wanted = model.config_class
    if wanted is not None and not isinstance(config, wanted):
        key = getattr(wanted, "base_config_key", None)
        config = getattr(config, key) if key and hasattr(config, key) else config.get_text_config()
    return config


def _shrunk(fields: Mapping[str, Any]) -> dict[str, Any]:
    counts = (fields.get(name) for name in _COUNTS)
    layers = next((count for count in counts if isinstance(count, int)), 0)
    made: dict[str, Any] = {}
    for name, value in fields.items():
        is_config = isinstance(value, dict) and ("model_type" in value or name.endswith("_config"))
        if is_config and not name.startswith("rope"):
            made[name] = _shrunk(value)
        elif isinstance(value, dict) and "mrope_section" in value:
            made[name] = {**value, "mrope_section": _SECTIONS}
        elif name in _SIZE_OF and type(value) is int and value:
            made[name] = min(value, _SIZE_OF[name])
        elif isinstance(value, list | tuple) and len(value) == layers > _LAYERS:
            made[name] = _of_fewer_layers(value)
        elif name.endswith(("_token_id", "token_index", "_token_ids")):
            made[name] = _within_vocabulary(name, value)
        else:
            made[name] = value
    return made


def _of_fewer_layers(values: Any) -> Any:
    """As many as there are layers now, with one of each kind."""
    first = [i for i, value in enumerate(values) if value not in values[:i]][:_LAYERS]
    others = [i for i in range(len(values)) if i not in first]
    return type(values)(values[i] for i in sorted([*first, *others[: _LAYERS - len(first)]]))


def _within_vocabulary(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [2] if any(isinstance(token, int) and token >= VOCAB for token in value) else value
    is_outside = isinstance(value, int) and value >= VOCAB
    return VOCAB - 1 - sum(map(ord, name)) % 13 if is_outside else value


def _overwrite(fields: dict[str, Any], extra: Mapping[str, Any]) -> None:
    for name, value in extra.items():
        if value is _OUT:
            fields.pop(name, None)
        elif isinstance(value, dict) and isinstance(fields.get(name), dict) and name.endswith("_config"):
            _overwrite(fields[name], value)
        else:
            fields[name] = dict(value) if isinstance(value, dict) else value
