"""TRL 0.24's DPO and KTO trainers without logits: what `patch_trl` puts there in the place of their methods.

TRL 0.24, the last that LLaMA-Factory 0.9.5 takes, has no log-prob function that its trainers share. Of DPO
``concatenated_forward`` is replaced, which every option goes through but ``use_liger_loss``; of KTO the three
methods that call the model; CPO and ORPO are those of `trl_trainers`. Truncation, losses and metrics stay
TRL's, and so does what TRL 0.24 does with options that it lets come together: RPO's and SFT's likelihood
leaves token 0 out, LD-DPO counts positions from the row's first logit, ``padding_free`` divides IPO by the
tokens of the whole batch. What makes TRL itself fail in the forward pass is refused by name; what is not
served (encoder-decoders, other ignored labels, what `patch_model` refuses) goes on in TRL's own method.

One metric differs: KTO's ``logits/chosen`` and ``logits/rejected`` are sums over the vocabulary at the
answers' tokens. Theirs are over prompts and padding as well, whose logits are what is not computed here.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.integrations import trl_trainers
from fastdpo.integrations.lm_head import find_linear, unwrap
from fastdpo.integrations.model import FusedLMOutput, require_fused_output
from fastdpo.integrations.patched_call import or_own, without_logits
from fastdpo.integrations.source_patch import Around
from fastdpo.integrations.trl_trainers import check_causal, check_ignored
from fastdpo.types import Execution, TokenLayout

VERSION = "0.24.0"
DPO = "trl.trainer.dpo_trainer:DPOTrainer.concatenated_forward"
KTO = "trl.trainer.kto_trainer:KTOTrainer.forward"
KTO_REFERENCE = "trl.trainer.kto_trainer:KTOTrainer.compute_reference_log_probs"
KTO_KL = "trl.trainer.kto_trainer:KTOTrainer._compute_kl_logps"
CPO = "trl.trainer.cpo_trainer:CPOTrainer.concatenated_forward"
ORPO = "trl.trainer.orpo_trainer:ORPOTrainer.concatenated_forward"
NOT_REPLACED = "SFT, GRPO, RLOO, BCO, GKD, online DPO, Nash-MD and XPO"

# sha256 of the source of what is replaced, what feeds it and what takes its results; see `source_patch`.
SOURCES: dict[str, dict[str, str]] = {
    "trl.trainer.dpo_trainer:DPOTrainer.concatenated_forward": {"5e4e0dbc5fedcfcb": VERSION},
    "trl.trainer.dpo_trainer:DPOTrainer.concatenated_inputs": {"d1d104cfa749f1df": VERSION},
    "trl.trainer.dpo_trainer:DPOTrainer.compute_ref_log_probs": {"8af9feccd9958bb5": VERSION},
    "trl.trainer.dpo_trainer:DPOTrainer.get_batch_loss_metrics": {"dc0857d3241d7efb": VERSION},
    "trl.trainer.dpo_trainer:DPOTrainer.dpo_loss": {"0e5a2481829a3de3": VERSION},
    "trl.trainer.utils:flush_left": {"220b186482088c53": VERSION},
    "trl.trainer.utils:flush_right": {"cba6f85fde8a3253": VERSION},
    "trl.trainer.utils:pad_to_length": {"209560798a8b6ea6": VERSION},
    "trl.trainer.utils:selective_log_softmax": {"2255bc59748c84c5": VERSION},
    "trl.trainer.kto_trainer:KTOTrainer.forward": {"2e79c5a8befba2a4": VERSION},
    "trl.trainer.kto_trainer:KTOTrainer.compute_reference_log_probs": {"aa3996be07b528c2": VERSION},
    "trl.trainer.kto_trainer:KTOTrainer._compute_kl_logps": {"765400d290c65d00": VERSION},
    "trl.trainer.kto_trainer:KTOTrainer.get_batch_logps": {"dbcdd457252824d0": VERSION},
    "trl.trainer.kto_trainer:KTOTrainer.get_batch_loss_metrics": {"850938ec05e616c0": VERSION},
}
CPO_SOURCES: dict[str, dict[str, str]] = {
    "trl.trainer.cpo_trainer:CPOTrainer.concatenated_forward": {"a1a5fa1d8dd5e2d3": VERSION},
    "trl.trainer.cpo_trainer:CPOTrainer.concatenated_inputs": {"9f7ed480c64643d8": VERSION},
    "trl.trainer.cpo_trainer:CPOTrainer.get_batch_logps": {"d2c78fb6cee85208": VERSION},
    "trl.trainer.cpo_trainer:CPOTrainer.get_batch_loss_metrics": {"b47c20f928cf966e": VERSION},
    "trl.trainer.orpo_trainer:ORPOTrainer.concatenated_forward": {"6d196d6955ff08c6": VERSION},
    "trl.trainer.orpo_trainer:ORPOTrainer.concatenated_inputs": {"9f7ed480c64643d8": VERSION},
    "trl.trainer.orpo_trainer:ORPOTrainer.get_batch_logps": {"31545692fda3ad27": VERSION},
    "trl.trainer.orpo_trainer:ORPOTrainer.get_batch_loss_metrics": {"c0c956efddd912e1": VERSION},
}

_IMAGES = ("pixel_values", "pixel_attention_mask", "image_sizes")


class _Rows(NamedTuple):
    """What the model gets, ``(R, T)`` each, and what of it is scored."""

    input_ids: Tensor
    attention_mask: Tensor
    is_answer: Tensor  # bool
    token_type_ids: Tensor | None


def replacements(execution: Execution | None, *, experimental: bool) -> dict[str, Around]:
    """What `patch_trl` puts where, by path."""
    methods = {DPO: make_dpo(execution), **make_kto(execution)}
    if experimental:
        made = trl_trainers.make_methods(execution, is_0_24=True)
        methods |= {CPO: made["cpo"], ORPO: made["orpo"]}
    return methods


def why_not_importable() -> str | None:
    """Why importing TRL 0.24 would fail now, found without trying: TRL would stay broken in this process.

    It asks transformers which packages are there, and transformers >= 5.3 answers with a pair, which is true
    whatever it says. LLaMA-Factory repairs that before it imports TRL.
    """
    if "trl.import_utils" in sys.modules:
        return None
    utils: Any = import_module("transformers.utils.import_utils")
    if not bool(utils._is_package_available("no_package_of_this_name")):
        return None
    return (
        f"trl {VERSION} does not import with this transformers, whose answers about packages it takes for "
        "yes; import llamafactory.extras.packages first, which repairs that"
    )


def make_dpo(execution: Execution | None) -> Around:
    """``DPOTrainer.concatenated_forward``."""

    def dpo_concatenated_forward(
        self: Any, model: Any, batch: dict[str, Any], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        """`DPOTrainer.concatenated_forward`, from log-probabilities."""
        check_causal(self)
        _check_padding_free(self)
        made = self.concatenated_inputs(batch, padding_value=self.pad_token_id)
        rows = _truncated_rows(self, made)
        inputs, is_answer = _model_inputs(self, made, rows)
        # A position predicts the next token; the last one what TRL's roll brings round, which is not summed.
        targets, mask = inputs["input_ids"].roll(-1, dims=1), is_answer.roll(-1, dims=1)
        index = mask.flatten().nonzero().squeeze(1)
        layout = TokenLayout(index, targets.flatten()[index], index // mask.shape[1])
        weighs = self.use_weighting and not is_ref_model
        with without_logits(self, model, execution):
            out = require_fused_output(
                model(
                    **inputs,
                    token_layout=layout,
                    return_logps=True,
                    logps_outputs=("mean_logit", "log_sum_sq_probs") if weighs else ("mean_logit",),
                    use_cache=False,
                )
            )
        output = _answer_logps(self, out, rows, targets, mask, is_ref_model)
        num_pairs = batch["prompt_input_ids"].shape[0]
        if self.padding_free:
            rejected_from = int((inputs["position_ids"][0] == 0).nonzero()[num_pairs])
        else:
            rejected_from = num_pairs * mask.shape[1]
        assert out.mean_logit is not None
        output["mean_chosen_logits"] = out.mean_logit[index < rejected_from].mean()
        output["mean_rejected_logits"] = out.mean_logit[index >= rejected_from].mean()
        if self.aux_loss_enabled:
            assert out.aux_loss is not None
            output["aux_loss"] = out.aux_loss
        return output

    return or_own(dpo_concatenated_forward)


def _model_inputs(trainer: Any, made: dict[str, Tensor], rows: _Rows) -> tuple[dict[str, Any], Tensor]:
    """What the model gets, and which tokens of it are answers': ``(R, T)``, or ``(1, N)`` without padding."""
    inputs: dict[str, Any] = {name: made[name] for name in _IMAGES if name in made}
    if rows.token_type_ids is not None:
        inputs["token_type_ids"] = rows.token_type_ids
    if trainer.aux_loss_enabled:
        inputs["output_router_logits"] = True
    if not trainer.padding_free:
        return inputs | {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}, rows.is_answer
    is_text = rows.attention_mask.bool()
    inputs["input_ids"] = rows.input_ids[is_text][None]
    inputs["position_ids"] = (rows.attention_mask.cumsum(1)[is_text] - 1)[None]
    return inputs, rows.is_answer[is_text][None]


