"""Batches of so many tokens: every pair once, as many batches on every rank and in every epoch, resumable."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.integrations.forest.plant import SHORTEST_SHARED
from fastdpo.training.batches.budget import STRATEGIES, TokenBudget, TokenBudgetSampler, pair_tokens
from fastdpo.training.batches.collate import RowCollator
from fastdpo.training.batches.plan import RowCosts
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.report import DataReport
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import make_rows, read_metrics, tiny_llama
from tests.training.loop.ddp_run import pairs

MakeArgs = Callable[..., PreferenceConfig]


@st.composite
def samplers(draw: Any) -> TokenBudgetSampler:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=60))
    is_padded = draw(st.booleans())
    return TokenBudgetSampler(
        sizes,
        (2 if is_padded else 1) * max(sizes) + draw(st.integers(0, 60)),
        num_ranks=draw(st.integers(1, 5)),
        strategy=draw(st.sampled_from(STRATEGIES)),
        seed=draw(st.integers(0, 9)),
        sequences=[2] * len(sizes) if is_padded else None,
    )


def in_epoch(sampler: TokenBudgetSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


@settings(deadline=None, max_examples=200)
@given(samplers(), st.integers(0, 3))
def test_an_epoch_is_every_pair_once_within_the_budget(sampler: TokenBudgetSampler, epoch: int):
    batches = in_epoch(sampler, epoch)
    assert Counter(i for batch in batches for i in batch) == Counter(range(len(sampler.sizes)))
    assert all(sampler.cost(batch) <= sampler.budget for batch in batches)
    assert len(batches) == len(sampler)
    assert len(batches) % sampler.num_ranks == 0
    # Only the ranks' last round may have batches without pairs, and only where pairs are too few.
    empty = sum(not batch for batch in batches)
    assert empty < sampler.num_ranks
    assert not empty or all(len(batch) <= 1 for batch in batches)


@settings(deadline=None, max_examples=50)
@given(samplers(), st.integers(0, 2))
def test_the_order_depends_on_seed_and_epoch_alone(sampler: TokenBudgetSampler, epoch: int):
    first = in_epoch(sampler, epoch)
    in_epoch(sampler, epoch + 1)
    torch.rand(3)
    assert in_epoch(sampler, epoch) == first


@settings(deadline=None, max_examples=50)
@given(samplers(), st.integers(0, 7))
def test_ranks_share_the_batches_and_skipping_resumes(sampler: TokenBudgetSampler, skipped: int):
    """Through accelerate's own classes: as many batches on every rank, none lost and none twice."""
    ranks = sampler.num_ranks
    shards = [BatchSamplerShard(sampler, ranks, rank) for rank in range(ranks)]
    handed = [list(shard) for shard in shards]
    assert {len(batches) for batches in handed} == {len(sampler) // ranks} == {len(shard) for shard in shards}
    assert Counter(i for batches in handed for batch in batches for i in batch) == Counter(
        range(len(sampler.sizes))
    )
    for shard, batches in zip(shards, handed, strict=True):
        assert [batch for batch in SkipBatchSampler(shard, skipped)] == batches[skipped:]


def test_ranks_get_batches_of_like_cost():
    rng = random.Random(0)
    sampler = TokenBudgetSampler([rng.randint(50, 900) for _ in range(400)], 4000, num_ranks=4)
    costs = [sampler.cost(batch) for batch in sampler]
    for i in range(0, len(costs), 4):
        assert max(costs[i : i + 4]) - min(costs[i : i + 4]) < 0.1 * 4000


def test_random_batches_are_full_and_differ_between_epochs():
    rng = random.Random(0)
    sizes = [rng.randint(50, 900) for _ in range(400)]
    sampler = TokenBudgetSampler(sizes, 4000)
    assert len(sampler) <= 1.03 * sum(sizes) / 4000 + 1
    together = [{frozenset(batch) for batch in in_epoch(sampler, epoch)} for epoch in range(2)]
    assert not together[0] & together[1]


def test_strategies():
    sizes = [5, 1, 4, 2, 3, 6]
    in_order = TokenBudgetSampler(sizes, 8, strategy="sequential")
    assert list(in_order) == [[0, 1], [2, 3], [4], [5]]
    by_length = TokenBudgetSampler(sizes, 8, strategy="group_by_length")
    assert sorted(by_length) == [[0], [2, 4, 1][:2] + [1], [3], [5]] or sorted(
        map(sorted, by_length)
    ) == sorted(map(sorted, [[5], [0], [2, 4], [3, 1]]))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="strategy: got 'sorted'"):
        TokenBudgetSampler([1], 2, strategy="sorted")
    with pytest.raises(ValueError, match="no pairs"):
        TokenBudgetSampler([], 2)
    with pytest.raises(ValueError, match="got 6 tokens for pair 1, wanted 5"):
        TokenBudgetSampler([1, 3], 5, sequences=[2, 2])


