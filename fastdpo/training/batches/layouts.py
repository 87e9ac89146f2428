"""Which layout a run's batches have: what settings ask for, models allow, and the planner predicts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastdpo.integrations.backbone_config import backbone_size, text_config
from fastdpo.integrations.engines import FSDP2, engine_around, reshard
from fastdpo.integrations.forest.attention import own_attention
from fastdpo.integrations.lm_head import wrappers_and_model
from fastdpo.integrations.partitioned import gathered_in_calls
from fastdpo.integrations.processor import ImageTokens, sees
from fastdpo.integrations.virtual_tokens import has_virtual_tokens
from fastdpo.training.batches.budget import TokenBudget, training_sampler
from fastdpo.training.batches.collate import PaddedCollator, RowCollator
from fastdpo.training.batches.plan import RowCosts, padded_cost
from fastdpo.training.batches.probe import refusals
from fastdpo.training.batches.router import router_coefficient
from fastdpo.training.batches.samplers import LikeLengthSampler
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.model_fit import fitting_pad_id
from fastdpo.training.settings.checkpointing import recomputes_activations
from fastdpo.training.settings.choices import ARRANGEMENTS, ARRANGEMENTS_OF
from fastdpo.training.settings.config import PreferenceConfig

logger = logging.getLogger(__name__)

Collator: TypeAlias = PaddedCollator | RowCollator
# What the planner assumes of a machine: seconds that a call spends in each layer whatever its size, and
# products a second in fp32 or 16 bits. Only their ratio to a token's time matters, and only roughly.
_LAYER_SECONDS = {"cpu": 3e-4, "cuda": 3e-4}
_FLOPS = {"cpu": 4e10, "cuda": 2e14}
# Products of attention run at a fraction of the speed of the large matrix products: on one core with a dense
# mask, 40 GFLOPS with heads of 64 and 20 to 27 with heads of 16, where matrix products reach 44 and more.
_ATTENTION_SLOWDOWN = 1.5
# On a CPU, 8 sequences of about 740 tokens took 24 s in a call each and 34 s in 4 buckets (12 layers of 512).
_LARGE_CALL = {"cpu": 1.1}
# Attention implementations that leave out what padding hides.
_SKIP_MASKED = ("flash_attention", "flex_attention")
_SAMPLED_BATCHES = 32
_VIRTUAL_TOKENS = "PEFT puts its virtual tokens before padded rows only"
_ONE_CALL = "separate: several calls of the backbone a step, which re-entrant checkpointing in DDP forbids"


def choose_collator(
    models: Sequence[nn.Module],
    args: PreferenceConfig,
    pad_token_id: int,
    dataset: RowDataset | None,
    accelerator: Any,
    images: ImageTokens | None = None,
    *,
    has_images: bool = False,
) -> Collator:
    """The collator of a run, after the models have shown which layouts change nothing.

    Args:
        models: the policy, and the reference where it is another model; patched, on their devices.
        dataset: the pairs that the run is about; None before any are known.
        images: the processor of models that see images.
        has_images: whether rows have some, so that layouts are tried with them; else none may come.

    Raises:
        ValueError: the layout asked for changes a model's results, or cannot be arranged; says why.
    """
    pad_token_id = fitting_pad_id(pad_token_id, models)
    images = images if all(map(sees, models)) else None
    padded = replace(padded_collator(args, pad_token_id), images=images)
    if args.batch_layout == "padded":
        return padded
    costs = row_costs(models[0])
    layouts: tuple[str, ...] = (
        ("shared_prompt", "packed") if args.batch_layout == "auto" else (args.batch_layout,)
    )

    asked: tuple[str, ...] = ARRANGEMENTS if args.row_arrangement == "auto" else (args.row_arrangement,)
    has_router = router_coefficient(args, models[0]) != 0
    if has_router and args.batch_layout == "auto":
        layouts = ("packed",)  # each token of each sequence counts
    context = args.context()
    if context is not None or has_router:
        asked = tuple(name for name in asked if name != "bucketed")
    single_call = _is_single_call(args, accelerator)
    if single_call:
        asked = tuple(name for name in asked if name != "separate")
    longest = (args.max_length or 0) if dataset is None else int(dataset.lengths.max())
    tried = images if has_images else None
    refused = _refusals(
        models, layouts, asked, longest, accelerator, is_carried=context is not None, images=tried
    )
    collators: list[Collator] = []
    for layout in layouts:
        allowed = tuple(name for case, name in refused if case == layout and refused[case, name] is None)
        if allowed:
            collators.append(
                RowCollator(
                    pad_token_id, layout, costs, allowed, single_call, args.pad_to_multiple_of,
                    ld_alpha=args.ld_alpha, nll_on_prompt=bool(args.nll_on_prompt), kind=args.data_kind,
                    context=context, images=tried,
                )
            )  # fmt: skip
    for (layout, name), reason in refused.items():
        if reason is not None and accelerator.is_main_process:
            logger.warning("batch_layout %s, row_arrangement %s: refused: %s", layout, name, reason)
    if args.batch_layout == "auto":
        chosen = _cheapest([*collators] if context else [padded, *collators], costs, dataset, args)
    elif collators:
        (chosen,) = collators
    else:
        reasons = "; ".join(f"{name}: {reason}" for (_, name), reason in refused.items())
        raise ValueError(
            f"batch_layout: got {args.batch_layout!r}, which this model cannot be trained in "
            f"({reasons or _ONE_CALL}); wanted 'padded' or 'auto'"
        )
    if accelerator.is_main_process:
        logger.info("batches are %s", describe(chosen))
    return chosen


def padded_collator(args: PreferenceConfig, pad_token_id: int) -> PaddedCollator:
    """The collator of padded batches for the losses' data."""
    return PaddedCollator(pad_token_id, args.pad_to_multiple_of, args.ld_alpha, args.data_kind)


