"""What each suite measures: cases in the order they run, at the sizes of `benchmarks.sizes`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import package_version
from benchmarks.memory import bench_memory, memory_key
from benchmarks.op import METHODS, bench_task, op_key
from benchmarks.problem import Size, problem_of
from benchmarks.rows import bench_rows, row_key
from benchmarks.sizes import (
    COMPILED,
    SizeTasks,
    accuracy_sizes,
    context_sizes,
    is_compiled_at,
    memory_points,
    op_sizes,
    row_backends,
    row_sizes,
    step_sizes,
)
from fastdpo.ops.backends import DEVICE_TYPE

SUITES = ("op", "row", "step", "memory", "accuracy", "context")
BY_REQUEST = "left out: not asked for"


@dataclass(frozen=True)
class Case:
    """One measurement, and what it takes.

    Args:
        key: its name in result files.
        cost: seconds it may take; their proportions matter for the time left, their size for the first case.
        bytes_needed: of memory, at least; a case that does not fit is skipped.
        model, num_tokens, task: what ``--models``, ``--tokens`` and ``--tasks`` pick it by; None: nothing.
        settings: what it was asked for with, which its result keeps.
        lacking: a package without which it is skipped, and that is not installed.
    """

    key: str
    suite: str
    run: Callable[[], dict[str, Any]]
    cost: float
    bytes_needed: int = 0
    model: str | None = None
    num_tokens: int | None = None
    task: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    lacking: str | None = None


@dataclass(frozen=True)
class Options:
    """What the command line narrows a suite to.

    Args:
        lost: key of a case -> contender -> reason: who took the device with it in an earlier process.
        is_brief: as few steps as show that all goes: a dry run.
    """

    device: torch.device
    preset: str
    repeats: int
    seconds: float
    models: Sequence[str] | None = None
    tokens: Sequence[int] | None = None
    tasks: Sequence[str] | None = None
    contenders: Sequence[str] | None = None
    without: Sequence[str] = ()
    data: str | None = None
    lost: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    is_brief: bool = False

    def settings(self) -> dict[str, Any]:
        """As they are kept in a result file: all but the device and what happened."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("device", "lost", "is_brief")
        }

    def seconds_of(self, flop: float) -> float:
        """Of products, guessed: a GPU's tensor cores, or one CPU thread."""
        return flop / (5e14 if self.device.type == "cuda" else 2e10)


def make_cases(suite: str, options: Options) -> list[Case]:
    """
    Raises:
        ValueError: nothing is left of the suite, or it has no contender of those asked for.
    """
    known = contenders_of(suite)
    if options.contenders is not None and not set(options.contenders) & set(known):
        got = ", ".join(map(repr, options.contenders))
        raise ValueError(f"contender: got {got}, wanted of {suite} some of {', '.join(known)}")
    makers = {
        "op": op_cases,
        "accuracy": accuracy_cases,
        "memory": memory_cases,
        "row": row_cases,
        "step": step_cases,
        "context": context_cases,
    }
    cases = [replace(case, settings=options.settings()) for case in makers[suite](options)]
    if not cases:
        raise ValueError(f"{suite}: no size of {options.preset!r} is left of those asked for")
    return cases


def contenders_of(suite: str) -> tuple[str, ...]:
    """Names that ``--contenders`` and ``--without`` of a suite may have."""
    if suite == "row":
        return (*DEVICE_TYPE, "reference")
    if suite == "step":
        return _step().CONTENDERS
    if suite == "context":
        return tuple(_context().WAYS)
    return tuple(method.name for method in METHODS)


# What a suite takes beyond --preset, --contenders and --without.
TAKES = {
    "op": ("models", "tokens", "tasks", "repeats", "seconds"),
    "accuracy": ("models", "tokens", "tasks"),
    "memory": ("models", "tokens", "tasks"),
    "row": ("repeats", "seconds"),
    "step": ("models", "data"),
    "context": ("models", "tokens"),
}


