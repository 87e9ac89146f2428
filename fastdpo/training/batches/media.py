"""What a model gets of images beside the tokens of its sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.integrations.processor import joined_inputs


@dataclass(frozen=True, eq=False)
class Media:
    """The images of S sequences, as the model takes them.

    Args:
        inputs: by name, sequence after sequence in dimension 0.
        sizes: of each, how many entries of dimension 0 each sequence has.
        per_token: by name, ``(S, T)``.
        num_sequences: S.
    """

    inputs: Mapping[str, Tensor]
    sizes: Mapping[str, tuple[int, ...]]
    per_token: Mapping[str, Tensor]
    num_sequences: int

    def pick(self, sequences: Sequence[int]) -> Media:
        """Of some of the sequences."""
        inputs, sizes = {}, {}
        for name, tensor in self.inputs.items():
            parts = tensor.split(list(self.sizes[name]))
            sizes[name] = tuple(self.sizes[name][k] for k in sequences)
            if sum(sizes[name]):
                inputs[name] = torch.cat([parts[k] for k in sequences])
        sizes = {name: sizes[name] for name in inputs}
        per_token = {name: tensor[list(sequences)] for name, tensor in self.per_token.items()}
        return Media(inputs, sizes, per_token, len(sequences))

    def joined(self, other: Media, width: int) -> Media:
        """With further sequences' behind them, in rows of ``width`` tokens."""
        inputs = joined_inputs([self.inputs, other.inputs])
        sizes = {
            name: tuple(
                size for media in (self, other) for size in media.sizes.get(name, (0,) * media.num_sequences)
            )
            for name in inputs
        }
        per_token = {
            name: torch.cat([F.pad(x, (0, width - x.shape[1])) for x in (tensor, other.per_token[name])])
            for name, tensor in self.per_token.items()
        }
        return Media(inputs, sizes, per_token, self.num_sequences + other.num_sequences)
