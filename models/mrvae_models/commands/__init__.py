"""Sub-commands of `mrvae`, a file each: TEXT and HELP, add(command) for its arguments, run(options) -> exit code.

Nothing heavy is imported before run(), which raises UsageError for arguments that parse but make no sense.
"""

from __future__ import annotations

from types import ModuleType

from . import data, experiment, metrics, select

MODULES: dict[str, ModuleType] = {"select": select, "metrics": metrics, "data": data, "experiment": experiment}
