"""The loop's loss is made inside the model's forward: the head's mode ``pairs``, and the same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastdpo import Execution
from fastdpo.functional.pairs import METRIC_STATISTICS, dpo_loss_from_logps
from fastdpo.integrations.model import patch_model
from fastdpo.training.batches.collate import PaddedCollator
from fastdpo.training.batches.forward import token_logps
from fastdpo.training.data.row import REFERENCE, Row
from fastdpo.training.loop.loss_state import StepValues
from fastdpo.training.loop.step import BatchCounts, batch_loss
from fastdpo.training.reference.sources import Reference
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.kinds import KINDS
from fastdpo.types import DPOLossOutput, PreferenceLossOutput
from tests.integrations.tiny import HIDDEN, make_model
from tests.ops.test_gemm_passes import count_passes
from tests.training.batches.layout_cases import PAIRS, make_batch, row_collator

# One MiB holds D of 31 of the 43 labelled tokens in fp32; the longest pair has 19.
VOCAB, TOKENS = 8209, 43
SMALL = Execution(workspace_mib=1, cache_mib=1)
COUNTS = BatchCounts(len(PAIRS), 40)


def settings(**options: Any) -> PreferenceConfig:
    return PreferenceConfig(output_dir="unused", use_cpu=True, **options)


def in_one_call(model: Any, batch: Any, args: PreferenceConfig) -> PreferenceLossOutput:
    reference = Reference("precomputed" if args.needs_reference else "none")
    return batch_loss(model, model, batch, COUNTS, args, reference)


def in_two(model: Any, batch: Any, args: PreferenceConfig) -> DPOLossOutput:
    """Log-probabilities from the model, and a loss made of them."""
    token = token_logps(model, batch, statistics=METRIC_STATISTICS)
    return dpo_loss_from_logps(
        token,
        batch.mask,
        ref_logps=batch.ref_logps if args.needs_reference else None,
        layout=batch.layout,
        loss_type=args.loss_type,
        num_pairs=COUNTS.rows,
        num_tokens=COUNTS.tokens,
    )


@pytest.mark.parametrize(
    ("trained", "passes", "layout"),
    [(True, 3, "padded"), (True, 3, "packed"), (True, 3, "shared_prompt"), (False, 2, "shared_prompt")],
)
def test_passes(trained: bool, passes: int, layout: str) -> None:
    """A trained head takes three products, though D does not fit into the cache: two calls take more."""
    model = make_model("llama", vocab_size=VOCAB)
    model.lm_head.weight.requires_grad_(trained)
    patch_model(model, execution=SMALL)
    batch = make_batch(layout)
    assert sum(len(pair.answers[0].ids) + len(pair.answers[1].ids) for pair in PAIRS) == TOKENS

    def count(way: Any) -> float:
        return count_passes(
            lambda: way(model, batch, settings()).loss.backward(), TOKENS, HIDDEN, VOCAB, of_size=VOCAB
        )

    assert count(in_one_call) == passes
    assert (count(in_two) > 3.2) if trained else (count(in_two) == 2)


def rows_of(kind: str) -> list[Row]:
    """The pairs' answers as rows of another kind."""
    if kind == "listwise":
        return [replace(pair, numbers={**pair.numbers, "scores": torch.tensor([1.0, 0.0])}) for pair in PAIRS]
    own = {"unpaired": {"is_desirable": 1.0}, "samples": {"win_rates": 0.3}, "steps": {}}[kind]
    rows = []
    for pair in PAIRS:
        for answer, reference in zip(pair.answers, pair.numbers[REFERENCE].split(1), strict=True):
            size = len(answer.ids)
            pieces = (1, size - 1)[: 2 if size > 1 else 1] if kind == "steps" else ()
            count = len(pieces) if pieces else size if kind == "samples" else 1
            numbers = {**own, REFERENCE: reference.expand(count) / count}
            if pieces:
                numbers["advantages"] = torch.linspace(-1, 1, count)
            rows.append(Row(pair.number, pair.prompt, (answer,), numbers, pieces))
    return rows


