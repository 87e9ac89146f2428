"""A small model, a batch of pairs, and what one process makes of them: the truth for split models."""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, LlamaConfig, LlamaForCausalLM

from fastdpo import TokenLayout, patch_model

VOCABULARY = 363  # which two ranks cannot halve
PAIRS = 4


def tiny(*, tied: bool = False, adapter: str | None = None, frozen_head: bool = False) -> Any:
    """A Llama; ``adapter``: LoRA on its ``backbone``, its ``head`` too, or ``head alone``; or ``saved``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model: Any = LlamaForCausalLM(config)
    if frozen_head:
        model.lm_head.weight.requires_grad_(False)
    if adapter is None:
        return model
    from peft import LoraConfig, get_peft_model

    backbone = [] if adapter == "head alone" else ["q_proj", "v_proj"]
    head = {"target_modules": [*backbone, *(["lm_head"] if adapter.startswith("head") else [])]}
    saved = {"modules_to_save": ["lm_head"]} if adapter == "saved" else {}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **head, **saved))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def tiny_experts(family: str) -> Any:
    """A mixture of four experts, two of which see a token."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
        max_position_embeddings=256,
    )
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)  # whole, also where ZeRO-3 is told of
    return model


def batch(*, without_labels_from: int = PAIRS) -> dict[str, Tensor]:
    """2P rows, chosen first, of unlike length; pairs from ``without_labels_from`` on have no label at all."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2 * PAIRS, 12), generator=random)
    labels = ids.clone()
    for row in range(2 * PAIRS):
        labels[row, : int(torch.randint(2, 11, (1,), generator=random))] = -100
        if row % PAIRS >= without_labels_from:
            labels[row] = -100
    ref_logps = torch.randn(2 * PAIRS, generator=random) - 20
    return {"input_ids": ids, "labels": labels, "ref_logps": ref_logps}


def part(whole: dict[str, Tensor], pairs: Sequence[int]) -> dict[str, Tensor]:
    rows = torch.tensor([*pairs, *[PAIRS + pair for pair in pairs]])
    return {name: value[rows] for name, value in whole.items()}


def dpo(model: Any, of: dict[str, Tensor], how: str) -> Tensor:
    """The sum of the pairs' losses over the number of all pairs.

    Args:
        how: from log-probabilities (``logps``), by the hook (``loss``), or so of rows without padding
            (``packed``). Of logits that are lazy where the model is patched: log-probabilities (``lazy``),
            also the logsumexp in a look of its own (``lazy twice``), the entropy, mean logits and label's
            logits (``statistics``), or the logits themselves (``made``).
    """
    if how in ("lazy", "lazy twice", "statistics", "made"):
        return _of_logits(model(input_ids=of["input_ids"]).logits, of, how)
    if how == "logps":
        out = model(input_ids=of["input_ids"], labels=of["labels"], return_logps=True)
        chosen, rejected = (out.logps.sum(-1) - of["ref_logps"]).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).sum() / PAIRS
    asked = {"loss_type": "sigmoid", "beta": 0.1, "ref_logps": of["ref_logps"], "num_pairs": PAIRS}
    arguments: dict[str, Any] = {"return_logps": True, "pair_loss": MappingProxyType(asked)}
    if how == "loss":
        loss: Tensor = model(input_ids=of["input_ids"], labels=of["labels"], **arguments).loss
        return loss
    rows, length = of["input_ids"].shape
    predicted = of["labels"][:, 1:]
    row, place = (predicted != -100).nonzero().T
    layout = TokenLayout(row * length + place, predicted[row, place], row)
    positions = torch.arange(length, device=predicted.device).repeat(rows)[None]
    packed: Tensor = model(
        input_ids=of["input_ids"].reshape(1, -1), position_ids=positions, token_layout=layout, **arguments
    ).loss
    return packed


def _of_logits(logits: Tensor, of: dict[str, Tensor], how: str) -> Tensor:
    """The same loss, as a loop writes it."""
    logits, labels = logits[:, :-1], of["labels"][:, 1:]
    mask = labels != -100
    if how == "made":
        logits = logits.sin() + logits
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    chosen, rejected = ((picked * mask).sum(-1) - of["ref_logps"]).chunk(2)
    loss = -F.logsigmoid(0.1 * (chosen - rejected)).sum() / PAIRS
    if how == "statistics":
        probs = logits.softmax(-1)
        entropy = logits.logsumexp(-1) - (probs * logits).sum(-1)
        found = logits.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        right = logits.argmax(-1) == labels.clamp(min=0)
        loss = loss + 0.01 * ((entropy + found + 3 * logits.mean(-1)) * (mask & ~right)).sum()
    return loss + 0.01 * (logits.logsumexp(-1) * mask).sum() if how == "lazy twice" else loss


def truth(model: Any, of: dict[str, Tensor], how: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one process on the whole batch."""
    whole = patch_model(copy.deepcopy(model), logits="real")
    loss = dpo(whole, of, how)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}


def worst_error(loss: Tensor, grads: dict[str, Tensor], expected: tuple[Tensor, dict[str, Tensor]]) -> float:
    """The largest relative error of the ranks' loss and of any gradient; inf if one is missing."""
    total = loss.detach().double().clone()
    dist.all_reduce(total)
    if grads.keys() != expected[1].keys():
        return float("inf")
    errors = [abs(total.item() - expected[0].item()) / abs(expected[0].item())]
    for name, grad in expected[1].items():
        scale = grad.double().abs().max().clamp_min(1e-30)
        errors.append(((grads[name].double() - grad.double()).abs().max() / scale).item())
    return max(error if error == error else float("inf") for error in errors)


class Collectives(TorchDispatchMode):
    """Counts this rank's collectives by name, and the bytes of the largest tensor given to each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            self.calls[name] += 1
            self.sent[name] += max(map(_bytes, args), default=0)
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def print_results(cases: Mapping[str, dict[str, Any]], run: Callable[..., dict[str, Any]]) -> None:
    """A JSON line for each case, or for those of the command line: what ``run`` found, or what it raised."""
    for name, options in cases.items():
        if len(sys.argv) > 1 and not any(word in name for word in sys.argv[1:]):
            continue
        try:
            found = run(**options)
        except Exception:
            found = {"raised": traceback.format_exc()[-1500:]}
        print(json.dumps({"case": name, **found}), flush=True)
