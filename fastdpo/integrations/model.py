"""``patch_model``: a Hugging Face causal LM that makes no logits where a training step only asks of them.

The model's class is replaced by a dynamic subclass of the same name, module and ``forward`` signature, so
that whatever looks at the class (deepcopy, pickle, ``save_pretrained``, ``generate``, `Trainer`,
accelerate's wrapping and unwrapping) finds what it found before. Nothing is stored on the instance: a copy
of a patched model is a patched model with its own weights. ``model(..., return_logps=True)`` takes another
path; an ordinary call is the original's, in a training step around a head whose logits are not there until
somebody looks (`lazy_call.py`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.integrations.backbone_call import (
    all_positions,
    aux_loss_of_calls,
    backbone_calls,
    passed_through,
    run_backbone,
)
from fastdpo.integrations.engines import engine_around
from fastdpo.integrations.forest.attention import restore_attention
from fastdpo.integrations.fused_output import FusedLMOutput as FusedLMOutput
from fastdpo.integrations.fused_output import HeadStates, ScoreRequest, Teachers
from fastdpo.integrations.lazy_call import (
    LOGITS,
    ON_MATERIALIZE,
    call_lazily,
    check_choice,
    check_head,
    wants_lazy,
)
from fastdpo.integrations.lm_head import (
    ModelTail,
    call_head,
    current_head,
    examine,
    unwrap,
    wrappers_and_model,
)
from fastdpo.integrations.moved_states import SPLIT_HEAD
from fastdpo.integrations.partitioned import is_partitioned
from fastdpo.integrations.patched_class import exchange_class, make_subclass, own_forward, restore_class
from fastdpo.integrations.probe import refuse
from fastdpo.integrations.virtual_tokens import has_virtual_tokens, is_patched_wrapper, patched_wrapper
from fastdpo.ops.checks import check_execution, fail
from fastdpo.types import Execution, LMHead, TokenLayout


@dataclass(frozen=True)
class _Hook:
    """What a patched class knows besides its original: all of it immutable and picklable."""

    tail: ModelTail
    execution: Execution
    ignore_index: int
    logits: str = "auto"
    on_materialize: str = "warn"
    split_head: str = "auto"

    @property
    def settings(self) -> dict[str, Any]:
        return {"ignore_index": self.ignore_index, "execution": self.execution}


def patch_model(
    model: nn.Module,
    *,
    execution: Execution | None = None,
    ignore_index: int = -100,
    logits: str = "auto",
    on_materialize: str = "warn",
    split_head: str = "auto",
) -> nn.Module:
    """Make no logits where a training step only asks of them; a loop's code stays as it is.

    ``model(...).logits`` of an ordinary call is a tensor that is not there: a loop's or trainer's own
    log-softmax, gather, mask and loss run in the fused op, on the rows that count; see docs/lazy.md. With
    ``logits="real"`` an ordinary call is the unpatched model's, to the bit.

    ``model(input_ids=..., labels=labels, return_logps=True)`` returns log-probabilities, not logits. A
    patched model takes, beside its own arguments, ``return_logps`` and ``logps_outputs``, the names of
    further statistics (``lse``, ``entropy``, ``log_sum_sq_probs``, ``mean_logit``, ``is_top1``,
    ``topk_mass``, ``topk_entropy``; ``logps_topk`` is the k of the last two), and returns a
    `FusedLMOutput`. Labels are as Hugging Face has them: ``(B, T)``, aligned with ``input_ids``; in packed
    rows the first token of every sequence must be ignored. The rest reaches the backbone unchanged, except
    that ``use_cache`` is False unless given: nothing will be generated from a scored sequence.

    ``shift_labels`` take the place of ``labels`` where these have been shifted already, as for sequences that
    are split over ranks; results are then aligned with them: entry [b, t] belongs to ``shift_labels[b, t]``.

    Instead of labels, ``token_layout`` (a `TokenLayout`) names the rows of the flattened hidden states and
    the tokens they predict; the results are then ``(N,)``. With it, ``row_batches`` may stand in for the
    inputs: a list of their dicts (``input_ids``, ``position_ids``, ``attention_mask`` ...), for each of which
    the backbone runs once; the layout counts the positions of all of them, one after the other.

    With ``return_states=True`` in place of ``return_logps`` and of labels a patched model returns
    `HeadStates`; with ``token_layout`` those of its tokens alone where contexts are carried. States of
    another model, or of this one without its adapter, given as ``reference`` to a call with ``return_logps``
    let ``logps_outputs`` name divergences from it, ``forward_kl``, ``reverse_kl`` or ``jsd`` (at least one,
    and no statistics); ``ref_logps`` come with them. `Teachers` as ``reference`` make one teacher of two such
    models, whose ``l1_distance`` may be named too. See ``token_divergence``.

    ``pair_loss``, a dict of arguments of `fused_dpo_loss` (``loss_type``, ``beta``, ``ref_logps`` ...), asks
    for the loss of a batch of pairs, chosen answers first, in place of log-probabilities. Where ``loss_type``
    names losses of another kind (``kto``, ``sdpo`` ...) they are arguments of `fused_preference_loss`
    (``is_desirable``, ``group_ids``, ``row_weights`` ...), and rows are answers, lists or steps. The head may
    then run in mode ``pairs``, which it cannot where the loss is made of what the model returned.

    Patch before ``accelerator.prepare``; before or after DDP, FSDP2, FSDP1, DeepSpeed, torch.compile and
    PEFT; then call the wrapped model. A head that an engine shards is gathered, and its gradient reduced, by
    the engine: the op runs in the head's own call. Under FSDP's 16-bit mixed precision ``pair_loss`` is a
    `types.MappingProxyType`, as the tensors of a dict would be cast, and the policy's ``output_dtype`` is
    None or float32.

    Adapters of the backbone are part of it; of what PEFT does to a head, ``modules_to_save`` and LoRA are
    supported. Of a model with PEFT's virtual tokens (prompt, prefix and P-tuning) the results are of the
    caller's own tokens, the first of which is not scored here either; patch it after they were added, or
    again.

    Args:
        model: a causal language model of transformers, or a PEFT, DDP or compiled wrapper around one.
        execution: how to run the head; see `Execution`.
        ignore_index: the label of tokens that are not scored.
        logits: of ordinary calls. ``"auto"``: lazy where gradients are recorded, labels are given or the
            model is in training mode; real under FSDP1, with a warning. ``"lazy"``: the same, but FSDP1 is
            refused. ``"always_lazy"``: without gradients too, as for a
            reference under ``torch.no_grad()``. ``"real"``: never lazy. Calls with a cache or for the next
            token alone (``logits_to_keep=1``) have real logits in any case.
        on_materialize: of an operation that needs the real values of lazy logits: ``"warn"``, once a line, or
            ``"error"``.
        split_head: of a head in a unit of FSDP2's of its own, with ``return_logps=True``. ``"weight"``: it is
            gathered, and its gradient reduced, by FSDP2. ``"states"``: the labelled hidden states of all
            ranks go to all, and each rank keeps its part of the weight; without mode ``pairs``, and refused
            where the head is in another unit or carries LoRA. ``"auto"``: what moves fewer bytes
            (`explain_plan` with ``num_ranks`` prints them). Lazy logits gather the weight.

    Returns:
        ``model`` itself. Patching again with the same options changes nothing.

    Raises:
        ValueError: the model's forward is not understood (the message says what), it is patched with other
            options, or it is wrapped so that a patch would not be reached.
        TypeError: ``model`` is no module, or an option is of the wrong type.

    Example:
        >>> model = patch_model(AutoModelForCausalLM.from_pretrained(path))
        >>> out = model(input_ids=ids, attention_mask=mask, labels=labels, return_logps=True)
        >>> sequence_logps = out.logps.sum(-1)
    """
    run = check_execution(execution)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {ignore_index!r}, wanted an int")
    check_choice("logits", logits, LOGITS)
    check_choice("on_materialize", on_materialize, ON_MATERIALIZE)
    check_choice("split_head", split_head, SPLIT_HEAD)
    if split_head == "states" and logits != "real":
        raise fail("split_head", f"'states' with logits={logits!r}, which gather the weight", "logits='real'")
    choices = (logits, on_materialize, split_head)
    *around, inner = wrappers_and_model(model)
    unpatched = [w for w in around if has_virtual_tokens(w) and not is_patched_wrapper(w)]
    for wrapper in unpatched:
        own_forward(wrapper)  # refuses before anything is changed
    if is_patched(inner):
        hook = type(inner)._fastdpo_hook
        if hook != _Hook(hook.tail, run, ignore_index, *choices):
            raise ValueError("model: got one patched with other options, wanted unpatch_model(model) first")
    else:
        own_forward(inner)
        original: Any = type(inner)
        hook = _Hook(examine(inner), run, ignore_index, *choices)
        if logits in ("lazy", "always_lazy"):
            check_head(inner)
        exchange_class(inner, _patched_class(original, hook))
    for wrapper in unpatched:
        kind: Any = type(wrapper)
        exchange_class(wrapper, patched_wrapper(kind))
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Give a patched model its original class back; a model that is not patched is left as it is.

    Raises:
        ValueError: something wrapped the patched forward; the message says what to undo first.
    """
    *around, inner = wrappers_and_model(model)
    if not is_patched(inner):
        return model
    patched = [inner, *(wrapper for wrapper in around if is_patched_wrapper(wrapper))]
    for each in patched:
        if not vars(type(each)).keys() & {"_fastdpo_hook", "_fastdpo_counts_virtual_tokens"}:
            raise ValueError(
                f"model: got a {type(each).__name__} made from a patched class, wanted the patched model"
            )
        own_forward(each)  # refuses before anything is changed
    restore_attention(inner)
    for each in patched:
        restore_class(each)
    return model


