"""Rows: what stands where, what sees what, and the plan that arranges them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.step_contenders import SIZES
from benchmarks.step_data import make_data
from fastdpo.integrations.forest.plant import SHORTEST_SHARED, plant
from fastdpo.integrations.forest.rows import Text, lay_out
from fastdpo.integrations.model import patch_model
from fastdpo.training.batches.batch import IGNORE_INDEX
from fastdpo.training.batches.plan import (
    RowCosts,
    TreeSize,
    _cheapest_buckets,
    padded_cost,
    plan_rows,
)
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.source import read_rows
from fastdpo.training.loop.setup import tokenized_pairs
from fastdpo.training.settings.choices import ARRANGEMENTS, ARRANGEMENTS_OF
from tests import ROOT
from tests.integrations.tiny import make_model
from tests.training.batches.layout_cases import (
    COSTS,
    PAIRS,
    ROW_CASES,
    make_batch,
    make_pairs,
    row_collator,
    run_step,
    with_answers,
)

CPU = RowCosts(call_tokens=5.0, pair_tokens=0.002, skips_masked=False)
GPU = RowCosts(call_tokens=300.0, pair_tokens=0.0002, skips_masked=True)


def of_sequences(*lengths: int) -> list[TreeSize]:
    return [TreeSize.of_sequence(length) for length in lengths]


# Pairs: a prompt of half the tokens, and two answers.
PAIR_TREES = [TreeSize(n, 0.375 * n * n, 3) for n in (300, 280, 120, 90)]


def text(prompt: list[int], answer: list[int]) -> Text:
    ids = torch.tensor([*prompt, *answer], dtype=torch.int64)
    return Text(ids, torch.arange(len(ids))[max(len(prompt), 1) :])


def test_a_prompt_with_its_answers_in_a_row():
    prompt = [10, 11, 12]
    texts = [text(prompt, [20, 21]), text(prompt, []), text(prompt, [30, 31, 32])]
    trees = plant([(number, each.ids) for number, each in enumerate(texts)], shortest=1)
    rows = lay_out(texts, trees, [[0]], pad_token_id=7, multiple_of=5)
    (call,) = rows.calls
    assert call["input_ids"].tolist() == [[10, 11, 12, 20, 21, 30, 31, 32, 7, 7]]
    assert call["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1]]
    assert (call["forest"].lengths, call["forest"].parents) == ((3, 2, 3, 2), (-1, 0, 0, -1))
    # The prompt's last token predicts the first token of both answers.
    assert rows.tokens.token_index.tolist() == [2, 3, 2, 5, 6]
    assert rows.tokens.target_ids.tolist() == [20, 21, 30, 31, 32]
    assert rows.tokens.sequence_ids.tolist() == [0, 0, 2, 2, 2]
    assert rows.tokens.lengths == (2, 0, 3)


def test_answers_that_begin_alike_share_that_too():
    """And so do rows of one conversation; token ids tell, not the rows that they came from."""
    start = [*range(10, 30)]
    first, second = with_answers(PAIRS[0], torch.tensor([5, 6, 7, 8]), torch.tensor([5, 6, 9])), PAIRS[1]
    same = replace(first, prompt=torch.tensor(start))
    longer = replace(second, prompt=torch.tensor([*start, 3, 4]))
    batch = row_collator("shared_prompt", "one_row")([same, longer])
    (call,) = batch.calls
    assert call["forest"].parents[:4] == (-1, 0, 1, 1)
    assert call["forest"].lengths[:4] == (20, 2, 2, 1)
    assert batch.positions == 20 + 2 + 2 + 1 + 2 + 1 + 1
    assert batch.sequence_tokens == 2 * 20 + 4 + 3 + 2 * 22 + 2
    apart = row_collator("packed", "one_row")([same, longer])
    model = patch_model(make_model("llama", vocab_size=211))
    torch.testing.assert_close(
        run_step(model, batch).tokens, run_step(model, apart).tokens, rtol=0, atol=1e-5
    )


def test_short_beginnings_are_computed_for_each():
    """The 15 tokens before an answer are not worth an attention that begins behind them; 16 are."""
    for length, count in ((15, 2 * (15 + 4)), (16, 16 + 2 * 4)):
        (pair,) = make_pairs([(length, 4, 4)])
        batch = row_collator("shared_prompt", "one_row", shortest_shared=SHORTEST_SHARED)([pair])
        assert batch.positions == count


def test_sequences_in_a_row_start_again_at_zero():
    texts = [text([10, 11], [20]), text([30], [40, 41])]
    trees = [tree for number, each in enumerate(texts) for tree in plant([(number, each.ids)])]
    rows = lay_out(texts, trees, [[0, 1]], pad_token_id=7, multiple_of=4)
    (call,) = rows.calls
    assert call["input_ids"].tolist() == [[10, 11, 20, 30, 40, 41, 7, 7]]
    assert call["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert call["forest"].parents == (-1, -1, -1)
    assert rows.tokens.token_index.tolist() == [1, 3, 4]
    # One alone needs none, and any kernel will do; what pads it goes on behind it.
    (alone,) = lay_out(texts[:1], trees[:1], [[0]], pad_token_id=7, multiple_of=4).calls
    assert set(alone) == {"input_ids", "position_ids"}
    assert alone["position_ids"].tolist() == [[0, 1, 2, 3]]


@st.composite
def text_lists(draw: Any) -> list[Text]:
    words = st.lists(st.integers(1, 2), max_size=5)
    return [text(draw(words), draw(words)) for _ in range(draw(st.integers(1, 6)))]


@settings(deadline=None, max_examples=150)
@given(
    text_lists(),
    st.sampled_from([(layout, name) for layout, names in ARRANGEMENTS_OF.items() for name in names]),
    st.integers(1, 4),
)
def test_every_answer_is_predicted_by_what_is_before_it(
    texts: list[Text], case: tuple[str, str], multiple: int
):
    """In the flat tokens of all calls: what predicts a token stands where its sequence has the one before."""
    layout, arrangement = case
    numbered = [(number, each.ids) for number, each in enumerate(texts)]
    groups = [numbered] if layout == "shared_prompt" else [[one] for one in numbered]
    trees = [tree for group in groups for tree in plant(group, shortest=1)]
    sizes = [TreeSize(tree.num_tokens, tree.forest.num_pairs, len(tree.segments)) for tree in trees]
    plan = plan_rows(sizes, COSTS, layout=layout, arrangements=[arrangement], multiple_of=multiple)
    rows = lay_out(
        texts, trees, plan.calls, pad_token_id=-5, in_one_row=arrangement != "bucketed", multiple_of=multiple
    )
    flat = torch.cat([call["input_ids"].flatten() for call in rows.calls])
    found = [(int(s), int(flat[i]), int(t)) for i, t, s in zip(
        rows.tokens.token_index, rows.tokens.target_ids, rows.tokens.sequence_ids, strict=True
    )]  # fmt: skip
    wanted = []
    for number, each in enumerate(texts):
        ids = each.ids.tolist()
        wanted += [(number, ids[i - 1], ids[i]) for i in each.scored.tolist()]
    assert found == wanted
    if trees:
        assert len(flat) == plan.tokens
        assert (flat == -5).sum() == plan.padding


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=7),
    st.sampled_from([CPU, GPU]),
    st.sampled_from(["packed", "shared_prompt"]),
)
def test_a_plan_has_every_tree_once_and_is_the_cheapest(lengths: list[int], costs: RowCosts, layout: str):
    trees = of_sequences(*lengths)
    plan = plan_rows(trees, costs, layout=layout)
    assert sorted(i for call in plan.calls for i in call) == list(range(len(lengths)))
    assert plan.tokens - plan.padding == sum(lengths)
    assert all(plan.cost <= other for other in plan.rejected.values())
    alone = {name: plan_rows(trees, costs, layout=layout, arrangements=[name]) for name in ARRANGEMENTS}
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
    """One row wherever a call costs something, unless larger calls cost more than they save."""
    assert plan_rows(PAIR_TREES, CPU, layout="shared_prompt").arrangement == "one_row"
    assert plan_rows(PAIR_TREES, GPU, layout="shared_prompt").arrangement == "one_row"
    slow = replace(CPU, large_call=1.1)
    assert plan_rows(PAIR_TREES, slow, layout="shared_prompt").arrangement == "separate"
    small = [TreeSize(6, 13.5, 3)] * 4
    assert plan_rows(small, slow, layout="shared_prompt").arrangement == "one_row"
    plan = plan_rows(of_sequences(*[100] * 8), GPU, layout="packed", arrangements=["separate", "bucketed"])
    assert plan.calls == (tuple(range(8)),) and plan.arrangement == "bucketed"


def test_a_tree_is_never_padded():
    plan = plan_rows(PAIR_TREES, GPU, layout="shared_prompt")
    assert "some share their beginning" in str(plan.rejected["bucketed"])


def test_costs_are_of_pairs_that_see_each_other():
    (tree,) = plant([(0, torch.arange(40)), (1, torch.cat([torch.arange(30), torch.arange(100, 105)]))])
    size = TreeSize(tree.num_tokens, tree.forest.num_pairs, len(tree.segments))
    assert size == (45, 40 * 41 // 2 + 5 * 30 + 15, 3)
    assert plan_rows([size], CPU, layout="shared_prompt").cost == 5 + 45 + 0.002 * size.pairs


def test_the_longest_rows_come_first():
    """A first call that fits says that the others do."""
    for arrangement, calls in (("separate", ((1,), (2,), (0,), (3,))), ("bucketed", ((1, 2), (0, 3)))):
        plan = plan_rows(of_sequences(5, 300, 299, 4), CPU, layout="packed", arrangements=[arrangement])
        assert plan.calls == calls


def test_what_attention_costs():
    """Half of a square for each sequence; of padded ones all of it where what is masked is computed."""
    for skips, of_padded in ((False, 2 * 400), (True, 400)):
        costs = RowCosts(call_tokens=0.0, pair_tokens=1.0, skips_masked=skips)
        for arrangement in ("separate", "one_row"):
            plan = plan_rows(of_sequences(10, 20), costs, layout="packed", arrangements=[arrangement])
            assert plan.cost == 30 + 50 + 200
        bucket = plan_rows(of_sequences(20, 20), costs, layout="packed", arrangements=["bucketed"])
        assert bucket.cost == 40 + 2 * 200
        assert padded_cost([10, 20], costs) == 40 + of_padded


def test_a_plan_explains_itself():
    trees = [TreeSize(30, 400, 3), TreeSize(20, 200, 3)]
    text = str(plan_rows(trees, CPU, layout="shared_prompt", arrangements=["separate"]))
    assert text.startswith("shared_prompt, separate: 2 trees of sequences that begin alike in 2 calls")
    assert "50 tokens, 0 of them padding; predicted cost 61 tokens" in text
    assert "one_row: not allowed" in text and "bucketed: " in text


def test_what_cannot_be_arranged_is_refused():
    trees = of_sequences(3, 4)
    with pytest.raises(ValueError, match="arrangements: got .*needs several calls"):
        plan_rows(trees, CPU, layout="packed", arrangements=["separate"], single_call=True)
    with pytest.raises(ValueError, match="arrangements: got \\['stacked'\\]"):
        plan_rows(trees, CPU, layout="packed", arrangements=["stacked"])
    assert len(plan_rows(of_sequences(9, 1), CPU, layout="packed", single_call=True).calls) == 1


@pytest.mark.parametrize("case", ROW_CASES, ids="-".join)
def test_the_collator_follows_the_plan(case: tuple[str, str]):
    collator = row_collator(*case)
    batch, plan = collator(PAIRS), collator.plan(PAIRS)
    assert batch.positions == plan.tokens
    assert len(batch.calls) == len(plan.calls)


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
    # Here and there answers begin alike.
    assert 0.98 * (prompts + answers) < counted["shared_prompt"] <= prompts + answers
    assert counted["packed"] == 2 * prompts + answers
    assert counted["labelled"] == answers
    return counted


def test_tokens_of_the_backbone_on_real_pairs(preference_path: Any, tokenizer: Any, make_args: Any):
    """The numbers of docs/layouts.md: 8 pairs of the shared file a batch, a byte-level tokenizer."""
    data = tokenized_pairs(read_rows(preference_path), tokenizer, make_args(max_length=0))
    counted = backbone_tokens(data, 8)
    per_pair = [round(counted[layout] / len(data)) for layout in ("padded", "packed", "shared_prompt")]
    assert (len(data), per_pair) == (240, [13855, 5963, 4285])
    page = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
    for said in (
        "240 real pairs in batches of 8",
        "13855 positions a pair padded",
        "5963 packed and 4285 with",
    ):
        assert said in " ".join(page.split()), said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("max_length", "row"),
    [
        (1024, "| 1024 | 215 | 1819 | 28.1 % | 58.6 % | 42.8 % |"),
        (2048, "| 2048 | 240 | 2522 | 24.0 % | 54.2 % | 38.8 % |"),
    ],
)
def test_tokens_of_the_backbone_in_the_benchmark(preference_path: Any, max_length: int, row: str):
    """The table of docs/layouts.md: batches of 4 pairs, with the tokenizer that `bench step` trains."""
    data, _ = make_data(preference_path, SIZES["small-llama"].vocab, max_length)
    counted = backbone_tokens(data, 4)
    shares = [
        f"{100 * counted[n] / counted['padded']:.1f} %" for n in ("labelled", "packed", "shared_prompt")
    ]
    cells = [str(max_length), str(len(data)), f"{counted['padded'] / len(data):.0f}", *shares]
    assert f"| {' | '.join(cells)} |" == row
    assert row in (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8").splitlines()


def test_costs_of_padding():
    assert padded_cost([10, 4], RowCosts(5.0, 0.1, False)) == 5 + 20 + 0.1 * 2 * 100
    assert padded_cost([10, 4], RowCosts(5.0, 0.1, True), multiple_of=8) == 5 + 32 + 0.1 * 2 * 128
