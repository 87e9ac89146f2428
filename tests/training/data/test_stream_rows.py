"""Rows of a stream are those of the data at hand, made as they come and forgotten; and batches of them."""

from __future__ import annotations

import itertools
import logging
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pytest
import torch

from fastdpo.training.batches.budget import TokenBudget
from fastdpo.training.batches.stream import StreamBatches, shuffled
from fastdpo.training.data import stream
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.mismatched import with_mismatched
from fastdpo.training.data.row import Answer, Row
from fastdpo.training.data.rows import RowStream, is_stream
from fastdpo.training.data.source import read_rows
from fastdpo.training.data.stream import StreamDataset
from fastdpo.training.loop.setup import prepare_pairs
from fastdpo.training.loop.stream import prepare_stream
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows
from tests.training.data.data_cases import assistant, row_of, user

MakeArgs = Callable[..., PreferenceConfig]
LOSSES = {
    "pairs": "sigmoid",
    "unpaired": "kto",
    "pair taken apart": "kto",
    "listwise": "sdpo",
    "ranking": "in_context_ranking",
    "steps": "direct_advantage",
    "samples": "nash_md",
}


class Stream:
    """Goes through rows as often as it is asked, and knows how far it was read the last time."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.read, self.starts = rows, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.read, self.starts = 0, self.starts + 1
        for row in self.rows() if callable(self.rows) else self.rows:
            self.read += 1
            yield row


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of 6 rows, and parts of 4."""
    monkeypatch.setattr(stream, "HEAD_ROWS", 6)
    monkeypatch.setattr(stream, "PART_ROWS", 4)


def stream_of(rows: Any, tokenizer: Any, args: PreferenceConfig) -> StreamDataset:
    return prepare_stream(Stream(rows), tokenizer, args)


def rows_of_kind(kind: str, count: int) -> list[dict[str, Any]]:
    """Rows of unlike length; of pairs and single answers some are of several turns, scored in part."""
    texts = make_rows(3 * count)
    rows = []
    for k in range(count):
        prompt, answer, other = (
            texts[3 * k + i][name] for i, name in enumerate(("prompt", "chosen", "rejected"))
        )
        if kind in ("pairs", "unpaired") and k % 3 == 1:
            turns = [assistant(answer), user("and?"), assistant(other)]
            rows.append(row_of(kind, [user(prompt)], turns, [assistant(answer)]))
        else:
            rows.append(row_of(kind, prompt, answer, other))
    return rows


