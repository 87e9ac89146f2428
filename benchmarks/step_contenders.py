"""Who takes part in `benchmarks.step`: models of a size, and every way to a step on them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.training.batches.batch import IGNORE_INDEX, PaddedBatch
from fastdpo.training.batches.collate import PaddedCollator
from fastdpo.training.data.dataset import RowDataset
from fastdpo.training.data.row import REF_COLUMNS, REFERENCE, Row
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig

BETA, LEARNING_RATE, CLIP = 0.1, 1e-4, 1.0
# In the order of the positions that the backbone computes, which `auto` has of one of the others.
OURS = ("padded", "packed", "shared_prompt", "auto")
CONTENDERS = ("plain", "trl", "trl-compacted", *OURS)


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
    """A model, its reference and its way to a loss, built from the same seed as all others.

    Args:
        data: with the reference's numbers where there is to be no reference model.
        settings: of the trainer, beside those that all have (`benchmarks.context`); None for the layout that
            ``name`` says.
    """

    def __init__(
        self,
        name: str,
        size: Size,
        data: RowDataset,
        tokenizer: Any,
        device: torch.device,
        precision: str,
        attention: str,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.size, self.data = name, size, data
        self.settings = dict(settings or {})
        self.device, self.precision = device, precision
        how = {"device": device, "dtype": weights_dtype(size, precision), "attention": attention}
        self.model = make_model(size, tokenizer, seed=0, **how)
        self.peft_config: Any = None
        # Of another seed, so that losses differ from ln 2 and from batch to batch.
        has_model = not (size.is_adapted or data.has_reference)
        self.reference = make_model(size, tokenizer, seed=1, **how) if has_model else None
        if size.is_adapted:
            self.peft_config = lora_config()
        builders = {"plain": self._build_plain, **dict.fromkeys(OURS, self._build_ours)}
        if settings is not None and name != "trl":
            builders[name] = self._build_ours
        with tempfile.TemporaryDirectory() as folder:  # nothing is written: no trainer trains by itself
            self.trainer, self.collate = builders.get(name, self._build_trl)(tokenizer, folder)
        self.model = self.trainer.model.train()
        self.model.to(device)
        if self.settings.get("gradient_checkpointing"):  # which trainers do when they train
            enable: Any = getattr(
                self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        if size.is_adapted:
            move_adapter(self.model)
        self.optimizer = make_optimizer(self.model)

    def _build_ours(self, tokenizer: Any, folder: str) -> tuple[Any, Callable[..., Any]]:
        reference = "adapter" if self.size.is_adapted else "copy"
        layout = {"batch_layout": self.name, "gradient_checkpointing": False}
        args = PreferenceConfig(
            output_dir=folder, beta=BETA, bf16=False,
            reference="precomputed" if self.data.has_reference else reference,
            use_cpu=self.device.type == "cpu", disable_tqdm=True,
            per_device_train_batch_size=self.size.pairs, report_to="none", **{**layout, **self.settings},
        )  # fmt: skip
        trainer = PreferenceTrainer(
            self.model,
            args,
            train_dataset=self.data,  # by which `auto` predicts what is cheapest
            processing_class=tokenizer,
            ref_model=self.reference,
            peft_config=self.peft_config,
        )
        return trainer, trainer.data_collator

    def _build_plain(self, tokenizer: Any, folder: str) -> tuple[Any, Callable[..., Any]]:
        if self.peft_config is not None:
            from peft import get_peft_model

            self.model = get_peft_model(self.model, self.peft_config)
        loop = PlainLoop(self.model, self.reference, self.device)
        return loop, PaddedCollator(tokenizer.pad_token_id)

    def _build_trl(self, tokenizer: Any, folder: str) -> tuple[Any, Callable[..., Any]]:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        args = DPOConfig(
            output_dir=folder, beta=BETA, use_cpu=self.device.type == "cpu", bf16=False,
            max_length=None, disable_tqdm=True, report_to="none",
            precompute_ref_log_probs=self.data.has_reference,  # here of the stand-in; a batch brings its own
            **{"gradient_checkpointing": False, **self.settings},
        )  # fmt: skip
        stand_in = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
        with _quiet_data():
            trainer = DPOTrainer(
                self.model, self.reference, args, train_dataset=stand_in, processing_class=tokenizer,
                peft_config=self.peft_config,
            )  # fmt: skip
        names = ("prompt_ids", "chosen_ids", "rejected_ids")

        def collate(pairs: Sequence[Row]) -> Any:
            parts = [(pair.prompt, *(answer.ids for answer in pair.answers)) for pair in pairs]
            found: list[dict[str, Any]] = [
                {name: ids.tolist() for name, ids in zip(names, part, strict=True)} for part in parts
            ]
            for pair, row in zip(pairs, found, strict=True):
                if REFERENCE in pair.numbers:
                    row.update(
                        zip(REF_COLUMNS, torch.as_tensor(pair.numbers[REFERENCE]).tolist(), strict=True)
                    )
            return trainer.data_collator(found)

        return trainer, collate

    def step(self, inputs: Any) -> Tensor:
        """One whole step; the loss, ``()``."""
        is_bf16 = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16), self._compacted():
            loss = self.trainer.compute_loss(self.model, inputs)
        loss.backward()
        # ``()``, before clipping: kept, because Adam's steps hide a gradient that is off by a factor.
        self.gradient_norm = update(self.model, self.optimizer)
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


@contextlib.contextmanager
def _quiet_data() -> Iterator[None]:
    """Without the progress bars of two made-up rows, which would run over the suites' own."""
    import datasets

    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()


