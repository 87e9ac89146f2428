"""Reference log-probabilities say of which tokens they are, and are refused for others; in every kind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from fastdpo import cli
from fastdpo.training.data.references import reference_columns, scores_by_row
from fastdpo.training.data.row import REF_MISMATCHED, REF_OF, REFERENCE
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows, read_metrics, tiny_llama, write_jsonl
from tests.training.data.data_cases import ALL_KINDS, KINDS_OF_MESSAGES, assistant, encode, row_of, user
from tests.training.data.templates import MARKED, PLAIN

MakeArgs = Callable[..., PreferenceConfig]
MakeTokenizer = Callable[..., Any]
REFERRED = tuple(
    kind for kind in ALL_KINDS if kind != "prompt-completion"
)  # which has no reference in columns
LONG, SHORT = " stone walk seven green quiet", " lamp"


def rows_of(kind: str) -> list[dict[str, Any]]:
    """A short row, a long one, and where the kind has messages one of several turns."""
    answers = [(SHORT, " winter"), (LONG, " winter"), (SHORT, " winter")]
    if kind in ("ranking", "steps"):  # a cut leaves two pieces
        answers[1] = (SHORT, LONG)
    rows = [row_of(kind, f"river {i}:", *pair) for i, pair in enumerate(answers)]
    if kind in KINDS_OF_MESSAGES:
        turns = [assistant("lamp"), user("cloud"), assistant("ocean")]
        rows.append(row_of(kind, [user("seed")], turns, [assistant("walk")]))
    return rows


def columns_of(kind: str, rows: list[Any]) -> tuple[str, ...]:
    filled = {name for row in rows for name in row}
    return reference_columns(
        filled, is_pairs=kind == "pairs", has_mismatched=REF_MISMATCHED in filled, is_trusted=True, source="x"
    )


def scored(kind: str, rows: list[Any], tokenizer: Any, *, value: float = -1.0, **options: Any) -> list[Any]:
    """The rows as ``fastdpo score`` writes them, by way of JSON; every number is the same."""
    dataset = encode(kind, rows, tokenizer, **options)
    dataset = dataset.with_reference(torch.full(dataset.score_shape, value))
    columns: dict[int, dict[str, Any]] = {}
    for number, values in scores_by_row(dataset):
        known = columns.get(number, {})
        columns[number] = {name: known[name] + v if name in known else v for name, v in values.items()}
    return [json.loads(json.dumps({**row, **columns[i]})) for i, row in enumerate(rows, 1) if i in columns]


def read_back(kind: str, rows: list[Any], tokenizer: Any, **options: Any) -> Any:
    return encode(kind, rows, tokenizer, references=columns_of(kind, rows), **options)


@pytest.mark.parametrize("kind", REFERRED)
@pytest.mark.parametrize("mismatched", [False, True])
def test_the_same_settings_read_them_back(make_tokenizer: MakeTokenizer, kind: str, mismatched: bool):
    mismatched = mismatched and kind in ("unpaired", "pair taken apart")
    tokenizer = make_tokenizer(chat_template=PLAIN)
    rows = scored(kind, rows_of(kind), tokenizer, mismatched=mismatched)
    dataset = read_back(kind, rows, tokenizer, mismatched=mismatched)
    assert dataset.has_reference and len(dataset.row_digests()) == len(set(dataset.row_digests())) == len(
        dataset
    )
    of = rows[0][REF_OF] if kind == "pairs" else rows[0][REF_OF][0]
    assert {part.split("=")[0] for part in of.split(" ")[1:]} == {
        "tokenizer", "chat_template", "max_length", "truncation_mode", "assistant_only"
    }  # fmt: skip
    assert dataset.subset([0, 1]).row_digests() == dataset.row_digests()[:2]


def with_bos(tokenizer: Any) -> Any:
    tokenizer.bos_token = "<bos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize("kind", REFERRED)
@pytest.mark.parametrize(
    ("change", "blame"),
    [
        ({"max_length": 12}, "max_length 1024, here 12"),
        ({"template": MARKED.replace("<|", "[").replace("|>", "]")}, "chat_template [0-9a-f]{8}, here"),
        ({"bos": True}, "tokenizer [0-9a-f]{8}, here"),
        ({"assistant_only": False}, "assistant_only True, here False"),
        ({"text": True}, "the texts are others"),
    ],
)
def test_other_tokens_are_refused_by_row(
    make_tokenizer: MakeTokenizer, kind: str, change: dict[str, Any], blame: str
):
    """Only rows whose tokens are others: a limit that cuts nothing changes nothing."""
    tokenizer = make_tokenizer(chat_template=PLAIN)
    rows = scored(kind, rows_of(kind), tokenizer)
    change, wrong = dict(change), [1, 2, 3] if "bos" in change else [4]
    if "max_length" in change:
        wrong = [2]
        rows, change = rows[:3], {"max_length": len(tokenizer("river 1:")["input_ids"]) + 3}
        blame = f"max_length 1024, here {change['max_length']}"
    if change.pop("text", False):
        rows[2]["prompt"], wrong = "ocean 2:", [3]
    if wrong == [4] and kind not in KINDS_OF_MESSAGES:
        return
    tokenizer = make_tokenizer(chat_template=change.pop("template", PLAIN))
    tokenizer = with_bos(tokenizer) if change.pop("bos", False) else tokenizer
    shown = ", ".join(map(str, wrong))
    with pytest.raises(
        ValueError, match=rf"rows? {shown}: reference log-probabilities of other tokens .*{blame}"
    ):
        read_back(kind, rows, tokenizer, **change)
    kept = [row for number, row in enumerate(rows, 1) if number not in wrong]
    if kept:
        assert read_back(kind, kept, tokenizer, **change).has_reference


@pytest.mark.parametrize("kind", REFERRED)
def test_a_row_that_does_not_say_is_refused_where_others_do(tokenizer: Any, kind: str):
    rows = scored(kind, rows_of(kind)[:3], tokenizer)
    rows[1][REF_OF] = None
    with pytest.raises(ValueError, match="row 2: .*they have no 'ref_of', which others have"):
        read_back(kind, rows, tokenizer)


@pytest.mark.parametrize("kind", REFERRED)
@pytest.mark.parametrize("value", [5.0, 0.1, math.nan, math.inf])
def test_impossible_numbers_leave_the_row_out(tokenizer: Any, kind: str, value: float):
    rows = scored(kind, rows_of(kind)[:3], tokenizer)
    name = "ref_rejected_logps" if kind == "pairs" else REFERENCE
    rows[1][name] = value if kind == "pairs" else [value, *rows[1][name][1:]]
    dataset = read_back(kind, rows, tokenizer)
    reason = "reference log-probabilities above 0" if value < 9 else "a number that is missing or not finite"
    assert dataset.report.skipped == {reason: [2]} and set(dataset.rows.tolist()) == {1, 3}
    with pytest.raises(ValueError, match=rf"1 with {reason} \(row 2: column '{name}'"):
        read_back(kind, rows, tokenizer, on_bad_row="error")


@pytest.mark.parametrize("kind", REFERRED)
def test_rounding_is_possible(tokenizer: Any, kind: str):
    """Certain answers have log-probability 0, give or take the rounding of their tokens."""
    rows = scored(kind, rows_of(kind)[:3], tokenizer, value=5e-5)
    assert not read_back(kind, rows, tokenizer).report.skipped


def test_mismatched_numbers_are_possible_too(tokenizer: Any):
    rows = scored("unpaired", rows_of("unpaired"), tokenizer, mismatched=True)
    rows[1][REF_MISMATCHED] = [3.0]
    with pytest.raises(ValueError, match=rf"above 0 \(row 2: column '{REF_MISMATCHED}' has 3\)"):
        read_back("unpaired", rows, tokenizer, mismatched=True, on_bad_row="error")
    with pytest.raises(ValueError, match="row 3: .*got scores of other answers"):  # which was row 2's
        read_back("unpaired", rows, tokenizer, mismatched=True)


def test_columns_of_later_rows_are_not_overlooked(make_args: MakeArgs, tokenizer: Any):
    """The first row has no numbers, the others have: nobody trains without a word."""
    rows = scored("pairs", make_rows(12), tokenizer)
    first = {name: value for name, value in rows[0].items() if not name.startswith("ref_")}
    data = PreferenceTrainer(
        tiny_llama(), make_args(), train_dataset=[first, *rows[1:]], processing_class=tokenizer
    ).train_dataset
    assert data.has_reference and data.report.skipped == {"a number that is missing or not finite": [1]}


def test_score_then_train_starts_at_ln_2(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]):
    """From the command line: the same settings give ln 2; another max_length or template is refused by row,
    as are numbers without a hash; scoring again does not copy what is there."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = [
        row_of("pairs", [user(r["prompt"])], [assistant(r["chosen"])], [assistant(r["rejected"])])
        for r in make_rows(6)
    ]
    pairs[0]["source"] = "half a pair: \ud83d"  # of no interest, and no reason to fail
    path, out = write_jsonl(tmp_path / "pairs.jsonl", pairs), tmp_path / "scored.jsonl"
    common = ["--model", str(tmp_path / "model"), "--use_cpu", "--disable_tqdm", "true"]
    common += ["--reference_cache_dir", str(tmp_path / "cache")]
    assert cli.main(["score", *common, "--dataset", str(path), "--output", str(out)]) == 0

    def train(source: Path, *more: str) -> int:
        words = ["--dataset", str(source), "--max_steps", "1", "--logging_steps", "1", "--report_to", "none"]
        words += ["--overwrite_output_dir", "--output_dir", str(tmp_path / "run"), "--save_strategy", "no"]
        return cli.main(["train", *common, *words, *more])

    assert train(out) == 0
    assert read_metrics(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    template = tmp_path / "template.jinja"
    template.write_text(PLAIN.replace("<|", "["))
    capsys.readouterr()
    for settings in (["--max_length", "40"], ["--chat_template", str(template)]):
        assert train(out, *settings) == 2
        assert "reference log-probabilities of other tokens" in capsys.readouterr().err
    bare = [
        {k: v for k, v in json.loads(line).items() if k != REF_OF} for line in out.read_text().splitlines()
    ]
    old = write_jsonl(tmp_path / "old.jsonl", bare)
    assert train(old) == 2 and "do not say of which tokens" in capsys.readouterr().err
    assert train(old, "--reference", "precomputed") == 0
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{**row, "ref_chosen_logps": -1.0} for row in bare])
    again = tmp_path / "again.jsonl"
    assert cli.main(["score", *common, "--dataset", str(wrong), "--output", str(again)]) == 0
    assert again.read_text() == out.read_text()
