"""The contract of the sequence kernel: per-token log-probabilities to sums per sequence, and to the DPO loss.

N labelled tokens lie sequence after sequence: sequence s has the tokens ``offsets[s]`` to
``offsets[s + 1] - 1``, and may have none. With a weight w_t for each token (1 without weights), and over the
tokens that the mask lets count (all without a mask),

    sums[s] = sum_t w_t value_t

``sigmoid_pairs`` takes 2P sequences in *pair order*, pair p's chosen answer at 2p and its rejected one at
2p + 1, and goes on in the same launch (arXiv:2305.18290 eq. 7, with a preference q and a margin psi):

    h_p  = beta_p ((sums[2p] - ref[2p]) - (sums[2p + 1] - ref[2p + 1])) - psi_p
    L_p  = w_p (q_p softplus(-h_p) + (1 - q_p) softplus(h_p))
    loss = sum_p L_p / divisor
    g_t  = d loss / d value_t = +-w_t w_p beta_p ((1 - q_p) sigmoid(h_p) - q_p sigmoid(-h_p)) / divisor

with softplus(x) = log(1 + e^x), ref = 0 without a reference, + for the chosen answer's tokens, - for the
rejected one's, and g = 0 for tokens that do not count.

Rules that hold for every backend:

* Sums are taken in fp64 and rounded once. A sequence's sum has the same bits wherever it lies, whatever lies
  beside it, and in both functions. There are no atomics on values: the same call gives the same bits.
* The loss is that of the rounded sums, which the caller sees: equal to a reference's, they give exactly 0.
  Everything from there on is in fp64, and g rounded once.
* A value or weight that does not count may be NaN and changes nothing. One that counts spoils its pair's g
  and the loss, and no other pair.
* A pair none of whose tokens count is padding: it adds 0 to the loss, whatever its numbers are. Where q_p is
  0 or 1 the other term is left out, even where it is infinite.
* Offsets are not validated, which would synchronise: wrong ones give wrong numbers, but no memory outside the
  tensors is touched.
* Tokens are addressed with 64-bit offsets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class SigmoidTerms:
    """What the sigmoid loss is told beside the tokens.

    Each of the first four is one number, or a contiguous ``(P,)`` tensor; ``divisor`` is a number or a 0-d
    tensor. Tensors are in the dtype of the values and on their device.
    """

    beta: float | Tensor
    margin: float | Tensor = 0.0
    preferred: float | Tensor = 1.0  # q in [0, 1]: the probability that the chosen answer is the better one
    pair_weights: float | Tensor = 1.0
    divisor: float | Tensor = 1.0
    ref_sums: Tensor | None = None  # (2P,) contiguous, in pair order


class SigmoidOutputs(NamedTuple):
    """What ``sigmoid_pairs`` writes, contiguous; in the dtype of the values but for the loss."""

    sums: Tensor  # (2P,)
    loss: Tensor  # (), fp64: the losses of parts of a batch add up to that of the whole
    g: Tensor  # (N,)


class SequenceKernels(Protocol):
    """Both functions of a backend; see the module's docstring for the maths and the rules."""

    # Every backend takes fp32 values; `reference` any floating dtype.

    def sequence_sums(
        self,
        values: Tensor,  # (N,) contiguous
        offsets: Tensor,  # (S + 1,) int64, contiguous, rising from 0 to N
        out: Tensor,  # (S,) contiguous, in the dtype of the values
        *,
        weights: Tensor | None = None,  # (N,) contiguous, in the dtype of the values
        mask: Tensor | None = None,  # (N,) bool, contiguous
    ) -> None: ...

    def sigmoid_pairs(
        self,
        values: Tensor,  # (N,) contiguous
        offsets: Tensor,  # (2P + 1,) int64, contiguous, rising from 0 to N
        terms: SigmoidTerms,
        outputs: SigmoidOutputs,
        *,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None: ...
