"""``fastdpo rounds``: sample, judge, score and train, round after round, and on from wherever it was stopped.

A round has a folder, and each step a file in it that is there whole or not at all: ``samples.jsonl``,
``judged.jsonl``, ``scored.jsonl``, and ``trained.json`` beside the model. What is there is not done again.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdpo.rounds.functions import load_function, source_of
from fastdpo.rounds.judge import judge
from fastdpo.rounds.notes import check, check_model, model_files, note, read_json
from fastdpo.rounds.partial import digest, stamp
from fastdpo.rounds.ranks import Ranks
from fastdpo.rounds.rounds_file import RoundPlan, RoundsArguments, plan_round
from fastdpo.rounds.sample import sample
from fastdpo.training.data.source import read_rows
from fastdpo.training.loop.checkpoint_files import read_state
from fastdpo.training.loop.folders import is_whole
from fastdpo.training.settings.hub import check_there
from fastdpo.training.written import write_json

# What says of which settings a folder of rounds is.
ROUNDS_FILE = "rounds.json"
TRAINED_FILE = "trained.json"
Command = Callable[[Sequence[str]], None]
logger = logging.getLogger(__name__)


def run_rounds(rounds: RoundsArguments, *, train: Command, score: Command) -> str:
    """Do the rounds that are not done yet.

    Args:
        train, score: the commands of these names, which are given a YAML file.

    Returns:
        A line that says where the last model is.

    Raises:
        ValueError: settings that do not fit, in any of the rounds, a folder of other settings, and whatever a
            step refuses.
    """
    plans = [plan_round(rounds, number) for number in range(1, rounds.rounds + 1)]
    _check_there(rounds, plans)
    ranks = Ranks.joined(rounds.use_cpu)
    _check_folder(rounds, plans, ranks)
    for plan in plans:
        _Round(rounds, plan, ranks).run(train, score)
    model = rounds.folder(rounds.rounds) / "model"
    return f"done: {rounds.rounds} rounds; the model is in {model}"


def _check_there(rounds: RoundsArguments, plans: Sequence[RoundPlan]) -> None:
    """Raise ValueError for what a later step would not find."""
    check_there("model", str(rounds.model))
    for plan in plans:
        args = plan.judge
        for name in ("function", "pairwise"):
            if getattr(args, name) is not None:
                load_function(name, getattr(args, name))
        for name in ("reward_model", "judge_model"):
            if getattr(args, name) not in (None, plan.policy):
                check_there(name, getattr(args, name))


def _check_folder(rounds: RoundsArguments, plans: Sequence[RoundPlan], ranks: Ranks) -> None:
    """Begin a folder, or raise ValueError where it holds other rounds, or something else."""
    source = read_rows(rounds.dataset, split=rounds.dataset_split)
    wanted = rounds.rounds * (rounds.prompts_per_round or 0)
    if wanted > len(source):
        raise ValueError(
            f"prompts_per_round: got {rounds.prompts_per_round} in each of {rounds.rounds} rounds, and "
            f"{source.name} has {len(source)} rows"
        )
    told = json.loads(json.dumps(_told(rounds, plans, [row for _, row in source]), default=str))
    path = rounds.directory / ROUNDS_FILE
    if path.is_file():
        then = read_json(path) or {}
        names = [name for name in {**then, **told} if then.get(name) != told.get(name)]
        if names:
            changes = "; ".join(f"{name}: {then.get(name)!r} -> {told.get(name)!r}" for name in names)
            raise ValueError(
                f"output_dir: {rounds.directory} holds rounds with other settings ({changes}); go on with "
                "the same, or choose another folder"
            )
    elif rounds.directory.exists() and (not rounds.directory.is_dir() or any(rounds.directory.iterdir())):
        raise ValueError(
            f"output_dir: {rounds.directory} is in use, and not by rounds: choose another folder"
        )
    ranks.wait()
    if ranks.is_main and not path.is_file():
        rounds.directory.mkdir(parents=True, exist_ok=True)
        write_json(path, told)
    ranks.wait()


def _told(rounds: RoundsArguments, plans: Sequence[RoundPlan], rows: list[Any]) -> dict[str, Any]:
    """What decides on all that is made; how many rounds there are does not."""
    names = ("prompts_per_round", "start", "reference", "seed", "sample", "judge", "train", "overrides")
    functions = {name for plan in plans for name in (plan.judge.function, plan.judge.pairwise) if name}
    return {
        "model": stamp(rounds.model),
        "prompts": digest(rows),
        **{name: getattr(rounds, name) for name in names},
        "functions": {name: digest(source_of(name)) for name in sorted(functions)},
        "judge_prompts": sorted({digest(p.judge.judge_template()) for p in plans if p.judge.judge_prompt}),
    }


class _Round:
    """One round, step by step."""

    def __init__(self, rounds: RoundsArguments, plan: RoundPlan, ranks: Ranks) -> None:
        self.rounds, self.plan, self.ranks = rounds, plan, ranks
        self.folder = rounds.folder(plan.number)
        self.samples, self.judged, self.scored = (
            self.folder / f"{name}.jsonl" for name in ("samples", "judged", "scored")
        )
        self.model = self.folder / "model"

    def run(self, train: Command, score: Command) -> None:
        """Do the steps that are not done."""
        if self._is_done(self.folder / TRAINED_FILE):
            if not self.model.is_dir():
                raise ValueError(
                    f"output_dir: round {self.plan.number} is over, but {self.model} is not there"
                )
            return
        if self.plan.number > 1:
            before = self.rounds.folder(self.plan.number - 1)
            self._on_main(lambda: check_model(before / TRAINED_FILE, before / self.model.name))
        if self.ranks.is_main:
            self.folder.mkdir(exist_ok=True)
        self.ranks.wait()
        self._do(self.samples, lambda: self._say(sample(self.plan.sampled, self.plan.sample)))
        self._do(self.judged, lambda: self._say(judge(self.plan.judge)))
        if self.plan.needs_scores:
            self._do(self.scored, lambda: score([self._score_file()]))
        self._do(self.folder / TRAINED_FILE, lambda: self._train(train))

    def _is_done(self, path: Path) -> bool:
        """Whether a step's file is there; all processes look before any goes on."""
        found = path.is_file()
        self.ranks.wait()
        return found

    def _do(self, made: Path, step: Callable[[], None]) -> None:
        if self._is_done(made):
            self._on_main(lambda: check(made))
            return
        logger.info("round %d: %s", self.plan.number, made.name)
        step()
        gc.collect()  # a trainer and its model go in circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.ranks.wait()
        if made.name != TRAINED_FILE:
            self._on_main(lambda: note(made))

    def _on_main(self, step: Callable[[], None]) -> None:
        """Do it on the main process; what it raises is raised on all."""
        self.ranks.together(step if self.ranks.is_main else lambda: None)

    def _say(self, done: object) -> None:
        logger.info("round %d: %s", self.plan.number, done)

    def _settings(self, **own: Any) -> dict[str, Any]:
        return {**self.plan.train, "model": self.plan.start, **own}

    def _score_file(self) -> str:
        own = {"ref_model": self.plan.reference, "dataset": str(self.judged), "output": str(self.scored)}
        cache = self.plan.train.get("reference_cache_dir", str(self.folder / "cache"))
        return self._file("score", self._settings(**own, reference_cache_dir=cache))

    def _train(self, train: Command) -> None:
        needs = self.plan.needs_scores
        own: dict[str, Any] = {
            "dataset": str(self.scored if needs else self.judged),
            "output_dir": str(self.model),
        }
        if self.plan.run.config.needs_divergences:
            own["ref_model"] = self.plan.reference
        going_on = _unfinished(self.model)
        own |= (
            {"overwrite_output_dir": True} if going_on is None else {"resume_from_checkpoint": str(going_on)}
        )
        self.ranks.wait()
        train([self._file("train", self._settings(**own))])
        self.ranks.wait()
        if self.ranks.is_main:
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
            told = {"model": stamp(str(self.model)), "files": model_files(self.model)}
            write_json(self.folder / TRAINED_FILE, told)

    def _file(self, name: str, settings: dict[str, Any]) -> str:
        """The settings of a step, which the command reads, and anyone who wants to do it again."""
        import yaml  # type: ignore[import-untyped]

        path = self.folder / f"{name}.yaml"
        if self.ranks.is_main:
            path.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        self.ranks.wait()
        return str(path)


def _unfinished(folder: Path) -> Path | None:
    """The last whole checkpoint that has steps left: one at the end cannot be gone on with."""
    found: list[tuple[int, Path]] = []
    for checkpoint in filter(is_whole, folder.glob("checkpoint-*")):
        told = read_state(checkpoint)
        if told["global_step"] < told["max_steps"]:
            found.append((told["global_step"], checkpoint))
    return max(found)[1] if found else None