def plain(row: Row, *, with_other: bool = True) -> tuple[Any, ...]:
    answers = [*row.answers, *([row.mismatched] if row.mismatched is not None and with_other else [])]
    return (
        row.number,
        row.prompt.tolist(),
        [answer.ids.tolist() for answer in answers],
        [[True] * len(a.ids) if a.scored is None else a.scored.tolist() for a in answers],
        {
            name: value.tolist() if isinstance(value, torch.Tensor) else value
            for name, value in row.numbers.items()
        },
        row.pieces,
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_rows_are_those_of_the_data_at_hand(
    short_parts: None, make_args: MakeArgs, tokenizer: Any, kind: str
):
    args, rows = make_args(loss_type=LOSSES[kind]), rows_of_kind(kind, 11)
    at_hand = prepare_pairs(rows, tokenizer, args)
    assert isinstance(at_hand, RowDataset)
    data = stream_of(rows, tokenizer, args)
    found = list(data.rows())
    # Of KTO the first prompt has no row before it: at hand it has the last one's answer, here the next one's.
    first = 2 if kind == "pair taken apart" else int(kind == "unpaired")
    assert [plain(row) for row in found[first:]] == [plain(at_hand[i]) for i in range(first, len(at_hand))]
    for place in range(first):
        assert plain(found[place], with_other=False) == plain(at_hand[place], with_other=False)
        assert torch.equal(found[place].mismatched.ids, found[first].answers[0].ids)
    assert (len(data.head), data.num_rows) == (12 if kind == "pair taken apart" else 6, len(at_hand))


def test_what_the_rows_carry(short_parts: None, make_args: MakeArgs, tokenizer: Any):
    """Numbers of columns, renamed columns, gold answers and reference log-probabilities, row by row."""
    rows = [
        {"question": row["prompt"], "answer": row["chosen"], "rejected": row["rejected"],
         "reference": " gold" * k, "far": 0.1 * k, "ref_chosen_logps": -1.0 - k, "ref_rejected_logps": -2.0}
        for k, row in enumerate(make_rows(9), 1)
    ]  # fmt: skip
    settings = {"prompt_column": "question", "chosen_column": "answer", "margin_column": "far"}
    args = make_args(loss_type="sigmoid", reference="precomputed", **settings)
    at_hand = prepare_pairs(rows, tokenizer, args)
    data = stream_of(rows, tokenizer, args)
    assert at_hand is not None and data.has_reference
    assert [plain(row) for row in data.rows()] == [plain(at_hand[i]) for i in range(9)]
    assert set(at_hand[0].numbers) == {"margin", "ref_logps"}
    gold = make_args(loss_type="tpo", reference="none", **settings)
    assert [len(row.answers) for row in stream_of(rows, tokenizer, gold).rows()] == [3] * 9


def test_rows_are_forgotten(make_args: MakeArgs, tokenizer: Any):
    """After 3000 rows no more memory is held than after 1500, and no more rows were read than are needed."""
    source = Stream(lambda: ({**row, "unused": "x" * 2000} for row in itertools.cycle(make_rows(50))))
    data = prepare_stream(source, tokenizer, make_args(per_device_train_batch_size=10))
    assert source.read == stream.HEAD_ROWS == 1000  # as docs/data.md has it
    batches = iter(StreamBatches(data, 10, None, buffer_size=100, seed=0))
    next(batches)
    assert source.read <= stream.PART_ROWS
    for _ in range(149):
        next(batches)
    tracemalloc.start()
    for _ in range(150):
        next(batches)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1.5e6  # a part's raw rows, and what the buffer was given since
    assert source.read <= 3000 + 100 + stream.PART_ROWS


def test_rows_hold_no_others(short_parts: None, make_args: MakeArgs, tokenizer: Any):
    for row in stream_of(rows_of_kind("unpaired", 9), tokenizer, make_args(loss_type="kto")).rows():
        tensors = [row.prompt, row.answers[0].ids, *([] if (s := row.answers[0].scored) is None else [s])]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors)


def bad_rows(count: int, every: int) -> list[dict[str, Any]]:
    rows = make_rows(count)
    return [{**row, "chosen": ""} if k % every == 0 else row for k, row in enumerate(rows, 1)]


def test_bad_rows_are_left_out_and_counted(
    short_parts: None, make_args: MakeArgs, tokenizer: Any, caplog: pytest.LogCaptureFixture
):
    args = make_args(max_bad_rows=0.2)
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        data = stream_of(bad_rows(80, 7), tokenizer, args)
        assert [row.number for row in data.rows()] == [n for n in range(1, 81) if n % 7]
    first, *between, last = (record.getMessage() for record in caplog.records)
    assert "a stream, of which the first 6 rows: dataset: 6 of 6 pairs kept" in first
    assert between[0].startswith(
        "so far: dataset: 11 of 12 pairs kept; skipped 1 with an empty completion (row 7)"
    )
    assert len(between) <= 3  # at 12, 24, 48 rows
    assert last == (
        "the whole stream: dataset: 69 of 80 pairs kept; skipped 11 with an empty completion (rows 7, 14, "
        "21, 28, 35, 42, 49, 56, 63, 70 and 1 more)"
    )
    with pytest.raises(ValueError, match=r"\(row 7\) \(on_bad_row='error'\)"):
        list(stream_of(bad_rows(80, 7), tokenizer, make_args(on_bad_row="error")).rows())


def test_too_many_bad_rows_end_the_stream(short_parts: None, make_args: MakeArgs, tokenizer: Any):
    rows = [*make_rows(10), *bad_rows(10, 1)]
    with pytest.raises(ValueError, match=r"dataset: 10 of 12 pairs kept.*17% of the rows left out"):
        list(stream_of(rows, tokenizer, make_args()).rows())
    data = stream_of(rows, tokenizer, make_args(max_bad_rows=1))
    assert len(list(data.rows())) == 10
    with pytest.raises(ValueError, match="no pair left"):
        stream_of(bad_rows(10, 1), tokenizer, make_args(max_bad_rows=1))


REFERENCE = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}


