"""``fastdpo train | score | sample | judge | rounds | bench | plan | doctor | build``: the command line.

A user's mistake is one line on standard error and exit code 2; ``--debug``, anywhere, shows the traceback.
What words alone tell, as a misspelt name, is answered before torch is loaded.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import fastdpo
from fastdpo import native_build
from fastdpo.commands.diagnose import diagnose
from fastdpo.commands.run import load_pairs, load_run, set_up_logging, write_scored
from fastdpo.commands.words import convert_words, merge_words, plan_words
from fastdpo.training.settings.typos import check_words
from fastdpo.training.settings.words import ArgumentError, Parser

COMMANDS = {
    "train": "train a model on preference pairs",
    "score": "compute reference log-probabilities once, for the cache and as JSONL",
    "sample": "draw answers of a model to the prompts of a data set",
    "judge": "score drawn answers, and make pairs or lists of them to train on",
    "rounds": "sample, judge, score and train, round after round, from one YAML file",
    "bench": "time the head beside its peers, row kernels and whole steps, from a checkout of the source",
    "plan": "predict memory and traffic of each of many GPUs, of a model's config",
    "doctor": "say what is installed, what will run here, and why the rest will not",
    "merge": "merge an adapter into its base, a quantised one dequantised, as a model of 16 bits",
    "convert-config": "print our YAML for one of LLaMA-Factory, axolotl, TRL or alignment-handbook",
    "build": "build the compiled kernels, where the package is installed and a compiler (and nvcc) is",
}


# Words after `--debug` that are a setting of transformers' instead.
_DEBUG_OPTIONS = ("underflow_overflow", "tpu_metrics_debug")
# What their authors tell each other about later versions.
_LIBRARIES = r"(accelerate|datasets|huggingface_hub|peft|torch|transformers)\b"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a failed run, 2 for a user's mistake."""
    argv, debug = _without_debug(sys.argv[1:] if argv is None else argv)
    try:
        command, rest = _command(argv)
        run: dict[str, Callable[[Sequence[str]], int | None]] = {
            "train": train, "score": score, "sample": sample, "judge": judge, "rounds": rounds,
            "bench": bench, "plan": plan, "doctor": partial(diagnose, debug=debug),
            "merge": merge, "convert-config": convert_config, "build": native_build.main,
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=_LIBRARIES)
            code = run[command](rest)
    except (ValueError, TypeError, ImportError, OSError) as error:
        if debug:
            raise
        print(f"fastdpo: error: {_lines(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("fastdpo: interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if debug:
            raise
        print(f"fastdpo: failed: {_lines(error)} (--debug shows where)", file=sys.stderr)
        return 1
    return code or 0


def _without_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """The words without our own ``--debug``, and whether it was there."""
    words = list(argv)
    ours = [
        place
        for place, word in enumerate(words)
        if word == "--debug" and words[place + 1 : place + 2] not in ([name] for name in _DEBUG_OPTIONS)
    ]
    return [word for place, word in enumerate(words) if place not in ours], bool(ours)


def _lines(error: BaseException) -> str:
    """An error's text on one line, or on those of a list that it is."""
    return "\n  ".join(" ".join(line.split()) for line in str(error).split("\n  "))


def _command(argv: list[str]) -> tuple[str, list[str]]:
    listing = "\n".join(f"  {name:<16}{text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="fastdpo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Preference training without logits.\n\n{listing}",
        epilog="`fastdpo COMMAND --help` lists the settings of a command.",
    )
    parser.add_argument("--version", action="version", version=f"fastdpo {fastdpo.__version__}")
    parser.add_argument("command", metavar="COMMAND", help=", ".join(COMMANDS))
    if not argv:
        raise ArgumentError(
            f"got no command, wanted one of {', '.join(COMMANDS)}; `fastdpo --help` says more"
        )
    command: str = parser.parse_args(argv[:1]).command
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ArgumentError(f"got the command {command!r}, wanted one of {', '.join(COMMANDS)}{hint}")
    check_words(command, argv[1:])
    return command, argv[1:]


def train(argv: Sequence[str]) -> None:
    """``fastdpo train``."""
    from fastdpo.training.loop.folders import check_output_dir
    from fastdpo.training.loop.trainer import PreferenceTrainer
    from fastdpo.training.settings.command_line import parse_train
    from fastdpo.training.settings.engines import check_launched

    arguments = parse_train(argv)
    set_up_logging(arguments.config.process_index)
    check_launched(arguments.config)
    check_output_dir(arguments.config)
    trainer = PreferenceTrainer(**load_run(arguments))
    trainer.told = arguments.told()
    output = trainer.train()
    # Before the last evaluation, which may cast the model, or fail.
    trainer.save_model()
    trainer.save_state()
    if trainer.eval_dataset is not None and not trainer.is_evaluated:
        trainer.evaluate()
        trainer.create_model_card()  # with what the evaluation found
        if arguments.config.push_to_hub:
            trainer.push_to_hub()
    if trainer.is_world_process_zero():
        seconds = output.metrics.get("train_runtime", 0.0)
        folder = arguments.config.output_dir
        print(f"done: {output.global_step} steps in {seconds:.0f} s; the model is in {folder}")


def score(argv: Sequence[str]) -> None:
    """``fastdpo score``: fills the cache for ``train --reference precomputed`` with the same settings."""
    from accelerate import Accelerator

    from fastdpo.integrations.model import ensure_patched
    from fastdpo.integrations.processor import ImageTokens, tokenizer_of
    from fastdpo.training.batches.collate import pad_token_id
    from fastdpo.training.batches.layouts import choose_collator
    from fastdpo.training.batches.ranks import DataRanks
    from fastdpo.training.data.model_fit import check_fit
    from fastdpo.training.data.stream import has_images
    from fastdpo.training.loop.models import load_model, told_tokenizer
    from fastdpo.training.reference.precompute import PrecomputedReference
    from fastdpo.training.settings.command_line import parse_score

    arguments, output = parse_score(argv)
    config = arguments.config
    set_up_logging(config.process_index)
    arguments.check_there()
    tokenizer = told_tokenizer(arguments.model, or_processor=True)
    source, *data_sets = load_pairs(arguments.data, tokenizer, config, reads_reference=False)
    loading = arguments.loading_options()
    loading["with_images"] = has_images(*data_sets)
    if arguments.model.ref_model is not None:
        loading.pop("revision", None)
    model = load_model(arguments.model.ref_model or arguments.model.name, **loading)
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=config.use_cpu)
    model = ensure_patched(model.to(accelerator.device), config.execution())
    check_fit(data_sets[0], {"model": model}, config, warns=False)
    collator = choose_collator(
        [model], config, pad_token_id(tokenizer_of(tokenizer)), data_sets[0], accelerator,
        ImageTokens.of(tokenizer), has_images=has_images(*data_sets),
    )  # fmt: skip
    reference = PrecomputedReference(model, DataRanks(accelerator), collator, config, is_base=False)
    scored = [reference.add_to(pairs) for pairs in data_sets if pairs is not None]
    if not accelerator.is_main_process:
        return
    print(f"reference log-probabilities kept in {reference.cache.directory}")
    if output is not None:
        count = write_scored(output, source, scored if arguments.data.eval_dataset is None else scored[:1])
        print(f"{count} scored rows written to {output}")


