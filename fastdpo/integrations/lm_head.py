"""Find the backbone and the head of a Hugging Face causal LM, and prove what its forward does with them.

Nothing is guessed. The head must be a plain ``nn.Linear``, with PEFT's LoRA (`head_adapter`) or without;
scale and cap of the logits are read from the config (`_RULES`); and the model's own forward, followed by
`Probe`, must confirm the rest: it hands its arguments to the backbone unchanged, or filled in from its
config, gives all that comes back to the head, makes ``softcap(scale * logits)`` of the head's output, or
leaves out one or both, and shifts labels by one. What differs is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastdpo.integrations.engines import (
    ZERO3,
    bare,
    call_through,
    check_precision,
    engine_around,
    engine_of_head,
    is_split_by_vocabulary,
    is_tensor_parallel,
    vocab_shard,
)
from fastdpo.integrations.head_adapter import (
    FoundAdapter,
    check_adapter_layer,
    find_adapter,
    has_adapter,
    is_trained_copy,
    trained_copy,
)
from fastdpo.integrations.moved_states import moves_states, own_part
from fastdpo.integrations.probe import Probe, refuse
from fastdpo.integrations.virtual_tokens import check_virtual_tokens, is_peft
from fastdpo.ops.checks import fail
from fastdpo.types import LMHead

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")  # DDP and DeepSpeed, torch.compile, FSDP1


class _Rule(NamedTuple):
    """What a field of a (text) config does to the logits."""

    field: str
    effect: str  # "multiply", "divide" or "softcap"
    multiplies_in: str | None = None  # prefix of model types that multiply where others divide


_RULES = (
    _Rule("final_logit_softcapping", "softcap"),  # Gemma 2, 3n, 4, PaliGemma, NanoChat, Mistral Large 4, Muse
    _Rule("logits_soft_cap", "softcap"),  # RecurrentGemma
    _Rule("output_logit_soft_cap", "softcap"),  # xLSTM
    _Rule("logit_scale", "multiply"),  # Cohere, Cohere 2
    _Rule("lm_head_multiplier", "multiply"),  # Falcon-H1
    _Rule("output_multiplier", "multiply"),  # Muse, before its cap
    # Granite divides the logits; MiniCPM3 and Inkling the hidden states, the same thing without a bias.
    _Rule("logits_scaling", "divide", multiplies_in="hyperclovax"),
    _Rule("logits_mup_width_multiplier", "divide"),
)


@dataclass(frozen=True)
class ModelTail:
    """All of a causal LM but its backbone and its head, as its own forward confirmed it.

    Args:
        backbone: attribute path of the module that makes the hidden states.
        logit_scale: multiplies the head's output.
        softcap: caps it, or None.
        config_transform: scale and softcap in the config, which a forward may leave out (Cohere 2 Vision's).
        arguments: names that the forward hands to the backbone unchanged.
        from_config: further ones that it fills in with the config's fields of their names.
        router: experts and experts per token of the load-balancing loss, or None where it has none.
    """

    backbone: str
    logit_scale: float
    softcap: float | None
    config_transform: tuple[float, float | None]
    arguments: frozenset[str]
    from_config: frozenset[str]
    router: tuple[int, int] | None


def read_head(model: nn.Module) -> LMHead:
    """Read the head of a Hugging Face causal LM, wrapped (DDP, PEFT, torch.compile) or not.

    Args:
        model: the model; its weights are shared with the result, not copied.

    Returns:
        `LMHead` with the weight ``(V, H)``, the bias ``(V,)`` or None, scale and cap of the logits, and
        PEFT's LoRA on the head, if there is one and it is switched on.

    Raises:
        ValueError: not a causal LM, or one whose head or forward is not understood; the message says why.

    Example:
        >>> head = LMHead.from_model(model)
        >>> linear_logprob(hidden, head, labels)
    """
    model = unwrap(model)
    return current_head(model, examine(model))


def find_backbone(model: nn.Module) -> nn.Module:
    """The module whose ``last_hidden_state`` the model's own forward gives to its head.

    Raises:
        ValueError: as `read_head`.
    """
    model = unwrap(model)
    return attrgetter(examine(model).backbone)(model)


def unwrap(model: Any) -> Any:
    """The causal LM inside DDP, torch.compile and PEFT.

    Raises:
        TypeError: not an ``nn.Module``.
        ValueError: a PEFT model of a kind whose forward is not understood.
    """
    return wrappers_and_model(model)[-1]


def wrappers_and_model(model: Any) -> list[Any]:
    """What is around a causal LM, the outermost first, and the causal LM; raises as `unwrap`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a causal language model of transformers")
    found: list[Any] = []
    inner: Any = model
    while inner is not None:
        found.append(inner)
        inner = next((inner._modules[name] for name in _WRAPPERS if name in inner._modules), None)
        if inner is None and is_peft(found[-1]):
            check_virtual_tokens(found[-1])
            inner = found[-1].get_base_model()
    return found


def current_head(model: Any, tail: ModelTail) -> LMHead:
    """The head as it is now: no tensor is kept from one call to the next.

    Raises:
        ValueError: as `find_linear`, or its weight is not whole here.
    """
    return read_parts(model, find_linear(model), adapter_of(model), tail)


def plain_head(model: Any) -> LMHead:
    """The head as it is now, without what the model does to its output; `find_linear` was asked before."""
    return read_parts(model, bare_linear(model), adapter_of(model))


def bare_linear(model: Any) -> Any:
    """The ``nn.Linear`` of a head; `find_linear` was asked before."""
    return bare(head_parts(model)[-1])


def adapter_of(model: Any) -> FoundAdapter | None:
    """The LoRA that is on a head now."""
    layer = head_module(model)
    return find_adapter(model, layer) if has_adapter(layer) else None


def read_parts(
    model: Any, linear: nn.Linear, found: FoundAdapter | None, tail: ModelTail | None = None
) -> LMHead:
    """The head that is made of these modules, where their weights are whole, or a shard of a vocabulary.

    Raises:
        ValueError: they are neither.
    """
    weight: Any = linear.weight
    bias: Any = linear.bias
    shard = vocab_shard(model, linear)
    if shard is not None:
        weight, bias = (None if value is None else value.to_local() for value in (weight, bias))
    _check_whole(model, weight)
    adapter = None if found is None else found.weights()
    if shard is not None and adapter is not None:
        refuse(model, "its head is split over ranks by vocabulary and carries LoRA. Leave lm_head out of one")
    logits: dict[str, Any] = {}
    if tail is not None:
        logits = {"logit_scale": tail.logit_scale, "softcap": tail.softcap}
    return LMHead(weight, bias=bias, adapter=adapter, vocab_parallel=shard, **logits)


def call_head(
    model: Any,
    tail: ModelTail,
    hidden: Tensor,
    run: Callable[[Tensor, LMHead], dict[str, Any]],
    arguments: Mapping[str, Any] | None,
    how: str = "weight",
    count: Callable[[], int] = lambda: 0,
) -> dict[str, Any]:
    """``run(hidden, head)``, both on one device, where the weights of the head are whole.

    Args:
        arguments: of ``pair_loss``, which mixed precision must not have touched.
        how: of a head that FSDP2 splits, one of `moved_states.SPLIT_HEAD`.
        count: gives the number of labelled tokens.

    Raises:
        ValueError: as `current_head`, the hidden states cannot move where ``how`` says so, or an engine's
            mixed precision would round what comes or goes.
    """
    linear = find_linear(model)
    if how != "weight" and moves_states(model, linear, hidden, how, count, adapter_of(model)):
        weight, bias, shard, dtype = own_part(model, linear)
        check_precision(model, weight.dtype, arguments)
        transform = {"logit_scale": tail.logit_scale, "softcap": tail.softcap}
        head = LMHead(weight, bias=bias, vocab_parallel=shard, **transform)  # type: ignore[arg-type]
        return run(hidden if dtype is None else hidden.to(dtype), head)
    if engine_of_head(head_parts(model)) is None:
        head = current_head(model, tail)
        # With device_map the backbone may end on another device.
        if head.weight.is_meta and not hidden.is_meta:
            raise fail("model", "a head whose weight is offloaded", "its weight on a device")
        check_precision(model, head.weight.dtype, arguments)
        return run(hidden.to(head.weight.device), head)

    def inside(states: Tensor) -> dict[str, Any]:
        head = read_parts(model, linear, adapter_of(model), tail)
        check_precision(model, head.weight.dtype, arguments)
        return run(states, head)

    return call_through(model.get_output_embeddings(), head_chain(model), hidden, inside)


def head_chain(model: Any) -> list[Any]:
    """The modules whose weights a head is made of, in the order in which an engine is to call them."""
    layer = head_module(model)
    if engine_of_head(head_parts(model)) != ZERO3 or not has_adapter(layer):
        return [layer]
    # It gathers for each module what is its own.
    names = [] if layer.disable_adapters else [n for n in layer.active_adapters if n in layer.lora_A]
    below = [part[name] for name in names for part in (layer.lora_A, layer.lora_B)]
    return [layer, *below, layer.base_layer]


def logit_transform(model: Any) -> tuple[float, float | None]:
    """``(scale, softcap)`` as the config has them."""
    config = model.config.get_text_config()
    scale, softcap = 1.0, None
    for field, effect, multiplies_in in _RULES:
        value = getattr(config, field, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value == 0:
            refuse(model, f"config.{field} is {value!r}, wanted a number other than 0")
        if effect == "softcap":
            softcap = float(value)
        elif effect == "multiply" or (multiplies_in and config.model_type.startswith(multiplies_in)):
            scale *= value
        else:
            scale /= value
    return scale, softcap


def head_module(model: Any) -> Any:
    """The module that makes the logits: an ``nn.Linear``, or PEFT's layer around one."""
    parts = head_parts(model)
    return bare(parts[-2] if len(parts) > 1 and has_adapter(bare(parts[-2])) else parts[-1])


def head_parts(model: Any) -> list[Any]:
    """The head from outside to inside: what the model calls, what PEFT put there, the ``nn.Linear``."""
    parts = [model.get_output_embeddings()]
    if parts[0] is None:
        refuse(model, "it has no output embeddings, so no logits over a vocabulary")
    if is_trained_copy(bare(parts[-1])):
        parts.append(trained_copy(bare(parts[-1])))
    if has_adapter(bare(parts[-1])):
        parts.append(bare(parts[-1]).base_layer)
    return parts


def find_linear(model: Any) -> nn.Linear:
    """The ``nn.Linear`` whose product the logits are, or that LoRA adds to.

    Raises:
        ValueError: no head, or one that does more than ``weight @ h + bias``, is quantised, or split by no
            engine that is known.
    """
    head, engine = head_module(model), engine_of_head(head_parts(model))
    if has_adapter(head):
        check_adapter_layer(model, head, may_have_hooks=engine is not None)
        head = bare(head.base_layer)
    name = f"its head ({type(head).__name__})"
    # Read as an attribute, a weight under ZeRO-3 would be gathered here, and stay so.
    weight = head._parameters.get("weight") if engine == ZERO3 else getattr(head, "weight", None)
    if isinstance(weight, Tensor):
        _check_weight(model, weight)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        refuse(
            model, f"{name} is not a plain nn.Linear. Leave the head out of the quantisation, if that is why"
        )
    if engine is None and (head._forward_hooks or head._forward_pre_hooks):
        refuse(model, f"{name} has forward hooks, which would never run. Remove them")
    is_known = hasattr(head, "_hf_hook") or is_tensor_parallel(vars(head).get("forward"))
    if "forward" in vars(head) and not is_known:
        refuse(model, f"{name} has a forward of its own instead of its class's")
    return head


def _check_weight(model: nn.Module, weight: Any) -> None:
    if hasattr(weight, "ds_id"):
        return  # is gathered by ZeRO-3
    if hasattr(weight, "device_mesh") or weight.dim() != 2 or 0 in weight.shape:
        if engine_around(model) is None and not is_split_by_vocabulary(model, weight):
            _refuse_shard(model, weight)
        return  # is gathered by FSDP, or used as a shard
    if is_traceable_wrapper_subclass(weight) or not weight.dtype.is_floating_point:
        kind = f"{type(weight).__name__}, {weight.dtype}"
        refuse(model, f"the weight of its head is quantised ({kind}). Leave the head out of the quantisation")


def _check_whole(model: nn.Module, weight: Any) -> None:
    if hasattr(weight, "device_mesh") or weight.dim() != 2 or 0 in weight.shape:
        _refuse_shard(model, weight)


def _refuse_shard(model: nn.Module, weight: Any) -> NoReturn:
    refuse(
        model,
        f"the weight of its head is sharded here ({type(weight).__name__} of shape {tuple(weight.shape)}). "
        "FSDP2, FSDP1 and ZeRO-3 gather it in a call of the wrapped model; a DTensor whose rows are split "
        "over one mesh dimension is used as it is; other shards are not supported",
    )


def examine(model: Any) -> ModelTail:
    """Run the model's own forward around stand-ins and describe it; see the module's docstring.

    Args:
        model: an unwrapped model. It is left as it was.

    Raises:
        ValueError: the forward does something else than `ModelTail` can say.
    """
    for name in ("config", "get_output_embeddings", "base_model", "can_generate"):
        if not hasattr(model, name):
            refuse(model, f"it has no `{name}`; wanted a causal language model of transformers")
    if model.config.is_encoder_decoder:
        refuse(model, "it is an encoder-decoder, not a causal language model")
    linear, layer = find_linear(model), head_module(model)
    adapter_of(model)  # which refuses
    if not model.can_generate():
        refuse(model, "it does not generate text, so it is no causal language model")
    scale, softcap = in_config = logit_transform(model)
    probe = Probe(model, linear, layer)
    # What the config says, or less: the forward of a model around a language model may leave it out.
    found = probe.find_tail([in_config, (scale, None), (1.0, softcap), (1.0, None)])
    probe.check_labels()
    arguments = probe.arguments_passed_on()
    router = None
    try:
        router = probe.router()
    except LookupError:
        arguments -= {"output_router_logits"}
    path = next(path for path, module in model.named_modules() if module is found.backbone)
    return ModelTail(path, found.logit_scale, found.softcap, in_config, arguments, found.from_config, router)


LMHead._read_model = staticmethod(read_head)
