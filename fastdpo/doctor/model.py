"""What ``fastdpo.doctor`` says of a loaded model, or of a trainer: the plan, the memory, the refusals.

Trainers are known here by what they have, not by their classes: those of ``training`` and of TRL lie above
this layer or outside the package. Nothing runs and nothing is changed; the plan is made by the code that
makes it in a call, from shapes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from fastdpo.doctor.plan import Divergences, plan_of
from fastdpo.functional.kinds import divergence_outputs
from fastdpo.integrations.lm_head import current_head, read_head, unwrap, wrappers_and_model
from fastdpo.integrations.model import is_patched
from fastdpo.integrations.patched_class import own_forward
from fastdpo.integrations.trl import trl_status
from fastdpo.integrations.virtual_tokens import describe_virtual_tokens, has_virtual_tokens
from fastdpo.losses import build_objective
from fastdpo.plan.schedule import MIB
from fastdpo.types import Execution, HeadAdapter, LMHead

Lines = list[tuple[str, str]]
DEFAULT_TOKENS = 4096
_LOW_PRECISION = (torch.float16, torch.bfloat16)


def is_trainer(target: Any) -> bool:
    """Whether it is a transformers ``Trainer`` or has what one has."""
    return all(hasattr(target, name) for name in ("model", "args", "train_dataset"))


def model_sections(model: nn.Module) -> dict[str, Lines]:
    """The model's head, what of it is patched, and the plan for 4096 labelled tokens."""
    lines, head = _model_lines(model)
    sections = {f"Model {type(unwrap_if_possible(model)).__name__}": lines}
    if head is not None:
        execution = hook_execution(model) or Execution()
        sections |= _plan_section(
            model, head, execution, [DEFAULT_TOKENS], f"{DEFAULT_TOKENS} labelled tokens"
        )
    return sections


def trainer_sections(trainer: Any) -> dict[str, Lines]:
    """The model, the trainer's settings, its longest pair and largest batch, and the plan for that batch."""
    lines, head = _model_lines(trainer.model, is_trl=_is_trl(trainer))
    sections = {
        f"Model {type(unwrap_if_possible(trainer.model)).__name__}": lines,
        f"Trainer {type(trainer).__name__}": _trainer_lines(trainer),
    }
    data, largest, longest = _data_lines(trainer, head)
    sections["Data"] = data
    sections["Memory but for activations and the head"] = _memory_lines(trainer)
    if head is not None:
        what = "the largest batch" if largest else f"{DEFAULT_TOKENS} labelled tokens"
        how = (trainer.model, head, _execution_of(trainer))
        kind: dict[str, Any] = {
            # With gold answers the loss waits for log-probabilities.
            "has_pair_loss": bool(getattr(trainer.args, "makes_loss_in_head", False))
            and not getattr(_known(trainer), "has_gold", False),
            "divergences": _divergences_of(trainer, head),
        }
        with _autocast_of(trainer):
            if longest is not None:
                data[2:2] = _memory_for(*how, [longest], **kind)
            sections |= _plan_section(*how, largest or [DEFAULT_TOKENS], what, **kind)
    return sections


def unwrap_if_possible(model: Any) -> Any:
    try:
        return unwrap(model)
    except (ValueError, TypeError):
        return model


def hook_execution(model: nn.Module) -> Execution | None:
    """The options that a model was patched with, or None where it is not patched."""
    return type(unwrap(model))._fastdpo_hook.execution if is_patched(model) else None


def patch_refusal(model: nn.Module, *, is_reached: bool = False) -> str | None:
    """Why `patch_model` would refuse a model, or a call of a patched one would fail for its head; or None.

    ``is_reached``: that it may be hidden behind another forward is no reason.
    """
    try:
        inner: Any = unwrap(model)
        if is_patched(inner):
            current_head(inner, type(inner)._fastdpo_hook.tail)
        else:
            if not is_reached:
                own_forward(inner)
            read_head(inner)
    except ValueError as error:
        return str(error)
    return None


