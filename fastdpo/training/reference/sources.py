"""Where reference log-probabilities come from: a second copy, the adapter switched off, or the cache.

``choose_reference`` turns the configured word into one of ``copy``, ``adapter``, ``precomputed`` and
``none``, or says why it cannot be had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastdpo.integrations.engines import copied
from fastdpo.integrations.fused_output import HeadStates, Teachers
from fastdpo.integrations.head_adapter import has_adapter
from fastdpo.integrations.lm_head import head_module, unwrap
from fastdpo.training.batches.batch import Batch, Padded
from fastdpo.training.batches.forward import head_states, sequence_logps
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.row import LD_COLUMN
from fastdpo.training.reference.scoring import reference_values
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.types import TeacherCombination

Result = TypeVar("Result")


def is_adapter_model(model: nn.Module) -> bool:
    """Whether the model is one of peft's."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def is_fresh_adapter(model: Any) -> bool:
    """Whether switching the adapter off changes nothing yet: LoRA only, and every product B A is 0."""
    if any(str(config.peft_type).rsplit(".", 1)[-1] != "LORA" for config in model.peft_config.values()):
        return False
    # LoRA starts with B = 0, on an embedding with A = 0; initialisations such as PiSSA start with neither.
    zeros = [p for name, p in model.named_parameters() if ".lora_B." in name or ".lora_embedding_A." in name]
    return bool(zeros) and not any(p.any() for p in zeros)


def choose_reference(
    args: PreferenceConfig, model: nn.Module, *, has_ref_model: bool, has_columns: bool
) -> str:
    """Resolve ``args.reference``.

    Args:
        has_ref_model: the caller brought a reference model.
        has_columns: the data carries reference log-probabilities.

    Raises:
        ValueError: the losses and the reference asked for do not go together.
    """
    wanted, losses = args.reference, ", ".join(args.loss_type)
    if args.needs_divergences and has_adapter(head_module(unwrap(model))):
        raise ValueError(
            f"lm_head: got LoRA on it with {losses}, wanted none: divergences over the vocabulary are made "
            "without; take lm_head out of target_modules, or train it whole (modules_to_save)"
        )
    if not args.needs_reference:
        if has_ref_model or wanted not in ("auto", "none"):
            got = "a ref_model" if has_ref_model else repr(wanted)
            raise ValueError(f"reference: got {got}, but {losses} uses no reference: wanted 'none' or 'auto'")
        return "none"
    if wanted == "none":
        raise ValueError(
            f"reference: got 'none', but {losses} needs one: wanted auto, copy, adapter or precomputed"
        )
    if has_ref_model:
        if wanted not in ("auto", "copy", "precomputed"):
            raise ValueError(
                f"reference: got {wanted!r} and a ref_model, wanted 'copy', 'precomputed' or 'auto'"
            )
        return "precomputed" if wanted == "precomputed" else "copy"
    if wanted == "adapter" and not is_adapter_model(model):
        raise ValueError(
            "reference: got 'adapter', but the model has no adapter: wanted a peft model or peft_config"
        )
    if wanted != "auto":
        return wanted
    kept = "copy" if args.needs_divergences else "precomputed"
    if has_columns and not args.needs_divergences:
        return kept
    if is_adapter_model(model):
        # The reference is the policy as training finds it; a trained adapter is part of that.
        return "adapter" if is_fresh_adapter(model) else kept
    return "copy"


def check_weighted_reference(dataset: RowDataset, args: PreferenceConfig) -> None:
    """Raise ValueError for reference sums that are weighted otherwise than the run's own."""
    reads = args.needs_reference and args.reference in ("auto", "precomputed")
    if not (reads and dataset.has_reference):
        return
    weighted: Any = dataset.numbers.get(LD_COLUMN, torch.full((len(dataset),), torch.nan))
    alpha = torch.tensor(torch.nan if args.ld_alpha is None else float(args.ld_alpha))
    if not torch.allclose(weighted, alpha.expand_as(weighted), rtol=1e-6, atol=0, equal_nan=True):
        found = sorted({f"{value:g}" for value in weighted.tolist()} - {"nan"})
        raise ValueError(
            f"dataset: got reference log-probabilities made with ld_alpha={', '.join(found) or None}, wanted "
            f"{args.ld_alpha}, the run's own: what the tokens of a sum were is not known any more; give data "
            "without these columns, or reference='copy' or 'adapter'"
        )


def reference_model(kind: str, policy: nn.Module, given: nn.Module | None) -> nn.Module | None:
    """The model that is never trained, without gradients and dropout: the one given, a copy, or None.

    Raises:
        ValueError: a copy of a model that cannot be copied.
    """
    if given is None and kind == "copy":
        given = copied(policy)
    return None if given is None else given.requires_grad_(False).eval()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0, modules and the probabilities attention layers keep."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            # attention_dropout, activation_dropout, layerdrop, resid_pdrop, ...
            if isinstance(value, float) and ("dropout" in name or name.endswith("drop")):
                setattr(module, name, 0.0)


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The model without its adapter and without dropout, as long as the context lasts."""
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(was_training)


class Reference:
    """What the losses want of other models than the policy: reference log-probabilities, or distributions.

    Args:
        kind: what ``choose_reference`` returned.
        model: the second copy, or None where ``kind`` has none.
        teacher: the model that the losses distil, or None.
        vocab_size: of all models with divergences, where their heads differ in size.
    """

    def __init__(
        self,
        kind: str,
        model: nn.Module | None = None,
        *,
        teacher: nn.Module | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.kind, self.model = kind, model
        self.teacher, self.vocab_size = teacher, vocab_size

    @torch.no_grad()
    def logps(self, policy: nn.Module, batch: Batch) -> Tensor | None:
        """What the losses want of the reference (``scoring.reference_values``: ``(2P,)`` for pairs), or None.

        ``policy`` is the unwrapped policy.
        """
        if self.kind == "none":
            return None
        if self.kind == "precomputed":
            given = batch.ref_logps
            if given is not None and batch.kind.reference_per == "token" and batch.mask.dim() == 2:
                given = torch.zeros_like(batch.mask, dtype=given.dtype).masked_scatter(batch.mask, given)
            return given
        return self._run(reference_values, policy, batch)

    @torch.no_grad()
    def mismatched_logps(self, policy: nn.Module, mismatched: Padded, given: Tensor | None) -> Tensor:
        """``(R,)`` of each prompt with a mismatched answer; ``given`` is what the data has of them."""
        if self.kind == "precomputed":
            assert given is not None
            return given.to(mismatched.labels.device)
        return self._run(sequence_logps, policy, mismatched)

    @torch.no_grad()
    def states(self, policy: nn.Module, batch: Batch) -> HeadStates:
        """What the reference's head sees, for losses with divergences; of a copy or without the adapter."""
        return self._run(head_states, policy, batch)

    @torch.no_grad()
    def teachers(
        self, policy: nn.Module, batch: Batch, combination: TeacherCombination | None = None, **settings: Any
    ) -> Teachers:
        """What the divergences are from: the reference, the teacher, or both, as ``combination`` says.

        ``settings`` are further ones of ``Teachers``.
        """
        if self.teacher is None:
            return Teachers(self.states(policy, batch), vocab_size=self.vocab_size)
        second = None if combination is None else self.states(policy, batch)
        return Teachers(head_states(self.teacher, batch), second, combination, self.vocab_size, **settings)

    def _run(self, score: Callable[[nn.Module, Any], Result], policy: nn.Module, batch: Any) -> Result:
        if self.kind == "copy":
            assert self.model is not None
            return score(self.model, batch)
        with adapter_off(policy):
            return score(policy, batch)
