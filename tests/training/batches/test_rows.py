"""Rows: what stands where, what sees what, and the plan that arranges them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.step_contenders import SIZES
from benchmarks.step_data import make_data
from fastdpo.training.batches.batch import IGNORE_INDEX
from fastdpo.training.batches.plan import (
    RowCosts,
    _cheapest_buckets,
    padded_cost,
    plan_rows,
    unit_lengths,
)
from fastdpo.training.batches.rows import PADDING, Unit, build_rows
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.source import read_rows
from fastdpo.training.loop.setup import tokenized_pairs
from fastdpo.training.settings.choices import ARRANGEMENTS
from tests import ROOT
from tests.training.batches.layout_cases import COSTS, PAIRS, make_batch, row_collator

CPU = RowCosts(call_tokens=5.0, pair_tokens=0.002, skips_masked=False)
GPU = RowCosts(call_tokens=300.0, pair_tokens=0.0002, skips_masked=True)


def tokens(count: int, start: int) -> torch.Tensor:
    return torch.arange(start, start + count)


def test_a_prompt_with_its_answers_in_a_row():
    unit = Unit(tokens(3, 10), (tokens(2, 20), tokens(3, 30), tokens(0, 40)), (0, 2, 1))
    rows = build_rows([unit], [[0]], num_sequences=3, is_one_row=True, pad_token_id=7, multiple_of=5)
    (call,) = rows.calls
    assert call["input_ids"].tolist() == [[10, 11, 12, 20, 21, 30, 31, 32, 7, 7]]
    assert call["position_ids"][0, :8].tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert call["documents"].tolist() == [[0] * 8 + [PADDING] * 2]
    assert call["branches"][0, :8].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    # The prompt's last token predicts the first token of both answers.
    assert rows.tokens.token_index.tolist() == [2, 3, 2, 5, 6]
    assert rows.tokens.target_ids.tolist() == [20, 21, 30, 31, 32]
    assert rows.tokens.sequence_ids.tolist() == [0, 0, 2, 2, 2]
    assert rows.tokens.lengths == (2, 0, 3)


def test_sequences_in_a_row_start_again_at_zero():
    units = [Unit(tokens(2, 10), (tokens(1, 20),), (0,)), Unit(tokens(1, 30), (tokens(2, 40),), (1,))]
    rows = build_rows(units, [[0, 1]], num_sequences=2, is_one_row=True, pad_token_id=7, multiple_of=4)
    (call,) = rows.calls
    assert set(call) == {"input_ids", "position_ids"}  # a mask would be one too many
    assert call["input_ids"].tolist() == [[10, 11, 20, 30, 40, 41, 7, 7]]
    assert call["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert rows.tokens.token_index.tolist() == [1, 3, 4]


@st.composite
def unit_lists(draw: Any) -> list[Unit]:
    units, sequence = [], 0
    for _ in range(draw(st.integers(1, 5))):
        sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
        prompt = draw(st.integers(0, 4))
        start = 1000 * len(units)
        answers = tuple(tokens(n, start + 100 * (i + 1)) for i, n in enumerate(sizes))
        units.append(Unit(tokens(prompt, start), answers, tuple(range(sequence, sequence + len(sizes)))))
        sequence += len(sizes)
    return units


@settings(deadline=None, max_examples=150)
@given(unit_lists(), st.sampled_from(ARRANGEMENTS), st.integers(1, 4))
def test_every_answer_is_predicted_by_what_is_before_it(units: list[Unit], arrangement: str, multiple: int):
    """In the flat tokens of all calls: the target follows its row in the sequence that the unit spells."""
    plan = plan_rows(
        [unit.length for unit in units],
        COSTS,
        layout="packed",
        arrangements=[arrangement],
        multiple_of=multiple,
    )
    rows = build_rows(
        units, plan.calls, num_sequences=sum(len(u.answers) for u in units),
        is_one_row=arrangement == "one_row", pad_token_id=-5, multiple_of=multiple,
    )  # fmt: skip
    flat = torch.cat([call["input_ids"].flatten() for call in rows.calls])
    found = [(int(s), int(flat[i]), int(t)) for i, t, s in zip(
        rows.tokens.token_index, rows.tokens.target_ids, rows.tokens.sequence_ids, strict=True
    )]  # fmt: skip
    wanted = []
    for unit in units:
        for sequence, answer in zip(unit.sequences, unit.answers, strict=True):
            text = [*unit.prompt.tolist(), *answer.tolist()]
            first = max(len(unit.prompt), 1)
            wanted += [(sequence, text[i - 1], text[i]) for i in range(first, len(text))]
    assert found == wanted
    if all(unit.length for unit in units):
        assert len(flat) == plan.tokens
        assert (flat == -5).sum() == plan.padding


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=7),
    st.sampled_from([CPU, GPU]),
    st.sampled_from(["packed", "shared_prompt"]),
)
def test_a_plan_has_every_unit_once_and_is_the_cheapest(lengths: list[int], costs: RowCosts, layout: str):
    plan = plan_rows(lengths, costs, layout=layout)
    assert sorted(i for call in plan.calls for i in call) == list(range(len(lengths)))
    assert plan.tokens - plan.padding == sum(lengths)
    assert all(plan.cost <= other for other in plan.rejected.values())
    alone = {name: plan_rows(lengths, costs, layout=layout, arrangements=[name]) for name in ARRANGEMENTS}
    assert plan.cost == min(other.cost for other in alone.values())
    assert alone["bucketed"].cost <= alone["separate"].cost + 1e-9


def test_buckets_are_the_best_cut():
    """Against all cuts of seven units."""
    lengths = [40, 39, 20, 19, 18, 5, 5]

    def cost(start: int, end: int) -> float:
        return 7 + (end - start) * lengths[start] * 1.01

    def total(cuts: int) -> float:
        places = [0, *(i + 1 for i in range(6) if cuts >> i & 1), 7]
        return sum(cost(a, b) for a, b in zip(places, places[1:], strict=False))

    assert sum(cost(*bounds) for bounds in _cheapest_buckets(7, cost)) == pytest.approx(
        min(total(cuts) for cuts in range(64))
    )


def test_what_is_chosen_where():
    lengths = [300, 280, 120, 90]
    assert plan_rows(lengths, CPU, layout="shared_prompt").arrangement == "separate"
    assert plan_rows(lengths, GPU, layout="shared_prompt").arrangement == "one_row"
    dense = RowCosts(call_tokens=300.0, pair_tokens=0.01, skips_masked=False)
    assert plan_rows([100] * 8, dense, layout="packed").calls == (tuple(range(8)),)
    assert plan_rows([100] * 8, dense, layout="packed").arrangement == "bucketed"


def test_the_longest_rows_come_first():
    """A first call that fits says that the others do."""
    for arrangement, calls in (("separate", ((1,), (2,), (0,), (3,))), ("bucketed", ((1, 2), (0, 3)))):
        plan = plan_rows([5, 300, 299, 4], CPU, layout="packed", arrangements=[arrangement])
        assert plan.calls == calls


def test_what_attention_costs():
    """Half of a square where nothing is masked, or what is masked is skipped; with a dense mask all of it."""
    for skips, of_one, of_two, of_padded in ((False, 100, 30 * 30, 2 * 400), (True, 50, 50 + 200, 400)):
        costs = RowCosts(call_tokens=0.0, pair_tokens=1.0, skips_masked=skips)
        assert plan_rows([10], costs, layout="packed", arrangements=["separate"]).cost == 10 + 50
        assert plan_rows([10], costs, layout="shared_prompt", arrangements=["separate"]).cost == 10 + of_one
        assert plan_rows([10, 20], costs, layout="packed", arrangements=["one_row"]).cost == 30 + of_two
        assert padded_cost([10, 20], costs) == 40 + of_padded


def test_rows_together_are_no_gain_where_they_cost_more():
    lengths = [300, 300, 300]
    slow = RowCosts(call_tokens=5.0, pair_tokens=0.002, skips_masked=False, many_rows=1.1)
    assert plan_rows(lengths, CPU, layout="packed").arrangement == "bucketed"
    assert plan_rows(lengths, slow, layout="packed").arrangement == "separate"
    assert plan_rows([3, 3, 3], slow, layout="packed").arrangement != "separate"


def test_a_plan_explains_itself():
    text = str(plan_rows([30, 20], CPU, layout="shared_prompt", arrangements=["separate", "bucketed"]))
    assert text.startswith("shared_prompt, separate: 2 prompts with their answers in 2 calls of the backbone")
    assert "50 tokens, 0 of them padding; predicted cost 63 tokens" in text
    assert "one_row: not allowed" in text and "bucketed: " in text


def test_what_cannot_be_arranged_is_refused():
    with pytest.raises(ValueError, match="arrangements: got .*needs several calls"):
        plan_rows([3, 4], CPU, layout="packed", arrangements=["separate"], single_call=True)
    with pytest.raises(ValueError, match="arrangements: got \\['stacked'\\]"):
        plan_rows([3, 4], CPU, layout="packed", arrangements=["stacked"])
    assert len(plan_rows([9, 1], CPU, layout="packed", single_call=True).calls) == 1


@pytest.mark.parametrize("layout", ["packed", "shared_prompt"])
def test_the_collator_follows_the_plan(layout: str):
    batch = make_batch(layout, "bucketed")
    plan = row_collator(layout, "bucketed").plan(
        [n for p in PAIRS for n in unit_lengths(*sizes(p), layout)]
    )  # fmt: skip
    assert batch.positions == plan.tokens
    assert len(batch.calls) == len(plan.calls)


def sizes(pair: Any) -> tuple[int, list[int]]:
    return len(pair.prompt), [len(pair.answers[0].ids), len(pair.answers[1].ids)]


def backbone_tokens(data: RowDataset, pairs_per_batch: int) -> dict[str, int]:
    """Positions that each layout makes the backbone compute, and labelled tokens, in the file's order."""
    counted = dict.fromkeys(["padded", "packed", "shared_prompt", "labelled"], 0)
    for start in range(0, len(data), pairs_per_batch):
        pairs = [data[i] for i in range(start, min(start + pairs_per_batch, len(data)))]
        padded = make_batch("padded", pairs=pairs)
        counted["padded"] += padded.sequences.input_ids.numel()
        counted["labelled"] += int((padded.sequences.labels != IGNORE_INDEX).sum())
        for layout in ("packed", "shared_prompt"):
            counted[layout] += make_batch(layout, "one_row", pairs).positions
    prompts, answers = int(data.prompt_lengths.sum()), int(data.answers.values.sum())
    assert counted["shared_prompt"] == prompts + answers
    assert counted["packed"] == 2 * prompts + answers
    assert counted["labelled"] == answers
    return counted


