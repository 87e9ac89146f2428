"""``PreferenceTrainer`` as one of several ranks of tensor parallelism; what came of it in files.

python -m tests.distributed.tensor_loop_run FOLDER [CASE ...]
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from fastdpo import cli
from fastdpo.training.loop.trainer import PreferenceTrainer
from fastdpo.training.settings import parallel
from tests.distributed.cases import SEQUENCE_LOOP, TENSOR_LOOP
from tests.distributed.loop_run import as_on_gpus, logged, settings, trained
from tests.distributed.ranks import leave
from tests.training.conftest import bpe_text, made_tokenizer, tiny_llama
from tests.training.loop.ddp_run import answers, pairs


def run_case(folder: Path, shared: int | None, case: dict[str, Any], how: str = "tensors") -> dict[str, Any]:
    """Losses, evaluations, rewards and weights.

    Args:
        shared: ranks that see one batch; None for one process.
        how: what they share: ``tensors``, or ``sequences``.
    """
    case = dict(case)
    engine = case.pop("engine", None)
    tensor = shared if how == "tensors" else None
    lora, has_ref_model = case.pop("lora", ()), case.pop("ref_model", False)
    kind, is_resumed, num_eval = (
        case.pop("kind", None),
        case.pop("is_resumed", False),
        case.pop("num_eval", 0),
    )
    paths = [_saved(folder.parent / f"model {seed}", seed) for seed in (1, 2)]
    if case.get("reference") == "precomputed":
        case["reference_cache_dir"] = str(folder.parent / "reference")

    def rows(count: int, seed: int) -> Any:
        return pairs(count, seed) if kind is None else answers(kind, count, seed)

    def load(path: Path) -> Any:
        if tensor is None:
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        split = DistributedConfig(tp_size=tensor, tp_plan="auto", fsdp_size=dist.get_world_size() // tensor)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=split)

    def trainer() -> PreferenceTrainer:
        data = 1 if shared is None else dist.get_world_size() // shared
        more = {} if shared is None else {"tp_size" if tensor else "sp_size": shared}
        if "gather_batch_losses" in case:  # a loss of a whole micro-batch
            more |= {"per_device_train_batch_size": 8 // data, "gradient_accumulation_steps": 1}
        as_engine = None if shared is None else "tensors" if tensor else engine or "ddp"
        args = settings(folder, as_engine, data=data, **more, **case)
        peft_config = None
        if lora:
            from peft import LoraConfig

            peft_config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(lora))
        torch.manual_seed(7)
        made = PreferenceTrainer(
            load(paths[0]),
            args,
            train_dataset=rows(24, 0),
            eval_dataset=rows(num_eval, 1) if num_eval else None,
            ref_model=load(paths[1]) if has_ref_model else None,
            peft_config=peft_config,
        )
        _fill_adapter(made.model)
        return made

    made = trained(trainer, is_resumed=is_resumed and shared is not None)
    history = made.state.log_history
    found = {
        **logged(made),
        "tokens": [entry["num_tokens"] for entry in history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in history if "loss" in entry],
    }
    if num_eval:
        found["rewards"] = torch.from_numpy(made.predict(rows(num_eval, 1)).predictions)
    if shared is not None:
        made.save_model(str(folder / "final"))
    return found


def mistake(what: str, folder: Path) -> None:
    """A run that is to be refused on every rank."""
    is_second = dist.get_rank() == 1
    if what == "other data":
        data = pairs(24, 3 if is_second else 0)
        path = _saved(folder.parent / "model 1", 1)
        split = DistributedConfig(tp_size=2, tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=split)
        args = settings(folder, "tensors", data=1, tp_size=2)
        PreferenceTrainer(model, args, train_dataset=data, ref_model=tiny_llama(2)).train()
    if what == "other sizes":
        args = settings(folder, "tensors", data=1, **({} if is_second else {"tp_size": 2}))
        PreferenceTrainer(tiny_llama(1), args, train_dataset=pairs(24, 0))
    if what == "a whole model":
        args = settings(folder, "tensors", data=1, tp_size=2)
        PreferenceTrainer(tiny_llama(1), args, train_dataset=pairs(24, 0))
    if what == "no divisor":
        settings(folder, "tensors", data=1, tp_size=3)


MISTAKES = ("other sizes", "a whole model", "no divisor", "other data")


def run_command_line(folder: Path, how: str) -> None:
    """``fastdpo train`` as under ``accelerate launch`` with the sizes of a file."""
    if dist.get_rank() == 0:
        tiny_llama(1).save_pretrained(folder / "model")
        made_tokenizer(bpe_text()).save_pretrained(folder / "model")
        rows = [{"prompt": "river stone", "chosen": f" bright {i}", "rejected": " walk"} for i in range(8)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dist.barrier()
    sizes = {"USE_PARALLELISM_CONFIG": "true", "USE_FSDP": "true"}
    os.environ |= {f"ACCELERATE_{name}": value for name, value in sizes.items()}
    size = {"tensors": "TP", "sequences": "SP", "copies": "DP_REPLICATE"}[how]
    os.environ |= {"FSDP_VERSION": "2", f"PARALLELISM_CONFIG_{size}_SIZE": "2"}
    os.environ |= {
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }
    os.environ["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = str(dist.get_world_size() // 2)
    check = parallel.check_same_settings

    def with_engines(args: Any) -> None:
        check(args)
        as_on_gpus(args)

    parallel.check_same_settings = with_engines
    train = PreferenceTrainer.train

    def with_placements(self: Any, *args: Any, **options: Any) -> Any:
        output = train(self, *args, **options)
        print("placements", sorted({str(getattr(p, "placements", "whole")) for p in self.model.parameters()}))
        return output

    PreferenceTrainer.train = with_placements  # type: ignore[method-assign]
    words = {"model": "model", "dataset": "rows.jsonl", "ref_model": "model", "output_dir": "out"}
    flags = [word for name, path in words.items() for word in (f"--{name}", str(folder / path))]
    more = "--use_cpu --max_steps 2 --per_device_train_batch_size 2 --ddp_backend gloo --save_steps 1".split()
    assert cli.main(["train", *flags, *more, "--report_to", "none", "--disable_tqdm"]) == 0


def _fill_adapter(model: Any) -> None:
    """LoRA that is the same however it is split: peft draws its numbers part by part."""
    random = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            values = torch.randn(parameter.shape, generator=random) * 0.1
            if isinstance(parameter, DTensor):
                where = (parameter.device_mesh, parameter.placements)
                values = distribute_tensor(values, *where, src_data_rank=None)
            parameter.data.copy_(values)


def _saved(path: Path, seed: int) -> Path:
    if not dist.is_initialized() or dist.get_rank() == 0:
        tiny_llama(seed).save_pretrained(path)
    if dist.is_initialized():
        dist.barrier()
    return path


def main(folder: Path, names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if "sequences" in names:
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # a build of minutes; gloo does without
    if names[:1] == ["command line"]:
        return run_command_line(folder, names[1])
    for what in MISTAKES if names == ["mistakes"] else ():
        try:
            mistake(what, folder / "mistakes" / "run")
        except ValueError as error:
            print(json.dumps({"mistake": what, "said": str(error)}), flush=True)
        dist.barrier()
    how = "sequences" if "sequences" in names else "tensors"
    for name, case in (SEQUENCE_LOOP if how == "sequences" else TENSOR_LOOP).items():
        if set(names) - {"sequences"} and name not in names:
            continue
        try:
            found: Any = run_case(folder / name / "run", 2, case, how)
        except Exception:
            found = traceback.format_exc()[-3000:]
            print(name, found, flush=True)
        if os.environ["RANK"] == "0":
            torch.save(found, folder / name / "found.pt")
        gc.collect()
        dist.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
