"""``fastdpo doctor``: of this machine, of a model, or of a run that is not started."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence

from fastdpo.commands.run import load_run, set_up_logging
from fastdpo.training.settings.typos import check_words
from fastdpo.training.settings.words import Parser


def diagnose(argv: Sequence[str], *, debug: bool = False) -> int:
    """``fastdpo doctor``; 2 where ``fastdpo train`` with the same words would refuse to start."""
    parser = Parser(
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
        check_words("train", argv)
        return _diagnose_run(argv, debug=debug)
    if options.model is not None:
        from fastdpo.training.settings.hub import check_there

        check_there("model", options.model)
    from fastdpo.doctor.diagnosis import check_context, doctor

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


def _diagnose_run(argv: Sequence[str], *, debug: bool) -> int:
    """What ``fastdpo train`` would run, from the trainer that it would train."""
    from fastdpo.doctor.diagnosis import Diagnosis, doctor
    from fastdpo.training.data.stream import known_rows
    from fastdpo.training.loop.folders import check_output_dir
    from fastdpo.training.loop.trainer import PreferenceTrainer
    from fastdpo.training.settings.command_line import parse_train

    arguments = parse_train(argv)
    set_up_logging(arguments.config.process_index, level=logging.WARNING)
    lines, refused = [("output_dir", str(arguments.config.output_dir))], []
    try:
        check_output_dir(arguments.config)
    except ValueError as error:
        refused.append(str(error))
    parts = load_run(arguments)
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
