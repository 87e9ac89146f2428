"""The bytes of a head between ranks, and which way is less."""

from __future__ import annotations

import pytest

from fastdpo import explain_plan
from fastdpo.plan.traffic import head_traffic

LLAMA = (4096, 128256)  # H and V of Llama-3-8B


def test_bytes_by_hand() -> None:
    # 8 ranks: 7 others' parts of W, of 16032 rows, forward, backward, and their shares of dW; in bf16.
    found = head_traffic(4096, *LLAMA, 8)
    assert found.weight_bytes == 7 * 16032 * 4096 * 2 * 3
    # 7 others' hidden states and shares of dh; 16 bytes of labels and places, 12 of each part, 4 back.
    assert found.states_bytes == 7 * 4096 * (4096 * 2 * 2 + 16 + 8 * 12 + 4)


def test_nothing_goes_back_where_nothing_is_trained() -> None:
    found = head_traffic(4096, *LLAMA, 8, needs_hidden=False, needs_weight=False)
    assert found.weight_bytes == 7 * 16032 * 4096 * 2
    assert found.states_bytes == 7 * 4096 * (4096 * 2 + 16 + 8 * 12)


@pytest.mark.parametrize(
    ("num_tokens", "num_ranks", "choice"),
    [(4096, 8, "states"), (23000, 8, "states"), (25000, 8, "weight"), (4096, 64, "weight"), (0, 8, "states")],
)
def test_the_tokens_of_all_ranks_against_the_vocabulary(num_tokens: int, num_ranks: int, choice: str) -> None:
    """States are fewer where all ranks' tokens are fewer than 1.5 V."""
    assert head_traffic(num_tokens, *LLAMA, num_ranks).choice == choice


def test_explain_plan_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    explain_plan(4096, *LLAMA, weight_requires_grad=True)
    assert "traffic" not in capsys.readouterr().out
    explain_plan(4096, *LLAMA, weight_requires_grad=True, num_ranks=8)
    last = capsys.readouterr().out.splitlines()[-1]
    assert "2630.2 MiB a rank with the weight gathered, 451.2 MiB with the hidden states" in last
    assert "split_head='auto' moves the states (5.8 times less)" in last
