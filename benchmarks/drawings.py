"""The drawings of README and docs, and the table of TRL's memory: SVG made of sizes and of what was measured.

`examples/trl_memory.py --record benchmarks/trl_memory.json` measures; `make tables` draws.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT

RECORD = ROOT / "benchmarks" / "trl_memory.json"
SIDES = ("TRL", "with the line")
_INK, _GREY, _WARM, _COOL = "#1f2933", "#7b8794", "#d9822b", "#2b6cb0"


def memory_table(record: Path = RECORD) -> str:
    """Peak memory of a step of TRL's trainers, with ``patch_trl()`` and without."""
    measured = json.loads(record.read_text())
    sizes, packages = measured["sizes"], measured["packages"]
    lines = ["| TRL's trainer | as it is | with `patch_trl()` | less by |", "|---|---|---|---|"]
    for row in measured["trainers"]:
        before, after = (row["peak_mib"][side] for side in SIDES)
        lines.append(f"| {row['trainer']} | {before:.0f} MiB | {after:.0f} MiB | {before / after:.1f} x |")
    shapes = {f"{row['rows']} sequences of {row['length']} tokens" for row in measured["trainers"]}
    said = (
        f"Peak of one step on a CPU ({measured['device']}), fp32: V = {sizes['vocab_size']}, "
        f"H = {sizes['hidden_size']}, one layer, {' or '.join(sorted(shapes))}; "
        f"TRL {packages['trl']}, torch {packages['torch']}."
    )
    return "\n".join([*lines, "", said])


def drawings() -> dict[str, str]:
    """Name of each file, and its SVG."""
    return {
        "memory.svg": memory_drawing(json.loads(RECORD.read_text())),
        "head.svg": head_drawing(),
        "forest.svg": forest_drawing(),
        "shards.svg": shards_drawing(),
    }


