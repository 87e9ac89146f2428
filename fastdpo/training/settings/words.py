"""Mistakes in the words of a command line, one line each; imported before anything that takes time."""

from __future__ import annotations

import argparse
from typing import NoReturn


class ArgumentError(ValueError):
    """The command line cannot be understood."""


class Parser(argparse.ArgumentParser):
    """One line for a mistake, as for every other, instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message)
