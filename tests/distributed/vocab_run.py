"""One rank of a head whose vocabulary is split: beside the whole head; a JSON line for each case."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import profile

from fastdpo import (
    Execution,
    LMHead,
    TokenLayout,
    VocabShard,
    fused_dpo_loss,
    fused_preference_loss,
    linear_logprob,
)
from fastdpo.testing import assert_close_to_fp64, assert_logps_close
from fastdpo.types import HeadAdapter
from tests.distributed.cases import MISTAKES, VOCABULARY_SHARDS
from tests.distributed.problem import Collectives, print_results
from tests.distributed.ranks import leave

H, N = 24, 45
PAIRS, LENGTH = 12, 45  # of mode `pairs`; a pair of two long answers outgrows a small cache


def _whole(
    dtype: torch.dtype, size: int, *, bias: bool, adapter: bool, has_pairs: bool, **transform: Any
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(size)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random, dtype=torch.float64) * scale).to(dtype)

    shape = (2 * PAIRS, LENGTH) if has_pairs else (3, N // 3)
    labels = torch.randint(0, size, shape, generator=random)
    labels[0, ::4] = -100
    for row in range(1, len(labels) if has_pairs else 0):
        labels[row, : LENGTH * row // (len(labels) + 3)] = -100
    lora_dtype = torch.promote_types(dtype, torch.float32)
    return {
        "hidden": normal(*shape, H),
        "weight": normal(size, H, scale=0.4),
        "bias": normal(size) if bias else None,
        "lora_a": normal(3, H, scale=0.3).to(lora_dtype) if adapter else None,
        "lora_b": normal(size, 3, scale=0.3).to(lora_dtype) if adapter else None,
        "labels": labels,
        "transform": transform,
    }


def _rows(size: int) -> tuple[int, int]:
    """This rank's part, of which no two are of one size."""
    world, rank = dist.get_world_size(), dist.get_rank()
    bounds = [size * k * (k + 1) // (world * (world + 1)) for k in range(world + 1)]
    return bounds[rank], bounds[rank + 1]


def _leaves(of: dict[str, Any], rows: slice, trained: str) -> dict[str, Tensor]:
    """Copies of the tensors, of which those that are trained require gradients."""
    found = {}
    for name in ("hidden", "weight", "bias", "lora_a", "lora_b"):
        if of[name] is None:
            continue
        value = of[name][rows] if name in ("weight", "bias", "lora_b") else of[name]
        needs = name == "hidden" or name.startswith("lora") or trained == "head"
        if trained == "only head":
            needs = name != "hidden"
        found[name] = value.clone().requires_grad_(needs and trained != "nothing")
    return found


def _head(leaves: dict[str, Tensor], transform: dict[str, Any], shard: VocabShard | None) -> LMHead:
    adapter = HeadAdapter(leaves["lora_a"], leaves["lora_b"], 0.7) if "lora_a" in leaves else None
    return LMHead(
        leaves["weight"], bias=leaves.get("bias"), adapter=adapter, vocab_parallel=shard, **transform
    )


def _results(
    leaves: dict[str, Tensor], head: LMHead, of: dict[str, Any], how: str, execution: Execution, outputs: Any
) -> dict[str, Tensor]:
    """What comes out, and the gradients of a number made of it."""
    made: dict[str, Tensor] = {}
    if how.startswith("pairs") or how == "answers":
        made, objective = _of_rows(leaves, head, of, how, execution)
    elif how in ("loss", "loss with a reference's states"):
        # A first row of chosen answers, a second of rejected ones.
        ref = torch.tensor([-30.0, -31.0], dtype=torch.float64).to(leaves["hidden"].dtype)
        reference = {"ref_logps": ref} if how == "loss" else {"ref_hidden": of["hidden"][1:]}
        labels = of["labels"][:2]
        out = fused_dpo_loss(leaves["hidden"][:2], head, labels, **reference, execution=execution)
        made = {"loss": out.loss, "chosen_logps": out.chosen_logps, "entropy": out.metrics["entropy"]}
        assert out.ref_rejected_logps is not None
        made["ref_rejected_logps"] = out.ref_rejected_logps
        objective = out.loss
    else:
        labels = of["labels"]
        if how == "layout":  # rows that predict several tokens
            places = torch.tensor([0, 1, 1, 5, 30, 30, 30, 44])
            labels = TokenLayout(places, of["labels"].flatten()[7:15].clamp(min=0), torch.zeros_like(places))
        names = tuple(filter(None, outputs.split(",")))
        out = linear_logprob(
            leaves["hidden"], head, labels, outputs=names, execution=execution,
            entropy_requires_grad="entropy" in names and execution.mode in ("auto", "recompute"),
        )  # fmt: skip
        made = {name: value for name, value in out._asdict().items() if value is not None}
        weights = torch.linspace(-1, 1, out.logps.numel(), dtype=torch.float64).view(out.logps.shape)
        terms = [value for value in (out.logps, out.lse, out.entropy) if value is not None]
        objective = sum((term.double() * weights / (k + 1)).sum() for k, term in enumerate(terms))
    if isinstance(objective, Tensor) and objective.requires_grad:
        if how == "pairs":  # once more, by other code: half of each
            (objective / 2).backward(retain_graph=True)
            objective = objective / 2
        objective.backward()
    grads = {f"grad {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {**{name: value.detach() for name, value in made.items()}, **grads}


def _of_rows(
    leaves: dict[str, Tensor], head: LMHead, of: dict[str, Any], how: str, execution: Execution
) -> tuple[dict[str, Tensor], Tensor]:
    """Loss and metrics of pairs, or of answers, that take mode ``pairs``."""
    labels = of["labels"]
    given: dict[str, Any] = {"execution": execution, "ref_logps": _ref_logps(of)}
    if how == "answers":
        wanted = torch.arange(len(labels)) % 3 > 0
        given |= {"loss_type": "kto", "is_desirable": wanted, "kl": torch.tensor(0.2, dtype=torch.float64)}
        answers = fused_preference_loss(leaves["hidden"], head, labels, **given)
        return {"loss": answers.loss, "sums": answers.logps}, answers.loss
    if how == "pairs with states":
        given |= {"ref_hidden": of["hidden"].flip(1), "ref_logps": None}
    out = fused_dpo_loss(leaves["hidden"], head, labels, **given)
    made = {"loss": out.loss, "chosen_logps": out.chosen_logps, "margins": out.chosen_rewards}
    return {**made, **{name: out.metrics[name] for name in ("entropy",)}}, out.loss


def _ref_logps(of: dict[str, Any]) -> Tensor:
    """Near what the head gives: losses that are neither 0 nor straight lines."""
    lengths = (of["labels"][:, 1:] != -100).sum(-1)
    return (-12.0 * lengths).to(torch.promote_types(of["hidden"].dtype, torch.float32))


def _case(
    size: int,
    how: str,
    dtype: str = "float64",
    mode: str = "auto",
    trained: str = "head",
    outputs: str = "",
    bias: bool = False,
    adapter: bool = False,
    workspace_mib: int = 512,
    cache_mib: int = 1024,
    **transform: Any,
) -> dict[str, Any]:
    kind = getattr(torch, dtype)
    has_pairs = mode == "pairs"
    of = _whole(kind, size, bias=bias, adapter=adapter, has_pairs=has_pairs, **transform)
    start, stop = _rows(size)
    execution = Execution(mode=mode, workspace_mib=workspace_mib, cache_mib=cache_mib)
    mine = _leaves(of, slice(start, stop), trained)
    with Collectives() as counted, _InOps() as inside, profile(record_shapes=True) as profiled:
        ours = _results(
            mine, _head(mine, of["transform"], VocabShard(start, size)), of, how, execution, outputs
        )
    whole = _leaves(of, slice(0, size), trained)
    eager = _results(whole, _head(whole, of["transform"], None), of, how, execution, outputs)
    exact = {
        **of,
        **{k: v.double() for k, v in of.items() if isinstance(v, Tensor) and v.is_floating_point()},
    }
    exact_leaves = _leaves(exact, slice(0, size), trained)
    truth = _results(
        exact_leaves, _head(exact_leaves, of["transform"], None), exact, how, Execution(mode=mode), outputs
    )
    assert ours.keys() == truth.keys(), f"{ours.keys()} instead of {truth.keys()}"
    for name, value in ours.items():
        is_split = name.removeprefix("grad ") in ("weight", "bias", "lora_b") and name.startswith("grad")
        wanted, near = (of[name][start:stop] if is_split else of[name] for of in (truth, eager))
        if name == "is_top1":
            assert torch.equal(value, wanted), name
        elif kind == torch.float64:
            torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-11)
        elif name == "logps":
            assert_logps_close(value, wanted, kind)
        elif value.dim():
            assert_close_to_fp64(value, wanted, near, name=name)
        else:
            torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
    return {
        "calls": dict(counted.calls),
        "sent": dict(counted.sent),
        "inside": inside.sent,
        "same": _is_same_everywhere(ours),
        "products": _products(profiled) / (2 * int((of["labels"][:, 1:] != -100).sum()) * H * (stop - start)),
    }


class _InOps:
    """Counts all-gathers, also those of registered ops, below which no dispatch mode sees."""

    def __enter__(self) -> _InOps:
        self.sent: list[int] = []
        self._own = dist.all_gather_into_tensor

        def counted(output: Tensor, part: Tensor, **options: Any) -> Any:
            self.sent.append(part.numel() * part.element_size())
            return self._own(output, part, **options)

        dist.all_gather_into_tensor = counted
        return self

    def __exit__(self, *_: Any) -> None:
        dist.all_gather_into_tensor = self._own


def _products(profiled: Any) -> int:
    """Multiplications and additions of all matrix products."""
    total = 0
    for event in profiled.events():
        first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}.get(event.name)
        if first is not None:
            left, right = event.input_shapes[first : first + 2]
            total += 2 * left[0] * left[1] * right[1]
    return total


