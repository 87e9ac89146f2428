"""GKD and MiniLLM from hidden states to the loss, against dense fp64 and TRL's own divergence."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import (
    Execution,
    LinearLogprobOutput,
    fused_preference_loss,
    preference_loss_from_logps,
    token_divergence,
)
from fastdpo.losses import build_objective
from fastdpo.testing import assert_close_to_fp64
from tests.functional.test_divergence_losses import IGNORED, Pairs
from tests.losses.test_trl_parity import needs_trl


def distil(pairs: Pairs, hidden: Tensor, weight: Tensor, *, is_packed: bool = False, **said: Any) -> Any:
    real = pairs.is_real if is_packed else slice(None)
    return fused_preference_loss(
        hidden[real], weight, pairs.labels[real], teacher_hidden=pairs.reference[real],
        teacher_lm_head=pairs.ref_weight, layout=pairs.layout if is_packed else None,
        execution=Execution(workspace_mib=1), **said,
    )  # fmt: skip


def log_probs(pairs: Pairs, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of the policy and of the teacher."""
    dtype = hidden.dtype
    return pairs.log_probs(hidden, weight), pairs.log_probs(
        pairs.reference.to(dtype), pairs.ref_weight.to(dtype)
    )


def over_answers(pairs: Pairs, values: Tensor) -> Tensor:
    """The mean over each answer's tokens, then over answers."""
    mask = pairs.targets != IGNORED
    return ((values.where(mask, 0)).sum(1) / mask.sum(1)).mean()


def jsd(log_p: Tensor, log_q: Tensor, b: float) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    if b in (0, 1):
        return (q * (log_q - log_p) if b == 0 else p * (log_p - log_q)).sum(-1)
    log_m = (b * q + (1 - b) * p).log()
    return (b * q * (log_q - log_m) + (1 - b) * p * (log_p - log_m)).sum(-1)


def minillm(pairs: Pairs, log_p: Tensor, log_q: Tensor, gamma: float) -> Tensor:
    """The authors' advantages, without whitening, and their single-step term."""
    mask = pairs.targets != IGNORED
    index = pairs.targets.clamp(min=0)[..., None]
    own, teachers = (x.gather(-1, index)[..., 0].where(mask, 0) for x in (log_p, log_q))
    rewards = (teachers - own).detach()
    last, left, returns = torch.zeros(len(mask)).to(own), torch.zeros(len(mask)), []
    for t in reversed(range(mask.shape[1])):
        last, left = rewards[:, t] + gamma * last, left + mask[:, t]
        returns.append(last / left.clamp(min=1))
    advantages = torch.stack(returns[::-1], 1)
    return jsd(log_p, log_q, 1) - advantages.to(own) * own