def breaking(count: int) -> Callable[[], Iterator[Any]]:
    def rows() -> Iterator[Any]:
        yield from make_rows(count)
        raise OSError("connection reset")

    return rows


@pytest.mark.parametrize(
    ("rows", "changes", "text"),
    [
        ([*make_rows(9), {**make_rows(1)[0], "chosen": 3}], {}, "dataset, row 10: got .*'chosen': 'int'"),
        ([*make_rows(9), "text"], {}, "dataset, row 10: got str, wanted an object"),
        ([*make_rows(9), {"prompt": "a"}], {}, "dataset, row 10: no column 'chosen'"),
        (
            [{**row, "w": "much" if k == 9 else 1.0} for k, row in enumerate(make_rows(12))],
            {"pair_weight_column": "w"},
            "dataset, row 10: column 'w': got 'much', wanted a number",
        ),
        (
            [{**row, **REFERENCE, "ref_ld_alpha": [0.3, 0.5][k == 9]} for k, row in enumerate(make_rows(12))],
            {"ld_alpha": 0.3, "reference": "precomputed"},
            "dataset, rows 9 to 12: dataset: got reference log-probabilities made with ld_alpha=0.3, 0.5",
        ),
        (breaking(9), {}, "dataset, after row 9: the stream ends early: connection reset"),
    ],
    ids=["type", "no object", "column", "number", "reference", "breaks"],
)  # fmt: skip
def test_a_late_row_is_named(
    short_parts: None, make_args: MakeArgs, tokenizer: Any, rows: Any, changes: dict[str, Any], text: str
):
    data = stream_of(rows, tokenizer, make_args(**changes))
    with pytest.raises(ValueError, match=text):
        list(data.rows())


def test_no_rows(short_parts: None, make_args: MakeArgs, tokenizer: Any):
    with pytest.raises(ValueError, match="dataset: no rows"):
        stream_of([], tokenizer, make_args())
    with pytest.raises(ValueError, match="nothing: no rows"):
        prepare_stream(RowStream(lambda: iter(()), "nothing"), tokenizer, make_args())
    once = iter(make_rows(7))
    data = stream_of(lambda: once, tokenizer, make_args())
    with pytest.raises(ValueError, match="dataset: no rows"):  # a second pass, of what can be read once
        list(itertools.chain(data.rows(), data.rows()))


def test_what_is_a_stream():
    assert is_stream(read_rows(make_rows(2), streaming=True)) and is_stream(Stream([]))
    assert is_stream({"train": Stream([]), "test": []})
    for other in (make_rows(2), iter(make_rows(2)), "data.jsonl", {"train": make_rows(2)}, None):
        assert not is_stream(other)


def test_a_form_of_tensors_is_read_as_rows():
    rows = [{"prompt": "a", "weight": 0.5}, {"prompt": "b", "weight": 1.5}]
    tensors = datasets.Dataset.from_list(rows).to_iterable_dataset().with_format("torch")
    assert list(read_rows(tensors, streaming=True)) == list(enumerate(rows, 1))
    assert list(read_rows({"train": tensors}, streaming=True)) == list(enumerate(rows, 1))


# KTO's mismatched answers


def answered(prompt: int, answer: int, number: int = 1, size: int = 2) -> Row:
    return Row(number, torch.tensor([prompt]), (Answer(torch.full((size,), answer)),))


def others(prompts: str, max_length: int | None = None, size: int = 2) -> list[list[int]]:
    rows = [answered(ord(name), k, k, size) for k, name in enumerate(prompts)]
    found = list(with_mismatched(iter(rows), max_length, "data"))
    assert [row.number for row in found] == list(range(len(rows)))
    return [row.mismatched.ids.tolist() for row in found]


def test_mismatched_answers_of_a_stream():
    # The last row before with another prompt; the first ones wait for the first such row.
    assert [ids[0] for ids in others("AABBA")] == [2, 2, 1, 1, 3]
    assert [ids[0] for ids in others("AAA")] == [2, 0, 1]
    assert [len(ids) for ids in others("AB", max_length=4, size=6)] == [3, 3]
    assert [len(ids) for ids in others("AB", max_length=1, size=6)] == [1, 1]  # no prompt is without one
    with pytest.raises(ValueError, match="kto: got one row"):
        others("A")
    endless = (answered(1, 1, number) for number in range(1, 3001))
    with pytest.raises(ValueError, match="1000 rows of one prompt up to row 1001 of data"):
        next(with_mismatched(endless, None, "data"))


