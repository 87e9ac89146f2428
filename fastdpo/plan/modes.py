"""Which mode runs, from the one asked for and what needs a gradient: nothing imported."""

from __future__ import annotations

# Mode `lean` where hidden alone needs a gradient: its forward pass makes D W wherever it has logits.
LEAN_STASH = "lean_stash"


def resolve_mode(
    mode: str,
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool = False,
    entropy_requires_grad: bool = False,
    cache_mib: int = 1024,
    has_row_loss: bool = False,
    holds_a_row: bool = True,
) -> str:
    """The mode that runs, from the one asked for and what needs a gradient.

    Without any gradient to compute every mode is ``score``: the modes differ in the backward pass only.
    ``has_row_loss``: the loss is known to the call and each row's share of it depends on that row alone: on a
    pair, an answer, a list or a step.

    Raises:
        ValueError: the mode asked for cannot give the gradients needed, or is not supported.
    """
    if mode == "pairs" and not has_row_loss:
        raise ValueError(
            "mode: 'pairs' needs fused_dpo_loss or fused_preference_loss, losses of scope 'pair' or 'token' "
            "that pass no gradient to their own arguments, operands other than float16, and a head that is "
            "whole; use 'auto' or 'cache'"
        )
    # Not `score` without gradients: a reference must get the bits of its policy, and as little memory.
    if mode == "lean" or (mode == "auto" and not holds_a_row):
        return "lean"
    trains_head = needs_weight or needs_bias
    if not (needs_hidden or trains_head):
        return "score"
    if mode == "auto":
        if entropy_requires_grad or (trains_head and cache_mib == 0):
            return "recompute"
        if trains_head:
            return "pairs" if has_row_loss else "cache"
        return "stash"
    if mode == "score":
        raise ValueError("mode: got 'score', which has no backward pass, but an input requires a gradient")
    if mode == "stash" and trains_head:
        raise ValueError(
            "mode: got 'stash', which has no gradient for the head, but its weight or bias requires one"
        )
    if entropy_requires_grad and mode != "recompute":
        raise ValueError(f"mode: a differentiable entropy needs 'recompute' (or 'auto'), got {mode!r}")
    return mode


def settled_run(mode: str, *, needs_hidden: bool, trains_head: bool, entropy_requires_grad: bool) -> str:
    """What runs as a mode that ``resolve_mode`` has settled: ``lean`` is two, by what needs a gradient."""
    is_stash = needs_hidden and not trains_head and not entropy_requires_grad
    return LEAN_STASH if mode == "lean" and is_stash else mode
