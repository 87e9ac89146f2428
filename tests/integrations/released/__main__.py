"""``python -m tests.integrations.released ENVIRONMENT [CASE ...]``: runs with the hook and without it.

One line of JSON for each case: what `recorder.compared` gives, or why it was not run.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from functools import partial
from typing import Any

from tests.integrations.released import recorder
from tests.integrations.released.cases import Case, cases_of


def report(environment: str, case: Case) -> dict[str, Any]:
    kind = "trl_trainers" if environment.startswith("trl-") or environment == "axolotl" else "loops"
    module = importlib.import_module(f"tests.integrations.released.{kind}")
    if kind == "trl_trainers" and (reason := module.why_not(case)) is not None:
        return {"not_run": reason}
    return recorder.compared(partial(module.run, case))


if __name__ == "__main__":
    environment, *names = sys.argv[1:]
    cases = cases_of(environment)
    for name in names or cases:
        try:
            found = report(environment, cases[name])
        except Exception:
            found = {"failed": traceback.format_exc()}
        print(json.dumps({"case": name, **found}), flush=True)
