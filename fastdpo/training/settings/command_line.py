"""The command line's arguments: every setting as a flag, in a YAML file, or both (flags win).

Flags come from dataclasses, and those of the losses' options from the registry: nothing is listed
twice. A flag's words and a file's values are read by the dataclasses themselves (``setting_values.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.help_page import COMMON, first_sentence, loss_listing, section_of
from fastdpo.training.settings.losses import all_loss_options, with_loss_options
from fastdpo.training.settings.names import ALIASES, SWITCHES, UNSUPPORTED, our_names
from fastdpo.training.settings.own_losses import import_losses
from fastdpo.training.settings.run import (
    AdapterArguments,
    DataArguments,
    ModelArguments,
    RunArguments,
    ScoreArguments,
)
from fastdpo.training.settings.typos import raise_problems, unknown_argument
from fastdpo.training.settings.values import Hint, hints_of
from fastdpo.training.settings.words import ArgumentError, Parser
from fastdpo.training.settings.yaml_file import read_settings

_RUN_TYPES = (ModelArguments, DataArguments, AdapterArguments, PreferenceConfig)
_SWITCH = Hint(bool | None)


def parse_train(argv: Sequence[str]) -> RunArguments:
    """The arguments of ``fastdpo train``. Raises ArgumentError or, for a refused value, ValueError."""
    return RunArguments(*_parse(_RUN_TYPES, argv, prog="fastdpo train"))


def parse_score(argv: Sequence[str]) -> tuple[RunArguments, Path | None]:
    """The arguments of ``fastdpo score``, and where to write the scored rows."""
    *run, extra = _parse((*_RUN_TYPES, ScoreArguments), argv, prog="fastdpo score")
    config = run[-1]
    if config.needs_divergences:
        names = ", ".join(config.loss_type)
        raise ArgumentError(f"--loss_type: got {names}, which has no use for reference log-probabilities")
    if any(isinstance(part, DataArguments) and part.dataset_streaming for part in run):
        raise ArgumentError(
            "--dataset_streaming: got true, wanted rows at hand: scores are kept by the rows' places, and a "
            "stream has as many as are asked for; or train with --reference copy or adapter, which score "
            "each batch when it comes"
        )
    arguments = RunArguments(*run)
    if arguments.config.image_conditional_pairs and extra.output is not None:
        raise ArgumentError(
            "--output: got a file with --image_conditional_pairs, which makes two pairs of a row, wanted the "
            "cache alone (--reference precomputed finds it)"
        )
    return arguments, extra.checked_path(arguments.data)


def _parse(kinds: Sequence[type], argv: Sequence[str], *, prog: str) -> list[Any]:
    settings = given_settings(kinds, argv, prog=prog)
    return [kind(**{name: settings[name] for name in hints_of(kind) if name in settings}) for kind in kinds]


def given_settings(kinds: Sequence[type], argv: Sequence[str], *, prog: str = "fastdpo") -> dict[str, Any]:
    """What ``argv`` and the YAML file that it names say, under our names and unread.

    Args:
        kinds: the dataclasses whose fields are the settings.

    Raises:
        ArgumentError: unknown flags or settings; names all of a file's.
    """
    argv = list(argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv.insert(0, "--config")
    # Losses of one's own are there before their flags are.
    first, _ = _Parser((), prog=prog).parse_known_args(
        [word for word in argv if word not in ("-h", "--help", "--help-all", "--help_all")]
    )
    in_file = read_settings(Path(first.config)) if "config" in first else {}
    import_losses([*_names(in_file.pop("import", None)), *_names(vars(first).get("import"))])
    shows_all = not {"-h", "--help"} & {*argv}
    given, unknown = _Parser(kinds, prog=prog, shows_all=shows_all).parse_known_args(argv)
    known = known_settings(kinds)
    if unknown:
        words = [word for word in unknown if word.startswith("-")] or unknown[:1]
        raise ArgumentError("\n  ".join(unknown_argument(word, known) for word in words))
    flags = {name: _word(value) for name, value in vars(given).items() if name not in ("config", "import")}
    from_file = _ours(in_file, known, f"{first.config}: " if in_file else "")
    return _both(from_file, _ours(flags, known, ""))


def known_settings(kinds: Sequence[type] = _RUN_TYPES) -> list[str]:
    """Our names: fields of dataclasses, and of a command that trains the losses' options."""
    return [
        *(name for kind in kinds for name in hints_of(kind)),
        *(all_loss_options() if _trains(kinds) else ()),
    ]


