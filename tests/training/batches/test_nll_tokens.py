"""What NLL terms train on in the loop: prompt and answer (``nll_on_prompt``), or a gold answer (TPO)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdpo.integrations.model import patch_model
from fastdpo.training.batches.collate import PaddedCollator, RowCollator
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.formats import Wanted
from fastdpo.training.data.row import Row
from fastdpo.training.data.source import read_rows
from fastdpo.training.loop.step import BatchCounts, batch_loss
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.encoding import EncodingOptions
from tests.cli_cases import model_dir  # noqa: F401  (a fixture)
from tests.integrations.test_wrappers import _process_group as process_group
from tests.integrations.tiny import make_model
from tests.training.batches.layout_cases import COSTS, make_pairs
from tests.training.loop.pair_formulas import (
    CASES,
    PAIRS,
    assert_step,
    logistic,
    looped,
    sides,
    truth_and_eager,
)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
MakeArgs = Callable[..., PreferenceConfig]
BETA = 0.4
NAMES = (0, 1)
NLL_TOKENS = sum(len(pair.prompt) + len(pair.answers[0].ids) - 1 for pair in PAIRS)


def with_gold(pair: Row, gold: Row) -> Row:
    return replace(pair, answers=(*pair.answers, gold.answers[0]))


# Gold answers longer than the others, of one token, and shorter.
GOLD = [
    with_gold(pair, gold)
    for pair, gold in zip(
        PAIRS, make_pairs([(1, 25, 1), (1, 1, 1), (1, 4, 1), (1, 2, 1)], seed=7), strict=True
    )
]
GOLD_TOKENS = 25 + 1 + 4 + 2
# A mean over tokens is right to 1e-5 nats in fp32 at this width; an answer has 12 tokens, a margin four sums.
LIMIT = 1e-5 + 4 * 12 * 1e-5 * BETA


def made_batch(
    layout: str, arrangement: str, pairs: Sequence[Any], *, on_prompt: bool = True, **options: Any
) -> Any:
    if layout == "padded":
        return PaddedCollator(0, **options)(pairs)
    return RowCollator(0, layout, COSTS, (arrangement,), nll_on_prompt=on_prompt, **options)(pairs)


def orpo(*, on_prompt: bool) -> Any:
    count = NLL_TOKENS if on_prompt else sum(len(pair.answers[0].ids) for pair in PAIRS)

    def formula(model: nn.Module, pairs: Sequence[Any]) -> Tensor:
        total = 0.0
        for chosen, rejected in zip(*sides(model, pairs, *NAMES), strict=True):
            means = [item.logps[item.mask].mean() for item in (chosen, rejected)]
            odds = means[0] - means[1] - (torch.log1p(-means[0].exp()) - torch.log1p(-means[1].exp()))
            nll = -(chosen.logps if on_prompt else chosen.logps[chosen.mask]).sum()
            total = total + BETA * logistic(odds) / len(PAIRS) + nll / count
        return total  # type: ignore[return-value]

    return formula


def test_orpo_in_every_layout() -> None:
    """Loss and gradients by the rule, with the prompt and without; the truth is the formula in fp64."""
    model = make_model("llama")
    found = {on_prompt: truth_and_eager(model, orpo(on_prompt=on_prompt)) for on_prompt in (True, False)}
    assert abs(found[True][0].loss.item() - found[False][0].loss.item()) > 100 * LIMIT
    patch_model(model)
    for on_prompt, (truth, eager) in found.items():
        for case in CASES:
            batch = made_batch(*case, PAIRS, on_prompt=on_prompt)
            counts = (len(PAIRS), int(batch.nll_tokens(on_prompt=on_prompt)))
            for settings in ({}, {"fp16": True}):  # in one call of the head where it can be, and in two
                ours = looped(
                    model, batch, Reference("none"), counts=counts, loss_type="orpo", beta=BETA,
                    nll_on_prompt=on_prompt, batch_layout=case[0], **settings,
                )  # fmt: skip
                assert_step(ours, truth, eager, loss_limit=LIMIT, name=f"{case} {on_prompt}")


def test_orpos_default_is_its_papers(make_args: MakeArgs) -> None:
    for loss_type, wanted in (
        ("orpo", True),
        (["sigmoid", "orpo"], True),
        (["orpo", "sft"], False),
        ("cpo", False),
        ("sigmoid", False),
    ):
        assert make_args(loss_type=loss_type).nll_on_prompt is wanted
    assert make_args(loss_type="orpo", nll_on_prompt=False).nll_on_prompt is False
    assert make_args(loss_type="cpo", nll_on_prompt=True).nll_on_prompt is True
    assert make_args(loss_type="orpo", loss_options={"nll_weight": 0.0}).nll_on_prompt is False
    assert make_args(loss_type="orpo").makes_loss_in_head
    assert not make_args(loss_type="orpo", batch_layout="packed").makes_loss_in_head


def everything(model: nn.Module, pairs: Sequence[Any]) -> Tensor:
    """LD-DPO, WPO and an SFT term on prompt and answer: the weights of tokens are none of the NLL's."""
    total = 0.0
    for pair, chosen, rejected in zip(pairs, *sides(model, pairs, *NAMES), strict=True):
        shared = min(len(pair.answers[k].ids) for k in NAMES)
        sums = []
        for item in (chosen, rejected):
            logps = item.logps[item.mask]
            sums.append(logps[:shared].sum() + 0.3 * logps[shared:].sum())
        ref = pair.numbers["ref_logps"] @ torch.tensor([1.0, -1.0])
        means = [(item.logps - item.log_sum_sq)[item.mask].mean() for item in (chosen, rejected)]
        weight = (means[0] + means[1]).exp().detach()
        total = total + weight * logistic(BETA * (sums[0] - sums[1] - ref)) / len(PAIRS)
        total = total - weight * chosen.logps.sum() / NLL_TOKENS
    return total  # type: ignore[return-value]


