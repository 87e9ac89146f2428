"""What prompts and padding cost: the time of every contender as a multiple of ours, over the share of ignored
labels at the same N.

Ours projects the labelled rows alone. One that projects all rows takes as long at any share, so that its
multiple grows as N to the labelled rows, which is the line ``all rows / labelled rows``; one that drops them
too keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.head_tables import DEFAULT, GPU_MODELS, NOT_RUN, Result, ours_of
from benchmarks.results import newest
from benchmarks.sizes import IGNORED_PERCENT

# What docs/measured.md shows, of the model and N of the targets; the page shows all.
TASKS = ("stash", "pairs")
NUM_TOKENS = 16384
EXPECTED = {"stash": ("unsloth", "trl", "torch"), "pairs": ("unsloth", "trl", "liger-dpo", "torch")}
INTRO = (
    "Over the share of labels that are ignored (prompt and padding), at the same N: ours in ms, the others' "
    "times as multiples of it. Who projects all rows is expected to grow as *all rows / labelled rows* does."
)
Shares = dict[int, Result]  # a share of ignored labels, in percent, and what was measured there


def padding_tables(results: Sequence[Result]) -> str:
    """Those of docs/measured.md: of every GPU, *not run* where there is none; of each CPU that has any."""
    parts = [INTRO]
    gpus = newest(results, of_gpu=True)
    for device, cases in gpus.items() or {"": {}}.items():
        wanted = {
            size: {task: shares for task, shares in of_task.items() if task in TASKS}
            for size, of_task in _groups(list(cases.values())).items()
            if size.startswith(f"{GPU_MODELS[0]}, N = {NUM_TOKENS},")
        } or {f"{GPU_MODELS[0]}, N = {NUM_TOKENS}, bfloat16": {}}
        for size, of_task in wanted.items():
            parts.append(
                f"**{', '.join(filter(None, (device or 'GPU', size)))}**\n\n{_table(of_task, TASKS)}"
            )
    for device, cases in newest(results, of_gpu=False).items():
        for size, of_task in _groups(list(cases.values())).items():
            kept = {task: shares for task, shares in of_task.items() if task in TASKS}
            if kept:
                parts.append(f"**{device}, {size}**\n\n{_table(kept, tuple(kept))}")
    return "\n\n".join(parts)


def padding_of(cases: Sequence[Result]) -> list[str]:
    """Of one device, for its page: a heading and a table for every size that has more than one share."""
    groups = _groups(cases)
    if not groups:
        return [f"{NOT_RUN} on this device: one size over the share of ignored labels."]
    tables = [f"**{size}**\n\n{_table(of_task, tuple(of_task))}" for size, of_task in groups.items()]
    return ["#### Time over the share of ignored labels", INTRO, *tables]


def _groups(cases: Sequence[Result]) -> dict[str, dict[str, Shares]]:
    """A size -> its tasks -> what was timed at each share, where there is more than one to compare."""
    found: dict[str, dict[str, Shares]] = {}
    for case in cases:
        if case["suite"] == "op" and "skipped" not in case and "num_labelled" in case:
            size = f"{case['model']}, N = {case['num_tokens']}, {case['dtype']}"
            found.setdefault(size, {}).setdefault(case["task"], {})[case["ignored_percent"]] = case
    several = {
        size: {task: dict(sorted(shares.items())) for task, shares in of_task.items() if len(shares) > 1}
        for size, of_task in found.items()
    }
    return {size: of_task for size, of_task in several.items() if of_task}


def _table(of_task: dict[str, Shares], tasks: Sequence[str]) -> str:
    measured = {share for shares in of_task.values() for share in shares}
    percents = sorted({*IGNORED_PERCENT, *measured})
    lines = [
        "| task | contender | rows | " + " | ".join(f"{p} % ignored" for p in percents) + " |",
        "|---|---|---|" + "---|" * len(percents),
    ]
    for task in tasks:
        shares = of_task.get(task, {})
        ours = {p: _ours(shares[p]) for p in percents if p in shares}
        name = next((name for name in ours.values() if name), DEFAULT)
        lines.append(_line(task, name, "labelled", [_own(shares.get(p), ours.get(p)) for p in percents]))
        every = [_all_rows(shares.get(p), p) for p in percents]
        lines.append(_line(task, "all rows / labelled rows", "", every, code=""))
        for peer in _peers(shares, task):
            rows = next((_cell(shares[p], peer)["rows"] for p in shares if _cell(shares[p], peer)), "")
            cells = [_multiple(shares.get(p), ours.get(p), peer) for p in percents]
            lines.append(_line(task, peer, rows, cells))
    return "\n".join(lines)


def _line(task: str, name: str, rows: str, cells: Sequence[str], code: str = "`") -> str:
    return f"| `{task}` | {code}{name}{code} | {rows} | " + " | ".join(cells) + " |"


def _peers(shares: Shares, task: str) -> list[str]:
    """Contenders that are not ours, in the order they were measured, and those to expect that were not."""
    names = [name for result in shares.values() for name in result["contenders"]]
    others = [name for name in dict.fromkeys(names) if not name.startswith("fastdpo") and name != "gemm"]
    return [*others, *(name for name in EXPECTED.get(task, ()) if name not in others)]


def _ours(result: Result) -> str | None:
    """What a user gets who sets nothing; where that was not measured, the best of ours."""
    ours = ours_of(result)
    if DEFAULT in ours:
        return DEFAULT
    return min(ours, key=lambda name: ours[name]["median_ms"], default=None)


def _cell(result: Result, name: str) -> Result:
    cell: Result = result["contenders"].get(name, {})
    return cell if "median_ms" in cell else {}


def _own(result: Result | None, name: str | None) -> str:
    if result is None:
        return NOT_RUN
    if name is None:
        return "failed"
    cell = _cell(result, name)
    return f"{cell['median_ms']:.3g} ms +- {100 * cell['noise']:.0f} %"


def _all_rows(result: Result | None, percent: int) -> str:
    """Arithmetic, no measurement; of a result its own rows, which are whole ones."""
    share = 1 / (1 - percent / 100) if result is None else result["num_tokens"] / result["num_labelled"]
    return f"{share:.2f}"


def _multiple(result: Result | None, ours: str | None, peer: str) -> str:
    if result is None:
        return NOT_RUN
    cell = _cell(result, peer)
    if not cell:
        return "failed" if peer in result["failed"] else NOT_RUN
    if ours is None:
        return "ours failed"
    own = _cell(result, ours)
    ratio, noise = cell["median_ms"] / own["median_ms"], (cell["noise"] ** 2 + own["noise"] ** 2) ** 0.5
    return f"{ratio:.2f} x +- {ratio * noise:.2f}"
