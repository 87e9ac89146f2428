"""Rows with images: where they stand, how they are given, what is kept of them, and what may be wrong."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from fastdpo.integrations.processor import ImageTokens
from fastdpo.training.batches.collate import PaddedCollator
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.formats import Wanted
from fastdpo.training.data.images import RowImage, pixel_digest
from fastdpo.training.data.mixture import joined
from fastdpo.training.data.source import read_rows
from fastdpo.training.settings.encoding import EncodingOptions
from fastdpo.training.settings.kinds import KINDS
from tests.training.conftest import write_jsonl
from tests.training.eyes import FAMILIES, image_rows, make_processor, picture

OPTIONS = EncodingOptions(max_bad_rows=1.0)


@pytest.fixture(scope="module")
def llava() -> Any:
    return make_processor("llava")


def encoded(rows: Any, processor: Any, options: EncodingOptions = OPTIONS, **wanted: Any) -> RowDataset:
    return encode_rows(read_rows(rows), processor, options, Wanted(**wanted) if wanted else None)


def pair(**columns: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "what is this"}],
        "chosen": [{"role": "assistant", "content": "a river"}],
        "rejected": [{"role": "assistant", "content": "a stone"}],
        **columns,
    }


def parts(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(contents)}]


TEXT = {"type": "text", "text": "what is this"}


def png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def ways(folder: Path) -> dict[str, dict[str, Any]]:
    """One row, with one image, as files may have it."""
    image = picture(3)
    path = folder / "a b.png"
    image.save(path)
    data = base64.b64encode(png(image)).decode()
    url = f"data:image/png;base64,{data}"
    return {
        "path": pair(images=[str(path)]),
        "one path": pair(image=str(path)),
        "file url": pair(images=[path.as_uri()]),
        "pil": pair(images=[image]),
        "bytes": pair(images=[png(image)]),
        "base64": pair(images=[data]),
        "data url": pair(images=[url]),
        "datasets' struct": pair(images=[{"bytes": png(image), "path": None}]),
        "datasets' path": pair(images=[{"bytes": None, "path": str(path)}]),
        "trl's place": pair(images=[image], prompt=parts({"type": "image"}, TEXT)),
        "a word": pair(images=[image], prompt=[{"role": "user", "content": "<image>what is this"}]),
        "openai": pair(prompt=parts({"type": "image_url", "image_url": {"url": url}}, TEXT)),
        "openai's input_image": pair(prompt=parts({"type": "input_image", "image_url": url}, TEXT)),
        "a part": pair(prompt=parts({"type": "image", "image": str(path)}, TEXT)),
        "a part's path, and nulls": pair(
            prompt=parts({"type": "image", "path": str(path), "text": None, "image": None}, TEXT)
        ),
        "no prompt column": {
            side: [*pair(prompt=parts({"type": "image", "image": image}, TEXT))["prompt"], *pair()[side]]
            for side in ("chosen", "rejected")
        },
        "prompt repeated": {
            "prompt": parts({"type": "image"}, TEXT),
            "images": [image],
            **{side: [*parts({"type": "image"}, TEXT), *pair()[side]] for side in ("chosen", "rejected")},
        },
    }  # fmt: skip


def test_all_ways_to_give_an_image_are_one(llava: Any, tmp_path: Path):
    collate = PaddedCollator(0, images=ImageTokens.of(llava))
    seen = {}
    for name, row in ways(tmp_path).items():
        dataset = encoded([row], llava)
        assert not dataset.report.skipped, (name, dataset.report)
        inputs = collate([dataset[0]]).sequences.model_inputs()
        seen[name] = {key: value.tolist() for key, value in inputs.items()}
    first = seen.pop("path")
    assert {"input_ids", "attention_mask", "pixel_values"} == set(first)
    assert len(first["pixel_values"]) == 2  # of each answer's sequence
    for name, one in seen.items():
        assert one == first, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_makes_the_same_of_whole_texts(family: str, tmp_path: Path):
    """Ids, and all that a model takes beside them, as the processor itself makes them of a batch of texts."""
    processor = make_processor(family)
    rows = [
        pair(images=[picture(1, (28, 12)), picture(2, (12, 20))]),
        pair(
            images=[picture(4, (20, 20)), picture(5, (12, 12))],
            chosen=[{"role": "assistant", "content": "ink"}],
        ),
    ]
    dataset = encoded(rows, processor)
    batch = PaddedCollator(0, images=ImageTokens.of(processor))([dataset[0], dataset[1]])
    texts = [
        processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, TEXT]}, *row[side]],
            tokenize=False,
        )
        for side in ("chosen", "rejected")
        for row in rows
    ]
    images = [row["images"] for row in rows] * 2
    options = {"padding": True, "padding_side": "right", "add_special_tokens": False, "return_tensors": "pt"}
    wanted = processor(text=texts, images=images, **options)
    inputs = batch.sequences.model_inputs()
    left = {"batch_num_images": torch.tensor([2] * 4)} if "batch_num_images" in inputs else {}
    assert set(inputs) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(inputs[name], left.get(name, torch.as_tensor(value)), rtol=0, atol=0)


def test_text_among_images(llava: Any, tmp_path: Path):
    rows = image_rows(4, tmp_path, text_only=2)
    dataset = encoded(rows, llava)
    assert [len(dataset[i].images) for i in range(4)] == [2, 2, 0, 0]
    batch = PaddedCollator(0, images=ImageTokens.of(llava))([dataset[i] for i in (0, 2, 1)])
    media = batch.sequences.media
    assert media is not None and media.sizes == {"pixel_values": (1, 0, 1, 1, 0, 1)}
    first, only_text = (
        batch.sequences.pick(torch.tensor([3, 0])).media,
        batch.sequences.pick(torch.tensor([1])).media,
    )
    assert first is not None and only_text is not None and not only_text.inputs
    assert torch.equal(first.inputs["pixel_values"], media.inputs["pixel_values"][[2, 0]])
    assert not PaddedCollator(0, images=ImageTokens.of(llava))([dataset[2]]).sequences.media.inputs  # type: ignore


def test_images_of_answers_are_not_scored(llava: Any, tmp_path: Path):
    image = ImageTokens.of(llava)
    assert image is not None
    row = pair(
        images=[picture(1)],
        prompt=parts({"type": "image"}, TEXT),
        chosen=[
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "a"}, {"type": "image", "image": picture(2)}],
            }
        ],
    )
    for columns in (row, {**row, "chosen": [*row["chosen"], *pair()["prompt"], *pair()["chosen"]]}):
        dataset = encoded([columns], llava)
        answer = dataset[0].answers[0]
        is_image = torch.tensor([int(token) in image.ids for token in answer.ids])
        assert answer.scored is not None and is_image.any()
        assert not (answer.scored & is_image).any() and answer.scored.any()
        (chosen, rejected) = dataset[0].images
        assert len(chosen) == 2 and len(rejected) == 1
        assert chosen[1].digest == pixel_digest(picture(2))


def test_plain_texts(llava: Any):
    row = {
        "images": [picture(1), picture(2)],
        "prompt": "A <image> and <image>: ",
        "chosen": "red",
        "rejected": "one",
    }
    dataset = encoded([row, {**row, "prompt": "A <image>: "}], llava)
    assert dataset.report.skipped == {"other than one place for each image": [2]}
    assert ImageTokens.of(llava).count(dataset[0].prompt.tolist()) == 8  # type: ignore[union-attr]


def test_lists_and_single_answers(llava: Any):
    listed = {
        "images": [picture(1)],
        "prompt": pair()["prompt"],
        "completions": [
            [{"role": "assistant", "content": "a"}],
            [{"role": "assistant", "content": [{"type": "image", "image": picture(2)}, TEXT]}],
        ],
        "scores": [1.0, 0.0],
    }
    dataset = encoded([listed], llava, kind=KINDS["listwise"])
    assert [len(images) for images in dataset[0].images] == [1, 2]
    assert dataset[0].images[1][1].load().size == (20, 12)
    pairs = encoded([pair(images=[picture(1)])], llava, kind=KINDS["unpaired"])
    assert [len(pairs[k].images) for k in (0, 1)] == [1, 1]


def test_answers_in_pieces(llava: Any):
    row = {
        "images": [picture(1)],
        "prompt": "What is <image>?",
        "completion": ["a ", "river"],
        "advantages": [1.0, 0.5],
    }
    in_a_piece = {**row, "prompt": "What is it?", "completion": ["a <image>", "river"]}
    dataset = encoded([row, in_a_piece], llava, kind=KINDS["steps"])
    assert len(dataset[0].images[0]) == 1 and len(dataset[0].pieces) == 2
    assert "an answer in pieces has images" in str(dataset.report) or "pieces" in str(dataset.report)
    assert len(dataset) == 1


def test_a_rejected_answers_own_images(llava: Any, tmp_path: Path):
    """mDPO's image-conditional pairs: one text, and two images that it is judged on."""
    same = pair(images=[picture(1)], images_rejected=[picture(2)], rejected=pair()["chosen"])
    dataset = encoded([same], llava)
    row = dataset[0]
    assert torch.equal(row.answers[0].ids, row.answers[1].ids)
    assert [images[0].digest for images in row.images] == [pixel_digest(picture(seed)) for seed in (1, 2)]
    repeated = encoded([{**same, "images_rejected": [picture(1)]}, same], llava)
    assert repeated.report.skipped == {"identical answers": [1]}


