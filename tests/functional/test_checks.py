"""Every mistake in a call of `fused_dpo_loss` or `dpo_loss_from_logps` is an error with name, got, wanted."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fastdpo.functional.pairs import dpo_loss_from_logps, fused_dpo_loss
from fastdpo.types import LinearLogprobOutput, LMHead, PackedLayout

HIDDEN, HEAD = torch.zeros(4, 6, 8), torch.zeros(11, 8)
LABELS = torch.ones(4, 6, dtype=torch.int64)
META = torch.device("meta")


def packed(cu_seqlens: Any = (0, 6, 12, 18, 24), lengths: Any = None) -> dict[str, Any]:
    bounds = torch.tensor(cu_seqlens) if isinstance(cu_seqlens, tuple) else cu_seqlens
    return {
        "hidden": HIDDEN.view(24, 8),
        "labels": LABELS.view(24),
        "ref_hidden": HIDDEN.view(24, 8),
        "layout": PackedLayout(bounds, lengths),
    }


# changed arguments, the error, its message
BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    # the batch
    (
        {"labels": LABELS[0]},
        ValueError,
        "labels: got shape (6,), wanted (2P, T), chosen rows first, or a layout",
    ),
    ({"labels": LABELS[:3]}, ValueError, "labels: got shape (3, 6), wanted (2P, T)"),
    ({"labels": LABELS.tolist()}, TypeError, "labels: got list, wanted a Tensor"),
    ({"labels": LABELS.float()}, ValueError, "labels: got torch.float32, wanted torch.int64 or torch.int32"),
    ({"labels": LABELS.bool()}, ValueError, "labels: got torch.bool, wanted torch.int64"),
    (
        {"labels": LABELS[:, :5], "ref_hidden": HIDDEN[:, :5]},
        ValueError,
        "labels: got shape (4, 5), wanted (4, 6)",
    ),
    ({"hidden": HIDDEN[:2]}, ValueError, "labels: got shape (4, 6), wanted (2, 6) to match hidden"),
    ({"hidden": HIDDEN.view(24, 8)}, ValueError, "labels: got shape (4, 6), wanted (24,) to match hidden"),
    ({"hidden": HIDDEN[..., :7]}, ValueError, "hidden: got shape (4, 6, 7), wanted (..., 8)"),
    ({"hidden": HIDDEN.int()}, ValueError, "hidden: got torch.int32"),
    ({"hidden": HIDDEN.half()}, ValueError, "lm_head.weight: got torch.float32, wanted torch.float16"),
    ({"hidden": None}, TypeError, "hidden: got NoneType, wanted a Tensor"),
    ({"lm_head": HEAD[0]}, ValueError, "lm_head.weight: got shape (8,)"),
    ({"lm_head": LMHead(HEAD, adapter=(HEAD, HEAD, 1.0))}, ValueError, "adapter"),
    # the layout
    (
        packed() | {"hidden": HIDDEN, "labels": LABELS},
        ValueError,
        "labels: got shape (4, 6), wanted (N_all,)",
    ),
    (packed((0, 6, 12, 24)), ValueError, "layout.cu_seqlens: got 4 bounds, wanted 2P + 1"),
    (packed((0.0, 6.0, 24.0)), ValueError, "layout.cu_seqlens: got torch.float32, wanted int32 or int64"),
    (packed((0, 6, 12, 18, 23)), ValueError, "layout.cu_seqlens: got [0, 6, 12, 18, 23], wanted it to rise"),
    (packed((0, 12, 6, 18, 24)), ValueError, "wanted it to rise from 0 to 24"),
    (
        packed(torch.zeros(1, 5, dtype=torch.int64)),
        ValueError,
        "layout.cu_seqlens: got shape (1, 5), wanted (B + 1,)",
    ),
    (packed([0, 24]), TypeError, "layout.cu_seqlens: got list, wanted a Tensor"),
    (
        packed(torch.zeros(5, dtype=torch.int64, device=META)),
        ValueError,
        "layout.cu_seqlens: got meta, wanted cpu",
    ),
    (packed(lengths=(6, 6, 12)), ValueError, "layout.lengths: got (count, sum) (3, 24), wanted (4, 24)"),
    (
        packed() | {"layout": (0, 24)},
        ValueError,
        "layout: got tuple, wanted None, a PackedLayout or a TokenLayout",
    ),
    # the reference
    (
        {"ref_hidden": None},
        ValueError,
        "ref_logps: got no reference, wanted ref_hidden or ref_logps for sigmoid",
    ),
    ({"ref_logps": torch.zeros(4)}, ValueError, "ref_logps: got a value together with ref_hidden"),
    ({"ref_hidden": None, "ref_lm_head": HEAD}, ValueError, "ref_lm_head: got a head without ref_hidden"),
    ({"ref_hidden": HIDDEN[:, :5]}, ValueError, "ref_hidden: got shape (4, 5, 8), wanted (*(4, 6), H)"),
    ({"ref_hidden": 0}, TypeError, "ref_hidden: got int, wanted a Tensor"),
    (
        {"loss_type": "simpo"},
        ValueError,
        "ref_logps: got a value that simpo does not use, wanted no reference",
    ),
    (
        {"ref_hidden": None, "ref_logps": torch.zeros(2)},
        ValueError,
        "ref_logps: got shape (2,), wanted (4,) or (4, 6)",
    ),
    (
        {"ref_hidden": None, "ref_logps": torch.zeros(3, 4)},
        ValueError,
        "ref_logps: got shape (3, 4), wanted (4,) or",
    ),
    (
        {"ref_hidden": None, "ref_logps": LABELS},
        ValueError,
        "ref_logps: got torch.int64, wanted torch.float32",
    ),
    (
        {"ref_hidden": None, "ref_logps": torch.zeros(4, device=META)},
        ValueError,
        "ref_logps: got meta, wanted cpu",
    ),
    (
        {"ref_hidden": None, "ref_logps": torch.zeros(4), "token_weights": torch.ones(4, 6)},
        ValueError,
        "ref_logps (with token_weights): got shape (4,), wanted (4, 6)",
    ),
    # per token and per pair
    ({"token_weights": torch.ones(4)}, ValueError, "token_weights: got shape (4,), wanted (4, 6)"),
    ({"token_weights": LABELS}, ValueError, "token_weights: got torch.int64, wanted torch.float32"),
    ({"nll_labels": LABELS}, ValueError, "nll_labels or nll_mask: got a value that sigmoid does not use"),
    (
        {"loss_type": ["sigmoid", "sft"], "nll_labels": LABELS[:2]},
        ValueError,
        "nll_labels: got shape (2, 6), wanted (4, 6)",
    ),
    ({"beta": torch.ones(4)}, ValueError, "beta: got shape (4,), wanted a number or (2,)"),
    ({"margin": torch.ones(2, device=META)}, ValueError, "margin: got meta, wanted cpu"),
    # the loss
    ({"loss_type": "sigmiod"}, ValueError, "loss_type: got 'sigmiod', wanted one of"),
    ({"beta": -0.1}, ValueError, "beta: got -0.1, wanted a number in (0, inf)"),
    ({"gamma": 0.5}, ValueError, "gamma: got an option that sigmoid does not have"),
    ({"reference_free": True}, ValueError, "reference_free: got an option that sigmoid does not have"),
    ({"num_pairs": -1}, ValueError, "num_pairs: got -1, wanted a positive number"),
    ({"execution": "fast"}, TypeError, "execution: got str"),
]


@pytest.mark.promise(22)
@pytest.mark.parametrize(("changed", "error", "message"), BAD_CALLS, ids=[case[2][:60] for case in BAD_CALLS])
def test_bad_call(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"hidden": HIDDEN, "lm_head": HEAD, "labels": LABELS, "ref_hidden": HIDDEN} | changed
    with pytest.raises(error, match=re.escape(message)):
        fused_dpo_loss(**arguments)


def test_the_call_that_the_bad_ones_are_made_of_is_good() -> None:
    for arguments in (
        {"hidden": HIDDEN, "labels": LABELS, "ref_hidden": HIDDEN},
        packed(),
        packed(lengths=(6,) * 4),
    ):
        assert fused_dpo_loss(lm_head=HEAD, **arguments).loss.isfinite()


TOKEN = LinearLogprobOutput(torch.zeros(4, 6))
MASK = LABELS.bool()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"token": LinearLogprobOutput(torch.zeros(3, 6))},
            ValueError,
            "token.logps: got shape (3, 6), wanted (2P, T)",
        ),
        ({"mask": None}, TypeError, "mask: got NoneType, wanted a Tensor"),
        ({"mask": LABELS}, ValueError, "mask: got torch.int64, wanted torch.bool"),
        ({"mask": MASK[:, :5]}, ValueError, "mask: got shape (4, 5), wanted (4, 6)"),
        ({"nll_mask": MASK}, ValueError, "nll_labels or nll_mask: got a value that sigmoid does not use"),
        ({"loss_type": ["sigmoid", "sft"], "nll_mask": LABELS}, ValueError, "nll_mask: got torch.int64"),
        ({"ref_logps": None}, ValueError, "ref_logps: got no reference"),
        ({"beta": torch.ones(3)}, ValueError, "beta: got shape (3,), wanted a number or (2,)"),
        ({"shift": True}, ValueError, "shift: got an option that sigmoid does not have"),
    ],
)
def test_bad_call_with_logps(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"token": TOKEN, "mask": MASK, "ref_logps": torch.zeros(4)} | changed
    with pytest.raises(error, match=re.escape(message)):
        dpo_loss_from_logps(**arguments)
