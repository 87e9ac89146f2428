"""What of fastdpo has to be told that a dry run's tensors are a GPU's."""

from __future__ import annotations

from typing import Any

from benchmarks.dry.device import Pretence
from benchmarks.dry.tensor import Hollow


def prepare(pretence: Pretence) -> None:
    """Until the pretence ends: compiled CUDA kernels are launched into nothing, where they are built."""
    from fastdpo.kernels import native
    from fastdpo.ops import scaling

    # Which takes other classes for a compiler's.
    pretence.replace(scaling, "Tensor", Hollow)
    major, minor = pretence.card.capability
    answers = {"cuda_probe": (0, "", 10 * major + minor), "cuda_driver_version": 13000}

    def stand_in(name: str) -> Any:
        return lambda *args: answers[name] if name in answers else pretence.mode.launch(name)

    if native._C is not None and native._C.built_with_cuda:
        kernels = [n for n in dir(native._C) if n.startswith("cuda_") and callable(getattr(native._C, n))]
        for name in {*kernels, *answers}:
            pretence.replace(native._C, name, stand_in(name))


def take_for_granted(pretence: Pretence) -> None:
    """What the hook and the loop decide by values, of a model that a CPU's tests show to be right."""
    from fastdpo.integrations.probe import Probe
    from fastdpo.training.batches.probe import _Probe as RowProbe

    why_not = RowProbe.why_not

    def why_it_fails(probe: Any, *arguments: Any) -> str | None:
        reason = why_not(probe, *arguments)
        return reason if reason is not None and "its forward fails" in reason else None

    pretence.replace(RowProbe, "why_not", why_it_fails)
    pretence.replace(Probe, "check_labels", lambda probe: None)
