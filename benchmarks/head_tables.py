"""The tables of ``docs/measured.md``: ratios to the products, to each peer, and whole steps.

Results of two devices never share a table; what no GPU has measured says *not run*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness import summarise_steps
from benchmarks.problem import PASSES
from benchmarks.results import newest

# DESIGN section 6, fp32 logits: the time allowed, as a ratio to the task's products in plain cuBLAS.
TARGETS = {"score": 1.18, "stash": 1.16, "cache": 1.15, "pairs": 1.15}
TARGET_TOKENS = {"score": 16384, "stash": 16384, "cache": 4096, "pairs": 16384}
GPU_MODELS = ("llama-3-8b", "qwen2.5-7b", "gemma-2-9b")
# DESIGN section 6: how many times faster than a peer, on the same tokens of the first model at N = 16384.
PEER_TARGETS = (
    ("unsloth", "stash", 1.0),
    ("unsloth", "pairs", 1.2),
    ("trl", "stash", 1.45),
    ("trl", "pairs", 1.3),
    ("liger-dpo", "pairs-frozen", 1.2),
    ("liger-dpo", "pairs", 1.2),
    ("cce-exact", "stash", 3.0),
    ("torch", "stash", 1.0),
    ("torch", "pairs", 1.0),
)
NOT_RUN = "*not run*"
# The contender that sets nothing, and what is said of it.
DEFAULT = "fastdpo-default"
DEFAULT_FIRST = "first what a user gets who sets nothing, then the best of ours where that is another"
Result = dict[str, Any]


def ours_of(result: Result) -> dict[str, Result]:
    """fastdpo's contenders that keep its promise on a task: all but the opt-in for rounded logits."""
    return {
        name: cell for name, cell in result["contenders"].items()
        if name.startswith("fastdpo-") and name != "fastdpo-bf16-logits" and "ratio_to_gemm" in cell
    }  # fmt: skip


def head_table(results: Sequence[Result]) -> str:
    """Ratio to the task's own GEMMs, a table for every GPU; *not run* where there is none."""
    devices = newest(results, of_gpu=True)
    if not devices:
        return f"{_head_of({})}\n\nNo GPU result has been recorded yet; `make gpu` makes one."
    return "\n\n".join(f"**{device}**\n\n{_head_of(cases)}" for device, cases in devices.items())


def _head_of(cases: dict[str, Result]) -> str:
    cells: dict[tuple[str, str], Result] = {}
    for result in cases.values():
        if result["suite"] == "op" and "skipped" not in result and not result["ignored_percent"]:
            if result["num_tokens"] == TARGET_TOKENS.get(result["task"]) and result["dtype"] == "bfloat16":
                cells[result["model"], result["task"]] = result
    lines = [
        "| mode | GEMM passes | tokens | target | " + " | ".join(GPU_MODELS) + " |",
        "|---|---|---|---|" + "---|" * len(GPU_MODELS),
    ]
    for task, target in TARGETS.items():
        measured = [_to_floor(cells.get((model, task))) for model in GPU_MODELS]
        head = f"| `{task}` | {PASSES[task]} | {TARGET_TOKENS[task]} | {target:.2f} x {PASSES[task]} GEMM"
        lines.append(f"{head} | " + " | ".join(measured) + " |")
    files = sorted({cell["file"] for cell in cells.values()})
    source = ", ".join(f"`benchmarks/results/{name}`" for name in files)
    note = f"Measured: {source}; {DEFAULT_FIRST}." if files else ""
    return "\n".join([*lines, "", note]).rstrip()


def _default_and_best(result: Result, say: Callable[[str, Result], str]) -> str:
    """What a user gets who sets nothing, and beside it the best of ours, where that is another."""
    ours = ours_of(result)
    reasons = {**result["not_run"], **result["failed"]}
    if not ours:
        return "failed: " + "; ".join(result["failed"].values())
    best = min(ours, key=lambda name: ours[name]["median_ms"])
    said = [] if best == DEFAULT else [f"best {say(best, ours[best])}"]
    if DEFAULT in ours:
        said.insert(0, say(DEFAULT, ours[DEFAULT]))
    elif DEFAULT in reasons:
        said.insert(0, f"{DEFAULT} failed: {reasons[DEFAULT]}")
    return "; ".join(said)


