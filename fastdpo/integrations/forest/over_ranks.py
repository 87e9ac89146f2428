"""Attention over a row whose tokens are split over ranks: DeepSpeed's Ulysses around that over forests.

Each rank has some of the tokens, one part behind the other, and all heads; one exchange gives it all tokens
of some heads, for which attention is what it is on one rank, and one more gives it its tokens back (Jacobs et
al., arXiv:2309.14509).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.integrations.forest.attention import Attention
from fastdpo.integrations.forest.backends import attend
from fastdpo.integrations.forest.segments import Forest


class OverRanks(Attention):
    """Attention in a call on this rank's part of R rows of one form.

    Args:
        forest: of each whole row.
        group: the ranks that have the rows' parts, in order and of one size.
    """

    def __init__(self, forest: Forest, group: Any) -> None:
        self._pieces, self._group = forest.pieces(), group
        self._exchanges: dict[tuple[int, ...], Any] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        """``(R, n, heads, d)`` of ``(R, heads, n, d)``, the n tokens of this rank.

        Raises:
            ValueError: heads that the ranks cannot share, or attention sinks, which are a head's own.
        """
        if options.pop("s_aux", None) is not None or key.shape != value.shape:
            raise ValueError(
                "sp_size: got a model with attention sinks, or with values of another size than keys, whose "
                "heads DeepSpeed does not exchange; wanted 1"
            )
        shape = (query.shape[0], query.shape[1], query.shape[3], key.shape[1])
        if shape not in self._exchanges:
            self._exchanges[shape] = self._exchange(*shape)
        # Its own check of positions is for masks by positions; the forest says who sees whom.
        options["position_ids"] = torch.zeros(1, 1, dtype=torch.int64, device=query.device)
        made, _ = self._exchanges[shape](nn.Module(), query, key, value, None, *args, **options)
        found: Tensor = made.view(*made.shape[:2], query.shape[1], -1)
        return found

    def _exchange(self, rows: int, heads: int, size: int, key_heads: int) -> Any:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        return UlyssesSPAttentionHF(
            attn=self._attend_whole,
            batch_size=rows,
            attn_head_count=heads,
            attn_head_size=size,
            kv_head_count=key_heads,
            num_hidden_layers=1,
            process_group=self._group,
            seq_length_is_variable=True,
        )

    def _attend_whole(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, *args: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Whole rows, some heads."""
        rows = zip(query.split(1), key.split(1), value.split(1), strict=True)
        return torch.cat([attend(*row, self._pieces, *args, **options) for row in rows]), None
