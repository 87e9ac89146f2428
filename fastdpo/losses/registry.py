"""``LOSSES``: the one list of losses, and ``preference_loss``, which adds to it.

A loss is one decorated function from ``PairLogps`` to one number per pair. Everything else is read
from it: its options, their types and defaults from the keyword-only parameters, their legal ranges
from the annotations, what it accepts per pair from the reserved names among them (``PER_PAIR``), its
row in the README from the docstring's first line. Tests and command-line flags iterate ``LOSSES``.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias, TypeVar, get_type_hints

from torch import Tensor

Loss = TypeVar("Loss", bound=Callable[..., Tensor])

# Keyword-only parameters with these names are no options: they take a number or a (P,) tensor, and a
# loss that has no such parameter refuses them.
PER_PAIR = ("beta", "margin", "soft_labels")

# What a loss needs beside its own row, and what its sum over the batch is divided by:
#   token   nothing;            the number of NLL tokens
#   pair    nothing;            the number of pairs
#   batch   the local batch;    the number of pairs
#   global  every rank's batch; the number of pairs
SCOPES = ("token", "pair", "batch", "global")


@dataclass(frozen=True)
class Interval:
    """The legal range of a number, as the metadata of an ``Annotated`` option; ``[low, high)`` by default."""

    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = False

    def __contains__(self, value: float) -> bool:
        is_above = self.low < value or (self.includes_low and value == self.low)
        is_below = value < self.high or (self.includes_high and value == self.high)
        return math.isfinite(value) and is_above and is_below

    def __str__(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "a finite number"
        left, right = "[" if self.includes_low else "(", "]" if self.includes_high else ")"
        return f"a number in {left}{self.low:g}, {self.high:g}{right}"


FlipProbability: TypeAlias = Annotated[float, Interval(0.0, 0.5)]
NonNegative: TypeAlias = Annotated[float, Interval(0.0)]
Positive: TypeAlias = Annotated[float, Interval(0.0, includes_low=False)]


@dataclass(frozen=True)
class LossOption:
    """One option of a loss: a keyword-only parameter of its function."""

    name: str
    type: type  # bool, int, float or str
    default: Any
    interval: Interval | None = None

    def convert(self, value: Any) -> Any:
        """``value`` in the option's type. Raises ValueError for another type or out of range."""
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.type is float and is_number:
            value = float(value)
        elif type(value) is not self.type:
            raise ValueError(f"{self.name}: got {value!r}, wanted {self.type.__name__}")
        if self.interval is not None and value not in self.interval:
            raise ValueError(f"{self.name}: got {value!r}, wanted {self.interval}")
        return value


@dataclass(frozen=True)
class Example:
    """One pair whose loss was worked out by hand: sums in nats, token counts, options, the loss."""

    loss: float
    chosen: float
    rejected: float
    ref_chosen: float = 0.0
    ref_rejected: float = 0.0
    chosen_tokens: int = 1
    rejected_tokens: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossSpec:
    """All there is to know of a registered loss; see ``preference_loss`` for the fields."""

    name: str
    function: Callable[..., Tensor]
    summary: str
    paper: str
    example: Example
    scope: str
    uses_reference: bool
    length_normalized: bool
    shift_invariant: bool
    aliases: tuple[str, ...]
    options: tuple[LossOption, ...]
    per_pair: frozenset[str]  # those of PER_PAIR that it takes
    default_beta: float | None  # None: the loss has no beta


LOSSES: dict[str, LossSpec] = {}


