"""How many kernels a GPU launches in one call of the head, counted on meta tensors: ``launch_rows``.

Every operation of torch that is no view and no allocation is one launch, and every kernel of ours is one; a
GEMM library may launch two for a product, where it splits a sum. Nothing here ran on a GPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.pretended import make_call, pretended_gpu, run_backward, run_forward
from fastdpo.functional.groups import LOSS_KEY, pack_objective
from fastdpo.functional.rows import Rows
from fastdpo.functional.tokens import RowTokens
from fastdpo.ops.grouped_chunks import GroupedResults, GroupLoss
from fastdpo.ops.grouped_loss import GROUP_LOSSES
from fastdpo.ops.scaling import scaled
from fastdpo.plan.modes import LEAN_STASH

LLAMA_3_8B = (4096, 128256)
NUM_TOKENS = 4096
PRODUCTS = {"mm", "addmm", "addmm_", "bmm"}
VIEWS = {"_unsafe_view", "_reshape_alias"}  # whose schemas do not say so


class LaunchRow(NamedTuple):
    """Launches of one pass of one mode."""

    mode: str
    direction: str  # "forward" or "backward"
    products: int
    row_kernels: int
    others: dict[str, int]  # by the name of torch's operation, or of our kernel

    @property
    def total(self) -> int:
        """All of them."""
        return self.products + self.row_kernels + sum(self.others.values())


class LaunchCount(TorchDispatchMode):
    """Counts what is launched under it, by the name of torch's operation."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def seen(self, kernel: str) -> None:
        """A kernel of ours."""
        self.launches[f"{kernel} kernel"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _launches(func, args, result):
            self.launches[func.overloadpacket.__name__] += 1
        return result

    def row(self, mode: str, direction: str) -> LaunchRow:
        """What has been counted since the last one."""
        counted, self.launches = self.launches, Counter()
        products = sum(counted.pop(name, 0) for name in PRODUCTS)
        return LaunchRow(
            mode, direction, products, counted.pop("row kernel", 0), dict(sorted(counted.items()))
        )


def _launches(func: Any, args: Any, result: Any) -> bool:
    is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
    name = func.overloadpacket.__name__
    if is_view or "empty" in name or name in VIEWS:
        return False
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return any(tensor.numel() for tensor in tensors)


def launch_rows(num_tokens: int = NUM_TOKENS, sizes: tuple[int, int] = LLAMA_3_8B) -> list[LaunchRow]:
    """Of ``score``, ``stash``, ``pairs`` and ``lean`` with a frozen head, forward and backward.

    Args:
        num_tokens: N; in ``pairs`` pairs of 512.
        sizes: H and V; by default Llama-3-8B's.
    """
    rows = []
    for mode in ("score", "stash", "pairs", LEAN_STASH):
        count = LaunchCount()
        with pretended_gpu(seen=count.seen, backend="triton"):
            needs = {"needs_hidden": mode != "score", "needs_weight": mode == "pairs"}
            call = make_call(mode, num_tokens, *sizes, **needs)
            loss = _group_loss(num_tokens) if mode == "pairs" else None
            with count:
                forward = run_forward(call) if loss is None else run_forward(call, group_loss=loss)
                rows.append(count.row(call.plan.mode, "forward"))
                if mode == "score":
                    continue
                if isinstance(forward, GroupedResults):  # the stored gradients, times the incoming one
                    for gradient in (forward.dhidden, forward.dweight):
                        scaled(gradient, forward.loss)  # type: ignore[arg-type]
                else:
                    run_backward(call, forward)
                rows.append(count.row(call.plan.mode, "backward"))
    return rows


def _group_loss(num_tokens: int, pair_length: int = 512) -> GroupLoss:
    """The DPO loss of groups of pairs, against given sums of a reference."""
    num_pairs = -(-num_tokens // pair_length)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    segment_ids, offsets = (empty(size, dtype=torch.int64) for size in (num_tokens, 2 * num_pairs + 1))
    rows = Rows(RowTokens(2 * num_pairs, segment_ids, segment_ids, offsets), ref_sums=empty(2 * num_pairs))
    packed = pack_objective({}, rows, torch.arange(0, 2 * num_pairs + 1, 2), [empty()])
    return GROUP_LOSSES[LOSS_KEY](*packed)


def main() -> None:
    """Print the table."""
    for row in launch_rows():
        others = ", ".join(f"{count} {name}" for name, count in row.others.items())
        print(f"{row.mode:6} {row.direction:9} {row.total:4}: {row.products} products, "
              f"{row.row_kernels} row kernels, {others}")  # fmt: skip


if __name__ == "__main__":
    main()
