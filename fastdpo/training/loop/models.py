"""Models and their tokenizer: found, loaded, and made ready to be trained or to be looked at."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import set_seed

from fastdpo.integrations.auto_class import auto_class, read_config, sees_images
from fastdpo.integrations.lm_head import unwrap
from fastdpo.integrations.processor import tokenizer_of
from fastdpo.integrations.virtual_tokens import has_prefix
from fastdpo.training.loop.checkpoint_files import check_weights
from fastdpo.training.loop.quantised import compute_alike, is_quantised, prepare_quantised
from fastdpo.training.reference.sources import disable_dropout, is_adapter_model
from fastdpo.training.settings.checkpointing import recomputes_activations
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.hub import check_there, is_adapter
from fastdpo.training.settings.parallel import loading_of
from fastdpo.training.settings.run import ModelArguments, template_text

logger = logging.getLogger(__name__)


def load_model(
    name: str,
    *,
    what: str = "model",
    dtype: str | torch.dtype = "auto",
    with_images: bool = False,
    **options: Any,
) -> nn.Module:
    """A causal LM, or an adapter on one, to train, by path or hub id; ``dtype`` "auto" is the checkpoint's.

    Args:
        what: the setting, for messages.
        with_images: the data have some: of a family that has a language model by itself, the whole.

    Raises:
        ValueError: there is no such model, it cannot be loaded, or is a checkpoint whose weights have changed
            since they were written; names it.
    """
    check_there(what, name)
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    check_weights(Path(name), what)
    load = _load_adapted if is_adapter(name) else _load_whole
    try:
        with _without_future_warnings():
            model = load(name, with_images=with_images, dtype=dtype, **options)
    except ImportError as error:
        if load is _load_whole or error.name != "peft":
            raise
        raise ImportError(f"{what}: {name} is an adapter, which needs peft: pip install peft") from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{what}: could not load {name!r}: {first_line(error)}") from error
    if is_quantised(model):
        compute_alike(model)
    return model


def _load_whole(name: str, *, with_images: bool, **options: Any) -> nn.Module:
    model: nn.Module = auto_class(read_config(name, **options), with_images=with_images).from_pretrained(
        name, **options
    )
    return model


def _load_adapted(name: str, *, with_images: bool, **options: Any) -> nn.Module:
    from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    if base:
        check_weights(Path(base), "base")
    kind = auto_class(read_config(base), with_images=with_images) if base else AutoModelForCausalLM
    model: nn.Module
    if kind is AutoModelForCausalLM:
        model = AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **options)
    else:  # peft has no class of its own for these
        of_base = {key: value for key, value in options.items() if key != "revision"}
        model = PeftModel.from_pretrained(kind.from_pretrained(base, **of_base), name, is_trainable=True)
    return model


def load_tokenizer(name: str, *, what: str = "tokenizer", or_processor: bool = False, **options: Any) -> Any:
    """A tokenizer by path or hub id.

    Args:
        or_processor: the whole processor of a model of images and text, where there is one.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoProcessor, AutoTokenizer

    check_there(what, name)
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    try:
        if or_processor and _has_processor(name, **options):
            return AutoProcessor.from_pretrained(name, **options)
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{what}: could not load {name!r}: {first_line(error)}") from error


def _has_processor(name: str, **options: Any) -> bool:
    """Whether a name is of a model of images and text that comes with what its images go through."""
    from transformers.utils import cached_file

    try:
        if not sees_images(read_config(name, **options)):
            return False
    except (OSError, ValueError, KeyError):  # an adapter's folder, or a tokenizer alone
        pass
    files = ("preprocessor_config.json", "processor_config.json")
    return any(cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in files)


