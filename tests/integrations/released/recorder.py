"""A run of somebody's trainer, recorded: losses, logits that were made, rows that were projected.

Runs in environments of old libraries, so it imports nothing but torch, transformers, tokenizers and fastdpo.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo import patch_model, patch_trl, unpatch_trl
from fastdpo.integrations import lazy, lazy_values
from tests.integrations.released.cases import PAIRS_PER_STEP, STEPS

WORDS = 24  # of a prompt and of an answer, at most
VOCAB = 997  # of no other dimension here, so that logits are known by it
SHARED_DATA = Path(__file__).parents[4] / "shared" / "data"


@dataclass
class Run:
    """What a run leaves; lists have one entry a step."""

    losses: list[float] = field(default_factory=list)
    materialised: int = 0  # lazy tensors with a vocabulary whose real values were made
    largest: int = 0  # rows of the largest (..., VOCAB) tensor that was made outside the fused op
    trained: list[int] = field(default_factory=list)  # rows that the fused op got with a gradient
    scored: list[int] = field(default_factory=list)  # and without: references, and what is only logged
    labelled: list[int] = field(default_factory=list)  # tokens of the batch that have a label
    materialised_by: list[str] = field(default_factory=list)


def load_rows(file: str) -> list[dict[str, Any]]:
    """Real rows as plain text, cut to a few words each."""

    def text(value: Any) -> Any:
        return " ".join(value[-1]["content"].split()[:WORDS]) if isinstance(value, list) else value

    lines = (SHARED_DATA / file).read_text().splitlines()[: STEPS * PAIRS_PER_STEP]
    rows = [{name: text(value) for name, value in json.loads(line).items()} for line in lines]
    return [
        {
            name: f" {value}" if name in ("chosen", "rejected", "completion") else value
            for name, value in row.items()
        }
        for row in rows
    ]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """The most frequent words of the texts; all others are one token."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    trainer = trainers.WordLevelTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_model(seed: int) -> Any:
    """A tiny Llama whose logits are as spread as trained ones."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(25)
    return model


@contextmanager
def hooked_models(hook: str | None) -> Iterator[tuple[Any, Any]]:
    """Policy and reference; the hook and nothing else, or, where it is None, no hook."""
    policy, reference = make_model(0), make_model(1)
    if hook == "patch_model":
        patch_model(policy, logits="lazy")
        patch_model(reference, logits="always_lazy")
    elif hook == "patch_trl":
        patch_trl()
    elif hook == "axolotl":
        from axolotl.integrations.base import load_plugin

        load_plugin("fastdpo.integrations.axolotl.FastDPOPlugin").pre_model_load({})
    elif hook == "ms-swift":
        from swift.utils.utils import import_external_file

        path = importlib.util.find_spec("fastdpo.integrations").submodule_search_locations[0]  # type: ignore
        import_external_file(f"{path}/ms_swift.py")
    try:
        yield policy, reference
    finally:
        unpatch_trl()


class _Logits(TorchDispatchMode):
    """Notes the largest tensor of logits that something but fastdpo's own ops makes."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "fastdpo":
            for leaf in tree_leaves(result):
                is_plain = (
                    isinstance(leaf, Tensor) and not isinstance(leaf, lazy.LazyLogits) and not leaf.is_meta
                )
                if (
                    is_plain
                    and leaf.is_floating_point()
                    and leaf.dim() > 1
                    and leaf.shape[-1] == VOCAB
                    and leaf.shape[-2] != 32
                ):
                    # The rows that take memory: expanded ones are one row.
                    self.run.largest = max(self.run.largest, leaf.untyped_storage().nbytes() // (4 * VOCAB))
        return result


@contextmanager
def recorded(run: Run) -> Iterator[Callable[[int, float], None]]:
    """Gives what to call after each loss, with the tokens that were labelled and the loss."""
    trained = scored = 0
    own_op, own_report = lazy_values.linear_logprob, lazy._report

    def counted(hidden: Tensor, head: Any, layout: Any, **options: Any) -> Any:
        nonlocal trained, scored
        has_grad = torch.is_grad_enabled() and hidden.requires_grad
        trained += layout.token_index.numel() if has_grad else 0
        scored += 0 if has_grad else layout.token_index.numel()
        return own_op(hidden, head, layout, **options)

    def reported(memory: Any, func: Any) -> None:
        run.materialised += 1
        name = getattr(func, "__name__", str(func))
        run.materialised_by = sorted({*run.materialised_by, f"{name} of {memory.kind}"})
        own_report(memory, func)

    def step(labelled: int, loss: float) -> None:
        nonlocal trained, scored
        run.losses.append(loss)
        run.labelled.append(labelled)
        run.trained.append(trained)
        run.scored.append(scored)
        trained = scored = 0

    op = mock.patch.object(lazy_values, "linear_logprob", counted)
    with op, mock.patch.object(lazy, "_report", reported), _Logits(run):
        yield step


def compared(make_and_train: Callable[[bool, Run], None]) -> dict[str, Any]:
    """Two runs, with the hook and without, as what is printed of them."""
    plain, hooked = Run(), Run()
    make_and_train(False, plain)
    make_and_train(True, hooked)
    gaps = [abs(a - b) / max(1.0, abs(a)) for a, b in zip(plain.losses, hooked.losses, strict=True)]
    return {
        "steps": len(plain.losses),
        "largest_gap": max(gaps),
        "materialised": hooked.materialised,
        "materialised_by": hooked.materialised_by,
        "largest_logits": [plain.largest, hooked.largest],
        "trained": hooked.trained,
        "scored": hooked.scored,
        "labelled": hooked.labelled,
        "plain": plain.losses,
        "hooked": hooked.losses,
    }