# Each kind, and each layout twice: `test_kinds` has the values of all of them together.
@pytest.mark.parametrize(
    ("kind", "name", "layout"),
    [
        ("unpaired", "kto", "padded"),
        ("unpaired", "kto", "shared_prompt"),
        ("listwise", "plackett_luce", "packed"),
        ("steps", "direct_advantage", "packed"),
        ("steps", "direct_advantage", "shared_prompt"),
        ("samples", "nash_md", "padded"),
    ],
)
def test_other_kinds_take_three_products_too(kind: str, name: str, layout: str) -> None:
    """And give what log-probabilities from the model, and a loss made of them, give."""
    model = make_model("llama", vocab_size=VOCAB)
    patch_model(model, execution=SMALL)
    collate: Any = PaddedCollator(0) if layout == "padded" else row_collator(layout)
    batch = replace(collate, kind=KINDS[kind])(rows_of(kind))
    given = StepValues({"kl": torch.tensor(0.3)} if kind == "unpaired" else {})
    counts, reference = BatchCounts(batch.loss_rows, TOKENS), Reference("precomputed")

    def step(**changes: Any) -> Any:
        args = settings(loss_type=name, **changes)
        return batch_loss(model, model, batch, counts, args, reference, lambda *_: given)

    found = []
    for changes, most in (({}, 3), ({"fp16": True}, 4)):
        passes = count_passes(
            lambda changes=changes: found.append(step(**changes)) or found[-1].loss.backward(),
            TOKENS, HIDDEN, VOCAB, of_size=VOCAB,
        )  # fmt: skip
        assert passes == 3 if most == 3 else 3.2 < passes <= most
    one, two = found
    assert (
        one.loss.item() == pytest.approx(two.loss.item(), rel=1e-6)
        and one.metrics.keys() == two.metrics.keys()
    )
    torch.testing.assert_close(one.logps, two.logps, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompt"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "simpo", ["sigmoid", "sft"], "sppo_hard"], ids=str)
def test_both_ways_give_the_same(loss_type: Any, layout: str) -> None:
    model = make_model("llama", vocab_size=VOCAB)
    patch_model(model, execution=SMALL)
    batch, args = make_batch(layout), settings(loss_type=loss_type)
    found = {}
    for way in (in_one_call, in_two):
        result = way(model, batch, args)
        found[way] = (result, torch.autograd.grad(result.loss, list(model.parameters())))
    (one, grads), (two, wanted) = found[in_one_call], found[in_two]
    assert torch.equal(one.logps, torch.cat([two.chosen_logps, two.rejected_logps]))
    assert torch.equal(one.rewards, torch.cat([two.chosen_rewards, two.rejected_rewards]))
    assert one.metrics.keys() == two.metrics.keys()
    for name, value in one.metrics.items():
        assert value.item() == pytest.approx(two.metrics[name].item(), rel=1e-6), name
    # Pairs are summed group by group, tokens by products of other widths: the last bits of fp32 differ.
    assert one.loss.item() == pytest.approx(two.loss.item(), rel=1e-6)
    for ours, theirs in zip(grads, wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_without_gradients_it_only_scores() -> None:
    model = make_model("llama", vocab_size=VOCAB)
    patch_model(model, execution=SMALL)

    def run() -> None:
        with torch.no_grad():
            in_one_call(model, make_batch("padded"), settings())

    assert count_passes(run, TOKENS, HIDDEN, VOCAB, of_size=VOCAB) == 1


def test_the_hook_honours_what_it_is_given_or_refuses_it() -> None:
    model = make_model("llama")
    patch_model(model)
    batch = make_batch("padded")
    inputs = {"input_ids": batch.sequences.input_ids, "labels": batch.sequences.labels}
    loss = {"loss_type": "sigmoid", "ref_logps": batch.ref_logps}
    with pytest.raises(ValueError, match="pair_loss: got a value, wanted return_logps=True"):
        model(**inputs, pair_loss=loss)
    with pytest.raises(ValueError, match="logps_outputs.*pair_loss"):
        model(**inputs, return_logps=True, pair_loss=loss, logps_outputs=("entropy",))
    with pytest.raises(ValueError, match=r"pair_loss: got \['execution'\]"):
        model(**inputs, return_logps=True, pair_loss={**loss, "execution": SMALL})
    with pytest.raises(ValueError, match="no_such_option"):
        model(**inputs, return_logps=True, pair_loss={**loss, "no_such_option": 1})
    out = model(**inputs, return_logps=True, pair_loss=loss)
    assert out.logps is None and out.loss is out.pair_loss.loss
    # Several references, and win rates, are arguments like any other.
    several = torch.stack([batch.ref_logps, batch.ref_logps - 3])
    mixed = model(
        **inputs, return_logps=True, pair_loss={"ref_logps": several, "ref_combination": "geometric"}
    )
    chosen = mixed.pair_loss.ref_chosen_logps
    torch.testing.assert_close(chosen, several.mean(0)[: len(chosen)])
    rates = {"chosen_win_rate": 1.0, "rejected_win_rate": 0.0}
    sppo = model(**inputs, return_logps=True, pair_loss={**loss, "loss_type": "sppo", **rates}).loss
    hard = model(**inputs, return_logps=True, pair_loss={**loss, "loss_type": "sppo_hard"}).loss
    torch.testing.assert_close(2 * sppo, hard)
