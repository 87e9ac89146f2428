"""Tiny vision-language models of each family, their processors made by hand, and rows with images."""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from tests.training.conftest import bpe_text, made_tokenizer, sentence

VOCAB = 420  # room for the words of every processor behind those of the tokenizer
TEMPLATE = (
    "{%- for message in messages %}<|{{ message['role'] }}|>\n"
    "{%- if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<eos>\n{%- endfor %}{% if add_generation_prompt %}<|assistant|>\n{%- endif %}"
)
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_SPLIT = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]


class Family:
    """How to make a model and its processor.

    Args:
        model, config, processor: names of classes of transformers.
        words: special tokens: what a template has in the place of an image, then others.
        settings: of the config, with ``image`` for the id of the token of images.
        pictures: module and class of the image processor, and its settings.
        of_processor: settings of the processor.
        named: special tokens that the tokenizer has by a name.
        seen: of the words the one that features take the place of.
    """

    def __init__(
        self, model: str, config: str, processor: str, words: Sequence[str], settings: dict[str, Any],
        pictures: tuple[str, str, dict[str, Any]], of_processor: dict[str, Any] | None = None,
        named: dict[str, str] | None = None, seen: str | None = None, shown: str | None = None,
    ) -> None:  # fmt: skip
        self.model, self.config, self.processor, self.words = model, config, processor, list(words)
        self.settings, self.pictures, self.of_processor = settings, pictures, of_processor or {}
        self.named, self.seen, self.shown = named or {}, seen or words[0], shown or words[0]


def _qwen(name: str, vision: dict[str, Any]) -> Family:
    return Family(
        f"{name}ForConditionalGeneration", f"{name}Config", f"{name}Processor",
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
        {
            "text_config": {**_TEXT, "rope_parameters": dict(_ROPE), "head_dim": 8},
            "vision_config": {"depth": 1, "num_heads": 2, "patch_size": 4, **vision},
            "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
        },
        ("qwen2_vl", "Qwen2VLImageProcessor", {"patch_size": 4, "min_pixels": 64, "max_pixels": 1024}),
        {"video_processor": None}, shown="<|vision_start|><|image_pad|><|vision_end|>",
    )  # fmt: skip


def _idefics(name: str, pictures: str) -> Family:
    return Family(
        f"{name}ForConditionalGeneration", f"{name}Config", f"{name}Processor",
        ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *_SPLIT],
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": dict(_TOWER), "scale_factor": 1, "image_token_id": "<image>",
        },
        (pictures, f"{name}ImageProcessor",
         {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 8}}),
        {"image_seq_len": 4, **({"video_processor": None} if name == "SmolVLM" else {})},
    )  # fmt: skip


FAMILIES = {
    "llava": Family(
        "LlavaForConditionalGeneration", "LlavaConfig", "LlavaProcessor", ["<image>"],
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_TOWER},
            "image_token_index": "<image>",
        },
        ("clip", "CLIPImageProcessor",
         {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}),
        {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava-onevision": Family(
        "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig", "LlavaOnevisionProcessor",
        ["<image>", "<video>"],
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "vision_config": {"model_type": "siglip_vision_model", **_TOWER},
            "image_token_index": "<image>", "video_token_index": "<video>",
            "image_grid_pinpoints": [[8, 8], [8, 16], [16, 8], [16, 16]],
        },
        ("llava_onevision", "LlavaOnevisionImageProcessor",
         {"size": {"height": 8, "width": 8}, "image_grid_pinpoints": [[8, 8], [8, 16], [16, 8], [16, 16]]}),
        {"num_image_tokens": 4, "vision_feature_select_strategy": "full", "video_processor": None},
    ),
    "qwen2-vl": _qwen("Qwen2VL", {"embed_dim": 16, "hidden_size": 32}),
    "qwen2.5-vl": _qwen("Qwen2_5_VL", {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16}),
    "qwen3-vl": _qwen(
        "Qwen3VL",
        {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16, "deepstack_visual_indexes": [0]},
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration", "Gemma3Config", "Gemma3Processor",
        ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
        {
            "text_config": {**_TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 512},
            "vision_config": dict(_TOWER), "mm_tokens_per_image": 4,
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>",
        },
        ("gemma3", "Gemma3ImageProcessor", {"size": {"height": 8, "width": 8}}),
        {"image_seq_length": 4},
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        seen="<image_soft_token>",
    ),
    "idefics3": _idefics("Idefics3", "idefics3"),
    "smolvlm": _idefics("SmolVLM", "smolvlm"),
    "internvl": Family(
        "InternVLForConditionalGeneration", "InternVLConfig", "InternVLProcessor",
        ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"],
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "vision_config": {**_TOWER, "image_size": [8, 8], "patch_size": [4, 4]},
            "image_token_id": "<IMG_CONTEXT>", "image_seq_length": 1, "downsample_ratio": 0.5,
        },
        ("got_ocr2", "GotOcr2ImageProcessor",
         {"size": {"height": 8, "width": 8}, "min_patches": 1, "max_patches": 4}),
        {"image_seq_length": 1, "video_processor": None},
        {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
         "video_token": "<video>"},
    ),
}  # fmt: skip


