"""Token ids and positions that a model lacks are named before the first step, with the row and both sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fastdpo import cli
from fastdpo.training.data.model_fit import position_table
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import VOCABULARY, make_rows, tiny_llama, write_jsonl
from tests.training.data.data_cases import row_of

MakeArgs = Callable[..., PreferenceConfig]
MakeTokenizer = Callable[..., Any]


def tiny_gpt2(positions: int, vocabulary: int = VOCABULARY) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocabulary, n_positions=positions, bos_token_id=1, eos_token_id=1, **sizes)
    )


LOSS_ROWS = {
    "sigmoid": lambda p, a: row_of("pairs", p, a, " walk"),
    "kto": lambda p, a: row_of("unpaired", p, a, None),
    "sdpo": lambda p, a: row_of("listwise", p, a, " walk"),
    "in_context_ranking": lambda p, a: row_of("ranking", p, a, " walk"),
    "nash_md": lambda p, a: row_of("samples", p, a, None),
}


@pytest.mark.parametrize("loss", LOSS_ROWS)
def test_a_token_added_without_a_resize(make_args: MakeArgs, make_tokenizer: MakeTokenizer, loss: str):
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    texts = [("river:", " stone"), ("river:", " lamp"), ("walk:", " <tool> stone")]
    rows = [LOSS_ROWS[loss](*text) for text in texts]
    with pytest.raises(
        ValueError, match=rf"model: token ids .* row 3 of dataset has the id {size} .*below {size}"
    ):
        model = tiny_llama(vocab_size=size)
        PreferenceTrainer(model, make_args(loss_type=loss), train_dataset=rows, processing_class=tokenizer)


def test_doctor_says_so(tmp_path: Path, make_tokenizer: MakeTokenizer, capsys: pytest.CaptureFixture[str]):
    tokenizer = make_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path / "model")
    path = write_jsonl(tmp_path / "pairs.jsonl", [*make_rows(2), {**make_rows(1)[0], "chosen": " <tool>"}])
    words = ["--model", str(tmp_path / "model"), "--dataset", str(path), "--use_cpu"]
    assert cli.main(["doctor", *words]) == 2
    assert "refused" in (text := capsys.readouterr().out) and "token ids that the model lacks: row 3" in text
    assert cli.main(["score", *words, "--reference_cache_dir", str(tmp_path / "cache")]) == 2
    assert "token ids that the model lacks: row 3" in capsys.readouterr().err


def test_every_model_has_to_have_them(make_args: MakeArgs, make_tokenizer: MakeTokenizer):
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    larger = tiny_llama(vocab_size=size + 1)
    rows = [{**row, "chosen": " <tool>"} for row in make_rows(2)]
    with pytest.raises(ValueError, match="ref_model: token ids that the model lacks: row 1"):
        PreferenceTrainer(
            larger,
            make_args(),
            train_dataset=rows,
            processing_class=tokenizer,
            ref_model=tiny_llama(vocab_size=size),
        )
    trainer = PreferenceTrainer(
        tiny_llama(vocab_size=size), make_args(), train_dataset=make_rows(2), processing_class=tokenizer
    )
    with pytest.raises(ValueError, match="model: token ids that the model lacks: row 1"):
        trainer.evaluate(rows)
    with pytest.raises(ValueError, match="model: token ids that the model lacks: row 1"):
        PreferenceTrainer(
            tiny_llama(vocab_size=size),
            make_args(),
            train_dataset=make_rows(2),
            eval_dataset={"a": rows},
            processing_class=tokenizer,
        )


def test_a_padding_token_that_the_model_lacks_does_no_harm(
    make_args: MakeArgs, make_tokenizer: MakeTokenizer
):
    """Padding is masked, so another id does as well; the classic token added without a resize."""
    losses = []
    for pad in ("<pad>", "[PAD]"):
        tokenizer = make_tokenizer(pad_token=pad)
        args = make_args(max_steps=1, overwrite_output_dir=True)
        trainer = PreferenceTrainer(
            tiny_llama(), args, train_dataset=make_rows(4), processing_class=tokenizer
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["logps/chosen"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_a_sequence_beyond_the_position_table(make_args: MakeArgs, tokenizer: Any, loss: str):
    long = " stone" * 30
    rows = [
        LOSS_ROWS[loss]("river:", " stone"),
        LOSS_ROWS[loss]("lamp:", long),
        LOSS_ROWS[loss]("walk:", " seed"),
    ]
    longest = len(tokenizer("lamp:" + long)["input_ids"]) + 1
    name = f"row 2 of dataset has {longest} tokens"
    with pytest.raises(
        ValueError, match=rf"model: more tokens than the model has positions: {name}; wanted 24 at most"
    ):
        PreferenceTrainer(
            tiny_gpt2(24), make_args(loss_type=loss), train_dataset=rows, processing_class=tokenizer
        )
    # Where it fits to the token, it runs; padding to a multiple reaches beyond.
    args = {"loss_type": loss, "max_steps": 1, "report_to": "none"}
    model = tiny_gpt2(longest)
    if loss == "sigmoid":
        PreferenceTrainer(model, make_args(**args), train_dataset=rows, processing_class=tokenizer).train()
        with pytest.raises(ValueError, match="with padding to a multiple of 64"):
            PreferenceTrainer(
                model,
                make_args(**args, pad_to_multiple_of=64),
                train_dataset=rows,
                processing_class=tokenizer,
            )


def test_mismatched_answers_need_positions_too(make_args: MakeArgs, tokenizer: Any):
    """KTO: the longest prompt with the longest answer, of two rows."""
    long = " stone" * 10
    rows = [LOSS_ROWS["kto"]("river:", long), LOSS_ROWS["kto"]("lamp" + long + ":", " walk")]
    data = PreferenceTrainer(
        tiny_llama(), make_args(loss_type="kto"), train_dataset=rows, processing_class=tokenizer
    )
    longest = int(data.train_dataset.lengths.max())
    with pytest.raises(
        ValueError, match="row 2 of dataset has .* more tokens than|more tokens .* row 2 of dataset"
    ):
        PreferenceTrainer(
            tiny_gpt2(longest + 2), make_args(loss_type="kto"), train_dataset=rows, processing_class=tokenizer
        )


def test_virtual_tokens_take_positions(make_args: MakeArgs, tokenizer: Any):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    args = {"train_dataset": make_rows(3), "processing_class": tokenizer, "peft_config": config}
    longest = int(PreferenceTrainer(tiny_gpt2(200), make_args(), **args).train_dataset.lengths.max())
    with pytest.raises(ValueError, match="7 virtual tokens; wanted"):
        PreferenceTrainer(tiny_gpt2(longest + 6), make_args(), **args)
    PreferenceTrainer(tiny_gpt2(longest + 7), make_args(), **args)


def test_rotary_models_go_on_with_a_warning(
    make_args: MakeArgs, tokenizer: Any, caplog: pytest.LogCaptureFixture
):
    model = tiny_llama(max_position_embeddings=8)
    PreferenceTrainer(model, make_args(), train_dataset=make_rows(3), processing_class=tokenizer)
    assert "more than the 8 that its configuration says" in caplog.text


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("gpt2", 40), ("opt", 40), ("gptj", 40), ("gpt_neo", 40), ("codegen", 40), ("gpt_bigcode", 40),
        ("ctrl", 40), ("biogpt", 40), ("openai-gpt", 40), ("bart", 40), ("bert", 40), ("roberta", 38),
        ("xglm", None), ("llama", None), ("gpt_neox", None), ("bloom", None), ("falcon", None),
    ],
)  # fmt: skip
def test_tables_of_positions(family: str, wanted: int | None):
    config = AutoConfig.for_model(family)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
    small |= {"intermediate_size": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    for name, value in {
        **small,
        "max_position_embeddings": 40,
        "n_positions": 40,
        "is_decoder": True,
    }.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.pad_token_id = 1 if family == "roberta" else None if family in ("gpt2",) else 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert position_table(model) == wanted
