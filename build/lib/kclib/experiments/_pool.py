"""Tasks side by side by joblib, on this machine or a cluster: what fails or dies stops no other."""

import contextlib
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import joblib
from threadpoolctl import threadpool_limits

from kclib._util import checks, threads
from kclib.errors import InvalidValueError, MissingPackageError

BACKENDS = ("loky", "dask", "ray")
_DIED = "its process died (killed, or out of memory), also when it ran alone"


@dataclass(frozen=True)
class Workers:
    """Where tasks run.

    Attributes
    ----------
    n_jobs : int
        Tasks side by side; 1 runs them in this process, if there is no scheduler.
    backend : {"loky", "dask", "ray"}
        joblib's: processes of this machine, or a cluster's.
    scheduler : str
        Address of the cluster's scheduler; by default one on this machine is started.
    """

    n_jobs: int = 1
    backend: str = "loky"
    scheduler: str = ""

    def __post_init__(self):
        checks.check_known("backend", self.backend, BACKENDS)
        object.__setattr__(self, "n_jobs", checks.check_whole("jobs", self.n_jobs, 1))
        if self.scheduler and self.backend == "loky":
            raise InvalidValueError("a scheduler is for the backends dask and ray; loky has none.")

    @property
    def n_threads(self) -> int:
        """Threads that each task may use, so that all together use the processors once."""
        return max(1, threads.threads() // self.n_jobs)

    @property
    def apart(self) -> bool:
        """Whether tasks run in other processes than this one."""
        return self.n_jobs > 1 or self.backend != "loky"

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Make joblib use these workers in this block.

        Raises
        ------
        MissingPackageError
        InvalidValueError
            The scheduler cannot be reached.
        """
        with contextlib.ExitStack() as stack:
            options = {}
            if self.backend == "loky":  # workers that nobody needs, or whose parent was killed, end soon
                options = {"inner_max_num_threads": self.n_threads, "idle_worker_timeout": 20}
            if self.backend != "loky":
                stack.enter_context(_CLUSTERS[self.backend](self))
            n_jobs = max(2, self.n_jobs)  # joblib would run a single job in this process
            stack.enter_context(joblib.parallel_config(self.backend, n_jobs=n_jobs, **options))
            yield


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Attributes
    ----------
    place : int
        Of the task in the sequence.
    error : str
        One line; empty if it was done.
    traceback : str
    """

    place: int
    error: str = ""
    traceback: str = ""


def run(call: Callable[..., bool], tasks: Sequence, workers: Workers) -> Iterator[Outcome]:
    """Call every task and yield how it ended, as it ends.

    Tasks start in their order. A worker that dies is replaced; the tasks that were under way are tried again
    after the others, each alone, and what then dies again has failed.

    Parameters
    ----------
    call : callable
        ``call(task, wait, n_threads)``, importable by the workers; false if another process is at this task,
        and `wait` is false. Such tasks are tried again after the others.
    tasks : sequence
        What can be pickled.
    """
    if not workers.apart:
        yield from (_called(call, i, task, True, workers.n_threads) for i, task in enumerate(tasks))
        return
    with workers.joined():
        yield from _rounds(call, tasks, workers)


def _rounds(call: Callable[..., bool], tasks: Sequence, workers: Workers) -> Iterator[Outcome]:
    """Run what is left until nothing is; what was under way when a worker died comes last, one by one."""
    left, suspects, wait = list(range(len(tasks))), set(), False
    while left:
        alone = suspects.issuperset(left)
        places = left[:1] if alone else [i for i in left if i not in suspects]
        n_ran, n_ended, died = 0, 0, False
        try:
            for outcome in _round(call, [(i, tasks[i]) for i in places], wait, workers):
                n_ran += 1
                if outcome is not None:
                    n_ended += 1
                    left.remove(outcome.place)
                    yield outcome
        except _dead_workers():
            died = True
        if died and alone:
            yield Outcome(left.pop(0), _DIED)
        elif died:
            suspects.update(places[: n_ran + max(2, workers.n_jobs)])  # at most so many had begun
        elif not n_ended:
            wait = True  # all that is left is computed elsewhere


def _round(call: Callable[..., bool], tasks: list[tuple], wait: bool, workers: Workers) -> Iterator:
    """Yield the outcomes of one pass over tasks; None for what another process is at."""
    # One task a worker at a time, so that no small one waits behind a large one, and it is known which ran.
    # A Dask cluster counts its own processors as joblib's n_jobs: our number is given.
    parallel_ = joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch=workers.n_jobs)
    yield from parallel_(joblib.delayed(_called)(call, i, task, wait, workers.n_threads) for i, task in tasks)


def _called(
    call: Callable[..., bool], place: int, task: object, wait: bool, n_threads: int
) -> Outcome | None:
    """Call one task; its failure is a value."""
    try:
        n_threads = min(n_threads, threads.threads())  # a cluster's machines may be smaller than ours
        with threadpool_limits(n_threads):
            return Outcome(place) if call(task, wait, n_threads) else None
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return Outcome(place, text, traceback.format_exc())


def _dead_workers() -> tuple[type[Exception], ...]:
    """Return what joblib raises when a worker died."""
    from joblib.externals.loky.process_executor import BrokenProcessPool

    found = [BrokenProcessPool]
    with contextlib.suppress(ImportError):
        from distributed.scheduler import KilledWorker

        found.append(KilledWorker)
    with contextlib.suppress(ImportError):
        from ray.exceptions import RayActorError

        found.append(RayActorError)
    return tuple(found)


@contextlib.contextmanager
def _dask(workers: Workers) -> Iterator[None]:
    with _installed("dask", "dask[distributed]"):
        from distributed import Client
    options = {"n_workers": workers.n_jobs, "threads_per_worker": 1, "dashboard_address": "localhost:0"}
    try:
        client = Client(workers.scheduler, timeout=10) if workers.scheduler else Client(**options)
    except (OSError, ValueError) as error:
        raise InvalidValueError(
            f"no Dask scheduler answers at {workers.scheduler!r}; start one ('dask scheduler'), or give none."
        ) from error
    with client:
        yield


@contextlib.contextmanager
def _ray(workers: Workers) -> Iterator[None]:
    with _installed("ray", "ray"):
        import ray
        from ray.util.joblib.ray_backend import RayBackend

    class Backend(RayBackend):
        supports_return_generator = True  # as its pool does, which joblib's own pool of processes does not

    options = {} if workers.scheduler else {"num_cpus": workers.n_jobs, "include_dashboard": False}
    host, _, port = workers.scheduler.rpartition("/")[2].rpartition(":")
    try:
        if port.isdecimal():  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(workers.scheduler or None, logging_level="error", log_to_driver=False, **options)
    except (OSError, OverflowError, ValueError) as error:
        raise InvalidValueError(
            f"no Ray cluster answers at {workers.scheduler!r}; start one ('ray start --head') and give 'auto'"
            " or its address (and set RAY_AUTH_MODE=token, if it asks for one), or give none."
        ) from error
    try:
        joblib.register_parallel_backend("ray", Backend)
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _installed(backend: str, package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(
            f"the backend {backend} needs a package that is not installed; pip install '{package}'."
        ) from error


_CLUSTERS = {"dask": _dask, "ray": _ray}