def test_tokens_of_a_pair():
    data = pairs(5, 0)
    m, c, r = torch.tensor(data.sizes(torch.arange(5))).unbind(1)
    assert torch.equal(pair_tokens(data, "padded"), m + torch.maximum(c, r))
    assert torch.equal(pair_tokens(data, "packed"), 2 * m + c + r)


@pytest.mark.parametrize("layout", ["packed", "shared_prompt"])
@pytest.mark.parametrize("alike", [0, SHORTEST_SHARED - 1, SHORTEST_SHARED, 40])
def test_tokens_of_a_row_are_those_that_its_trees_have(layout: str, alike: int):
    """Three sequences whose answers begin with ``alike`` equal tokens; of a prompt of 5, and without one."""
    beginning = list(range(100, 100 + alike))
    answers = [[1, *range(30)], [2, 3], [*range(4, 9)]]
    for prompt in ([*range(50, 55)], []):
        flat = prompt + [token for answer in answers for token in beginning + answer]
        bounds = torch.tensor([0, len(prompt), *(alike + len(answer) for answer in answers)]).cumsum(0)
        numbers = torch.tensor([1])
        data = RowDataset.of_pairs(
            torch.tensor(flat, dtype=torch.int32), bounds[None], numbers, {}, DataReport("rows", 1, 1)
        )
        collator = RowCollator(0, layout, RowCosts(1.0, 0.0, skips_masked=True), ("separate",))
        tokens = collator.plan([data[0]]).tokens
        assert int(data.batch_tokens(layout)) == tokens
        assert TokenBudget(1, layout).of_row(data[0]) == (tokens, 3)
        is_shared = layout == "shared_prompt" and len(prompt) + alike >= SHORTEST_SHARED
        assert tokens == len(flat) + 2 * len(prompt) - 2 * is_shared * (len(prompt) + alike)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompt"])
def test_a_pair_beyond_the_budget_is_named(make_args: MakeArgs, layout: str):
    data = pairs(8, 0)
    worst = int(pair_tokens(data, layout).argmax())
    args = make_args(batch_layout=layout, max_tokens_per_batch=10)
    trainer = PreferenceTrainer(tiny_llama(), args, train_dataset=data)
    with pytest.raises(
        ValueError, match=rf"max_tokens_per_batch: got 10, wanted at least \d+: what row {worst + 1} "
    ):
        trainer.train()


def test_the_order_of_scoring_is_cut_by_the_budget():
    data = pairs(9, 0)
    order = data.lengths.argsort(descending=True, stable=True)
    cut = TokenBudget(60, "packed").cut(data, order)
    assert torch.equal(torch.cat(cut), order)
    sizes = pair_tokens(data, "packed")
    assert all(sizes[places].sum() <= 60 for places in cut) and len(cut) > 1
    assert TokenBudget(60, "packed").cut(data, order[:0]) == []


