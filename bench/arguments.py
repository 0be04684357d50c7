"""Arguments that the benchmarks' commands share, refused where they are read, before anything is measured."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import records

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended, as shells have it."""


class EachOnce(argparse.Action):
    """Keeps a list's values in their order and drops repeats, which would be measured twice under one name."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(values or ())))


def out_file(name: str) -> Path:
    """The path of a file to write; its folder is made. ArgumentTypeError where nothing can be written there."""
    path = Path(name)
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{name!r} cannot be written ({error}); expected a file in a folder that can be written to"
        ) from None


def result_file(what: str) -> Callable[[str], records.Record]:
    """A function that reads a result file of `what`; ArgumentTypeError, naming the file, where it is none."""

    def read(name: str) -> records.Record:
        try:
            return records.read(Path(name), what)
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def interrupted(command: str, written: Path | None) -> int:
    """Say that Ctrl-C ended the command, and which file, if any, holds what it had measured; the exit code."""
    left = "nothing was written" if written is None else f"{written} holds what was measured until then"
    print(f"bench.{command}: interrupted; {left}", file=sys.stderr)
    return INTERRUPTED
