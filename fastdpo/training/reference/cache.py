"""Reference log-probabilities on disk, so that a second run does not compute them again.

One ``.npz`` file per (model, data, way of computing), under a name that is the hash of all three:
whatever changes, the name changes, and nothing stale is ever read. Files are written under another
name and moved into place, so that an interrupted run leaves none that is half written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdpo.integrations.forest.attention import own_attention
from fastdpo.integrations.partitioned import gathered
from fastdpo.training.reference.shards import ScoreShards
from fastdpo.training.written import placed

FORMAT_VERSION = 1
logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """``fastdpo/reference`` in the user's cache directory."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastdpo" / "reference"


def fingerprint_model(model: nn.Module, *, without_adapter: bool = False) -> str:
    """Hash of every weight, buffer and setting that can move a log-probability.

    Args:
        without_adapter: of the model inside a peft model, as it is with its adapter switched off: the
            same hash as before the adapter was added.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(_canonical_json(_model_settings(model, with_adapters=not without_adapter)))
    tensors = model.state_dict(keep_vars=True)
    if without_adapter:
        tensors = {
            _base_name(name): value for name, value in tensors.items() if not _ADAPTER_PART.search(name)
        }
    for name, tensor in sorted(tensors.items()):
        with gathered([tensor]):
            value = tensor.detach()
            if hasattr(value, "full_tensor"):  # split by transformers: the same hash as of the whole
                value = value.full_tensor()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


_ADAPTER_PART = re.compile(r"\.(lora_\w+|modules_to_save)\.")


def _base_name(name: str) -> str:
    """The name a parameter had before peft wrapped the model."""
    return re.sub(r"^base_model\.model\.|(?<=\.)(base_layer|original_module)\.", "", name)


def _model_settings(model: nn.Module, *, with_adapters: bool) -> dict[str, Any]:
    """What beside the weights decides on the output."""
    settings: dict[str, Any] = {}
    config = getattr(model, "config", None)
    if config is not None:
        # Where the weights were loaded from says nothing about what they are.
        passed_over = ("_name_or_path", "use_cache", "distributed_config")
        settings["config"] = {k: v for k, v in config.to_dict().items() if k not in passed_over}
        settings["attention"] = own_attention(config)
    adapters = getattr(model, "peft_config", None)
    if adapters and with_adapters:
        settings["adapters"] = {name: adapter.to_dict() for name, adapter in adapters.items()}
    return settings


def _canonical_json(value: Any) -> bytes:
    def plain(item: Any) -> Any:
        # A set's order differs from one process to the next.
        return sorted(item) if isinstance(item, set) else str(item)

    return json.dumps(value, sort_keys=True, default=plain).encode()


def cache_key(parts: Mapping[str, Any]) -> str:
    """One name for everything the scores depend on."""
    return hashlib.blake2b(_canonical_json({"format": FORMAT_VERSION, **parts}), digest_size=16).hexdigest()


class ReferenceCache:
    """The files of one directory.

    Args:
        directory: made when the first file is written; None for ``default_cache_dir()``.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.directory = Path(directory).expanduser() if directory is not None else default_cache_dir()

    def path(self, key: str) -> Path:
        """Where the scores of ``key`` are kept."""
        return self.directory / f"{key}.npz"

    def shards(self, key: str, num_rows: int) -> ScoreShards:
        """What is scored of ``key`` before all of it is."""
        return ScoreShards(self.directory / f"{key}.partial", key, num_rows)

    def load(self, key: str, shape: tuple[int, ...]) -> Tensor | None:
        """fp32 of that shape (``(P, 2)`` for pairs), or None where there is no readable file for ``key``."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            with np.load(path) as content:
                stored_key, scores = str(content["key"]), content["logps"]
        except Exception as error:  # a flipped bit may ask for a cipher, or for much memory
            logger.warning("reference cache: %s cannot be read (%s); computing it again", path, error)
            return None
        if stored_key != key or scores.shape != shape or scores.dtype != np.float32:
            logger.warning("reference cache: %s is not what its name says; computing it again", path)
            return None
        return torch.from_numpy(scores)

    def save(self, key: str, scores: Tensor) -> Path:
        """Write scores in one step; returns the path."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with placed(self.path(key), is_shared=True) as file:
            np.savez(file, key=np.array(key), logps=scores.numpy().astype(np.float32))
        return self.path(key)
