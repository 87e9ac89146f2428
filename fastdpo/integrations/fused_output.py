"""What a patched model returns, and how it is made of hidden states, the head and the labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from fastdpo.functional.kinds import takes_pairs
from fastdpo.functional.pairs import fused_dpo_loss
from fastdpo.functional.preference import fused_preference_loss
from fastdpo.functional.tokens import next_token
from fastdpo.ops.checks import check_outputs, fail
from fastdpo.ops.linear_logprob import flat_rows, linear_logprob
from fastdpo.ops.token_divergence import token_divergence
from fastdpo.types import (
    TOPK_STATISTICS,
    DPOLossOutput,
    Execution,
    LMHead,
    PreferenceLossOutput,
    TeacherCombination,
    TokenLayout,
)


@dataclass
class FusedLMOutput(ModelOutput):
    """What a patched model returns for ``return_logps=True``: ``(B, T)`` tensors aligned with ``labels``.

    Entry [b, t] belongs to ``labels[b, t]`` given the tokens before t. At t = 0 and where the label is
    ignored all are 0 (False). With a ``token_layout`` they are ``(N,)``, in its order. In nats; float32, or
    float64 for float64 operands. For ``pair_loss``, the loss of the batch instead of them.

    Args:
        loss: ``()``, of the batch, differentiable; None without ``pair_loss``, like the next.
        pair_loss: what ``fused_dpo_loss`` returned, or of losses of another kind ``fused_preference_loss``;
            ``loss`` included.
        logps: log-probabilities of the labels, differentiable; None with ``pair_loss``.
        logps_mask: bool, True where a label was scored; None with a ``token_layout``.
        lse: logsumexp of the logits, differentiable. Like those up to ``jsd``, None unless in
            ``logps_outputs``.
        entropy: of the distribution over the vocabulary, in nats.
        log_sum_sq_probs: log of the sum of the squared probabilities.
        mean_logit: mean of the logits over the vocabulary.
        is_top1: bool, whether the label has the largest logit.
        topk_mass, topk_entropy: of the ``logps_topk`` most likely tokens, not renormalised.
        forward_kl, reverse_kl, jsd: KL(reference || policy), KL(policy || reference), their Jensen-Shannon
            divergence; differentiable in the policy.
        l1_distance: of a reference made of two models, sum_v |p_first(v) - p_second(v)|.
        ref_logps: log-probabilities of the labels under the ``reference``, where one is given.
        aux_loss: load-balancing loss of a mixture of experts, where its router logits are asked for.
        cache, hidden_states, attentions, router_logits: as the backbone returned them; ``past_key_values``
            is the cache's name before transformers 5.24.
    """

    loss: Tensor | None = None
    pair_loss: DPOLossOutput | PreferenceLossOutput | None = None
    logps: Tensor | None = None
    logps_mask: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    topk_mass: Tensor | None = None
    topk_entropy: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    jsd: Tensor | None = None
    l1_distance: Tensor | None = None
    ref_logps: Tensor | None = None
    aux_loss: Tensor | None = None
    cache: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None

    @property
    def past_key_values(self) -> Any:
        return self.cache


@dataclass(frozen=True, eq=False)
class HeadStates:
    """What a patched model returns for ``return_states=True``: what its head sees, and the head.

    All that a divergence from the model needs; no logits have been made.

    Args:
        hidden: ``(B, T, H)``; with ``row_batches`` or ``token_layout`` ``(M, H)``, all positions one after
            the other; of carried contexts with ``token_layout`` those that predict one of its tokens alone.
        lm_head: its weights are the model's own.
    """

    hidden: Tensor
    lm_head: LMHead


@dataclass(frozen=True, eq=False)
class Teachers:
    """What divergences are measured from where it is not simply one model, and how.

    Args:
        first, second: of two models that make one, which ``combination`` says how; or of one.
        combination: tensors in it have the shape of the labels given, and are aligned with them.
        vocab_size: of all models, where their heads are padded to different sizes.
        logps_requires_grad: whether ``logps`` are differentiable beside the divergence, which costs as much
            again as what is kept for it.
        jsd_beta: of the ``jsd``, where that is asked for; None: 0.5.
    """

    first: HeadStates
    second: HeadStates | None = None
    combination: TeacherCombination | None = None
    vocab_size: int | None = None
    logps_requires_grad: bool = True
    jsd_beta: float | None = None

    def arguments(self, device: torch.device, *, is_flat: bool) -> dict[str, Any]:
        """Of ``token_divergence``; the positions flat where labels name rows of them."""

        def states(of: HeadStates) -> Tensor:
            hidden = of.hidden.to(device)
            return flat_rows(hidden) if is_flat else hidden

        given: dict[str, Any] = {"ref_hidden": states(self.first), "ref_lm_head": self.first.lm_head}
        if self.second is not None:
            given |= {"second_hidden": states(self.second), "second_lm_head": self.second.lm_head}
        given["combination"] = self.combination if is_flat else self._from_where_predicted()
        names = ("vocab_size", "logps_requires_grad", "jsd_beta")
        return given | {name: getattr(self, name) for name in names}

    def _from_where_predicted(self) -> TeacherCombination | None:
        """``combination`` for labels that have been shifted: a token's coefficients where it is predicted."""
        if self.combination is None:
            return None
        per_token: dict[str, Any] = {
            name: next_token(value, 0, None)
            for name, value in self.combination._asdict().items()
            if isinstance(value, Tensor) and value.dim()
        }
        return self.combination._replace(**per_token)


