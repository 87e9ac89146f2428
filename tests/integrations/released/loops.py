"""A DPO loop of our own around log-probability functions as other libraries have them.

OpenRLHF's and ms-swift's are theirs, from their wheels. Those in the shapes of the original DPO repository's
and of SimPO's, which are no packages, are written anew in `lazy_losses`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.integrations.lazy_losses import average_logps, dpo_repository
from tests.integrations.released.cases import PAIRS_PER_STEP, STEPS, Case
from tests.integrations.released.recorder import Run, hooked_models, load_rows, make_tokenizer, recorded

Logps = Callable[[Tensor, Tensor], Tensor]  # logits (2P, T, V), labels (2P, T) -> (2P,)
Score = Callable[[Any, dict[str, Tensor], Tensor], Tensor]  # model, its inputs, labels (2P, T) -> (2P,)


def openrlhf() -> Logps:
    """Its function, from its file: the package itself asks for flash-attn, which asks for a GPU."""
    files = importlib.metadata.files("openrlhf") or []
    path = next(file.locate() for file in files if str(file) == "openrlhf/models/utils.py")
    spec = importlib.util.spec_from_file_location("openrlhf_utils", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def logps(logits: Tensor, labels: Tensor) -> Tensor:
        targets = labels.roll(shifts=-1, dims=1)
        per_token = module.log_probs_from_logits(logits, targets.clamp(min=0))[:, :-1]
        return (per_token * (labels[:, 1:] != -100)).sum(-1)

    return logps


def ms_swift() -> Logps:
    """The method of its trainers, of a trainer of which it asks one thing."""
    mixin = importlib.import_module("swift.rlhf_trainers.rlhf_mixin").RLHFTrainerMixin
    trainer = SimpleNamespace(template=SimpleNamespace(sequence_parallel_size=1))

    def logps(logits: Tensor, labels: Tensor) -> Tensor:
        targets = labels.roll(shifts=-1, dims=1)
        per_token, mean_logits, _ = mixin.get_per_token_logps(trainer, logits, targets)
        assert torch.isfinite(mean_logits).all()
        return per_token.sum(-1)

    return logps


def ms_swift_trainer() -> Score:
    """The step of its DPO trainer, of a trainer that has what the step asks for."""
    trainer_class = importlib.import_module("swift.rlhf_trainers.dpo_trainer").DPOTrainer
    trainer = SimpleNamespace(
        template=SimpleNamespace(sequence_parallel_size=1, padding_free=False),
        args=SimpleNamespace(ld_alpha=None),
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        label_pad_token_id=-100,
        get_use_logits_to_keep=lambda default: False,
    )
    trainer.get_per_token_logps = MethodType(trainer_class.get_per_token_logps, trainer)

    def score(model: Any, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        out = trainer_class.concatenated_forward(trainer, model, {**batch, "labels": labels})
        return torch.cat([out["chosen_logps"], out["rejected_logps"]])

    return score


def _of_logits(logps: Logps) -> Score:
    return lambda model, batch, labels: logps(model(**batch).logits, labels)


LOOPS: dict[str, Callable[[], Score]] = {
    "dpo-repository": lambda: _of_logits(dpo_repository),
    "simpo-repository": lambda: _of_logits(average_logps),
    "openrlhf": lambda: _of_logits(openrlhf()),
    "ms-swift": lambda: _of_logits(ms_swift()),
    "ms-swift-trainer": ms_swift_trainer,
}


def run(case: Case, is_lazy: bool, into: Run) -> None:
    """Train `STEPS` steps in fp32 on real rows."""
    score, has_reference = LOOPS[case.kind](), case.kind != "simpo-repository"
    rows = load_rows("preference_en.jsonl")
    tokenizer = make_tokenizer([value for row in rows for value in row.values()])
    with hooked_models(case.hook if is_lazy else None) as models:
        _train(score, has_reference, models, rows, tokenizer, into)


def _train(
    score: Score,
    has_reference: bool,
    models: tuple[Any, Any],
    rows: list[dict[str, Any]],
    tokenizer: Any,
    into: Run,
) -> None:
    policy, reference = models
    optimizer = torch.optim.SGD(policy.train().parameters(), lr=1e-2)
    with recorded(into) as step:
        for start in range(0, STEPS * PAIRS_PER_STEP, PAIRS_PER_STEP):
            batch = _batch(tokenizer, rows[start : start + PAIRS_PER_STEP])
            labels = batch.pop("labels")
            chosen, rejected = score(policy, batch, labels).chunk(2)
            if has_reference:
                with torch.no_grad():
                    ref_chosen, ref_rejected = score(reference, batch, labels).chunk(2)
                loss = -F.logsigmoid(0.1 * (chosen - rejected - ref_chosen + ref_rejected)).mean()
            else:
                loss = -F.logsigmoid(2.0 * (chosen - rejected) - 0.5).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step(int((labels[:, 1:] != -100).sum()), loss.item())


def _batch(tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Chosen answers first, padded on the right, the last position a label where the longest answer ends."""
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows] * 2
    answers = [tokenizer(row[name])["input_ids"] + [2] for name in ("chosen", "rejected") for row in rows]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids, mask, labels = (torch.full((len(prompts), length), value) for value in (0, 0, -100))
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[n, :end] = torch.tensor(prompt + answer)
        mask[n, :end] = 1
        labels[n, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
