"""Every family that transformers' auto classes know, tiny: fused, refused, not built; and in which layouts.

python -m tests.integrations.every_family                  # rewrites docs/families.md
python -m tests.integrations.every_family llama gemma4     # prints these types

What `patch_model` takes must give the plain model's log-probabilities and gradients, or the script fails.
"""

from __future__ import annotations

import argparse
import gc
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from fastdpo.integrations.model import patch_model
from fastdpo.training.batches.layouts import choose_collator
from fastdpo.training.batches.probe import refusals
from fastdpo.training.settings.choices import ARRANGEMENTS_OF
from fastdpo.training.settings.config import PreferenceConfig
from tests.integrations.every_config import tiny_config
from tests.integrations.tiny import Batch, Step, fused_logps, make_batch, plain_logps, run_step

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
CASES = [(layout, name) for layout, names in ARRANGEMENTS_OF.items() for name in names]
# Numbers in reasons, which are other ones on each machine.
_SIZES_OF = re.compile(r" by [0-9.e+-]+ of their size( \(rounding: [0-9.e+-]+\))?")
# Parameters of what even the smallest config leaves large.
_LARGEST = 20_000_000
# Both sides are within 1e-5 nats of fp64; gradients differ by the roundings of the layers before the head.
_NATS, _GRADIENT = 2e-5, 1e-4
_HEAD = """# Every family of transformers

`patch_model` and the loop's layouts on each class that `AutoModelForCausalLM` and
`AutoModelForImageTextToText` of transformers {version} know: random, tiny, in fp32 on a CPU, with text.

* *fused*: log-probabilities within {nats:g} nats of the plain model's, gradients within {gradient:g} of their
  size, in training mode; then the layouts beside padded batches that the loop's probe found to change nothing
  (sequences in calls of their own, `separate`; in calls by their length, `bucketed`; in one row, `one_row`).
  `batch_layout="auto"` took one of them, or padded batches, for every family.
* *refused*: and why. *fails*: the plain model does, at this size or with text alone. *not built*: no small
  model could be made of its config, or it needs a library that was not there.

`python -m tests.integrations.every_family` makes this page, in a quarter of an hour; [models.md](models.md)
has the families that the tests hold to fp64.

"""


class Verdict(NamedTuple):
    """What was found of a family: ``fused``, ``refused``, ``fails`` (the plain one) or ``not built``."""

    model_type: str
    name: str
    kind: str
    remark: str
    layouts: str = ""


def families() -> Iterator[tuple[str, str]]:
    """Types and the names of their classes."""
    seen = set()
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for pair in names.items():
            if pair not in seen:
                seen.add(pair)
                yield pair


def verdict(model_type: str, name: str) -> Verdict:
    """Build it, patch it, and hold it to its plain self.

    Raises:
        AssertionError: it is patched, and gives something else.
    """
    try:
        model = _build(model_type, name)
    except Exception as error:  # whatever a config or a missing library raises
        return Verdict(model_type, name, "not built", _line(error))
    if (size := sum(p.numel() for p in model.parameters())) > _LARGEST:
        return Verdict(model_type, name, "not built", f"{size} parameters at the least")
    try:
        own = _step(model, _exact_plain_logps)
    except Exception as error:
        own, why = None, _line(error)
    try:
        patch_model(model)
    except ValueError as error:
        return Verdict(model_type, name, "refused", _line(error).partition("not supported: ")[2])
    if own is None:
        return Verdict(model_type, name, "fails", why)
    try:
        ours = _step(model, fused_logps)
    except TypeError as error:
        return Verdict(model_type, name, "refused", _line(error))
    _assert_alike(ours, own)
    return Verdict(model_type, name, "fused", "", _layouts(model))


def _build(model_type: str, name: str) -> Any:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(tiny_config(model_type, kind)).float().train()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for parameter in model.parameters():
        parameter.data.nan_to_num_(0.0)
        if not parameter.any():  # projectors that start at 0 hide what is before them
            torch.nn.init.normal_(parameter, std=0.05)
    head = model.get_output_embeddings()
    if isinstance(getattr(head, "weight", None), nn.Parameter):
        head.weight.data.mul_(30.0)  # logits as large as trained ones
    return model


def _exact_plain_logps(model: Any, batch: Batch) -> Tensor:
    """The plain model's, from its logits in fp64: log_softmax in fp32 alone may be 3e-5 nats off."""

    def exact(**inputs: Any) -> Any:
        return SimpleNamespace(logits=model(**inputs).logits.double())

    exact_logps: Tensor = plain_logps(exact, batch)  # type: ignore[arg-type]
    return exact_logps


def _step(model: Any, logps_of: Callable[..., Tensor]) -> Step:
    """One training step; dropout and the like draw the same numbers each time."""
    torch.manual_seed(1)
    return run_step(model, make_batch(), logps_of)


def _assert_alike(ours: Step, own: Step) -> None:
    off = (ours.logps - own.logps).abs().max().item()
    assert off <= _NATS, f"log-probabilities differ by {off:.1e} nats"
    assert ours.grads.keys() == own.grads.keys(), "gradients of other parameters"
    size = torch.stack([g.norm() for g in own.grads.values()]).norm()
    apart = torch.stack([(ours.grads[name] - g).norm() for name, g in own.grads.items()]).norm()
    assert apart <= _GRADIENT * size, f"gradients differ by {apart / size:.1e} of their size"


def _layouts(model: nn.Module) -> str:
    """The forms of rows that change nothing, and what `auto` makes of them does not fail."""
    alone = SimpleNamespace(num_processes=1, is_main_process=False, device=torch.device("cpu"))
    settings: dict[str, Any] = {"batch_layout": "auto", "use_cpu": True, "report_to": [], "max_length": 64}
    choose_collator([model], PreferenceConfig(output_dir="unused", **settings), 0, None, alone)
    found = refusals(model, CASES, longest=64)
    if not any(found.values()):
        return "all"
    if all(found.values()):
        names = "padded alone"
    else:
        names = f"all but {', '.join(' '.join(case) for case, reason in found.items() if reason)}"
    reasons = dict.fromkeys(_SIZES_OF.sub("", reason) for reason in found.values() if reason)
    return f"{names}: {', '.join(reasons)}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def table(found: Sequence[Verdict]) -> str:
    """The page."""
    counts = {kind: sum(v.kind == kind for v in found) for kind in ("fused", "refused", "fails", "not built")}
    head = _HEAD.format(version=transformers.__version__, nats=_NATS, gradient=_GRADIENT)
    lines = [", ".join(f"{count} {kind}" for kind, count in counts.items()) + ".", ""]
    lines += ["| type | class | | layouts, or why not |", "|---|---|---|---|"]
    for v in sorted(found):
        text = (v.layouts or v.remark).replace("|", "/").replace("`", "")
        lines.append(f"| {v.model_type} | `{v.name}` | {v.kind} | {text} |")
    return head + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*")
    parser.add_argument("--page", type=Path, default=PAGE)
    wanted = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    found, wrong = [], 0
    for model_type, name in families():
        if wanted.types and model_type not in wanted.types:
            continue
        try:
            found.append(verdict(model_type, name))
            print(*found[-1], sep=" | ", flush=True)
        except Exception as error:  # each is a fault of ours, to be looked at
            wrong += 1
            print(f"WRONG | {model_type} | {name} | {type(error).__name__}: {_line(error)}", flush=True)
        gc.collect()
    if not wanted.types and not wrong:
        wanted.page.write_text(table(found), encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
