"""One row in the format of every kind of data, and its encoding: what holds of one holds of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.formats import Wanted
from fastdpo.training.data.source import read_rows
from fastdpo.training.settings.encoding import EncodingOptions
from fastdpo.training.settings.kinds import KINDS

# Of pieces the answer is text in any case.
KINDS_OF_MESSAGES = ("pairs", "unpaired", "pair taken apart", "listwise", "samples", "prompt-completion")
ALL_KINDS = (*KINDS_OF_MESSAGES, "ranking", "steps")


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def row_of(kind: str, prompt: Any, answer: Any, other: Any, **more: Any) -> dict[str, Any]:
    """A row whose (first) answer is ``answer``; ``other`` is one beside it, where the kind has several."""
    columns: dict[str, dict[str, Any]] = {
        "pairs": {"chosen": answer, "rejected": other},
        "pair taken apart": {"chosen": answer, "rejected": other},
        "unpaired": {"completion": answer, "label": True},
        "listwise": {"completions": [answer, other], "scores": [1, 0]},
        "samples": {"completion": answer, "win_rate": 0.5},
        "prompt-completion": {"completion": answer},
        "ranking": {"completion": [answer, other], "scores": [1, 0]},
        "steps": {"completion": [answer, other], "advantages": [1, 0]},
    }
    return {"prompt": prompt, **columns[kind], **more}


def encode(
    kind: str,
    rows: Sequence[Mapping[str, Any]] | Path,
    tokenizer: Any,
    *,
    mismatched: bool = False,
    **options: Any,
) -> RowDataset:
    """The rows, or those of a file, as the losses of a kind have them."""
    source = read_rows(rows if isinstance(rows, Path) else list(rows))
    how = EncodingOptions(**options)
    if kind == "pairs":
        return encode_rows(source, tokenizer, how)
    name = "unpaired" if kind == "pair taken apart" else kind
    return encode_rows(source, tokenizer, how, Wanted(KINDS[name], has_mismatched=mismatched))


def ids_of(dataset: RowDataset, place: int = 0) -> tuple[list[int], list[list[int]]]:
    """Prompt and answers of a row."""
    item = dataset[place]
    return item.prompt.tolist(), [answer.ids.tolist() for answer in item.answers]


def texts_of(dataset: RowDataset, tokenizer: Any, place: int = 0) -> tuple[str, list[str]]:
    """The same as text."""
    prompt, answers = ids_of(dataset, place)
    return tokenizer.decode(prompt), [tokenizer.decode(answer) for answer in answers]


def scored_text(dataset: RowDataset, tokenizer: Any, answer: int = 0, place: int = 0) -> str:
    """What is scored of an answer."""
    ids, scored = dataset[place].answers[answer]
    text: str = tokenizer.decode(ids if scored is None else ids[scored])
    return text
