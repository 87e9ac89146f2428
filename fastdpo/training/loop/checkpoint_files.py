"""What lies in a checkpoint: which engine wrote it, whether all of it is there, tensors by their names."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

from fastdpo.training.written import describe, differences, own_digest, write_json

RUN_FILE = "preference_run.json"
_OWN = "digest"
_SETTING = "resume_from_checkpoint"
_WEIGHTS = ".safetensors"
_REMEDY = "remove this checkpoint, or name an earlier one"
_MODEL_FOLDER, _OPTIMIZER_FOLDER = "pytorch_model_fsdp_0", "optimizer_0"
_MODEL_FILE, _OPTIMIZER_FILE = "pytorch_model_fsdp.bin", "optimizer.bin"
# Files that a run does without, and says so.
_SPARED = (
    OPTIMIZER_NAME,
    "rng_state",
    "preference_state",
    "loss_state",
    "settings.yaml",
    "README",
    "training_",
)
_MOMENTS = ("exp_avg", "exp_avg_sq")
logger = logging.getLogger(__name__)


def layout_of(folder: Path) -> str:
    """Whose files a checkpoint has: ``ZeRO``, ``FSDP2`` (``sharded`` or not), or ``whole`` ones."""
    if any(folder.glob("global_step*")):
        return "ZeRO"
    if (folder / _MODEL_FOLDER).is_dir():
        return "FSDP2 sharded"
    return "FSDP2" if (folder / _MODEL_FILE).is_file() else "whole"


def write_run(folder: Path, told: Mapping[str, Any]) -> None:
    """Write into a checkpoint what it is of and which files it has: the last file of all."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = describe(folder, (path.relative_to(folder).as_posix() for path in files))
    described = json.loads(json.dumps({**told, "files": named}, default=str))
    write_json(folder / RUN_FILE, {**described, _OWN: own_digest(described)})


def read_run(folder: Path, setting: str = _SETTING) -> dict[str, Any] | None:
    """What a checkpoint says that it is of; None where it does not.

    Args:
        setting: that names the folder, for messages.

    Raises:
        ValueError: it is not what was written.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    told = _read_json(path, setting)
    own = told.pop(_OWN, None)
    is_early = not any(isinstance(of_file, list) for of_file in told.get("files", {}).values())
    if own != own_digest(told) and not (own is None and is_early):
        raise ValueError(f"{setting}: {path} is not what was written: it was changed; {_REMEDY}")
    return told


def read_state(folder: Path) -> dict[str, Any]:
    """What transformers says of a checkpoint. Raises ValueError where it cannot be read."""
    return _read_json(folder / TRAINER_STATE_NAME)


def _read_json(path: Path, setting: str = _SETTING) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise ValueError(f"{setting}: {path} cannot be read: it is cut off or was changed; {_REMEDY}")
    return found


def check_checkpoint(folder: Path) -> dict[str, Any] | None:
    """As ``read_run``, and hold the files to it as ``check_files`` does."""
    told = read_run(folder)
    if told is not None:
        check_files(folder, told.get("files", {}))
    return told


def check_files(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Hold a checkpoint's files to what was written: ``[bytes, digest]`` of each, of early versions bytes.

    Raises:
        ValueError: one is missing, of another size, or has other bytes; names it.
    """
    for name in wanted:
        if not (folder / name).is_file() and not name.startswith(_SPARED):
            raise ValueError(
                f"{_SETTING}: {folder} has no {name}, which was written with it; wanted the "
                "whole checkpoint, or an earlier one"
            )
    _check_same(folder, wanted, _SETTING)
    if not any(isinstance(told, list) for told in wanted.values()):
        logger.warning(
            "%s is of a version that kept no digests of files: whether their bytes are what was written is "
            "not known",
            folder,
        )


def check_weights(folder: Path, setting: str) -> None:
    """Hold the weights in a checkpoint that is loaded as a model to what was written; other folders pass.

    Args:
        setting: that names the folder, for messages.

    Raises:
        ValueError: a file of weights has other bytes; names it.
    """
    files = (read_run(folder, setting) or {}).get("files", {})
    _check_same(folder, {name: told for name, told in files.items() if name.endswith(_WEIGHTS)}, setting)


def _check_same(folder: Path, wanted: Mapping[str, Any], setting: str) -> None:
    for path, difference in differences(folder, wanted):
        raise ValueError(f"{setting}: {path} {difference}: it is cut off or was changed; {_REMEDY}")


class TensorSource(Protocol):
    """The tensors of a checkpoint."""

    def weight(self, name: str) -> Tensor | None:
        """A parameter or buffer by the name that the model has for it."""

    def states(self, name: str) -> dict[str, Tensor]:
        """What the optimiser keeps of a parameter; nothing where it keeps none."""


@contextmanager
def tensors_of(folder: Path, groups: list[list[str]]) -> Iterator[TensorSource]:
    """Read a checkpoint of any engine, tensor by tensor.

    Args:
        groups: names of the trained parameters in the order of the optimiser's groups.

    Raises:
        ValueError: a checkpoint of DeepSpeed's without DeepSpeed.
    """
    layout = layout_of(folder)
    if layout == "ZeRO":
        with TemporaryDirectory(dir=folder.parent, prefix=".converted-") as converted:
            yield _Universal(folder, Path(converted))
    else:
        yield _Sharded(folder) if layout == "FSDP2 sharded" else _Files(folder, groups)


