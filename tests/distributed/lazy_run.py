"""One rank: lazy logits of a head under FSDP2, beyond one step's gradients; a JSON line for each case."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fastdpo import Execution, patch_model
from fastdpo.integrations import lazy_split
from fastdpo.integrations.lazy_call import lazy_head
from fastdpo.integrations.lm_head import unwrap
from tests.distributed.cases import LAZY
from tests.distributed.fsdp_run import _fsdp2, _gradients
from tests.distributed.problem import PAIRS, batch, dpo, part, print_results, tiny, worst_error
from tests.distributed.ranks import leave

_MINE = ([0, 1], [2, 3])


def _mine(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    return part(whole, _MINE[dist.get_rank()])


def _split(base: Any, unit: str) -> Any:
    return _fsdp2(patch_model(copy.deepcopy(base), on_materialize="error").train(), unit)


def _compared(base: Any, unit: str, loss_of: Callable[[Any, dict[str, Tensor]], Tensor]) -> dict[str, Any]:
    """The ranks' sum of losses and its gradients beside those of one process on the whole batch."""
    whole, alone = batch(), copy.deepcopy(base).train()
    expected = loss_of(alone, whole)
    expected.backward()
    grads = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    ours = _split(base, unit)
    loss = loss_of(ours, _mine(whole))
    (loss * 2).backward()
    return {"error": worst_error(loss, _gradients(ours), (expected.detach(), grads))}


