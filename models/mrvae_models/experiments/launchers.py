"""Where jobs run: in processes of this machine, or on a SLURM cluster through submitit.

A launcher takes a function and the arguments of each job, and yields (index of the job, what it returned) as they end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Jobs = Sequence[tuple[Any, ...]]


def local(work: Callable[..., Any], jobs: Jobs, processes: int = 1, out: Path | None = None) -> Iterator[Any]:
    """`processes` at a time, each with the threads that its run asks for; 1 runs them in this process."""
    if processes < 1:
        raise ValueError(f"processes is {processes}; expected a positive integer")
    if processes == 1:
        for index, job in enumerate(jobs):
            yield index, work(*job)
        return
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(work, *job): index for index, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:  # after an error, those that have not begun
                future.cancel()


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