def _trains(kinds: Sequence[type]) -> bool:
    return PreferenceConfig in kinds


def _word(value: Any) -> Any:
    """Of several words that are one: the word, as a file would have it."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _ours(given: Mapping[str, Any], known: Sequence[str], where: str) -> dict[str, Any]:
    ours, problems = our_names(given, known)
    raise_problems(problems, where)
    return with_loss_options(ours) if "loss_type" in known else ours


def _both(in_file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags win, option by option of the losses too."""
    both = {**in_file, **flags}
    if isinstance(in_file.get("loss_options"), dict) and isinstance(flags.get("loss_options"), dict):
        both["loss_options"] = {**in_file["loss_options"], **flags["loss_options"]}
    return both


def _names(value: Any) -> list[str]:
    return [] if value is None else [str(item) for item in (value if isinstance(value, list) else [value])]


class _Parser(Parser):
    """A flag per field of some dataclasses, per option of a loss, and per other name of either.

    What is not given is not in the result; what is, is words, which the dataclasses read.
    """

    def __init__(self, kinds: Sequence[type], *, prog: str, shows_all: bool = True) -> None:
        usage = f"{prog} [FILE.yaml] [--SETTING VALUE ...]"
        super().__init__(
            prog=prog, usage=usage, allow_abbrev=False, argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False,
            epilog=loss_listing() if _trains(kinds) else None,
        )  # fmt: skip
        self.shows_all = shows_all or not _trains(kinds)
        self.sections: dict[str, Any] = {}
        for common in () if self.shows_all else COMMON:
            self._section(common)
        self.add_argument("-h", "--help", action="help", help="The settings that most runs take.")
        if _trains(kinds):
            self.add_argument("--help-all", "--help_all", action="help", help="All settings.")
        self.add_argument("--config", help="YAML file with any of these settings; flags win over it.")
        self.add_argument(
            "--import",
            nargs="+",
            metavar="MODULE",
            help="Modules or .py files to import first: losses that they register are like any other.",
        )
        for kind in kinds:
            fields: Any = dataclasses.fields(kind)
            for item in (item for item in fields if item.init):
                title = section_of(kind, item.name, self.shows_all)
                text = _help_of(item) if self.shows_all else first_sentence(_help_of(item))
                self._add(self._section(title), item.name, hints_of(kind)[item.name], text)
        if _trains(kinds):
            self._add_loss_options()
        if kinds:
            for name in (*SWITCHES, *UNSUPPORTED):
                self._add(self, name, _SWITCH, argparse.SUPPRESS)

    def _section(self, title: str | None) -> Any:
        """A group of the page, or for what it does not show the parser itself."""
        if title is None:
            return self
        if title not in self.sections:
            self.sections[title] = self.add_argument_group(title)
        return self.sections[title]

    def _add_loss_options(self) -> None:
        for name, takers in all_loss_options().items():
            option = next(iter(takers.values()))
            text = f"Of {', '.join(takers)}. Default {option.default}."
            try:
                group = self._section(section_of(None, name, self.shows_all))
                self._add(group, name, Hint(option.type), text)
            except argparse.ArgumentError:
                raise ArgumentError(
                    f"{next(iter(takers))}: got the option {name!r}, a setting of runs, wanted another name"
                ) from None

    def _add(self, group: Any, name: str, hint: Hint, text: str) -> None:
        names = [name, *(theirs for theirs, ours in ALIASES.items() if ours == name)]
        words: dict[str, Any] = {"metavar": name.upper()}
        if hint.takes_bool or name == "resume_from_checkpoint":
            words |= {"nargs": "?", "const": True}
        elif hint.item is not None:
            words |= {"nargs": "*"}
        for flag in names:
            # A flag of its own for each name, so that two names of one setting are seen to be given.
            for spelling in _spellings(flag):
                is_shown = spelling == f"--{name}" and text is not argparse.SUPPRESS and group is not self
                shown = text.replace("%", "%%") if is_shown else argparse.SUPPRESS
                group.add_argument(spelling, dest=flag, help=shown, **words)
        if hint.takes_bool:
            self.add_argument(
                *_spellings(f"no_{name}"),
                dest=name,
                action="store_const",
                const=False,
                help=argparse.SUPPRESS,
            )


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _help_of(item: Any) -> str:
    text = str(item.metadata.get("help", "")).strip()
    if item.default is dataclasses.MISSING or item.default is None or "efault" in text:
        return text
    return f"{text} Default {item.default}."