@cache
def _bpe() -> str:
    return bpe_text()


def make_processor(family: str, **settings: Any) -> Any:
    """The family's processor around a tokenizer of few words, with a chat template."""
    made = FAMILIES[family]
    template = TEMPLATE.replace("IMAGE", made.shown)
    tokenizer = made_tokenizer(_bpe(), chat_template=template, extra_special_tokens=dict(made.named))
    tokenizer.add_special_tokens({"additional_special_tokens": made.words})
    assert len(tokenizer) <= VOCAB
    module, name, options = made.pictures
    pictures = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    kind = _without_videos(getattr(transformers, made.processor))
    return kind(
        image_processor=getattr(pictures, f"{name}Pil")(**options),
        tokenizer=tokenizer,
        chat_template=template,
        **{**made.of_processor, **settings},
    )


@cache
def _without_videos(kind: Any) -> Any:
    """The class, but that its processor of videos, which needs torchvision, may be missing."""
    checks = {"check_argument_for_proper_class": lambda self, name, value: None}
    if kind.__name__ == "SmolVLMProcessor":  # which reads out times of videos
        importlib.import_module(kind.__module__).num2words = str
    return type(kind.__name__, (kind,), checks)


def make_model(family: str, *, seed: int = 0) -> Any:
    """A float32 model of the family, with logits of some size."""
    made = FAMILIES[family]
    tokenizer = make_processor(family).tokenizer
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in made.words}
    settings = {name: ids.get(value, value) if isinstance(value, str) else value
                for name, value in made.settings.items()}  # fmt: skip
    torch.manual_seed(seed)
    config = getattr(transformers, made.config)(**_copied(settings), tie_word_embeddings=False)
    model = getattr(transformers, made.model)(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
        for weight in model.parameters():
            if weight.dim() > 1 and not weight.any():  # Gemma 3's projector
                weight.normal_(std=0.1)
    return model.eval()


def _copied(value: Any) -> Any:
    return {name: _copied(item) for name, item in value.items()} if isinstance(value, dict) else value


def picture(seed: int = 0, size: tuple[int, int] = (20, 12)) -> Any:
    """An image of noise, of PIL."""
    noise = np.random.RandomState(seed).randint(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def image_rows(count: int, folder: Path, seed: int = 1, *, text_only: int = 0) -> list[dict[str, Any]]:
    """Pairs of messages with a picture each, in files of ``folder``, the last ``text_only`` without."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        path = folder / f"{number}.png"
        picture(number, (rng.choice([12, 20, 28]), rng.choice([12, 16]))).save(path)
        rows.append(
            {
                "images": [str(path)] if number < count - text_only else [],
                "prompt": [{"role": "user", "content": sentence(rng, rng.randint(2, 8))}],
                "chosen": [{"role": "assistant", "content": sentence(rng, rng.randint(1, 9))}],
                "rejected": [{"role": "assistant", "content": sentence(rng, rng.randint(1, 9)) + "."}],
            }
        )
    return rows
