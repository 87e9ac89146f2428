"""``fastdpo plan``: what each GPU of many holds and sends, of a config alone, without weights or a GPU.

Weights are those of the model that transformers makes of the config, on the meta device, in the units that
the engines have of them. Activations are counted on the step's own code (`fastdpo.doctor.context`), the head
is planned as its op plans (`fastdpo.plan`), the rest is arithmetic (`fastdpo.plan.machines`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastdpo.doctor.context import activation_bytes, meta_model
from fastdpo.integrations.lm_head import unwrap
from fastdpo.plan.call import make_plan
from fastdpo.plan.machine_traffic import Transfer, head_choice, moves_states, step_transfers
from fastdpo.plan.machines import Step, Weight, held_bytes
from fastdpo.plan.plan import Plan
from fastdpo.plan.traffic import HeadTraffic
from fastdpo.types import Execution

# Of an H100 and an H200; labelled tokens of a pair, both answers together.
MULTIPROCESSORS, PAIR_TOKENS = 132, 1024
_SUMMED_FORWARD = {"rowwise", "embedding_rowwise"}
_SPLIT_ROWS = {"colwise", "colwise_gather_output", "embedding_rowwise"}
_WHOLE = {"replicated_with_grad_allreduce"}


@dataclass(frozen=True)
class Run:
    """What is planned; `fastdpo.doctor.machine_report` makes it of the command line, and checks it.

    Args:
        tokens, labelled_tokens: of a micro-batch of each GPU: positions, and tokens of answers.
        dtype: of the weights as they are loaded; adapters are PEFT's, in fp32.
        is_mixed: bf16 autocast; else activations are of ``dtype``.
        context_chunk: tokens; None where contexts are not carried.
        replicas: copies of a model that FSDP2 splits.
    """

    engine: str
    tp_size: int
    is_lora: bool
    tokens: int
    labelled_tokens: int
    dtype: torch.dtype
    is_mixed: bool
    reference: str
    is_checkpointed: bool
    context_chunk: int | None
    replicas: int = 1

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of activations."""
        return torch.bfloat16 if self.is_mixed else self.dtype

    @property
    def way(self) -> str:
        """As `activation_bytes` names it."""
        if self.context_chunk is not None:
            return "carried"
        return "checkpointed" if self.is_checkpointed else "plain"


class Machine(NamedTuple):
    """One GPU of ``num_gpus``.

    Args:
        held: bytes by what they are.
        transfers: of a step.
        head: the plan of the head's call.
        ways: what a head in a unit of FSDP2's of its own would receive; None where nothing is gathered.
        moves_states: whether hidden states go to the head's parts.
    """

    num_gpus: int
    held: dict[str, int]
    transfers: list[Transfer]
    head: Plan
    ways: HeadTraffic | None
    moves_states: bool

    @property
    def total(self) -> int:
        """Bytes held, were all at their most at once."""
        return sum(self.held.values())

    def sent(self, of: str | None = None, collective: str | None = None) -> int:
        """Bytes that it sends in a step, of ``backbone`` or ``head``, by one collective, or in all."""
        return sum(
            t.sent for t in self.transfers if of in (None, t.of) and collective in (None, t.collective)
        )


def plan_machines(config: Any, run: Run, num_gpus: tuple[int, ...]) -> list[Machine]:
    """One for each number of GPUs.

    Args:
        config: of a causal language model of transformers.

    Raises:
        ValueError: a model that `patch_model` refuses; a split that its sizes, or this plan, do not have.
        ImportError: adapters without PEFT.
    """
    weights = weights_of(config, run)
    counted = activation_bytes(
        part_of_layers(config, run.tp_size),
        run.tokens,
        run.way,
        dtype=run.compute_dtype,
        chunk=run.context_chunk or run.tokens,
        is_lora=run.is_lora,
    )
    made = []
    for count in num_gpus:
        step = Step(
            engine=run.engine,
            num_gpus=count,
            tp_size=run.tp_size,
            replicas=run.replicas,
            compute_bytes=run.compute_dtype.itemsize,
            reference=run.reference,
            tokens=run.tokens,
            labelled=run.labelled_tokens,
            hidden_size=config.hidden_size,
            is_mixed=run.is_mixed,
            is_checkpointed=run.is_checkpointed,
        )
        moves = moves_states(weights, step)
        plan = _plan_of_head(weights, run, step, moves)
        # What the head's gradient takes at the end is that of all gradients.
        is_kept = step.engine in ("ddp", "zero1") and not run.is_lora
        own = _head_of(weights).size * step.compute_bytes if is_kept else 0
        held = held_bytes(weights, step, gathers_head=not moves)
        held |= {"activations": counted, "head": plan.peak_bytes - own}
        ways = head_choice(weights, step) if run.engine == "fsdp2" and step.shards > 1 else None
        made.append(Machine(count, held, step_transfers(weights, step), plan, ways, moves))
    return made


