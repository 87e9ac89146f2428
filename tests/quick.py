"""``pytest --quick``: a meaningful answer in a small part of the time (`make quick`).

What is slow by nature is left out, and so are what starts a process of its own and the longest others
(`LONG`); of every other test function one case is run: its first. Tests that plant bugs are run whole, and so
are those of the rooms that a change touches, where they are few: what differs from the last commit, or in a
clean checkout the last commit itself.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import FunctionType

import pytest

from tests import ROOT

SLOW = ("slow", "distributed", "network", "gpu")
WHOLE = ("test_tolerances_have_teeth.py", "test_layers.py")
# One to seven seconds each, together a third of the time; their rooms have shorter tests.
LONG = frozenset(
    """
    benchmarks/test_context.py::test_all_contenders_take_the_same_step
    benchmarks/test_context.py::test_the_page_shows_time_and_memory_against_length
    benchmarks/test_pytest.py::test_a_wrong_kernel_has_no_peak_memory
    benchmarks/test_repeat.py::test_what_cannot_be_run_is_not_compared
    doctor/test_context.py::test_a_model_that_carries_more_says_so
    faults/test_changed.py::test_files_of_a_round_that_were_changed
    functional/test_pairs.py::test_torch_compile_sees_one_graph
    functional/test_pairs_mode.py::test_torch_compile_sees_one_graph
    integrations/test_lazy_outputs.py::test_compiled_losses_are_those_of_plain_ones
    integrations/test_lazy_surroundings.py::test_compiled_models
    integrations/test_tables.py::test_the_committed_tables_are_the_generators
    kernels/test_cuda_emulation.py::test_plan_covers_the_row_and_fits
    kernels/test_triton_compiles.py::test_two_of_them_in_seconds
    ops/test_explain_plan.py::test_a_row_that_does_not_fit_is_lean_in_both
    ops/test_lean_plan.py::test_memory_of_the_pass_that_stores_no_logits
    rounds/test_rounds.py::test_a_killed_run_ends_as_one_that_was_not
    rounds/test_rounds.py::test_an_adapter_goes_on
    rounds/test_rounds.py::test_each_round_goes_on_from_the_last
    test_cli.py::test_every_option_of_every_loss_of_the_loop_is_a_flag
    test_examples.py::test_a_notebook_runs_cell_by_cell
    test_packaging.py::test_a_second_build_compiles_only_what_changed
    test_packaging.py::test_nvcc_is_looked_for_in_the_usual_places
    training/batches/test_layouts.py::test_the_curve_of_fifty_steps_is_the_same
    training/batches/test_rows.py::test_tokens_of_the_backbone_on_real_pairs
    training/data/test_stream_rows.py::test_rows_are_forgotten
    training/loop/test_context.py::test_a_run_goes_on_where_it_stopped
    training/loop/test_divergence_loop.py::test_the_loss_falls_on_real_rows
    training/loop/test_images_loop.py::test_curves_are_trls
    training/loop/test_images_loop.py::test_evaluation_workers_and_streams
    training/loop/test_kinds.py::test_the_loss_falls_on_real_rows
    training/loop/test_kinds.py::test_three_steps_as_trl_trains
    training/loop/test_over_optimisation.py::test_the_setting_adds_it_and_the_curves_have_its_panels
    training/loop/test_quantised.py::test_twenty_steps_are_trls
    training/loop/test_resume.py::test_the_curve_is_that_of_the_uninterrupted_run
    training/loop/test_router.py::test_twenty_steps_are_trls
    training/loop/test_trainer.py::test_the_loss_curve_is_that_of_the_unpatched_model
    """.split()
)
# Rooms of more tests than this are not run whole.
_AT_MOST = 200


def changed_files() -> list[str]:
    """Paths that differ from the last commit, or that it changed; none where there is no git."""
    for arguments in (["diff", "--name-only", "HEAD"], ["diff", "--name-only", "HEAD~1", "HEAD"]):
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stdout.split():
            return done.stdout.split()
    return []


def rooms_of(files: list[str]) -> set[str]:
    """The folders of tests that belong to files: ``fastdpo/losses/x.py`` to ``tests/losses``."""
    folders = set()
    for name in files:
        top, *rest = Path(name).parts
        if top in ("fastdpo", "tests", "benchmarks") and rest:
            inside = rest[:-1] if top != "benchmarks" else ["benchmarks"]
            folders.add("/".join(["tests", *inside]) if inside else name)
    return folders


def chosen(items: list[pytest.Item], rooms: set[str]) -> list[pytest.Item]:
    """The items that a quick run runs."""
    paths = {item: item.path.relative_to(ROOT).as_posix() for item in items}
    in_room = {item: _room(path) in rooms or path in rooms for item, path in paths.items()}
    whole = sum(in_room.values()) <= _AT_MOST
    seen: set[tuple[str, str]] = set()
    kept = []
    for item in items:
        if any(item.get_closest_marker(name) for name in SLOW):
            continue
        function = (paths[item], getattr(item, "originalname", item.name))
        is_first = function not in seen
        seen.add(function)
        if item.path.name in WHOLE or (whole and in_room[item]):
            kept.append(item)
        elif is_first and not _is_long(function) and not _starts_processes(item.function):  # type: ignore[attr-defined]
            kept.append(item)
    return kept


def _is_long(function: tuple[str, str]) -> bool:
    path, name = function
    return f"{path.removeprefix('tests/')}::{name}" in LONG


def _starts_processes(function: FunctionType) -> bool:
    """By itself or by a helper: seconds for a new interpreter and its imports alone."""
    helpers = (function.__globals__.get(name) for name in function.__code__.co_names)
    own = [function, *(helper for helper in helpers if isinstance(helper, FunctionType))]
    return any(name in one.__code__.co_names for one in own for name in ("subprocess", "multiprocessing"))


def _room(path: str) -> str:
    return path.rpartition("/")[0]