def _answer_logps(
    trainer: Any, out: FusedLMOutput, rows: _Rows, targets: Tensor, mask: Tensor, is_ref_model: bool
) -> dict[str, Tensor]:
    """Log-probabilities ``(P,)`` of chosen and rejected; the likelihood and WPO's weights where asked for."""
    assert out.logps is not None
    num_pairs = len(rows.input_ids) // 2
    start = _first_logit(rows.is_answer) if trainer.use_logits_to_keep else 0
    predicted = _dense(out.logps, mask)[:, start:]
    targets, mask = targets[:, start:], mask[:, start:]
    per_token = predicted.roll(1, dims=1)  # at the token's own position
    if trainer.padding_free:
        per_token = _dense(per_token.flatten(), rows.attention_mask.bool())
    logps = per_token[:, 1:].sum(-1)

    output: dict[str, Tensor] = {}
    if out.log_sum_sq_probs is not None:
        collision = _dense(out.log_sum_sq_probs, mask)
        output["policy_weights"] = _wpo_weights(per_token.detach() - collision, mask, num_pairs)
    if trainer.args.rpo_alpha is not None or "sft" in trainer.loss_type:
        counted = (mask & (targets != 0))[:num_pairs, :-1]
        output["nll_loss"] = -(predicted[:num_pairs, :-1] * counted).sum() / counted.sum()
    if "ipo" in trainer.loss_type:
        logps = logps / mask.sum(-1)
    if trainer.args.ld_alpha is not None and not is_ref_model:
        logps = _length_desensitised(per_token, mask.sum(-1), trainer.args.ld_alpha)
    return output | {"chosen_logps": logps[:num_pairs], "rejected_logps": logps[num_pairs:]}


