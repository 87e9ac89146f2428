"""DPO in a loop of one's own that computes each prompt once. Lines marked ``# fastdpo`` are what is ours.

python examples/shared_prompts.py --model PATH_OR_ID --pairs pairs.jsonl --output_dir out

Answers that begin alike and rows of one conversation share that, too. For contexts that do not fit each call
takes a ``CarriedContext``: ``[{**call, "context": CarriedContext(1024)} for call in rows.calls]``.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from pair_batches import IGNORED, read_pairs
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import forest_batch, patch_model  # fastdpo


def train(
    model: nn.Module, pairs: list[Any], size: int, *, learning_rate: float = 1e-6, beta: float = 0.1
) -> list[float]:
    """The loss of every step of ``size`` pairs, in nats."""
    patch_model(model)  # fastdpo: before the copy, so that the reference is patched, too
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses = []
    for start in range(0, len(pairs), size):
        batch = pairs[start : start + size]
        texts = [(prompt, answer) for k in (1, 2) for prompt, answer in ((p[0], p[k]) for p in batch)]
        sequences = [prompt + answer for prompt, answer in texts]
        labels = [[IGNORED] * len(prompt) + answer for prompt, answer in texts]
        rows = forest_batch(sequences, labels, device=device)  # fastdpo
        request = {"row_batches": rows.calls, "token_layout": rows.tokens, "return_logps": True}  # fastdpo
        with torch.no_grad():
            ref = reference(**request).logps  # fastdpo: (N,), sequence after sequence
        sums = ref.new_zeros(len(texts)).index_add(0, rows.tokens.sequence_ids.to(device), ref)  # fastdpo
        loss = model(**request, pair_loss={"ref_logps": sums, "beta": beta}).pair_loss.loss  # fastdpo
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    pairs = read_pairs(args.pairs, tokenizer) * args.epochs
    for step, loss in enumerate(train(model, pairs, args.batch_size, learning_rate=args.learning_rate)):
        print(f"step {step}: loss {loss:.4f}")
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