def _is_same_everywhere(ours: dict[str, Tensor]) -> bool:
    """Whether what is the same on all ranks is so to the bit."""
    for name, value in ours.items():
        if name in ("grad weight", "grad bias", "grad lora_b"):
            continue
        first = value.double().contiguous().clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, value.double()):
            return False
    return True


def _mistake(
    starts: tuple[int, ...] = (0, 30),
    sizes: tuple[int, ...] = (30, 31),
    second: dict[str, Any] | None = None,
    labels_differ: bool = False,
    beyond: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """What a rank is told of heads that are not one; ``second``: how that of rank 1 differs."""
    rank = dist.get_rank()
    changed = dict(second or {}) if rank else {}
    size = changed.pop("vocab_size", 61)
    bias = torch.zeros(sizes[rank]) if changed.pop("bias", False) else None
    weight = torch.randn(sizes[rank], H).to(changed.pop("dtype", torch.float32))
    head = LMHead(weight, bias=bias, vocab_parallel=VocabShard(starts[rank], size), **changed)
    labels = torch.arange(4) + rank * labels_differ + 60 * beyond
    try:
        linear_logprob(torch.randn(4, H), head, labels, **options)
    except (ValueError, TypeError) as error:
        return {"said": str(error)}
    return {"said": None}


def _is_held() -> dict[str, Any]:
    """Whether a group is kept when all its uses are over: its threads would go on."""
    world = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()
    return {"is_held": world() is not None}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    print_results(VOCABULARY_SHARDS, _case)
    if dist.get_world_size() == 2:
        print_results(MISTAKES, _mistake)
    print_results({"afterwards": {}}, _is_held)
    leave()
