"""Mode ``pairs`` over a vocabulary that is split over ranks: one all-gather for each group of rows.

An op takes no process group but its name, by which torch finds it. Ranks plan their groups by the largest
part, so all have the same ones, and meet as often; chunks, which are nobody else's business, are each rank's.
"""

from __future__ import annotations

from ast import literal_eval

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from fastdpo.kernels.contract import RowOutputs
from fastdpo.ops.grouped_chunks import Join
from fastdpo.ops.head_call import TopkOutputs
from fastdpo.ops.shard_check import largest_part
from fastdpo.ops.vocab_parallel import own_columns, whole_results
from fastdpo.types import LinearLogprobOutput, LMHead, VocabShard


def carried_shard(head: LMHead) -> str:
    """What an op is told of a part of the vocabulary."""
    shard = head.vocab_parallel
    assert isinstance(shard, VocabShard)
    group = dist.group.WORLD if shard.group is None else shard.group
    assert group is not None
    return repr((group.group_name, shard.vocab_size, largest_part(head)))


def restored_shard(carried: str, size: int) -> tuple[int, Join | None]:
    """Of a part of ``size`` rows: rows of the largest, and how results become whole; no part: 0 and None."""
    if not carried:
        return 0, None
    name, vocab_size, largest = literal_eval(carried)

    def join(
        outputs: RowOutputs, ref_outputs: RowOutputs | None, topk: TopkOutputs | None, own: Tensor
    ) -> dict[str, Tensor]:
        found = LinearLogprobOutput(**outputs._asdict(), topk_mass=None if topk is None else topk.mass)
        columns = own_columns(found, own, size)
        if ref_outputs is not None:
            columns["ref_lse"] = ref_outputs.lse
            columns["ref_label"] = torch.where(own >= 0, ref_outputs.logps + ref_outputs.lse, 0)
        return whole_results(columns, _resolve_process_group(name), vocab_size)

    return largest, join
