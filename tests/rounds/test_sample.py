"""``fastdpo sample``: which prompts, which answers, and that a killed run ends as one that was not."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.cli import main
from fastdpo.rounds.generation import Drawing, TransformersSampler
from fastdpo.rounds.prompts import PromptReader, read_prompts
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.source import read_rows
from fastdpo.training.settings.encoding import EncodingOptions
from tests.conftest import SHARED_DATA
from tests.rounds.conftest import counted_calls, killed_after, read
from tests.training.conftest import bpe_text, made_tokenizer, write_jsonl
from tests.training.data.data_cases import assistant, user

Run = Callable[..., int]


def test_answers_of_strings_and_of_messages(sample: Run):
    assert sample("--num_samples", "3") == 0
    rows, prompts = read("samples.jsonl"), read("prompts.jsonl")
    assert [(row["prompt"], row["letter"]) for row in rows] == [
        (row["prompt"], row["letter"]) for row in prompts
    ]
    assert {len(row["completions"]) for row in rows} == {3} == {len(row["finished"]) for row in rows}
    assert all(isinstance(answer, str) for row in rows for answer in row["completions"])
    assert sample(dataset="chats.jsonl", output="talks.jsonl") == 0
    (answer,) = read("talks.jsonl")[0]["completions"][0]
    assert answer["role"] == "assistant" and answer["content"]


def test_sampling_is_of_the_models_own_distribution(models: Path):
    """First tokens, drawn by the thousand, against the softmax; no top_k of 50, no temperature by stealth."""
    tokenizer = made_tokenizer(bpe_text())
    prompt = tokenizer("river stone:")["input_ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(models / "policy")
    other: Any = AutoModelForCausalLM.from_pretrained(models / "reference")
    with torch.no_grad():
        one, two = (m(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for m in (model, other))
    names = {"policy": {"model": str(models / "policy")}}
    names["mixture"] = {**names["policy"], "ref_model": str(models / "reference")}
    for source, wanted in (("policy", one / 0.7), ("mixture", (0.75 * one + 0.25 * two) / 0.7)):
        how = Drawing(temperature=0.7, top_p=1.0, max_new_tokens=1)
        sampler = TransformersSampler(
            names[source], tokenizer, how, loading={}, use_cpu=True, mixture_weight=0.25
        )
        # An end is cut off, so what is counted beside the tokens is that there is none.
        (drawn,) = sampler.draw([prompt], 4000, seed=0)
        counts = torch.zeros(len(one))
        for answer in drawn:
            counts[answer.ids[0] if answer.ids else tokenizer.eos_token_id] += 1
        chances = wanted.softmax(-1)
        # Total variation of 4000 draws over 360 tokens is within 0.15 of the truth, by simulation.
        simulated = torch.multinomial(chances, 4000, replacement=True).bincount(minlength=len(one))
        noise = (simulated / 4000 - chances).abs().sum() / 2
        assert (counts / 4000 - chances).abs().sum() / 2 < 1.3 * noise


def test_the_mixture_is_that_of_both_models_at_every_token(models: Path):
    """Its cache and its padding against plain forward passes, greedily."""
    tokenizer = made_tokenizer(bpe_text())
    prompts = [tokenizer(text)["input_ids"] for text in ("river stone bright:", "cloud:")]
    names = {"model": str(models / "policy"), "ref_model": str(models / "reference")}
    sampler = TransformersSampler(
        names, tokenizer, Drawing(0.0, 1.0, 6), loading={}, use_cpu=True, mixture_weight=0.4
    )
    loaded: list[Any] = [AutoModelForCausalLM.from_pretrained(name) for name in names.values()]
    for prompt, (drawn,) in zip(prompts, sampler.draw(prompts, 1, seed=0), strict=True):
        ids = list(prompt)
        for token in drawn.ids:
            with torch.no_grad():
                one, two = (m(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for m in loaded)
            assert token == int((0.6 * one + 0.4 * two).argmax())
            ids.append(token)


def test_prompts_are_those_that_training_sees():
    """Every format that has a prompt, and none of its own: the same token ids."""
    tokenizer = made_tokenizer(bpe_text())
    talk, answer, other = [user("river?")], [assistant("stone")], [assistant("cloud")]
    system = {"role": "system", "content": "be quiet"}
    row: dict[str, Any]
    for row in (
        {"prompt": "river:", "chosen": " stone", "rejected": " cloud"},
        {"chosen": "river: stone", "rejected": "river: cloud"},
        {"prompt": talk, "chosen": answer, "rejected": other},
        {"chosen": [*talk, *answer], "rejected": [*talk, *other]},
        {"prompt": "river?", "chosen": [*talk, *answer], "rejected": [*talk, *other]},
        {"prompt": talk, "chosen": [system, *talk, *answer], "rejected": [system, *talk, *other]},
        {"prompt": [user([{"type": "text", "text": "river?"}])], "chosen": answer, "rejected": other},
    ):
        data = encode_rows(read_rows([row]), tokenizer, EncodingOptions())
        trained = data[0].prompt.tolist()
        found = PromptReader("rows", tokenizer).read(row, 1)
        assert list(found.ids) == trained
        # And what is written is read so again.
        answer_of = " x" if isinstance(found.value, str) else [assistant("x")]
        again = {
            "prompt": found.value,
            "chosen": answer_of,
            "rejected": row["rejected"][-1:] if found.is_chat else " y",
        }
        assert encode_rows(read_rows([again]), tokenizer, EncodingOptions())[0].prompt.tolist() == trained


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data are not beside this checkout")
def test_prompts_of_real_data(preference_rows: list[dict[str, Any]]):
    tokenizer = made_tokenizer(bpe_text())
    rows = preference_rows[:40]
    data = encode_rows(read_rows(rows), tokenizer, EncodingOptions(max_length=None))
    prompts, bad = read_prompts(read_rows(rows), tokenizer, prompt_column=None, ignored=(), skips=True)
    by_number = {prompt.number: list(prompt.ids) for prompt in prompts}
    assert len(data) > 30
    assert all(by_number[data[place].number] == data[place].prompt.tolist() for place in range(len(data)))


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_killed_run_goes_on(sample: Run, monkeypatch: pytest.MonkeyPatch, batches: int):
    words = ("--batch_size", "4", "--num_samples", "2")
    assert sample(*words, output="whole.jsonl") == 0
    with killed_after(monkeypatch, TransformersSampler, "draw", batches):
        sample(*words)
    # A line that was being written when the process died.
    for part in Path("samples.jsonl.partial").glob("part-*"):
        part.write_bytes(part.read_bytes() + b'{"source": "pol')
    assert not Path("samples.jsonl").exists()
    with counted_calls(monkeypatch, TransformersSampler, "draw") as calls:
        assert sample(*words) == 0
    assert len(calls) == 3 - batches
    assert Path("samples.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not Path("samples.jsonl.partial").exists()


def test_a_run_of_other_settings_is_not_gone_on_with(
    sample: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ("--batch_size", "4", "--num_samples", "2")
    with killed_after(monkeypatch, TransformersSampler, "draw", 1):
        sample(*words)
    assert sample(*words, "--temperature", "0.5") == 2
    assert "unfinished work with other settings: temperature 1.0 -> 0.5" in capsys.readouterr().err
    assert sample(*words, "--temperature", "0.5", "--overwrite_output") == 0
    assert sample(*words) == 2
    assert "samples.jsonl is there" in capsys.readouterr().err


def test_samples_of_several_sources(sample: Run, models: Path):
    reference = ("--ref_model", str(models / "reference"))
    counts = "--num_samples 1 --num_reference_samples 2 --num_mixture_samples 1"
    assert sample(*reference, *counts.split()) == 0
    assert {tuple(row["sources"]) for row in read("samples.jsonl")} == {
        ("policy", "reference", "reference", "mixture")
    }


def test_an_adapter_samples(sample: Run, models: Path, tmp_path: Path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(models / "policy")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    tokenizer = ("--tokenizer", str(models / "policy"))
    assert sample("--model", str(tmp_path / "adapter"), *tokenizer) == 0
    assert sample(output="plain.jsonl") == 0
    assert read("samples.jsonl") != read("plain.jsonl")


BAD = (
    (
        "--max_new_tokens 2045",
        "wanted 3 at most: the model has 2048 positions, of which max_new_tokens takes 2045",
    ),
    ("--temperature 0", "temperature: got 0 with 4 samples of the policy"),
    ("--top_p 0", "top_p: got 0"),
    ("--num_mixture_samples 1", "ref_model: got none, wanted one for samples of the mixture"),
    ('--generation_kwargs {"top_q":3}', "generation_kwargs: got 'top_q', which is no setting"),
    ('--generation_kwargs {"temperature":3}', "generation_kwargs: got 'temperature', which has a setting"),
    ("--teacher_model x", "teacher_model: got x"),
    ("--num_sample 3", "did you mean --num_samples?"),
    ("--beta 0.1", "unknown argument --beta"),
    ("--output samples.txt", "output: got samples.txt, wanted a file ending in .jsonl"),
    ("--output prompts.jsonl", "which is the data that is read"),
    ("--skip_rows 6", "skip_rows and max_rows: got rows 7 to 6"),
    ("--dataset nothing.jsonl", "no such file"),
    ("--model nothing/here/at/all", "model: got 'nothing/here/at/all', and there is no such folder"),
    ("--sampler vllm", "sampler: got 'vllm' with use_cpu"),
)


@pytest.mark.parametrize(("words", "message"), BAD, ids=[words for words, _ in BAD])
def test_bad_input(sample: Run, capsys: pytest.CaptureFixture[str], words: str, message: str):
    assert sample(*words.split()) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().glob("samples.jsonl*/part-*")) and not Path("samples.jsonl").exists()


def test_bad_rows_are_named_or_left_out(sample: Run, capsys: pytest.CaptureFixture[str]):
    rows: list[dict[str, Any]] = [{"prompt": text} for text in ("river:", "", "stone " * 3000, "cloud:")]
    write_jsonl(Path("bad.jsonl"), [*rows, {"prompt": None}])
    assert sample(dataset="bad.jsonl") == 2
    message = capsys.readouterr().err
    assert "an empty prompt in row 2" in message and "a text that is missing in row 5" in message
    assert sample("--on_bad_row", "skip", dataset="bad.jsonl") == 0
    assert "2 of 5 prompts" in capsys.readouterr().out
    assert [row["prompt_row"] for row in read("samples.jsonl")] == ["1", "4"]


def test_messages_without_a_chat_template(sample: Run, here: Path, capsys: pytest.CaptureFixture[str]):
    made_tokenizer(bpe_text(), chat_template=None).save_pretrained(here / "plain")
    assert sample("--tokenizer", "plain", dataset="chats.jsonl") == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err


def test_vllm_that_is_not_there(models: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setitem(sys.modules, "vllm", None)
    words = f"sample --model {models / 'policy'} --dataset prompts.jsonl --output s.jsonl --sampler vllm"
    assert main(words.split()) == 2
    assert "sampler: got 'vllm', which is not installed here" in capsys.readouterr().err


def test_what_vllm_is_asked_for(models: Path, here: Path, monkeypatch: pytest.MonkeyPatch):
    """With a stand-in for the library, which is not there: the engine itself was not run."""
    tokenizer = AutoTokenizer.from_pretrained(models / "policy")

    class Engine:
        def __init__(self, **options: Any) -> None:
            assert options["model"] == str(models / "policy") and options["dtype"] == "auto"

        def generate(self, prompts: Any, params: Any, **_: Any) -> Any:
            for prompt, how in zip(prompts, params, strict=True):
                ids = prompt["prompt_token_ids"]
                assert (how["n"], how["max_tokens"], how["top_k"]) == (2, 7, 5)
                assert tokenizer.eos_token_id in how["stop_token_ids"]
                answers = [
                    types.SimpleNamespace(token_ids=[ids[0], how["stop_token_ids"][0]], finish_reason="stop"),
                    types.SimpleNamespace(token_ids=[ids[0]] * 7, finish_reason="length"),
                ]
                yield types.SimpleNamespace(outputs=answers)

    library: Any = types.ModuleType("vllm")
    library.LLM, library.SamplingParams, library.TokensPrompt = Engine, dict, dict
    monkeypatch.setitem(sys.modules, "vllm", library)
    words = f"sample --model {models / 'policy'} --dataset prompts.jsonl --output s.jsonl --sampler vllm "
    assert (
        main([*words.split(), *'--num_samples 2 --max_new_tokens 7 --generation_kwargs {"top_k":5}'.split()])
        == 0
    )
    first = tokenizer.decode(tokenizer(read("prompts.jsonl")[0]["prompt"])["input_ids"][:1])
    assert read("s.jsonl")[0]["completions"] == [first, first * 7]
    assert read("s.jsonl")[0]["finished"] == [True, False]
