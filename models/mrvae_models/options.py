"""Reading options: durations and settings of the command line, JSON files, and the types of values. No torch here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CONFIG = "config.json"
"""Name of the file that says what a run is."""


class UsageError(Exception):
    """Arguments that parse but make no sense: exit code 2."""


def parse_duration(text: str) -> float:
    """Seconds from "90", "90s", "15m", "2h30m" or "1d"; ValueError otherwise, as for "1h30": 1h30m or 1h30s?"""
    units = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+|\d+(\.\d+)?", text):
        raise ValueError(
            f"{text!r} is no duration; expected seconds alone, such as 90, or a unit after every number, such as 15m "
            "or 1h30m"
        )
    return sum(float(number) * units[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([smhd]?)", text))


def parse_setting(text: str) -> tuple[str, Any]:
    """("hidden", 600) from "hidden=600", [600, 300] from "hidden=600,300", and "silu" from "activation=silu"."""
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise ValueError(f"{text!r} is no setting; expected NAME=VALUE, such as hidden=600")
    if value in ("True", "False", "None"):  # as Python spells them
        return key, {"True": True, "False": False, "None": None}[value]
    for reading in (value, f"[{value}]" if "," in value else value):
        try:
            return key, json.loads(reading)
        except json.JSONDecodeError:
            continue
    return key, value


def parse_gate(text: str) -> tuple[str, str]:
    """("decoder", "softplus+shift") from "decoder=softplus+shift"."""
    module, sign, kind = text.partition("=")
    if not sign or not module or not kind:
        raise ValueError(
            f"{text!r} is no gate; expected MODULE=KIND, such as decoder=softplus or decoder=softplus+shift"
        )
    return module, kind


def config_file(directory: str | Path) -> Path:
    """The CONFIG of a run's directory; FileNotFoundError where there is none."""
    path = Path(directory) / CONFIG
    if not path.exists():
        raise FileNotFoundError(
            f"{directory} holds no {CONFIG}; expected the directory of a run, as mrvae train writes it"
        )
    return path


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; FileNotFoundError, or ValueError that says where the text breaks off."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a JSON {type(document).__name__}; expected an object")
    return document


def check_format(document: Mapping[str, Any], expected: str, path: str | Path) -> None:
    """ValueError unless the document says that it has the expected format."""
    if document.get("format") != expected:
        raise ValueError(f"{path} has format {document.get('format')!r}; expected {expected!r}")


_TYPES: dict[str, tuple[type | tuple[type, ...], Callable[[Any], bool]]] = {
    "int": (int, lambda value: not isinstance(value, bool)),
    "float": ((int, float), lambda value: not isinstance(value, bool) and math.isfinite(value)),
    "str": (str, lambda value: True),
    "bool": (bool, lambda value: True),
    "dict[str, str]": (
        dict,
        lambda value: all(isinstance(key, str) and isinstance(entry, str) for key, entry in value.items()),
    ),
    "dict[str, Any]": (dict, lambda value: all(isinstance(key, str) for key in value)),
    "tuple[str, ...]": (tuple, lambda value: all(isinstance(entry, str) for entry in value)),
    "tuple[float, float]": (
        tuple,
        lambda value: (
            len(value) == 2
            and all(
                isinstance(entry, (int, float)) and not isinstance(entry, bool) and math.isfinite(entry)
                for entry in value
            )
        ),
    ),
}


WORDS = {
    "int": "a whole number", "float": "a finite number", "str": "text", "bool": "true or false",
    "dict[str, str]": "names with a text each", "dict[str, Any]": "names with a value each",
    "tuple[str, ...]": "texts", "tuple[float, float]": "two finite numbers",
}  # fmt: skip


def check_type(name: str, value: Any, annotation: str) -> None:
    """ValueError, naming the option, unless the value has the type that its annotation says."""
    base, _, optional = annotation.partition(" | ")
    if value is None and optional == "None":
        return
    kind, fits = _TYPES[base]
    if not isinstance(value, kind) or not fits(value):
        raise ValueError(f"{name} is {value!r}; expected {WORDS[base]}{', or none' if optional == 'None' else ''}")


def expect(condition: bool, name: str, value: Any, expected: str) -> None:
    """ValueError, naming the option, its value and what was expected, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} is {value!r}; expected {expected}")
