"""Methods of other packages' trainers whose models make lazy logits, for the length of a call.

Nothing of a trainer's own code is replaced: its forward pass, losses, options and metrics run as they are, on
logits that are not there. A model that has no lazy logits (a head that is quantised, or under FSDP1)
goes on with its own, and one line says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

from torch import nn

from fastdpo.integrations.lazy_call import lazy_head
from fastdpo.integrations.lm_head import unwrap
from fastdpo.integrations.source_patch import Around, find
from fastdpo.types import Execution

logger = logging.getLogger(__name__)

# The methods of a trainer that call its models, by the names of TRL 0.9 to 1.16; none of them generates.
METHODS = (
    *("compute_loss", "prediction_step", "get_batch_loss_metrics", "concatenated_forward"),
    *("compute_ref_log_probs", "compute_reference_log_probs"),
)


def steps_of(classes: Iterable[str], execution: Execution) -> dict[str, Around]:
    """What to put around the methods of trainers, by ``module:Class.method``.

    Args:
        classes: ``module:Class`` each; those that are not there are left out.
    """
    made: dict[str, Around] = {}
    said: set[str] = set()
    for path in classes:
        if not _exists(path.partition(":")[0]):
            continue
        owner, name, _ = find(path)
        made |= {
            f"{path}.{method}": _on_lazy_logits(execution, said)
            for method in METHODS
            if method in vars(getattr(owner, name))
        }
    return made


def _on_lazy_logits(execution: Execution, said: set[str]) -> Around:
    """A trainer's method with lazy logits of ``model``, ``ref_model`` and the model that it is given."""

    def around(own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            models = [getattr(self, "model", None), getattr(self, "ref_model", None), *args[:1]]
            with ExitStack() as stack:
                for model in models:
                    try:
                        if isinstance(model, nn.Module):
                            stack.enter_context(lazy_head(unwrap(model), execution))
                    except ValueError as error:
                        say_own(f"{type(self).__name__}.{own.__name__}", error, said)
                return own(self, *args, **kwargs)

        return method

    return Around(around)


def say_own(what: str, error: Exception, said: set[str]) -> None:
    """One line for each of the reasons why the code of another package runs in its own way."""
    reason = " ".join(str(error).split())
    if reason not in said:
        said.add(reason)
        logger.warning("%s runs its own code, with the logits: %s", what, reason)


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # one of its parents
        return False
