"""``PreferenceTrainer`` as one of several ranks under an engine, or alone; what came of it in files.

python -m tests.distributed.loop_run FOLDER ENGINE     # fsdp2, hsdp, zero2, zero3; each case of LOOP
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

if os.environ.get("FASTDPO_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import transformers
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from fastdpo.integrations.partitioned import is_partitioned
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings.config import PreferenceConfig
from tests.distributed.cases import LOOP
from tests.distributed.problem import tiny_experts
from tests.distributed.ranks import leave, own_device
from tests.training.conftest import tiny_llama
from tests.training.loop.ddp_run import answers, pairs

# FSDP2 over two ranks, twice.
REPLICAS = {"engine": "fsdp2", "parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)}


def settings(folder: Path, engine: str | None, *, data: int = 2, **changes: Any) -> PreferenceConfig:
    alone, on_cpu = engine is None, own_device().type == "cpu"
    args = PreferenceConfig(
        output_dir=str(folder),
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and not alone else None,
        per_device_eval_batch_size=4 if alone else 2,
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        adam_epsilon=1e-5,  # or a gradient that is all rounding would make a whole step
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        seed=1,
        **{
            # What a GPU has other defaults for.
            "bf16": False,
            "activation_checkpointing": False,
            "longest_batch_first": False,
            "save_strategy": "no",
            "loss_type": "sigmoid",
            "max_steps": 3,
            "per_device_train_batch_size": 8 if alone else 2,
            "gradient_accumulation_steps": 1 if alone else 4 // data,
            **changes,
        },
        **(REPLICAS if engine == "hsdp" else {"engine": None if engine in ("tensors", "ddp") else engine}),
    )
    if on_cpu and engine not in (None, "ddp"):
        as_on_gpus(args)
    return args


def as_on_gpus(args: Any) -> None:
    """Make accelerate's state, which has these engines on GPUs only."""
    args.device  # noqa: B018
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    PartialState._shared_state["device"] = torch.device("cpu")
    AcceleratorState._shared_state.clear()


class StopAfterSaving(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def run_case(folder: Path, engine: str | None, case: dict[str, Any]) -> dict[str, Any]:
    """Losses, evaluations and weights; after three steps of eight pairs, where a case does not say more."""
    case = dict(case)
    num_eval, lora = case.pop("num_eval", 0), case.pop("lora", ())
    is_resumed, has_ref_model = case.pop("is_resumed", False), case.pop("ref_model", False)
    has_teacher = case.pop("teacher", False)
    experts, by_path = case.pop("experts", None), case.pop("by_path", False)
    if experts:  # their balance is one of a micro-batch: the same ones everywhere
        ranks = 1 if engine is None else int(os.environ["WORLD_SIZE"])
        case |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // ranks}
    kind, num_train, budget = case.pop("kind", None), case.pop("num_train", 24), case.pop("budget", None)
    if engine == "hsdp":  # as many rows in a step on twice the ranks
        case = {"per_device_train_batch_size": 1, **case}
    if budget is not None and engine is not None:
        case |= {"max_tokens_per_batch": budget, "gradient_accumulation_steps": 3}
    if case.pop("one_batch", False) and engine is not None:
        case |= {
            "per_device_train_batch_size": 2 if engine == "hsdp" else 4,
            "gradient_accumulation_steps": 1,
        }
    if engine is not None:  # what is refused
        case.pop("offload_activations" if engine in ("fsdp2", "hsdp") else "longest_batch_first", None)
    if case.get("reference") == "precomputed":
        case["reference_cache_dir"] = str(folder.parent / "reference")

    def rows(count: int, seed: int) -> Any:
        if kind in (None, "even"):
            return pairs(count, seed, is_even=kind == "even")
        found = answers(kind, count, seed)
        found.has_mismatched = case.get("loss_type") == "kto"
        return found

    def trainer() -> PreferenceTrainer:
        args = settings(folder, engine, **case)
        peft_config = None
        if lora:
            from peft import LoraConfig

            peft_config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(lora))
        torch.manual_seed(7)
        model: Any = tiny_experts(experts) if experts else tiny_llama(1)
        return PreferenceTrainer(
            loaded(model, folder.parent / "model") if by_path else model,
            args,
            train_dataset=rows(num_train, 0),
            eval_dataset=rows(num_eval, 1) if num_eval else None,
            ref_model=tiny_llama(2) if has_ref_model else None,
            teacher_model=tiny_llama(3) if has_teacher else None,
            peft_config=peft_config,
        )

    made = trained(trainer, is_resumed=is_resumed and engine is not None)
    found = logged(made)
    if engine in ("fsdp2", "hsdp") and has_ref_model:  # between its forward passes nothing is whole
        found["whole"] = [n for n, p in made.reference.model.named_parameters() if not isinstance(p, DTensor)]
    if engine is not None and not lora:
        made.save_model(str(folder / "final"))
    return found


def loaded(model: Any, path: Path) -> Any:
    """The model from a path, which ZeRO-3 splits as it loads it."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        model.save_pretrained(path)
    if dist.is_initialized():
        dist.barrier()
    found = AutoModelForCausalLM.from_pretrained(path)
    assert is_partitioned(found) == is_deepspeed_zero3_enabled()
    return found


def trained(trainer: Callable[[], PreferenceTrainer], *, is_resumed: bool) -> PreferenceTrainer:
    """A trainer after its run; with ``is_resumed`` it went on with another one's, which had stopped."""
    made = trainer()
    if is_resumed:
        made.add_callback(StopAfterSaving())
        made.train()
        made = trainer()
    made.train(resume_from_checkpoint=is_resumed or None)
    return made


def logged(trainer: PreferenceTrainer) -> dict[str, Any]:
    """What tests compare of a run."""
    history, names = trainer.state.log_history, ("eval_loss", "eval_rewards/margins")
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "evaluations": [[entry[n] for n in names if n in entry] for entry in history if names[0] in entry],
        "balance": [entry["aux_loss"] for entry in history if "aux_loss" in entry],
        "weights": {name: weight.cpu() for name, weight in weights(trainer).items()},
    }


def weights(trainer: PreferenceTrainer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if hasattr(parameter, "full_tensor"):
            found[name] = parameter.detach().full_tensor()
            first = found[name].clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, found[name]), f"{name}: copies of the model differ"
        elif hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        else:
            found[name] = parameter.detach().clone()
    return found


def main(folder: Path, engine: str, names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if engine.startswith("zero"):
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # a build of minutes; gloo does without
    for name, case in LOOP.items():
        if names and name not in names:
            continue
        place = folder / f"{engine} {name}"
        try:
            found: Any = run_case(place / "run", engine, case)
        except Exception:
            found = traceback.format_exc()[-3000:]
            print(engine, name, found, flush=True)
        if os.environ["RANK"] == "0":
            place.mkdir(parents=True, exist_ok=True)
            torch.save(found, place / "found.pt")
        gc.collect()
        dist.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