def test_a_rejected_answers_images_of_another_size():
    """The prompts differ then, from the image on; what is the answer's own of its prompt is not scored."""
    processor = make_processor("qwen2-vl")
    row = pair(images=[picture(1, (12, 12))], images_rejected=[picture(2, (28, 28))])
    dataset = encoded([row], processor)
    chosen, rejected = dataset[0].answers
    assert chosen.scored is not None and rejected.scored is not None
    end = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    plain = encoded([pair(images=[picture(1, (12, 12))])], processor)[0]
    for answer, own in zip((chosen, rejected), plain.answers, strict=True):
        assert end in answer.ids.tolist()
        assert answer.ids[answer.scored].tolist() == own.ids.tolist()


def test_pairs_of_two_views(llava: Any):
    """Of a row with other images: its pair, with its own images, and its chosen answer with both."""
    options = EncodingOptions(image_conditional_pairs=True, max_bad_rows=1.0)
    row = pair(images=[picture(1)], images_rejected=[picture(2)])
    dataset = encoded([row, pair(images=[picture(3)])], llava, options)
    assert "2 of 2 pairs kept, which make 3" in str(dataset.report) and not dataset.report.unused
    texts, views, other = (dataset[k] for k in range(3))
    assert torch.equal(views.answers[0].ids, views.answers[1].ids)
    assert torch.equal(views.answers[0].ids, texts.answers[0].ids)
    assert not torch.equal(texts.answers[0].ids, texts.answers[1].ids)
    seen = [[images[0].digest for images in one.images] for one in (texts, views, other)]
    first, second, third = (pixel_digest(picture(seed)) for seed in (1, 2, 3))
    assert seen == [[first, first], [first, second], [third, third]]
    with pytest.raises(ValueError, match="image_conditional_pairs: got True .*wanted images_rejected"):
        encoded([pair(images=[picture(1)])], llava, options)
    answer = [{"role": "assistant", "content": [{"type": "image", "image": picture(5)}, TEXT]}]
    with_own = pair(
        prompt=[{"role": "user", "content": "<image>"}], images=[picture(1)], images_rejected=[picture(2)]
    )
    dataset = encoded([{**with_own, "chosen": answer}], llava, options)
    assert len(dataset) == 1 and "no two views" in str(dataset.report)


