"""The nouns of the package: frozen dataclasses that carry tensors and options between layers.

Legend used everywhere: B sequences, T positions, N labelled tokens, H hidden, V vocabulary,
P preference pairs (B = 2P). Log-probabilities are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

MODES = ("auto", "score", "stash", "cache", "pairs", "recompute", "lean")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

# Every per-token statistic that the row kernels make beside the log-probability; `lse` is the only one
# with a gradient by default, `entropy` has one on request.
TOKEN_STATISTICS = ("lse", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
# Those of the k most likely tokens, which no row kernel makes; never differentiable.
TOPK_STATISTICS = ("topk_mass", "topk_entropy")
DEFAULT_TOPK = 10  # arXiv:2410.11677 sec. 4


class HeadAdapter(NamedTuple):
    """LoRA on a head: ``scale * B (A dropout(h))`` is added to its product (arXiv:2106.09685, section 4.1).

    Args:
        lora_a: ``(r, H)``, the weight's dtype or float32.
        lora_b: ``(V, r)``, the dtype of ``lora_a``.
        scale: PEFT's ``scaling``: alpha / r, or alpha / sqrt(r) of rsLoRA; finite.
        dropout: probability in [0, 1) with which an entry of h is dropped on its way into A, in every call.
    """

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True, eq=False)
class VocabShard:
    """Which part of the vocabulary a rank's head has: rows ``start`` to ``start + V_r`` of the whole weight.

    Hidden states and labels are the same on all ranks of the group, as under tensor parallelism; or, with
    ``has_own_rows``, each rank's own, as under data parallelism: the labelled ones then go to all ranks, and
    the gradient of each part is that of the sum of all ranks' losses. The first use of a shard holds those of
    all ranks against each other, in one exchange: keep it from call to call.

    Args:
        start: the first entry of the vocabulary that this rank has.
        vocab_size: of all ranks together.
        group: of the ranks that have parts; None: all ranks.
        has_own_rows: whether the ranks have other hidden states and labels each, in any number. All of them
            call the op, and its backward pass, also a rank that has none.
    """

    start: int
    vocab_size: int
    group: Any = None
    has_own_rows: bool = False
    checked: dict[Any, int] = field(default_factory=dict, init=False, repr=False)


@dataclass(frozen=True, eq=False)
class LMHead:
    """All there is to know of a language-model head.

    The logits of a hidden state h are, in Hugging Face's and TRL's order,
    ``softcap(logit_scale * (weight @ h + bias)) / temperature`` with
    ``softcap(x) = cap * tanh(x / cap)``, the cap only where one is given.

    Args:
        weight: ``(V, H)``, floating point.
        bias: ``(V,)`` in the dtype of ``weight``, or None.
        logit_scale: multiplies the product (Cohere, Granite, Falcon-H1, ...); finite and not zero.
        softcap: positive and finite (Gemma 2), or None for no cap.
        temperature: positive and finite.
        adapter: LoRA on the head, a `HeadAdapter` or ``(A (r, H), B (V, r), scale)``; added to
            ``weight @ h + bias`` before scale and cap. The sum ``weight + scale * B @ A`` is never made.
        vocab_parallel: where the weight is a shard of the vocabulary, `VocabShard`: weight ``(V_r, H)``, bias
            ``(V_r,)``, and ``B`` of LoRA ``(V_r, r)``. The ops then give all ranks what the whole head gives,
            the same bits, and each its own part of the weight's gradient.
    """

    weight: Tensor
    bias: Tensor | None = field(default=None, kw_only=True)
    logit_scale: float = field(default=1.0, kw_only=True)
    softcap: float | None = field(default=None, kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    adapter: HeadAdapter | tuple[Tensor, Tensor, float] | None = field(default=None, kw_only=True)
    vocab_parallel: VocabShard | None = field(default=None, kw_only=True)

    # Filled in by `fastdpo.integrations.lm_head`, the only place that knows model classes.
    _read_model: ClassVar[Callable[[Any], LMHead] | None] = None

    @classmethod
    def from_model(cls, model: Any) -> LMHead:
        """Read the head of a Hugging Face causal language model; see ``integrations.lm_head``."""
        if cls._read_model is None:
            raise RuntimeError("LMHead.from_model needs `import fastdpo.integrations.lm_head`")
        return cls._read_model(model)


@dataclass(frozen=True)
class Execution:
    """How to run the head. Changes no result beyond the stated numerics.

    Args:
        mode: one of ``MODES``; ``auto`` chooses by what needs a gradient.
        backend: one of ``BACKENDS``; ``auto`` chooses, a name never falls back to another.
        logits_dtype: ``None`` or ``"fp32"`` for logits rounded nowhere, ``"bf16"`` to halve their
            traffic (the label's logit and its share of the logsumexp stay exact).
        compute_dtype: dtype of the matrix products' operands; ``None`` is the inputs' dtype, or
            autocast's where autocast is on.
        workspace_mib: bound on the logits scratch, in MiB; on a GPU fp32 sums of D W may take a quarter of it
            beside. Chunks of logits take as much as makes them faster, or as ``lean`` finds use for.
        cache_mib: bound on the logit gradients kept for the backward pass of one call, in MiB.
    """

    mode: str = field(default="auto", kw_only=True)
    backend: str = field(default="auto", kw_only=True)
    logits_dtype: str | None = field(default=None, kw_only=True)
    compute_dtype: torch.dtype | None = field(default=None, kw_only=True)
    workspace_mib: int = field(default=512, kw_only=True)
    cache_mib: int = field(default=1024, kw_only=True)


@dataclass(frozen=True)
class CarriedContext:
    """Run a row through a model's backbone in chunks, carrying keys and values from one to the next.

    Args:
        chunk: tokens whose activations are alive at once.
        device_mib: of keys, values and their gradients, what may lie on the device, in MiB; None for all.
        host_mib: of what is left, what may lie in host memory (pinned, beside a GPU); None for all. The rest
            lies in files that have no name, so that nothing of them outlives the process.
        directory: of these files; None for the system's.

    Raises:
        ValueError: a chunk below 1, or a negative size.
    """

    chunk: int
    device_mib: int | None = None
    host_mib: int | None = None
    directory: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.chunk, bool) or not isinstance(self.chunk, int) or self.chunk < 1:
            raise ValueError(f"chunk: got {self.chunk!r}, wanted a number of tokens from 1 on")
        for name in ("device_mib", "host_mib"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name}: got {value!r}, wanted None, or a number of MiB from 0 on")


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Sequences one after the other without padding: hidden ``(N_all, H)``.

    Args:
        cu_seqlens: ``(B + 1,)`` integers, from 0 to N_all, never decreasing; sequences 0..P-1 are
            chosen, P..2P-1 rejected.
        lengths: the B lengths as Python integers, where the caller has them on the host.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The labelled tokens one by one, for batches whose sequences share rows of hidden (a prompt, say).

    A row may predict several tokens, as the last one of a shared prompt predicts the first token of both
    answers; its gradients add up, in a fixed order.

    Args:
        token_index: ``(N,)`` int64, the row of the flattened hidden states that predicts each token.
        target_ids: ``(N,)`` int64 or int32, the token predicted.
        sequence_ids: ``(N,)`` int64, its sequence: 0..P-1 chosen, P..2P-1 rejected.
        lengths: the number of tokens of each of the 2P sequences, where the caller has them on the host:
            then nothing waits for the device, and a batch whose last sequences are empty is known as such.
    """

    token_index: Tensor
    target_ids: Tensor
    sequence_ids: Tensor
    lengths: tuple[int, ...] | None = None


class LinearLogprobOutput(NamedTuple):
    """Per-token results of ``linear_logprob``, each of the labels' shape; 0 where ignored.

    fp32 (fp64 for fp64 inputs), in nats; ``is_top1`` is bool. What was not asked for is None.
    """

    logps: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    topk_mass: Tensor | None = None
    topk_entropy: Tensor | None = None


class TokenDivergenceOutput(NamedTuple):
    """Per-token results of ``token_divergence``, each of the labels' shape; 0 where ignored.

    fp32 (fp64 for fp64 inputs), in nats. What was not asked for is None.
    """

    forward_kl: Tensor | None = None  # KL(teacher || policy)
    reverse_kl: Tensor | None = None  # KL(policy || teacher)
    jsd: Tensor | None = None  # b KL(teacher || m) + (1 - b) KL(policy || m), m = b teacher + (1 - b) policy
    l1_distance: Tensor | None = None  # of two teachers, sum |p_first - p_second|; not differentiable
    logps: Tensor | None = None  # the label's log-probability under the policy
    ref_logps: Tensor | None = None  # and under the teacher; not differentiable


class TeacherCombination(NamedTuple):
    """A teacher made of two, per token: softmax(a z_first + b z_second).

    a = first + first_slope * d and b = second + second_slope * d, d being the L1 distance of the two
    teachers' distributions at that token. Numbers, or for ``first`` and ``second`` tensors of the labels'
    shape.
    """

    first: float | Tensor
    second: float | Tensor
    first_slope: float = 0.0
    second_slope: float = 0.0


class DPOLossOutput(NamedTuple):
    """What ``fused_dpo_loss`` returns; all but ``loss`` is detached. Shapes ``()`` and ``(P,)``."""

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | None
    ref_rejected_logps: Tensor | None
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    metrics: dict[str, Tensor]


class PreferenceLossOutput(NamedTuple):
    """What ``fused_preference_loss`` returns; all but ``loss`` is detached.

    A row is what the losses compare or judge: an answer, a candidate, an item or a step.
    """

    loss: Tensor  # ()
    logps: Tensor  # (rows,) sums; of losses that look at tokens, (B,) sums
    ref_logps: Tensor | None
    rewards: Tensor | None  # (rows,) beta times the log-ratio, of lists, unpaired answers and pairs
    metrics: dict[str, Tensor]