class _Files:
    """Whole tensors: of one process, of DDP, and FSDP2's full state dicts."""

    def __init__(self, folder: Path, groups: list[list[str]]) -> None:
        self._weights = _weights_of(folder)
        self._states: dict[str, dict[str, Tensor]] = {}
        if (folder / _OPTIMIZER_FILE).is_file():
            self._states = _load(folder / _OPTIMIZER_FILE)["state"]
        elif (folder / OPTIMIZER_NAME).is_file():
            found = _load(folder / OPTIMIZER_NAME)
            sizes = [len(group["params"]) for group in found["param_groups"]]
            if sizes == [len(group) for group in groups]:  # of another optimiser nothing is known
                names = [name for group in groups for name in group]
                self._states = {names[index]: state for index, state in found["state"].items()}

    def weight(self, name: str) -> Tensor | None:
        return _named(self._weights, name)

    def states(self, name: str) -> dict[str, Tensor]:
        return self._states.get(name, {})


def _weights_of(folder: Path) -> dict[str, Any]:
    """Whole weights by name: tensors, or opened files that have them."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        opened = safe_open(path, framework="pt")
        found |= dict.fromkeys(opened.keys(), opened)
    for path in [] if found else sorted(folder.glob("*model*.bin")):
        found |= _load(path)
    return found


def _named(weights: Mapping[str, Any], name: str) -> Tensor | None:
    # PEFT keeps an adapter's tensors without the adapter's name.
    for known in (name, name.replace(".modules_to_save.default", ""), name.replace(".default", "")):
        if known in weights:
            found = weights[known]
            tensor: Tensor = found if isinstance(found, Tensor) else found.get_tensor(known)
            return tensor
    return None


class _Sharded:
    """FSDP2's sharded state dicts, which torch puts together."""

    def __init__(self, folder: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader

        self._adapter = _weights_of(folder)
        places = {"model": folder / _MODEL_FOLDER, "optimizer": folder / _OPTIMIZER_FOLDER}
        self._readers = {part: FileSystemReader(place) for part, place in places.items() if place.is_dir()}
        self._known = {
            part: reader.read_metadata().state_dict_metadata for part, reader in self._readers.items()
        }

    def _tensor(self, part: str, key: str) -> Tensor | None:
        import torch.distributed.checkpoint as dcp

        found: Any = self._known.get(part, {}).get(key)
        if not hasattr(found, "size"):
            return None
        tensor = torch.empty(found.size, dtype=found.properties.dtype)
        dcp.load({key: tensor}, storage_reader=self._readers[part], no_dist=True)
        return tensor

    def weight(self, name: str) -> Tensor | None:
        found = _named(self._adapter, name)
        return self._tensor("model", f"model.{name}") if found is None else found

    def states(self, name: str) -> dict[str, Tensor]:
        start = f"optimizer.state.{name}."
        names = [key for key in self._known.get("optimizer", {}) if key.startswith(start)]
        found = {key.removeprefix(start): self._tensor("optimizer", key) for key in names}
        return {key: value for key, value in found.items() if value is not None}


class _Universal:
    """DeepSpeed's, converted to its universal checkpoint: fp32 weights and moments by name."""

    def __init__(self, folder: Path, converted: Path) -> None:
        try:
            from deepspeed.checkpoint import ds_to_universal
        except ImportError:
            raise ValueError(
                f"{_SETTING}: {folder} is DeepSpeed's, which has to be there to read it: "
                "pip install deepspeed"
            ) from None
        tag = (folder / "latest").read_text().strip()
        options = SimpleNamespace(
            input_folder=str(folder / tag),
            output_folder=str(converted),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        # It prints what it does, and shows bars.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(options)
        self._folder = converted / "zero"
        self._step = _step_of(folder / tag)
        files = sorted((folder / tag).glob("*model_states.pt"))
        kept = torch.load(files[0], map_location="cpu", weights_only=False)
        self._others: dict[str, Tensor] = kept["module"]
        # ZeRO-3's tensors come back flat.
        self._shapes = {name: shape for group in kept["param_shapes"] for name, shape in group.items()}

    def _tensor(self, name: str, key: str) -> Tensor | None:
        path = self._folder / name / f"{key}.pt"
        if not path.is_file():
            return None
        found = torch.load(path, map_location="cpu", weights_only=False)
        tensor: Tensor = (found["param"] if isinstance(found, dict) else found).detach()
        return tensor.view(self._shapes[name]) if name in self._shapes else tensor

    def weight(self, name: str) -> Tensor | None:
        found = self._tensor(name, "fp32")
        if found is not None:
            return found
        other = self._others.get(name)
        return other if other is not None and other.numel() else None

    def states(self, name: str) -> dict[str, Tensor]:
        found = {key: value for key in _MOMENTS if (value := self._tensor(name, key)) is not None}
        return {"step": torch.tensor(self._step), **found} if found else {}


def _step_of(folder: Path) -> float:
    """How many steps Adam has made, which corrects its moments; by the first group: all make the same."""
    path = min(folder.glob("*optim_states.pt"))
    found = torch.load(path, map_location="cpu", weights_only=False)["optimizer_state_dict"]
    inner = found.get("base_optimizer_state", found.get("optimizer_state_dict"))
    return float(inner["state"][0]["step"])


def _load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return found