def sample(argv: Sequence[str]) -> None:
    """``fastdpo sample``."""
    from fastdpo.rounds.ranks import Ranks
    from fastdpo.rounds.sample import sample as draw
    from fastdpo.rounds.settings import parse_sample

    model, arguments = parse_sample(argv)
    ranks = Ranks.joined(arguments.use_cpu)
    set_up_logging(ranks.rank)
    done = draw(model, arguments)
    if ranks.is_main:
        print(done)


def judge(argv: Sequence[str]) -> None:
    """``fastdpo judge``."""
    from fastdpo.rounds.judge import judge as judge_answers
    from fastdpo.rounds.judge_settings import parse_judge
    from fastdpo.rounds.ranks import Ranks

    arguments = parse_judge(argv)
    ranks = Ranks.joined(arguments.use_cpu)
    set_up_logging(ranks.rank)
    report = judge_answers(arguments)
    if ranks.is_main:
        print(report)


def rounds(argv: Sequence[str]) -> None:
    """``fastdpo rounds``."""
    from fastdpo.rounds.chain import run_rounds
    from fastdpo.rounds.ranks import Ranks
    from fastdpo.rounds.rounds_file import parse_rounds

    arguments = parse_rounds(argv)
    ranks = Ranks.joined(arguments.use_cpu)
    set_up_logging(ranks.rank)
    done = run_rounds(arguments, train=train, score=score)
    if ranks.is_main:
        print(done)


def bench(argv: Sequence[str]) -> int:
    """``fastdpo bench``: suites of the source tree's ``benchmarks/``; returns their exit code."""
    root = Path.cwd()
    if not (root / "benchmarks" / "run.py").is_file():
        raise ValueError(
            f"bench: got {root}, wanted the root of a checkout: the package has no benchmarks in it"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    code: int = import_module("benchmarks.run").main(list(argv))
    return code


def plan(argv: Sequence[str]) -> None:
    """``fastdpo plan``."""
    options = plan_words(argv)
    from fastdpo.doctor.machine_report import machine_report
    from fastdpo.training.settings.hub import check_there

    check_there("model", options.model)
    print(machine_report(options))


def merge(argv: Sequence[str]) -> None:
    """``fastdpo merge``."""
    words = merge_words(argv)
    from fastdpo.training.loop.merge import merge as run

    run(**vars(words))


def convert_config(argv: Sequence[str]) -> None:
    """``fastdpo convert-config``."""
    words = convert_words(argv)
    from fastdpo.training.settings.converters.convert import convert_config as run

    run(**vars(words))


if __name__ == "__main__":
    sys.exit(main())