@pytest.mark.parametrize(
    ("row", "check"),
    [
        (pair(images=["nowhere.png"]), "an image that is not there"),
        (pair(images=[b"no image"]), "an image that cannot be decoded"),
        (pair(images=["data:image/png;base64,AAAA"]), "an image that cannot be decoded"),
        (pair(images=["https://example.com/a.png"]), "an image that would have to be fetched"),
        (pair(images=[3]), "an image that is none"),
        (pair(images=[None]), "an image that is none"),
        (pair(images=[{}]), "an image that is none"),
        (pair(images=3), "an image that is none"),
        (pair(prompt=parts({"type": "image"}, TEXT)), "other than one place for each image"),
        (pair(images=[picture(), picture()], prompt=parts({"type": "image"}, TEXT)), "other than one place"),
        (pair(images=[picture()], prompt=[{"role": "system", "content": "a"}]), "other than one place"),
        (pair(images=[picture()], images_rejected=[picture(), picture()]), "other than one place"),
        (
            pair(images=[picture()], chosen=[{"role": "assistant", "content": "an <image>"}] * 2),
            "other than one",
        ),
        (pair(chosen=[{"role": "assistant", "content": "an <image>"}]), "tokens of images in the text"),
    ],
)
def test_what_is_wrong_with_a_row(llava: Any, row: dict[str, Any], check: str):
    good = pair(images=[picture(1)])
    dataset = encoded([good, row], llava)
    ((message, rows),) = dataset.report.skipped.items()
    assert check in message and list(rows) == [2] and len(dataset) == 1
    with pytest.raises(ValueError, match="row 2"):
        encoded([good, row], llava, EncodingOptions(on_bad_row="error"))


