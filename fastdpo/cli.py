"""``fastdpo train | score | sample | judge | rounds | bench | plan | doctor``: the command line.

A user's mistake is one line on standard error and exit code 2; ``--debug``, anywhere, shows the traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastdpo

if TYPE_CHECKING:
    from fastdpo.training.data.dataset import RowDataset
    from fastdpo.training.data.source import RowSource, RowStream
    from fastdpo.training.data.stream import StreamDataset
    from fastdpo.training.settings.command_line import DataArguments, RunArguments
    from fastdpo.training.settings.config import PreferenceConfig

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
            "merge": merge, "convert-config": convert_config,
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
    parser = argparse.ArgumentParser(
        prog="fastdpo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Preference training without logits.\n\n{listing}",
        epilog="`fastdpo COMMAND --help` lists the settings of a command.",
    )
    parser.add_argument("--version", action="version", version=f"fastdpo {fastdpo.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    options = parser.parse_args(argv[:1])
    return options.command, argv[1:]


def train(argv: Sequence[str]) -> None:
    """``fastdpo train``."""
    from fastdpo.training.loop.folders import check_output_dir
    from fastdpo.training.loop.trainer import PreferenceTrainer
    from fastdpo.training.settings.command_line import parse_train

    arguments = parse_train(argv)
    _set_up_logging(arguments.config.process_index)
    check_output_dir(arguments.config)
    trainer = PreferenceTrainer(**_load_run(arguments))
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


def _load_run(arguments: RunArguments) -> dict[str, Any]:
    """What `PreferenceTrainer` takes."""
    from fastdpo.training.data.stream import has_images
    from fastdpo.training.loop.models import load_model, told_tokenizer
    from fastdpo.training.settings.parallel import check_same_settings, loading_of

    # What is cheap comes first: a wrong name or a broken row shows before gigabytes of weights are read.
    arguments.check_there()
    adapter = arguments.adapter.peft_config()
    tokenizer = told_tokenizer(arguments.model, or_processor=True)
    _, train_pairs, eval_pairs = _load_pairs(
        arguments.data, tokenizer, arguments.config, reads_reference=arguments.model.ref_model is None
    )
    _ = arguments.config.device  # ranks know of each other before a model is split over them
    check_same_settings(arguments.config)
    loading = arguments.loading_options() | loading_of(arguments.config)
    loading["with_images"] = has_images(train_pairs, eval_pairs)
    # A revision is of the model that is trained.
    others = {name: value for name, value in loading.items() if name != "revision"}
    ref_name, teacher_name = arguments.model.ref_model, arguments.model.teacher_model
    return {
        "model": load_model(arguments.model.name, **loading),
        "args": arguments.config,
        "train_dataset": train_pairs,
        "eval_dataset": eval_pairs,
        "processing_class": tokenizer,
        "ref_model": load_model(ref_name, what="ref_model", **others) if ref_name else None,
        "teacher_model": load_model(teacher_name, what="teacher_model", **others) if teacher_name else None,
        "peft_config": adapter,
    }


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
    _set_up_logging(config.process_index)
    arguments.check_there()
    tokenizer = told_tokenizer(arguments.model, or_processor=True)
    source, *data_sets = _load_pairs(arguments.data, tokenizer, config, reads_reference=False)
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
        count = _write_scored(output, source, scored if arguments.data.eval_dataset is None else scored[:1])
        print(f"{count} scored rows written to {output}")


def sample(argv: Sequence[str]) -> None:
    """``fastdpo sample``."""
    from fastdpo.rounds.ranks import Ranks
    from fastdpo.rounds.sample import sample as draw
    from fastdpo.rounds.settings import parse_sample

    model, arguments = parse_sample(argv)
    ranks = Ranks.joined(arguments.use_cpu)
    _set_up_logging(ranks.rank)
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
    _set_up_logging(ranks.rank)
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
    _set_up_logging(ranks.rank)
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
    from fastdpo.doctor.machine_report import machine_report, make_parser
    from fastdpo.training.settings.hub import check_there

    options = make_parser().parse_args(argv)
    check_there("model", options.model)
    print(machine_report(options))


def diagnose(argv: Sequence[str], *, debug: bool = False) -> int:
    """``fastdpo doctor``; 2 where ``fastdpo train`` with the same words would refuse to start."""
    from fastdpo.doctor.diagnosis import check_context, doctor

    parser = argparse.ArgumentParser(
        prog="fastdpo doctor",
        allow_abbrev=False,
        epilog="With a dataset or a YAML file: every setting of `fastdpo train`. The run is set up as there, "
        "weights are read and rows are tokenised, but nothing is trained and no file is written.",
    )
    parser.add_argument(
        "--model", help="path or hub id of a model to look at; alone, its weights are not read"
    )
    parser.add_argument("--dataset", help="the training data of a run to look at")
    parser.add_argument(
        "--context", type=int, help="with --model alone: what a step on a row of so many tokens takes"
    )
    parser.add_argument("--memory_gib", type=float, help="of the card it is to fit on; default: of this one")
    parser.add_argument("--context_chunk", type=int, help="tokens of a chunk where the context is carried")
    options, others = parser.parse_known_args(list(argv))
    if options.dataset is not None or others:
        if options.context is not None or options.memory_gib is not None:
            parser.error("--context and --memory_gib: got them with settings of a run, wanted --model alone")
        return _diagnose_run(argv, debug=debug)
    if options.model is not None:
        from fastdpo.training.settings.hub import check_there

        check_there("model", options.model)
    of_context = (options.context, options.memory_gib, options.context_chunk)
    try:
        check_context(options.model, *of_context)
    except ValueError as error:
        parser.error(f"--{error}")
    found = doctor(
        options.model,
        context=options.context,
        memory_gib=options.memory_gib,
        context_chunk=options.context_chunk,
    )
    print(found)
    of_model = found.sections.get(f"Model {options.model}", [])
    return 2 if any(name == "model" or text.startswith("refused") for name, text in of_model) else 0


def merge(argv: Sequence[str]) -> None:
    """``fastdpo merge``."""
    from fastdpo.training.loop.merge import merge as run

    run(argv)


def convert_config(argv: Sequence[str]) -> None:
    """``fastdpo convert-config``."""
    from fastdpo.training.settings.converters.convert import convert_config as run

    run(argv)


def _diagnose_run(argv: Sequence[str], *, debug: bool) -> int:
    """What ``fastdpo train`` would run, from the trainer that it would train."""
    from fastdpo.doctor.diagnosis import Diagnosis, doctor
    from fastdpo.training.data.stream import known_rows
    from fastdpo.training.loop.folders import check_output_dir
    from fastdpo.training.loop.trainer import PreferenceTrainer
    from fastdpo.training.settings.command_line import parse_train

    arguments = parse_train(argv)
    _set_up_logging(arguments.config.process_index, level=logging.WARNING)
    lines, refused = [("output_dir", str(arguments.config.output_dir))], []
    try:
        check_output_dir(arguments.config)
    except ValueError as error:
        refused.append(str(error))
    parts = _load_run(arguments)
    rows = known_rows(parts["train_dataset"])
    begins = "" if rows is parts["train_dataset"] else "a stream, which begins with "
    lines.append(("dataset", f"{begins}{rows.report}"))
    if parts["eval_dataset"] is not None:
        lines.append(("evaluation", f"{len(parts['eval_dataset'])} of {parts['eval_dataset'].report.source}"))
    with tempfile.TemporaryDirectory() as folder:
        arguments.config.output_dir = folder  # a Trainer makes its own when it is made
        try:
            trainer = PreferenceTrainer(**parts)
            trainer.get_train_dataloader()
            found = doctor(trainer)
        except (ValueError, ImportError) as error:
            if debug:
                raise
            refused.append(str(error))
            found = doctor(parts["model"])
    refused += [
        f"{title}: {finding}"
        for title, section in found.sections.items()
        for name, finding in section
        if name == "refused"
    ]
    verdict = [("refused", " ".join(reason.split())) for reason in refused] or [("refused", "nothing")]
    print(Diagnosis({**found.sections, "Run": lines + verdict}))
    return 2 if refused else 0


def _load_pairs(
    data: DataArguments, tokenizer: Any, config: PreferenceConfig, *, reads_reference: bool
) -> tuple[Any, Any, RowDataset | None]:
    """The rows of ``--dataset``, and the pairs to train, which may be a stream, and to evaluate on."""
    from fastdpo.training.data.dataset import split_rows
    from fastdpo.training.data.source import read_rows
    from fastdpo.training.data.stream import StreamDataset
    from fastdpo.training.loop.setup import tokenized_pairs
    from fastdpo.training.loop.stream import prepare_stream

    source: RowSource | RowStream
    pairs: RowDataset | StreamDataset
    if data.dataset_streaming:
        source = read_rows(
            data.dataset, split=data.dataset_split, weights=data.dataset_weights, streaming=True
        )
        pairs = prepare_stream(source, tokenizer, config, reads_reference=reads_reference)
    else:
        source = read_rows(data.dataset, split=data.dataset_split, weights=data.dataset_weights)
        pairs = tokenized_pairs(source, tokenizer, config, reads_reference=reads_reference)
    if data.eval_dataset is not None:
        eval_rows = read_rows(data.eval_dataset, split=data.eval_dataset_split or "test")
        if data.eval_dataset_split is not None and eval_rows.name == source.name:
            raise ValueError(
                f"eval_dataset_split: got {data.eval_dataset_split!r}, but the rows of {source.name} are "
                "trained on (a file has no splits): give --eval_dataset another, or --held_out"
            )
        held_out = tokenized_pairs(eval_rows, tokenizer, config, reads_reference=reads_reference)
        return source, pairs, held_out
    if data.held_out and not isinstance(pairs, StreamDataset):
        return source, *split_rows(pairs, data.held_out, seed=config.data_seed or config.seed)
    return source, pairs, None


def _write_scored(path: Path, source: RowSource, scored: Sequence[RowDataset]) -> int:
    """Write the rows that were scored, in their order, each with its log-probabilities and no others."""
    from fastdpo.training.data.references import scores_by_row
    from fastdpo.training.data.row import WRITTEN_COLUMNS

    scores: dict[int, dict[str, Any]] = {}
    for dataset in scored:
        for place, values in scores_by_row(dataset):
            # Of a pair taken apart: one after the other.
            known = scores.get(place, {})
            scores[place] = {
                name: known[name] + value if name in known else value for name, value in values.items()
            }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(".tmp")
    with partial_file.open("w", encoding="utf-8") as file:
        for number, row in source:
            if number in scores:
                kept = {name: value for name, value in row.items() if name not in WRITTEN_COLUMNS}
                line = json.dumps({**kept, **scores[number]}, ensure_ascii=False, default=str)
                # Columns that nobody looked at may hold half a surrogate pair, which JSON can only escape.
                file.write(line.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
    partial_file.replace(path)
    return len(scores)


def _set_up_logging(process_index: int, *, level: int = logging.INFO) -> None:
    """Our own lines on standard error; other libraries have handlers of their own."""
    log = logging.getLogger("fastdpo")
    for handler in [handler for handler in log.handlers if handler.name == "fastdpo"]:
        log.removeHandler(handler)
    handler = logging.StreamHandler()
    handler.name = "fastdpo"
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(level if process_index == 0 else logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