def _model_lines(model: nn.Module, *, is_trl: bool = False) -> tuple[Lines, LMHead | None]:
    """The lines of a model's head, and the head if it is understood.

    ``is_trl``: of a TRL trainer, which puts a forward of its own on the model, for `patch_trl` to reach.
    """
    inner = unwrap_if_possible(model)
    wrappers = "" if inner is model else f" in a {type(model).__name__}"
    lines = [("class", type(inner).__name__ + wrappers)]
    if (reason := patch_refusal(model, is_reached=is_trl)) is not None:
        return [*lines, ("refused", _one_line(reason))], None
    head = read_head(model)
    vocab, hidden = head.weight.shape
    tied = head.weight is inner.get_input_embeddings().weight
    trained = "trained" if head.weight.requires_grad else "frozen"
    kind = f"{str(head.weight.dtype).removeprefix('torch.')}, {head.weight.device}"
    lines += [
        ("head", f"vocabulary {vocab}, hidden {hidden}, {kind}, {'tied' if tied else 'not tied'}, {trained}"),
        ("bias", "none" if head.bias is None else "yes"),
        (
            "logits",
            f"scale {head.logit_scale:g}, softcap {head.softcap if head.softcap is not None else 'none'}",
        ),
    ]
    if isinstance(adapter := head.adapter, HeadAdapter):
        what = f"LoRA of rank {adapter.lora_a.shape[0]}, scale {adapter.scale:g}"
        lines.append(
            ("adapter on the head", what + (f", dropout {adapter.dropout:g}" * bool(adapter.dropout)))
        )
    for wrapper in wrappers_and_model(model)[:-1]:
        if has_virtual_tokens(wrapper):
            lines.append(("virtual tokens", describe_virtual_tokens(wrapper)))
    execution = hook_execution(model)
    if execution is not None:
        lines.append(("patched", f"yes, with {execution}"))
    elif not is_trl:
        lines.append(("patched", "no; fastdpo.patch_model(model) does it"))
    low = [p for p in inner.parameters() if p.requires_grad and p.dtype in _LOW_PRECISION]
    if low:
        lines.append(
            (
                "trained in 16 bits",
                f"{sum(p.numel() for p in low)} weights, whose small updates rounding loses; load them as "
                "float32 (bf16=True still computes in bfloat16), or train an adapter",
            )
        )
    return lines, head


def _plan_section(
    model: nn.Module,
    head: LMHead,
    execution: Execution,
    row_tokens: Sequence[int],
    what: str,
    has_pair_loss: bool = False,
    divergences: Divergences | None = None,
) -> dict[str, Lines]:
    """The plan of a call with gradients as the model's parameters want them."""
    title = f"Plan for {what}"
    try:
        plan, backend = plan_of(model, head, execution, row_tokens, has_pair_loss, divergences)
    except (ValueError, TypeError) as error:
        return {title: [("refused", _one_line(str(error)))]}
    lines = [("backend", backend)]
    if divergences is not None:
        of = f"token_divergence, with a product for each of {1 + len(divergences.heads)} heads"
        lines.insert(0, ("op", of))
    for line in str(plan).splitlines():
        name, finding = line.split("  ", 1)
        lines.append((name.strip(), finding.strip()))
    return {title: lines}


def _is_trl(trainer: Any) -> bool:
    return any(kind.__module__.split(".")[0] == "trl" for kind in type(trainer).__mro__)


def _trainer_lines(trainer: Any) -> Lines:
    args = trainer.args
    lines = []
    if _is_trl(trainer):
        lines += trl_status(type(trainer))
    if (reference := getattr(trainer, "reference", None)) is not None and hasattr(reference, "kind"):
        lines.append(("reference", str(reference.kind)))
        layout = getattr(trainer.data_collator, "layout", "padded")
        lines.append(("batch layout", str(layout)))
    if isinstance(losses := getattr(args, "loss_type", None), str | list | tuple):
        lines.append(("loss", losses if isinstance(losses, str) else ", ".join(losses)))
    precision = [name for name in ("bf16", "fp16") if getattr(args, name, False)]
    lines.append(("autocast", precision[0] if precision else "off"))
    if getattr(args, "use_liger_kernel", False):
        config = dict(args.liger_kernel_config or {})
        off = [name for name in ("cross_entropy", "fused_linear_cross_entropy") if config.get(name) is False]
        how = f"Liger's, but for {' and '.join(off)}" if off else "Liger's"
        lines.append(("kernels of the backbone", how))
    elif getattr(unwrap_if_possible(trainer.model), "use_kernels", False):
        lines.append(("kernels of the backbone", "the hub's, where it has some"))
    if router := getattr(trainer, "router", 0):
        lines.append(("router's loss", f"weight {router:g}"))
    if getattr(unwrap_if_possible(trainer.model), "is_quantized", False):
        config = unwrap_if_possible(trainer.model).config.quantization_config
        lines.append(("base", f"quantised: {_quantisation(config)}"))
    for name, engine in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):
        if getattr(trainer, name, False):
            lines.append(("engine", engine))
            if _is_trl(trainer):
                lines.append(("refused", "a sharded head in TRL's trainers: keep it whole (DDP, or ZeRO-2)"))
    return lines


