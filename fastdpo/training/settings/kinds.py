"""The kinds of data a run may have. The losses decide which, and a run has one.

| kind | columns beside ``prompt`` | a row of the loss |
|---|---|---|
| paired | ``chosen``, ``rejected``; TPO's gold answer in a third | the pair |
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
        inputs: the batches that its losses take.
        columns: of a row, for messages.
        has_pieces: whether the answer is one, given in pieces that are judged one by one.
        reference_per: what a number of the reference is of: ``answer``, ``piece`` or ``token``.
    """

    name: str
    inputs: tuple[type, ...]
    columns: tuple[str, ...]
    has_pieces: bool = False
    reference_per: str = "answer"

    @property
    def is_paired(self) -> bool:
        """Whether rows are pairs: their answers have roles, and a batch has all chosen ones first."""
        return self == PAIRS  # a batch of a worker has a copy

    @property
    def unit(self) -> str:
        """What messages call its rows."""
        return "pairs" if self.is_paired else "rows"

    def __str__(self) -> str:
        return "pairs" if self.is_paired else f"{self.name} data"


# Losses of the second kind of batch look at the reference's distributions too.
PAIRS = DataKind("paired", (PairLogps, DivergencePairLogps), ("prompt", "chosen", "rejected"))
KINDS = {
    kind.name: kind
    for kind in (
        PAIRS,
        DataKind("unpaired", (UnpairedLogps,), ("prompt", "completion", "label")),
        DataKind("listwise", (ListLogps,), ("prompt", "completions", "scores")),
        DataKind("ranking", (ListLogps,), ("prompt", "completion", "scores"), True, "piece"),
        DataKind("steps", (StepLogps,), ("prompt", "completion", "advantages"), True, "piece"),
        DataKind("samples", (TokenLogps,), ("prompt", "completion", "win_rate"), False, "token"),
        DataKind("prompt-completion", (TokenDivergences,), ("prompt", "completion")),
    )
}
# Losses of lists whose items are pieces of one answer.
_WITHIN_AN_ANSWER = ("in_context_ranking",)
# Losses of lists of exactly so many candidates, in an order that says what each is.
_SIZES = {"wrpo": 3}


def kind_of(losses: Sequence[LossSpec]) -> DataKind:
    """The kind of data that losses take.

    Raises:
        ValueError: losses of different kinds, or of one that is not for the loop; names them.
    """
    found = {spec.name: _kind_of_loss(spec) for spec in losses}
    if not found:
        raise ValueError("loss_type: got none, wanted the name of a loss, or several")
    if len(set(found.values())) > 1:
        got = ", ".join(f"{name} of {kind.name}" for name, kind in found.items())
        raise ValueError(f"loss_type: got {got} data, wanted losses of one kind of data")
    return next(iter(found.values()))


def list_size(losses: Sequence[LossSpec]) -> int | None:
    """How many candidates a list must have; None where any number from two will do."""
    return next((_SIZES[spec.name] for spec in losses if spec.name in _SIZES), None)


def _kind_of_loss(spec: LossSpec) -> DataKind:
    if spec.name in _WITHIN_AN_ANSWER:
        return KINDS["ranking"]
    for kind in KINDS.values():
        if spec.inputs in kind.inputs:
            return kind
    raise ValueError(
        f"loss_type: got {spec.name!r}, which takes {spec.inputs.__name__}, wanted another: the loop has no "
        "data of that kind"
    )