def layout_of(collator: Any) -> str:
    """``padded``, ``packed`` or ``shared_prompt``."""
    return collator.layout if isinstance(collator, RowCollator) else "padded"


def token_budget(args: PreferenceConfig, collator: Any) -> TokenBudget | None:
    """The budget of a batch, where the settings have one."""
    if args.max_tokens_per_batch is None:
        return None
    return TokenBudget(args.max_tokens_per_batch, layout_of(collator), args.pad_to_multiple_of or 1)


def describe(collator: Collator) -> str:
    """One line for the log."""
    if isinstance(collator, RowCollator):
        return f"{collator.layout}, in rows arranged as {' or '.join(collator.arrangements)}"
    return "padded"


def row_costs(model: nn.Module) -> RowCosts:
    """What the planner needs to know of a model on its device."""
    size = backbone_size(model)
    device = next(model.parameters()).device.type
    token = 2.0 * size.parameters  # products of one token's forward pass; the backward pass keeps the ratios
    call = size.layers * _LAYER_SECONDS.get(device, 3e-4) * _FLOPS.get(device, 2e14)
    pair = 4.0 * size.layers * size.attention_width * _ATTENTION_SLOWDOWN
    skips_masked = own_attention(text_config(model)).startswith(_SKIP_MASKED)
    return RowCosts(call / token, pair / token, skips_masked, _LARGE_CALL.get(device, 1.0))


