"""What is named is looked for once, before anything is loaded."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from fastdpo.training.loop.models import load_model, load_tokenizer
from fastdpo.training.settings.config import PreferenceConfig
from fastdpo.training.settings.hub import check_push, check_there
from fastdpo.training.settings.run import AdapterArguments, DataArguments, ModelArguments, RunArguments


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A hub that answers as it is told, and an empty cache; counts what it was asked."""

    class Hub:
        answer: Exception | None = None
        asked = 0

        def repo_info(self, *args: Any, **kwargs: Any) -> None:
            self.asked += 1
            if self.answer is not None:
                raise self.answer

        whoami = repo_info

    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    return made


class ConnectError(Exception):
    """No route, of whatever library the hub is asked with."""


class ConnectTimeout(Exception):
    """A slow network, or none."""


_RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize("name", ["./x", "/no/such/folder", "~/nothing-there", "a/b/c", "folder/"])
def test_a_path_that_is_not_there_is_said_at_once(hub: Any, name: str):
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=f"got '{name}', and there is no such folder"):
            load(name)
    assert hub.asked == 0


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (ConnectError("no route"), "none in the hub's cache, and the hub cannot be reached: no route"),
        (RepositoryNotFoundError("404", response=_RESPONSE), "the hub has no model of that name, or it is"),
    ],
)
def test_an_id_that_is_not_there_costs_one_question(hub: Any, answer: Exception, text: str):
    hub.answer = answer
    with pytest.raises(ValueError, match=f"model: got 'my-model', and there is no such folder, .*{text}"):
        load_model("my-model")
    assert hub.asked == 1


def test_ids_that_may_be_there_go_on(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for answer in (None, HfHubHTTPError("busy", response=_RESPONSE), ConnectTimeout("slow")):
        hub.answer = answer
        check_there("model", "org/model")
    asked = hub.asked
    (tmp_path / "cache" / "models--org--kept" / "snapshots" / "1").mkdir(parents=True)
    check_there("model", "org/kept")
    check_there("model", str(tmp_path))
    assert hub.asked == asked
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    check_there("model", "org/kept")
    with pytest.raises(ValueError, match="none in the hub's cache, and HF_HUB_OFFLINE is set"):
        check_there("model", "org/model")
    with pytest.raises(ValueError, match="nor can it be an id of the hub"):
        check_there("model", "my model")


def test_the_hub_is_not_asked_for_files_of_data(hub: Any, tmp_path: Path):
    """Whether those are there is for what reads them to say."""
    hub.answer = RepositoryNotFoundError("404", response=_RESPONSE)

    def check(dataset: str) -> None:
        model, config = ModelArguments(model=str(tmp_path)), PreferenceConfig(use_cpu=True)
        RunArguments(model, DataArguments(dataset=dataset), AdapterArguments(), config).check_there()

    for name in ("pairs.jsonl", "./pairs", "data/pairs.parquet"):
        check(name)
    assert hub.asked == 0
    with pytest.raises(ValueError, match="dataset: got 'org/pairs', and there is no such folder"):
        check("org/pairs")


def test_pushing_wants_a_hub_and_a_token(hub: Any):
    args = PreferenceConfig(use_cpu=True, push_to_hub=True)
    check_push(args)
    hub.answer = ConnectError("no route")
    with pytest.raises(ValueError, match="push_to_hub: got True, wanted a hub that can be reached"):
        check_push(args)
    check_push(PreferenceConfig(use_cpu=True))


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any):
    monkeypatch.setenv("HOME", str(tmp_path))
    tokenizer.save_pretrained(tmp_path / "model")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    assert len(load_tokenizer("~/model")) == len(tokenizer)