def check_options(suites: Sequence[str], options: Options, asked: Sequence[str]) -> None:
    """Refuse what no suite would take notice of.

    Args:
        asked: names of the options that were given.

    Raises:
        ValueError: an option that none of the suites takes, or a value that none has; with what they have.
    """
    for name in asked:
        takers = [suite for suite, taken in TAKES.items() if name in taken]
        if takers and not set(takers) & set(suites):
            got = getattr(options, name)
            raise ValueError(
                f"--{name}: got {got} for {', '.join(suites)}, wanted a suite of {', '.join(takers)}"
            )
    for names in (options.contenders or (), options.without):
        known = {name for suite in suites for name in contenders_of(suite)}
        for name in names:
            if name not in known:
                raise ValueError(f"contender: got {name!r}, wanted one of {', '.join(sorted(known))}")
    picks: dict[str, Callable[[Case], Any]] = {
        "models": lambda case: case.model,
        "tokens": lambda case: case.num_tokens,
        "tasks": lambda case: case.task,
    }
    for name, of in picks.items():
        if getattr(options, name) is None:
            continue
        every = replace(options, models=None, tokens=None, tasks=None)
        have = {of(case) for suite in suites for case in make_cases(suite, every)} - {None}
        for value in getattr(options, name):
            if value not in have:
                wanted = ", ".join(map(str, sorted(have)))
                raise ValueError(f"--{name}: got {value!r}, wanted some of {wanted} at {options.preset!r}")


def op_cases(options: Options) -> list[Case]:
    return _head_cases(options, op_sizes(options.preset), is_timed=True)


def accuracy_cases(options: Options) -> list[Case]:
    return _head_cases(options, accuracy_sizes(options.preset), is_timed=False)


def _head_cases(options: Options, sizes: SizeTasks, *, is_timed: bool) -> list[Case]:
    cases = []
    for size, of_size in sizes:
        if options.models is not None and size.model not in options.models:
            continue
        if options.tokens is not None and size.num_tokens not in options.tokens:
            continue
        tasks = [task for task in of_size if task in (options.tasks or of_size)]
        for task in tasks:
            left_out = _left_out(options, keeps_compiled=is_compiled_at(size))
            suite = "op" if is_timed else "accuracy"
            key = op_key(suite, size, task)

            def run(
                size: Size = size, task: str = task, left_out: Mapping[str, str] = left_out, key: str = key
            ) -> dict[str, Any]:  # fmt: skip
                return bench_task(
                    problem_of(size, options.device), task, repeats=options.repeats, seconds=options.seconds,
                    is_timed=is_timed, left_out=left_out, lost_to=options.lost.get(key),
                )  # fmt: skip

            once = options.seconds_of(12 * size.flop(task))  # of some twelve contenders
            cost = 1 + 2 * once
            if is_timed:
                cost += max(min(options.seconds, (options.repeats + 3) * once), 8 * once)
            needed = size.bytes_needed(task) if is_timed else size.bytes_held
            cases.append(Case(key, suite, run, cost, needed, size.model, size.num_tokens, task))
    return cases


def memory_cases(options: Options) -> list[Case]:
    return [
        _memory_case(axes, size, task, options)
        for (size, task), axes in memory_points(options.preset, options.tasks).items()
        if options.models is None or size.model in options.models
        if options.tokens is None or size.num_tokens in options.tokens
    ]


def _memory_case(axes: list[str], size: Size, task: str, options: Options) -> Case:
    key = memory_key(axes[0], size, task)
    left_out = _left_out(options, keeps_compiled=False)

    def run() -> dict[str, Any]:
        return bench_memory(axes, size, task, options.device, left_out, options.lost.get(key))

    # Starting a process takes longer than what it measures; on a CPU every method has its own.
    cost = (3 if options.device.type == "cuda" else 40) + options.seconds_of(30 * size.flop(task))
    return Case(key, "memory", run, cost, size.bytes_held, size.model, size.num_tokens, task)


def row_cases(options: Options) -> list[Case]:
    backends = row_backends(options.device)
    backends = [name for name in backends if name in (options.contenders or backends)]
    backends = [name for name in backends if name not in options.without]
    if not backends:
        return []
    cases = []
    for vocab, rows, dtype in row_sizes(options.preset):
        key = row_key(vocab, rows, dtype)

        def run(
            vocab: int = vocab, rows: int = rows, dtype: torch.dtype = dtype, key: str = key
        ) -> dict[str, Any]:
            return bench_rows(
                options.device, backends, vocab=vocab, logits_dtype=dtype, rows=rows,
                repeats=options.repeats, seconds=options.seconds, lost_to=options.lost.get(key),
            )  # fmt: skip

        cases.append(Case(key, "row", run, 1 + rows * vocab / 1e8, 3 * rows * vocab * 4))
    return cases