def preference_loss(
    name: str,
    *,
    paper: str,
    example: Example,
    scope: str = "pair",
    uses_reference: bool = True,
    length_normalized: bool = False,
    shift_invariant: bool = False,
    aliases: tuple[str, ...] = (),
) -> Callable[[Loss], Loss]:
    """Register the decorated function as a loss; it stays an ordinary function.

    The function takes a ``PairLogps`` and returns ``(P,)``, one number per pair. Its options are
    keyword-only, each with a default of type bool, int, float or str, and an ``Interval`` in its
    annotation where it has a range. ``beta``, ``margin`` and ``soft_labels`` may be ``(P,)`` tensors.

    Args:
        name: what users write in ``loss_type``.
        paper: arXiv id and equation.
        example: one pair worked out by hand; the automatic test holds the function to it.
        scope: one of ``SCOPES``. A ``token`` loss returns sums over tokens, which are divided by the
            number of NLL tokens of the batch; every other scope is a mean over pairs.
        uses_reference: whether reference log-probabilities are needed (else they are refused).
        length_normalized: whether it works on per-token means.
        shift_invariant: claims that a constant added to both reference sums changes nothing.
        aliases: other names for it.

    Raises:
        ValueError: a name that is taken, an unknown scope, a parameter without a usable default.
    """

    def register(function: Loss) -> Loss:
        taken = {other for spec in LOSSES.values() for other in (spec.name, *spec.aliases)}
        for new in (name, *aliases):
            if new in taken:
                raise ValueError(
                    f"preference_loss: got {new!r}, which is registered already, wanted a new name"
                )
        if scope not in SCOPES:
            raise ValueError(f"preference_loss {name!r}: got scope {scope!r}, wanted one of {SCOPES}")
        parameters = _keyword_only(name, function)
        beta = parameters.get("beta")
        LOSSES[name] = LossSpec(
            name=name,
            function=function,
            summary=(inspect.getdoc(function) or "").split("\n", 1)[0],
            paper=paper,
            example=example,
            scope=scope,
            uses_reference=uses_reference,
            length_normalized=length_normalized,
            shift_invariant=shift_invariant,
            aliases=aliases,
            options=tuple(option for option in parameters.values() if option.name not in PER_PAIR),
            per_pair=frozenset(PER_PAIR) & set(parameters),
            default_beta=None if beta is None else beta.default,
        )
        return function

    return register


def _keyword_only(name: str, function: Callable[..., Tensor]) -> dict[str, LossOption]:
    """The parameters after the first, as options; per-pair ones have a number or None as default."""
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise ValueError(f"preference_loss {name!r}: got no first parameter, wanted one for the PairLogps")
    annotations = get_type_hints(function, include_extras=True)
    options = {}
    for parameter in parameters[1:]:
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            raise ValueError(f"preference_loss {name!r}: got parameter {parameter}, wanted it keyword-only")
        default = parameter.default
        if parameter.name not in PER_PAIR and type(default) not in (bool, int, float, str):
            wanted = "a default of type bool, int, float or str"
            raise ValueError(f"preference_loss {name!r}: got parameter {parameter}, wanted {wanted}")
        metadata = getattr(annotations.get(parameter.name), "__metadata__", ())
        interval = next((item for item in metadata if isinstance(item, Interval)), None)
        if interval is None and type(default) is float:
            interval = Interval()  # finite
        options[parameter.name] = LossOption(parameter.name, type(default), default, interval)
    return options


def find_loss(name: str) -> LossSpec:
    """The loss of that name or alias. Raises ValueError naming the known ones and the nearest."""
    for spec in LOSSES.values():
        if name == spec.name or name in spec.aliases:
            return spec
    near = difflib.get_close_matches(str(name), list(LOSSES), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"loss_type: got {name!r}, wanted one of {', '.join(sorted(LOSSES))}{hint}")


def loss_options() -> dict[str, dict[str, LossOption]]:
    """Every option of every loss: option name -> loss name -> option. For command-line flags."""
    options: dict[str, dict[str, LossOption]] = {}
    for spec in LOSSES.values():
        for option in spec.options:
            options.setdefault(option.name, {})[spec.name] = option
    return options


def losses_table() -> str:
    """The registry as a Markdown table, a row per loss."""
    rows = ["| `loss_type` | what it is | reference | defaults | source |", "|---|---|---|---|---|"]
    for spec in LOSSES.values():
        defaults = [] if spec.default_beta is None else [f"`beta={spec.default_beta:g}`"]
        defaults += [f"`{option.name}={option.default}`" for option in spec.options]
        cells = (
            f"`{spec.name}`" + "".join(f" (`{alias}`)" for alias in spec.aliases),
            spec.summary,
            "yes" if spec.uses_reference else "no",
            ", ".join(defaults) or "none",
            spec.paper,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