def write_drawings(folder: Path) -> None:
    """Every drawing, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in drawings().items():
        (folder / name).write_text(text)


def check_drawings(folder: Path) -> list[str]:
    """Names of those that are missing, or are not what this module draws."""
    return [
        name
        for name, text in drawings().items()
        if not (folder / name).is_file() or (folder / name).read_text() != text
    ]


def memory_drawing(measured: dict[str, Any]) -> str:
    """A bar for each side of each trainer."""
    rows = measured["trainers"]
    most = max(peak for row in rows for peak in row["peak_mib"].values())
    parts, y = [_text(12, 24, "Peak memory of one training step, in MiB (measured on a CPU)", bold=True)], 44
    for row in rows:
        for side, colour in zip(SIDES, (_WARM, _COOL), strict=True):
            peak = row["peak_mib"][side]
            name = f"TRL's {row['trainer']}" + (" + patch_trl()" if side == SIDES[1] else "")
            width = 400 * peak / most
            parts += [
                _text(12, y + 15, name),
                _box(200, y, width, 20, colour),
                _text(208 + width, y + 15, f"{peak:.0f}"),
            ]
            y += 26
        y += 10
    return _svg(680, y + 4, "Peak memory of TRL's trainers, with patch_trl and without", parts)


def head_drawing() -> str:
    """What the head does with a chunk of labelled tokens, and what is left of it."""
    parts = [
        _text(12, 24, "One chunk of labelled tokens at a time", bold=True),
        *_named(12, 60, 100, 120, "#e6eef7", ["hidden (N, H)"]),
        *_named(12, 90, 100, 34, _COOL, ["chunk (C, H)"], light=True),
        *_named(190, 84, 110, 46, "#fdf1e3", ["logits (C, V)", "fp32, reused"]),
        *_named(190, 170, 110, 40, "#e6eef7", ["head W (V, H)"]),
        *_named(370, 40, 110, 34, "#e6f4ea", ["logp, lse (C)"]),
        *_named(370, 96, 110, 34, "#fdf1e3", ["D (C, V)"]),
        *_named(560, 70, 160, 34, "#e6f4ea", ["D W (C, H): dhidden"]),
        *_named(560, 126, 160, 34, "#e6f4ea", ["(g h)^T D: dW (V, H)"]),
        _arrow(112, 107, 190, 107, "product 1"),
        _arrow(245, 170, 245, 130, ""),
        _arrow(300, 96, 370, 60, "row"),
        _arrow(300, 112, 370, 112, "kernel"),
        _arrow(480, 106, 560, 88, "product 2"),
        _arrow(480, 120, 560, 142, "product 3"),
        _text(170, 240, "D = onehot(label) - softmax(logits), in the place of the logits;"),
        _text(170, 258, "g is the gradient that the loss gives a token. No (N, V) tensor is made."),
    ]
    return _svg(732, 276, "The chunked head", parts)


def forest_drawing() -> str:
    """A row in which two answers share their prompt, and who sees whom."""
    parts = [_text(12, 24, "Three layouts of one pair: prompt p, chosen c, rejected r", bold=True)]
    rows: Sequence[tuple[str, Sequence[str]]] = (
        ("padded", ("ppppccc.", "pppprrrr")),
        ("packed", ("ppppcccpppprrrr",)),
        ("shared_prompt", ("ppppcccrrrr",)),
    )
    y = 44
    colours = {"p": "#cbd5e0", "c": "#8fbc8f", "r": "#e0a08a", ".": "#ffffff"}
    for name, lines in rows:
        parts.append(_text(12, y + 15, name))
        for line in lines:
            for i, letter in enumerate(line):
                parts.append(_box(140 + 24 * i, y, 22, 20, colours[letter], _GREY))
                parts.append(_text(147 + 24 * i, y + 15, letter.replace(".", "-")))
            y += 24
        positions = sum(map(len, lines))
        parts.append(_text(150 + 24 * max(map(len, lines)), y - 9, f"{positions} positions"))
        y += 12
    parts.append(_text(12, y + 10, "A token sees its own path alone: c and r see p, and never each other."))
    return _svg(690, y + 28, "Layouts of a pair", parts)


def shards_drawing() -> str:
    """A vocabulary that is split over two ranks."""
    parts = [_text(12, 24, "A vocabulary split over ranks: three numbers a token are exchanged", bold=True)]
    for rank in range(2):
        y = 44 + 84 * rank
        parts += _named(12, y, 150, 56, "#e6eef7", [f"rank {rank}: hidden (N, H)", f"W_{rank} (V/2, H)"])
        parts += _named(220, y, 150, 56, "#fdf1e3", ["logits (C, V/2)", f"lse_{rank}, label's logit"])
        parts.append(_arrow(162, y + 28, 220, y + 28, ""))
        parts.append(_arrow(370, y + 28, 440, 114, "gather"))
    parts += _named(440, 86, 210, 56, "#e6f4ea", ["lse = logsumexp of lse_r", "logp = label's logit - lse"])
    parts.append(_text(12, 226, "Backward: dW stays on its rank; dhidden is summed over the ranks once."))
    return _svg(690, 242, "A split vocabulary", parts)


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="13" role="img" '
        f'aria-label="{escape(title)}">\n'
        f'aria-label="{escape(title)}">\n'
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{_GREY}"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, text: str, *, bold: bool = False, colour: str = _INK) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}"{weight}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" fill="{fill}" stroke="{stroke}"/>'
    )


def _named(
    x: int, y: int, width: int, height: int, fill: str, lines: Sequence[str], *, light: bool = False
) -> list[str]:
    colour = "#ffffff" if light else _INK
    texts = [_text(x + 6, y + 20 + 18 * i, line, colour=colour) for i, line in enumerate(lines)]
    return [_box(x, y, width, height, fill, _GREY), *texts]


def _arrow(x: int, y: int, to_x: int, to_y: int, label: str) -> str:
    line = f'<path d="M{x} {y} L{to_x} {to_y}" stroke="{_GREY}" fill="none" marker-end="url(#tip)"/>'
    middle = _text((x + to_x) / 2 - 28, (y + to_y) / 2 - 7, label, colour=_GREY) if label else ""
    return line + middle
