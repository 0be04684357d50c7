"""`mrvae data`: the public sets that --data takes by name, and what is there of them."""

from __future__ import annotations

import argparse

HELP = "list public sets, or say what is known of one"

TEXT = """\
List the public sets that --data takes by name; or say of one where its files lie, whether they are the published ones,
and what is in it: counts, shapes, and the SHA-256 of its arrays, which every later load is held to.

examples:
  mrvae data
  mrvae data mnist
  MRVAE_DATA=/data mrvae data celeba
"""


def add(command: argparse.ArgumentParser) -> None:
    """The arguments."""
    command.add_argument("name", metavar="NAME", nargs="?", help="a public set (default: list them)")


def run(options: argparse.Namespace) -> int:
    """Print the list, or the description of one set."""
    from ..data.listing import description, listing

    for line in listing() if options.name is None else description(options.name):
        print(line, flush=True)
    return 0
