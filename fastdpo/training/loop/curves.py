"""``curves.png``: what a run logged, a colour a metric, evaluations in the colour of what they measure."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CURVES_FILE = "curves.png"
# Panels: title, and the metrics drawn in it (of training and of evaluations); then those that are there where
# a run has something to draw in them.
PANELS = (
    ("loss", ("loss",)),
    ("reward accuracy", ("rewards/accuracies",)),
    ("rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    ("log-probability (nats)", ("logps/chosen", "logps/rejected", "logps")),
)
FURTHER_PANELS = tuple(
    (title, tuple(f"{metric}/{answers}" for answers in ("chosen", "rejected", "answers", "teacher")))
    for title, metric in (
        ("mass of the most likely tokens", "topk_mass"),
        ("entropy of the most likely tokens (nats)", "topk_entropy"),
        ("divergence of an answer (nats)", "kl"),
    )
)
# By the last part of a metric's name, the same in every panel; all others are of the first.
_COLOURS = {"rejected": "C1", "margins": "C2", "teacher": "C3"}
# A marker an evaluation set.
_MARKERS = "osD^vP*X"
Points = list[tuple[float, float]]
logger = logging.getLogger(__name__)


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw the training curves; False, with a line in the log, without matplotlib or room for it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("%s is not drawn: matplotlib is not installed (pip install matplotlib)", path.name)
        return False
    of_metrics = {name: _series(history, name) for _, names in (*PANELS, *FURTHER_PANELS) for name in names}
    panels = [*PANELS, *(panel for panel in FURTHER_PANELS if any(of_metrics[name] for name in panel[1]))]
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, 2).flat)
    for unused in grid[len(panels) :]:
        unused.set_axis_off()
    for axes, (title, names) in zip(grid, panels, strict=False):
        axes.set_title(title)
        axes.set_xlabel("step")
        for name in names:
            _draw(axes, name, of_metrics[name])
        drawn = sum(bool(of_metrics[name]) for name in names)
        if drawn:
            # Below the curves, a column a metric.
            columns = drawn if drawn > 1 else len(axes.lines)
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
            axes.legend(fontsize="small", ncols=columns, columnspacing=1.0, frameon=False, **place)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:  # no reason to lose the run
        logger.warning("%s is not drawn: %s", path, error.strerror)
        path.unlink(missing_ok=True)
        return False
    return True


def _draw(axes: Any, name: str, series: Mapping[str, Points]) -> None:
    colour, markers = _COLOURS.get(name.rsplit("/", 1)[-1], "C0"), iter(_MARKERS * len(series))
    for label, points in series.items():
        if label == name:
            # A line through one point is none.
            style = {"linestyle": "-", "marker": "." if len(points) == 1 else ""}
        else:
            style = {"linestyle": "--", "linewidth": "1.2", "marker": next(markers)}
        axes.plot(*zip(*points, strict=True), color=colour, markersize=4, label=label, **style)


def _series(history: Sequence[Mapping[str, Any]], name: str) -> dict[str, Points]:
    """The points of a metric by its name in the log: of training, then of each evaluation set."""
    found: dict[str, Points] = {}
    pattern = re.compile(rf"{re.escape(name)}|eval_(.+_)?{re.escape(name)}")
    for entry in history:
        for key, value in entry.items():
            if value is not None and pattern.fullmatch(key):
                found.setdefault(key, []).append((entry["step"], value))
    return dict(sorted(found.items(), key=lambda item: item[0] != name))