class KeepGradients(PreferenceTrainer):
    """The gradients before the first optimiser step."""

    def drop_nonfinite_step(self) -> None:
        if not hasattr(self, "gradients"):
            self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        super().drop_nonfinite_step()


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompt"])
@pytest.mark.parametrize("loss_type", [["sigmoid"], ["ipo", "sft"]])
def test_the_mean_is_over_pairs_however_many_a_batch_holds(
    make_args: MakeArgs, tokenizer: Any, tmp_path: Any, layout: str, loss_type: list[str]
):
    """7 pairs in one padded batch, against one optimiser step over as many batches as the budget makes."""
    rows = make_rows(7)
    args = make_args(
        output_dir=str(tmp_path / "whole"), per_device_train_batch_size=7, max_steps=1, loss_type=loss_type
    )  # fmt: skip
    whole = KeepGradients(tiny_llama(), args, train_dataset=rows, processing_class=tokenizer)
    whole.train()
    budget = (4 if layout == "padded" else 2) * int(pair_tokens(whole.train_dataset, layout).max()) + 8
    args = make_args(
        output_dir=str(tmp_path / "parts"), batch_layout=layout, max_tokens_per_batch=budget, max_steps=1,
        gradient_accumulation_steps=7, loss_type=loss_type,
    )  # fmt: skip
    parts = KeepGradients(tiny_llama(), args, train_dataset=rows, processing_class=tokenizer)
    assert 2 <= len(parts.get_train_dataloader()) <= 6
    parts.train()
    for name, gradient in whole.gradients.items():
        size = max(gradient.abs().max().item(), 1.0)
        torch.testing.assert_close(parts.gradients[name], gradient, rtol=0, atol=2e-6 * size)
    logs = [read_metrics(tmp_path / run)[0] for run in ("parts", "whole")]
    for name in ("loss", "rewards/margins", "logps/chosen", "entropy", "num_tokens", "mean_token_accuracy"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5, abs=2e-5), name


def test_steps_of_an_epoch_are_counted_once(make_args: MakeArgs, tokenizer: Any):
    """Two epochs, whose batches differ, have the steps that transformers counted before the first."""
    args = make_args(
        batch_layout="packed", max_tokens_per_batch=180, max_steps=-1, num_train_epochs=2, save_strategy="no"
    )
    trainer = PreferenceTrainer(tiny_llama(), args, train_dataset=make_rows(23), processing_class=tokenizer)
    steps = len(trainer.get_train_dataloader())
    trainer.train()
    assert trainer.state.global_step == 2 * steps
    assert trainer.state.epoch == 2.0
    tokens = 2 * int(pair_tokens(trainer.train_dataset, "packed").sum())
    assert read_metrics(args.output_dir)[-1]["num_tokens"] == tokens


@pytest.mark.parametrize("name", ["split_batches", "dispatch_batches"])
def test_what_would_cut_up_a_batch_is_refused(make_args: MakeArgs, name: str):
    for changes in ({"batch_layout": "packed"}, {"max_tokens_per_batch": 100}):
        with pytest.raises(ValueError, match=f"accelerator_config.{name}: got True"):
            make_args(**changes, accelerator_config={name: True})
    assert make_args(accelerator_config={name: True}).batch_layout == "padded"


def test_dropping_the_last_batch_is_refused(make_args: MakeArgs):
    with pytest.raises(ValueError, match="dataloader_drop_last: got True with max_tokens_per_batch"):
        make_args(max_tokens_per_batch=100, dataloader_drop_last=True)
    assert make_args(dataloader_drop_last=True).dataloader_drop_last
    with pytest.raises(ValueError, match="length_column_name: got 'tokens', wanted length"):
        make_args(length_column_name="tokens", train_sampling_strategy="group_by_length")


def test_the_loader_s_settings_are_honoured(make_args: MakeArgs):
    data = pairs(12, 0)

    def loader(**changes: Any) -> Any:
        args = make_args(batch_layout="packed", max_tokens_per_batch=60, **changes)
        return PreferenceTrainer(tiny_llama(), args, train_dataset=data).get_train_dataloader()

    settings = {
        "dataloader_num_workers": 1,
        "dataloader_prefetch_factor": 3,
        "dataloader_persistent_workers": True,
        "dataloader_pin_memory": False,
        "accelerator_config": {"even_batches": False},
    }
    plain, changed = loader(), loader(**settings)
    assert (changed.num_workers, changed.prefetch_factor, changed.persistent_workers) == (1, 3, True)
    assert [batch.rows.tolist() for batch in changed] == [batch.rows.tolist() for batch in plain]
    orders = []
    for strategy in STRATEGIES:
        sampler = loader(train_sampling_strategy=strategy, data_seed=3).batch_sampler
        assert (sampler.strategy, sampler.seed) == (strategy, 3)
        orders.append(list(sampler))
    assert orders[1][0] == sorted(orders[1][0]) and len({str(order) for order in orders}) == 3
