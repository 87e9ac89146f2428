"""KTO and its unpaired APO against an installed TRL's own trainer, on given log-probabilities."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import UnpairedLogps, build_objective
from fastdpo.losses.aggregate import sequence_sums
from fastdpo.losses.controllers import KLEstimate
from fastdpo.losses.metrics import unpaired_metrics
from fastdpo.losses.unpaired import kto_kl
from tests.losses.test_trl_parity import BETA, TRL_BATCHES, needs_trl, on_grid, random_tokens

WEIGHTS = {"desirable_weight": 1.25, "undesirable_weight": 0.5}


def trl_kto(
    loss_type: str, token: Any, mask: Tensor, label: Tensor, ref: Tensor, kl: tuple[Tensor, Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """Loss and metrics of TRL's own ``KTOTrainer._compute_loss``."""
    from trl.trainer.kto_trainer import KTOTrainer

    metrics: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=mask.device, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        beta=BETA,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda model, batch: kl[0],
        **WEIGHTS,
    )

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(log_probs=token.logps, entropy=token.entropy, mean_logits=token.mean_logit)

    size, length = mask.shape
    inputs = {
        "input_ids": torch.zeros(size, length + 1, dtype=torch.long),
        "attention_mask": torch.ones(size, length + 1),
        "completion_mask": torch.cat([torch.zeros(size, 1, dtype=torch.long), mask.long()], 1),
        "label": label,
        "ref_logps": ref,
        "ref_KL_logps": kl[1],
    }
    loss = KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss, {key: values[0] for key, values in metrics["train"].items()}


@needs_trl
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("kinds", ["both", "desirable", "undesirable"])
def test_installed_trl(name: str, kinds: str) -> None:
    for seed in range(TRL_BATCHES):
        token, mask, ref = random_tokens(seed)
        generator = torch.Generator().manual_seed(seed)
        label = torch.rand(6, generator=generator) < 0.5
        label = {"both": label, "desirable": label | True, "undesirable": label & False}[kinds]
        kl_logps = on_grid(torch.randn(6, generator=generator) - 20)
        kl = (kl_logps, kl_logps - on_grid(3 * torch.randn(6, generator=generator)))
        want, trl_metrics = trl_kto(name, token, mask, label, ref, kl)
        answers = UnpairedLogps(
            sequence_sums(token.logps, mask),
            label,
            mask.sum(1).float(),
            ref,
            kl=kto_kl(*kl) if name == "kto" else None,
        )
        objective = build_objective(name, beta=BETA, **WEIGHTS)
        objective.check(answers)
        got = objective.loss(answers)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        grads = [torch.autograd.grad(x, token.logps)[0][mask] for x in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
        ours = unpaired_metrics(answers, objective.answer_rewards(answers))
        shared = {key for key in trl_metrics if key.startswith(("rewards/", "logps/"))}
        assert {key for key, value in ours.items() if not value.isnan()} == shared
        for key in shared:
            assert ours[key].item() == pytest.approx(trl_metrics[key], rel=1e-5, abs=1e-5), key
        if name == "kto":
            assert KLEstimate().update(*kl).item() == pytest.approx(trl_metrics["kl"], abs=1e-6)
