"""What moves between ranks for a head whose weight they share: the weight to the tokens, or the tokens to it.

Ranks have different tokens and each a part of the vocabulary, as under FSDP2. Gathered, the weight moves once
for the forward pass, once for the backward pass, and its gradient once. Left where it is, the labelled hidden
states of all ranks move to each, and their gradients back, with a few numbers a token.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadTraffic:
    """Bytes that each rank receives for one forward and backward pass of its head.

    Args:
        weight_bytes: where the weight is gathered and its gradient reduced.
        states_bytes: where the labelled hidden states of all ranks are exchanged.
    """

    num_tokens: int
    num_ranks: int
    weight_bytes: int
    states_bytes: int

    @property
    def choice(self) -> str:
        """``"states"`` where that is less, else ``"weight"``."""
        return "states" if self.states_bytes < self.weight_bytes else "weight"

    def __str__(self) -> str:
        ranks, tokens = self.num_ranks, self.num_tokens
        weight, states = (size / 2**20 for size in (self.weight_bytes, self.states_bytes))
        ratio = max(weight, states) / max(min(weight, states), 2**-20)
        return (
            f"traffic      {ranks} ranks of up to {tokens} labelled tokens: {weight:.1f} MiB a rank with the "
            f"weight gathered, {states:.1f} MiB with the hidden states exchanged; "
            f"split_head='auto' moves the {self.choice} ({ratio:.1f} times less)"
        )


def head_traffic(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    num_ranks: int,
    *,
    weight_bytes: int = 2,
    states_bytes: int = 2,
    grad_bytes: int | None = None,
    needs_hidden: bool = True,
    needs_weight: bool = True,
) -> HeadTraffic:
    """The traffic of a head in a unit of FSDP2's of its own, one pass forward and one backward.

    Args:
        num_tokens: labelled ones, of the rank that has the most: shorter parts are padded.
        weight_bytes, states_bytes, grad_bytes: of an element of the gathered weight, of the hidden states and
            of the reduced gradient; ``grad_bytes=None``: as of the weight.
        needs_hidden, needs_weight: what has a gradient. Without any there is no backward pass.
    """
    others = num_ranks - 1
    part = -(-vocab_size // num_ranks) * hidden_size
    has_backward = needs_hidden or needs_weight
    grad_bytes = weight_bytes if grad_bytes is None else grad_bytes
    weight = others * part * ((1 + has_backward) * weight_bytes + needs_weight * grad_bytes)
    # Label and place; of every part lse, the label's logit and whose it is, in fp32; back, logp's gradient.
    numbers = 2 * 8 + num_ranks * 3 * 4 + has_backward * 4
    states = others * num_tokens * ((1 + needs_hidden) * hidden_size * states_bytes + numbers)
    return HeadTraffic(num_tokens, num_ranks, weight, states)
