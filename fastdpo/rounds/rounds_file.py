"""The settings of ``fastdpo rounds``: one YAML file with those of sampling, judging and training in it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdpo.rounds.judge_settings import JudgeArguments
from fastdpo.rounds.settings import (
    SampleArguments,
    check_at_least,
    check_one_of,
    check_sampled_model,
    help_text,
    parse_settings,
)
from fastdpo.training.settings.command_line import parse_train
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.engines import told_engine
from fastdpo.training.settings.hub import is_adapter
from fastdpo.training.settings.losses import all_loss_options
from fastdpo.training.settings.names import our_names
from fastdpo.training.settings.run import (
    AdapterArguments,
    ArgumentError,
    DataArguments,
    ModelArguments,
    RunArguments,
)
from fastdpo.training.settings.values import hints_of, settle

MODELS = ("last", "base")
# What each round says itself, by the part of the file that must not.
OWN = {
    "sample": ("dataset", "dataset_split", "model", "ref_model", "output", "overwrite_output", "skip_rows",
               "max_rows", "seed", "use_cpu"),
    "judge": ("dataset", "dataset_split", "output", "overwrite_output", "seed", "use_cpu"),
    "train": ("dataset", "dataset_split", "model", "ref_model", "output_dir", "overwrite_output_dir",
              "reference", "resume_from_checkpoint", "use_cpu"),
}  # fmt: skip
# Losses of which data read which format.
_KINDS = {"pairs": ("paired", "unpaired"), "lists": ("listwise",), "samples": ("samples",)}
_TRAINED = (ModelArguments, DataArguments, AdapterArguments, PreferenceConfig)
_SAMPLED = (ModelArguments, SampleArguments)
# What training is told of texts holds of sampling too.
_OF_TOKENIZER = ("tokenizer", "chat_template", "trust_remote_code")
POLICY = "policy"


@dataclass
class RoundsArguments:
    """What is done round after round."""

    model: str | None = field(default=None, metadata=help_text("Path or hub id of the model to begin with."))
    dataset: str | list[str] | None = field(
        default=None, metadata=help_text("The prompts: what `fastdpo sample` reads.")
    )
    dataset_split: str | list[str] = field(
        default="train", metadata=help_text("Split of the dataset, where it has several.")
    )
    output_dir: str | None = field(default=None, metadata=help_text("Folder with a folder for each round."))
    rounds: int = field(default=3, metadata=help_text("How many. More of them may be asked for later."))
    prompts_per_round: int | None = field(
        default=None, metadata=help_text("The next so many rows in each round. Default: all rows in each.")
    )
    start: str = field(
        default="last",
        metadata=help_text(
            "What a round's training starts from: last, what the round before made, or base, model."
        ),
    )
    reference: str = field(
        default="last",
        metadata=help_text("The reference of a round: last, the policy that sampled it, or base, model."),
    )
    seed: int = field(default=42, metadata=help_text("Of sampling and choosing; rounds have others each."))
    use_cpu: bool = field(default=False, metadata=help_text("Leave GPUs alone."))
    sample: dict[str, Any] | str | None = field(
        default=None, metadata=help_text("Settings of `fastdpo sample`.")
    )
    judge: dict[str, Any] | str | None = field(
        default=None,
        metadata=help_text("Settings of `fastdpo judge`; judge_model: policy is the one that sampled."),
    )
    train: dict[str, Any] | str | None = field(
        default=None, metadata=help_text("Settings of `fastdpo train`.")
    )
    overrides: list[dict[str, Any]] | None = field(
        default=None,
        metadata=help_text("Other settings from a round on: a list of round, and sample, judge or train."),
    )

    def __post_init__(self) -> None:
        settle(self)
        for name in ("model", "dataset", "output_dir"):
            if not getattr(self, name):
                raise ArgumentError(f"{name} is required")
        check_at_least(self, 1, "rounds", "prompts_per_round")
        check_one_of("start", self.start, MODELS)
        check_one_of("reference", self.reference, MODELS)
        for override in self.overrides or ():
            for name in override:
                if name not in ("round", *OWN):
                    raise ArgumentError(f"overrides: got {name!r}, wanted round, sample, judge or train")
            at = override.get("round")
            if not isinstance(at, int) or at < 1:
                raise ArgumentError(f"overrides: got round {at!r}, wanted a whole number from 1")
        for part, names in OWN.items():
            for given in (getattr(self, part), *(o.get(part) for o in self.overrides or ())):
                if given is not None and not isinstance(given, Mapping):
                    raise ArgumentError(f"{part}: got {given!r}, wanted names and values")
                for name in given or ():
                    if str(name).replace("-", "_") in names:
                        raise ArgumentError(
                            f"{part}: got {name!r}, which each round says itself, wanted none"
                        )
        self.directory = Path(str(self.output_dir)).expanduser()

    def part(self, name: str, number: int) -> dict[str, Any]:
        """The settings of a part in a round, from 1, with what overrides say up to there."""
        found = dict(getattr(self, name) or {})
        for override in sorted(self.overrides or (), key=lambda o: int(o["round"])):
            if override["round"] <= number:
                found |= override.get(name) or {}
        return found

    def folder(self, number: int) -> Path:
        """Of a round."""
        return self.directory / f"round-{number}"


@dataclass(frozen=True)
class RoundPlan:
    """What one round does, all of it read and checked.

    Args:
        number: from 1.
        policy: the model that samples.
        start: the model that is trained.
        reference: the model that answers are held to.
        sampled, sample, judge: settings of the two commands.
        train: of ``fastdpo train``, by our names, without data and output.
        run: the same, read.
    """

    number: int
    policy: str
    start: str
    reference: str
    sampled: ModelArguments
    sample: SampleArguments
    judge: JudgeArguments
    train: dict[str, Any]
    run: RunArguments

    @property
    def needs_scores(self) -> bool:
        """Whether the reference's log-probabilities are made before training."""
        return self.run.config.needs_reference and not self.run.config.needs_divergences


