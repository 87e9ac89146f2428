"""DPO in a loop on accelerate. The lines marked ``# fastdpo`` are all that is not plain.

accelerate launch examples/accelerate_loop.py --model PATH_OR_ID --pairs pairs.jsonl --output_dir out

The reference is scored once, before training, so that no second model is held.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from pair_batches import make_batch, read_pairs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import LinearLogprobOutput, dpo_loss_from_logps, patch_model  # fastdpo


def train(
    accelerator: Accelerator,
    model: nn.Module,
    pairs: list[Any],
    *,
    batch_size: int = 4,
    epochs: int = 1,
    learning_rate: float = 1e-6,
    beta: float = 0.1,
) -> list[float]:
    """The loss of every step of this process, in nats."""
    patch_model(model)  # fastdpo: before `prepare`, whose mixed precision hides the model's forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    sums = reference_sums(accelerator, model, pairs, batch_size)
    rows = [(*pair, *ref) for pair, ref in zip(pairs, sums.tolist(), strict=True)]
    loader = DataLoader(rows, batch_size, shuffle=True, collate_fn=with_reference)  # type: ignore[arg-type]
    loader = accelerator.prepare(loader)
    losses = []
    for _ in range(epochs):
        for batch in loader:
            ref_logps = batch.pop("ref_logps")
            with accelerator.accumulate(model):
                out = model(**batch, return_logps=True)  # fastdpo: no logits, (2P, T) log-probabilities
                token = LinearLogprobOutput(out.logps)  # fastdpo
                result = dpo_loss_from_logps(token, out.logps_mask, ref_logps=ref_logps, beta=beta)  # fastdpo
                loss = result.loss  # fastdpo
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def with_reference(rows: list[Any]) -> dict[str, Tensor]:
    """A padded batch with the reference's sums ``(2P,)``, chosen first."""
    sums = torch.tensor([row[3] for row in rows] + [row[4] for row in rows])
    return {**make_batch([row[:3] for row in rows]), "ref_logps": sums}


@torch.no_grad()
def reference_sums(accelerator: Accelerator, model: nn.Module, pairs: list[Any], batch_size: int) -> Tensor:
    """``(P, 2)``: log-probabilities of chosen and rejected under the model as it is now, on every process."""
    was_training = model.training
    model.eval()
    loader = accelerator.prepare(DataLoader(pairs, batch_size, collate_fn=make_batch))  # type: ignore[arg-type]
    found = []
    for batch in loader:
        logps = model(**batch, return_logps=True).logps  # fastdpo
        found.append(accelerator.gather_for_metrics(logps.sum(1).view(2, -1).t().contiguous()))
    model.train(was_training)
    return torch.cat(found).cpu()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    args = parser.parse_args(argv)

    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    losses = train(
        accelerator,
        model,
        read_pairs(args.pairs, tokenizer),
        batch_size=args.batch_size,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
    )
    for step, loss in enumerate(losses):
        accelerator.print(f"step {step}: loss {loss:.4f}")
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