def dense(pairs: Pairs, name: str, dtype: torch.dtype, option: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    hidden, weight = pairs.leaves(dtype)
    both = log_probs(pairs, hidden, weight)
    values = jsd(*both, option) if name == "gkd" else minillm(pairs, *both, option)
    loss = over_answers(pairs, values)
    return loss.detach(), torch.autograd.grad(loss, (hidden, weight))


CASES = [("gkd", 0.0), ("gkd", 0.3), ("gkd", 0.5), ("gkd", 1.0), ("minillm", 0.9), ("minillm", 1.0)]


@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "option"), CASES)
def test_equals_dense_fp64(name: str, option: float, dtype: torch.dtype, is_packed: bool) -> None:
    pairs = Pairs(dtype)
    hidden, weight = pairs.leaves(dtype)
    said = {"loss_type": name, "jsd_beta" if name == "gkd" else "discount": option}
    out = distil(pairs, hidden, weight, is_packed=is_packed, **said)
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    truth, true_grads = dense(pairs, name, torch.float64, option)
    _, eager_grads = dense(pairs, name, dtype, option)
    # A mean of divergences, each right to the limit of a log-probability; of MiniLLM's products of a return
    # and a log-probability too, neither above 12 here.
    unit = {torch.bfloat16: 1e-4, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    assert abs(out.loss.double().item() - truth.item()) < (25 if name == "minillm" else 1) * unit
    for ours, want, plain in zip(grads, true_grads, eager_grads, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-12)
        else:
            assert_close_to_fp64(ours, want, plain)


@needs_trl
@pytest.mark.parametrize("b", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_gkd_is_trls(b: float) -> None:
    """Its mean is over the tokens of a batch: ours is, of an answer."""
    from trl.experimental.gkd import GKDTrainer

    pairs = Pairs(torch.float64)
    hidden, weight = pairs.leaves(torch.float64)
    for row in range(2):
        policy, teacher = log_probs(pairs, hidden, weight)
        want = GKDTrainer.generalized_jsd_loss(
            policy[row : row + 1], teacher[row : row + 1], pairs.targets[row : row + 1], beta=b
        )
        one = Pairs(torch.float64)
        for name in ("hidden", "reference", "labels", "is_real"):
            setattr(one, name, getattr(pairs, name)[row : row + 1])
        one.weight, one.ref_weight = pairs.weight, pairs.ref_weight
        got = distil(one, hidden[row : row + 1], weight, loss_type="gkd", jsd_beta=b)
        torch.testing.assert_close(got.loss, want, rtol=1e-9, atol=1e-12)


def test_a_policy_that_is_its_teacher_has_nothing_to_learn() -> None:
    pairs = Pairs(torch.float32)
    for said in ({"loss_type": "gkd"}, {"loss_type": "gkd", "jsd_beta": 0.0}, {"loss_type": "minillm"}):
        hidden, weight = pairs.leaves(torch.float32)
        out = fused_preference_loss(
            hidden, weight, pairs.labels, teacher_hidden=pairs.hidden, teacher_lm_head=weight.detach(), **said
        )
        grads = torch.autograd.grad(out.loss, (hidden, weight))
        assert out.loss.item() == 0 and not any(grad.any() for grad in grads)


def test_the_second_half() -> None:
    pairs = Pairs(torch.float64)
    hidden, weight = pairs.leaves(torch.float64)
    mask = pairs.targets != IGNORED
    make = partial(
        token_divergence, hidden, weight, pairs.reference, pairs.targets, ref_lm_head=pairs.ref_weight
    )
    half = partial(preference_loss_from_logps, mask=mask)
    found = make(outputs=("jsd", "logps"), jsd_beta=0.3)
    got = half(LinearLogprobOutput(found.logps), jsd=found.jsd, loss_type="gkd", jsd_beta=0.3)
    whole = distil(pairs, hidden, weight, loss_type="gkd", jsd_beta=0.3)
    torch.testing.assert_close(got.loss, whole.loss, rtol=1e-12, atol=0)
    found = make(outputs=("reverse_kl", "logps", "ref_logps"))
    token = LinearLogprobOutput(found.logps)
    given = {"reverse_kl": found.reverse_kl, "loss_type": "minillm"}
    whole = distil(pairs, hidden, weight, loss_type="minillm")
    torch.testing.assert_close(
        half(token, ref_logps=found.ref_logps, **given).loss, whole.loss, rtol=1e-12, atol=0
    )
    for said, error, message in (
        (given, TypeError, "ref_logps: got NoneType, wanted a Tensor"),
        (given | {"ref_logps": torch.zeros(6)}, ValueError, r"ref_logps: got shape \(6,\)"),
        (given | {"loss_type": "gkd"}, ValueError, "jsd: got None, wanted a value for gkd"),
        (
            given | {"loss_type": "gkd", "jsd_beta": 1.0, "forward_kl": found.reverse_kl},
            ValueError,
            "forward_kl: got a value, wanted None: gkd is of reverse_kl",
        ),
        (
            {"loss_type": "gkd", "jsd_beta": 1.5},
            ValueError,
            r"jsd_beta: got 1.5, wanted a number in \[0, 1\]",
        ),
    ):
        with pytest.raises(error, match=message):
            half(token, **said)
    with pytest.raises(ValueError, match="gkd, minillm of jsd, reverse_kl, wanted one divergence"):
        distil(pairs, hidden, weight, loss_type=["gkd", "minillm"])
    assert not build_objective("gkd").uses_reference
