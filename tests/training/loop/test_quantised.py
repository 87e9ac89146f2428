"""Bases of 4 and 8 bits: trained under adapters as TRL trains them, saved, gone on with, merged, refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastdpo.cli import main
from fastdpo.training.loop.models import load_model
from fastdpo.training.settings.command_line import parse_train
from tests.training.conftest import (
    made_tokenizer,
    make_rows,
    quick_args,
    read_metrics,
    tiny_llama,
    write_jsonl,
)

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
ROWS = make_rows(16)
_WORDS = (
    "--use_cpu --use_peft --max_steps 4 --per_device_train_batch_size 4 --logging_steps 1 "
    "--learning_rate 1e-2 --disable_tqdm --save_steps 2 --report_to none --lora_r 4"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, trained_bpe: str) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    for name, tied in (("model", False), ("tied", True)):
        model = tiny_llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=tied)
        model.save_pretrained(folder / name)
        made_tokenizer(trained_bpe).save_pretrained(folder / name)
    write_jsonl(folder / "data.jsonl", ROWS)
    return folder


def train(folder: Path, name: str, *words: str, model: str = "model") -> Path:
    out = folder / name
    given = [
        "--model",
        str(folder / model),
        "--dataset",
        str(folder / "data.jsonl"),
        "--output_dir",
        str(out),
    ]
    assert main(["train", *given, *_WORDS, *words]) == 0
    return out


def logps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float().log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None])


@needs_bitsandbytes
@pytest.mark.parametrize(
    "words",
    [
        "--load_in_4bit",
        "--load_in_8bit",
        "--load_in_4bit --use_dora",
        "--load_in_4bit --use_rslora --use_bnb_nested_quant --bnb_4bit_quant_type fp4",
        "--load_in_4bit --lora_target_modules q_proj lm_head",
        "--load_in_4bit --batch_layout shared_prompt --gradient_checkpointing",
        "--load_in_8bit --reference precomputed",
        "--load_in_4bit --dtype bfloat16",
        "--load_in_4bit --dtype bfloat16 --bf16",
    ],
)
def test_a_quantised_base_is_trained_under_an_adapter(folder: Path, words: str, tmp_path: Path):
    out = train(folder, tmp_path.name, *words.split(), "--reference_cache_dir", str(tmp_path))
    losses = [entry["loss"] for entry in read_metrics(out)]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5) and min(losses[1:]) < 0.692
    assert (out / "adapter_model.safetensors").is_file() and not (out / "model.safetensors").exists()


@needs_bitsandbytes
def test_the_adapter_merges_into_the_dequantised_base(folder: Path):
    out = train(folder, "to_merge", "--load_in_4bit")
    assert main(["merge", str(out), "--output_dir", str(folder / "merged"), "--dtype", "float32"]) == 0
    settings = yaml.safe_load((out / "settings.yaml").read_text())
    assert settings["load_in_4bit"] is True
    run = parse_train([str(out / "settings.yaml"), "--use_cpu"])
    trained = load_model(str(out), **run.loading_options()).eval()
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    merged = load_model(str(folder / "merged")).eval()
    assert not hasattr(merged, "peft_config") and not getattr(merged, "is_quantized", False)
    torch.testing.assert_close(logps(merged, ids), logps(trained, ids), rtol=0, atol=2e-4)
    plain = load_model(str(folder / "model"), dtype="float32").eval()
    assert (logps(merged, ids) - logps(plain, ids)).abs().max() > 0.05
    # Of the base's own weights it is another model.
    words = ["--output_dir", str(folder / "of_original"), "--base", "original", "--dtype", "float32"]
    assert main(["merge", str(out), *words]) == 0
    original = load_model(str(folder / "of_original")).eval()
    assert (logps(merged, ids) - logps(original, ids)).abs().max() > 1e-3
    # What is in use is not written into, and 16 bits are the default.
    assert main(["merge", str(out), "--output_dir", str(folder / "merged")]) == 2
    assert main(["merge", str(folder / "model"), "--output_dir", str(folder / "none")]) == 2


@needs_bitsandbytes
def test_a_quantised_run_goes_on_to_the_bit(folder: Path):
    out = train(folder, "whole", "--load_in_4bit")
    train(folder, "whole_2", "--load_in_4bit", "--resume_from_checkpoint", str(out / "checkpoint-2"))
    whole, part = read_metrics(out), read_metrics(folder / "whole_2")
    assert [e["loss"] for e in part[-2:]] == [e["loss"] for e in whole[-2:]]


def test_a_head_with_an_adapter_is_untied_by_merging(folder: Path):
    """Of a tied model, the embedding stays as it was."""
    out = train(folder, "tied_run", "--lora_target_modules", "lm_head", "q_proj", model="tied")
    assert main(["merge", str(out), "--output_dir", str(folder / "tied_merged"), "--dtype", "float32"]) == 0
    merged, before = load_model(str(folder / "tied_merged")), load_model(str(folder / "tied"))
    assert torch.equal(merged.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert not torch.equal(merged.get_output_embeddings().weight, before.get_output_embeddings().weight)
    trained = load_model(str(out)).eval()
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logps(merged.eval(), ids), logps(trained, ids), rtol=0, atol=2e-4)
    # Without one it stays tied.
    out = train(folder, "still_tied", "--lora_target_modules", "q_proj", model="tied")
    assert main(["merge", str(out), "--output_dir", str(folder / "still_merged")]) == 0
    merged = load_model(str(folder / "still_merged"))
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert next(merged.parameters()).dtype == torch.bfloat16


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_twenty_steps_are_trls(folder: Path, bits: int, tmp_path: Path, trained_bpe: str):
    """The same quantised model, adapter and order of rows, in fp32."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from fastdpo.training.loop.trainer import PreferenceTrainer

    how = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 8: {"load_in_8bit": True}}[bits]

    def model() -> Any:
        config = BitsAndBytesConfig(**how)
        return load_model(str(folder / "model"), dtype="float32", quantization_config=config)

    def adapter() -> LoraConfig:
        return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")

    rows = make_rows(80, seed=3)
    steps = {"max_steps": 20, "learning_rate": 5e-3, "lr_scheduler_type": "constant"}
    args = quick_args(tmp_path / "ours", train_sampling_strategy="sequential", **steps)
    tokenizer = made_tokenizer(trained_bpe)
    ours = PreferenceTrainer(
        model(), args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter()
    )
    theirs = trl.DPOTrainer(
        model(),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "theirs"), use_cpu=True, bf16=False, report_to="none", logging_steps=1,
            per_device_train_batch_size=4, save_strategy="no", train_sampling_strategy="sequential",
            gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False, **steps,
        ),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=adapter(),
    )  # fmt: skip
    # TRL rounds the adapter to bf16; what starts it off is made the same, in fp32.
    for (name, mine), (_, yours) in zip(
        ours.model.named_parameters(), theirs.model.named_parameters(), strict=True
    ):
        if mine.requires_grad:
            yours.data = mine.data.clone() if "lora_A" in name else torch.zeros_like(mine.data)
    ours.train()
    theirs.train()
    logged = [[e for e in t.state.log_history if "rewards/margins" in e] for t in (ours, theirs)]
    assert len(logged[0]) == len(logged[1]) == 20
    for mine, yours in zip(*logged, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm"):
            assert mine[name] == pytest.approx(yours[name], rel=1e-5, abs=1e-5), (mine["step"], name)
    assert logged[0][-1]["loss"] < 0.67


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--load_in_4bit", "--load_in_4bit: got True without an adapter, wanted --use_peft"),
        ("--use_peft --load_in_4bit --load_in_8bit", "load_in_4bit: got True with load_in_8bit"),
        ("--use_peft --load_in_4bit --bnb_4bit_quant_type int4", "bnb_4bit_quant_type: got 'int4'"),
        ("--use_peft --use_bnb_nested_quant", "use_bnb_nested_quant: got True without load_in_4bit"),
    ],
)
def test_what_few_bits_do_not_go_with(words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object())
    with pytest.raises(ValueError, match=said):
        parse_train(["--model", str(tmp_path), "--dataset", "d", "--use_cpu", *words.split()])


def test_without_the_library_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    for bits in (4, 8):
        words = f"--model m --dataset d --use_cpu --use_peft --load_in_{bits}bit"
        with pytest.raises(ValueError, match=f"load_in_{bits}bit: got True, which needs bitsandbytes"):
            parse_train(words.split())


@needs_bitsandbytes
def test_a_quantised_model_in_python_wants_an_adapter(folder: Path, tmp_path: Path):
    from transformers import BitsAndBytesConfig

    from fastdpo.training.loop.trainer import PreferenceTrainer

    model = load_model(str(folder / "model"), quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match="got one of 4 or 8 bits without an adapter"):
        PreferenceTrainer(model, quick_args(tmp_path), train_dataset=ROWS)