class PlainLoop:
    """A DPO step as one writes it down: padded pairs, full logits of policy and reference, no trainer.

    Args:
        reference: None for the model without its adapter.
    """

    def __init__(self, model: nn.Module, reference: nn.Module | None, device: torch.device) -> None:
        self.model: Any = model
        self.device = device
        self.reference = None if reference is None else reference.requires_grad_(False).eval().to(device)

    def _prepare_inputs(self, batch: PaddedBatch) -> PaddedBatch:
        return batch.to(self.device)

    def compute_loss(self, model: nn.Module, batch: PaddedBatch) -> Tensor:
        """``()``: the sigmoid loss of P pairs, chosen in the first P rows, rejected in the others."""
        adapter_off = contextlib.nullcontext if self.reference is not None else self.model.disable_adapter
        with torch.no_grad(), adapter_off():
            ref_logps = answer_logps(self.reference or model, batch)
        chosen, rejected = (answer_logps(model, batch) - ref_logps).chunk(2)
        return -nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def answer_logps(model: nn.Module, batch: PaddedBatch) -> Tensor:
    """``(2P,)`` log-probabilities of the answers, in nats, from the logits of all positions."""
    logits = model(**batch.sequences.model_inputs(), use_cache=False).logits
    labels = batch.sequences.labels[:, 1:]
    is_answer = labels != IGNORE_INDEX
    logps = logits[:, :-1].log_softmax(-1, dtype=torch.float32)  # as autocast does by itself on a GPU
    logps = logps.gather(-1, labels.masked_fill(~is_answer, 0).unsqueeze(-1)).squeeze(-1)
    total: Tensor = (logps * is_answer).sum(-1)
    return total


def weights_dtype(size: Size, precision: str) -> torch.dtype:
    """Of a model as it is made; an adapter is fp32."""
    return torch.bfloat16 if size.is_adapted and precision == "bf16" else torch.float32


def lora_config() -> Any:
    from peft import LoraConfig

    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=names)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE)


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Clip, step, forget the gradients; their norm before it, ``()``."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()


def move_adapter(model: nn.Module) -> None:
    """Away from zero, where policy and reference are one, and to the same values for every contender."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def make_model(
    size: Size, tokenizer: Any, *, seed: int, device: torch.device, dtype: torch.dtype, attention: str
) -> nn.Module:
    """A Llama with random weights, the same for every contender on a device.

    Made where it runs: billions of weights take minutes to draw on a CPU.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=2**18, tie_word_embeddings=size.hidden < 2048,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    return model