def test_all_options_together() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # weights that are not 0
    truth, eager = truth_and_eager(model, everything)
    patch_model(model)
    for case in CASES:
        ours = looped(
            model, made_batch(*case, PAIRS, ld_alpha=0.3), Reference("precomputed"),
            counts=(len(PAIRS), NLL_TOKENS), loss_type=["sigmoid", "sft"], beta=BETA, ld_alpha=0.3,
            use_weighting=True, nll_on_prompt=True,
        )  # fmt: skip
        assert_step(ours, truth, eager, loss_limit=LIMIT, name=str(case))


def tpo(name: str) -> Any:
    def formula(model: nn.Module, pairs: Sequence[Any]) -> Tensor:
        total = 0.0
        for chosen, rejected, gold in zip(*sides(model, pairs, *NAMES, 2), strict=True):
            (w, r) = (
                (i.logps[i.mask].mean() if name == "tpo_l" else i.logps[i.mask].sum())
                for i in (chosen, rejected)
            )
            margin = BETA * (w - r) - (0.5 if name == "tpo_l" else 0.0)
            total = total + logistic(margin) / len(PAIRS) - 0.7 * gold.logps[gold.mask].sum() / GOLD_TOKENS
        return total  # type: ignore[return-value]

    return formula


@pytest.mark.parametrize("name", ["tpo", "tpo_l"])
def test_tpo_in_every_layout(name: str) -> None:
    model = make_model("llama")
    truth, eager = truth_and_eager(model, tpo(name), GOLD)
    patch_model(model)
    for case in CASES:
        batch = made_batch(*case, GOLD, on_prompt=False)
        assert int(batch.nll_tokens(on_prompt=False)) == GOLD_TOKENS
        ours = looped(
            model, batch, Reference("none"), counts=(len(GOLD), GOLD_TOKENS), loss_type=name, beta=BETA,
            loss_options={"nll_weight": 0.7},
        )  # fmt: skip
        assert_step(ours, truth, eager, loss_limit=LIMIT, name=str(case))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_gold_answers_are_counted_among_the_tokens(case: tuple[str, str]) -> None:
    batch = made_batch(*case, GOLD, on_prompt=False)
    tokens = sum(len(pair.prompt) + len(answer.ids) for pair in GOLD for answer in pair.answers)
    assert int(batch.sequence_tokens) == tokens
    least = sum(len(pair.prompt) + sum(len(answer.ids) for answer in pair.answers) for pair in GOLD)
    assert batch.positions >= least


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("loss_type", ["orpo", "tpo"])
def test_the_first_pairs_of_a_batch(case: tuple[str, str], loss_type: str) -> None:
    model = patch_model(make_model("llama"))
    on_prompt = loss_type == "orpo"
    settings = {"counts": (4, 40), "loss_type": loss_type}
    pairs = PAIRS if on_prompt else GOLD
    part = made_batch(*case, pairs, on_prompt=on_prompt).to(torch.device("cpu")).first(3)
    alone = made_batch(*case, pairs[:3], on_prompt=on_prompt)
    assert int(part.nll_tokens(on_prompt=on_prompt)) == int(alone.nll_tokens(on_prompt=on_prompt))
    found = [looped(model, batch, Reference("none"), **settings).loss.item() for batch in (part, alone)]
    assert found[0] == pytest.approx(found[1], abs=LIMIT)


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("loss_type", ["orpo", "tpo"])
def test_empty_prompts_and_answers_are_as_in_padded_batches(case: tuple[str, str], loss_type: str) -> None:
    model = patch_model(make_model("llama"))
    pairs = make_pairs([(0, 3, 4), (4, 1, 3), (3, 5, 1), (0, 1, 2), (2, 3, 1)])
    if loss_type == "tpo":
        golds = make_pairs([(1, n, 1) for n in (3, 1, 0, 2, 6)], seed=3)
        pairs = [with_gold(pair, gold) for pair, gold in zip(pairs, golds, strict=True)]
    found = [
        looped(
            model, made_batch(*one, pairs, on_prompt=loss_type == "orpo"), Reference("none"), counts=(5, 40),
            loss_type=loss_type,
        )
        for one in (case, CASES[0])
    ]  # fmt: skip
    assert found[0].loss.item() == pytest.approx(found[1].loss.item(), abs=LIMIT)
    for name, gradient in found[1].grads.items():
        torch.testing.assert_close(found[0].grads[name], gradient, rtol=1e-4, atol=1e-5)


