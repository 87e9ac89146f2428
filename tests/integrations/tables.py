"""The tables of docs/models.md, from what the tests are parametrised with: each row is a test.

python -m tests.integrations.tables          # rewrites docs/models.md between its markers
"""

from __future__ import annotations

import torch
import transformers

from fastdpo import LMHead
from tests import ROOT
from tests.integrations.peft_cases import CASES
from tests.integrations.test_lm_head import REFUSED
from tests.integrations.tiny import FAMILIES, make_config

PAGE = ROOT / "docs" / "models.md"


def families_table() -> str:
    """A row per family; scale, cap, bias and tying as the hook reads them from the tests' tiny model."""
    lines = ["| family | class | logits | embeddings | |", "|---|---|---|---|---|"]
    for name, family in sorted(FAMILIES.items()):
        with torch.device("meta"):
            model = getattr(transformers, family.model)(make_config(name))
        head = LMHead.from_model(model)
        does = ["scaled"] * (head.logit_scale != 1) + ["softcap"] * (head.softcap is not None)
        does += ["bias"] * (head.bias is not None)
        tied = "tied" if head.weight is model.get_input_embeddings().weight else "not tied"
        lines.append(
            f"| {name} | `{family.model}` | {', '.join(does) or 'plain'} | {tied} | {family.remark} |"
        )
    return "\n".join(lines)


def peft_table() -> str:
    """A row per kind of adapter: computed, or refused."""
    lines = ["| adapter | | |", "|---|---|---|"]
    for case in CASES.values():
        does = "**yes**" if case.refused is None else "refused"
        lines.append(f"| {case.text} | {does} | {case.remark} |")
    return "\n".join(lines)


def refused_list() -> str:
    """What a forward or a head may be that the probe has to notice."""
    return "\n".join(f"* {name}" for name in REFUSED)


def render(text: str) -> str:
    """The page with its tables replaced.

    Raises:
        ValueError: a pair of markers is not there, once each and in order.
    """
    for name, table in (
        ("families", families_table()),
        ("peft", peft_table()),
        ("refused", refused_list()),
    ):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"page: wanted {begin} and {end} once each, in this order")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
