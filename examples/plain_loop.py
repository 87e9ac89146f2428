"""DPO in a loop of one's own, in plain PyTorch. The lines marked ``# fastdpo`` are all that is not plain.

python examples/plain_loop.py --model PATH_OR_ID --pairs pairs.jsonl --output_dir out
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from typing import Any

import torch
from pair_batches import batches, read_pairs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import LinearLogprobOutput, dpo_loss_from_logps, patch_model  # fastdpo


def train(
    model: nn.Module, data: Iterable[dict[str, Tensor]], *, learning_rate: float = 1e-6, beta: float = 0.1
) -> list[float]:
    """The loss of every step, in nats."""
    patch_model(model)  # fastdpo: before the copy, so that the reference is patched, too
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses = []
    for host_batch in data:
        batch = {name: value.to(device) for name, value in host_batch.items()}
        with torch.no_grad():
            ref = reference(**batch, return_logps=True)  # fastdpo: no logits, (2P, T) log-probabilities
        out = model(**batch, return_logps=True)  # fastdpo
        token = LinearLogprobOutput(out.logps)  # fastdpo
        result = dpo_loss_from_logps(token, out.logps_mask, ref_logps=ref.logps, beta=beta)  # fastdpo
        loss = result.loss  # fastdpo
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
    pairs = read_pairs(args.pairs, tokenizer)
    data = (batch for epoch in range(args.epochs) for batch in batches(pairs, args.batch_size, seed=epoch))
    for step, loss in enumerate(train(model, data, learning_rate=args.learning_rate)):
        print(f"step {step}: loss {loss:.4f}")
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
