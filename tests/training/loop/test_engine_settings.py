"""An engine that would be ignored is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdpo.training.loop.engines import settle_engine
from fastdpo.training.settings.config import PreferenceConfig


@pytest.mark.parametrize("said", [{"engine": "fsdp2"}, {"fsdp": True}])
def test_fsdp_where_accelerate_would_not_run_it(
    said: dict[str, Any], make_args: Callable[..., PreferenceConfig]
):
    args = make_args(**said)
    of_cpus: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=object()),
        distributed_type="DistributedType.MULTI_CPU",
        num_processes=2,
        device=torch.device("cpu"),
    )
    with pytest.raises(ValueError, match="fsdp: got FSDP2, .* here are 2 on cpu: wanted torchrun"):
        settle_engine(args, of_cpus)
    settle_engine(make_args(), of_cpus)
