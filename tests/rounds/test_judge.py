"""``fastdpo judge``: whose word it is, what is made of it, and what is refused before anything is lost."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from fastdpo.cli import main
from fastdpo.rounds import judge as judging
from fastdpo.rounds.candidates import Verdict, read_candidates
from fastdpo.rounds.choose import Chooser
from fastdpo.rounds.judge_settings import JudgeArguments
from tests.rounds.conftest import killed_after, read
from tests.training.conftest import bpe_text, made_tokenizer, tiny_llama, write_jsonl

ANSWERS = (" river", " stone", " a", "", " a", " bright walk")


@pytest.fixture
def judge(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``fastdpo judge`` on rows, with further words: what it says, on either stream."""

    def run(rows: Sequence[dict[str, Any]], *words: str, code: int = 0) -> str:
        write_jsonl(Path("samples.jsonl"), rows)
        given = "judge --dataset samples.jsonl --output judged.jsonl --use_cpu --overwrite_output".split()
        assert main([*given, *words]) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    return run


def row(*answers: str, **more: Any) -> dict[str, Any]:
    return {"prompt": "river:", "completions": list(answers), **more}


def test_pairs_of_a_function(judge: Callable[..., str]):
    said = judge(
        [row(*ANSWERS, letter="x"), row(" a", " b"), row(" a"), row("", " ")], "--function", "rules:length"
    )
    (pair,) = read("judged.jsonl")
    assert (pair["chosen"], pair["rejected"], pair["letter"]) == (" bright walk", " a", "x")
    assert (pair["chosen_score"], pair["rejected_score"], pair["reward_gap"]) == (12, 2, 10)
    assert "1 pairs of 4 prompts, 11 answers (3 empty, 1 said before)" in said
    for words in ("1 without an answer to judge", "1 with a single candidate", "1 with equal scores alone"):
        assert words in said
    report = json.loads(Path("judged.report.json").read_text())
    assert report["written"] == 1 and report["empty"] == 3 and report["duplicates"] == 1


def test_ties_go_to_the_first_and_are_counted(judge: Callable[..., str]):
    said = judge([row(" aa", " bb", " c", " d")], "--function", "rules.py:length")
    (pair,) = read("judged.jsonl")
    assert (pair["chosen"], pair["rejected"]) == (" aa", " c")
    assert "ties, of which the first drawn counts: 1 with several best, 1 with several worst" in said


def test_all_pairs_above_a_margin(judge: Callable[..., str]):
    answers = [" " + "a" * count for count in (1, 3, 4, 8)]
    words = ("--function", "rules:length", "--pairs", "all")
    judge([row(*answers)], *words, "--min_margin", "3")
    gaps = [(pair["chosen_score"], pair["rejected_score"]) for pair in read("judged.jsonl")]
    assert sorted(gaps) == [(5, 2), (9, 2), (9, 4), (9, 5)]
    judge([row(*answers)] * 3, *words, "--max_pairs", "2")
    assert len(read("judged.jsonl")) == 6
    said = judge([row(*answers[:2])], *words, "--min_margin", "3", code=2)
    assert "1 with no pair as far apart as min_margin: nothing left to write" in said


def test_best_and_a_random_worse_one(judge: Callable[..., str]):
    rows = [row(" aaaa", " a", " aa", " bbbb")] * 40
    judge(rows, "--function", "rules:length", "--pairs", "best_random")
    pairs = read("judged.jsonl")
    assert {pair["chosen"] for pair in pairs} == {" aaaa"}
    assert {pair["rejected"] for pair in pairs} == {" a", " aa"}


