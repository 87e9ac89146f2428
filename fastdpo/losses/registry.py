"""``LOSSES``: the one list of losses, and ``preference_loss``, which adds to it.

A loss is one decorated function from the log-probabilities of a batch (``PairLogps``, or what its
``kind`` says) to one number per row: per pair, group, answer or sequence. Everything else is read
from it: its options, their types and defaults from the keyword-only parameters, their legal ranges
from the annotations, what it accepts per row from the reserved names among them (``PER_PAIR``), its
row in docs/losses.md from the docstring's first line. Tests and command-line flags iterate ``LOSSES``.

Each is finite, value and gradient, in fp32: for log-probabilities up to 1e4 nats of either sign, and beta and
options of any legal value from 1e-4 to 1e4. Exponents that would take it beyond are cut off.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

from fastdpo.losses.inputs import PairLogps
from fastdpo.losses.ranges import FINITE, NOT_NEGATIVE, POSITIVE, PROBABILITY, Interval

Loss = TypeVar("Loss", bound=Callable[..., Tensor])

# Keyword-only parameters with these names are no options: they take a number or a (P,) tensor, and a
# loss that has no such parameter refuses them.
WIN_RATES = ("chosen_win_rate", "rejected_win_rate")
PER_PAIR = ("beta", "margin", "soft_labels", "reward_gap", *WIN_RATES, "chosen_is_reference")

# What a loss needs beside its own row, and what its sum over the batch is divided by (a row is a pair,
# or whatever the loss returns a number for):
#   token   nothing;            the number of NLL tokens
#   pair    nothing;            the number of rows
#   batch   the local batch;    the number of rows
#   global  every rank's batch; the number of rows
SCOPES = ("token", "pair", "batch", "global")

# What a loss is a function of, and what its rows are:
#   paired    chosen and rejected answers;            pairs
#   unpaired  answers, desirable or not;              answers
#   listwise  scored candidates in groups;            groups
#   token     per-token or per-step numbers;          pairs, sequences or steps
KINDS = ("paired", "unpaired", "listwise", "token")

NLL_WEIGHT = "nll_weight"  # the option of every loss that comes with an NLL term
PRESET = "@"  # between a loss and one of its presets, where it is named


# Legal numbers of what comes with a row, whatever the loss.
RANGES = {
    "beta": POSITIVE,
    "margin": FINITE,
    "reward_gap": FINITE,
    "soft_labels": PROBABILITY,
    "pair_weights": NOT_NEGATIVE,
    **{name: PROBABILITY for name in (*WIN_RATES, "chosen_is_reference")},
}


@dataclass(frozen=True)
class LossOption:
    """One option of a loss: a keyword-only parameter of its function."""

    name: str
    type: type  # bool, int, float or str
    default: Any
    interval: Interval | None = None
    choices: tuple[str, ...] = ()  # the legal values of a str; empty: any

    def convert(self, value: Any) -> Any:
        """``value`` in the option's type. Raises ValueError for another type or out of range."""
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.type is float and is_number:
            value = float(value)
        elif type(value) is not self.type:
            raise ValueError(f"{self.name}: got {value!r}, wanted {self.type.__name__}")
        if self.interval is not None and value not in self.interval:
            raise ValueError(f"{self.name}: got {value!r}, wanted {self.interval}")
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.name}: got {value!r}, wanted one of {', '.join(self.choices)}")
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
class BatchExample:
    """The same for a batch of any kind: the loss, how to make the batch, and the options."""

    loss: float
    batch: Callable[[], Any]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossSpec:
    """All there is to know of a registered loss; see ``preference_loss`` for the fields."""

    name: str
    function: Callable[..., Tensor]
    summary: str
    paper: str
    example: Example | BatchExample | None
    scope: str
    uses_reference: bool
    length_normalized: bool
    shift_invariant: bool
    aliases: tuple[str, ...]
    options: tuple[LossOption, ...]
    per_pair: frozenset[str]  # those of PER_PAIR that it takes
    default_beta: float | None  # None: the loss has no beta
    kind: str = "paired"
    inputs: type = PairLogps
    nll_weight: float | None = None  # None: the loss has no NLL term of its own
    needs: tuple[str, ...] = ()
    reads_nll: bool = False
    ranges: Mapping[str, Interval] = field(default_factory=dict)
    counted: Callable[[Any], Tensor] | None = None
    nll_term: str = "sft"
    metrics: Callable[[Any], dict[str, Tensor]] | None = None
    divergence: Callable[[Mapping[str, Any]], str] | None = None
    presets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    preset: Mapping[str, float] = field(default_factory=dict)  # the one it was named with

    @property
    def is_nll(self) -> bool:
        """Whether it looks at NLL tokens alone, not at answers: it takes no margins and no token weights."""
        return self.scope == "token" or self.reads_nll

    @property
    def flags(self) -> tuple[str, ...]:
        """What a caller should know: scope, lengths, invariance, an NLL term, further data."""
        named = {
            f"needs {', '.join(self.needs)}": bool(self.needs),
            f"scope {self.scope}": self.scope != "pair",
            "per-token means": self.length_normalized,
            "NLL term": self.nll_weight is not None,
            "shift-invariant": self.shift_invariant,
        }
        return tuple(name for name, holds in named.items() if holds)


