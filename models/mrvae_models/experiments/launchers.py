"""Where jobs run: in processes of this machine, or on a SLURM cluster through submitit.

A launcher takes a function and the arguments of each job, and yields (index of the job, what it returned) as they end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

Jobs = Sequence[tuple[Any, ...]]

PATIENCE = 5.0
"""Seconds that processes have to end by themselves after an interruption."""


def local(work: Callable[..., Any], jobs: Jobs, processes: int = 1, out: Path | None = None) -> Iterator[Any]:
    """`processes` at a time, each with the threads that its run asks for; 1 runs them in this process.

    Where one fails, or this process is interrupted, the others are told to stop too. They never outlive this process.
    """
    if processes < 1:
        raise ValueError(f"processes is {processes}; expected a positive integer")
    if processes == 1:
        for index, job in enumerate(jobs):
            yield index, work(*job)
        return
    others = set(active_children())
    count = min(processes, len(jobs))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        # no more at a time than run: what waited in the pool would begin after an interruption
        waiting = iter(enumerate(jobs))
        begun = {pool.submit(work, *job): number for number, job in islice(waiting, count)}
        try:
            while begun:
                for future in wait(begun, return_when=FIRST_COMPLETED).done:
                    index, result = begun.pop(future), future.result()
                    begun |= {pool.submit(work, *job): number for number, job in islice(waiting, 1)}
                    yield index, result
        except BaseException:
            try:
                # Ctrl-C, and SIGTERM to a whole group, reach the processes too: a second signal would not let them save
                while wait(begun, PATIENCE).not_done:
                    for process in set(active_children()) - others:
                        process.terminate()
            finally:
                for process in set(active_children()) - others:
                    process.kill()
            raise


def _end_with_parent() -> None:
    """In a process of the pool: it ends when the one that started it has ended, even by SIGKILL."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def slurm(
    work: Callable[..., Any],
    jobs: Jobs,
    processes: int = 1,
    out: Path | None = None,
    hours: float = 24.0,
    cpus: int = 1,
    gpus: int = 0,
    partition: str | None = None,
    cluster: str = "slurm",
) -> Iterator[Any]:
    """One job of a SLURM array a run, `processes` of them at a time; their logs in OUT/slurm.

    hours, cpus, gpus, partition: of each job. RuntimeError without submitit or without SLURM. The directory OUT and
    this package must be the same on the cluster's machines. `cluster` is submitit's: "local" tries it without one.
    """
    try:
        import submitit
    except ImportError:
        raise RuntimeError(
            "the SLURM launcher needs the package submitit: pip install 'mrvae-kernels[cluster]', or run with "
            "--launcher local"
        ) from None
    assert out is not None
    executor = submitit.AutoExecutor(folder=(out / "slurm").absolute(), cluster=cluster)
    parameters: dict[str, Any] = {"timeout_min": round(60 * hours), "cpus_per_task": cpus, "gpus_per_node": gpus}
    if cluster == "slurm":
        parameters["slurm_array_parallelism"] = processes
    if partition is not None:
        parameters["slurm_partition"] = partition
    executor.update_parameters(**parameters)
    with executor.batch():
        submitted = [executor.submit(work, *job) for job in jobs]
    indices = {id(job): index for index, job in enumerate(submitted)}
    try:
        for job in submitit.helpers.as_completed(submitted):
            yield indices[id(job)], job.result()
    except BaseException:
        for job in submitted:
            job.cancel()
        raise


LAUNCHERS: dict[str, Callable[..., Iterator[Any]]] = {"local": local, "slurm": slurm}