def ensure_patched(model: nn.Module, execution: Execution) -> nn.Module:
    """Patch a model for log-probabilities alone; one that is patched keeps its kind of logits.

    Raises:
        ValueError, TypeError: as `patch_model`.
    """
    hook = getattr(type(unwrap(model)), "_fastdpo_hook", None)
    kept = {} if hook is None else {"on_materialize": hook.on_materialize, "split_head": hook.split_head}
    return patch_model(model, execution=execution, logits="real" if hook is None else hook.logits, **kept)


def is_patched(model: nn.Module) -> bool:
    """Whether a model, wrapped or not, was patched by `patch_model`."""
    return hasattr(type(unwrap(model)), "_fastdpo_hook")


def require_fused_output(output: Any) -> FusedLMOutput:
    """``output`` if a patched model made it.

    An unpatched model with ``**kwargs`` in its forward accepts ``return_logps=True`` silently and returns
    logits; whoever relies on log-probabilities has to look.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(output, FusedLMOutput):
        return output
    raise TypeError(
        f"output: got {type(output).__name__}, wanted FusedLMOutput. The model ignored return_logps=True: "
        "it is not patched (fastdpo.patch_model), or something replaced its forward after patching"
    )


@functools.cache
def _patched_class(original: Any, hook: _Hook) -> Any:
    """One class per original and hook, shared by all copies of a model."""
    names = tuple(inspect.signature(original.forward).parameters)[1:]

    def forward(
        self: Any,
        *args: Any,
        return_logps: bool = False,
        return_states: bool = False,
        logps_outputs: Sequence[str] = (),
        logps_topk: int | None = None,
        reference: HeadStates | Teachers | Mapping[str, Any] | None = None,
        pair_loss: Mapping[str, Any] | None = None,
        token_layout: TokenLayout | None = None,
        row_batches: Sequence[Mapping[str, Any]] | None = None,
        num_virtual_tokens: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if "cache" in names and "cache" not in kwargs and "past_key_values" in kwargs:
            # PEFT's prefix tuning has the name of transformers before 5.24, which warns of it.
            kwargs["cache"] = kwargs.pop("past_key_values")
        if not return_logps:
            given: dict[str, Any] = {"logps_outputs": logps_outputs or None, "logps_topk": logps_topk}
            given |= {"reference": reference, "pair_loss": pair_loss}
            if not return_states:
                given |= {"token_layout": token_layout, "row_batches": row_batches}
                given |= {"num_virtual_tokens": num_virtual_tokens}
            for name, value in given.items():
                if value is not None:
                    raise fail(name, "a value", "return_logps=True with it")
            if not return_states:
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                if not wants_lazy(hook.logits, given, is_training=self.training):
                    return original.forward(self, *args, **kwargs)
                own = functools.partial(original.forward, self, *args, **kwargs)
                how = (hook.execution, hook.logits, hook.on_materialize)
                return call_lazily(self, *how, own)
        elif return_states:
            raise fail("return_states", "True with return_logps", "one of the two")
        if repeated := set(names[: len(args)]) & kwargs.keys():
            raise TypeError(f"forward() got multiple values for {sorted(repeated)}")
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        num_virtual = num_virtual_tokens or 0
        if return_states:
            return _head_states(self, hook, arguments, token_layout, row_batches, num_virtual)
        request = ScoreRequest(logps_outputs, logps_topk, reference, pair_loss)  # type: ignore[arg-type]
        if token_layout is None and row_batches is None:
            return _fused_forward(self, hook, arguments, request, num_virtual)
        if arguments.get("inputs_embeds") is not None and num_virtual_tokens is None:
            raise fail(
                "inputs_embeds",
                "a value together with token_layout",
                "num_virtual_tokens with them, the number in front that token_layout does not count (PEFT's "
                "prompt tuning adds some: patch_model(model) after it was added counts them)",
            )
        return _layout_forward(self, hook, arguments, request, token_layout, row_batches, num_virtual)

    return make_subclass(original, forward, (_rebuild, original, hook), _fastdpo_hook=hook)


def _rebuild(original: Any, hook: _Hook) -> Any:
    """An empty patched model, for copy and pickle to fill."""
    patched = _patched_class(original, hook)
    return patched.__new__(patched)


def _fused_forward(
    model: Any, hook: _Hook, arguments: dict[str, Any], request: ScoreRequest, num_virtual: int
) -> FusedLMOutput:
    # As transformers has it: in the place of labels, aligned with the states already.
    shifted = arguments.pop("shift_labels", None)
    labels = arguments.get("labels") if shifted is None else shifted
    if not isinstance(labels, Tensor):
        raise fail("labels", type(labels).__name__, "a (B, T) tensor with return_logps=True")
    inputs, result = run_backbone(model, hook.tail, arguments)
    hidden = result.last_hidden_state
    if labels.shape != hidden.shape[:-1]:
        name = "labels" if shifted is None else "shift_labels"
        raise fail(name, f"shape {tuple(labels.shape)}", f"{tuple(hidden.shape[:-1])} to match the input")
    # Also the last virtual token's, which predicts the first own one: without an adapter nothing does.
    hidden, labels = hidden[:, num_virtual:], labels[:, num_virtual:]

    passed = passed_through(model, hook.tail, inputs, result)
    # Position t predicts the label at t + 1; the last predicts none.
    targets = F.pad(labels[:, 1:], (0, 1), value=hook.ignore_index) if shifted is None else labels

    def run(states: Tensor, head: LMHead) -> dict[str, Any]:
        if request.pair_loss is not None:
            how = {"shift": shifted is None, **hook.settings}
            return request.make_loss(states, head, labels.to(states.device), **how)
        return request.run(states, head, targets.to(states.device), **hook.settings)

    def count() -> int:
        return int((targets != hook.ignore_index).sum())

    split = request.settled_split(hook.split_head, hook.execution)
    scored = call_head(model, hook.tail, hidden, run, request.pair_loss, split, count)
    if request.pair_loss is not None:
        return FusedLMOutput(**scored, **passed)
    mask = (targets != hook.ignore_index).to(scored["logps"].device)
    if shifted is not None:
        return FusedLMOutput(**scored, logps_mask=mask, **passed)
    return FusedLMOutput(
        # From where a token is predicted to where it stands; the last column, never scored, comes first.
        **{name: value.roll(1, dims=1) for name, value in scored.items()},
        logps_mask=mask.roll(1, dims=1),
        **passed,
    )


def _layout_forward(
    model: Any,
    hook: _Hook,
    arguments: dict[str, Any],
    request: ScoreRequest,
    layout: TokenLayout | None,
    row_batches: Sequence[Mapping[str, Any]] | None,
    num_virtual: int,
) -> FusedLMOutput:
    """``(N,)`` results for the tokens that ``layout`` names, or their loss."""
    if not isinstance(layout, TokenLayout):
        raise fail("token_layout", type(layout).__name__, "a TokenLayout")
    if arguments.get("labels") is not None:
        raise fail("labels", "a value together with token_layout", "one of the two")
    calls, tokens = backbone_calls(model, hook.tail, arguments, row_batches, layout)
    hidden = all_positions(calls, num_virtual)
    if tokens is not layout:  # states are made of the labelled ones alone
        num_positions = sum(inputs["input_ids"].numel() for inputs, _ in calls)
        request = request.of_positions(layout.token_index, num_positions)
    if len(calls) == 1:
        passed = passed_through(model, hook.tail, *calls[0])
    else:
        passed = {"aux_loss": aux_loss_of_calls(model, hook.tail, calls)}
    make = request.run if request.pair_loss is None else request.make_loss

    def run(states: Tensor, head: LMHead) -> dict[str, Any]:
        on_device = TokenLayout(
            tokens.token_index.to(states.device, torch.int64),
            tokens.target_ids.to(states.device),
            tokens.sequence_ids.to(states.device, torch.int64),
            tokens.lengths,
        )
        return make(states, head, on_device, **hook.settings)

    how = (request.settled_split(hook.split_head, hook.execution), lambda: len(tokens.target_ids))
    return FusedLMOutput(**call_head(model, hook.tail, hidden, run, request.pair_loss, *how), **passed)


def _head_states(
    model: Any,
    hook: _Hook,
    arguments: dict[str, Any],
    layout: TokenLayout | None,
    row_batches: Sequence[Mapping[str, Any]] | None,
    num_virtual: int,
) -> HeadStates:
    """What the head would see."""
    if layout is not None and not isinstance(layout, TokenLayout):
        raise fail("token_layout", type(layout).__name__, "a TokenLayout")
    if arguments.get("labels") is not None:
        raise fail("labels", "a value together with return_states", "return_logps=True with it")
    calls, _ = backbone_calls(model, hook.tail, arguments, row_batches, layout)
    hidden = all_positions(calls, num_virtual)
    if row_batches is None and layout is None:
        hidden = calls[0][1].last_hidden_state[:, num_virtual:]
    if engine_around(model) is None and not is_partitioned(model):
        head = current_head(model, hook.tail)
        return HeadStates(hidden.to(head.weight.device), head)

    def keep(states: Tensor, head: LMHead) -> dict[str, Any]:
        # An engine frees what it gathered before anybody looks at the states.
        bias = None if head.bias is None else head.bias.detach().clone()
        whole = replace(head, weight=head.weight.detach().clone(), bias=bias)
        return {"hidden": states.detach(), "lm_head": whole}

    return HeadStates(**call_head(model, hook.tail, hidden, keep, None))


def backbone_states(model: nn.Module, **inputs: Any) -> Tensor:
    """``(B, T, H)``: the hidden states that a patched model gives to its head.

    Raises:
        TypeError: its backbone does not take one of ``inputs`` as it comes.
        ValueError: PEFT adds virtual tokens to its input.
    """
    *around, inner = wrappers_and_model(model)
    if any(has_virtual_tokens(wrapper) for wrapper in around):
        refuse(inner, "PEFT adds virtual tokens to its input, which is more than its backbone is given here")
    states: Tensor = run_backbone(inner, type(inner)._fastdpo_hook.tail, inputs)[1].last_hidden_state
    return states