LOSSES: dict[str, LossSpec] = {}


def preference_loss(
    name: str,
    *,
    paper: str = "none",
    example: Example | BatchExample | None = None,
    scope: str = "pair",
    uses_reference: bool = True,
    length_normalized: bool = False,
    shift_invariant: bool = False,
    aliases: tuple[str, ...] = (),
    kind: str = "paired",
    inputs: type = PairLogps,
    nll_weight: float | None = None,
    needs: tuple[str, ...] = (),
    reads_nll: bool = False,
    ranges: Mapping[str, Interval] | None = None,
    counted: Callable[[Any], Tensor] | None = None,
    nll_term: str = "sft",
    metrics: Callable[[Any], dict[str, Tensor]] | None = None,
    divergence: Callable[[Mapping[str, Any]], str] | None = None,
    presets: Mapping[str, Mapping[str, float]] | None = None,
) -> Callable[[Loss], Loss]:
    """Register the decorated function as a loss; it stays an ordinary function.

    The function takes a ``PairLogps`` (or the ``inputs`` of its kind) and returns ``(P,)``, one number per
    row. Its options are keyword-only, each with a default of type bool, int, float or str, an
    ``Interval`` in its annotation where it has a range, a ``Literal`` where it has a list of values.
    Those of the names in ``PER_PAIR`` may be ``(P,)`` tensors.

    Args:
        name: what users write in ``loss_type``.
        paper: arXiv id and equation. The package's own losses all have one.
        example: one pair worked out by hand; the automatic test holds the function to it. As ``paper``.
        scope: one of ``SCOPES``. A ``token`` loss returns sums over tokens, which are divided by the
            number of NLL tokens of the batch; every other scope is a mean over pairs.
        uses_reference: whether reference log-probabilities are needed (else they are refused).
        length_normalized: whether it works on per-token means.
        shift_invariant: claims that a constant added to both reference sums (to all of a group) changes
            nothing.
        aliases: other names for it.
        kind: one of ``KINDS``; losses of different kinds do not mix.
        inputs: the dataclass the function takes.
        nll_weight: the default weight of an NLL term beside the function, which does not see it: the loss
            gets an option of this name, and ``build_objective`` adds ``nll_term`` with that weight.
        needs: those of the ``extras`` of its ``inputs``, and of ``PER_PAIR``, without which it cannot be
            computed; other extras are refused.
        reads_nll: whether it is a function of ``PairLogps.nll`` and ``nll_count`` alone (every loss of scope
            ``token`` is taken to be).
        ranges: of the ``extras`` of its ``inputs``, those it takes some numbers of only: name -> legal range.
            Refused where numbers are read (rows of data, tensors on the CPU); on a device the function has to
            make such a row NaN.
        counted: bool per row: what the mean is over, beside the rows that have a token. None: all of these.
        nll_term: the loss that is its NLL term: ``sft``, a mean over tokens, or one of ``reads_nll``.
        metrics: further numbers of the same batch to log, by name: one per row, of which the mean is taken.
        divergence: which divergence from a single teacher it is of, by the options that were given: the name
        of
            an output of ``token_divergence``. None: ``reverse_kl``.
        presets: other defaults than those of the parameters: preset -> parameter -> number. ``name@preset``
            is the loss with these.

    Raises:
        ValueError: a name that is taken, an unknown scope or kind, a parameter without a usable default.
    """

    def register(function: Loss) -> Loss:
        _check_registration((name, *aliases), scope, kind)
        parameters = _keyword_only(name, function)
        if nll_weight is not None:
            parameters[NLL_WEIGHT] = LossOption(NLL_WEIGHT, float, nll_weight, NOT_NEGATIVE)
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
            kind=kind,
            inputs=inputs,
            nll_weight=nll_weight,
            needs=needs,
            reads_nll=reads_nll,
            ranges=ranges or {},
            counted=counted,
            nll_term=nll_term,
            metrics=metrics,
            divergence=divergence,
            presets=presets or {},
        )
        return function

    return register