def weights_of(config: Any, run: Run) -> list[Weight]:
    """The parameters that a rank of tensor parallelism has, or all.

    Raises:
        ValueError: a style of transformers' plans that is not known here, or no plan.
    """
    model = meta_model(config, run.dtype, run.is_lora, "plain")
    base = unwrap(model)
    names = {id(p): name for name, p in base.named_parameters(remove_duplicate=False)}
    styles = _styles(base, run.tp_size)
    layers = [
        name
        for name, module in base.named_modules()
        if type(module).__name__ in (base._no_split_modules or ())
    ]
    head, embeddings = (layer.weight for layer in (base.get_output_embeddings(), base.get_input_embeddings()))
    is_upcast = run.engine == "fsdp2" and run.is_mixed

    def made() -> Iterator[Weight]:
        for p in model.parameters():
            name = names[id(p)]
            unit = next((layer for layer in layers if name.startswith(f"{layer}.")), "kept")
            unit = "head" if p is head else "embeddings" if p is embeddings else unit
            shape, exchange, is_forward = _split(p, name, styles, run.tp_size)
            # accelerate keeps what is trained in fp32 where it computes in 16 bits.
            size = 4 if is_upcast and p.requires_grad else p.element_size()
            yield Weight(shape, size, p.requires_grad, unit, exchange, is_forward)

    return list(made())


def _styles(base: Any, tp_size: int) -> dict[str, str]:
    if tp_size == 1:
        return {}
    plan = dict(base.tp_plan or {})
    if not plan:
        raise ValueError(
            f"tp_size: got {tp_size}, but transformers has no plan to split a {type(base).__name__}; wanted 1"
        )
    return plan


def _split(p: Any, name: str, styles: dict[str, str], ranks: int) -> tuple[tuple[int, ...], int, bool]:
    """The shape of a rank's part; features a token that its layer exchanges, and whether forward."""
    module, _, what = name.rpartition(".")
    style = styles.get(re.sub(r"\d+", "*", module)) or styles.get(re.sub(r"\d+", "*", name))
    shape = tuple(p.shape)
    if style is None or style in _WHOLE:
        return shape, 0, False
    if style in _SPLIT_ROWS and len(shape) in (1, 2):
        inputs = shape[-1] if len(shape) == 2 and style == "colwise" else 0
        is_forward = style in _SUMMED_FORWARD
        return (-(-shape[0] // ranks), *shape[1:]), shape[1] if is_forward else inputs, is_forward
    if style == "rowwise" and len(shape) == 2:
        return (shape[0], -(-shape[1] // ranks)), shape[0], True
    if style == "rowwise" and what == "bias":
        return shape, 0, False
    raise ValueError(f"tp_size: got {ranks}, and {name} is split as {style}, which this plan does not count")


def part_of_layers(config: Any, ranks: int) -> Any:
    """The config of what a rank of tensor parallelism computes of each layer.

    Raises:
        ValueError: heads that ``ranks`` does not divide.
    """
    if ranks == 1:
        return config
    part = copy.deepcopy(config)
    part.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None)
        if count is not None and count % ranks:
            raise ValueError(f"tp_size: got {ranks}, wanted a divisor of {name}, {count}")
        if count is not None:
            setattr(part, name, count // ranks)
    part.intermediate_size = -(-config.intermediate_size // ranks)
    return part


def _head_of(weights: list[Weight]) -> Weight:
    return next(w for w in weights if w.unit == "head" and len(w.shape) == 2)


def _plan_of_head(weights: list[Weight], run: Run, step: Step, moves: bool) -> Plan:
    """As the loop's op has it: of whole pairs where the head is trained, and no part of it is elsewhere."""
    head, execution = _head_of(weights), Execution()
    tokens, vocabulary = run.labelled_tokens, head.shape[0]
    pairs = max(1, tokens // PAIR_TOKENS)
    if moves:
        tokens, vocabulary = tokens * step.shards, -(-vocabulary // step.shards)
    mode = "stash" if not head.is_trained else "cache" if run.tp_size > 1 else "pairs"
    size = step.compute_bytes if step.casts_units or step.is_zero else head.itemsize
    return make_plan(
        mode,
        tokens,
        head.shape[1],
        vocabulary,
        operand_bytes=step.compute_bytes,
        needs_hidden=True,
        needs_weight=head.is_trained,
        workspace_mib=execution.workspace_mib,
        cache_mib=execution.cache_mib,
        num_multiprocessors=MULTIPROCESSORS,
        loss_rows=tuple(tokens * i // pairs for i in range(pairs + 1)),
        joins_chunks=True,
        weight_bytes=size,
        copies_weight=size != step.compute_bytes,
    )
