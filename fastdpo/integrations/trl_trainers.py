"""TRL's CPO/SimPO, ORPO and TPO trainers without logits: the methods that `patch_trl` puts in their place.

These trainers build the logits of the batch. Here their forward pass goes through `patch_model`, whose probe
has the model's own forward confirm what is done to the logits, and which is undone when the pass is over.
Everything else of the trainers stays TRL's, and so do the methods themselves for models that are not served:
encoder-decoders, and what `patch_model` refuses.

One metric differs: ``logits/chosen`` and ``logits/rejected`` of CPO and ORPO are the mean over the vocabulary
at the answers' tokens, as in TRL's DPO trainer. Theirs is over prompts and padding as well, and the logits of
those positions are what is not computed here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.integrations.model import FusedLMOutput, require_fused_output
from fastdpo.integrations.patched_call import or_own, without_logits
from fastdpo.integrations.probe import NotSupported
from fastdpo.integrations.source_patch import Around
from fastdpo.types import Execution

IGNORED = -100


def make_methods(execution: Execution | None, *, is_0_24: bool = False) -> dict[str, Around]:
    """The replacements by trainer: ``concatenated_forward`` for cpo and orpo, ``_compute_loss`` for tpo.

    ``is_0_24``: for TRL 0.24, which has no tpo, and has the label of what is not scored as a setting.
    """
    options = {"label_pad_token_id": IGNORED} if is_0_24 else {}

    def cpo_concatenated_forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """`CPOTrainer.concatenated_forward`, from log-probabilities."""
        padding = self.padding_value if is_0_24 else self.pad_token_id
        inputs = _concatenated_inputs(self, batch, padding, options)
        labels = inputs["labels"]
        out = _score(self, model, inputs, labels, execution)
        is_mean = self.loss_type in ("ipo", "simpo")
        chosen = slice(0, batch["chosen_labels"].shape[0])
        if self.cpo_alpha == 0:
            nll = torch.tensor(0.0).to(self.accelerator.device)
        else:
            nll = _mean_nll(_logps(out)[chosen], labels[chosen])
        return _forward_output(self, out, labels, chosen.stop, is_mean, nll)

    def orpo_concatenated_forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """`ORPOTrainer.concatenated_forward`, from log-probabilities; its NLL is also over the prompt."""
        inputs = _concatenated_inputs(self, batch, self.padding_value, options)
        labels = inputs["labels"]
        chosen = slice(0, batch["chosen_labels"].shape[0])
        is_text = inputs["attention_mask"] == 1
        text = torch.where(is_text, inputs["input_ids"], IGNORED)
        scored = labels.clone()
        scored[chosen] = text[chosen]
        if bool(((labels[:, 1:] != IGNORED) & (labels[:, 1:] != scored[:, 1:])).any()):
            raise NotSupported("chosen_labels: got labels that are not the tokens of chosen_input_ids")
        out = _score(self, model, inputs, scored, execution)
        nll = _mean_nll(_logps(out)[chosen], text[chosen])
        return _forward_output(self, out, labels, chosen.stop, True, nll)

    def tpo_compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """`TPOTrainer._compute_loss`, from log-probabilities."""
        arguments = {name: value for name, value in inputs.items() if name != "completion_mask"}
        arguments["use_cache"] = False
        is_answer = inputs["completion_mask"].bool()
        labels = inputs["input_ids"].masked_fill(~is_answer, IGNORED)
        with without_logits(self, model, execution):
            out = require_fused_output(
                model(
                    **arguments,
                    labels=labels,
                    return_logps=True,
                    logps_outputs=("entropy", "mean_logit", "is_top1"),
                )
            )
        num_branches = 2 if self.tpo_alpha == 0.0 else 3  # the third is the reference answer
        mask = is_answer[:, 1:]
        logps = _logps(out)[:, 1:].sum(1)
        if self.loss_type in ("ipo", "tpo-l"):
            logps = logps / mask.sum(1).clamp(min=1)
        chosen, rejected = logps.chunk(num_branches)[:2]
        loss = _tpo_losses(self, chosen - rejected).mean()
        if num_branches == 3:
            gold = slice(2 * chosen.shape[0], None)
            loss = loss + self.tpo_alpha * _mean_nll(_logps(out)[gold], labels[gold])
        _store_tpo_metrics(self, inputs, out, mask, num_branches, chosen.detach(), rejected.detach())
        if not return_outputs:
            return loss
        with torch.no_grad():  # who asks for the model's own outputs wants its logits
            return loss, model(**arguments)

    return {
        "cpo": or_own(cpo_concatenated_forward),
        "orpo": or_own(orpo_concatenated_forward),
        "tpo": or_own(tpo_compute_loss),
    }


def _concatenated_inputs(
    trainer: Any, batch: dict[str, Any], padding_value: int, options: dict[str, int]
) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` ``(2P, T)``, chosen rows first."""
    check_causal(trainer)
    if options:
        check_ignored(trainer)
    made = trainer.concatenated_inputs(
        batch,
        is_encoder_decoder=False,
        padding_value=padding_value,
        device=trainer.accelerator.device,
        **options,
    )
    return {name: made[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels")}


def check_causal(trainer: Any) -> None:
    if trainer.is_encoder_decoder:
        raise NotSupported("model: got an encoder-decoder, wanted a causal language model")


def check_ignored(trainer: Any) -> None:
    if trainer.label_pad_token_id != IGNORED:
        raise NotSupported(f"label_pad_token_id: got {trainer.label_pad_token_id}, wanted {IGNORED}")


def _score(
    trainer: Any, model: Any, inputs: dict[str, Tensor], labels: Tensor, execution: Execution | None
) -> FusedLMOutput:
    router = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
    with without_logits(trainer, model, execution):
        return require_fused_output(
            model(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels,
                use_cache=False,
                return_logps=True,
                logps_outputs=("mean_logit",),
                **router,
            )
        )


def _forward_output(
    trainer: Any, out: FusedLMOutput, labels: Tensor, num_chosen: int, is_mean: bool, nll: Tensor
) -> tuple[Tensor, ...]:
    """What ``concatenated_forward`` returns, mean logits ``(N,)`` in the place of logits to be averaged."""
    assert out.mean_logit is not None
    mask = labels[:, 1:] != IGNORED
    logps = (_logps(out)[:, 1:] * mask).sum(-1)
    if is_mean:
        logps = logps / mask.sum(-1)
    mean_logits = out.mean_logit[:, 1:]
    chosen, rejected = slice(0, num_chosen), slice(num_chosen, None)
    result = (
        logps[chosen],
        logps[rejected],
        mean_logits[chosen][mask[chosen]],
        mean_logits[rejected][mask[rejected]],
        nll,
    )
    if not trainer.aux_loss_enabled:
        return result
    assert out.aux_loss is not None
    return (*result, out.aux_loss)


def _logps(out: FusedLMOutput) -> Tensor:
    assert out.logps is not None
    return out.logps


def _mean_nll(logps: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labelled tokens, of which the first position is none; NaN where there are none."""
    mask = labels[:, 1:] != IGNORED
    return -(logps[:, 1:] * mask).sum() / mask.sum()


def _tpo_losses(trainer: Any, gap: Tensor) -> Tensor:
    """``(P,)`` losses of the gap between chosen and rejected log-probabilities (arXiv:2405.16681)."""
    beta, smoothing = trainer.beta, trainer.label_smoothing
    if trainer.loss_type == "hinge":
        return torch.relu(1 - beta * gap)
    if trainer.loss_type == "ipo":
        return (gap - 1 / (2 * beta)) ** 2
    if trainer.loss_type == "tpo-l":
        gap = gap - trainer.tpo_l_gamma / beta
    elif trainer.loss_type != "sigmoid":
        raise ValueError(f"loss_type: got {trainer.loss_type!r}, wanted 'sigmoid', 'hinge', 'ipo' or 'tpo-l'")
    return -F.logsigmoid(beta * gap) * (1 - smoothing) - F.logsigmoid(-beta * gap) * smoothing


def _store_tpo_metrics(
    trainer: Any,
    inputs: dict[str, Any],
    out: FusedLMOutput,
    mask: Tensor,
    num_branches: int,
    chosen: Tensor,
    rejected: Tensor,
) -> None:
    """TRL's metrics, of the same names; token statistics are weighted over processes as TRL weights them."""
    assert out.entropy is not None and out.mean_logit is not None and out.is_top1 is not None
    accelerator = trainer.accelerator
    mode = "train" if trainer.model.training else "eval"
    metrics = trainer._metrics[mode]

    def total(value: Tensor) -> float:
        return float(accelerator.gather_for_metrics(value).sum().item())

    def share(value: Tensor, count: Tensor) -> float:
        number = total(count)
        return total(value) / number if number > 0 else 0.0

    def mean(value: Tensor) -> float:
        return float(accelerator.gather(value).mean().item())

    entropy = out.entropy[:, 1:][mask].mean()
    metrics["entropy"].append(accelerator.gather_for_metrics(entropy).mean().item())
    if mode == "train":
        seen = accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
        trainer._total_train_tokens += seen // trainer._tp_size
    metrics["num_tokens"] = [trainer._total_train_tokens]

    masks = mask.chunk(num_branches)[:2]
    mean_logits = out.mean_logit[:, 1:].chunk(num_branches)[:2]
    for name, value, where in zip(("chosen", "rejected"), mean_logits, masks, strict=True):
        metrics[f"logits/{name}"].append(share(value[where].sum(), where.sum()))
    is_top1 = out.is_top1[:, 1:].chunk(num_branches)[0]
    metrics["mean_token_accuracy"].append(share(is_top1.sum(), masks[0].sum()))

    chosen_rewards, rejected_rewards = trainer.beta * chosen, trainer.beta * rejected
    metrics["rewards/chosen"].append(mean(chosen_rewards))
    metrics["rewards/rejected"].append(mean(rejected_rewards))
    metrics["rewards/accuracies"].append(mean((chosen_rewards > rejected_rewards).float()))
    metrics["rewards/margins"].append(mean(chosen_rewards - rejected_rewards))
    metrics["logps/chosen"].append(mean(chosen))
    metrics["logps/rejected"].append(mean(rejected))
