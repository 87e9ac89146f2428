"""Whether a model or a data set that is named is there: found out in a moment, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from fastdpo.training.settings.fields import SettingFields


def looks_like_path(name: str) -> bool:
    """Whether a name can be no id of the hub: those have one slash, and begin with a letter."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")


def check_there(what: str, name: str, *, kind: str = "model") -> None:
    """Make sure that there is such a folder, or such an id in the hub's cache or on the hub.

    The hub is asked once: its own retries take a minute where there is no network.

    Args:
        what: the setting, for messages.
        kind: ``model`` or ``dataset``.

    Raises:
        ValueError: there is none, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import validate_repo_id

    if Path(name).expanduser().exists():
        return
    got = f"{what}: got {name!r}, and there is no such folder"
    if looks_like_path(name):
        raise ValueError(got)
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"{got}, nor can it be an id of the hub") from None
    kept = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "snapshots"
    if kept.is_dir() and any(kept.iterdir()) or kind == "dataset" and _is_prepared(name):
        return
    if constants.is_offline_mode():
        raise ValueError(f"{got}, none in the hub's cache, and HF_HUB_OFFLINE is set")
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=10)
    except RepositoryNotFoundError:
        raise ValueError(
            f"{got}, and the hub has no {kind} of that name, or it is private (`hf auth login`)"
        ) from None
    except HfHubHTTPError:
        return  # gated, or busy: loading has the hub's own words, and tries again
    except Exception as error:
        if "Timeout" in type(error).__name__:
            return  # a slow network is not none
        raise ValueError(
            f"{got}, none in the hub's cache, and the hub cannot be reached: {_short(error)}"
        ) from None


def is_adapter(name: str) -> bool:
    """Whether a path or hub id is of a peft adapter."""
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name) is not None
    except (OSError, ValueError):
        return False


def has_splits(source: str) -> bool:
    """Whether a path or id may have several splits: no file has, nor has one split that was saved.

    Args:
        source: as ``read_rows``.
    """
    path = Path(source).expanduser()
    return not path.is_file() and not (path / "state.json").is_file()


def _is_prepared(name: str) -> bool:
    """Whether the library `datasets` has a data set of the hub in its own cache."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___")).is_dir()


def check_push(args: SettingFields) -> None:
    """Raise ValueError where ``push_to_hub`` is asked for and the hub does not know who asks."""
    if not args.push_to_hub:
        return
    from huggingface_hub import HfApi

    try:
        HfApi().whoami(token=args.hub_token)
    except Exception as error:
        raise ValueError(
            f"push_to_hub: got True, wanted a hub that can be reached, and a token: {_short(error)}"
        ) from None


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
