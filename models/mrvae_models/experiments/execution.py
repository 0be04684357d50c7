"""Executing the runs of an experiment: in processes of this machine or on a cluster, resumable.

OUT/runs/NAME is a run's directory, as mrvae train writes it, with result.json once it is evaluated. An experiment that
was killed and is started again takes the results that are there, continues the runs that have a checkpoint, and ends
with the same numbers to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..option_changes import OF_MANY_BETAS, as_now
from ..options import read_json
from .plan import Evaluation, Run

RESULT = "result.json"

Result = dict[str, Any]
"""Of one run: config, betas, evaluation, columns (name -> a value a beta), steps, seconds (of training) or None."""


def configured(directory: Path, options: Any) -> TrainConfig:
    """A run's options, in that directory: no logs, one thread, and next to no validation where nothing goes by it,
    unless told otherwise.

    ValueError for an option that TrainConfig has not, and for a value that makes no sense.
    """
    defaults = {"out": str(directory), "threads": 1, "log_to": ()}
    config = TrainConfig.from_dict({**defaults, **options}, "the options of the run")
    goes_by_it = config.keep == "best" or config.patience is not None or config.schedule == "plateau"
    if "validate_every" not in options and not goes_by_it:
        config.validate_every = 1000
    config.check()
    return config


def check_runs(runs: Sequence[Run], out: Path) -> list[TrainConfig]:
    """The runs' options. ValueError, naming the run, before anything is trained: for options that make no sense and
    names taken twice."""
    taken: dict[str, Run] = {}
    configs = []
    for run in runs:
        if run.name in taken:
            raise ValueError(f"two runs are called {run.name!r}: {taken[run.name]} and {run}; give each seed once")
        taken[run.name] = run
        try:
            configs.append(configured(out / "runs" / run.name, run.options))
            configs[-1].check_new()
        except ValueError as error:
            raise ValueError(f"run {run.name}: {error}") from None
    return configs


def execute(
    runs: Sequence[Run],
    evaluation: Evaluation,
    out: Path,
    processes: int = 1,
    launcher: str = "local",
    say: Callable[[str], object] = print,
    **cluster: Any,
) -> list[Result]:
    """The results of all runs, in their order; `say` is told of each that ends.

    launcher: "local", `processes` at a time (1: in this process), or "slurm", one job a run, with `cluster` as in
    launchers.slurm. The first run that fails ends all.
    """
    from .evaluation import check_evaluation
    from .launchers import LAUNCHERS

    if launcher not in LAUNCHERS:
        raise ValueError(f"launcher is {launcher!r}; expected one of {', '.join(LAUNCHERS)}")
    check_evaluation(evaluation, check_runs(runs, out))
    jobs = [(out / "runs" / run.name, run, evaluation) for run in runs]
    results: dict[int, Result] = {}
    for index, result in LAUNCHERS[launcher](execute_one, jobs, processes=processes, out=out, **cluster):
        results[index] = result
        say(f"{len(results)}/{len(runs)}: {runs[index].name}")
    return [results[index] for index in range(len(runs))]


def execute_one(directory: Path, run: Run, evaluation: Evaluation) -> Result:
    """Train, or continue, or take what is there; evaluate; leave result.json."""
    from ..run import CONFIG, write_json
    from .evaluation import check_columns, evaluated

    config = configured(directory, run.options)
    asked = {**dataclasses.asdict(evaluation), **_digest(evaluation.metric)}
    wanted = json.loads(json.dumps({"betas": run.betas, "evaluation": asked}))
    with _locked(directory):
        there = _result_there(directory, config, wanted)
        if there is not None:
            return there
        trained = train_or_continue(config)
        columns = evaluated(config, trained.model, run.betas, evaluation, directory)
        check_columns(columns, run.name)
        seconds = None if trained.seconds_per_step is None else trained.seconds_per_step * trained.steps
        trained_by = TrainConfig.load(directory / CONFIG).to_dict()
        result = {"config": trained_by, **wanted, "columns": columns, "steps": trained.steps, "seconds": seconds}
        write_json(directory / RESULT, result)
    return json.loads(json.dumps(result))


def _digest(metric: str | None) -> dict[str, str]:
    """The SHA-256 of the file of a metric of the user's own: an edited one is evaluated again, not trained again."""
    file = "" if metric is None else metric.rpartition(":")[0]
    return {"sha256": hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()} if file else {}


def train_or_continue(config: TrainConfig) -> Any:
    """train(config), from the checkpoint that its directory holds of this very run, if any."""
    from ..run import CONFIG, LAST
    from ..training import train

    directory = config.directory
    unfinished = (directory / LAST).exists() and (directory / CONFIG).exists()
    if unfinished and _same(read_json(directory / CONFIG).get("config"), config):
        saved = dataclasses.replace(TrainConfig.load(directory / CONFIG), out=config.out)
        return train(saved, resume=True, progress=False)
    return train(config, force=True, progress=False)


def _same(saved: Any, config: TrainConfig) -> bool:
    """Whether options saved are those of a run; the directory may have moved. Of a run at one beta those that gates and
    a range of betas have do not count, and of its recipe only what it has chosen."""
    unused = {"out"} if config.beta is None else {"out", "recipe", *OF_MANY_BETAS}
    wanted = {name: value for name, value in config.to_dict().items() if name not in unused}
    return isinstance(saved, dict) and wanted == {
        name: value for name, value in as_now(saved).items() if name not in unused
    }


def _result_there(directory: Path, config: TrainConfig, wanted: dict[str, Any]) -> Result | None:
    if not (directory / RESULT).exists():
        return None
    result = read_json(directory / RESULT)
    same = _same(result.get("config"), config) and all(result.get(name) == value for name, value in wanted.items())
    return result if same else None


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """A block that one process at a time enters for a directory.

    Processes of an experiment that was killed may still be at work on their runs; the one started again waits for them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows, where ending a process ends those it started as a rule
        yield
        return
    with open(directory / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