def test_tokens_of_the_backbone_on_real_pairs(preference_path: Any, tokenizer: Any, make_args: Any):
    """README's numbers: batches of 8 pairs of the shared file, with these tests' byte-level tokenizer."""
    data = tokenized_pairs(read_rows(preference_path), tokenizer, make_args(max_length=0))
    counted = backbone_tokens(data, 8)
    per_pair = [round(counted[layout] / len(data)) for layout in ("padded", "packed", "shared_prompt")]
    assert (len(data), per_pair) == (240, [13855, 5963, 4306])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for said in (
        "240 real pairs in batches of 8",
        "13855 positions a pair padded",
        "5963 packed and 4306 with",
    ):
        assert said in " ".join(readme.split()), said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("max_length", "row"),
    [
        (1024, "| 1024 | 215 | 1819 | 28.1 % | 58.6 % | 43.3 % |"),
        (2048, "| 2048 | 240 | 2522 | 24.0 % | 54.2 % | 39.1 % |"),
    ],
)
def test_tokens_of_the_backbone_in_the_benchmark(preference_path: Any, max_length: int, row: str):
    """The table of docs/training.md: batches of 4 pairs, with the tokenizer that `bench step` trains."""
    data, _ = make_data(preference_path, SIZES["small-llama"].vocab, max_length)
    counted = backbone_tokens(data, 4)
    shares = [
        f"{100 * counted[n] / counted['padded']:.1f} %" for n in ("labelled", "packed", "shared_prompt")
    ]
    cells = [str(max_length), str(len(data)), f"{counted['padded'] / len(data):.0f}", *shares]
    assert f"| {' | '.join(cells)} |" == row
    assert row in (ROOT / "docs" / "training.md").read_text(encoding="utf-8").splitlines()


def test_costs_of_padding():
    assert padded_cost([10, 4], RowCosts(5.0, 0.1, False)) == 5 + 20 + 0.1 * 2 * 100
    assert padded_cost([10, 4], RowCosts(5.0, 0.1, True), multiple_of=8) == 5 + 32 + 0.1 * 2 * 128
