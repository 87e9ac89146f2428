"""The kinds of data a run may have. The losses decide which: a run has one kind, pairs or one of ``KINDS``.

| kind | columns beside ``prompt`` | a row of the loss |
|---|---|---|
| unpaired | ``completion``, ``label``; or ``chosen``, ``rejected``, which make two rows | an answer |
| listwise | ``completions``, ``scores`` or ``ranks`` | the list |
| ranking | ``completion`` as a list of strings, ``scores`` or ``ranks`` of these | the list |
| steps | ``completion`` as a list of strings, ``advantages`` of these | a step |
| samples | ``completion``, ``win_rate`` | an answer |
| prompt-completion | ``completion``; or ``chosen``, and ``rejected``, which is left aside | an answer |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastdpo.losses import (
    DivergencePairLogps,
    ListLogps,
    LossSpec,
    PairLogps,
    StepLogps,
    TokenDivergences,
    TokenLogps,
    UnpairedLogps,
)


@dataclass(frozen=True)
class DataKind:
    """One kind of data.

    Args:
        name: a name of the table above.
        inputs: the batch that its losses take.
        columns: of a row, for messages.
        has_pieces: whether the answer is one, given in pieces that are judged one by one.
        reference_per: what a number of the reference is of: ``answer``, ``piece`` or ``token``.
    """

    name: str
    inputs: type
    columns: tuple[str, ...]
    has_pieces: bool = False
    reference_per: str = "answer"


KINDS = {
    kind.name: kind
    for kind in (
        DataKind("unpaired", UnpairedLogps, ("prompt", "completion", "label")),
        DataKind("listwise", ListLogps, ("prompt", "completions", "scores")),
        DataKind("ranking", ListLogps, ("prompt", "completion", "scores"), True, "piece"),
        DataKind("steps", StepLogps, ("prompt", "completion", "advantages"), True, "piece"),
        DataKind("samples", TokenLogps, ("prompt", "completion", "win_rate"), False, "token"),
        DataKind("prompt-completion", TokenDivergences, ("prompt", "completion")),
    )
}
# What losses of pairs take; those of the second kind look at the reference's distributions too.
PAIRED = (PairLogps, DivergencePairLogps)
# Losses of lists whose items are pieces of one answer.
_WITHIN_AN_ANSWER = ("in_context_ranking",)
# Losses of lists of exactly so many candidates, in an order that says what each is.
_SIZES = {"wrpo": 3}


def kind_of(losses: Sequence[LossSpec]) -> DataKind | None:
    """The kind of data that losses take; None for pairs.

    Raises:
        ValueError: losses of different kinds, or of one that is not for the loop; names them.
    """
    found = {spec.name: _kind_of_loss(spec) for spec in losses}
    kinds = set(found.values())
    if len(kinds) > 1:
        got = ", ".join(
            f"{name} of {'paired' if kind is None else kind.name}" for name, kind in found.items()
        )
        raise ValueError(f"loss_type: got {got} data, wanted losses of one kind of data")
    return kinds.pop() if kinds else None


def list_size(losses: Sequence[LossSpec]) -> int | None:
    """How many candidates a list must have; None where any number from two will do."""
    return next((_SIZES[spec.name] for spec in losses if spec.name in _SIZES), None)


def _kind_of_loss(spec: LossSpec) -> DataKind | None:
    if spec.inputs in PAIRED:
        return None
    if spec.name in _WITHIN_AN_ANSWER:
        return KINDS["ranking"]
    for kind in KINDS.values():
        if spec.inputs is kind.inputs:
            return kind
    raise ValueError(
        f"loss_type: got {spec.name!r}, which takes {spec.inputs.__name__}, wanted another: the loop has no "
        "data of that kind"
    )