def test_a_file_that_is_cut_off(llava: Any, tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(png(picture(1, (64, 64)))[:2000])
    dataset = encoded([pair(images=[picture(1)]), pair(images=[str(path)])], llava)
    assert str(path) in str(dataset.report) and "cannot be decoded (row 2: images.0" in str(dataset.report)


def test_an_image_that_a_processor_refuses():
    narrow = pair(images=[picture(1, (2, 600))])
    dataset = encoded([narrow, pair(images=[picture(1)])], make_processor("qwen2-vl"))
    assert "an image that the model's processor refuses (row 1" in str(dataset.report)


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_images_are_not_cut(llava: Any, mode: str):
    long = pair(images=[picture(1)], chosen=[{"role": "assistant", "content": "a river " * 30}])
    options = EncodingOptions(max_length=40, truncation_mode=mode, max_bad_rows=1.0)
    dataset = encoded([long, pair()], llava, options)
    if mode == "keep_start":
        assert dataset.report.is_clean and len(dataset[0].answers[0].ids) < 40
    else:
        assert dataset.report.skipped == {"an image that max_length would cut": [1]}


def test_images_without_eyes(llava: Any):
    with pytest.raises(ValueError, match="'images'.*sees none.*--ignore_columns images"):
        encoded([pair(images=[picture()])], llava.tokenizer)
    dataset = encoded([pair(prompt=parts({"type": "image"}, TEXT)), pair()], llava.tokenizer)
    assert dataset.report.skipped == {"content that is not text": [1]}


def test_a_template_that_leaves_images_out():
    processor = make_processor("llava")
    template = processor.tokenizer.chat_template.replace("<image>", "")
    processor.tokenizer.chat_template = processor.chat_template = template
    dataset = encoded([pair(images=[picture()]), pair()], processor)
    assert dataset.report.skipped == {"other than one place for each image": [1]}


def test_a_processor_without_a_template():
    processor = make_processor("llava")
    processor.tokenizer.chat_template = processor.chat_template = None
    with pytest.raises(
        ValueError, match="row 1: the row holds messages, but the tokenizer has no chat template"
    ):
        encoded([pair(images=[picture()])], processor)


def test_paths_are_relative_to_the_file_or_a_folder(llava: Any, tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        picture(len(name)).save(tmp_path / name / "a.png")
        write_jsonl(tmp_path / name / "rows.jsonl", [pair(images=["a.png"])])
    picture(7).save(tmp_path / "a.png")
    files = [str(tmp_path / name / "rows.jsonl") for name in ("one", "two")]
    dataset = encoded(files, llava)
    assert [dataset[k].images[0][0].digest for k in (0, 1)] == [pixel_digest(picture(3))] * 2
    dataset = encoded(files, llava, EncodingOptions(image_folder=str(tmp_path)))
    assert dataset[1].images[0][0].digest == pixel_digest(picture(7))
    parts_of = joined([read_rows(file) for file in files], "both")
    assert encode_rows(parts_of, llava, OPTIONS)[1].images[0][0].load().size == (20, 12)


@pytest.mark.parametrize("kind", ["path", "bytes"])
def test_datasets_images_are_not_decoded_before_they_are_wanted(
    llava: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    rows = image_rows(3, tmp_path)
    data = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    if kind == "bytes":
        data = data.map(lambda row: row)  # written with what the files hold
        data.to_parquet(str(tmp_path / "rows.parquet"))
        source: Any = str(tmp_path / "rows.parquet")
    else:
        source = data

    def decode(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(datasets.Image, "decode_example", decode)
    dataset = encoded(source, llava)
    assert len(dataset) == 3 and dataset.report.is_clean
    assert dataset[2].images[1][0].load().size == picture(2, dataset[2].images[0][0].load().size).size
    streamed = read_rows(source if kind == "bytes" else data.to_iterable_dataset(), streaming=True)
    assert [row["images"][0].keys() for _, row in streamed] == [{"bytes", "path"}] * 3


def test_what_is_kept_is_where_images_are(llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tokens once made are found again; images are loaded when a batch is made, and not before."""
    rows = image_rows(3, tmp_path)
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    loads: list[str] = []
    load = RowImage.load
    monkeypatch.setattr(RowImage, "load", lambda self: (loads.append(self.name), load(self))[1])
    first = encoded(file, llava)
    assert len(loads) == 3
    again = encoded(file, llava)
    assert len(loads) == 3 and again.fingerprint() == first.fingerprint()
    collate: Callable[..., Any] = PaddedCollator(0, images=ImageTokens.of(llava))
    collate([again[0], again[1]])
    assert len(loads) == 5  # once for both answers


def test_an_image_that_comes_or_changes(llava: Any, tmp_path: Path):
    rows = image_rows(2, tmp_path)
    (tmp_path / "1.png").unlink()
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert "is not there (row 2: images.0" in str(encoded(file, llava).report)
    picture(1).save(tmp_path / "1.png")
    whole = encoded(file, llava)
    assert len(whole) == 2
    picture(9).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"row 2 of .*rows.jsonl: an image that is another than .*images.0"):
        PaddedCollator(0, images=ImageTokens.of(llava))([whole[1]])
    changed = encoded(file, llava)
    assert changed.fingerprint() != whole.fingerprint()
    assert (
        changed.row_digests()[0]
        == whole.row_digests()[0]
        != changed.row_digests()[1]
        != whole.row_digests()[1]
    )
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match="row 2 .*is not there"):
        PaddedCollator(0, images=ImageTokens.of(llava))([changed[1]])


def test_parts_of_messages_in_files(llava: Any, tmp_path: Path):
    picture(3).save(tmp_path / "a.png")
    row = pair(prompt=parts({"type": "image", "image": "a.png"}, TEXT))
    file = write_jsonl(tmp_path / "rows.jsonl", [row])
    assert encoded(file, llava)[0].images[0][0].name == "prompt.0.content.0.image"
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="no pair left"):
        encoded(file, llava)
    assert json.loads(file.read_text()) == row
