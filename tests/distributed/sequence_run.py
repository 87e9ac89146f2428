"""One rank that has a part of every sequence, beside the whole of them; a JSON line for each case."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo import TokenLayout, fused_dpo_loss, fused_preference_loss, shift_labels
from tests.distributed.cases import SEQUENCES
from tests.distributed.problem import Collectives, print_results
from tests.distributed.ranks import leave

P, T, H, V = 3, 10, 16, 61


def _problem() -> dict[str, Any]:
    random = torch.Generator().manual_seed(5)
    labels = torch.randint(0, V, (2 * P, T), generator=random)
    for row in range(2 * P):
        labels[row, : row + 1] = -100
    labels[1, 3:] = -100  # all of this answer on the first rank
    return {
        "hidden": torch.randn(2 * P, T, H, generator=random, dtype=torch.float64),
        "weight": torch.randn(V, H, generator=random, dtype=torch.float64) * 0.4,
        "labels": labels,
        "ref_sums": torch.randn(2 * P, generator=random, dtype=torch.float64) - 20,
        "ref_tokens": -torch.rand(2 * P, T, generator=random, dtype=torch.float64) * 4,
        "weights": torch.rand(2 * P, T, generator=random, dtype=torch.float64),
        "nll_labels": torch.randint(0, V, (2 * P, T), generator=random),
    }


def _layout(targets: Tensor, width: int) -> TokenLayout:
    sequence, place = (targets != -100).nonzero().T
    counts = (targets != -100).sum(1)
    return TokenLayout(
        sequence * width + place, targets[sequence, place], sequence, lengths=tuple(counts.tolist())
    )


def _loss(of: dict[str, Any], place: slice, group: Any, loss_type: str, how: str) -> Any:
    """Of the positions ``place`` of every sequence; labels were shifted over the whole of them."""
    targets = shift_labels(of["labels"])[:, place]
    hidden = of["hidden"][:, place]
    more: dict[str, Any] = {"sequence_group": group, "loss_type": loss_type}
    if how in ("sums", "layout"):
        more["ref_logps"] = of["ref_sums"]
    if how in ("tokens", "weights"):
        more["ref_logps"] = of["ref_tokens"][:, place]
    if how == "weights":
        more["token_weights"] = of["weights"][:, place]
    if how == "nll":
        more |= {"ref_logps": of["ref_sums"], "nll_labels": shift_labels(of["nll_labels"])[:, place]}
        more["loss_type"], more["loss_weights"] = [loss_type, "sft"], [1.0, 0.5]
    if loss_type == "kto":
        more |= {"is_desirable": torch.arange(2 * P) % 2 == 0, "kl": torch.tensor(0.1)}
    if loss_type == "sdpo":
        more |= {"group_ids": torch.arange(2 * P) % 2, "scores": torch.arange(2 * P).double()}
    fused: Any = fused_preference_loss if loss_type in ("kto", "sdpo") else fused_dpo_loss
    if how == "layout":
        return fused(hidden, of["weight"], None, layout=_layout(targets, hidden.shape[1]), **more)
    return fused(hidden, of["weight"], targets, shift=False, **more)


def _case(loss_type: str, how: str) -> dict[str, Any]:
    results = []
    cut = T * 2 // 3
    mine = slice(0, cut) if dist.get_rank() == 0 else slice(cut, T)
    counted = Collectives()
    for place, group in ((mine, dist.group.WORLD), (slice(None), None)):
        of = _problem()
        of["hidden"].requires_grad_()
        of["weight"].requires_grad_()
        with counted if group is not None else torch.enable_grad():
            out = _loss(of, place, group, loss_type, how)
            out.loss.backward()
        results.append((out, of["hidden"].grad, of["weight"].grad))
    (ours, dhidden, dweight), (whole, all_dhidden, all_dweight) = results
    dist.all_reduce(dweight)  # what the engine does that reduces gradients
    near = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(ours.loss, whole.loss, **near)
    torch.testing.assert_close(dhidden[:, mine], all_dhidden[:, mine], **near)
    torch.testing.assert_close(dweight, all_dweight, **near)
    for name, value in whole._asdict().items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(getattr(ours, name), value, **near, msg=lambda m, n=name: f"{n}: {m}")
    assert ours.metrics.keys() == whole.metrics.keys()
    for name, value in whole.metrics.items():
        torch.testing.assert_close(
            ours.metrics[name], value, rtol=1e-6, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    return {"calls": dict(counted.calls)}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    print_results(SEQUENCES, _case)
    leave()