# Order and batches


def test_the_buffer_shuffles():
    rows = list(range(500))
    one, again, other = (list(shuffled(rows, 50, seed)) for seed in (0, 0, 1))
    assert one == again != other and sorted(one) == sorted(other) == rows
    assert all(row < place + 50 for place, row in enumerate(one))  # none comes before it is read
    assert list(shuffled(rows, 0, 0)) == list(shuffled(rows, 1, 0)) == rows
    assert sorted(shuffled(rows, 900, 0)) == rows != list(shuffled(rows, 900, 0))


def batches_of(data: StreamDataset, count: int, world: int = 1, **changes: Any) -> list[list[list[int]]]:
    """The row numbers of each rank's first batches."""
    settings = {"size": 4, "budget": None, "buffer_size": 0, "seed": 0, **changes}
    ranks = (StreamBatches(data, rank=rank, world=world, **settings) for rank in range(world))
    return [[[row.number for row in batch] for batch in itertools.islice(rank, count)] for rank in ranks]


def test_batches_go_round(short_parts: None, make_args: MakeArgs, tokenizer: Any):
    data = stream_of(make_rows(10), tokenizer, make_args())
    assert batches_of(data, 5)[0] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]
    assert data.epoch == 2.0
    order = [n for batch in batches_of(data, 5, buffer_size=5)[0] for n in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(1, 11)) and order[:10] != order[10:]


def test_ranks_take_turns(short_parts: None, make_args: MakeArgs, tokenizer: Any):
    data = stream_of(make_rows(10), tokenizer, make_args())
    first, second = batches_of(data, 3, world=2, size=2, buffer_size=4)
    (alone,) = batches_of(data, 6, size=2, buffer_size=4)
    assert first == alone[::2] and second == alone[1::2]
    # More ranks than a pass has rows: each has a batch all the same.
    assert [len(ranks) for ranks in batches_of(data, 2, world=6, size=3)] == [2] * 6


@pytest.mark.parametrize("buffer_size", [0, 16])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompt"])
def test_batches_keep_a_budget(
    short_parts: None, make_args: MakeArgs, tokenizer: Any, layout: str, buffer_size: int
):
    rows = make_rows(40)
    at_hand = prepare_pairs(rows, tokenizer, make_args())
    assert at_hand is not None
    costs = {
        number: int(cost)
        for number, cost in zip(at_hand.rows.tolist(), at_hand.batch_tokens(layout), strict=True)
    }
    budget = TokenBudget(2 * max(costs.values()) + 100, layout, 8)
    data = stream_of(rows, tokenizer, make_args())

    def cost(batch: list[int]) -> int:
        if layout != "padded":
            return sum(costs[n] for n in batch)
        return 2 * len(batch) * max((-(-costs[n] // 8) * 8 for n in batch), default=0)

    for world in (1, 3):
        found = batches_of(data, 60 // world, world, budget=budget, buffer_size=buffer_size)
        assert all(cost(batch) <= budget.tokens for rank in found for batch in rank)
        assert [len(rank) for rank in found] == [60 // world] * world
        dealt = [n for together in zip(*found, strict=True) for batch in together for n in batch]
        assert sorted(dealt[:40]) == list(range(1, 41))  # each row once a pass
    if not buffer_size:
        wanted = list(budget.sampler(at_hand, strategy="sequential"))[:-1]
        (found,) = batches_of(data, len(wanted), budget=budget)
        assert found == [[place + 1 for place in batch] for batch in wanted]


def test_a_row_beyond_the_budget_is_named(short_parts: None, make_args: MakeArgs, tokenizer: Any):
    rows = [*make_rows(9), {"prompt": "a", "chosen": " river" * 400, "rejected": " stone"}]
    data = stream_of(rows, tokenizer, make_args())
    for buffer_size in (0, 16):
        with pytest.raises(
            ValueError, match="max_tokens_per_batch: got 300, wanted at least .* row 10 of dataset"
        ):
            batches_of(data, 20, budget=TokenBudget(300, "packed"), buffer_size=buffer_size)
