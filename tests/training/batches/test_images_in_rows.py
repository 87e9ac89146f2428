"""Rows without padding that have images: what models compute exactly, and images that are encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.integrations.lm_head import unwrap
from fastdpo.integrations.model import patch_model
from fastdpo.integrations.processor import ImageTokens
from fastdpo.training.batches.collate import PaddedCollator, RowCollator
from fastdpo.training.batches.forward import sequence_logps
from fastdpo.training.batches.plan import RowCosts
from fastdpo.training.batches.probe import refusals
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.source import read_rows
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.choices import ARRANGEMENTS_OF
from fastdpo.training.settings.encoding import EncodingOptions
from tests.training.conftest import quick_args, tiny_llama
from tests.training.eyes import FAMILIES, image_rows, make_model, make_processor, picture

CASES = [(layout, name) for layout in ("packed", "shared_prompt") for name in ARRANGEMENTS_OF[layout]]
ALONE = [("packed", "separate"), ("packed", "bucketed")]
COSTS = RowCosts(1e4, 1e-2, False)


def encoded(rows: Any, processor: Any) -> Any:
    return encode_rows(read_rows(rows), processor, EncodingOptions())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_probe_finds(family: str):
    model = patch_model(make_model(family))
    found = refusals(model, CASES, longest=100, images=ImageTokens.of(make_processor(family)))
    allowed = [case for case, reason in found.items() if reason is None]
    of_flat_positions = family in ("llava", "llava-onevision", "idefics3", "smolvlm", "internvl")
    assert allowed == (CASES if of_flat_positions else ALONE), found
    if not of_flat_positions:
        wanted = "hidden states change" if family == "gemma3" else "M-RoPE"
        assert wanted in str(found["shared_prompt", "one_row"])
    # Without images all of them are: nothing looks ahead, and positions are one number.
    text = refusals(model, CASES, longest=100)
    assert set(text.values()) == {None}


def pairs_of(*questions: tuple[str, list[int]]) -> list[dict[str, Any]]:
    return [
        {
            "images": [picture(seed) for seed in seeds],
            "prompt": [{"role": "user", "content": text}],
            "chosen": [{"role": "assistant", "content": "a river " * (place + 1)}],
            "rejected": [{"role": "assistant", "content": "a stone and a lamp"}],
        }
        for place, (text, seeds) in enumerate(questions)
    ]


START = "walk by the green river and see the seven stones of winter "
BATCHES = {
    "one image and its two answers": pairs_of(("what", [1])),
    "one prompt, two images": pairs_of(("what", [1]), ("what", [2])),
    "one prompt, one image": pairs_of(("what", [1]), ("what", [1])),
    "one image, two questions": pairs_of(("what", [1]), ("where is it", [1])),
    "text before the image": pairs_of((f"{START}<image> what", [1]), (f"{START}<image> where", [1])),
    "text before two images": pairs_of((f"{START}<image> what", [1]), (f"{START}<image> what", [2])),
    "another text before one image": pairs_of((f"{START}<image>", [1]), (f"{START}ink <image>", [1])),
    "the first of two images": pairs_of(
        (f"{START}<image><image>", [1, 2]), (f"{START}<image><image>", [1, 3])
    ),
    "a second text between two": pairs_of(
        (f"{START}<image>red<image>", [1, 2]), (f"{START}<image>blue<image>", [1, 2])
    ),
    "text alone beside": pairs_of(("what", [1]), (START, []), (START, [])),
    "an image in an answer": [
        {
            **pairs_of(("what <image>", [1]))[0],
            "chosen": [
                {
                    "role": "assistant",
                    "content": [{"type": "image", "image": picture(5)}, {"type": "text", "text": "a"}],
                }
            ],
        }
    ],
    "an image of the rejected": [{**pairs_of(("what <image>", [1]))[0], "images_rejected": [picture(4)]}],
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", ["llava", "llava-onevision"])
def test_rows_are_padded_batches(family: str, batch: str):
    processor, model = make_processor(family), patch_model(make_model(family))
    dataset, images = encoded(BATCHES[batch], processor), ImageTokens.of(processor)
    rows = [dataset[i] for i in range(len(dataset))]
    wanted = sequence_logps(model, PaddedCollator(0, images=images)(rows))
    for layout in ("packed", "shared_prompt"):
        for name in ("separate", "one_row"):
            collator = RowCollator(0, layout, COSTS, (name,), shortest_shared=4, images=images)
            found = sequence_logps(model, collator(rows))
            torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    assert wanted.unique().numel() > 1


@pytest.mark.parametrize("batch", BATCHES)
def test_images_of_one_beginning_are_there_once(batch: str):
    processor = make_processor("llava")
    dataset, images = encoded(BATCHES[batch], processor), ImageTokens.of(processor)
    rows = [dataset[i] for i in range(len(dataset))]
    counts = {}
    for layout in ("packed", "shared_prompt"):
        made = RowCollator(0, layout, COSTS, ("one_row",), shortest_shared=4, images=images)(rows)
        counts[layout] = sum(len(call.get("pixel_values", ())) for call in made.calls)
    assert counts["packed"] == sum(len(own) for row in rows for own in row.images)
    once = {
        "one image and its two answers": 1,
        "one prompt, two images": 2,
        "one prompt, one image": 1,
        "one image, two questions": 1,
        "text before the image": 1,
        "text before two images": 2,
        "another text before one image": 2,
        "the first of two images": 4,
        "a second text between two": 8,
        "text alone beside": 1,
        "an image in an answer": 3,
        "an image of the rejected": 2,
    }
    assert counts["shared_prompt"] == once[batch]
    tokens = sum(call["input_ids"].numel() for call in made.calls)
    if len(rows) == 1:
        assert tokens == rows[0].distinct_tokens


def test_a_run_in_trees_is_a_padded_one(tmp_path: Path):
    """Losses and gradient norms of four steps; the tower sees half of the images."""
    rows = image_rows(8, tmp_path / "images", text_only=2)
    logs, seen = [], []
    for layout in ("padded", "shared_prompt"):
        args = quick_args(tmp_path / layout, batch_layout=layout)
        model = make_model("llava")
        trainer = PreferenceTrainer(
            model,
            args,
            train_dataset=rows,
            processing_class=make_processor("llava"),
            ref_model=make_model("llava"),
        )
        count: list[int] = []
        unwrap(trainer.model).get_encoder(modality="image").register_forward_pre_hook(
            lambda module, given, options, count=count: count.append(
                len(given[0] if given else options["pixel_values"])
            ),
            with_kwargs=True,
        )
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        seen.append(sum(count))
    assert seen[0] == 2 * seen[1] > 0
    for padded, shared in zip(*logs, strict=True):
        assert shared["loss"] == pytest.approx(padded["loss"], rel=1e-5)
        assert shared["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)
        assert shared["rewards/margins"] == pytest.approx(padded["rewards/margins"], abs=1e-5)


def test_text_alone_in_rows_of_a_model_that_looks_ahead_in_images(tmp_path: Path):
    rows = image_rows(4, tmp_path, text_only=4)
    args = quick_args(tmp_path / "run", batch_layout="shared_prompt", row_arrangement="one_row", max_steps=1)
    PreferenceTrainer(
        make_model("gemma3"), args, train_dataset=rows, processing_class=make_processor("gemma3")
    ).train()


def test_images_that_come_where_none_were_tried(tmp_path: Path):
    """Layouts are tried with images where any data have them; those that come later are refused by name."""
    text, seen = image_rows(4, tmp_path, text_only=4), image_rows(4, tmp_path)
    args = quick_args(tmp_path / "run", batch_layout="shared_prompt", max_steps=1)
    settings = {"train_dataset": text, "processing_class": make_processor("qwen2-vl")}
    with pytest.raises(ValueError, match="M-RoPE"):
        PreferenceTrainer(make_model("qwen2-vl"), args, eval_dataset=seen, **settings)
    trainer = PreferenceTrainer(make_model("qwen2-vl"), args, **settings)
    trainer.train()
    with pytest.raises(ValueError, match="row 1 of dataset: got images, which no data had"):
        trainer.evaluate(seen)


def test_a_language_model_with_a_processor(tmp_path: Path):
    """As of a family whose checkpoints have both: rows of text alone get nothing of images."""
    rows = image_rows(4, tmp_path, text_only=4)
    model = tiny_llama(vocab_size=420)
    for layout in ("padded", "packed"):
        args = quick_args(tmp_path / layout, batch_layout=layout, max_steps=1)
        processor = make_processor("qwen2-vl")
        PreferenceTrainer(model, args, train_dataset=rows, processing_class=processor).train()


def test_carried_contexts_are_refused(tmp_path: Path):
    rows = image_rows(4, tmp_path)
    args = quick_args(tmp_path / "run", batch_layout="packed", context_chunk=64)
    with pytest.raises(ValueError, match="context_chunk: got 64 with rows that have images"):
        PreferenceTrainer(
            make_model("llava"), args, train_dataset=rows, processing_class=make_processor("llava")
        )
