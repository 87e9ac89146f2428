"""``curves.png``: a colour a metric, no legend over a curve, nothing left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastdpo.training.loop.curves import draw_curves

figures = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, in place of files."""
    saved: list[Any] = []

    def keep(figure: Any, *_: Any, **__: Any) -> None:
        figure.draw_without_rendering()
        saved.append(figure)

    monkeypatch.setattr(figures.Figure, "savefig", keep)
    return saved


HISTORY = [
    *({"step": s, "loss": 1 / s, "rewards/chosen": -s, "rewards/rejected": -2 * s} for s in (1, 2, 3)),
    {
        "step": 3,
        "eval_loss": 0.5,
        "eval_a_loss": 0.4,
        "eval_rewards/rejected": -7,
        "eval_rewards/chosen": None,
    },
    {"step": 3, "logps/chosen": -4.0, "eval_topk_mass/chosen": 0.5, "train_loss": 9.0},
]


def test_a_colour_a_metric_and_a_marker_an_evaluation(drawn: list[Any]):
    assert draw_curves(HISTORY, Path("curves.png"))
    panels = {axes.get_title(): axes for axes in drawn[0].axes if axes.lines}
    assert list(panels) == ["loss", "rewards", "log-probability (nats)", "mass of the most likely tokens"]
    loss, evaluated, other = panels["loss"].lines
    assert [line.get_label() for line in panels["loss"].lines] == ["loss", "eval_loss", "eval_a_loss"]
    assert loss.get_color() == evaluated.get_color() == other.get_color()
    assert evaluated.get_linestyle() == "--" and evaluated.get_marker() != other.get_marker()
    chosen, rejected, evaluated = panels["rewards"].lines
    assert chosen.get_color() != rejected.get_color() == evaluated.get_color()
    # One point is seen, though no line goes through it.
    (single,) = panels["log-probability (nats)"].lines
    assert single.get_marker() == "." and single.get_color() == chosen.get_color()


def test_legends_hide_nothing(drawn: list[Any]):
    many = [{**entry, "eval_rewards/margins": 3.0, "rewards/margins": 4.0} for entry in HISTORY]
    draw_curves(many, Path("curves.png"))
    for axes in (axes for axes in drawn[0].axes if axes.lines):
        legend = axes.get_legend()
        assert {text.get_text() for text in legend.get_texts()} == {line.get_label() for line in axes.lines}
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
        assert drawn[0].bbox.contains(*legend.get_window_extent().min)
