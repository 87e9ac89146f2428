"""Plots of result files as SVG: time against the floor, memory against N, V and T, errors.

Each file carries a digest of the numbers in it, by which ``make tables`` and a test tell whether it is what
the results give: the drawing itself differs between versions of matplotlib, the numbers must not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import slug

Result = dict[str, Any]
# panel -> contender -> points
Panels = dict[str, dict[str, list[tuple[float, float]]]]


@dataclass(frozen=True)
class Plot:
    """What one file shows, from the newest results of one device."""

    name: str
    title: str
    x: str
    y: str
    data: Callable[[Sequence[Result]], Panels]
    is_bars: bool = False


def time_data(cases: Sequence[Result]) -> Panels:
    """Ratio to the products over N, a panel for every share of ignored labels."""
    timed = [case for case in cases if case["suite"] == "op" and "skipped" not in case]
    panels: Panels = {}
    for case in timed:
        ignored = f", {case['ignored_percent']} % ignored" if case["ignored_percent"] else ""
        panel = f"{case['model']}, {case['task']}, {case['dtype']}{ignored}"
        for name, cell in case["contenders"].items():
            if "ratio_to_gemm" in cell:
                series = panels.setdefault(panel, {}).setdefault(name, [])
                series.append((case["num_tokens"], cell["ratio_to_gemm"]))
    return _sorted(_largest(panels, 6))


def axes_of(case: Result) -> Sequence[str]:
    """The curves that a point of memory lies on; older files name one, a case that was skipped none."""
    axes: Sequence[str] = case.get("axes", [case["axis"]] if "axis" in case else [])
    return axes


def memory_data(cases: Sequence[Result]) -> Panels:
    panels: Panels = {}
    along = {"N": "num_tokens", "V": "vocab_size", "T": "length"}
    for case in cases:
        if case["suite"] != "memory" or "skipped" in case:
            continue
        for axis in axes_of(case):
            panel = f"{case['task']} against {axis}, {case['model']}"
            for name, cell in case["contenders"].items():
                series = panels.setdefault(panel, {}).setdefault(name, [])
                series.append((case[along[axis]], cell["peak_mib"]))
    return _sorted(panels)


def _context_data(cases: Sequence[Result], number: str) -> Panels:
    """A number of whole steps over the tokens of their row, a panel for every model."""
    panels: Panels = {}
    for case in cases:
        if case["suite"] != "context" or "skipped" in case:
            continue
        for name, cell in case["contenders"].items():
            if cell.get(number) is not None:
                series = panels.setdefault(f"{case['model']}, {case['precision']}", {}).setdefault(name, [])
                series.append((case["tokens"], cell[number]))
    return _sorted(panels)


def context_time_data(cases: Sequence[Result]) -> Panels:
    return _context_data(cases, "median_ms")


def context_memory_data(cases: Sequence[Result]) -> Panels:
    return _context_data(cases, "peak_mib")


def error_data(cases: Sequence[Result]) -> Panels:
    """Bars, one a contender: 0 is the error of values, 1 of dhidden, 2 of dweight."""
    panels: Panels = {}
    names = ("logps_error_nats", "dhidden_relative_error", "dweight_relative_error")
    for case in cases:
        if case["suite"] != "accuracy" or "skipped" in case or case["task"] not in ("cache", "pairs"):
            continue
        panel = f"{case['model']}, {case['task']}, {case['dtype']}"
        for name, cell in case["contenders"].items():
            points = [(float(k), cell[error]) for k, error in enumerate(names) if error in cell]
            panels.setdefault(panel, {})[name] = points
    return _sorted(_largest(panels, 4))


def _largest(panels: Panels, count: int) -> Panels:
    """The panels with most points, in their order: a page holds so many."""
    size = {name: sum(map(len, series.values())) for name, series in panels.items()}
    kept = sorted(panels, key=lambda name: (-size[name], name))[:count]
    return {name: series for name, series in panels.items() if name in kept}


def _sorted(panels: Panels) -> Panels:
    return {
        panel: {name: sorted(points) for name, points in sorted(series.items())}
        for panel, series in sorted(panels.items())
    }


PLOTS = (
    Plot("time", "Time as a ratio to the products alone", "N, positions", "x GEMM", time_data),
    Plot("memory", "Peak memory above inputs", "", "MiB", memory_data),
    Plot(
        "error",
        "Error against fp64",
        "values (nats), dhidden, dweight (relative)",
        "",
        error_data,
        is_bars=True,
    ),
    Plot("context-time", "Time of a step on one row", "T, tokens", "ms", context_time_data),
    Plot("context-memory", "Peak memory of a step on one row", "T, tokens", "MiB", context_memory_data),
)


def digest(plot: Plot, panels: Panels) -> str:
    """Of the numbers and the words of a plot."""
    text = json.dumps([plot.name, plot.title, plot.x, plot.y, panels], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def plot_files(cases: dict[str, list[Result]]) -> dict[str, tuple[Plot, Panels]]:
    """File name -> what it shows, for devices that have results."""
    return {name: (plot, panels) for name, (plot, panels, _) in _files(cases).items()}


def _files(cases: dict[str, list[Result]]) -> dict[str, tuple[Plot, Panels, str]]:
    return {
        f"{slug(device)}-{plot.name}.svg": (plot, panels, device)
        for device, found in cases.items() for plot in PLOTS if (panels := plot.data(found))
    }  # fmt: skip


def write_plots(cases: dict[str, list[Result]], folder: Path) -> list[Path]:
    """Write what there is; a file that shows these numbers already stays, one of no results is removed.

    Raises:
        ValueError: there is something to draw, and no matplotlib.
    """
    files = _files(cases)
    for path in folder.glob("*.svg"):
        if path.name not in files and "fastdpo benchmarks" in path.read_text():
            path.unlink()
    written = []
    for name, (plot, panels, device) in files.items():
        path = folder / name
        if not _is_current(path, plot, panels):
            folder.mkdir(parents=True, exist_ok=True)
            _draw(path, plot, panels, device)
            written.append(path)
    return written


def check_plots(cases: dict[str, list[Result]], folder: Path) -> list[str]:
    """Names of files that are missing, or do not show these numbers."""
    return [
        name
        for name, (plot, panels) in plot_files(cases).items()
        if not _is_current(folder / name, plot, panels)
    ]


def _is_current(path: Path, plot: Plot, panels: Panels) -> bool:
    return path.is_file() and digest(plot, panels) in path.read_text()


def _draw(path: Path, plot: Plot, panels: Panels, device: str) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"{path.name}: wants matplotlib, which is not installed ({error})") from error
    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fastdpo"  # the same ids every time
    names = sorted({name for series in panels.values() for name in series})
    colours = {name: pyplot.get_cmap("tab20")(k % 20) for k, name in enumerate(names)}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 3.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (panel, series) in zip(axes.flat, panels.items(), strict=False):
        for number, (name, points) in enumerate(series.items()):
            if plot.is_bars:
                width = 0.8 / len(series)
                places = [x - 0.4 + width * (number + 0.5) for x, _ in points]
                axis.bar(places, [y for _, y in points], width, color=colours[name], label=name)
            else:
                axis.plot(*zip(*points, strict=True), "o-", color=colours[name], label=name, markersize=4)
        if plot.is_bars:
            axis.set_xticks([0, 1, 2], ["values", "dhidden", "dweight"])
        elif any(len(points) > 1 for points in series.values()):
            axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(panel, fontsize=9)
        axis.set_xlabel(plot.x, fontsize=8)
        axis.set_ylabel(plot.y, fontsize=8)
        axis.grid(alpha=0.3)
    handles = {
        label: h for axis in figure.axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{plot.title} ({device})")
    figure.tight_layout(rect=(0, 0.04 + 0.16 / rows, 1, 1))
    about = f"fastdpo benchmarks, numbers {digest(plot, panels)}"
    figure.savefig(path, format="svg", metadata={"Date": None, "Description": about})
    pyplot.close(figure)
