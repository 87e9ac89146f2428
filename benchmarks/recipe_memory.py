"""The memory that stands in the comments of `recipes/*.yaml`: counted, as `fastdpo doctor --context` does.

    python -m benchmarks.recipe_memory             # all of them, some minutes on two cores
    python -m benchmarks.recipe_memory NAME ...    # some

Configs are written by hand, from what is public of the models; no weights are read. Nothing here is measured.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import ROOT
from fastdpo.doctor.context import GIB, activation_bytes, context_needs, meta_model
from fastdpo.plan.schedule import MIB
from fastdpo.training.settings.yaml_file import read_settings
from fastdpo.types import Execution

RECIPES = ROOT / "recipes"
_LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip


def _qwen3(hidden: int, inner: int, layers: int, heads: int, *, is_tied: bool) -> tuple[str, dict[str, Any]]:
    sizes = {
        "vocab_size": 151936, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "tie_word_embeddings": is_tied,
    }  # fmt: skip
    return "Qwen3Config", sizes


# By the beginning of a recipe's name.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("LlamaConfig", _LLAMA_8B),
    "qwen3_0_6b": _qwen3(1024, 3072, 28, 16, is_tied=True),
    "qwen3_1_7b": _qwen3(2048, 6144, 28, 16, is_tied=True),
    "qwen3_4b": _qwen3(2560, 9728, 36, 32, is_tied=True),
    "qwen3_8b": _qwen3(4096, 12288, 36, 32, is_tied=False),
    "qwen3_14b": _qwen3(5120, 17408, 40, 40, is_tied=False),
    "qwen3_32b": _qwen3(5120, 25600, 64, 64, is_tied=False),
    "gemma3_1b": ("Gemma3TextConfig", {
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        "max_position_embeddings": 32768,
    }),
    "smollm2_1_7b": ("LlamaConfig", {
        "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }),
    "mixtral_8x7b": ("MixtralConfig", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    }),
    "llava_1_5_7b": ("LlavaConfig", {
        "text_config": {
            "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
    }),
}  # fmt: skip


def predicted(path: Path) -> list[str]:
    """The lines of a recipe's comment, without their marks."""
    import transformers

    told = read_settings(path)
    kind, sizes = next(found for begin, found in CONFIGS.items() if path.stem.startswith(begin))
    config = getattr(transformers, kind)(**sizes)
    is_lora, tokens = told.get("use_peft", False), told["max_length"]
    # The loop's own choice: the checkpoint's under an adapter, else fp32.
    dtype = torch.bfloat16 if is_lora else torch.float32
    chunk = told.get("context_chunk")
    beside = ""
    if chunk:
        needs = context_needs(config, chunk=chunk, is_lora=True, dtype=dtype)
        step = needs.curves["carried"].without(needs.keys_values).at(tokens) - needs.trained
        beside = f" {needs.keys_values.at(tokens) / GIB:.0f} GiB of keys and values lie in host memory."
    else:
        step = activation_bytes(config, tokens, "checkpointed", dtype=dtype, is_lora=is_lora)
    parameters = list(meta_model(config, dtype, is_lora, "plain").named_parameters())
    weights = sum(one.nbytes for _, one in parameters)
    trained = sum(one.nbytes for _, one in parameters if one.requires_grad)
    if told.get("load_in_4bit"):
        # Half a byte for each number of a linear layer of the backbone, and a scale in fp32 for each 64.
        of_layers = sum(one.nbytes for name, one in parameters if ".layers." in name and one.ndim == 2)
        of_layers -= trained
        weights -= round(of_layers * (1 - (0.5 + 4 / 64) / dtype.itemsize))
    head = int(1.25 * Execution().workspace_mib + Execution().cache_mib) * MIB
    parts = {
        "weights": weights, "gradients": trained, "Adam's moments": 2 * trained,
        "activations": step, "the head": head,
    }  # fmt: skip
    way = f"in chunks of {chunk}" if chunk else "with activation checkpointing"
    lines = [
        f"Predicted as `fastdpo doctor --context {tokens}` does, not measured: one row of so many tokens,",
        f"{way}, in {'bf16' if is_lora else 'fp32 (under autocast activations are less)'}:",
        ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        + f": {sum(parts.values()) / GIB:.1f} GiB on one GPU.{beside}",
    ]
    if told.get("load_in_4bit"):
        lines.append(
            "Weights in 4 bits are reckoned, not counted: 4.5 bits for each number of a linear layer."
        )
    if told.get("engine") == "fsdp2":
        split = (weights + 3 * trained) / 8
        lines.append(f"Over 8 GPUs weights, gradients and moments are {split / GIB:.1f} GiB on each.")
    if hasattr(config, "vision_config"):
        lines.append("What images take on their way to tokens is not in it.")
    if is_lora:
        lines.append("Adapters are counted as rank 16 on all linear layers but the head.")
    return [*lines, "Time is not predicted: no GPU has been measured yet."]


def main(names: list[str]) -> int:
    paths = [path for path in sorted(RECIPES.glob("*.yaml")) if "# memory: begin" in path.read_text()]
    known: dict[tuple[Any, ...], list[str]] = {}
    for path in paths:
        if names and path.stem not in names:
            continue
        told = read_settings(path)
        begin = next(begin for begin in CONFIGS if path.stem.startswith(begin))
        key = (
            begin,
            *(told.get(k) for k in ("use_peft", "max_length", "context_chunk", "engine", "load_in_4bit")),
        )
        if key not in known:
            known[key] = predicted(path)
        block = "".join(f"# {line}\n" for line in known[key])
        text = re.sub(
            r"# memory: begin\n.*?# memory: end", f"# memory: begin\n{block}# memory: end",
            path.read_text(), flags=re.DOTALL,
        )  # fmt: skip
        path.write_text(text)
        print(f"{path.stem}: {' '.join(known[key])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
