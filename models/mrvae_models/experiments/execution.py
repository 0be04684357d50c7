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
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..option_changes import OF_MANY_BETAS, as_now
from ..options import config_file, read_json
from .plan import Evaluation, Run

RESULT = "result.json"

Result = dict[str, Any]
"""Of one run: config, betas, evaluation, columns (name -> a value a beta), steps, seconds (of training) or None."""


def configured(directory: Path, options: Any) -> TrainConfig:
    """A run's options, in that directory: no logs, one thread, and next to no validation where nothing goes by it,
    unless told otherwise.

    ValueError for an option that TrainConfig has not, for a value that makes no sense, and for another directory.
    """
    if "out" in options:
        raise ValueError(f"out is {options['out']!r}; expected none: the run is in {directory}")
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
    """The results of all runs, in their order; `say` is told of each that ends, and before of those that are there with
    other options and are trained again.

    launcher: "local", `processes` at a time (1: in this process), or "slurm", one job a run, with `cluster` as in
    launchers.slurm. The first run that fails ends all. SIGTERM is a KeyboardInterrupt, as Ctrl-C.
    """
    from .evaluation import check_evaluation, check_test_split
    from .launchers import LAUNCHERS

    if launcher not in LAUNCHERS:
        raise ValueError(f"launcher is {launcher!r}; expected one of {', '.join(LAUNCHERS)}")
    configs = check_runs(runs, out)
    check_evaluation(evaluation, configs)
    both = list(zip(configs, runs, strict=True))
    to_do = [config for config, run in both if _result_there(config, _wanted(run, evaluation)) is None]
    check_test_split(evaluation, to_do)
    for config in to_do:
        if changed := _changed(config):
            say(f"{config.directory} is trained again, with other options: {'; '.join(changed)}")
    jobs = [(config.directory, run, evaluation) for config, run in both]
    results: dict[int, Result] = {}
    with _terminable():
        for index, result in LAUNCHERS[launcher](execute_one, jobs, processes=processes, out=out, **cluster):
            results[index] = result
            say(f"{len(results)}/{len(runs)}: {runs[index].name}")
    return [results[index] for index in range(len(runs))]


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """A block in which SIGTERM is a KeyboardInterrupt; a run that is being trained has its own answer to it."""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def execute_one(directory: Path, run: Run, evaluation: Evaluation) -> Result:
    """Train, or continue, or take what is there; evaluate; leave result.json."""
    from ..run import CONFIG, write_json
    from .evaluation import check_columns, evaluated

    config = configured(directory, run.options)
    wanted = _wanted(run, evaluation)
    with _locked(directory):
        there = _result_there(config, wanted)
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


def _wanted(run: Run, evaluation: Evaluation) -> dict[str, Any]:
    """What a result is of besides the run's options, as result.json has it."""
    asked = {**dataclasses.asdict(evaluation), **_digest(evaluation.metric)}
    return json.loads(json.dumps({"betas": run.betas, "evaluation": asked}))


def _digest(metric: str | None) -> dict[str, str]:
    """The SHA-256 of the file of a metric of the user's own: an edited one is evaluated again, not trained again."""
    file = "" if metric is None else metric.rpartition(":")[0]
    return {"sha256": hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()} if file else {}


def train_or_continue(config: TrainConfig) -> Any:
    """train(config), from the checkpoint that its directory holds of this very run, if any."""
    from ..training import train

    if _changed(config) == []:
        saved = dataclasses.replace(TrainConfig.load(config_file(config.directory)), out=config.out)
        return train(saved, resume=True, progress=False)
    return train(config, force=True, progress=False)


def _changed(config: TrainConfig) -> list[str] | None:
    """How the options of the run that the directory has a checkpoint of differ from these; None where it has none."""
    from ..run import CONFIG, LAST

    directory = config.directory
    if not ((directory / LAST).exists() and (directory / CONFIG).exists()):
        return None
    return _differences(read_json(directory / CONFIG).get("config"), config)


def _differences(saved: Any, config: TrainConfig) -> list[str]:
    """How options saved differ from those of a run, "lr was 0.001, now 0.01"; the directory may have moved. Of a run at
    one beta those that gates and a range of betas have do not count, and of its recipe only what it has chosen."""
    if not isinstance(saved, dict):
        return [f"they were {saved!r}"]
    unused = {"out"} if config.beta is None else {"out", "recipe", *OF_MANY_BETAS}
    then, now = as_now(saved), config.to_dict()
    names = [name for name in {**now, **then} if name not in unused]
    return [
        f"{name} was {then.get(name, 'not there')!r}, now {now.get(name, 'not there')!r}"
        for name in names
        if (name in then) != (name in now) or then.get(name) != now.get(name)
    ]


def _result_there(config: TrainConfig, wanted: dict[str, Any]) -> Result | None:
    path = config.directory / RESULT
    if not path.exists():
        return None
    result = read_json(path)
    same = not _differences(result.get("config"), config) and all(
        result.get(name) == value for name, value in wanted.items()
    )
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