def _quantisation(config: Any) -> str:
    method = getattr(config, "quant_method", "") or "bitsandbytes"
    bits = next((bits for bits in (4, 8) if getattr(config, f"load_in_{bits}bit", False)), None)
    return f"{getattr(method, 'value', method)}" + (f", {bits} bits" if bits else "")


def _data_lines(trainer: Any, head: LMHead | None) -> tuple[Lines, list[int], int | None]:
    """The longest row and the largest batch; the labelled tokens of that batch's rows, and of that row."""
    dataset = _known(trainer)
    sizes = _row_sizes(dataset)
    if not sizes:
        found = "none found in the trainer's train_dataset: no largest batch to plan for"
        return [("pairs", found)], [], None
    limit = getattr(trainer.args, "max_length", None)
    limit = limit if isinstance(limit, int) and limit > 0 else sys.maxsize
    labelled = torch.tensor([sum(min(n, limit) for n in answers) for _, *answers in sizes])
    scored = getattr(dataset, "num_labelled", None)  # of answers of several turns not all
    if getattr(trainer.args, "nll_on_prompt", None):  # the chosen answer's prompt, but for its first token
        labelled += torch.tensor([max(prompt - 1, 0) for prompt, *_ in sizes])
    elif isinstance(scored, torch.Tensor):
        labelled = scored
    lengths = torch.tensor([min(prompt + max(answers), limit) for prompt, *answers in sizes])
    counts = torch.tensor([len(answers) for _, *answers in sizes])
    kind = getattr(getattr(dataset, "kind", None), "name", "paired")  # other trainers' data are pairs
    unit = "pairs" if kind == "paired" else "rows"
    longest = int(lengths.argmax())
    lines = [
        (unit, str(len(sizes)) if kind == "paired" else f"{len(sizes)}, {kind}"),
        (
            f"longest {unit.removesuffix('s')}",
            f"{_row_name(dataset, longest)}: {_parts(sizes[longest], kind)} tokens",
        ),
    ]
    budget = getattr(trainer.args, "max_tokens_per_batch", None)
    if isinstance(budget, int):
        num_tokens = min(budget, int(labelled.sum()))
        largest = _fill(labelled.sort(descending=True).values.tolist(), num_tokens)
        batch = f"max_tokens_per_batch {budget}, at most {num_tokens} labelled tokens"
        positions, what = budget, f"{budget} positions"
    else:
        count = min(int(getattr(trainer.args, "train_batch_size", 1)), len(sizes))
        largest = labelled.topk(count).values.tolist()
        batch = f"{count} {unit}, at most {sum(largest)} labelled tokens"
        rows, width = int(counts.topk(count).values.sum()), int(lengths.max())
        positions, what = rows * width, f"{rows} padded rows of {width} tokens"
    lines.append(("largest batch", batch))
    if head is not None:
        logits = positions * head.weight.shape[0] * 4
        lines.append(("logits avoided", f"{_mib(logits)} in fp32 ({what})"))
    return lines, largest, int(labelled[longest])


def _known(trainer: Any) -> Any:
    """The rows to train on; of a stream those that it begins with."""
    return getattr(trainer.train_dataset, "head", trainer.train_dataset)


def _row_name(dataset: Any, place: int) -> str:
    """A row as its file has it; of other trainers' data, whose files are not known, its number from 1."""
    rows = getattr(dataset, "rows", None)
    if not isinstance(rows, torch.Tensor):
        return f"number {place + 1}"
    return f"row {dataset.report.row_name(int(rows[place]))}"


def _fill(row_tokens: list[int], num_tokens: int) -> list[int]:
    """The first rows that hold ``num_tokens``, the last of them cut."""
    ends = list(accumulate(row_tokens))
    count = next((i + 1 for i, end in enumerate(ends) if end >= num_tokens), len(ends))
    return [*row_tokens[: count - 1], num_tokens - sum(row_tokens[: count - 1])]


