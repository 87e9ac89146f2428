"""The words of ``plan``, ``merge`` and ``convert-config``, understood before torch is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastdpo.plan.machines import ENGINES, REFERENCES
from fastdpo.training.settings.converters import SOURCES, TRAINERS
from fastdpo.training.settings.words import Parser


def plan_words(argv: Sequence[str]) -> argparse.Namespace:
    """What `machine_report` takes. Raises ArgumentError."""
    parser = Parser(
        prog="fastdpo plan",
        allow_abbrev=False,
        description="Predict what each GPU of many holds and sends in a step. Reads a config, no weights; "
        "needs no GPU.",
    )
    add = parser.add_argument
    add("--model", required=True, help="a config.json, a folder that has one, or a hub id")
    add(
        "--gpus",
        type=_counts,
        required=True,
        metavar="N",
        help="8, or 8,12,64, or powers of two: 8..1024",
    )
    add("--engine", required=True, choices=ENGINES, help="tp: tensor parallelism, FSDP2 over the other ranks")
    add("--tp_size", type=int, default=1, help="with tp or fsdp2: GPUs that share each layer's tensors")
    add("--dp_replicate_size", type=int, default=1, help="with fsdp2: copies of the model (HSDP)")
    add("--lora", action="store_true", help="adapters of rank 16 on all linear layers but the head")
    add("--tokens", type=int, default=8192, help="positions of a GPU's micro-batch (8192)")
    add("--labelled_tokens", type=int, help="of these, tokens of answers (a quarter)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights as loaded (float32; with --lora bfloat16)",
    )
    add("--mixed_precision", choices=("bf16", "no"), default="bf16", help="what they compute in (bf16)")
    add("--reference", choices=REFERENCES, help="(copy; with --lora adapter)")
    add("--no_activation_checkpointing", action="store_true", help="keep all activations")
    add("--context_chunk", type=int, help="tokens of a chunk where contexts are carried")
    add("--memory_gib", type=float, default=80.0, help="of a GPU (80)")
    return parser.parse_args(argv)


def merge_words(argv: Sequence[str]) -> argparse.Namespace:
    """What `training.loop.merge` takes. Raises ArgumentError."""
    parser = Parser(
        prog="fastdpo merge",
        description="Merges an adapter into its base. A base that was trained on in 4 or 8 bits, as "
        "settings.yaml beside the adapter says, is dequantised first: that is the model trained.",
    )
    add = parser.add_argument
    add("adapter", help="its folder or hub id")
    add("--output_dir", type=Path, required=True, help="a folder that is not there yet, or empty")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the weights; default bfloat16",
    )
    add(
        "--base",
        choices=("trained", "original"),
        default="trained",
        help="of a base of few bits: the weights that were trained on, or those they were made of",
    )
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser.parse_args(argv)


def convert_words(argv: Sequence[str]) -> argparse.Namespace:
    """What `converters.convert.convert_config` takes. Raises ArgumentError."""
    parser = Parser(
        prog="fastdpo convert-config",
        description="Prints a YAML file for `fastdpo train` with what a file of another library says.",
    )
    add = parser.add_argument
    add("file", type=Path, help="YAML of LLaMA-Factory, axolotl, TRL or alignment-handbook")
    add("--from", dest="source", choices=SOURCES, help="default: told by its settings")
    add("--trainer", choices=TRAINERS, help="of TRL's and alignment-handbook's files; default: told")
    return parser.parse_args(argv)


def _counts(text: str) -> tuple[int, ...]:
    """Numbers of GPUs.

    Raises:
        argparse.ArgumentTypeError: no numbers, or a range without a power of two.
    """
    first, dots, last = text.partition("..")
    try:
        if not dots:
            counts = tuple(int(word) for word in text.split(","))
        else:
            counts = tuple(2**n for n in range(31) if int(first) <= 2**n <= int(last))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, wanted a number of GPUs, a list (8,12,64), or a range of powers of two (8..1024)"
        )
    return counts