def make_kto(execution: Execution | None) -> dict[str, Around]:
    """The three methods of ``KTOTrainer`` that call the model, by path."""

    def kto_score(self: Any, model: Any, batch: dict[str, Any], part: str, **options: Any) -> FusedLMOutput:
        check_causal(self)
        check_ignored(self)
        with without_logits(self, model, execution):
            return require_fused_output(
                model(
                    batch[f"{part}_input_ids"],
                    attention_mask=batch[f"{part}_attention_mask"],
                    labels=batch[f"{part}_labels"],
                    return_logps=True,
                    **options,
                )
            )

    def kto_forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor | None, ...]:
        """`KTOTrainer.forward`, from log-probabilities."""
        kl_logps = self._compute_kl_logps(model, batch)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        out = kto_score(self, model, batch, "completion", logps_outputs=("mean_logit",), **router)
        assert out.mean_logit is not None
        logps, is_desirable = _sums(out), batch["label"]
        if len(logps) != len(is_desirable):
            raise ValueError(f"label: got {len(is_desirable)} for {len(logps)} answers, wanted as many")
        chosen = [i for i, label in enumerate(is_desirable) if label is True]
        rejected = [i for i, label in enumerate(is_desirable) if label is False]
        logits = out.mean_logit.detach() * find_linear(unwrap(model)).out_features  # 0 but at answers' tokens
        result = (logps[chosen], logps[rejected], logits[chosen], logits[rejected], kl_logps)
        return (*result, out.aux_loss) if self.aux_loss_enabled else result

    def kto_reference_log_probs(self: Any, padded_batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """`KTOTrainer.compute_reference_log_probs`, from log-probabilities."""
        is_own = self.ref_model is None
        with torch.no_grad(), self.null_ref_context() if is_own else nullcontext():
            model = self.model if is_own else self.ref_model
            logps = _sums(kto_score(self, model, padded_batch, "completion"))
            if not self.calculate_KL:
                return logps, None
            return logps, _sums(kto_score(self, model, padded_batch, "KL_completion"))

    def kto_kl_logps(self: Any, model: Any, batch: dict[str, Any]) -> Tensor | None:
        """`KTOTrainer._compute_kl_logps`, from log-probabilities."""
        if not self.calculate_KL:
            return None
        with torch.no_grad():
            return _sums(kto_score(self, model, batch, "KL_completion"))

    return {
        KTO: or_own(kto_forward),
        KTO_REFERENCE: or_own(kto_reference_log_probs),
        KTO_KL: or_own(kto_kl_logps),
    }


def _check_padding_free(trainer: Any) -> None:
    if not trainer.padding_free:
        return
    for name, is_on in (
        ("use_logits_to_keep", trainer.use_logits_to_keep),
        ("use_weighting", trainer.use_weighting),
        ("ld_alpha", trainer.args.ld_alpha is not None),
    ):
        if is_on:
            raise ValueError(
                f"{name}: got a value together with padding_free=True, where TRL 0.24's own shapes do not go "
                "together; wanted one of the two"
            )


def _truncated_rows(trainer: Any, made: dict[str, Tensor]) -> _Rows:
    """Prompt and answer in one row, flushed and cut as TRL does it, with TRL's own functions."""
    utils: Any = import_module("trl.trainer.utils")
    flush_left, flush_right = utils.flush_left, utils.flush_right
    prompt = made["prompt_attention_mask"]
    attention_mask = torch.cat((prompt, made["completion_attention_mask"]), dim=1)
    input_ids = torch.cat((made["prompt_input_ids"], made["completion_input_ids"]), dim=1)
    is_answer = torch.cat((torch.zeros_like(prompt), made["completion_attention_mask"]), dim=1)
    tensors = [attention_mask, input_ids, is_answer]
    has_types = "token_type_ids" in made
    if has_types:
        tensors.append(utils.pad_to_length(made["token_type_ids"], input_ids.shape[1], 0))
    limit = trainer.max_length
    if limit is None or limit >= input_ids.shape[1]:
        tensors = flush_left(*tensors)
    elif trainer.truncation_mode == "keep_start":
        tensors = [tensor[:, :limit] for tensor in flush_left(*tensors)]
    elif trainer.truncation_mode == "keep_end":
        flush = flush_left if has_types else flush_right  # TRL's choice
        tensors = flush_left(*(tensor[:, -limit:] for tensor in flush(*tensors)))
    else:
        raise ValueError(
            f"truncation_mode: got {trainer.truncation_mode!r}, wanted 'keep_start' or 'keep_end'"
        )
    attention_mask, input_ids, is_answer, *types = tensors
    return _Rows(input_ids, attention_mask, is_answer.bool(), types[0] if types else None)


def _first_logit(is_answer: Tensor) -> int:
    """The first position whose logits TRL keeps under ``use_logits_to_keep``: before the first answer."""
    first = int(is_answer.nonzero()[:, 1].min())
    return max(first - 1, 0)


def _dense(values: Tensor, mask: Tensor) -> Tensor:
    """``(R, T)``: the ``(N,)`` values at the True places of ``mask``, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _wpo_weights(adjusted: Tensor, mask: Tensor, num_pairs: int) -> Tensor:
    """``(P,)`` weights of arXiv:2406.11827, eq. 2, with TRL's alignment of tokens and positions."""
    weights = (adjusted * mask).sum(-1) / mask.sum(-1)
    return torch.exp(weights[:num_pairs] + weights[num_pairs:]).clamp(max=1)


def _length_desensitised(per_token: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """``(2P,)`` log-probabilities of LD-DPO (arXiv:2409.06411), counted from the row's start as TRL does."""
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)[:, None]
    position = torch.arange(per_token.shape[1], device=per_token.device)
    weights = torch.where(position < shared, 1.0, torch.where(position < lengths[:, None], alpha, 0.0))
    return (per_token * weights).sum(-1)


def _sums(out: FusedLMOutput) -> Tensor:
    assert out.logps is not None
    return out.logps.sum(-1)
