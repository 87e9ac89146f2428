"""Losses stay on the device of their inputs and never wait for it: run on the meta device, without numbers.

A tensor made on the CPU and mixed in raises there, and so does reading a value back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import LOSSES, ListLogps, PairLogps, UnpairedLogps, build_objective
from fastdpo.losses.aggregate import ld_weights, sequence_means, suffix_weights, weighted_sums
from fastdpo.losses.controllers import KLEstimate, ReferenceWeights, RunningMean
from fastdpo.losses.heads import bradley_terry, direct_preference_head, last_token_states
from fastdpo.losses.metrics import list_metrics, pair_metrics, unpaired_metrics
from fastdpo.losses.reference_logps import fused_reference, mrpo_reference
from fastdpo.losses.terms import trust_region
from fastdpo.losses.weights import search_soft_labels, semantic_weights, wpo_weights
from tests.losses.common import ALL_LOSSES, needed, random_pair, variant_id, with_ids
from tests.losses.kinds import random_batch

META = torch.device("meta")


def to_meta(value: Any) -> Any:
    return value.to(META) if isinstance(value, Tensor) else value


def meta_batch(name: str) -> Any:
    spec = LOSSES[name]
    batch = random_pair(spec) if spec.inputs is PairLogps else random_batch(spec)
    if isinstance(batch, ListLogps):
        batch = replace(batch, num_groups=4, max_candidates=3 if name == "wrpo" else 4)
    return type(batch)(**{key: to_meta(value) for key, value in vars(batch).items() if key != "index"})


@pytest.mark.parametrize(("name", "arguments"), with_ids(ALL_LOSSES), ids=variant_id)
def test_every_loss(name: str, arguments: dict[str, Any]) -> None:
    batch = meta_batch(name)
    # The variants' numbers per row are for five pairs; other kinds have four rows here.
    rows = 5 if isinstance(batch, PairLogps) and LOSSES[name].kind == "paired" else 4
    moved = {key: to_meta(v[:rows]) if isinstance(v, Tensor) else v for key, v in arguments.items()}
    objective = build_objective(name, **({key: to_meta(v) for key, v in needed(name, 5).items()} | moved))
    objective.check(batch)
    loss = objective.loss(batch)
    assert loss.device == META and loss.shape == ()
    if isinstance(batch, (ListLogps, UnpairedLogps)):
        rewards = objective.answer_rewards(batch)
        metrics = list_metrics if isinstance(batch, ListLogps) else unpaired_metrics
        assert all(value.device == META for value in metrics(batch, rewards).values())  # type: ignore[operator]
    elif isinstance(batch, PairLogps):
        logged = (objective.rewards(batch), objective.logged_logps(batch))
        metrics = pair_metrics(batch, *logged) | objective.further_metrics(batch)
        assert all(value.device == META for value in metrics.values())


def test_everything_beside_the_losses() -> None:
    tokens = torch.zeros(4, 5, device=META)
    mask, ids = (
        torch.zeros(4, 5, dtype=torch.bool, device=META),
        torch.zeros(4, 5, dtype=torch.int64, device=META),
    )
    references, answers = torch.zeros(3, 4, device=META), torch.zeros(4, device=META)
    results: list[Any] = [
        sequence_means(tokens, mask),
        weighted_sums(tokens, tokens, mask),
        ld_weights(mask, 0.3),
        suffix_weights(ids, mask),
        wpo_weights(tokens, tokens, mask),
        semantic_weights(answers, 1.0),
        search_soft_labels(answers, answers),
        *mrpo_reference(references, references),
        *fused_reference(references, references, answers, answers),
        trust_region(tokens, tokens, mask),
        bradley_terry(answers, answers, centering=0.1),
        direct_preference_head(answers, answers),
        last_token_states(torch.zeros(4, 5, 3, device=META), mask),
        RunningMean().update(answers),
        KLEstimate().update(answers, answers),
    ]
    weights = ReferenceWeights(3)
    weights.update(references, references)
    results.append(weights.weights())
    assert all(result.device == META for result in results)