def _refusals(
    models: Sequence[nn.Module],
    layouts: Sequence[str],
    arrangements: Sequence[str],
    longest: int,
    accelerator: Any,
    *,
    is_carried: bool,
    images: ImageTokens | None,
) -> dict[tuple[str, str], str | None]:
    """Why each layout and arrangement will not do, for any model on any rank."""
    candidates = [
        (layout, name) for layout in layouts for name in arrangements if name in ARRANGEMENTS_OF[layout]
    ]
    found: dict[tuple[str, str], str | None] = dict.fromkeys(candidates)
    for model in models:
        # FSDP2's units learn in a whole call which is the outermost, and of one that is cut short some wait
        # for the call of their head: one whole call before the backbone's own, and one behind them.
        is_in_units = engine_around(model) == FSDP2
        if is_in_units:
            _call_whole(model, accelerator.device)
        # Flash attention has no fp32; elsewhere the weights' own precision shows more.
        is_flash = own_attention(text_config(model)).startswith("flash_attention")
        if any(has_virtual_tokens(wrapper) for wrapper in wrappers_and_model(model)):
            verdicts: dict[tuple[str, str], str | None] = dict.fromkeys(candidates, _VIRTUAL_TOKENS)
        else:
            precision = accelerator.autocast() if is_flash else contextlib.nullcontext()
            with gathered_in_calls(model), precision:
                verdicts = refusals(model, candidates, longest=longest, is_carried=is_carried, images=images)
        if is_in_units:
            _call_whole(model, accelerator.device)
            reshard(model)
        found = {key: found[key] or verdicts[key] for key in candidates}
    if accelerator.num_processes > 1 and candidates:
        is_bad = torch.tensor([found[key] is not None for key in candidates], device=accelerator.device)
        for key, count in zip(candidates, accelerator.reduce(is_bad.int(), reduction="sum"), strict=True):
            if count > 0 and found[key] is None:
                found[key] = "another rank refuses it"
    return found


@torch.no_grad()
def _call_whole(model: nn.Module, device: torch.device) -> None:
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device))


def _is_single_call(args: PreferenceConfig, accelerator: Any) -> bool:
    """Whether the backbone may run only once a step.

    Re-entrant checkpointing runs a backward pass per call, and DDP counts a parameter that gets its gradient
    twice as an error.
    """
    options: dict[str, Any] = {}
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        options |= getattr(args, name, None) or {}
    is_reentrant = recomputes_activations(args) and bool(options.get("use_reentrant", False))
    return is_reentrant and accelerator.num_processes > 1


def _cheapest(
    collators: Sequence[Collator],
    costs: RowCosts,
    dataset: RowDataset | None,
    args: PreferenceConfig,
) -> Collator:
    """The layout with the least predicted cost per pair, over some batches of the data."""
    if dataset is None:
        return collators[-1]
    predicted = {layout_of(c): predicted_cost(c, costs, dataset, args) for c in collators}
    for layout, cost in predicted.items():
        logger.info("batch_layout %s: predicted cost %.0f tokens a row", layout, cost)
    return min(collators, key=lambda collator: predicted[layout_of(collator)])


def predicted_cost(
    collator: Collator,
    costs: RowCosts,
    dataset: RowDataset,
    args: PreferenceConfig,
) -> float:
    """Predicted cost of a pair (or row), in tokens, over the first batches of the first epoch."""
    multiple = args.pad_to_multiple_of or 1
    total, pairs = 0.0, 0
    for batch in first_batches(dataset, token_budget(args, collator), args)[:_SAMPLED_BATCHES]:
        if isinstance(collator, RowCollator):
            total += collator.plan([dataset[int(i)] for i in batch]).cost
        else:
            lengths = [prompt + n for prompt, *answers in dataset.sizes(batch) for n in answers]
            total += padded_cost(lengths, costs, multiple_of=multiple)
        pairs += len(batch)
    return total / pairs


def first_batches(dataset: RowDataset, budget: TokenBudget | None, args: PreferenceConfig) -> list[Tensor]:
    """The pairs (or rows) of every batch of the first epoch, as the samplers of training make them."""
    if budget is not None:
        return [torch.tensor(batch) for batch in training_sampler(dataset, budget, args) if batch]
    if args.train_sampling_strategy == "sequential":
        order = torch.arange(len(dataset))
    elif args.train_sampling_strategy == "group_by_length":
        order = torch.tensor(list(like_length_sampler(dataset, args)))
    else:  # what accelerate makes of the trainer's random sampler
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(_seed(args)))
    return list(order.split(args.train_batch_size))


def like_length_sampler(dataset: RowDataset, args: PreferenceConfig) -> LikeLengthSampler:
    """The sampler of ``group_by_length``: groups are the pairs of an optimiser step."""
    group = args.train_batch_size * args.gradient_accumulation_steps
    return LikeLengthSampler(group, dataset.lengths.tolist(), seed=_seed(args))


def _seed(args: PreferenceConfig) -> int:
    return args.seed if args.data_seed is None else args.data_seed
