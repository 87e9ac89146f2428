"""What the tests of the losses share: random pairs, and every registered loss with every option moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.losses import (
    LOSSES,
    BatchExample,
    LossOption,
    LossSpec,
    Objective,
    PairLogps,
    build_objective,
    find_loss,
)

ALL_LOSSES = sorted(LOSSES)
PAIRED = sorted(name for name, spec in LOSSES.items() if spec.inputs is PairLogps)


def random_pair(
    spec: LossSpec | None = None, *, pairs: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> PairLogps:
    """Margins of both signs and not saturated; chosen and rejected require gradients.

    Without a reference where the loss takes none.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float, offset: float) -> Tensor:
        return (scale * torch.randn(pairs, generator=generator, dtype=torch.float64) + offset).to(dtype)

    ref_chosen, ref_rejected = draw(10, -60), draw(10, -60)
    tokens = torch.randint(1, 40, (2, pairs), generator=generator).to(dtype)
    with_reference = spec is None or spec.uses_reference
    return PairLogps(
        chosen=(ref_chosen + draw(8, 0)).requires_grad_(),
        rejected=(ref_rejected + draw(8, 0)).requires_grad_(),
        chosen_tokens=tokens[0],
        rejected_tokens=tokens[1],
        ref_chosen=ref_chosen if with_reference else None,
        ref_rejected=ref_rejected if with_reference else None,
    )


def example_batch(spec: LossSpec) -> Any:
    """The batch of the loss's hand-computed example."""
    example = spec.example
    if isinstance(example, BatchExample):
        return example.batch()
    assert example is not None
    return PairLogps(
        *(
            None if value is None else torch.tensor([value], dtype=torch.float64)
            for value in (
                example.chosen,
                example.rejected,
                example.chosen_tokens,
                example.rejected_tokens,
                example.ref_chosen if spec.uses_reference else None,
                example.ref_rejected if spec.uses_reference else None,
            )
        )
    )


def needed(name: str, rows: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Numbers per row without which the loss cannot be computed."""
    numbers = {
        "reward_gap": torch.linspace(-1.5, 2.0, rows, dtype=dtype),
        "chosen_is_reference": torch.arange(rows) % 2 * torch.ones((), dtype=dtype),
    }
    return {key: value for key, value in numbers.items() if key in LOSSES[name].needs}


def made(name: str, rows: int, **arguments: Any) -> Objective:
    """The objective of one loss, with what it needs."""
    plain = find_loss(name).name
    return build_objective(name, **(needed(plain, rows) | arguments))


def mean_loss(name: str, pair: Any, **arguments: Any) -> Tensor:
    return made(name, pair.num_rows, **arguments).loss(pair)


def row_losses(name: str, batch: Any, arguments: dict[str, Any]) -> Tensor:
    """What the loss's function returns: a number per row, without the NLL term that it may come with."""
    own = {key: value for key, value in arguments.items() if key != "nll_weight"}
    return LOSSES[name].function(batch, **(needed(name, batch.num_rows, batch.logps_like.dtype) | own))


# Options that mean something only beside another.
COMPANIONS: dict[str, dict[str, Any]] = {
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
}


def variants(spec: LossSpec, pairs: int = 5) -> list[dict[str, Any]]:
    """The defaults, then every option and per-pair argument of the loss moved off its default."""
    per_pair = {
        "beta": torch.linspace(0.05, 0.5, pairs, dtype=torch.float64),
        "margin": torch.linspace(-1.0, 2.0, pairs, dtype=torch.float64),
        "soft_labels": torch.linspace(0.0, 1.0, pairs, dtype=torch.float64),
        "reward_gap": torch.linspace(2.0, -1.0, pairs, dtype=torch.float64),
        "chosen_is_reference": (torch.arange(pairs) < 2).double(),
        "chosen_win_rate": torch.linspace(0.4, 1.0, pairs, dtype=torch.float64),
    }
    beside = {"chosen_win_rate": {"rejected_win_rate": torch.linspace(0.6, 0.0, pairs, dtype=torch.float64)}}
    names = sorted(spec.per_pair & per_pair.keys())
    moved = [
        {option.name: value} | COMPANIONS.get(option.name, {})
        for option in spec.options
        for value in _other_values(option)
    ]
    return [{}, *moved, *({name: per_pair[name]} | beside.get(name, {}) for name in names)]


def _other_values(option: LossOption) -> list[Any]:
    if option.type is bool:
        return [not option.default]
    if option.choices:
        return [choice for choice in option.choices if choice != option.default]
    assert option.type is float and option.interval is not None, f"say how to move {option}"
    for candidate in (0.3, 1.7, -0.3):
        if candidate in option.interval and candidate != option.default:
            return [candidate]
    raise AssertionError(f"no legal value to move {option} to")


def with_ids(losses: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Every variant of every loss, for ``parametrize``."""
    return [(name, variant) for name in losses for variant in variants(LOSSES[name])]


def variant_id(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "+".join(f"{k}={v}" if isinstance(v, str) else k for k, v in value.items()) or "defaults"
