"""Which ranks have batches of their own, and sums over these.

Ranks of one tensor-parallel group, and those that have parts of the same sequences, see one batch: it counts
once, in whatever is handed out, added up or gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class DataRanks:
    """The ranks of a run as its data see them.

    Args:
        accelerator: of the trainer.
        shared: how many neighbouring ranks see one batch; divides their number.

    ``count`` ranks have batches of their own, of which this one's is ``index``.
    """

    def __init__(self, accelerator: Any, shared: int = 1) -> None:
        self.accelerator, self.shared = accelerator, shared
        self.count = accelerator.num_processes // shared
        self.index = accelerator.process_index // shared
        self.mesh: Any = None
        if shared > 1:
            from torch.distributed.device_mesh import init_device_mesh

            # By the names that accelerate's loaders know: of the ranks of "tp" each gets the same batch.
            names = ("dp_shard", "tp")
            self.mesh = init_device_mesh(accelerator.device.type, (self.count, shared), mesh_dim_names=names)

    @property
    def same(self) -> Any:
        """The process group of the ranks that see this rank's batch; None where that is this one alone."""
        return None if self.mesh is None else self.mesh.get_group("tp")

    @property
    def group(self) -> Any:
        """The process group of ranks that see other batches, this one among them; None for all ranks."""
        return None if self.mesh is None else self.mesh.get_group("dp_shard")

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of those that see its batch."""
        return int(self.accelerator.process_index) % self.shared == 0

    def first_ones(self, value: Tensor) -> Tensor:
        """``value`` of the first rank of all, where ranks that see one batch may have unlike ones."""
        if self.mesh is not None:
            dist.broadcast(value, 0)
        return value

    def total(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over the batches of all ranks."""
        if self.mesh is None:
            total: Tensor = self.accelerator.reduce(value, reduction="sum")
            return total
        total = value.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def gathered(self, value: Tensor) -> Tensor:
        """``value`` of each batch's rank, one behind the other: of one shape on all of them."""
        if self.mesh is None:
            found: Tensor = self.accelerator.gather(value)
            return found
        value = value.contiguous() if value.dim() else value[None]
        parts = [torch.empty_like(value) for _ in range(self.count)]
        dist.all_gather(parts, value, group=self.group)
        return torch.cat(parts)

    def gathered_for_metrics(self, value: Tensor) -> Tensor:
        """`gathered`, without the repeats that fill up the last round of batches, as accelerate's."""
        if self.mesh is None:
            found: Tensor = self.accelerator.gather_for_metrics(value)
            return found
        found, state = self.gathered(value), self.accelerator.gradient_state
        is_cut = state.end_of_dataloader and state.remainder > 0
        return found[: state.remainder] if is_cut else found

    def deal_batches(self) -> None:
        """Have accelerate's loaders give the ranks of one group the same batches."""
        if self.mesh is not None:
            self.accelerator._prepare_device_mesh = lambda: self.mesh