def _memory_for(
    model: nn.Module, head: LMHead, execution: Execution, row_tokens: Sequence[int], **kind: Any
) -> Lines:
    """What the head needs for the longest row alone: no batch can do with less."""
    try:
        plan, _ = plan_of(model, head, execution, row_tokens, **kind)
    except (ValueError, TypeError):
        return []  # the plan's own section says why
    return [("head for it alone", f"{_mib(plan.peak_bytes)} at once, gradients included")]


def _parts(sizes: list[int], kind: str) -> str:
    prompt, *answers = sizes
    if kind == "paired":
        gold = "".join(f", gold {n}" for n in answers[2:])
        return f"prompt {prompt}, chosen {answers[0]}, rejected {answers[1]}{gold}"
    shown = ", ".join(str(n) for n in answers[:5]) + " ..." * (len(answers) > 5)
    return f"prompt {prompt}, {'answer' if len(answers) == 1 else 'answers'} {shown}"


def _row_sizes(dataset: Any) -> list[list[int]] | None:
    """Of each row, tokens of the prompt and of every answer; None where the data is no tokenised rows."""
    if callable(sizes := getattr(dataset, "sizes", None)):
        found: list[list[int]] = sizes(torch.arange(len(dataset)))
        return found
    columns = set(getattr(dataset, "column_names", None) or ())
    for ending in ("ids", "input_ids"):  # TRL's names, and those of TRL 0.24
        names = [f"{part}_{ending}" for part in ("prompt", "chosen", "rejected")]
        if columns.issuperset(names):
            lengths = [[len(ids) for ids in dataset[name]] for name in names]
            return [list(row) for row in zip(*lengths, strict=True)]
    return None


def _memory_lines(trainer: Any) -> Lines:
    """What stays on the device beside activations: nobody knows those before a step."""
    model = trainer.model
    trained = [p for p in model.parameters() if p.requires_grad]
    lines = [
        ("weights", _mib(sum(p.numel() * p.element_size() for p in model.parameters()))),
        ("gradients", _mib(sum(p.numel() * p.element_size() for p in trained))),
    ]
    optimizer = getattr(trainer.args, "optim", "")
    optimizer = str(getattr(optimizer, "value", optimizer))
    if optimizer.startswith("adamw_torch") and "bit" not in optimizer:
        lines.append(
            (optimizer, f"{_mib(2 * sum(p.numel() * p.element_size() for p in trained))}, two moments")
        )
    others = getattr(trainer, "reference", None)
    reference = getattr(others, "model", None) or getattr(trainer, "ref_model", None)
    for name, other in (("reference", reference), ("teacher", getattr(others, "teacher", None))):
        if isinstance(other, nn.Module):
            lines.append((name, _mib(sum(p.numel() * p.element_size() for p in other.parameters()))))
    return lines


def _divergences_of(trainer: Any, head: LMHead) -> Divergences | None:
    """What a trainer's losses measure: from its teacher, its reference, or both."""
    args = trainer.args
    if not getattr(args, "needs_divergences", False):
        return None
    objective = build_objective(args.loss_type, args.loss_weights, beta=args.beta, **args.options)
    reference = trainer.reference
    # Without its adapter the policy has its own head.
    second = head if reference.model is None else read_head(reference.model)
    heads: tuple[LMHead, ...] = (second,)
    if reference.teacher is not None:
        heads = (read_head(reference.teacher), second)[: 1 + objective.uses_reference]
    outputs = (*divergence_outputs(objective), "logps", "ref_logps")
    return Divergences(heads, outputs, reference.teacher is None, reference.vocab_size)


def _execution_of(trainer: Any) -> Execution:
    made = getattr(trainer.args, "execution", None)
    if callable(made) and isinstance(execution := made(), Execution):
        return execution
    return hook_execution(trainer.model) or Execution()


@contextlib.contextmanager
def _autocast_of(trainer: Any) -> Iterator[None]:
    accelerator = getattr(trainer, "accelerator", None)
    with contextlib.nullcontext() if accelerator is None else accelerator.autocast():
        yield


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"


def _one_line(text: str) -> str:
    return " ".join(text.split())
