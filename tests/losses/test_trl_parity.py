"""Losses that TRL has too: against formulas written out independently, and against an installed TRL.

The formulas below take sums and token counts and use nothing of fastdpo; they are plain definitions
(softplus, products, divisions) in fp64. With TRL >= 1.15 installed its own trainer's loss is run, on
a model that returns given log-probabilities, and loss, gradient and metrics are compared.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.functional import dpo_loss_from_logps
from fastdpo.losses import LOSSES, PairLogps, build_objective
from fastdpo.losses.heads import bradley_terry
from fastdpo.types import LinearLogprobOutput
from tests.losses.common import random_pair

BETA, EPS, GAMMA, TAU, ALPHA = 0.3, 0.15, 0.6, 0.07, 0.4
BATCHES = 100


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


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
    "exo_pair": (
        {"label_smoothing": EPS},
        lambda w, r, m, n: (
            sigmoid(BETA * (w - r)) * (-softplus(-BETA * (w - r)) - math.log(1 - EPS))
            + sigmoid(-BETA * (w - r)) * (-softplus(BETA * (w - r)) - math.log(EPS))
        ),
    ),
    "nca_pair": (
        {},
        lambda w, r, m, n: softplus(-BETA * w) + softplus(BETA * w) / 2 + softplus(BETA * r) / 2,
    ),
    "bco_pair": ({}, lambda w, r, m, n: softplus(-BETA * w) + softplus(BETA * r)),
    "sppo_hard": ({}, lambda w, r, m, n: (w - 0.5 / BETA).square() + (r + 0.5 / BETA).square()),
    "apo_zero": ({}, lambda w, r, m, n: 1 - sigmoid(BETA * w) + sigmoid(BETA * r)),
    "apo_down": ({}, lambda w, r, m, n: sigmoid(BETA * w) + 1 - sigmoid(BETA * (w - r))),
    "discopop": (
        {"discopop_tau": TAU},
        lambda w, r, m, n: (
            softplus(-BETA * (w - r)) * (1 - sigmoid(BETA * (w - r) / TAU))
            + torch.exp(-BETA * (w - r)) * sigmoid(BETA * (w - r) / TAU)
        ),
    ),
    "sft": ({}, lambda w, r, m, n: (-w.sum() / m.sum()).expand(len(w))),
}

# Options for losses of TRL's DPOTrainer that have some; aot, which sorts, has no formula above.
DPO_TRAINER: dict[str, dict[str, Any]] = {
    **{name: options for name, (options, _) in FORMULAS.items() if name != "simpo"},
    "aot": {"label_smoothing": EPS},
    "aot_unpaired": {"label_smoothing": EPS},
}
LINKED = ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "exo_pair", "discopop")
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")


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
    name: str, token: LinearLogprobOutput, mask: Tensor, ref: Tensor, **settings: Any
) -> tuple[Tensor, dict[str, Any]]:
    """Loss and metrics of TRL's own `DPOTrainer._compute_loss` on given per-token results."""
    from trl.trainer.dpo_trainer import DPOTrainer

    batch, length = mask.shape
    metrics: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=mask.device, gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(discopop_tau=TAU),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=ALPHA,
        use_weighting=False,
        beta=BETA,
        label_smoothing=EPS,
        loss_types=[name],
        loss_weights=[1.0],
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    vars(trainer).update(settings)

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            log_probs=token.logps,
            entropy=token.entropy,
            mean_logits=token.mean_logit,
            is_top1=token.is_top1,
            log_sum_sq_probs=token.log_sum_sq_probs,
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


def on_grid(values: Tensor) -> Tensor:
    """Multiples of 1/64: TRL's fp32 sums of them are exact, so no link blows up their rounding."""
    return (64 * values).round() / 64


def random_tokens(seed: int) -> tuple[LinearLogprobOutput, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (6, 1), generator=generator)
    mask = torch.arange(12) < lengths

    def draw(scale: float) -> Tensor:
        return on_grid(scale * torch.randn(6, 12, generator=generator)).where(mask, 0)

    token = LinearLogprobOutput(
        logps=(-draw(2.0).abs()).requires_grad_(),
        entropy=draw(1.0).abs(),
        mean_logit=draw(1.0),
        is_top1=(torch.rand(6, 12, generator=generator) < 0.5) & mask,
        log_sum_sq_probs=(-draw(1.0).abs()),
    )
    ref = token.logps.detach().sum(1) + on_grid(5 * torch.randn(6, generator=generator))
    return token, mask, ref


def has_trl() -> bool:
    from importlib.metadata import version

    from packaging.version import Version

    return importlib.util.find_spec("trl") is not None and Version(version("trl")) >= Version("1.15")


needs_trl = pytest.mark.skipif(not has_trl(), reason="TRL >= 1.15 is not installed")


