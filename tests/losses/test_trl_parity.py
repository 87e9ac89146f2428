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
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.functional.pairs import dpo_loss_from_logps
from fastdpo.losses import LOSSES, build_objective
from fastdpo.types import LinearLogprobOutput
from tests.losses.common import random_pair

BETA, EPS, GAMMA, TAU, ALPHA = 0.3, 0.15, 0.6, 0.07, 0.4
BATCHES = 100
TRL_BATCHES = 25  # of six answers each; TRL takes some milliseconds for one


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
    name: str, options: dict[str, Any], settings: dict[str, Any], batches: int = TRL_BATCHES
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


@pytest.mark.promise(25)
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


@pytest.mark.promise(25)
@needs_trl
def test_every_loss_of_trls_trainer_is_here() -> None:
    from trl import DPOConfig

    names = re.findall(r"`'(\w+)'`", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
    assert len(names) >= 15
    assert set(names) == set(DPO_TRAINER)