def parse_rounds(argv: Sequence[str]) -> RoundsArguments:
    """The arguments of ``fastdpo rounds``. Raises ArgumentError or, for a refused value, ValueError."""
    (rounds,) = parse_settings((RoundsArguments,), argv, "fastdpo rounds")
    found: RoundsArguments = rounds
    return found


def plan_round(rounds: RoundsArguments, number: int) -> RoundPlan:
    """What a round does.

    Raises:
        ArgumentError, ValueError: settings that are none, or that do not fit; names the part.
    """
    policy = str(rounds.model) if number == 1 else str(rounds.folder(number - 1) / "model")
    models = {"last": policy, "base": str(rounds.model)}
    start, reference = models[rounds.start], models[rounds.reference]
    train = _train_settings(rounds, number)
    run = _named("train", lambda: _read_train({**train, "model": start}))
    if run.config.sync_ref_model:
        raise ArgumentError("train: got sync_ref_model, wanted none: a round's reference stays what it is")
    engine = told_engine(run.config)
    if engine is not None:
        raise ArgumentError(
            f"train: got {engine}, wanted whole models on each process (DDP): sampling and scoring in the "
            "same processes have no split ones; or run `fastdpo sample`, `judge` and `train` one by one"
        )
    sampled, sample = _sampling(rounds, number, policy, reference, train)
    judge = _judging(rounds, number, policy)
    kind = run.config.data_kind.name
    if kind not in _KINDS[judge.format]:
        losses = ", ".join(run.config.loss_type)
        raise ArgumentError(f"judge: got format {judge.format!r}, but {losses} takes {kind} data")
    return RoundPlan(number, policy, start, reference, sampled, sample, judge, train, run)


def _named(part: str, make: Any) -> Any:
    """What ``make`` makes; its error with the part of the file before it."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"{part}: {str(error).removeprefix('--')}") from error


def _train_settings(rounds: RoundsArguments, number: int) -> dict[str, Any]:
    known = [name for kind in _TRAINED for name in hints_of(kind)]
    given, problems = our_names(rounds.part("train", number), [*known, *all_loss_options(), "import"])
    problems += [f"{name}: is what each round says itself" for name in OWN["train"] if name in given]
    if problems:
        raise ArgumentError("train: " + "\n  ".join(problems))
    if number > 1 and rounds.start == "last" and (given.get("use_peft") or is_adapter(str(rounds.model))):
        # The adapter that the round before made is what goes on.
        given = {name: value for name, value in given.items() if name not in hints_of(AdapterArguments)}
    return {"use_cpu": True, **given} if rounds.use_cpu else given


def _read_train(settings: Mapping[str, Any]) -> RunArguments:
    import yaml  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.yaml")
        path.write_text(yaml.safe_dump({**settings, "dataset": "rows.jsonl", "output_dir": folder}))
        return parse_train([str(path)])


def _sampling(
    rounds: RoundsArguments, number: int, policy: str, reference: str, train: Mapping[str, Any]
) -> tuple[ModelArguments, SampleArguments]:
    given = {name: train[name] for name in _OF_TOKENIZER if name in train} | rounds.part("sample", number)
    given, problems = our_names(given, [name for kind in _SAMPLED for name in hints_of(kind)])
    if problems:
        raise ArgumentError("sample: " + "\n  ".join(problems))
    count = rounds.prompts_per_round
    own = {
        "model": policy,
        "dataset": rounds.dataset,
        "dataset_split": rounds.dataset_split,
        "output": str(rounds.folder(number) / "samples.jsonl"),
        "seed": rounds.seed + number,
        "use_cpu": rounds.use_cpu,
        "skip_rows": 0 if count is None else (number - 1) * count,
        "max_rows": count,
    }
    if given.get("num_reference_samples") or given.get("num_mixture_samples"):
        own["ref_model"] = reference

    def make() -> tuple[ModelArguments, SampleArguments]:
        both = {**given, **own}
        model = ModelArguments(**{name: both[name] for name in hints_of(ModelArguments) if name in both})
        sample = SampleArguments(**{name: both[name] for name in hints_of(SampleArguments) if name in both})
        check_sampled_model(model, sample)
        return model, sample

    found: tuple[ModelArguments, SampleArguments] = _named("sample", make)
    return found


def _judging(rounds: RoundsArguments, number: int, policy: str) -> JudgeArguments:
    given, problems = our_names(rounds.part("judge", number), list(hints_of(JudgeArguments)))
    if problems:
        raise ArgumentError("judge: " + "\n  ".join(problems))
    folder = rounds.folder(number)
    given |= {
        "dataset": str(folder / "samples.jsonl"),
        "output": str(folder / "judged.jsonl"),
        "seed": rounds.seed + number,
        "use_cpu": rounds.use_cpu,
    }
    if given.get("judge_model") == POLICY:
        given["judge_model"] = policy
    found: JudgeArguments = _named("judge", lambda: JudgeArguments(**given))
    return found