def assert_equal_to_trl(
    name: str, options: dict[str, Any], settings: dict[str, Any], batches: int = BATCHES
) -> None:
    finite = 0
    for seed in range(batches):
        token, mask, ref = random_tokens(seed)
        want, trl_metrics = trl_trainer_loss(name, token, mask, ref, **settings)
        uses_reference = LOSSES[name].uses_reference
        got = dpo_loss_from_logps(
            token, mask, ref_logps=ref if uses_reference else None, loss_type=name, beta=BETA, **options
        )
        assert got.loss.isfinite()
        if not want.isfinite():  # TRL's discopop of an f-divergence: 0 * inf
            continue
        finite += 1
        torch.testing.assert_close(got.loss, want, rtol=1e-6, atol=1e-6)
        # On the completion only: TRL leaves it to its head to stop the gradient elsewhere.
        grads = [torch.autograd.grad(x, token.logps)[0][mask] for x in (got.loss, want)]
        # A gap of links of size M is rounded to 6e-8 M, and a squared loss's gradient carries that on.
        atol = 1e-6 * max(1.0, grads[1].abs().max().item())
        torch.testing.assert_close(*grads, rtol=1e-5, atol=atol)
        if uses_reference:
            assert set(got.metrics) == set(trl_metrics)
            for key in set(trl_metrics) - {"num_tokens"}:  # TRL's is a running count of input tokens
                assert got.metrics[key].item() == pytest.approx(trl_metrics[key], rel=1e-5, abs=1e-6), key
    assert finite > batches / 2


@needs_trl
@pytest.mark.parametrize("name", sorted(DPO_TRAINER))
def test_installed_trl(name: str) -> None:
    assert_equal_to_trl(name, DPO_TRAINER[name], {})


@needs_trl
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", LINKED)
def test_installed_trl_f_divergences(name: str, divergence: str) -> None:
    options = DPO_TRAINER[name] | {"f_divergence_type": divergence}
    if divergence == "alpha_divergence":
        options["f_alpha_divergence_coef"] = ALPHA
    assert_equal_to_trl(name, options, {"f_divergence_type": divergence})


@needs_trl
def test_every_loss_of_trls_trainer_is_here() -> None:
    from trl import DPOConfig

    names = re.findall(r"`'(\w+)'`", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
    assert len(names) >= 15
    assert set(names) == set(DPO_TRAINER)


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
    for seed in range(BATCHES):
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
        want, _ = CPOTrainer.get_batch_loss_metrics(trainer, None, {})
        torch.testing.assert_close(objective.loss(pair), want, rtol=1e-6, atol=1e-6)
        if alpha == 0 and is_mean:
            _, *rewards = trainer.cpo_loss(*logps)
            if name == "simpo":
                torch.testing.assert_close(objective.rewards(pair), tuple(rewards))
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
    for seed in range(BATCHES):
        pair = random_pair(LOSSES["orpo"], seed=seed, dtype=torch.float32)
        # TRL's NLL is of prompt and answer: sums and counts of its own.
        pair = replace(pair, nll_sum=2.5 - 1.5 * pair.chosen, nll_tokens=pair.chosen_tokens + 9)
        means = pair.chosen / pair.chosen_tokens, pair.rejected / pair.rejected_tokens
        nll = pair.nll.sum() / pair.nll_count.sum()
        logits = torch.zeros(1)
        trainer.concatenated_forward = lambda model, batch, out=(*means, logits, logits, nll): out
        want, _ = ORPOTrainer.get_batch_loss_metrics(trainer, None, {})
        got = build_objective("orpo", beta=BETA).loss(pair)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@needs_trl
@pytest.mark.parametrize(("name", "loss_type"), [("tpo", "sigmoid"), ("tpo_l", "tpo-l")])
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
    for seed in range(BATCHES):
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
        options: dict[str, Any] = {"gamma": GAMMA} if name == "tpo_l" else {}
        objective = build_objective(name, beta=BETA, label_smoothing=EPS, nll_weight=0.7, **options)
        torch.testing.assert_close(objective.loss(pair), want, rtol=1e-6, atol=1e-6)


@needs_trl
@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_installed_trl_cpo_with_other_losses(loss_type: str) -> None:
    """CPO's hinge and IPO are those of DPO under a uniform reference, listed with an NLL term."""
    from trl.experimental.cpo import CPOTrainer

    trainer = cpo_trainer(loss_type=loss_type, cpo_alpha=0.7)
    for seed in range(BATCHES):
        pair = random_pair(LOSSES["cpo"], seed=seed, dtype=torch.float32)
        zeros = torch.zeros(5)
        uniform = replace(pair, ref_chosen=zeros, ref_rejected=zeros)
        logps = (pair.chosen, pair.rejected)
        if loss_type == "ipo":
            logps = pair.chosen / pair.chosen_tokens, pair.rejected / pair.rejected_tokens
        nll = -pair.chosen.sum() / pair.chosen_tokens.sum()
        logits = torch.zeros(1)
        trainer.concatenated_forward = lambda model, batch, out=(*logps, logits, logits, nll): out
        want, _ = CPOTrainer.get_batch_loss_metrics(trainer, None, {})
        got = build_objective([loss_type, "sft"], [1.0, 0.7], beta=BETA).loss(uniform)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


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
    for seed in range(BATCHES):
        generator = torch.Generator().manual_seed(seed)
        rewards = 3 * torch.randn(8, 1, generator=generator)
        margin = torch.rand(4, generator=generator) if with_margin else None
        model = lambda out=rewards, **_: SimpleNamespace(logits=out)  # noqa: E731
        inputs = {} if margin is None else {"margin": margin}
        want = RewardTrainer.compute_loss(trainer, model, inputs)
        chosen, rejected = rewards.squeeze(-1).chunk(2)
        got = bradley_terry(chosen, rejected, margin=margin, centering=centering or 0.0).mean()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
