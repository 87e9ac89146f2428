"""Whole DPO steps, side by side: TRL's ``DPOTrainer`` and ours in every batch layout.

    python -m benchmarks.step --data pairs.jsonl                     # on a CPU: small-llama, 4 pairs a step
    python -m benchmarks.step --size llama-3-8b-lora --device cuda --precision bf16  # pairs made up
    python -m benchmarks.step --data pairs.jsonl --size qwen2.5-0.5b --device cuda --precision bf16

A step is: log-probabilities of the reference, of the policy, loss, backward pass, clipping to norm 1,
AdamW; fp32 weights, no activation checkpointing, no precomputed reference. Equal for all contenders: the
token ids of every batch, the seed of the weights, the optimiser and the order of the batches. The first steps
of each contender are compared before anything is timed: who computes another loss is reported and not timed.

Contenders: ``trl`` as it comes; ``trl-compacted`` with its dropping of unlabelled tokens, which it does on
GPUs alone, forced on; ``padded``, ``packed``, ``shared_prompt``. Each is built anew for every round and
freed after it; rounds take turns, so that drift hits all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import environment, peak_mib, summarise
from benchmarks.results import RESULTS, ResultFile
from benchmarks.step_data import MADE_UP, made_up_rows, make_data
from fastdpo.training.batches import sequence_tokens
from fastdpo.training.config import PreferenceConfig
from fastdpo.training.data import PreferenceDataset
from fastdpo.training.trainer import PreferenceTrainer

BETA, LEARNING_RATE, CLIP = 0.1, 1e-4, 1.0
OURS = ("padded", "packed", "shared_prompt")
CONTENDERS = ("trl", "trl-compacted", *OURS)
# By how much losses may differ. fp32: sums of some thousand tokens of 1e-5 nats, times beta. bf16: TRL rounds
# logits to 16 bits, 2e-2 nats a token of random sign: times beta and the root of a thousand tokens.
LOSS_BOUND = {"fp32": 1e-3, "bf16": 6e-2}


@dataclass(frozen=True)
class Size:
    """A Llama to train and what a step holds."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    pairs: int
    is_adapted: bool = False  # LoRA on the attention, in fp32, over weights in bf16 where a step is in bf16


SIZES = {
    "tiny": Size(64, 2, 4, 2, 128, 2000, 2),
    "mini-llama": Size(256, 6, 4, 4, 688, 16000, 4),
    "small-llama": Size(512, 12, 8, 8, 1376, 32000, 4),
    "qwen2.5-0.5b": Size(896, 24, 14, 2, 4864, 151936, 16),
    "llama-3.2-1b": Size(2048, 16, 32, 8, 8192, 128256, 16),
    "tiny-lora": Size(64, 2, 4, 2, 128, 2000, 2, is_adapted=True),
    "llama-3-8b-lora": Size(4096, 32, 32, 8, 14336, 128256, 4, is_adapted=True),
}


