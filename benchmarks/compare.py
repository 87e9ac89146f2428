"""Two result files, case by case: what became slower than the noise explains.

Where both have the floor, what is compared is the ratio to it, in which the clock of the day cancels. The
noise of a change is the root of the squares of its medians' noises (`harness.summarise`), each with some 90 %
confidence. Of many changes some are outside of that by chance: so many times the noise is allowed that all
are within it with 95 % confidence (Bonferroni) where nothing changed, and at least ``MIN_NOISE``: what no run
of its own shows, another allocation, another placement. All is shown; fastdpo alone decides: a peer that
became slower, or is no longer installed, is no regression of ours.

Two files of one version have to agree, peers and all, in both directions: `agreement`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

from benchmarks.harness import NOTCH
from benchmarks.method import WHOLE, is_ours
from benchmarks.results import SAME, differing

MIN_NOISE = 0.02
FLOORS = ("gemm", "copy")
NOT_ALIKE = tuple(name for name in SAME if name in ("device", "cpu", "driver", "threads", "cuda"))
LEFT_OUT = "left out"  # how a reason begins where nobody asked for a contender


@dataclass(frozen=True)
class Change:
    """One contender of one case: new time over old time, the noise of that, and what is allowed for it."""

    key: str
    name: str
    ratio: float
    noise: float
    allowed: float
    per_floor: bool

    @property
    def is_regression(self) -> bool:
        return self.ratio > 1 + self.allowed

    @property
    def is_improvement(self) -> bool:
        return self.ratio < 1 / (1 + self.allowed)


@dataclass(frozen=True)
class Comparison:
    """All changes; what stopped working; what of ours no longer runs; what else the new one does not have;
    why the two are not of one kind; and why they are not of one version, "" where they are."""

    changes: list[Change]
    broken: list[tuple[str, str]]  # contender, what is said of it
    vanished: list[str]
    missing: list[str]
    circumstances: list[str]
    versions: str


def compare_results(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Compare what both files timed.

    Raises:
        ValueError: they have no timed case in common.
    """
    changes: list[Change] = []
    broken: list[tuple[str, str]] = []
    vanished: list[str] = []
    missing: list[str] = []
    fresh = {result["key"]: result for result in new["results"]}
    for before in old["results"]:
        after = fresh.get(before["key"])
        timed = [
            name for name, cell in before["contenders"].items() if "median_ms" in cell and name not in FLOORS
        ]
        if after is None:  # nobody asked for it
            missing += [before["key"]] if timed else []
            continue
        for name in timed:
            what = f"{before['key']}: {name}"
            if name in after["failed"]:
                broken.append((name, f"{what} failed: {after['failed'][name]}"))
            elif "median_ms" in after["contenders"].get(name, {}):
                changes.append(_change(before, after, name))
            else:
                reason = after.get("skipped") or after["not_run"].get(name, "it is not among the contenders")
                is_gone = is_ours(name) and not reason.startswith(LEFT_OUT)
                (vanished if is_gone else missing).append(f"{what}: {reason}")
        for name in (name for name in after["failed"] if name == WHOLE):
            broken.append((name, f"{before['key']}: {after['failed'][name]}"))
    if not changes and not broken and not vanished:
        raise ValueError(f"compare: {old.get('file')} and {new.get('file')} have no timed case in common")
    circumstances = [
        f"{name}: {old['environment'].get(name)} and {new['environment'].get(name)}"
        for name in NOT_ALIKE if old["environment"].get(name) != new["environment"].get(name)
        # A file of before these were kept says nothing of them.
        and (name not in ("cpu", "driver") or old["environment"].get(name) is not None)
    ]  # fmt: skip
    factor = widening(len(changes))
    changes = [replace(c, allowed=max(MIN_NOISE, factor * c.noise)) for c in changes]
    versions = differing(old["environment"], new["environment"])
    return Comparison(changes, broken, vanished, missing, circumstances, versions)


def widening(count: int) -> float:
    """How many times its noise each of so many changes may be: all are within with 95 % confidence."""
    return max(1.0, NormalDist().inv_cdf(1 - 0.05 / 2 / max(count, 1)) / NOTCH)


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
    noise = math.sqrt(sum(value**2 for value in noises))
    return Change(before["key"], name, ratio, noise, max(MIN_NOISE, noise), per_floor)


def report(compared: Comparison) -> int:
    """Print it, the worst change first; 1 where one of ours is slower than the noise explains, broke, or is
    gone. On unlike machines only what broke counts."""
    for line in compared.circumstances:
        print(f"not alike, so no regression is told from it: {line}")
    for change in sorted(compared.changes, key=lambda change: -change.ratio):
        slow = "SLOWER" if is_ours(change.name) else "slower"
        verdict = slow if change.is_regression else "faster" if change.is_improvement else "same"
        what = "x of the old ratio to the floor" if change.per_floor else "x of the old time"
        print(f"{verdict:<7} {change.ratio:6.3f} +-{change.allowed:.3f} {what}  {change.key}: {change.name}")
    for name, line in compared.broken:
        print(f"{'BROKEN' if _decides(name) else 'broken':<7} {line}")
    for line in compared.vanished:
        print(f"GONE    {line}")
    for line in compared.missing:
        print(f"not in the new file: {line}")
    slower = sum(change.is_regression and is_ours(change.name) for change in compared.changes)
    broken = sum(_decides(name) for name, _ in compared.broken)
    gone = len(compared.vanished)
    of_ours = f"{slower} slower beyond noise, {broken} broken, {gone} gone"
    print(f"{len(compared.changes)} compared; of ours {of_ours}")
    if not compared.versions:
        print(agreement(compared)[0])
    return int(bool(slower or gone) and not compared.circumstances or broken > 0)


def agreement(compared: Comparison) -> tuple[str, bool]:
    """Whether two runs of one version agree within the noise that they state; in words, and as it is."""
    apart = [c for c in compared.changes if c.is_regression or c.is_improvement]
    total = len(compared.changes)
    lost = len(compared.broken) + len(compared.vanished) + len(compared.missing)
    count = f"{total - len(apart)} of {total} within the noise that they state"
    other = f", {lost} not timed in both" if lost else ""
    agree = bool(total) and not apart and not lost and not compared.circumstances
    verdict = "the two runs agree" if agree else "the two runs DISAGREE"
    return f"of one version: {verdict}, {count}{other}", agree


def _decides(name: str) -> bool:
    return is_ours(name) or name == WHOLE
