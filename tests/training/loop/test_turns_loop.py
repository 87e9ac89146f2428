"""The loop on answers of several turns: log-probabilities of the assistant's words, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdpo.training.batches.collate import PaddedCollator
from fastdpo.training.data.row import Row
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.training.conftest import tiny_llama
from tests.training.data.data_cases import assistant, row_of, user

MakeArgs = Callable[..., PreferenceConfig]
TURNS = [assistant("lamp"), user("cloud river"), assistant("ocean")]
OTHER = [assistant("winter"), user("stone"), assistant("fast")]


def rows_of(kind: str) -> list[dict[str, Any]]:
    plain = row_of(kind, [user("seven")], [assistant("green")], [assistant("quiet paper")])
    return [row_of(kind, [user("seed")], TURNS, OTHER), plain]


def evaluated(args: PreferenceConfig, rows: Any, tokenizer: Any) -> tuple[Any, dict[str, float]]:
    reference = tiny_llama(2) if args.needs_reference else None
    trainer = PreferenceTrainer(
        tiny_llama(1), args, train_dataset=rows, processing_class=tokenizer, ref_model=reference
    )
    return trainer, trainer.evaluate(rows)


def sums(model: Any, item: Row, ids: Any, scored: Any) -> float:
    """Of an answer's scored tokens, by way of the logits."""
    whole = torch.cat([item.prompt, ids]).long()[None]
    with torch.no_grad():
        logps = model(input_ids=whole).logits[0, :-1].log_softmax(-1)
    picked = logps.gather(1, whole[0, 1:, None])[len(item.prompt) - 1 :, 0]
    return float(picked[scored].sum())


def test_log_probabilities_are_of_the_assistants_words(make_args: MakeArgs, tokenizer: Any):
    rows = rows_of("pairs")
    found = {}
    for layout in ("padded", "packed", "shared_prompt"):
        trainer, metrics = evaluated(make_args(batch_layout=layout), rows, tokenizer)
        found[layout] = metrics
    items = [trainer.train_dataset[i] for i in range(2)]
    for place, side in enumerate(("chosen", "rejected")):
        wanted = [sums(tiny_llama(1), item, *item.answers[place]) for item in items]
        for metrics in found.values():
            assert metrics[f"eval_logps/{side}"] == pytest.approx(sum(wanted) / 2, abs=1e-3)
    _, whole = evaluated(make_args(assistant_only=False), rows, tokenizer)
    assert whole["eval_logps/chosen"] < found["padded"]["eval_logps/chosen"] - 10  # the user's words, too


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        ("orpo", "pairs"),
        ("simpo", "pairs"),
        ("kto", "unpaired"),
        ("sdpo", "listwise"),
        ("nash_md", "samples"),
    ],
)
def test_every_layout_gives_the_same_loss(make_args: MakeArgs, tokenizer: Any, loss: str, kind: str):
    """ORPO's NLL is of prompts too, the others' turns among them; KTO's mismatched answers have turns."""
    losses = [
        evaluated(make_args(loss_type=loss, batch_layout=layout), rows_of(kind), tokenizer)[1]["eval_loss"]
        for layout in ("padded", "packed", "shared_prompt")
    ]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


def test_a_collator_of_ones_own_has_to_know(make_args: MakeArgs, tokenizer: Any):
    def trainer(**settings: Any) -> PreferenceTrainer:
        return PreferenceTrainer(
            tiny_llama(1),
            make_args(**settings),
            train_dataset=rows_of("pairs"),
            processing_class=tokenizer,
            data_collator=lambda pairs: PaddedCollator(0)(pairs),
        )

    with pytest.raises(ValueError, match="data_collator: got one with answers of several turns"):
        trainer()
    assert trainer(assistant_only=False).train_dataset.scored is None


def test_precomputed_numbers_are_of_the_same_tokens(make_args: MakeArgs, tokenizer: Any):
    rows = rows_of("pairs")
    losses = []
    for reference in ("copy", "precomputed"):
        for assistant_only in (True, False):  # the cache knows them apart
            args = make_args(reference=reference, assistant_only=assistant_only)
            losses.append(evaluated(args, rows, tokenizer)[1]["eval_loss"])
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-6) and abs(losses[0] - losses[1]) > 1e-4
