"""The files for ``accelerate launch`` are such as accelerate reads, and name what the loop takes."""

from __future__ import annotations

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests import ROOT


@pytest.mark.parametrize(
    ("name", "kind", "settings", "said"),
    [
        ("fsdp2", "FSDP", "fsdp_config", {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}),
        (
            "hsdp",
            "FSDP",
            "parallelism_config",
            {"parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 8},
        ),
        (
            "tp_fsdp2",
            "FSDP",
            "parallelism_config",
            {"parallelism_config_tp_size": 4, "parallelism_config_dp_shard_size": 2},
        ),
        ("sequence", "FSDP", "parallelism_config", {"parallelism_config_sp_size": 4}),
        ("zero3", "DEEPSPEED", "deepspeed_config", {"zero_stage": 3}),
    ],
)
def test_accelerate_reads_it(name: str, kind: str, settings: str, said: dict[str, object]):
    read = load_config_from_file(str(ROOT / "recipes" / f"{name}.yaml"))
    assert read.distributed_type == kind and read.mixed_precision == "bf16"
    assert said.items() <= getattr(read, settings).items()