def _steps(base: Any, unit: str, *, split_head: str = "weight") -> dict[str, Any]:
    """Weights after two steps of AdamW with clipped gradients."""
    whole, how = batch(), "lazy" if split_head == "weight" else "loss"
    alone = copy.deepcopy(base)
    if split_head == "weight":
        models = (alone, _split(base, unit))
    else:
        models = (patch_model(alone), _moved(base, unit))
    for model, of, times in zip(models, (whole, _mine(whole)), (1, 2), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            (dpo(model, of, how) * times).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
    found = {name: value.full_tensor() for name, value in models[1].named_parameters()}
    errors = [float((found[name] - value).abs().max()) for name, value in models[0].named_parameters()]
    moved = [
        float((value - first).detach().abs().max())
        for value, first in zip(models[0].parameters(), base.parameters(), strict=True)
    ]
    return {"error": max(errors), "moved": min(moved)}


def _method(base: Any, unit: str) -> dict[str, Any]:
    """As `patch_trl` has it: a model that is not patched, lazy for as long as the loss is made."""

    def loss_of(model: Any, of: dict[str, Tensor]) -> Tensor:
        with lazy_head(unwrap(model), Execution(), "error"):
            return dpo(model, of, "lazy twice")

    whole, alone = batch(), copy.deepcopy(base).train()
    expected = dpo(alone, whole, "lazy twice")
    expected.backward()
    grads = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    ours = _fsdp2(copy.deepcopy(base).train(), unit)
    loss = loss_of(ours, _mine(whole))
    (loss * 2).backward()
    return {"error": worst_error(loss, _gradients(ours), (expected.detach(), grads))}


def _evaluation(base: Any, unit: str) -> dict[str, Any]:
    ours = patch_model(copy.deepcopy(base), logits="always_lazy", on_materialize="error").eval()
    with torch.no_grad():
        expected = dpo(base, batch(), "statistics")
        loss = dpo(_fsdp2(ours, unit), _mine(batch()), "statistics")
    return {"error": worst_error(loss, {}, (expected, {}))}


def _moved(base: Any, unit: str) -> Any:
    ours = patch_model(copy.deepcopy(base), logits="real", split_head="states")
    return _fsdp2(ours.train(), unit)


def _outputs(base: Any, unit: str) -> dict[str, Any]:
    """Statistics of this rank's own tokens, while other ranks have others."""
    whole, names = batch(), ("lse", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
    errors = []
    models = (patch_model(copy.deepcopy(base)), _moved(base, unit))
    found = []
    for model in models:
        of = _mine(whole)
        with torch.no_grad():
            out = model(**{n: of[n] for n in ("input_ids", "labels")}, return_logps=True, logps_outputs=names)
        found.append({name: getattr(out, name) for name in ("logps", *names)})
    for name, value in found[0].items():
        same = found[1][name].double() - value.double()
        errors.append(float(same.abs().max() / value.double().abs().max().clamp_min(1e-30)))
    return {"error": max(errors)}


def _moved_bits(base: Any, unit: str) -> dict[str, Any]:
    """In bf16: no further from fp64 than with the weight gathered."""
    whole, found = batch(), {}
    exact = patch_model(copy.deepcopy(base).double())
    truth = dpo(exact, {n: v.double() if v.is_floating_point() else v for n, v in whole.items()}, "logps")
    truth.backward()
    wanted: Any = {n: p.grad for n, p in exact.named_parameters()}
    for choice in ("weight", "states"):
        ours = patch_model(copy.deepcopy(base), logits="real", split_head=choice)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh("cpu", (2,))
        for module in (*ours.model.layers, ours.lm_head, ours):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        (dpo(ours, _mine(whole), "logps") * 2).backward()
        head = ours.lm_head.weight.grad
        errors = [(g.double() - wanted[n]).norm() / wanted[n].norm() for n, g in _gradients(ours).items()]
        found[choice] = [max(errors).item(), str(head.dtype), str(tuple(head.placements))]
    return found


def _refused(base: Any, unit: str) -> dict[str, Any]:
    of = _mine(batch())
    model = _moved(base, unit)
    try:
        model(input_ids=of["input_ids"], labels=of["labels"], return_logps=True)
    except ValueError as error:
        return {"said": str(error)}
    return {"said": None}


def _reference(base: Any, unit: str) -> dict[str, Any]:
    """The reference's logits are made while the adapter is off, and looked at when it is on again."""

    def loss_of(model: Any, of: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            reference = model(input_ids=of["input_ids"]).logits
        logits = model(input_ids=of["input_ids"]).logits
        labels = of["labels"][:, 1:]
        mask = labels != -100
        sums = []
        for made in (logits, reference):
            picked = made[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
            sums.append((picked * mask).sum(-1))
        chosen, rejected = (sums[0] - sums[1]).chunk(2)
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).sum() / PAIRS

    return _compared(base, unit, loss_of)


def _masks(base: Any, unit: str) -> dict[str, Any]:
    """Two masks of one log-probability; rank 0 alone has computed all rows of the second for the first."""

    def loss_of(model: Any, of: dict[str, Tensor]) -> Tensor:
        logits, labels = model(input_ids=of["input_ids"]).logits[:, :-1], of["labels"][:, 1:]
        picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        mask = labels != -100
        first = mask.clone()
        # Of pairs 2 and 3, rank 1's, half of the labels.
        late = (of["input_ids"][:, :1] == batch()["input_ids"][[2, 3, 6, 7], 0]).any(-1)
        first[late, ::2] = False
        return (picked * first).sum() * 0.1 + (picked * mask).sum() * 0.2

    return _compared(base, unit, loss_of)


def _bits(base: Any, unit: str) -> dict[str, Any]:
    """In bf16, as accelerate has it: no further from fp64 than real logits of the same model are."""
    whole = batch()
    losses: list[float] = []
    grads: list[float] = []
    exact = copy.deepcopy(base).double()
    truth = dpo(exact, {n: v.double() if v.is_floating_point() else v for n, v in whole.items()}, "lazy")
    truth.backward()
    wanted: Any = {n: p.grad for n, p in exact.named_parameters()}
    for choice in ("real", "lazy"):
        ours = patch_model(copy.deepcopy(base), logits=choice)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
        mesh = init_device_mesh("cpu", (2,))
        for module in ours.model.layers:
            fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(
            ours.lm_head if unit == "own" else [ours.model.norm, ours.lm_head], mesh=mesh, mp_policy=policy
        )
        fully_shard(ours, mesh=mesh, mp_policy=policy)
        loss = dpo(ours, _mine(whole), "lazy")
        (loss * 2).backward()
        total = loss.detach().double().clone()
        dist.all_reduce(total)
        losses.append(abs(total - truth.detach()).item())
        errors = [(g.double() - wanted[n]).norm() / wanted[n].norm() for n, g in _gradients(ours).items()]
        grads.append(max(errors).item())
    return {"losses": losses, "grads": grads}


def _stale(base: Any, unit: str) -> dict[str, Any]:
    ours, of = _split(base, unit), _mine(batch())
    logits = ours(input_ids=of["input_ids"]).logits
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    dpo(ours, of, "lazy").backward()
    optimizer.step()
    return _said(lambda: logits.logsumexp(-1).sum())


def _different(base: Any, unit: str) -> dict[str, Any]:
    logits = _split(base, unit)(input_ids=_mine(batch())["input_ids"]).logits
    if dist.get_rank() == 0:
        return _said(lambda: logits.logsumexp(-1) + 0)
    return _said(lambda: logits.mean(-1) + 0)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = torch.empty(x.shape)
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.expand(ctx.like.shape)


def _function(base: Any, unit: str) -> dict[str, Any]:
    ours = _fsdp2(patch_model(copy.deepcopy(base)).train(), unit)
    loss = _Kernel.apply(ours(input_ids=_mine(batch())["input_ids"]).logits)
    return _said(loss.backward)


def _alone(base: Any, unit: str) -> dict[str, Any]:
    logits = _split(base, unit)(input_ids=_mine(batch())["input_ids"]).logits
    if dist.get_rank() == 0:
        return _said(lambda: logits.logsumexp(-1) + 0)
    time.sleep(4)
    return {"said": None}


def _said(run: Callable[[], Any]) -> dict[str, Any]:
    try:
        run()
    except RuntimeError as error:
        return {"said": str(error)}
    return {"said": None}


def _case(unit: str, run: str, split_head: str = "weight", **model: Any) -> dict[str, Any]:
    if split_head == "states":
        return _steps(tiny(**model), unit, split_head=split_head)
    if run == "statistics":
        return _compared(tiny(**model), unit, lambda m, of: dpo(m, of, run))
    runs = {
        "steps": _steps,
        "reference": _reference,
        "masks": _masks,
        "bits": _bits,
        "stale": _stale,
        "outputs": _outputs,
        "method": _method,
        "evaluation": _evaluation,
        "moved bits": _moved_bits,
        "refused": _refused,
        "different": _different,
        "function": _function,
        "alone": _alone,
    }
    return runs[run](tiny(**model), unit)


if __name__ == "__main__":
    lazy_split.PATIENCE = timedelta(seconds=2)
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    print_results(LAZY, _case)
    leave()
