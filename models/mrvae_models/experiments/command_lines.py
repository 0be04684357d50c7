"""The `mrvae train` command of a run. No torch here."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from typing import Any

from ..config import TrainConfig


def command_of(config: TrainConfig) -> str:
    """The command line that trains by exactly these options: those that differ from the recipe's and the defaults."""
    base = TrainConfig(network=config.network, recipe=config.recipe)
    words = ["mrvae", "train"]
    order = {"network": 0, "recipe": 1}
    for entry in sorted(fields(TrainConfig), key=lambda entry: order.get(entry.name, 2)):
        value, default = getattr(config, entry.name), getattr(base, entry.name)
        usual = TrainConfig(network=config.network).recipe if entry.name == "recipe" else default
        if value == (TrainConfig().network if entry.name == "network" else usual):
            continue
        flag = entry.metadata.get("flag", "--" + entry.name.replace("_", "-"))
        words += _words(flag, value, default)
    return shlex.join(words)


def _words(flag: str, value: Any, default: Any) -> list[str]:
    """The words of one option."""
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, dict):
        if missing := sorted(set(default) - set(value)):
            raise ValueError(
                f"{flag} leaves out {missing[0]!r}, which its recipe sets, and no command line can: take another recipe"
            )
        changed = {key: entry for key, entry in value.items() if default.get(key) != entry}
        if flag.endswith("set"):  # --set and --likelihood-set are given once an entry
            return [word for key, entry in changed.items() for word in (flag, f"{key}={setting(entry)}")]
        return [flag, *(f"{key}={entry}" for key, entry in changed.items())]
    if isinstance(value, tuple):
        return [flag, *(map(str, value) if value else ["none"])]
    return [flag, str(value)]


def setting(value: Any) -> str:
    """As parse_setting reads it."""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"))
