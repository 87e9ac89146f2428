"""Losses of TRL's CPO, ORPO, TPO and reward trainers against the installed trainers' own code."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdpo.losses import LOSSES, PairLogps, build_objective
from fastdpo.losses.heads import bradley_terry
from fastdpo.losses.metrics import pair_metrics
from tests.losses.common import random_pair
from tests.losses.test_trl_parity import BETA, EPS, GAMMA, TRL_BATCHES, needs_trl


def cpo_trainer(**settings: Any) -> Any:
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        simpo_gamma=GAMMA,
        beta=BETA,
        label_smoothing=EPS,
        aux_loss_enabled=False,
        **settings,
    )
    trainer.cpo_loss = lambda *logps: CPOTrainer.cpo_loss(trainer, *logps)
    return trainer


def assert_trls_metrics(
    objective: Any, pair: PairLogps, trls: dict[str, Any], *, without_nll: bool = False
) -> None:
    """Every metric of the loss that TRL logs, under its name; ``logits/*`` and the like are not its."""
    got = pair_metrics(pair, objective.rewards(pair), objective.logged_logps(pair))
    got |= objective.further_metrics(pair)
    elsewhere = {"entropy", "num_tokens", "mean_token_accuracy"} | ({"nll_loss"} if without_nll else set())
    wanted = {key: value for key, value in trls.items() if key not in elsewhere and "logits/" not in key}
    assert len(wanted) >= 6 and wanted.keys() <= got.keys()
    for key, value in wanted.items():
        assert got[key].item() == pytest.approx(value, rel=2e-6, abs=1e-6), key


@needs_trl
@pytest.mark.parametrize(
    ("name", "loss_type", "alpha"),
    [
        ("simpo", "simpo", 0.0),
        ("simpo", "simpo", 0.25),
        ("cpo_simpo", "simpo", 0.0),
        ("cpo_simpo", "simpo", 0.25),
        ("cpo", "sigmoid", 0.0),
    ],
)
def test_installed_trl_cpo(name: str, loss_type: str, alpha: float) -> None:
    from trl.experimental.cpo import CPOTrainer

    is_mean = loss_type == "simpo"
    nll_weight = 0.0 if name == "simpo" else 0.7
    trainer = cpo_trainer(loss_type=loss_type, cpo_alpha=nll_weight)
    trainer.alpha = alpha
    options = {"gamma": GAMMA, "alpha": alpha} if is_mean else {}
    if name != "simpo":
        options["nll_weight"] = nll_weight
    for seed in range(TRL_BATCHES):
        pair = random_pair(LOSSES[name], seed=seed, dtype=torch.float32)
        if alpha:  # TRL goes through exp(logp), whose gradient is infinite from about -60 nats a token
            pair = replace(
                pair, chosen_tokens=pair.chosen_tokens + 8, rejected_tokens=pair.rejected_tokens + 8
            )
        objective = build_objective(name, beta=BETA, label_smoothing=EPS, **options)
        logps = (pair.chosen, pair.rejected)
        if is_mean:
            logps = pair.chosen / pair.chosen_tokens, pair.rejected / pair.rejected_tokens
        nll = -pair.chosen.sum() / pair.chosen_tokens.sum()
        logits = torch.zeros(1)
        trainer.concatenated_forward = lambda model, batch, out=(*logps, logits, logits, nll): out
        want, metrics = CPOTrainer.get_batch_loss_metrics(trainer, None, {})
        torch.testing.assert_close(objective.loss(pair), want, rtol=1e-6, atol=1e-6)
        assert_trls_metrics(objective, pair, metrics, without_nll=name == "simpo")
        grads = [torch.autograd.grad(x, (pair.chosen, pair.rejected)) for x in (objective.loss(pair), want)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@needs_trl
def test_installed_trl_orpo() -> None:
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(
        beta=BETA,
        aux_loss_enabled=False,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
    )
    trainer.odds_ratio_loss = lambda *logps: ORPOTrainer.odds_ratio_loss(trainer, *logps)
    for seed in range(TRL_BATCHES):
        pair = random_pair(LOSSES["orpo"], seed=seed, dtype=torch.float32)
        # TRL's NLL is of prompt and answer: sums and counts of its own.
        pair = replace(pair, nll_sum=2.5 - 1.5 * pair.chosen, nll_tokens=pair.chosen_tokens + 9)
        means = pair.chosen / pair.chosen_tokens, pair.rejected / pair.rejected_tokens
        nll = pair.nll.sum() / pair.nll_count.sum()
        logits = torch.zeros(1)
        trainer.concatenated_forward = lambda model, batch, out=(*means, logits, logits, nll): out
        want, metrics = ORPOTrainer.get_batch_loss_metrics(trainer, None, {})
        objective = build_objective("orpo", beta=BETA)
        torch.testing.assert_close(objective.loss(pair), want, rtol=1e-6, atol=1e-6)
        assert_trls_metrics(objective, pair, metrics)


@needs_trl
@pytest.mark.parametrize(
    ("name", "loss_type"),
    [("tpo", "sigmoid"), ("tpo", "hinge"), ("tpo", "ipo"), ("tpo_l", "tpo-l")],
)
def test_installed_trl_tpo(name: str, loss_type: str) -> None:
    """TRL's trainer on the logits of chosen, rejected and gold answers, ours on their log-probabilities."""
    from trl.experimental.tpo import TPOTrainer

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x),
        tpo_alpha=0.7,
        loss_type=loss_type,
        beta=BETA,
        label_smoothing=EPS,
        tpo_l_gamma=GAMMA,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    for seed in range(TRL_BATCHES):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(9, 8, 5, generator=generator)
        ids = torch.randint(0, 5, (9, 8), generator=generator)
        mask = (torch.arange(8) >= torch.randint(1, 7, (9, 1), generator=generator)).long()
        inputs = {"input_ids": ids, "attention_mask": torch.ones(9, 8), "completion_mask": mask}
        model = lambda out=logits, **_: SimpleNamespace(logits=out)  # noqa: E731
        want = TPOTrainer._compute_loss(trainer, model, inputs, False)
        logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]
        sums, tokens = logps.sum(1).view(3, 3), mask[:, 1:].sum(1).view(3, 3).float()
        pair = PairLogps(sums[0], sums[1], tokens[0], tokens[1], nll_sum=-sums[2], nll_tokens=tokens[2])
        options: dict[str, Any] = {"gamma": GAMMA} if name == "tpo_l" else {"comparison": loss_type}
        if loss_type in ("sigmoid", "tpo-l"):
            options["label_smoothing"] = EPS
        objective = build_objective(name, beta=BETA, nll_weight=0.7, **options)
        torch.testing.assert_close(objective.loss(pair), want, rtol=1e-6, atol=1e-6)
        logged = {key: values[-1] for key, values in trainer._metrics["eval"].items()}
        assert_trls_metrics(objective, pair, logged, without_nll=True)


@needs_trl
@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_installed_trl_cpo_with_other_losses(loss_type: str) -> None:
    from trl.experimental.cpo import CPOTrainer

    trainer = cpo_trainer(loss_type=loss_type, cpo_alpha=0.7)
    for seed in range(TRL_BATCHES):
        pair = random_pair(LOSSES["cpo"], seed=seed, dtype=torch.float32)
        logps = (pair.chosen, pair.rejected)
        if loss_type == "ipo":
            logps = pair.chosen / pair.chosen_tokens, pair.rejected / pair.rejected_tokens
        nll = -pair.chosen.sum() / pair.chosen_tokens.sum()
        logits = torch.zeros(1)
        trainer.concatenated_forward = lambda model, batch, out=(*logps, logits, logits, nll): out
        want, metrics = CPOTrainer.get_batch_loss_metrics(trainer, None, {})
        objective = build_objective("cpo", comparison=loss_type, nll_weight=0.7, beta=BETA)
        torch.testing.assert_close(objective.loss(pair), want, rtol=1e-6, atol=1e-6)
        assert_trls_metrics(objective, pair, metrics)


@needs_trl
@pytest.mark.parametrize("centering", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_installed_trl_reward_model(centering: float | None, with_margin: bool) -> None:
    from trl import RewardTrainer

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    for seed in range(TRL_BATCHES):
        generator = torch.Generator().manual_seed(seed)
        rewards = 3 * torch.randn(8, 1, generator=generator)
        margin = torch.rand(4, generator=generator) if with_margin else None
        model = lambda out=rewards, **_: SimpleNamespace(logits=out)  # noqa: E731
        inputs = {} if margin is None else {"margin": margin}
        want = RewardTrainer.compute_loss(trainer, model, inputs)
        chosen, rejected = rewards.squeeze(-1).chunk(2)
        got = bradley_terry(chosen, rejected, margin=margin, centering=centering or 0.0).mean()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