def _to_floor(result: Result | None) -> str:
    if result is None:
        return NOT_RUN

    def say(name: str, cell: Result) -> str:
        peak = cell.get("peak_mib")
        memory = "" if peak is None else f", {peak / 1024:.2f} GiB"
        return f"{cell['ratio_to_gemm']:.3f} ({name}, {cell['median_ms']:.1f} ms{memory})"

    return _default_and_best(result, say)


def peer_targets_table(results: Sequence[Result]) -> str:
    """How many times faster than each peer, side by side in one run; a column for every GPU."""
    devices = newest(results, of_gpu=True) or {"measured": {}}
    cells = {
        device: {
            result["task"]: result for result in cases.values()
            if result["suite"] == "op" and "skipped" not in result and result["model"] == GPU_MODELS[0]
            and result["num_tokens"] == 16384 and not result["ignored_percent"]
        } for device, cases in devices.items()
    }  # fmt: skip
    lines = ["| peer | task | target | " + " | ".join(cells) + " |", "|---|---|---|" + "---|" * len(cells)]
    for peer, task, target in PEER_TARGETS:
        measured = " | ".join(_speedup(of_device.get(task), peer) for of_device in cells.values())
        lines.append(f"| `{peer}` | `{task}` | {target:.2f} x | {measured} |")
    return "\n".join(lines)


def _speedup(result: Result | None, peer: str) -> str:
    if result is None:
        return NOT_RUN
    if peer not in result["contenders"]:
        return {**result["not_run"], **result["failed"]}.get(peer, NOT_RUN)
    peers = result["contenders"][peer]

    def say(name: str, cell: Result) -> str:
        ratio = peers["median_ms"] / cell["median_ms"]
        noise = (peers["noise"] ** 2 + cell["noise"] ** 2) ** 0.5
        return f"{ratio:.2f} +- {ratio * noise:.2f} ({name})"

    return _default_and_best(result, say) if ours_of(result) else "ours failed"


def steps_table(results: Sequence[Result]) -> str:
    """Whole steps beside TRL's trainer, of GPUs first; *not run* where nothing was measured."""
    lines = [
        "| device | model | contender | s a step | median | against TRL | positions a pair | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    files = set()
    for of_gpu in (True, False):
        devices = newest(results, of_gpu=of_gpu).values()
        cases = [r for of_device in devices for r in of_device.values() if r["suite"] == "step"]
        cases = [case for case in cases if case.get("contenders")]
        if not cases:
            lines.append(f"| {'GPU' if of_gpu else 'CPU'} | {NOT_RUN} | | | | | | |")
        for case in cases:
            files.add(case["file"])
            seconds = {name: seconds_a_step(case, name) for name in case["contenders"]}
            # On a GPU TRL drops unlabelled tokens by itself.
            rival = seconds.get("trl-compacted", seconds.get("trl"))
            for name, cell in case["contenders"].items():
                # From the samples: steps are of unlike size.
                times = summarise_steps(cell["samples_ms"], case["steps"])
                ratio = NOT_RUN if rival is None else f"{rival / seconds[name]:.2f} x"
                peak = "" if cell.get("peak_mib") is None else f"{cell['peak_mib']:.0f}"
                lines.append(
                    f"| {case['environment']['device']} | {case['model']} | `{name}` | {seconds[name]:.2f} | "
                    f"{times['median_ms'] / 1e3:.2f} +- {100 * times['noise']:.0f} % | {ratio} | "
                    f"{cell['backbone_positions_per_pair']:.0f} | {peak} |"
                )
    source = ", ".join(f"`benchmarks/results/{name}`" for name in sorted(files))
    return "\n".join([*lines, "", f"Measured: {source}." if files else "Nothing has been recorded yet."])


def seconds_a_step(case: Result, contender: str) -> float:
    """The mean over the steps of each one's fastest round.

    Steps are of unlike size, and the same in every round: what else the machine did only adds to a time.
    """
    samples, steps = case["contenders"][contender]["samples_ms"], case["steps"]
    return sum(min(samples[i::steps]) for i in range(steps)) / steps / 1e3
