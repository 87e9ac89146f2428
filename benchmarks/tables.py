"""README's tables and ``docs/benchmarks.md``, generated from ``benchmarks/results`` and the losses' registry.

python -m benchmarks.tables          # rewrites README.md between its markers, docs/benchmarks.md and plots
python -m benchmarks.tables --check  # fails when they are not what the results give

Results of two devices never share a table; what no GPU has measured says *not run*.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import even_steps, summarise
from benchmarks.plots import PLOTS, axes_of, check_plots, write_plots
from benchmarks.problem import PASSES, TASKS
from benchmarks.results import RESULTS, ROOT, is_gpu, label, read_results, slug
from fastdpo.losses import losses_table

# DESIGN section 6, fp32 logits: the time allowed, as a ratio to the task's products in plain cuBLAS.
TARGETS = {"score": 1.18, "stash": 1.16, "cache": 1.15, "pairs": 1.15}
TARGET_TOKENS = {"score": 16384, "stash": 16384, "cache": 4096, "pairs": 16384}
GPU_MODELS = ("llama-3-8b", "qwen2.5-7b", "gemma-2-9b")
# DESIGN section 6: how many times faster than a peer, on the same tokens of the first model at N = 16384.
PEER_TARGETS = (
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


def newest(results: Sequence[Result], *, of_gpu: bool) -> dict[str, dict[str, Result]]:
    """Device -> case -> its newest result, with its file; of GPUs or of CPUs.

    What was measured stands until it is measured anew: a case skipped later does not take its place.
    """
    found: dict[str, dict[str, Result]] = {}
    for payload in results:
        if is_gpu(payload) == of_gpu:
            cases = found.setdefault(label(payload["environment"]), {})
            for result in payload["results"]:
                where = {"file": payload["file"], "environment": payload["environment"]}
                if "skipped" not in result or "skipped" in cases.get(result["key"], result):
                    cases[result["key"]] = {**result, **where}
    return dict(sorted(found.items()))


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
                times = summarise(even_steps(cell["samples_ms"], case["steps"]))
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


def document(results: Sequence[Result]) -> str:
    """``docs/benchmarks.md``."""
    parts = [
        "# Benchmarks",
        "Generated by `make tables` from `benchmarks/results/*.json`; the files hold every raw sample, "
        "versions, commit, clocks and power state. `fastdpo bench` in a checkout makes such files; "
        "[benchmarks/NOTES.md](../benchmarks/NOTES.md) says how, and what was learnt.",
        "Every contender is checked against fp64 before it is timed, and takes turns with the others in one "
        "loop, in which plain matrix products of the task are the floor. Equal for all: tokens, labels, "
        "dtypes, and the task, forward and backward. What is not equal is which rows are projected: those "
        "with a label (*labelled*), or all.",
        "| task | what it gives |\n|---|---|\n"
        + "\n".join(f"| `{task}` | {what} |" for task, what in TASKS.items()),
    ]
    for of_gpu in (True, False):
        devices = newest(results, of_gpu=of_gpu)
        parts.append("## On a GPU" if of_gpu else "## On a CPU")
        if not devices:
            makes = "`make gpu`" if of_gpu else "`fastdpo bench op memory accuracy --device cpu`"
            parts.append(f"{NOT_RUN}: {makes} makes these tables.")
        elif not of_gpu:
            parts.append("These are numbers of a CPU. They say nothing about a GPU.")
        for device, cases in devices.items():
            parts += _chapter(device, cases)
    return "\n\n".join(parts) + "\n"


def _chapter(device: str, cases: dict[str, Result]) -> list[str]:
    """All of one device."""
    parts = [f"### {device}"]
    files = {case["file"]: case["environment"] for case in cases.values()}
    parts.append("\n".join(_source(file, environment) for file, environment in sorted(files.items())))
    missing: list[str] = []
    for suite, title, cell in SECTIONS:
        groups: dict[str, list[Result]] = {}
        for case in cases.values():
            if case["suite"] == suite:
                for view in _views(case):
                    groups.setdefault(_group(view), []).append(view)
        if not groups:
            missing.append(f"`{suite}`")
            continue
        parts.append(f"#### {title}")
        for name, group in groups.items():
            parts.append(_grid(name, group, cell))
    parts += [f"{NOT_RUN} on this device: {', '.join(missing)}."] if missing else []
    return parts + _plot_links(device, cases, "plots")


def _plot_links(device: str, cases: dict[str, Result], folder: str) -> list[str]:
    return [
        f"![{plot.title}, {device}]({folder}/{slug(device)}-{plot.name}.svg)"
        for plot in PLOTS
        if plot.data(list(cases.values()))
    ]


def plots_of(results: Sequence[Result]) -> str:
    """Every plot there is, of GPUs first."""
    devices = {**newest(results, of_gpu=True), **newest(results, of_gpu=False)}
    return "\n\n".join(
        link for device, cases in devices.items() for link in _plot_links(device, cases, "docs/plots")
    )


def _views(case: Result) -> list[Result]:
    """A point of memory once for every curve it lies on."""
    axes = axes_of(case) if case["suite"] == "memory" else ()
    return [{**case, "axis": axis} for axis in axes] or [case]


def _source(file: str, environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in environment["packages"].items() if number)
    is_dirty = environment["has_uncommitted_changes"]
    dirty = (
        " with uncommitted changes" if is_dirty else ", not known whether changed" if is_dirty is None else ""
    )
    commit = (environment["commit"] or "unknown")[:12]
    return f"* `benchmarks/results/{file}`: {environment['device']}; {versions}; commit {commit}{dirty}"


def _group(case: Result) -> str:
    """What stands in one table."""
    if case["suite"] in ("op", "accuracy") and "model" in case:
        ignored = f", {case['ignored_percent']} % of the labels ignored" if case["ignored_percent"] else ""
        head = f"{case['model']} (H = {case['hidden_size']}, V = {case['vocab_size']})"
        return f"{head}, N = {case['num_tokens']}, {case['dtype']}{ignored}"
    if case["suite"] == "memory" and "axis" in case:
        return f"{case['model']}, `{case['task']}`, {case['dtype']}, against {case['axis']}"
    return {"row": "row kernels, D written in bf16"}.get(case["suite"], case["suite"])


def _column(case: Result) -> str:
    if case["suite"] == "memory" and "axis" in case:
        shape = {"N": "num_tokens", "V": "vocab_size", "T": "length"}
        return f"{case['axis']} = {case[shape[case['axis']]]}"
    return f"`{case['task']}`" if "task" in case else case["key"].partition("/")[2]


def _time(cell: Result) -> str:
    if "median_ms" not in cell:
        return "not timed"
    text = f"{cell['median_ms']:.3g} ms +- {100 * cell['noise']:.0f} %"
    if "ratio_to_gemm" in cell:
        text += f", {cell['ratio_to_gemm']:.2f} x"
    if "gb_per_s" in cell:
        text += f", {cell['gb_per_s']:.0f} GB/s"
    if "useful_tokens_per_s" in cell:
        text += f", {cell['useful_tokens_per_s']:.0f} tokens/s"
    return text + _peak(cell, ", ")


def _peak(cell: Result, before: str = "") -> str:
    return "" if cell.get("peak_mib") is None else f"{before}{cell['peak_mib']:.0f} MiB"


def _error(cell: Result) -> str:
    names = ("logps_error_nats", "dhidden_relative_error", "dweight_relative_error")
    return " / ".join(f"{cell[name]:.1e}" for name in names if name in cell)


SECTIONS: tuple[tuple[str, str, Callable[[Result], str]], ...] = (
    ("op", "Time, and its ratio to the products alone", _time),
    ("row", "Row kernels, beside a copy", _time),
    ("step", "Whole DPO steps", _time),
    ("memory", "Peak memory above inputs, gradients included", _peak),
    ("accuracy", "Errors against fp64: values in nats / dhidden / dweight, relative", _error),
)


def _grid(title: str, cases: Sequence[Result], cell_of: Callable[[Result], str]) -> str:
    """Contenders down, cases across; why one is not there stands below, once."""
    names = list(dict.fromkeys(name for case in cases for name in case["contenders"]))
    notes: dict[str, list[str]] = {}
    for case in cases:
        for name, reason in {
            **case["not_run"],
            **{n: f"FAILED: {r}" for n, r in case["failed"].items()},
        }.items():
            notes.setdefault(f"`{name}`: {reason}", []).append(_column(case))
        if "skipped" in case:
            notes.setdefault(f"skipped: {case['skipped']}", []).append(_column(case))
    lines = [
        f"**{title}**", "",
        "| | " + " | ".join(_column(case) for case in cases) + " |", "|---|" + "---|" * len(cases),
    ]  # fmt: skip
    for name in names:
        cells = [case["contenders"].get(name) for case in cases]
        rows = next((f" ({cell['rows']})" for cell in cells if cell and "rows" in cell), "")
        lines.append(f"| `{name}`{rows} | " + " | ".join(cell_of(c) if c else "" for c in cells) + " |")
    every = len(cases)
    said = [f"* {note}" + ("" if len(at) == every else f" ({', '.join(at)})") for note, at in notes.items()]
    return "\n".join(lines) + ("\n\n" + "\n".join(said) if said else "")


def render(readme: str, results: Sequence[Result]) -> str:
    """The README with its tables replaced.

    Raises:
        ValueError: a pair of markers is not there, once each and in order.
    """
    readme = _replace(readme, "losses", losses_table())
    readme = _replace(readme, "results", head_table(results))
    readme = _replace(readme, "peers", peer_targets_table(results))
    readme = _replace(readme, "steps", steps_table(results))
    return _replace(readme, "plots", plots_of(results))


def _replace(readme: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise ValueError(f"README.md: wanted {begin} and {end} once each, in this order")
    before, rest = readme.split(begin)
    return f"{before}{begin}\n{table.rstrip()}\n{end}{rest.split(end)[1]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables and plots of benchmarks/results.")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of benchmarks.md and plots/")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        results = read_results(args.results)
        old = args.readme.read_text()
        new, page = render(old, results), document(results)
        path, plots = args.docs / "benchmarks.md", args.docs / "plots"
        devices = {**newest(results, of_gpu=True), **newest(results, of_gpu=False)}
        cases = {device: list(found.values()) for device, found in devices.items()}
        if not args.check:
            args.readme.write_text(new)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page)
            write_plots(cases, plots)
            return 0
        stale = [args.readme.name] if new != old else []
        if not path.is_file() or path.read_text() != page:
            stale.append(path.name)
        stale += check_plots(cases, plots)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if stale:
        print(f"{', '.join(stale)}: not what benchmarks/results gives; run `make tables`", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