def require_states(output: Any) -> HeadStates:
    """``output`` if a patched model made it for ``return_states=True``. Raises TypeError otherwise."""
    if isinstance(output, HeadStates):
        return output
    raise TypeError(
        f"output: got {type(output).__name__}, wanted HeadStates: the model is not patched "
        "(fastdpo.patch_model), or something replaced its forward after patching"
    )


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """What a call asks of the head, checked before the backbone runs.

    Args:
        outputs: ``logps_outputs``: statistics of ``linear_logprob``, or with a reference divergences of
            ``token_divergence``.
        topk: ``logps_topk``.
        reference: what divergences are measured from: a model, or `Teachers`; or a ``MappingProxyType`` of
            these as ``teachers``, whose tensors FSDP's mixed precision does not round.
        pair_loss: arguments of ``fused_dpo_loss`` or ``fused_preference_loss``, whichever ``loss_type`` is
            of, to be asked for the loss instead.
    """

    outputs: tuple[str, ...] = ()
    topk: int | None = None
    reference: HeadStates | Teachers | Mapping[str, Any] | None = None
    pair_loss: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.pair_loss is not None:
            self._check_pair_loss(self.pair_loss)
        if isinstance(self.reference, MappingProxyType):
            object.__setattr__(self, "reference", self.reference.get("teachers"))
        if self.reference is None:
            object.__setattr__(self, "outputs", check_outputs(self.outputs, False, has_topk=True))
        elif not isinstance(self.reference, HeadStates | Teachers):
            raise TypeError(f"reference: got {type(self.reference).__name__}, wanted HeadStates or Teachers")
        elif self.topk is not None:
            raise fail("logps_topk", repr(self.topk), "None with a reference, beside which there are none")

    def of_positions(self, token_index: Tensor, num_positions: int) -> ScoreRequest:
        """This request where there are states of labelled positions alone: whole references become as theirs.

        Args:
            token_index: of the layout that was asked for, over all positions.
        """

        def taken(hidden: Tensor) -> Tensor:
            rows = flat_rows(hidden)
            if len(rows) != num_positions:
                return rows
            return rows[token_index.unique().to(rows.device, torch.int64)]

        def of_model(states: HeadStates) -> HeadStates:
            return replace(states, hidden=taken(states.hidden))

        found: Any = self.reference
        if isinstance(found, Teachers):
            second = None if found.second is None else of_model(found.second)
            found = replace(found, first=of_model(found.first), second=second)
        if isinstance(found, HeadStates):
            found = of_model(found)
        given = self.pair_loss or {}
        states = {
            name: taken(given[name])
            for name in ("ref_hidden", "teacher_hidden")
            if isinstance(given.get(name), Tensor)
        }
        pair_loss = MappingProxyType({**given, **states}) if states else self.pair_loss
        return replace(self, reference=found, pair_loss=pair_loss)

    def settled_split(self, choice: str, execution: Execution) -> str:
        """``split_head`` for this request: what no part of a head gives settles the choice."""
        wants_more = self.reference is not None or any(name in TOPK_STATISTICS for name in self.outputs)
        wants_more = wants_more or "ref_hidden" in (self.pair_loss or ()) or execution.mode == "pairs"
        return "weight" if choice == "auto" and wants_more else choice

    def _check_pair_loss(self, arguments: Mapping[str, Any]) -> None:
        given = {"logps_outputs": self.outputs or None, "logps_topk": self.topk, "reference": self.reference}
        for name, value in given.items():
            if value is not None:
                raise fail(name, "a value together with pair_loss", "one of the two")
        if settled := {"layout", "shift", "ignore_index", "execution"} & arguments.keys():
            raise fail("pair_loss", sorted(settled), "what the patched model does not settle itself")
        takes_pairs(arguments.get("loss_type", "sigmoid"))  # refuses a name that is none

    def make_loss(
        self,
        hidden: Tensor,
        head: LMHead,
        labels: Tensor | TokenLayout,
        *,
        shift: bool = True,
        ignore_index: int,
        execution: Execution,
    ) -> dict[str, Any]:
        """The loss, made where hidden states and head are at hand; labels are not shifted yet, or are."""
        asked: Mapping[str, Any] = self.pair_loss or {}
        layout = labels if isinstance(labels, TokenLayout) else None
        fused: Any = (
            fused_dpo_loss if takes_pairs(asked.get("loss_type", "sigmoid")) else fused_preference_loss
        )
        out = fused(
            hidden,
            head,
            labels if isinstance(labels, Tensor) else None,
            layout=layout,
            shift=shift,
            ignore_index=ignore_index,
            execution=execution,
            **asked,
        )
        return {"loss": out.loss, "pair_loss": out}

    def run(
        self,
        hidden: Tensor,
        head: LMHead,
        labels: Tensor | TokenLayout,
        *,
        ignore_index: int,
        execution: Execution,
    ) -> dict[str, Tensor]:
        """Per-token results in the labels' shape, under the names of `FusedLMOutput`."""
        settings: dict[str, Any] = {"ignore_index": ignore_index, "execution": execution}
        scored: Any
        if self.reference is None:
            scored = linear_logprob(hidden, head, labels, outputs=self.outputs, topk=self.topk, **settings)
        else:
            found: Any = self.reference
            teachers = found if isinstance(found, Teachers) else Teachers(found)
            scored = token_divergence(
                hidden,
                head,
                labels=labels,
                outputs=(*self.outputs, "logps", "ref_logps"),
                **teachers.arguments(hidden.device, is_flat=isinstance(labels, TokenLayout)),
                **settings,
            )
        return {name: value for name, value in scored._asdict().items() if value is not None}
