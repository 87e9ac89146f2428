"""Losses that TRL has too: against formulas written out independently, and against an installed TRL.

The formulas below take sums and token counts and use nothing of fastdpo; they are plain definitions
(softplus, products, divisions) in fp64. With TRL >= 1.15 installed its own trainer's loss is run, on
a model that returns given log-probabilities, and loss, gradient and metrics are compared.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.functional import dpo_loss_from_logps
from fastdpo.losses import LOSSES, build_objective
from fastdpo.types import LinearLogprobOutput
from tests.losses.common import random_pair

BETA, EPS, GAMMA = 0.3, 0.15, 0.6
BATCHES = 100


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


# name -> (options, the loss of each pair from log-ratios w (chosen), r (rejected) and token counts m, n)
FORMULAS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]] = {
    "sigmoid": ({}, lambda w, r, m, n: softplus(-BETA * (w - r))),
    "hinge": ({}, lambda w, r, m, n: (1 - BETA * (w - r)).clamp(min=0)),
    "ipo": ({}, lambda w, r, m, n: (w / m - r / n - 1 / (2 * BETA)).square()),
    "robust": (
        {"label_smoothing": EPS},
        lambda w, r, m, n: (
            ((1 - EPS) * softplus(-BETA * (w - r)) - EPS * softplus(BETA * (w - r))) / (1 - 2 * EPS)
        ),
    ),
    "sigmoid_norm": ({}, lambda w, r, m, n: softplus(-BETA * (w / m - r / n))),
    "simpo": (
        {"gamma": GAMMA, "label_smoothing": EPS},
        lambda w, r, m, n: (
            (1 - EPS) * softplus(GAMMA - BETA * (w / m - r / n))
            + EPS * softplus(BETA * (w / m - r / n) - GAMMA)
        ),
    ),
    "sft": ({}, lambda w, r, m, n: (-w.sum() / m.sum()).expand(len(w))),
}


def test_every_loss_of_this_module_is_registered() -> None:
    assert set(FORMULAS) <= set(LOSSES)


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_independent_formula(name: str) -> None:
    options, formula = FORMULAS[name]
    if name != "sft":
        options = options | {"beta": BETA}
    for seed in range(BATCHES):
        pair = random_pair(LOSSES[name], seed=seed, dtype=torch.float32)
        got = build_objective(name, **options).loss(pair)
        inputs = (pair.chosen_logratios, pair.rejected_logratios, pair.chosen_tokens, pair.rejected_tokens)
        want = formula(*(x.detach().double() for x in inputs)).mean()
        assert abs(got.item() - want.item()) <= 1e-6 * max(1.0, abs(want.item()))


def trl_trainer_loss(
    name: str, token: LinearLogprobOutput, mask: Tensor, ref: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Loss and metrics of TRL's own `DPOTrainer._compute_loss` on given per-token results."""
    from trl.trainer.dpo_trainer import DPOTrainer

    batch, length = mask.shape
    metrics: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=mask.device, gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        beta=BETA,
        label_smoothing=EPS,
        loss_types=[name],
        loss_weights=[1.0],
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            log_probs=token.logps, entropy=token.entropy, mean_logits=token.mean_logit, is_top1=token.is_top1
        )

    inputs = {
        "input_ids": torch.zeros(batch, length + 1, dtype=torch.long),
        "attention_mask": torch.ones(batch, length + 1),
        "completion_mask": torch.cat([torch.zeros(batch, 1, dtype=torch.long), mask.long()], 1),
        "ref_chosen_logps": ref[: batch // 2],
        "ref_rejected_logps": ref[batch // 2 :],
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss, {key: values[0] for key, values in metrics["train"].items()}


def random_tokens(seed: int) -> tuple[LinearLogprobOutput, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (6, 1), generator=generator)
    mask = torch.arange(12) < lengths

    def draw(scale: float) -> Tensor:
        return (scale * torch.randn(6, 12, generator=generator)).where(mask, 0)

    token = LinearLogprobOutput(
        logps=(-draw(2.0).abs()).requires_grad_(),
        entropy=draw(1.0).abs(),
        mean_logit=draw(1.0),
        is_top1=(torch.rand(6, 12, generator=generator) < 0.5) & mask,
    )
    ref = token.logps.detach().sum(1) + 5 * torch.randn(6, generator=generator)
    return token, mask, ref


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"simpo"}))
def test_installed_trl(name: str) -> None:
    from importlib.metadata import version

    from packaging.version import Version

    if Version(version("trl")) < Version("1.15"):
        pytest.skip(f"TRL {version('trl')} is older than 1.15")
    options = {"label_smoothing": EPS} if name == "robust" else {}
    for seed in range(BATCHES):
        token, mask, ref = random_tokens(seed)
        want, trl_metrics = trl_trainer_loss(name, token, mask, ref)
        uses_reference = LOSSES[name].uses_reference
        got = dpo_loss_from_logps(
            token, mask, ref_logps=ref if uses_reference else None, loss_type=name, beta=BETA, **options
        )
        torch.testing.assert_close(got.loss, want, rtol=1e-6, atol=1e-6)
        # On the completion only: TRL leaves it to its head to stop the gradient elsewhere. TRL adds up
        # tens of nats in fp32, where a spacing is 4e-6: ours may differ from it by that.
        grads = [torch.autograd.grad(x, token.logps)[0][mask] for x in (got.loss, want)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
        if uses_reference:
            assert set(got.metrics) == set(trl_metrics)
            for key in set(trl_metrics) - {"num_tokens"}:  # TRL's is a running count of input tokens
                assert got.metrics[key].item() == pytest.approx(trl_metrics[key], rel=1e-5, abs=1e-6), key


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_installed_trl_simpo() -> None:
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0, accelerator=SimpleNamespace(device="cpu"), loss_type="simpo", simpo_gamma=GAMMA, beta=BETA,
        label_smoothing=EPS,
    )  # fmt: skip
    for seed in range(BATCHES):
        pair = random_pair(LOSSES["simpo"], seed=seed, dtype=torch.float32)
        objective = build_objective("simpo", beta=BETA, gamma=GAMMA, label_smoothing=EPS)
        means = pair.chosen / pair.chosen_tokens, pair.rejected / pair.rejected_tokens
        want, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(trainer, *means)
        torch.testing.assert_close(objective.loss(pair), want.mean(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(objective.rewards(pair), (chosen_rewards, rejected_rewards))
