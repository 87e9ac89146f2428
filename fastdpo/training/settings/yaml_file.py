"""Settings in a YAML file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastdpo.training.settings.words import ArgumentError

# `<<: *other`: the names and values of another mapping, which those written beside it go before.
_MERGE = "tag:yaml.org,2002:merge"


def read_settings(path: Path) -> dict[str, Any]:
    """The names and values of a YAML file.

    Numbers and yes or no are read as YAML 1.2 has them: ``1e-6`` is a number, ``no`` a word, which a setting
    that is true or false takes for false.

    Raises:
        ArgumentError: it cannot be read, is not YAML, holds no names and values, or a name twice.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except OSError as error:
        raise ArgumentError(f"--config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--config: {path} is not valid YAML: {' '.join(str(error).split())}") from None
    settings = {} if settings is None else settings
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ArgumentError(f"--config: {path} holds a {type(settings).__name__}, wanted names and values")
    return settings


def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's, with the numbers and booleans of YAML 1.2, and no name twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key) for key, _ in node.value if key.tag != _MERGE]
            for place, name in enumerate(names):
                if name in names[:place]:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{name} is there twice", node.start_mark
                    )
            found: dict[Any, Any] = super().construct_mapping(node, deep)
            return found

    tags = {
        "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
        "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
        "tag:yaml.org,2002:float": (
            r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
            "-+0123456789.",
        ),
    }
    # The class's own table, without what PyYAML reads by YAML 1.1 (octal, sexagesimal, yes, dates).
    kept = ("tag:yaml.org,2002:null", _MERGE)
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag in kept]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, (pattern, first) in tags.items():
        Loader.add_implicit_resolver(tag, re.compile(rf"^(?:{pattern})$"), list(first))
    return Loader
