"""Vision-language models in the loop: TRL's curves, references, adapters, a frozen tower, the commands."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from fastdpo.cli import main
from fastdpo.integrations.lm_head import unwrap
from fastdpo.integrations.model import patch_model
from fastdpo.testing import assert_close_to_fp64
from fastdpo.training.batches.forward import sequence_logps
from fastdpo.training.loop.models import load_model, load_tokenizer
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.distributed.ranks import run_ranks
from tests.training.conftest import make_rows, quick_args, read_metrics, tiny_llama, write_jsonl
from tests.training.eyes import FAMILIES, image_rows, make_model, make_processor, picture
from tests.training.loop.images_run import run

Args = Callable[..., PreferenceConfig]


def trainer_of(
    model: Any, args: PreferenceConfig, rows: Any, processor: Any, **more: Any
) -> PreferenceTrainer:
    return PreferenceTrainer(model, args, train_dataset=rows, processing_class=processor, **more)


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_the_whole_models_logits(family: str, tmp_path: Path):
    """Of a padded batch with images and without, values and gradients, by the rule; the head fused."""
    model, processor = make_model(family), make_processor(family)
    rows = image_rows(3, tmp_path, text_only=1)
    trainer = trainer_of(copy.deepcopy(model), quick_args(tmp_path / "run"), rows, processor)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    sequences = batch.sequences

    def run(model: Any, of: Callable[[Any], Any]) -> tuple[Any, dict[str, Any]]:
        logps = of(model)
        (logps * torch.linspace(-1, 1, logps.shape[1])).sum().backward()
        return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def plain(model: Any) -> Any:
        dtype = next(model.parameters()).dtype
        inputs = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in sequences.model_inputs().items()
        }
        logits = model(**inputs).logits[:, :-1].log_softmax(-1)
        labels = sequences.labels[:, 1:]
        picked = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return torch.nn.functional.pad(picked.masked_fill(labels == -100, 0), (1, 0))

    def fused(model: Any) -> Any:
        return model(**sequences.model_inputs(), labels=sequences.labels, return_logps=True).logps

    truth, gradients = run(copy.deepcopy(model).double(), plain)
    eager, eager_gradients = run(copy.deepcopy(model), plain)
    ours, our_gradients = run(patch_model(copy.deepcopy(model)), fused)
    assert_close_to_fp64(ours, truth, eager)
    assert our_gradients.keys() == eager_gradients.keys()
    tower = [name for name in gradients if "vision" in name or "visual" in name]
    assert any(gradients[name].abs().max() > 1e-6 for name in tower)
    # Some are 0 but for rounding: a key's bias shifts all scores of a query alike.
    floor = 1e-7 * torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, gradient in our_gradients.items():
        error = (gradient.double() - gradients[name]).norm()
        assert error <= 2e-5 * gradients[name].norm() + floor, name


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_curves_are_trls(family: str, make_args: Args, tmp_path: Path):
    """Every metric of 20 steps of TRL 1.16's trainer, in fp32."""
    trl = pytest.importorskip("trl", minversion="1.15")
    rows = image_rows(12, tmp_path / "images")
    common: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 20,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "max_length": None,
    }
    ours = trainer_of(make_model(family), make_args(**common), rows, make_processor(family))
    ours.train()
    of_trl = trl.DPOConfig(
        str(tmp_path / "trl"), use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False,
        save_strategy="no", disable_tqdm=True, **common,
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    theirs = trl.DPOTrainer(
        make_model(family), ref_model=make_model(family), args=of_trl, train_dataset=data,
        processing_class=make_processor(family),
    )  # fmt: skip
    theirs.train()
    logs = [[entry for entry in one.state.log_history if "loss" in entry] for one in (ours, theirs)]
    assert len(logs[0]) == len(logs[1]) == 20
    assert logs[0][-1]["loss"] < 0.5
    for mine, wanted in zip(*logs, strict=True):
        shared = mine.keys() & wanted.keys()
        assert {"loss", "rewards/margins", "logps/chosen", "entropy", "grad_norm", "num_tokens"} <= shared
        for name in shared:
            tolerance = 1e-4 if name == "grad_norm" else 1e-5
            assert mine[name] == pytest.approx(wanted[name], rel=tolerance, abs=1e-5), name


@pytest.mark.parametrize("kind", ["copy", "precomputed"])
def test_references(kind: str, make_args: Args, tmp_path: Path):
    rows = image_rows(6, tmp_path / "images", text_only=2)
    found = trainer_of(make_model("llava"), make_args(), rows, make_processor("llava"))
    found.train()
    other = trainer_of(
        make_model("llava"),
        make_args(reference=kind, output_dir=str(tmp_path / "b")),
        rows,
        make_processor("llava"),
    )
    other.train()
    assert losses_of(other) == pytest.approx(losses_of(found), rel=1e-5)
    assert losses_of(other)[0] == pytest.approx(0.693147, rel=1e-6)


def test_precomputed_numbers_are_of_the_images(make_args: Args, tmp_path: Path):
    """Other pixels in files of the same names are another data set."""
    rows = image_rows(4, tmp_path / "images")
    scores = []
    for seed in (1, 2, 1):
        for row in rows:
            picture(seed).save(row["images"][0])
        args = make_args(reference="precomputed", output_dir=str(tmp_path / f"{len(scores)}"))
        trainer = trainer_of(make_model("llava"), args, rows, make_processor("llava"))
        trainer.train()
        scores.append(torch.cat([trainer.train_dataset[i].numbers["ref_logps"] for i in range(4)]))
    assert not torch.allclose(scores[0], scores[1], atol=1e-4) and torch.equal(scores[0], scores[2])


def test_an_adapter_and_a_frozen_tower(make_args: Args, tmp_path: Path):
    from peft import LoraConfig

    rows = image_rows(6, tmp_path / "images", text_only=1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    found = {}
    for freeze in (False, True):
        args = make_args(freeze_vision_tower=freeze, output_dir=str(tmp_path / str(freeze)))
        trainer = trainer_of(make_model("llava"), args, rows, make_processor("llava"), peft_config=config)
        assert trainer.reference.kind == "adapter"
        trainer.train()
        moved = [name for name, p in trainer.model.named_parameters() if "lora_B" in name and p.any()]
        found[freeze] = [name for name in moved if "vision_tower" in name], len(moved)
        assert losses_of(trainer)[-1] < 0.6931
    assert found[False][0] and not found[True][0] and found[True][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_tower_of_every_family(family: str, make_args: Args, tmp_path: Path):
    model = make_model(family)
    before = copy.deepcopy(model.state_dict())
    rows = image_rows(4, tmp_path / "images")
    trainer = trainer_of(
        model, make_args(freeze_vision_tower=True, max_steps=1), rows, make_processor(family)
    )
    trainer.train()
    tower = unwrap(trainer.model).get_encoder(modality="image")
    frozen = {id(p) for p in tower.parameters()}
    assert frozen and not any(p.requires_grad for p in tower.parameters())
    for name, p in trainer.model.named_parameters():
        assert (id(p) in frozen) == torch.equal(p, before[name]) or not p.requires_grad or p.grad is None, (
            name
        )


def test_a_frozen_tower_of_a_model_without_one(make_args: Args, tokenizer: Any):
    with pytest.raises(ValueError, match="freeze_vision_tower: got True with a LlamaForCausalLM"):
        trainer_of(tiny_llama(), make_args(freeze_vision_tower=True), make_rows(4), tokenizer)


@pytest.mark.parametrize("kind", ["kto", "orpo", "simpo", "lipo_lambda", "tpo"])
def test_other_losses(kind: str, make_args: Args, tmp_path: Path):
    rows = image_rows(6, tmp_path / "images", text_only=1)
    more: dict[str, Any] = {"nll_on_prompt": False} if kind == "orpo" else {}
    if kind == "lipo_lambda":
        rows = [
            {**row, "completions": [row.pop("chosen"), row.pop("rejected")], "scores": [1.0, 0.0]}
            for row in rows
        ]
    if kind == "tpo":
        rows = [{**row, "reference": row["chosen"]} for row in rows]
    trainer = trainer_of(
        make_model("qwen2-vl"), make_args(loss_type=kind, **more), rows, make_processor("qwen2-vl")
    )
    trainer.train()
    assert len(losses_of(trainer)) == 4 and all(map(torch.isfinite, map(torch.tensor, losses_of(trainer))))


def test_nll_of_prompts_with_images_is_refused(make_args: Args, tmp_path: Path):
    rows = image_rows(4, tmp_path / "images")
    with pytest.raises(ValueError, match="nll_on_prompt: got True with rows that have images"):
        trainer_of(make_model("llava"), make_args(loss_type="orpo"), rows, make_processor("llava"))


def test_a_model_that_sees_nothing(make_args: Args, tmp_path: Path):
    rows = image_rows(4, tmp_path / "images")
    model = tiny_llama(vocab_size=420)
    with pytest.raises(ValueError, match="model: got a LlamaForCausalLM, which sees no images"):
        trainer_of(model, make_args(), rows, make_processor("llava"))


def test_evaluation_workers_and_streams(make_args: Args, tmp_path: Path):
    rows = image_rows(7, tmp_path / "images", text_only=2)
    args = make_args(
        eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=3, dataloader_num_workers=1
    )
    trainer = trainer_of(make_model("llava"), args, rows[:4], make_processor("llava"), eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(rows).predictions.shape == (7, 2)
    data = datasets.Dataset.from_list(rows[:4]).cast_column("images", datasets.List(datasets.Image()))
    args = make_args(output_dir=str(tmp_path / "stream"), shuffle_buffer_size=0)
    streamed = trainer_of(make_model("llava"), args, data.to_iterable_dataset(), make_processor("llava"))
    streamed.train()
    assert len(losses_of(streamed)) == 4


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_of_which_one_has_text_alone(tmp_path: Path):
    """Under checkpointing DDP does not look for unused weights by itself: the tower's, without images."""
    run_ranks("tests.training.loop.images_run", str(tmp_path / "two"), seconds=240)
    run(tmp_path / "one", 1)
    two, one = (read_metrics(tmp_path / name / "run") for name in ("two", "one"))
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], rel=1e-5)


def test_mdpo_in_the_loop(make_args: Args, tmp_path: Path):
    """Its three terms are ln 2 each at the start, as means over rows; the second image is seen."""
    rows = [
        {**row, "images_rejected": [picture(50 + k)]}
        for k, row in enumerate(image_rows(2, tmp_path / "images"))
    ]
    settings = {
        "loss_type": ["sigmoid", "mdpo_anchor"],
        "loss_weights": [2.0, 1.0],
        "image_conditional_pairs": True,
    }
    trainer = trainer_of(make_model("llava"), make_args(**settings), rows, make_processor("llava"))
    assert len(trainer.train_dataset) == 4
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(3 * 0.6931472, rel=1e-6)
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    batch = trainer.data_collator([trainer.train_dataset[1]])
    logps = sequence_logps(trainer.model, batch)
    assert torch.equal(*batch.sequences.input_ids) and (logps[0] - logps[1]).abs() > 1e-3


def saved(family: str, folder: Path) -> Path:
    make_model(family).save_pretrained(folder)
    make_processor(family).save_pretrained(folder)
    return folder


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Score, train with the scores, load what was saved, and doctor."""
    model = saved("llava", tmp_path / "model")
    file = write_jsonl(tmp_path / "pairs.jsonl", image_rows(6, tmp_path, text_only=1))
    words = [
        "--model",
        str(model),
        "--dataset",
        str(file),
        "--max_steps",
        "2",
        "--use_cpu",
        "--logging_steps",
        "1",
    ]
    words += ["--reference_cache_dir", str(tmp_path / "cache"), "--disable_tqdm", "--save_strategy", "no"]
    scored = tmp_path / "scored.jsonl"
    assert main(["score", *words, "--output_dir", str(tmp_path / "s"), "--output", str(scored)]) == 0
    assert main(["train", *words, "--output_dir", str(tmp_path / "run")]) == 0
    words[3] = str(scored)
    assert main(["train", *words, "--output_dir", str(tmp_path / "again")]) == 0
    first, again = (read_metrics(tmp_path / name) for name in ("run", "again"))
    assert [x["loss"] for x in again] == pytest.approx([x["loss"] for x in first], rel=1e-5)
    trained, processor = (
        load_model(str(tmp_path / "run")),
        load_tokenizer(str(tmp_path / "run"), or_processor=True),
    )
    assert type(trained).__name__ == "LlavaForConditionalGeneration" and processor.image_processor is not None
    capsys.readouterr()
    assert main(["doctor", *words[:4], "--output_dir", str(tmp_path / "d"), "--use_cpu"]) == 0
    (tmp_path / "2.png").unlink()
    assert main(["train", *words, "--output_dir", str(tmp_path / "bad"), "--on_bad_row", "error"]) == 2
    assert "row 3: images.0" in capsys.readouterr().err


def test_an_adapter_from_the_command_line_and_on(tmp_path: Path):
    model = saved("llava", tmp_path / "model")
    file = write_jsonl(tmp_path / "pairs.jsonl", image_rows(4, tmp_path))
    words = [
        "--dataset",
        str(file),
        "--max_steps",
        "1",
        "--use_cpu",
        "--logging_steps",
        "1",
        "--disable_tqdm",
    ]
    words += [
        "--reference_cache_dir",
        str(tmp_path / "cache"),
        "--save_strategy",
        "no",
        "--learning_rate",
        "1e-2",
    ]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert main(["train", "--model", str(model), *words, "--use_peft", "--output_dir", one]) == 0
    assert main(["train", "--model", one, *words, "--output_dir", two]) == 0
    assert type(unwrap(load_model(two))).__name__ == "LlavaForConditionalGeneration"
    assert read_metrics(two)[0]["loss"] == pytest.approx(0.693147, rel=1e-5)


def test_a_tokenizer_in_the_place_of_a_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = saved("llava", tmp_path / "model")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (model / name).unlink(missing_ok=True)
    file = write_jsonl(tmp_path / "pairs.jsonl", image_rows(4, tmp_path))
    words = ["--model", str(model), "--dataset", str(file), "--output_dir", str(tmp_path / "run")]
    assert main(["train", *words, "--use_cpu"]) == 2
    assert "sees none: wanted a model of images and text with its processor" in capsys.readouterr().err