def test_lists_and_messages(judge: Callable[..., str]):
    talk = [{"role": "user", "content": "river?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("aa", "a", "", "a")]
    rows = [{"prompt": talk, "completions": answers}]
    judge(rows, "--function", "rules:length", "--format", "lists")
    assert read("judged.jsonl") == [{"prompt": talk, "completions": answers[:2], "scores": [2.0, 1.0]}]


def test_win_rates_of_scores_and_of_comparisons(judge: Callable[..., str]):
    """Of three lengths, and a repeated answer, which is a sample of the policy as the first is."""
    rows = [row(" a", " aa", " a", " aaaa")]
    judge(rows, "--function", "rules:length")
    (pair,) = read("judged.jsonl")

    def chance(gap: float) -> float:
        return 1 / (1 + math.exp(-gap))

    assert pair["chosen_win_rate"] == pytest.approx((2 * chance(3) + chance(2)) / 3)
    assert pair["rejected_win_rate"] == pytest.approx((chance(-1) + 0.5 + chance(-3)) / 3)
    judge(rows, "--pairwise", "rules:shorter", "--win_rate_against", "all")
    (pair,) = read("judged.jsonl")
    assert (pair["chosen"], pair["chosen_win_rate"]) == (" a", (0.5 + 0.5 + 1 + 1) / 4)
    assert (pair["rejected"], pair["rejected_win_rate"]) == (" aaaa", 0.5 / 4)


def test_samples_against_another_source(judge: Callable[..., str]):
    rows = [row(" a", " aaa", " aa", sources=["policy", "policy", "mixture"])]
    words = "--pairwise rules:shorter --format samples --win_rate_against"
    judge(rows, *words.split(), "mixture")
    assert [(one["completion"], one["win_rate"]) for one in read("judged.jsonl")] == [
        (" a", 1.0),
        (" aaa", 0.0),
    ]
    said = judge(rows, *words.split(), "reference", code=2)
    assert "win_rate_against: got 'reference', wanted a source of the samples: mixture, policy" in said


def test_which_answer_the_reference_gave(judge: Callable[..., str]):
    rows = [
        row(" a", " aa", sources=sources) for sources in (["policy", "reference"], ["reference", "policy"])
    ]
    judge(rows, "--function", "rules:length")
    assert [pair["chosen_is_reference"] for pair in read("judged.jsonl")] == [1, 0]


def test_a_tournament_asks_less_and_finds_the_best(judge: Callable[..., str], here: Path):
    (here / "asked.py").write_text(
        "ASKED = []\ndef longer(prompts, first, second):\n"
        "    ASKED.extend(zip(first, second))\n    return [len(a) > len(b) for a, b in zip(first, second)]\n"
    )
    answers = [" " + "a" * count for count in (1, 2, 3, 4, 5, 6, 7)]
    judge(
        [row(*answers)] * 5,
        "--pairwise",
        "asked:longer",
        "--comparisons",
        "tournament",
        "--pairs",
        "best_random",
    )
    assert {pair["chosen"] for pair in read("judged.jsonl")} == {answers[-1]}
    assert len(sys.modules["asked"].ASKED) == 5 * 6
    judge([row(*answers)], "--pairwise", "asked:longer", "--both_orders")
    assert len(sys.modules["asked"].ASKED) == 5 * 6 + 2 * 21


def test_a_bias_of_place_is_seen_through(judge: Callable[..., str], here: Path):
    (here / "biased.py").write_text("def first(prompts, first, second):\n    return [1.0] * len(prompts)\n")
    judge([row(" a", " b", " c")], "--pairwise", "biased:first")
    assert read("judged.jsonl")[0]["chosen"] == " a"
    said = judge([row(" a", " b", " c")], "--pairwise", "biased:first", "--both_orders", code=2)
    assert "1 with equal scores alone: nothing left to write" in said


def test_what_max_new_tokens_cut_off_may_be_left_out(judge: Callable[..., str]):
    rows = [row(" aaa", " aa", " a", finished=[False, True, True])]
    assert "1 cut off by max_new_tokens" in judge(rows, "--function", "rules:length")
    assert read("judged.jsonl")[0]["chosen"] == " aaa"
    judge(rows, "--function", "rules:length", "--drop_unfinished")
    assert read("judged.jsonl")[0]["chosen"] == " aa"


JUDGES = {
    "few": ("return [1.0]", "returned 1 numbers, wanted 2, one for each"),
    "nan": ("return [1.0, float('nan')]", "returned nan, wanted a finite number"),
    "none": ("return [None, 1.0]", "returned None, wanted a number"),
    "text": ("return 'ab'", "returned str, wanted a list of 2 numbers"),
    "fails": ("return [1 / 0] * 2", "fails: ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_that_says_something_else(judge: Callable[..., str], here: Path, name: str):
    body, message = JUDGES[name]
    (here / f"bad_{name}.py").write_text(f"def score(prompts, completions):\n    {body}\n")
    Path("judged.jsonl").write_text("kept")
    said = judge([row(" a", " b")], "--function", f"bad_{name}.py:score", code=2)
    assert message in said and "samples.jsonl, row 1" in said
    assert Path("judged.jsonl").read_text() == "kept"


BAD = (
    ([row(" a", " b")], "--function rules:nothing", "rules has no function 'nothing'; it has length, vowels"),
    ([row(" a", " b")], "--function nowhere:length", "no such module"),
    ([row(" a", " b")], "--function length", "wanted module:function"),
    ([row(" a", " b")], "", "judge: got none, wanted one of reward_model"),
    ([row(" a", " b")], "--function rules:length --both_orders", "both_orders: got True with function"),
    ([row(" a", " b")], "--function rules:length --max_pairs 3", "max_pairs: got 3 with pairs best_worst"),
    ([row(" a", " b")], "--pairwise rules:length", "pairwise: length fails: TypeError"),
    ([{"prompt": "a", "chosen": "b"}], "--function rules:length", "wanted prompt and completions"),
    ([row(" a", " b", finished=[True])], "--function rules:length", "column 'finished': wanted a list of 2"),
    ([row(" a", 3)], "--function rules:length", "wanted strings behind a string"),
    ([row(" a", " b")], "--reward_model nothing/here/at/all", "reward_model: got 'nothing/here/at/all'"),
    ([row(" a", " b")], "--judge_model m", "judge_prompt: got none with judge_model"),
)


@pytest.mark.parametrize(
    ("rows", "words", "message"), BAD, ids=[f"{words} {at}" for at, (_, words, _) in enumerate(BAD)]
)
def test_bad_input(judge: Callable[..., str], rows: list[dict[str, Any]], words: str, message: str):
    assert message in judge(rows, *words.split(), code=2)
    assert not Path("judged.jsonl").exists()


def test_a_killed_run_keeps_its_verdicts(
    judge: Callable[..., str], here: Path, monkeypatch: pytest.MonkeyPatch
):
    (here / "once.py").write_text(
        "SEEN = []\ndef score(prompts, completions):\n    SEEN.extend(completions)\n"
        "    return [len(text) for text in completions]\n"
    )
    rows = [row(f" {'a' * n}", f" {'b' * (n + 1)}") for n in range(1, 11)]
    words = ("judge", "--dataset", "samples.jsonl", "--use_cpu", "--function", "once:score", "--output")
    monkeypatch.setattr(judging, "ROWS_AT_ONCE", 4)
    write_jsonl(Path("samples.jsonl"), rows)
    assert main([*words, "whole.jsonl"]) == 0
    with killed_after(monkeypatch, judging.PartialWork, "add", 1):
        main([*words, "judged.jsonl"])
    del sys.modules["once"].SEEN[:]
    assert main([*words, "judged.jsonl"]) == 0
    assert len(sys.modules["once"].SEEN) == 2 * 6
    assert Path("judged.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


# A tokenizer and a template that are not the policy's: every word is a token of its own.
REWARD_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"


@pytest.fixture
def reward_dir(here: Path) -> Path:
    made_tokenizer(bpe_text(), chat_template=REWARD_TEMPLATE, pad_token=None).save_pretrained("reward")
    torch.manual_seed(5)
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "num_labels": 1, "max_position_embeddings": 64})
    LlamaForSequenceClassification(config).save_pretrained("reward")
    return here / "reward"


def test_a_reward_model_reads_with_its_own_tokenizer_and_template(
    judge: Callable[..., str], reward_dir: Path
):
    """Each score is that of the one row alone, without padding."""
    talk = [{"role": "user", "content": "river?"}]
    texts = ["stone", "bright walk seven", "a"]
    rows = [
        {"prompt": talk, "completions": [[{"role": "assistant", "content": text}] for text in texts]},
        {"prompt": "river:", "completions": [" stone", " bright walk"]},
    ]
    judge(rows, "--reward_model", "reward", "--format", "lists", "--judge_batch_size", "4")
    tokenizer, model = AutoTokenizer.from_pretrained("reward"), _classifier()
    told = [f"[user] river?[assistant] {text}" for text in texts], ["river: stone", "river: bright walk"]
    for found, wanted in zip(read("judged.jsonl"), told, strict=True):
        for score, text in zip(found["scores"], wanted, strict=True):
            with torch.no_grad():
                alone = model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits
            assert score == pytest.approx(float(alone), abs=1e-5)


def _classifier() -> Any:
    model: Any = AutoModelForSequenceClassification.from_pretrained("reward").eval()
    model.config.pad_token_id = 1
    return model


def test_reward_models_that_cannot_judge(judge: Callable[..., str], reward_dir: Path):
    words = ("--reward_model", "reward")
    long = judge([row(" a", " b"), row(" a", " stone" * 80)], *words, code=2)
    assert "samples.jsonl, row 2: got" in long and "wanted 64 at most" in long
    config = json.loads((reward_dir / "config.json").read_text())

    def broken(**changes: Any) -> None:
        (reward_dir / "config.json").write_text(json.dumps({**config, **changes}))

    broken(id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    assert "it has 2 labels, wanted a model with one" in judge([row(" a", " b")], *words, code=2)
    broken()
    weights = (reward_dir / "model.safetensors").read_bytes()
    tiny_llama().save_pretrained("reward")
    broken()
    assert "has no weights of score.weight: it is no reward model" in judge([row(" a", " b")], *words, code=2)
    (reward_dir / "model.safetensors").write_bytes(weights)
    made_tokenizer(bpe_text(), chat_template=None).save_pretrained("reward")
    talk = {
        "prompt": [{"role": "user", "content": "a"}],
        "completions": [[{"role": "assistant", "content": "b"}]] * 2,
    }
    (reward_dir / "chat_template.jinja").unlink(missing_ok=True)
    assert "the tokenizer of reward has no chat template" in judge([talk], *words, code=2)
    tokenizer = made_tokenizer(bpe_text())
    tokenizer.add_tokens([f" zebra{number}" for number in range(100, 300)])
    tokenizer.save_pretrained("reward")
    said = judge([row(" a", " zebra299")], *words, code=2)
    assert "and the model has 360: it is another model's" in said
    assert not Path("judged.jsonl").exists()


def test_a_reward_model_that_gives_nan(judge: Callable[..., str], reward_dir: Path):
    model = _classifier()
    model.score.weight.data.fill_(float("nan"))
    model.save_pretrained("reward")
    assert "gives nan for an answer of samples.jsonl, row 1" in judge(
        [row(" a", " b")], "--reward_model", "reward", code=2
    )


def test_a_model_that_writes_its_judgement(judge: Callable[..., str], models: Path):
    """Of a random model: digits by chance, which are averaged; an answer without any has no score."""
    Path("ask.txt").write_text("{prompt} {completion} Score:")
    words = [
        "--judge_model",
        str(models / "policy"),
        "--judge_prompt",
        "ask.txt",
        "--judge_pattern",
        r"([0-9])",
    ]
    drawing = "--judge_samples 2 --judge_temperature 1.0 --judge_max_new_tokens 16 --format lists"
    said = judge([row(*ANSWERS)] * 8, *words, *drawing.split())
    assert "without a score in their judgement" in said
    scores = [score for found in read("judged.jsonl") for score in found["scores"]]
    assert scores and all(score * 2 == int(score * 2) and 0 <= score <= 9 for score in scores)
    said = judge([row(" a", " b")], *words, *drawing.split(), "--judge_max_new_tokens", "2045", code=2)
    assert "judge_model: samples.jsonl, row 1: the question has" in said


@pytest.mark.parametrize("format", ["pairs", "lists", "samples"])
def test_training_reads_what_is_written(judge: Callable[..., str], models: Path, format: str):
    judge([row(*ANSWERS)] * 4, "--function", "rules:length", "--format", format)
    loss = {"pairs": "sigmoid", "lists": "plackett_luce", "samples": "nash_md"}[format]
    words = (
        f"train --model {models / 'policy'} --dataset judged.jsonl --output_dir out --use_cpu --max_steps 1 "
        f"--per_device_train_batch_size 2 --disable_tqdm --loss_type {loss} --save_strategy no"
    )
    assert main(words.split()) == 0


def test_the_choice_is_of_the_seed_alone():
    candidates = read_candidates(row(*(f" {'a' * n}" for n in range(1, 8))), 3, "rows")

    def chosen(seed: int) -> list[dict[str, Any]]:
        args = JudgeArguments(
            dataset="d", output="o.jsonl", function="f", pairs="all", max_pairs=3, seed=seed
        )
        chooser = Chooser(args, "rows")
        return list(
            chooser.rows(candidates, chooser.unlike(candidates), Verdict([float(n) for n in range(7)]))
        )

    assert chosen(1) == chosen(1) != chosen(2)
