"""What docs/models.md lists can be loaded by a path: the command line's loader and `fastdpo doctor`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastdpo.doctor.diagnosis import doctor
from fastdpo.integrations.auto_class import auto_class
from fastdpo.training.loop.models import load_model
from tests.integrations.tiny import FAMILIES, make_config, make_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_auto_class_makes_the_class_of_the_page(family: str) -> None:
    config = make_config(family)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    assert type(model).__name__ == FAMILIES[family].model


@pytest.mark.parametrize("family", ["llava", "mistral3"])
def test_a_model_of_images_and_text_by_its_path(family: str, tmp_path: Path) -> None:
    saved = make_model(family)
    saved.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded).__name__ == FAMILIES[family].model
    for name, weight in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    lines = dict(doctor(str(tmp_path)).sections[f"Model {tmp_path}"])
    assert lines["class"] == FAMILIES[family].model and "vocabulary 199" in lines["head"]