def step_cases(options: Options) -> list[Case]:
    """Whole steps; ``repeats`` is of a GPU's kernels, not of steps, which have their own.

    Raises:
        ValueError: there is no such data, or none that can be read.
    """
    step = _step()
    asked = options.contenders or step_names(options.device)
    names = [name for name in step.CONTENDERS if name in asked]
    names = [name for name in names if name not in options.without]
    if not names:
        return []
    is_brief = options.is_brief or options.preset == "tiny"
    brief = {"check_steps": 1 if options.is_brief else 2, "steps": 1, "rounds": 1} if is_brief else {}
    cases = []
    data = None if options.data is None else Path(options.data)
    if data is not None:
        from fastdpo.training.data.source import read_rows

        read_rows(data)  # better before the first measurement than in the place of it
    for model, precision in step_sizes(options.preset):
        if options.models is not None and model not in options.models:
            continue

        def run(model: str = model, precision: str = precision) -> dict[str, Any]:
            return step.bench_step(model, options.device, precision, data=data, contenders=names, **brief)

        size, held = step.SIZES[model], step_bytes(model, precision)
        # Forward and backward of the policy, forward of the reference: 8 FLOP a weight and token.
        cost = 30 + options.seconds_of(8 * _weights(size) * size.pairs * 1500 * (10 if brief else 70))
        lacking = "peft" if size.is_adapted and package_version("peft") is None else None
        key = step.step_key(model, precision, data)
        cases.append(Case(key, "step", run, cost, held, model, lacking=lacking))
    return cases


def context_cases(options: Options) -> list[Case]:
    """Whole steps on rows of growing length."""
    context = _context()
    asked = options.contenders or context.names_for(options.device)
    names = [name for name in context.WAYS if name in asked and name not in options.without]
    if not names:
        return []
    cases = []
    sizes, lengths = context_sizes(options.preset)
    brief = {"steps": 1} if options.is_brief or options.preset == "tiny" else {}
    for model, precision in sizes:
        for tokens in lengths:
            if options.models is not None and model not in options.models:
                continue
            if options.tokens is not None and tokens not in options.tokens:
                continue
            key = context.context_key(model, tokens, precision)
            size = _step().SIZES[model]
            weights = _weights(size)
            # Products of a step that runs its forward pass twice, of weights and of scores.
            step = options.seconds_of(8 * tokens * (weights + size.layers * size.hidden * tokens))

            def run(
                model: str = model, precision: str = precision, tokens: int = tokens, step: float = step,
                key: str = key,
            ) -> dict[str, Any]:  # fmt: skip
                return context.bench_context(
                    model, tokens, precision, options.device, names, shortest=lengths[0], step_seconds=step,
                    lost_to=options.lost.get(key), **brief,
                )  # fmt: skip

            held = weights * (2 if size.is_adapted else 16)  # weights, gradients, two moments
            lacking = "peft" if size.is_adapted and package_version("peft") is None else None
            cost = len(names) * (20 + 5 * step)
            cases.append(Case(key, "context", run, cost, held, model, tokens, lacking=lacking))
    return cases


def step_names(device: torch.device) -> list[str]:
    """Contenders of whole steps of who names none: on a GPU TRL drops unlabelled tokens by itself."""
    return [n for n in _step().CONTENDERS if n != "trl-compacted" or device.type == "cpu"]


def _weights(size: Any) -> int:
    """Of a model of whole steps."""
    of_layers: int = size.layers * size.hidden * (4 * size.hidden + 3 * size.intermediate)
    return of_layers + size.vocab * size.hidden


def step_bytes(model: str, precision: str) -> int:
    """What a step holds, at least.

    Policy, gradient, two moments and the reference, one model where it is adapted; of the truth in fp64,
    which in bf16 may be fp32 (`benchmarks.step_truth`).
    """
    size = _step().SIZES[model]
    return _weights(size) * (1 if size.is_adapted else 5) * (4 if precision == "bf16" else 8)


def _step() -> Any:
    try:
        from benchmarks import step  # trainers take seconds to import
    except ImportError as error:
        raise ValueError(f"step: cannot run here: {error}") from error
    return step


def _context() -> Any:
    try:
        from benchmarks import context
    except ImportError as error:
        raise ValueError(f"context: cannot run here: {error}") from error
    return context


def _left_out(options: Options, *, keeps_compiled: bool) -> dict[str, str]:
    """Methods that are not to run, by name, with the reason that the tables give."""
    reasons = {}
    for method in METHODS:
        asked = options.contenders is None or method.name in options.contenders
        if not asked or method.name in options.without:
            reasons[method.name] = BY_REQUEST
        elif method.is_compiled and options.contenders is None and not keeps_compiled:
            reasons[method.name] = COMPILED
    return reasons
