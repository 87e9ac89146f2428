"""Two result files, case by case: what became slower than the noise explains.

Where both have the floor, what is compared is the ratio to it, in which the clock of the day cancels. The
noise of a change is the root of the squares of its medians' noises (`harness.summarise`), at least
``MIN_NOISE``: what no run of its own shows, another allocation, another placement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from benchmarks.results import SAME

MIN_NOISE = 0.02
FLOORS = ("gemm", "copy")
NOT_ALIKE = tuple(name for name in SAME if name in ("device", "threads", "cuda"))


@dataclass(frozen=True)
class Change:
    """One contender of one case: new time over old time, and the noise of that."""

    key: str
    name: str
    ratio: float
    noise: float
    per_floor: bool

    @property
    def is_regression(self) -> bool:
        return self.ratio > 1 + self.noise

    @property
    def is_improvement(self) -> bool:
        return self.ratio < 1 / (1 + self.noise)


@dataclass(frozen=True)
class Comparison:
    """All changes; what only one of the two has; what stopped working; and why they are not of one kind."""

    changes: list[Change]
    broken: list[str]
    missing: list[str]
    circumstances: list[str]


def compare_results(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Compare what both files timed.

    Raises:
        ValueError: they have no timed case in common.
    """
    changes: list[Change] = []
    broken: list[str] = []
    missing: list[str] = []
    fresh = {result["key"]: result for result in new["results"]}
    for before in old["results"]:
        after = fresh.get(before["key"])
        timed = [name for name, cell in before["contenders"].items() if "median_ms" in cell]
        if after is None or "skipped" in after:
            missing += [before["key"]] if timed else []
            continue
        for name in timed:
            if name in FLOORS:
                continue
            if name in after["failed"]:
                broken.append(f"{before['key']}: {name} failed: {after['failed'][name]}")
            elif "median_ms" not in after["contenders"].get(name, {}):
                missing.append(f"{before['key']}: {name}")
            else:
                changes.append(_change(before, after, name))
    if not changes and not broken:
        raise ValueError(f"compare: {old.get('file')} and {new.get('file')} have no timed case in common")
    circumstances = [
        f"{name}: {old['environment'].get(name)} and {new['environment'].get(name)}"
        for name in NOT_ALIKE if old["environment"].get(name) != new["environment"].get(name)
    ]  # fmt: skip
    return Comparison(changes, broken, missing, circumstances)


def _change(before: dict[str, Any], after: dict[str, Any], name: str) -> Change:
    pair = [result["contenders"][name] for result in (before, after)]
    floors = [
        next((result["contenders"][floor] for floor in FLOORS if floor in result["contenders"]), None)
        for result in (before, after)
    ]
    ratio = pair[1]["median_ms"] / pair[0]["median_ms"]
    noises = [cell.get("noise", 1.0) for cell in pair]
    per_floor = floors[0] is not None and floors[1] is not None
    if per_floor:
        ratio *= floors[0]["median_ms"] / floors[1]["median_ms"]
        noises += [cell.get("noise", 1.0) for cell in floors]
    noise = max(MIN_NOISE, math.sqrt(sum(value**2 for value in noises)))
    return Change(before["key"], name, ratio, noise, per_floor)


def report(compared: Comparison) -> int:
    """Print it, the worst change first; 1 where something is slower than the noise explains, or broke."""
    for line in compared.circumstances:
        print(f"not alike, so no regression is told from it: {line}")
    for change in sorted(compared.changes, key=lambda change: -change.ratio):
        verdict = "SLOWER" if change.is_regression else "faster" if change.is_improvement else "same"
        what = "x of the old ratio to the floor" if change.per_floor else "x of the old time"
        print(f"{verdict:<7} {change.ratio:6.3f} +-{change.noise:.3f} {what}  {change.key}: {change.name}")
    for line in compared.broken:
        print(f"BROKEN  {line}")
    for line in compared.missing:
        print(f"not in the new file: {line}")
    slower = sum(change.is_regression for change in compared.changes)
    print(f"{len(compared.changes)} compared, {slower} slower beyond noise, {len(compared.broken)} broken")
    return int((slower > 0 and not compared.circumstances) or bool(compared.broken))