def _check_registration(names: tuple[str, ...], scope: str, kind: str) -> None:
    taken = {other for spec in LOSSES.values() for other in (spec.name, *spec.aliases)}
    for new in names:
        if new in taken:
            raise ValueError(f"preference_loss: got {new!r}, which is registered already, wanted a new name")
    if scope not in SCOPES:
        raise ValueError(f"preference_loss {names[0]!r}: got scope {scope!r}, wanted one of {SCOPES}")
    if kind not in KINDS:
        raise ValueError(f"preference_loss {names[0]!r}: got kind {kind!r}, wanted one of {KINDS}")


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
        annotation = annotations.get(parameter.name)
        metadata = getattr(annotation, "__metadata__", ())
        interval = next((item for item in metadata if isinstance(item, Interval)), None)
        if interval is None and type(default) is float:
            interval = FINITE
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
        options[parameter.name] = LossOption(parameter.name, type(default), default, interval, choices)
    return options


def find_loss(name: str) -> LossSpec:
    """The loss of that name or alias, or ``name@preset``.

    Raises:
        ValueError: there is none: names the known ones and the nearest.
    """
    plain, _, preset = name.partition(PRESET) if isinstance(name, str) else (name, "", "")
    for spec in LOSSES.values():
        if plain == spec.name or plain in spec.aliases:
            return spec if plain == name else _with_preset(spec, preset)
    near = difflib.get_close_matches(str(name), list(LOSSES), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"loss_type: got {name!r}, wanted one of {', '.join(sorted(LOSSES))}{hint}")


def _with_preset(spec: LossSpec, preset: str) -> LossSpec:
    """The loss with the defaults of one of its presets."""
    if preset not in spec.presets:
        wanted = ", ".join(f"{spec.name}{PRESET}{name}" for name in spec.presets) or spec.name
        raise ValueError(f"loss_type: got {spec.name}{PRESET}{preset}, wanted {wanted}")
    values = spec.presets[preset]
    options = tuple(replace(item, default=values.get(item.name, item.default)) for item in spec.options)
    beta = values.get("beta", spec.default_beta)
    return replace(spec, options=options, default_beta=beta, preset=values)


def loss_options(inputs: type = PairLogps) -> dict[str, dict[str, LossOption]]:
    """Every option of the losses of one class of batch: option -> loss -> option. For command-line flags."""
    options: dict[str, dict[str, LossOption]] = {}
    for spec in (spec for spec in LOSSES.values() if spec.inputs is inputs):
        for option in spec.options:
            options.setdefault(option.name, {})[spec.name] = option
    return options


def losses_table() -> str:
    """The registry as a Markdown table, a row per loss, kind by kind."""
    rows = [
        "| `loss_type` | what it is | kind | reference | defaults | flags | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for spec in sorted(LOSSES.values(), key=lambda spec: KINDS.index(spec.kind)):
        defaults = [] if spec.default_beta is None else [f"`beta={spec.default_beta:g}`"]
        defaults += [f"`{option.name}={option.default}`" for option in spec.options]
        for preset, values in spec.presets.items():
            said = ", ".join(f"`{key}={value:.3g}`" for key, value in values.items())
            defaults.append(f"`{spec.name}{PRESET}{preset}`: {said}")
        cells = (
            f"`{spec.name}`" + "".join(f" (`{alias}`)" for alias in spec.aliases),
            spec.summary,
            spec.kind,
            "yes" if spec.uses_reference else "no",
            ", ".join(defaults) or "none",
            ", ".join(spec.flags) or "none",
            spec.paper,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
