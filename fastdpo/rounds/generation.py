"""What draws answers: transformers' ``generate``, also from a mixture of two models, or vLLM.

Both take token ids and give token ids, so that prompts are the tokens that training sees.
"""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from fastdpo.integrations.auto_class import read_config
from fastdpo.rounds.ranks import device_of
from fastdpo.training.batches.collate import pad_token_id
from fastdpo.training.data.model_fit import position_table
from fastdpo.training.loop.models import load_model
from fastdpo.training.settings.hub import is_adapter

logger = logging.getLogger(__name__)


class Drawn(NamedTuple):
    """An answer's token ids without the end, and whether it came to its end."""

    ids: list[int]
    finished: bool


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn.

    Args:
        temperature: 0 takes the likeliest token.
        further: settings of the sampler's own.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    further: Mapping[str, Any] = field(default_factory=dict)


class Sampler(Protocol):
    """Draws answers of one model."""

    @property
    def limit(self) -> int | None:
        """The most tokens of prompt and answer; None for no limit."""

    def draw(self, prompts: Sequence[Sequence[int]], count: int, seed: int) -> list[list[Drawn]]:
        """``count`` answers of each prompt; the same ones for the same prompts, count and seed."""

    def close(self) -> None:
        """Give the memory back."""


class TransformersSampler:
    """``generate`` of one model, or of the geometric mixture of two.

    Args:
        models: to load: one, or policy and reference of a mixture.
        loading: options of ``load_model``.
        mixture_weight: the second model's share.

    Raises:
        ValueError: a model that cannot be loaded, or a setting that ``generate`` does not have.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        tokenizer: Any,
        how: Drawing,
        *,
        loading: Mapping[str, Any],
        use_cpu: bool,
        mixture_weight: float = 0.5,
    ) -> None:
        self.config = _generation_config(how)
        self.device = device_of(use_cpu)
        self.models = [
            load_model(name, what=what, **loading).to(self.device).eval() for what, name in models.items()
        ]
        self.mixture_weight = mixture_weight
        model: Any = self.models[0]
        self.ends = _ends(getattr(model, "generation_config", None), tokenizer)
        self.pad = pad_token_id(tokenizer)
        self.config.eos_token_id, self.config.pad_token_id = self.ends, self.pad
        # What the checkpoint's own says would fill in what ours does not: another temperature, top_k ...
        model.generation_config = self.config

    @property
    def limit(self) -> int | None:
        """The smallest of the models' tables and of what their configs say."""
        known = [limit for model in self.models if (limit := positions_of(model)) is not None]
        return min(known, default=None)

    @torch.no_grad()
    def draw(self, prompts: Sequence[Sequence[int]], count: int, seed: int) -> list[list[Drawn]]:
        """Answers of each prompt, by one call of ``generate``."""
        ids, mask = self._padded(prompts)
        torch.manual_seed(seed)
        processors = LogitsProcessorList()
        if len(self.models) > 1:
            processors.append(_Mixture(self.models[1], mask.repeat_interleave(count, 0), self.mixture_weight))
        model: Any = self.models[0]
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=self._config(count),
            logits_processor=processors,
        )
        rows = [self._cut(row) for row in found[:, ids.shape[1] :].tolist()]
        return [rows[start : start + count] for start in range(0, len(rows), count)]

    def close(self) -> None:
        """Give the models back."""
        self.models = []
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _config(self, count: int) -> GenerationConfig:
        config = GenerationConfig(**self.config.to_dict())
        config.num_return_sequences = count
        return config

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Prompts ``(B, T)``, padded on the left, and which of it is theirs."""
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        return ids.to(self.device), mask.to(self.device)

    def _cut(self, ids: list[int]) -> Drawn:
        for place, token in enumerate(ids):
            if token in self.ends:
                return Drawn(ids[:place], True)
        return Drawn(ids, False)


class _Mixture(LogitsProcessor):
    """(1 - w) log pi + w log mu, token by token: Nash-MD's mixture of policy and reference.

    The reference sees what was drawn, with a cache of its own. Source: arXiv:2312.00886 (the one-step
    mixture that the paper samples from, since the sequences' own cannot be drawn).
    """

    def __init__(self, model: nn.Module, mask: Tensor, weight: float) -> None:
        self.model, self.mask, self.weight = model, mask, weight
        self.cache: Any = None
        self.seen = 0
        self.parameters = inspect.signature(model.forward).parameters

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        fresh = input_ids.shape[1] - self.mask.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), fresh)], 1)
        call = {"input_ids": input_ids[:, self.seen :], "attention_mask": mask}
        if "position_ids" in self.parameters:
            call["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, self.seen :]
        # Since transformers 5.23 it is called `cache`.
        name = "cache" if "cache" in self.parameters else "past_key_values"
        output = self.model(**call, **{name: self.cache}, use_cache=True)
        self.cache, self.seen = output[name], input_ids.shape[1]
        theirs = output.logits[:, -1, :].float().log_softmax(-1)
        if theirs.shape != scores.shape:
            raise ValueError(
                f"ref_model: got logits over {theirs.shape[-1]} tokens, wanted the model's "
                f"{scores.shape[-1]}: a mixture is of models with one vocabulary"
            )
        return torch.lerp(scores.float().log_softmax(-1), theirs, self.weight)


class VllmSampler:
    """vLLM's offline engine.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: a setting that it does not have.
    """

    def __init__(
        self, name: str, tokenizer_name: str, tokenizer: Any, how: Drawing, *, loading: Mapping[str, Any]
    ) -> None:
        try:
            import vllm
        except ImportError:
            raise ImportError(
                "sampler: got 'vllm', which is not installed here: pip install vllm (it needs a GPU), or "
                "say --sampler transformers"
            ) from None
        self.vllm, self.how, base = vllm, how, name
        self.lora: Any = None
        further: dict[str, Any] = {}
        if is_adapter(name):
            from peft import PeftConfig
            from vllm.lora.request import LoRARequest

            found = PeftConfig.from_pretrained(name)
            base = str(found.base_model_name_or_path)
            self.lora = LoRARequest("adapter", 1, name)
            further = {"enable_lora": True, "max_lora_rank": max(8, int(getattr(found, "r", 8)))}
        if loading.get("attn_implementation"):
            raise ValueError(
                "attn_implementation: got a value with vllm, which chooses its own: leave it out"
            )
        for option in ("revision", "trust_remote_code"):
            if loading.get(option):
                further[option] = loading[option]
        self._config = read_config(base, **loading)
        self.engine = vllm.LLM(
            model=base, tokenizer=tokenizer_name, dtype=loading.get("dtype", "auto"), **further
        )
        self.ends = _ends(_own_generation_config(base), tokenizer)

    @property
    def limit(self) -> int | None:
        """What the engine reads at most."""
        length: Any = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        return length if isinstance(length, int) else None

    def draw(self, prompts: Sequence[Sequence[int]], count: int, seed: int) -> list[list[Drawn]]:
        """Answers of each prompt; requests have a seed each."""
        tokens = [self.vllm.TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        how = [self._params(count, seed + place) for place in range(len(prompts))]
        found = self.engine.generate(tokens, how, lora_request=self.lora, use_tqdm=False)
        return [[self._drawn(answer) for answer in request.outputs] for request in found]

    def close(self) -> None:
        """Give the engine back."""
        self.engine = None
        gc.collect()

    def _params(self, count: int, seed: int) -> Any:
        how = self.how
        try:
            return self.vllm.SamplingParams(
                n=count, temperature=how.temperature, top_p=how.top_p, max_tokens=how.max_new_tokens,
                seed=seed, stop_token_ids=self.ends, detokenize=False, **how.further,
            )  # fmt: skip
        except TypeError as error:
            raise ValueError(f"generation_kwargs: got {dict(how.further)}: {error}") from None

    def _drawn(self, answer: Any) -> Drawn:
        ids = list(answer.token_ids)
        finished = answer.finish_reason == "stop"
        return Drawn(ids[:-1] if finished and ids and ids[-1] in self.ends else ids, finished)


def positions_of(model: nn.Module) -> int | None:
    """How many positions a model has, by its table, or by its config where it computes them."""
    table = position_table(model)
    config: Any = getattr(model, "config", None)
    known = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    return table if table is not None else known if isinstance(known, int) and known > 0 else None


def _generation_config(how: Drawing) -> GenerationConfig:
    known = set(GenerationConfig().to_dict()) | set(vars(GenerationConfig()))
    for name in how.further:
        if name not in known:
            raise ValueError(
                f"generation_kwargs: got {name!r}, which is no setting of transformers' generate"
            )
    sampling = {"temperature": how.temperature, "top_p": how.top_p} if how.temperature > 0 else {}
    # Else transformers' default of 50 would cut the distribution off.
    sampling = {"top_k": 0, **sampling} if sampling else {}
    return GenerationConfig(
        do_sample=how.temperature > 0, max_new_tokens=how.max_new_tokens, **{**sampling, **how.further}
    )


def _own_generation_config(name: str) -> Any:
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return None


def _ends(config: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the checkpoint's and the tokenizer's."""
    told = getattr(config, "eos_token_id", None)
    found = [*(told if isinstance(told, list) else [told]), tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in found if token is not None))