def told_tokenizer(told: ModelArguments, *, or_processor: bool = False) -> Any:
    """The tokenizer that the command line names, or its processor, with the chat template given."""
    options: dict[str, Any] = {"revision": told.revision} if told.revision and told.tokenizer is None else {}
    options |= {"trust_remote_code": told.trust_remote_code}
    tokenizer = load_tokenizer(told.tokenizer or told.name, or_processor=or_processor, **options)
    if told.chat_template is not None:
        tokenizer_of(tokenizer).chat_template = tokenizer.chat_template = template_text(told.chat_template)
    return tokenizer


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages that have to fit on one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def prepare_policy(model: str | nn.Module, args: PreferenceConfig, peft_config: Any | None) -> nn.Module:
    """The model to train: loaded, with its adapter and without dropout.

    Raises:
        ValueError: a model this version cannot train; says which and why.
        ImportError: ``peft_config`` without peft.
    """
    policy = (
        load_model(model, dtype=weights_dtype(model, peft_config), **loading_of(args))
        if isinstance(model, str)
        else model
    )
    if is_quantised(policy):
        prepare_quantised(policy, args, is_adapted=peft_config is not None or is_adapter_model(policy))
    if args.disable_dropout:
        # Before the adapter is added: a dropout in peft_config is asked for.
        disable_dropout(policy)
    if peft_config is not None:
        set_seed(args.seed)  # as Trainer does, but for the adapter's first weights too
        policy = _add_adapter(policy, peft_config)
    if args.freeze_vision_tower:
        freeze_vision_tower(policy)
    if is_adapter_model(policy):
        if has_prefix(policy) and recomputes_activations(args):
            raise ValueError(
                "gradient_checkpointing: got True with prefix tuning, whose prefix is in a cache that layers "
                "have to do without where they run again; wanted False, or prompt tuning or P-tuning"
            )
    elif next(policy.parameters()).dtype in (torch.float16, torch.bfloat16):
        logger.warning(
            "the model's weights are %s: at the learning rates of preference training most updates are lost "
            "in rounding; load them as float32 (bf16=True still computes in bfloat16) or train an adapter",
            next(policy.parameters()).dtype,
        )
    return policy


def freeze_vision_tower(model: nn.Module) -> None:
    """Train nothing of what looks at images, adapters in it included; what takes its features is trained.

    Raises:
        ValueError: the model has none that is known.
    """
    inner = unwrap(model)
    tower = inner.get_encoder(modality="image")
    if tower is inner or tower is inner.base_model:
        raise ValueError(
            f"freeze_vision_tower: got True with a {type(inner).__name__}, which has no part that looks at "
            "images; wanted False"
        )
    tower.requires_grad_(False)


def other_model(
    what: str, model: str | nn.Module | None, policy: nn.Module, args: PreferenceConfig
) -> nn.Module | None:
    """A reference or a teacher: as it is given, or loaded in the dtype of the policy's weights."""
    return (
        load_model(model, what=what, dtype=next(policy.parameters()).dtype, **loading_of(args))
        if isinstance(model, str)
        else model
    )


def weights_dtype(model: str, peft_config: Any | None) -> str:
    """What weights are loaded as: float32 where they are trained, as 16 bits lose small updates."""
    return "float32" if peft_config is None and not is_adapter(model) else "auto"


def check_trained(model: Any) -> None:
    """Raise ValueError for a model of which nothing is trained."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if getattr(model, "peft_config", None):
        raise ValueError(
            "model: got an adapter that is frozen, as peft loads it by default; wanted it loaded with "
            "is_trainable=True: AutoPeftModelForCausalLM.from_pretrained(..., is_trainable=True), or "
            "PeftModel.from_pretrained(model, ..., is_trainable=True)"
        )
    raise ValueError("model: got one whose parameters are all frozen, wanted some that require a gradient")


def _add_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    if is_adapter_model(model):
        raise ValueError("peft_config: the model has an adapter already; give one or the other")
    try:
        from peft import get_peft_model
    except ImportError:
        raise ImportError(
            "training an adapter needs peft, which is not installed: pip install peft"
        ) from None
    with _without_future_warnings():
        adapted: nn.Module = get_peft_model(model, peft_config)
    return adapted


@contextmanager
def _without_future_warnings() -> Iterator[None]:
    """What peft and transformers tell each other about later versions is not the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
