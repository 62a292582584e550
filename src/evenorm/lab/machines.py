"""Where trials are trained: processes of this machine, or a Dask or Ray cluster, by joblib's own backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import joblib
import torch
from joblib.externals.loky import get_reusable_executor

import evenorm

SECONDS = 10  # to find a scheduler


@dataclass(frozen=True)
class Machines:
    """How many stacks are trained at the same time, and where.

    Args:
        jobs: worker processes on this machine; a cluster has the workers it has.
        backend: "processes", "dask" or "ray".
        address: of the cluster's scheduler.

    Raises:
        ValueError: no job, an unknown backend, or an address that does not go with it.
    """

    jobs: int = 2
    backend: str = "processes"
    address: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.jobs < 1:
            raise ValueError(
                f"--jobs is the number of stacks trained at the same time, at least 1, got {self.jobs}"
            )
        if self.backend not in _BACKENDS:
            raise ValueError(f"--backend must be one of {', '.join(_BACKENDS)}, got {self.backend!r}")
        if self.backend == "processes" and self.address is not None:
            raise ValueError("--address is a cluster's: name it with --backend dask or --backend ray")
        if self.backend == "dask" and self.address is None:
            raise ValueError("--backend dask needs the scheduler's --address, such as tcp://host:8786")
        package, remedy = _NEEDS[self.backend]
        if find_spec(package) is None:
            raise ValueError(f"--backend {self.backend} needs a package that is not here: {remedy}")

    def parallel(self, stacks: int) -> AbstractContextManager[joblib.Parallel]:
        """Return a joblib.Parallel for so many stacks, which yields each as it is finished, and its end."""
        return _BACKENDS[self.backend](self, stacks)


def abandon(parallel: joblib.Parallel) -> None:
    """Stop the processes of this machine in the middle of what they do; a cluster is told when it is left."""
    if parallel.n_jobs > 1:
        # reuse=True: any other would be a new executor, made after the old one had finished all that waits.
        get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


@contextmanager
def _processes(machines: Machines, stacks: int) -> Iterator[joblib.Parallel]:
    yield _parallel(n_jobs=min(machines.jobs, stacks))


@contextmanager
def _dask(machines: Machines, stacks: int) -> Iterator[joblib.Parallel]:
    from distributed import Client

    assert machines.address is not None
    try:
        client = Client(machines.address, timeout=SECONDS, set_as_default=True)
    except (OSError, ValueError, TimeoutError) as error:
        raise ValueError(
            f"no Dask scheduler answers at {machines.address} ({_first_line(error)}); start one: dask scheduler"
        ) from error
    with client:
        _check_workers(client, machines.address)
        with joblib.parallel_config(backend="dask", wait_for_workers_timeout=SECONDS):
            yield _parallel(n_jobs=-1)


def _check_workers(client: Any, address: str) -> None:
    """Refuse workers that are not there, have several threads, or other versions, which might round otherwise."""
    threads = client.nthreads()
    if not threads:
        raise ValueError(
            f"the scheduler at {address} has no workers; start some: dask worker {address} --nthreads 1"
        )
    if max(threads.values()) > 1:
        raise ValueError(
            f"a Dask worker has {max(threads.values())} threads, and a trial's numbers need one alone; start "
            f"workers with: dask worker {address} --nworkers -1 --nthreads 1"
        )
    try:
        found = client.run(versions)
    except Exception as error:  # whatever importing raises over there
        raise ValueError(
            f"a Dask worker cannot import evenorm.lab; install it there: {_first_line(error)}"
        ) from error
    strange = {worker: have for worker, have in found.items() if have != versions()}
    if strange:
        worker, have = next(iter(strange.items()))
        raise ValueError(
            f"the worker {worker} has {have}, this process has {versions()}; install the same versions"
        )


def versions() -> str:
    """Return the versions that must be equal wherever trials are trained."""
    return f"evenorm {evenorm.__version__} and torch {torch.__version__}"


@contextmanager
def _ray(machines: Machines, stacks: int) -> Iterator[joblib.Parallel]:
    import ray  # type: ignore[import-not-found]
    from ray.util.joblib import register_ray  # type: ignore[import-not-found]

    try:
        ray.init(address=machines.address or "auto", ignore_reinit_error=True)
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"no Ray cluster answers at {machines.address}: {_first_line(error)}") from error
    register_ray()
    with joblib.parallel_config(backend="ray"):
        yield _parallel(n_jobs=-1)


def _parallel(n_jobs: int) -> joblib.Parallel:
    return joblib.Parallel(n_jobs=n_jobs, batch_size=1, return_as="generator_unordered")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_NEEDS = {
    "processes": ("joblib", 'pip install "evenorm[lab]"'),
    "dask": ("distributed", 'pip install "evenorm[cluster]"'),
    "ray": ("ray", "pip install ray"),
}
_BACKENDS: dict[str, Callable[[Machines, int], AbstractContextManager[joblib.Parallel]]] = {
    "processes": _processes,
    "dask": _dask,
    "ray": _ray,
}
