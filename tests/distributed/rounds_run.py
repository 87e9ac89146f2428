"""One rank of commands: ``python -m tests.distributed.rounds_run FILE``, a line of it each, in its folder."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import torch

from fastdpo.cli import main

if __name__ == "__main__":
    torch.set_num_threads(2)  # as the process that they are held to
    file = Path(sys.argv[1])
    os.chdir(file.parent)
    for line in file.read_text().splitlines():
        print(f"code {main(shlex.split(line))}", flush=True)