def test_orpo_is_trls() -> None:
    """The loss of TRL's own trainer, which takes the NLL over prompt and answer, on the same padded batch."""
    orpo_module = pytest.importorskip("trl.experimental.orpo")
    theirs = object.__new__(orpo_module.ORPOTrainer)
    theirs.is_encoder_decoder, theirs.padding_value, theirs.beta = False, 0, BETA
    theirs.aux_loss_enabled = False
    theirs.accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x)
    model, batch = make_model("llama"), made_batch("padded", "", PAIRS)
    fields = {
        f"{side}_{name}": getattr(batch.sequences, name)[place]
        for side, place in (("chosen", slice(0, 4)), ("rejected", slice(4, 8)))
        for name in ("input_ids", "attention_mask", "labels")
    }
    wanted, _ = theirs.get_batch_loss_metrics(model, fields)
    patch_model(model)
    for case in CASES:
        ours = looped(
            model,
            made_batch(*case, PAIRS),
            Reference("none"),
            counts=(4, NLL_TOKENS),
            loss_type="orpo",
            beta=BETA,
        )
        assert ours.loss.item() == pytest.approx(wanted.item(), rel=1e-5), case


def test_tpo_is_trls(tmp_path: Path) -> None:
    """Rows with ``reference``: the same tokens as TRL's trainer makes of them, and its loss."""
    tpo_module = pytest.importorskip("trl.experimental.tpo")
    from tests.integrations import trl_runs as runs

    rows = runs.pairs(with_reference=True)
    theirs = tpo_module.TPOTrainer(
        model=runs.policy("llama"), args=tpo_module.TPOConfig(**runs.settings(tmp_path, beta=BETA)),
        train_dataset=rows, processing_class=runs.make_tokenizer(),
    )  # fmt: skip
    data = encode_rows(
        read_rows(rows), runs.make_tokenizer(), EncodingOptions(), Wanted(gold_column="reference")
    )
    pairs = [data[i] for i in range(4)]
    for pair, row in zip(pairs, theirs.train_dataset, strict=False):
        parts = (pair.prompt, *(answer.ids for answer in pair.answers))
        for ids, name in zip(parts, ("prompt", "chosen", "rejected", "reference"), strict=True):
            assert ids.tolist() == row[f"{name}_ids"]
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(4)])
    wanted = theirs._compute_loss(theirs.model, batch, False)
    model = patch_model(runs.policy("llama"))
    count = sum(len(pair.answers[2].ids) for pair in pairs)
    for case in CASES:
        made = made_batch(*case, pairs, on_prompt=False)
        ours = looped(model, made, Reference("none"), counts=(4, count), loss_type="tpo", beta=BETA)
        assert ours.loss.item() == pytest.approx(wanted.item(), rel=1e-5), case


def test_over_ranks(tmp_path: Path) -> None:
    """A loss of all ranks' pairs, with NLL terms beside it: of one rank it is the rank's own.

    Told that they are two, a rank that is alone has its half of it.
    """
    two: Any = SimpleNamespace(count=2, group=None)
    model = patch_model(make_model("llama"))
    cases = (
        (GOLD, {"loss_type": ["aot", "tpo"]}, GOLD_TOKENS),
        (PAIRS, {"loss_type": ["aot", "orpo"], "nll_on_prompt": True}, NLL_TOKENS),
        (PAIRS, {"loss_type": ["aot", "sft"], "ld_alpha": 0.3}, 17),
    )
    with process_group(str(tmp_path / "store")):
        for pairs, settings, count in cases:
            options = {name: value for name, value in settings.items() if name == "ld_alpha"}
            args = PreferenceConfig(output_dir="unused", use_cpu=True, gather_batch_losses=True, **settings)
            for case in CASES:
                batch = made_batch(*case, pairs, on_prompt=bool(args.nll_on_prompt), **options)
                one, all_ranks = (
                    batch_loss(
                        model,
                        model,
                        batch,
                        BatchCounts(4, count),
                        args,
                        Reference("precomputed"),
                        over_ranks=over,
                    ).loss.item()
                    for over in (None, two)
                )
                assert 2 * all_ranks == pytest.approx(one, rel=1e-6), (case, settings)
