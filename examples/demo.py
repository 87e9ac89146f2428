"""``make demo``: DPO on the spot, on pairs made from the Python standard library's own documentation.

    python examples/demo.py                  # about five minutes on two CPU cores
    python examples/demo.py --quick          # the same at toy sizes, in seconds

A byte-level BPE is trained on the library's sources, a small random Llama is trained with DPO alone to prefer
a function's own docstring over another's, and what one training step costs with the fused head and without it
is measured on the trained model. Writes the model, ``curves.png``, ``metrics.jsonl`` and ``summary.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

# Before torch loads: threads that spin while others work make small products many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from small_llama import random_llama, train_tokenizer
from stdlib_pairs import documented_functions, make_pairs, read_sources, split_by_module
from step_cost import Batch, compare
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

import fastdpo

Rows = list[dict[str, str]]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    started = time.perf_counter()
    hf_logging.disable_progress_bar()  # of loading and saving; training keeps its own
    rng = random.Random(args.seed)

    say("Data: signatures and docstrings of the standard library")
    sources = read_sources()
    functions = documented_functions(sources)
    training, held_out = split_by_module(functions, held_out=0.15, rng=rng)
    if args.quick:
        training, held_out = training[:120], held_out[:60]
    train_rows = [with_words(row) for row in make_pairs(training, args.rounds, rng)]
    test_rows = [with_words(row) for row in make_pairs(held_out, 1, rng)]
    modules = len({function.module for function in training}), len({function.module for function in held_out})
    print(f"  {len(train_rows)} training pairs from {modules[0]} modules")
    print(f"  {len(test_rows)} held-out pairs from {modules[1]} other modules")
    for name in ("prompt", "chosen", "rejected"):
        print(f"  {name:<9} {test_rows[0][name].strip()}")

    say("Tokenizer: a byte-level BPE, trained on the library's sources")
    texts = list(sources.values())[:40] if args.quick else list(sources.values())
    tokenizer = train_tokenizer(texts, args.vocab_size)
    print(f"  {len(tokenizer)} entries of {args.vocab_size}")

    say("Training: DPO from random weights, embeddings frozen")
    model = random_llama(
        tokenizer, vocab_size=args.vocab_size, hidden_size=args.hidden_size, layers=1, seed=args.seed
    )
    # The head is tied to them: it gets no gradient, and the fused head needs two products instead of three.
    model.get_input_embeddings().weight.requires_grad_(False)
    trainer = make_trainer(model, tokenizer, train_rows, test_rows, args)
    before = accuracy(trainer, test_rows)
    print(f"  held-out reward accuracy before: {show(before)} (policy = reference: every pair is a tie)")
    trained = trainer.train()
    after = accuracy(trainer, test_rows)
    print(f"  held-out reward accuracy after:  {show(after)}")
    trainer.save_model()
    tokenizer.save_pretrained(args.output_dir)
    reloaded = AutoModelForCausalLM.from_pretrained(args.output_dir)
    print(f"  {type(reloaded).__name__} saved to {args.output_dir} and loaded again")
    del trainer, model, reloaded

    say("One training step, on the same model and batch")
    batch = step_batch(tokenizer, rng.sample(test_rows, args.step_pairs))
    cost = compare(args.output_dir, batch, args.repeats)
    report(cost, args)
    summary = {
        "accuracy_before": before,
        "accuracy_after": after,
        "train_loss": trained.training_loss,
        "train_s": trained.metrics["train_runtime"],
        "step": cost,
        "total_s": time.perf_counter() - started,
        "settings": {name: str(value) for name, value in vars(args).items()},
    }
    (args.output_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\nDone in {summary['total_s']:.0f} s. See {args.output_dir}/curves.png")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small Llama with DPO on the standard library's docs."
    )
    parser.add_argument("--output_dir", type=Path, default=Path(".demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, learns nothing")
    args = parser.parse_args(argv)
    sizes = {"vocab_size": 32000, "hidden_size": 128, "rounds": 2, "step_pairs": 32, "repeats": 5}
    if args.quick:
        sizes = {"vocab_size": 1000, "hidden_size": 64, "rounds": 1, "step_pairs": 4, "repeats": 2}
    vars(args).update(sizes)
    return args


def say(title: str) -> None:
    print(f"\n{title}", flush=True)


def with_words(row: dict[str, str]) -> dict[str, str]:
    """The prompt without the module's path, and with the name's words spelled out as a docstring has them."""
    path, _, arguments = row["prompt"].removeprefix("def ").partition("(")
    name = ".".join(path.split(".")[-2:])
    words = " ".join(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name))
    return {**row, "prompt": f"def {name}({arguments} # {words}:"}


def make_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    train_rows: Rows,
    test_rows: Rows,
    args: argparse.Namespace,
) -> fastdpo.PreferenceTrainer:
    config = fastdpo.PreferenceConfig(
        output_dir=str(args.output_dir),
        overwrite_output_dir=True,
        loss_type="sigmoid",
        beta=0.1,
        max_length=128,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        weight_decay=0.01,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        num_train_epochs=1,
        save_strategy="no",
        logging_steps=20,
        report_to="none",
        use_cpu=True,
        seed=args.seed,
    )
    return fastdpo.PreferenceTrainer(
        model, config, train_dataset=train_rows, eval_dataset=test_rows, processing_class=tokenizer
    )


def accuracy(trainer: fastdpo.PreferenceTrainer, rows: Rows) -> dict[str, float]:
    """Share of pairs whose chosen answer has the larger reward (a tie counts half), and its error."""
    chosen, rejected = trainer.predict(rows).predictions.T
    share = float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())
    return {
        "accuracy": share,
        "standard_error": (share * (1 - share) / len(chosen)) ** 0.5,
        "pairs": len(chosen),
    }


def show(result: dict[str, float]) -> str:
    return f"{result['accuracy']:.1%} +- {result['standard_error']:.1%} of {result['pairs']} pairs"


def step_batch(tokenizer: PreTrainedTokenizerFast, rows: Rows) -> Batch:
    """Pairs as a padded batch, chosen first, with made-up reference log-probabilities."""
    features = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answers = {
            name: tokenizer(row[name], add_special_tokens=False)["input_ids"]
            for name in ("chosen", "rejected")
        }
        features.append((prompt, answers["chosen"], answers["rejected"]))
    sequences = [(prompt, chosen) for prompt, chosen, _ in features]
    sequences += [(prompt, rejected) for prompt, _, rejected in features]
    length = max(len(prompt) + len(answer) for prompt, answer in sequences)
    shape = (len(sequences), length)
    batch = {
        "input_ids": torch.full(shape, tokenizer.pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
        "ref_logps": torch.full((len(sequences),), -100.0),
    }
    for row, (prompt, answer) in enumerate(sequences):
        tokens = torch.tensor(prompt + answer)
        batch["input_ids"][row, : len(tokens)] = tokens
        batch["attention_mask"][row, : len(tokens)] = 1
        batch["labels"][row, len(prompt) : len(tokens)] = tokens[len(prompt) :]
    return batch


def report(cost: dict[str, Any], args: argparse.Namespace) -> None:
    batch = cost["batch"]
    print(
        f"  equal on both sides: this model (hidden {args.hidden_size}, vocabulary {args.vocab_size}), all "
        f"weights trained, fp32,\n  {batch['pairs']} pairs of up to {batch['length']} tokens "
        f"({batch['labelled_tokens']} of {batch['tokens']} labelled), DPO loss, {cost['threads']} threads;\n"
        "  loss and gradient norm agree to 1e-4"
    )
    print(f"  {'':<12}{'step time':>12}{'peak memory of the step':>26}")
    for side in ("unpatched", "fused"):
        print(f"  {side:<12}{cost['step_s'][side] * 1e3:>9.0f} ms{cost['peak_mib'][side]:>22.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
