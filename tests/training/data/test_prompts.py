"""The prompt inside the answers, and where it ends: cut where it is meant so, named where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import write_jsonl
from tests.training.data.data_cases import (
    ALL_KINDS,
    KINDS_OF_MESSAGES,
    assistant,
    encode,
    ids_of,
    row_of,
    texts_of,
    user,
)

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [user("seed"), assistant("lamp"), user("cloud")]


def whole(prompt: list[Any], text: str) -> list[Any]:
    return [*prompt, assistant(text)]


@pytest.mark.parametrize("kind", KINDS_OF_MESSAGES)
@pytest.mark.parametrize(
    ("prompt", "start", "wanted"),
    [
        ([user("seed")], [user("seed")], [user("seed")]),
        (TALK, TALK, TALK),
        ([user(" seed\n")], [user("seed")], [user("seed")]),
        ([user("seed")], [SYSTEM, user("seed")], [SYSTEM, user("seed")]),  # the answers have more of it
        ([SYSTEM, user("seed")], [user("seed")], [SYSTEM, user("seed")]),  # the answers have its end
        (TALK, TALK[2:], TALK),
        ("seed", [user("seed")], [user("seed")]),  # ultrafeedback's layout
        ("seed", [SYSTEM, user("seed")], [SYSTEM, user("seed")]),
    ],
)
def test_whole_conversations_beside_a_prompt(tokenizer: Any, kind: str, prompt: Any, start: Any, wanted: Any):
    rows = [
        row_of(kind, wanted, [assistant("ocean")], [assistant("walk")]),
        row_of(kind, prompt, whole(start, "ocean"), whole(start, "walk")),
    ]
    dataset = encode(kind, rows, tokenizer)
    assert ids_of(dataset, len(dataset) // 2) == ids_of(dataset, 0)
    assert dataset.report.found == {"prompt_repeated": [2]}
    assert "1 with the prompt repeated inside the answers, cut from them (row 2)" in str(dataset.report)


def test_one_answer_that_repeats_the_prompt_loses_it_alone(tokenizer: Any):
    rows = [
        row_of("pairs", TALK, [assistant("ocean")], [assistant("walk")]),
        row_of("pairs", TALK, whole(TALK, "ocean"), [assistant("walk")]),
    ]
    dataset = encode("pairs", rows, tokenizer)
    assert ids_of(dataset, 0) == ids_of(dataset, 1) and dataset.report.found == {"prompt_repeated": [2]}


@pytest.mark.parametrize(
    "prompt",
    ["stone", [user("other")], [user("other"), user("seed"), assistant("lamp")]],
    ids=["a text that is not theirs", "messages that are not theirs", "messages that go on"],
)
def test_another_prompt_is_not_cut(tokenizer: Any, prompt: Any):
    row = row_of("pairs", prompt, whole([user("seed")], "ocean"), whole([user("seed")], "walk"))
    if isinstance(prompt, str):
        with pytest.raises(
            ValueError, match=r"row 1: got .*leave the prompt column out \(--ignore_columns prompt\)"
        ):
            encode("pairs", [row], tokenizer)
        return
    dataset = encode("pairs", [row], tokenizer)
    assert "prompt_repeated" not in dataset.report.found and "seed" in texts_of(dataset, tokenizer)[1][0]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_prompts_text_in_all_rows_is_cut(tokenizer: Any, kind: str):
    """Half of the rows or more: the file is meant so."""
    clean = row_of(kind, "river:", " stone", " walk")
    doubled = row_of(
        kind, "river:", "river: stone", " walk" if kind in ("ranking", "steps") else "river: walk"
    )
    dataset = encode(kind, [doubled, clean, doubled], tokenizer)
    last = len(dataset) - 1
    assert ids_of(dataset, 0) == ids_of(dataset, last - (kind == "pair taken apart"))
    assert texts_of(dataset, tokenizer)[0] == "river:"
    assert texts_of(dataset, tokenizer)[1][0].startswith(" stone")
    assert dataset.report.found == {"prompt_repeated": [1, 3]}


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_prompts_text_in_a_few_rows_is_named(tokenizer: Any, kind: str):
    clean = [row_of(kind, f"river {i}:", " stone", " walk") for i in range(3)]
    doubled = row_of(
        kind, "river:", "river: stone", " walk" if kind in ("ranking", "steps") else "river: walk"
    )
    dataset = encode(kind, [*clean, doubled], tokenizer)
    assert dataset.report.found == {"prompt_echoed": [4]}
    assert texts_of(dataset, tokenizer, len(dataset) - 1 - (kind == "pair taken apart"))[1][0].startswith(
        "river: stone"
    )


def test_one_answer_of_two_that_begins_with_the_prompt_is_left_and_named(tokenizer: Any):
    row = row_of("pairs", "river", "river stone", " walk")
    dataset = encode("pairs", [row], tokenizer)
    assert (
        dataset.report.found == {"prompt_echoed": [1]}
        and texts_of(dataset, tokenizer)[1][0] == "river stone<eos>"
    )


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_ultrafeedbacks_layout_runs_from_the_command_line(
    tmp_path: Path, tokenizer: Any, loss: str, capsys: pytest.CaptureFixture[str]
):
    """A prompt as text, whole conversations beside it, and columns that nothing looks at."""
    from fastdpo import cli
    from tests.training.conftest import tiny_llama

    words = ("stone", "ocean", "cloud", "paper", "lamp", "seed")
    rows = [
        {
            "prompt": word,
            "prompt_id": f"{i:x}",
            "chosen": whole([user(word)], "river " + word),
            "rejected": whole([user(word)], "walk " + word),
            "messages": whole([user(word)], "river"),
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        }
        for i, word in enumerate(words)
    ]
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    common = [
        "train",
        "--model",
        str(tmp_path / "model"),
        "--dataset",
        str(write_jsonl(tmp_path / "rows.jsonl", rows)),
    ]
    common += [
        "--loss_type",
        loss,
        "--max_steps",
        "1",
        "--report_to",
        "none",
        "--use_cpu",
        "--save_strategy",
        "no",
    ]
    for number, more in enumerate([[], ["--ignore_columns", "prompt", "messages"]]):
        assert cli.main([*common, "--output_dir", str(tmp_path / f"out{number}"), *more]) == 0
