"""Conversational rows in TRL's ORPO trainer: what sets its loss apart from the loop's lies in the rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses import PairLogps, build_objective
from fastdpo.training.data.encode import encode_rows
from fastdpo.training.data.source import read_rows
from fastdpo.training.settings.encoding import EncodingOptions
from tests.training.conftest import tiny_llama

ROW = {
    "prompt": [{"role": "user", "content": "seven river"}],
    "chosen": [{"role": "assistant", "content": "walk stone seed"}],
    "rejected": [{"role": "assistant", "content": "lamp"}],
}


def orpo_loss(prompt: list[int], chosen: list[int], rejected: list[int]) -> Tensor:
    """With the NLL of prompt and answer, as TRL has it."""
    model, logps = tiny_llama(), []
    for answer in (chosen, rejected):
        ids = torch.tensor([[*prompt, *answer]])
        log_probs = model(ids).logits.log_softmax(-1)[0, :-1]
        logps.append(log_probs.gather(-1, ids[0, 1:, None])[:, 0])
    answers = [values[len(prompt) - 1 :] for values in logps]
    sums = (values.sum()[None] for values in answers)
    lengths = (torch.tensor([float(len(values))]) for values in answers)
    whole = {"nll_sum": -logps[0].sum()[None], "nll_tokens": torch.tensor([float(len(logps[0]))])}
    return build_objective("orpo").loss(PairLogps(*sums, *lengths, **whole))


def test_trl_adds_an_end_behind_the_templates(tokenizer: Any) -> None:
    """A template that ends in a newline gets a second end there; the loop trains what the template says."""
    orpo = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    from trl.data_utils import maybe_apply_chat_template

    trainer = SimpleNamespace(is_encoder_decoder=False, processing_class=tokenizer, max_length=512)
    trainer.build_tokenized_answer = lambda *texts: orpo.build_tokenized_answer(trainer, *texts)
    trls = orpo.tokenize_row(trainer, maybe_apply_chat_template(ROW, tokenizer))
    (ours,) = encode_rows(read_rows([ROW]), tokenizer, EncodingOptions())
    prompt, chosen, rejected = (ids.tolist() for ids in (ours.prompt, *(x.ids for x in ours.answers)))
    end = [tokenizer.eos_token_id]
    assert trls["chosen_input_ids"] == prompt + chosen + end
    assert trls["rejected_input_ids"] == prompt + rejected + end
    its = [trls[f"{side}_input_ids"][len(prompt) :] for side in ("chosen", "rejected")]
    assert torch.equal(orpo_loss(prompt, *its), orpo_loss(prompt, chosen + end, rejected + end))
    assert not torch.isclose(orpo_loss(prompt, *its), orpo_loss(prompt, chosen, rejected), rtol=1e-3)