class Contender:
    """A model, its reference and its way to a loss, built from the same seed as all others."""

    def __init__(self, name: str, size: Size, tokenizer: Any, device: torch.device, precision: str) -> None:
        self.name, self.size, self.device, self.precision = name, size, device, precision
        self.model = make_model(size, tokenizer, seed=0)
        self.peft_config: Any = None
        # Of another seed, so that losses differ from ln 2 and from batch to batch.
        self.reference = None if size.is_adapted else make_model(size, tokenizer, seed=1)
        if size.is_adapted:
            from peft import LoraConfig

            if precision == "bf16":
                self.model = self.model.to(torch.bfloat16)
            names = ["q_proj", "k_proj", "v_proj", "o_proj"]
            self.peft_config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=names)
        build = self._build_trl if name.startswith("trl") else self._build_ours
        with tempfile.TemporaryDirectory() as folder:  # nothing is written: no trainer trains by itself
            self.trainer, self.collate = build(tokenizer, folder)
        self.model = self.trainer.model.train()
        self.model.to(device)
        if size.is_adapted:
            _move_adapter(self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)

    def _build_ours(self, tokenizer: Any, folder: str) -> tuple[Any, Callable[..., Any]]:
        args = PreferenceConfig(
            output_dir=folder, batch_layout=self.name, beta=BETA, bf16=False,
            reference="adapter" if self.size.is_adapted else "copy",
            use_cpu=self.device.type == "cpu", gradient_checkpointing=False, disable_tqdm=True,
            report_to="none",
        )  # fmt: skip
        trainer = PreferenceTrainer(
            self.model,
            args,
            processing_class=tokenizer,
            ref_model=self.reference,
            peft_config=self.peft_config,
        )
        return trainer, trainer.data_collator

    def _build_trl(self, tokenizer: Any, folder: str) -> tuple[Any, Callable[..., Any]]:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        args = DPOConfig(
            output_dir=folder, beta=BETA, use_cpu=self.device.type == "cpu", bf16=False,
            gradient_checkpointing=False, max_length=None, disable_tqdm=True, report_to="none",
        )  # fmt: skip
        stand_in = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
        trainer = DPOTrainer(
            self.model, self.reference, args, train_dataset=stand_in, processing_class=tokenizer,
            peft_config=self.peft_config,
        )  # fmt: skip
        names = ("prompt_ids", "chosen_ids", "rejected_ids")

        def collate(pairs: Sequence[Any]) -> Any:
            return trainer.data_collator([{name: pair[name].tolist() for name in names} for pair in pairs])

        return trainer, collate

    def step(self, inputs: Any) -> Tensor:
        """One whole step; the loss, ``()``."""
        is_bf16 = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16), self._compacted():
            loss = self.trainer.compute_loss(self.model, inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @contextlib.contextmanager
    def _compacted(self) -> Iterator[None]:
        """TRL's own switch, thrown: only labelled tokens reach its head, on a CPU too."""
        if self.name != "trl-compacted":
            yield
            return
        from trl.trainer import utils

        own = utils._use_triton
        utils._use_triton = lambda device: True
        try:
            yield
        finally:
            utils._use_triton = own


def _move_adapter(model: nn.Module) -> None:
    """Away from zero, where policy and reference are one, and to the same values for every contender."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def make_model(size: Size, tokenizer: Any, *, seed: int) -> nn.Module:
    """A Llama with random weights, the same for every contender."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=32768, tie_word_embeddings=size.hidden < 2048,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Run:
    """The batches of a comparison, and what came of each contender."""

    def __init__(
        self,
        size: Size,
        data: PreferenceDataset,
        tokenizer: Any,
        device: torch.device,
        precision: str,
        steps: int,
    ) -> None:
        self.size, self.tokenizer, self.device, self.precision = size, tokenizer, device, precision
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
        needed = size.pairs * steps
        order = (order * -(-needed // len(order)))[:needed]
        self.batches = [[data[i] for i in order[k : k + size.pairs]] for k in range(0, needed, size.pairs)]

    def once(self, name: str, steps: int, *, measure_peak: bool = False) -> dict[str, Any]:
        """Losses, milliseconds, tokens and peak memory of the first ``steps`` steps of a new contender."""
        contender = Contender(name, self.size, self.tokenizer, self.device, self.precision)
        found = self._steps(contender, steps, measure_peak)
        del contender
        gc.collect()  # trainers and models refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def _steps(self, contender: Contender, steps: int, measure_peak: bool) -> dict[str, Any]:
        # Collated beforehand: loaders do it in processes of their own while the device computes.
        inputs = [contender.trainer._prepare_inputs(contender.collate(b)) for b in self.batches[:steps]]
        found: dict[str, Any] = {"samples_ms": [], "tokens": [], "positions": []}
        losses = []
        for batch in inputs:
            self._synchronise()
            start = time.perf_counter()
            losses.append(contender.step(batch))
            self._synchronise()
            found["samples_ms"].append((time.perf_counter() - start) * 1e3)
            calls = batch.get("calls", [batch])
            found["positions"].append(sum(call["input_ids"].numel() for call in calls))
            found["tokens"].append(int(sequence_tokens(batch)))
        found["losses"] = [float(loss) for loss in losses]
        if measure_peak:
            largest = inputs[max(range(steps), key=lambda i: found["positions"][i])]
            # Above what is held between steps: weights, reference, Adam's state.
            found["peak_mib"] = peak_mib(lambda: contender.step(largest), self.device)
        return found

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def compare(run: Run, names: Sequence[str], *, check_steps: int, steps: int, rounds: int) -> dict[str, Any]:
    """Check the contenders against each other, then time those that agree.

    Returns:
        ``failed`` and ``not_run`` by name, and ``contenders``: losses, milliseconds, tokens a second,
        positions of the backbone a pair, peak memory.
    """
    failed: dict[str, str] = {}
    not_run: dict[str, str] = {}
    checked: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            checked[name] = run.once(name, check_steps, measure_peak=True)
        except ImportError as error:
            not_run[name] = f"not installed: {error}"
        except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    bound = LOSS_BOUND[run.precision]
    middle = [
        statistics.median(losses) for losses in zip(*(c["losses"] for c in checked.values()), strict=True)
    ]
    for name, found in checked.items():
        gap = max(abs(a - b) for a, b in zip(found["losses"], middle, strict=True))
        if not gap <= bound:
            failed[name] = f"its losses are off by {gap:.1e}, allowed {bound:.0e}; not timed"
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in checked if name not in failed}
    for number in range(rounds):
        turn = list(samples)
        for name in turn[number % max(len(turn), 1) :] + turn[: number % max(len(turn), 1)]:
            samples[name].append(run.once(name, steps + 1))
    return {"failed": failed, "not_run": not_run, "contenders": {
        name: _summary(run, rounds_of, checked[name]) for name, rounds_of in samples.items()
    }}  # fmt: skip


def _summary(run: Run, rounds: Sequence[dict[str, Any]], checked: dict[str, Any]) -> dict[str, Any]:
    # The first step of a round warms up: allocators, thread pools, Adam's state.
    times = [time_ms for found in rounds for time_ms in found["samples_ms"][1:]]
    seconds = sum(times) / 1e3
    tokens = sum(count for found in rounds for count in found["tokens"][1:])
    positions = sum(count for found in rounds for count in found["positions"][1:])
    return {
        **summarise(times),
        "useful_tokens_per_s": tokens / seconds,
        "backbone_positions_per_pair": positions / (run.size.pairs * len(times)),
        "peak_mib": checked.get("peak_mib"),
        "losses": rounds[0]["losses"],
        "samples_ms": times,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="preference pairs, JSONL; default: pairs made up")
    parser.add_argument("--size", choices=SIZES, default="small-llama")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=LOSS_BOUND, default="fp32", help="bf16 is autocast")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=None)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=None, help="pairs a step; default: the size's own")
    parser.add_argument("--check_steps", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda needs a CUDA device, and torch sees none", file=sys.stderr)
        return 1
    device = torch.device(args.device)
    try:
        file = ResultFile(args.results, environment(device), {"suites": ["step"]})
        result = bench_step(
            args.size, device, args.precision, data=args.data, contenders=args.contenders, pairs=args.pairs,
            max_length=args.max_length, check_steps=args.check_steps, steps=args.steps, rounds=args.rounds,
        )  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, cell in result["contenders"].items():
        peak = "" if cell["peak_mib"] is None else f"{cell['peak_mib']:10.0f} MiB"
        print(
            f"{name:<14} {cell['median_ms']:10.1f} ms {cell['useful_tokens_per_s']:10.0f} tokens/s "
            f"{cell['backbone_positions_per_pair']:8.0f} positions/pair{peak}"
        )
    for name, reason in result["failed"].items():
        print(f"{name:<14} FAILED: {reason}")
    print(json.dumps({name: cell["losses"] for name, cell in result["contenders"].items()}))
    print(f"wrote {file.add(result)}")
    return 1 if result["failed"] else 0


def bench_step(
    size_name: str,
    device: torch.device,
    precision: str,
    *,
    data: Path | None = None,
    contenders: Sequence[str] | None = None,
    pairs: int | None = None,
    max_length: int = 1024,
    check_steps: int = 3,
    steps: int = 5,
    rounds: int = 3,
) -> dict[str, Any]:
    """One size by every contender; ``data`` None: pairs made up."""
    # On a GPU TRL drops unlabelled tokens by itself: the two are one.
    names = contenders or [n for n in CONTENDERS if n != "trl-compacted" or device.type == "cpu"]
    size = SIZES[size_name]
    size = replace(size, pairs=pairs or size.pairs)
    count = size.pairs * max(steps + 1, check_steps)
    pairs_data, tokenizer = make_data(data or made_up_rows(count), size.vocab, max_length)
    run = Run(size, pairs_data, tokenizer, device, precision, max(steps + 1, check_steps))
    compared = compare(run, names, check_steps=check_steps, steps=steps, rounds=rounds)
    return {
        "suite": "step", "key": step_key(size_name, precision), "model": size_name, "size": vars(size),
        "precision": precision, "max_length": max_length, "steps": steps, "rounds": rounds,
        "data": data.name if data else MADE_UP, "equal": "token ids, weights, optimiser, order of batches",
        **compared,
    }  # fmt: skip


def step_key(size_name: str, precision: str) -> str:
    return f"step/{size_name}/{precision}"


if __name__ == "__main__":
    sys.exit(main())
