"""Many files on many processes: workers of this machine, or those of a dask.distributed cluster.

The work is cut into chunks of a few files. Only a few chunks a worker thread are handed out at a
time, so that a million files are no burden to the scheduler. A chunk whose worker dies is done
again by another; since results are renamed into place when they are whole, nothing is lost and
nothing is half there.

Where there are fewer files than workers, the map of a stack or a slide is made in parts: each is
kept beside the result, and the file is then done as any other, by a worker that finds all of its
map there.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import multiprocessing
import os
import pickle
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from semanticblur_core.errors import ConfigError, SemanticBlurError, quieten_readers
from semanticblur_core.inference.batch import (
    OnProgress,
    detect_rows,
    divide,
    iter_results,
    job_outputs,
)
from semanticblur_core.inference.inputs import is_sample
from semanticblur_core.inference.jobs import (
    DetectOptions,
    Job,
    possible_outputs,
    remove_stale_parts,
    take_back,
)
from semanticblur_core.inference.map_maker import MapMaker
from semanticblur_core.inference.results import FileResult
from semanticblur_core.machine import count_cores

MakeDetector = Callable[[], MapMaker]

CHUNK_S = 1.0
MAX_CHUNK_FILES = 64
CHUNKS_PER_THREAD = 2
CENSUS_S = 2.0
TELL_S = 1.0
TOPIC = "semanticblur"
# Of a cluster whose first worker is still to come.
EXPECTED_WORKERS = 16
DRAIN_S = 5.0
CONNECT_S = 10
# How often a chunk may lose its worker before its files are tried one at a time.
ALLOWED_DEATHS = 1
# What is told of a worker's detector.
_PUBLIC = (
    "name", "reason", "backend", "device", "precision", "sha256", "scales", "upsampling", "flip",
)  # fmt: skip


class DetectionCluster:
    """Worker processes that detect files, one model in each; a context manager.

    Parameters
    ----------
    make_detector
        Called once in each worker process; must be picklable, such as
        ``functools.partial(Detector, "default", backend="torch")``. Name the back end: with
        ``auto`` each machine would take what was measured there.
    n_workers
        Processes on this machine; the cores are divided among them. Scripts need the usual
        ``if __name__ == "__main__":``, since processes are spawned.
    scheduler
        Address of a running dask.distributed scheduler instead, ``tcp://host:port``. Its workers
        need this package, and the files under the same absolute paths.

    Attributes
    ----------
    detector
        Public attributes (``name``, ``device`` ...) of a worker's detector; None until one has
        answered.

    Raises
    ------
    ConfigError
        If not exactly one of ``n_workers`` and ``scheduler`` is given, dask.distributed is missing
        or the scheduler cannot be reached.

    Examples
    --------
    >>> make = functools.partial(Detector, "default", device="cpu", backend="torch")
    >>> jobs, _ = find_jobs(["photos"], Path("maps"))
    >>> with DetectionCluster(make, n_workers=2) as cluster:
    ...     for result in cluster.detect_files(jobs, DetectOptions(Path("maps"))):
    ...         print(result.source, result.error or result.skipped or result.mean_blur)
    """

    def __init__(
        self,
        make_detector: MakeDetector,
        *,
        n_workers: int | None = None,
        scheduler: str | None = None,
    ) -> None:
        if (n_workers is None) == (scheduler is None):
            raise ConfigError("expected either a number of workers or the address of a scheduler")
        if n_workers is not None and n_workers < 1:
            raise ConfigError(f"workers: expected at least 1, got {n_workers}")
        self.detector: Any = None
        self._make = make_detector
        self._resources = ExitStack()
        self._cluster: Any = None  # of this machine
        self._n_threads: int | None = None  # in each worker process of this machine
        self._is_closed = False
        try:
            if scheduler is not None:
                self._client = self._connect(scheduler)
            else:
                assert n_workers is not None
                self._client = self._start(n_workers)
        except BaseException:
            self._resources.close()
            raise
        self._workers: set[str] = set()
        self._workers_lost = False
        self._slots = 1
        self._counted_at = -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the cluster; the processes of this machine end."""
        self._is_closed = True
        self._resources.close()

    def count_threads(self) -> int:
        """Threads of all workers that are connected now."""
        return sum(self._client.nthreads().values())

    def detect_files(
        self,
        jobs: Iterable[Job],
        options: DetectOptions,
        *,
        on_progress: OnProgress | None = None,
    ) -> Generator[FileResult, None, None]:
        """As `semanticblur_core.detect_files`, in the order in which files are finished.

        Where there are no more files than two a worker thread, several workers do a stack or slide.

        Files whose worker process died each time they were tried, even alone, are reported as
        failed. Close the iterator to stop: files that a worker of a running cluster has begun are
        still finished there, and processes of this machine end, so that nothing more can be
        detected with them; what they made and this has not yielded is deleted. Interrupted
        (Ctrl+C) it yields what is finished within five seconds, and then raises.

        Raises
        ------
        ConfigError, WeightsError
            If the workers cannot make the detector, the scheduler is lost, or the processes ended.
        """
        if self._is_closed:
            raise ConfigError("its processes ended when it was closed or stopped; make another")
        jobs = list(jobs)
        remove_stale_parts(jobs, options, keep=options.resume)
        whole = False
        try:
            with self._hearing(on_progress) as told:
                yield from self._detect(jobs, options, told)
            whole = True
        finally:
            is_own = self._n_threads is not None
            if is_own and not whole:
                self.close()  # ends what is still being written
            if (is_own and not whole) or (whole and self._workers_lost):
                remove_stale_parts(jobs, options, keep=True)

    def _detect(
        self, jobs: list[Job], options: DetectOptions, told: _Told | None
    ) -> Iterator[FileResult]:
        import cloudpickle
        from distributed import KilledWorker, as_completed

        # As bytes: what a worker cannot unpickle in its inbox costs it the connection.
        make = cloudpickle.dumps(self._make)
        waiting, suspects = deque(jobs), deque[_Task]()
        divided: dict[_Task, _Divided] = {}
        running: dict[Any, _Chunk] = {}
        untold = deque[tuple[_Task, FileResult]]()
        completed = as_completed(loop=self._client.loop)
        n_done, seconds = 0, 0.0
        distant = replace(options, output=options.output.absolute())

        def take() -> list[_Chunk]:
            """The next files, or parts of the next one."""
            wanted = CHUNK_S * n_done / seconds if seconds else 1
            share = math.ceil(len(waiting) / (self._slots * CHUNKS_PER_THREAD))
            n_files = max(1, min(round(wanted), share, MAX_CHUNK_FILES))
            n_files = min(n_files, len(waiting))
            tasks = [_Task.of(waiting.popleft(), options) for _ in range(n_files)]
            n_workers = self._slots if self._workers else EXPECTED_WORKERS
            if n_workers < 2 or share > 1:
                return [_Chunk(tasks)]
            parts = divide(tasks[0].distant, distant, n_workers)
            if parts:
                divided[tasks[0]] = _Divided(len(parts), parts[-1].stop)
            return [_Chunk(tasks, rows=rows) for rows in parts] or [_Chunk(tasks)]

        def submit(chunk: _Chunk) -> None:
            tell = told and told.expect(chunk, divided)
            future = self._client.submit(
                _work, make, chunk, distant, self._n_threads, tell, pure=False
            )
            running[future] = chunk
            completed.add(future)

        try:
            while waiting or suspects or running:
                self._census()
                if suspects:  # alone, so that no other file pays for the one that kills workers
                    if not running:
                        submit(_Chunk([suspects.popleft()], alone=True))
                else:
                    while waiting and len(running) < self._slots * CHUNKS_PER_THREAD:
                        for chunk in take():  # of all parts, whoever is there to make them
                            submit(chunk)
                future = next(completed)
                chunk = running[future]
                if future.status == "cancelled":
                    raise ConfigError("the connection to the scheduler was lost; --resume goes on")
                with _explaining():
                    error = future.exception()
                if error is not None:
                    del running[future]
                if error is not None and not isinstance(error, KilledWorker):
                    raise _explained(error)
                self._workers_lost |= error is not None
                if chunk.rows is not None:
                    task, of_file = chunk.tasks[0], divided[chunk.tasks[0]]
                    if error is None:
                        with _explaining():
                            self.detector, elapsed_s = future.result()
                        of_file.elapsed_s += elapsed_s
                        del running[future]
                    of_file.n_left -= 1
                    of_file.is_suspect |= error is not None
                    if not of_file.n_left and of_file.is_suspect:
                        suspects.append(task)
                    elif not of_file.n_left:
                        submit(_Chunk([task]))
                    continue
                if error is not None:
                    if chunk.alone:
                        yield _killed(chunk.tasks[0].job)
                    else:
                        suspects.extend(chunk.tasks)
                    continue
                for task, result in self._results(future, chunk, options, distant):
                    if told is not None:
                        told.forget(task)
                    if task in divided:
                        elapsed_s = result.elapsed_s + divided.pop(task).elapsed_s
                        result = replace(result, elapsed_s=elapsed_s)
                    untold.append((task, result))
                del running[future]
                while untold:
                    _, result = untold.popleft()
                    n_done, seconds = n_done + 1, seconds + result.elapsed_s
                    yield result
            self._census(now=True)
        except KeyboardInterrupt:
            # Whose maps are there already, so that no report lacks them.
            for future in self._drained([f for f, c in running.items() if c.rows is None]):
                untold.extend(self._results(future, running.pop(future), options, distant))
            while untold:
                yield untold.popleft()[1]
            raise
        finally:
            if running:
                with suppress(Exception):
                    self._client.cancel(list(running))
            if self._n_threads is not None and (running or untold):
                self._end_processes()
                begun = [task for chunk in running.values() for task in chunk.tasks]
                for task in (*begun, *(task for task, _ in untold)):
                    # One that is refused has the names of another's results, which were told of.
                    made = () if task.job.refusal else possible_outputs(task.job, options)
                    take_back(path for path in made if path.name not in task.existing)

    @contextmanager
    def _hearing(self, on_progress: OnProgress | None) -> Iterator[_Told | None]:
        """What hears from the workers of the progress within files, if that is wanted."""
        if on_progress is None:
            yield None
            return
        told = _Told(on_progress)
        self._client.subscribe_topic(TOPIC, told.hear)
        try:
            yield told
        finally:
            with suppress(Exception):  # closed, or the scheduler is lost
                self._client.unsubscribe_topic(TOPIC)

    def _results(
        self, future: Any, chunk: _Chunk, options: DetectOptions, distant: DetectOptions
    ) -> list[tuple[_Task, FileResult]]:
        with _explaining():
            self.detector, results = future.result()
        return [
            (task, _as_asked(result, task, options, distant))
            for task, result in zip(chunk.tasks, results, strict=True)
        ]

    def _drained(self, running: Collection[Any]) -> list[Any]:
        """Of what was handed out, a few seconds' work, what is finished within `DRAIN_S`."""
        deadline = time.monotonic() + DRAIN_S
        while not all(future.done() for future in running) and time.monotonic() < deadline:
            time.sleep(0.02)
        return [future for future in running if future.status == "finished"]

    def _end_processes(self) -> None:
        """End the processes of this machine at once, so that nothing is written any more."""
        for nanny in list(self._cluster.workers.values()):
            nanny.auto_restart = False
            if nanny.pid is not None:
                with suppress(OSError):
                    os.kill(nanny.pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    def _census(self, *, now: bool = False) -> None:
        """Look now and then which workers there are; they may come and go."""
        if not now and time.monotonic() - self._counted_at < CENSUS_S:
            return
        try:
            threads: dict[str, int] = self._client.nthreads()
        except OSError as error:
            raise ConfigError(f"the scheduler was lost: {error}; --resume goes on") from error
        self._counted_at = time.monotonic()
        self._slots = max(1, sum(threads.values()))
        self._workers_lost |= not self._workers <= set(threads)
        self._workers = set(threads)

    def _connect(self, address: str) -> Any:
        distributed = _import_distributed()
        try:
            # A client that is given no address complains again, and at length, when it is dropped.
            distributed.comm.get_address_host_port(address)
            client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(f"scheduler {address}: cannot be reached: {reason}") from error
        self._resources.callback(_quietly, client.close)
        # It tells of a scheduler that is lost in thirty lines, we in one.
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
        _require_package(client)
        return client

    def _start(self, n_workers: int) -> Any:
        distributed = _import_distributed()
        import dask

        self._n_threads = max(1, count_cores() // n_workers)
        self._resources.callback(_restore_environment, dict(os.environ))
        with dask.config.set({"distributed.scheduler.allowed-failures": ALLOWED_DEATHS}):
            cluster = _deaf_to_interrupts(
                functools.partial(
                    distributed.LocalCluster,
                    n_workers=n_workers,
                    threads_per_worker=1,
                    processes=True,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",  # any free port: 8787 may be taken
                    memory_limit=0,  # images come in all sizes: leave it to the operating system
                    silence_logs=logging.CRITICAL,
                    env={"OMP_NUM_THREADS": str(self._n_threads)},
                    preload=[__name__],
                )
            )
        # It tells of connections that end after the cluster closed and no longer silences it.
        logging.getLogger("distributed.batched").setLevel(logging.CRITICAL)
        self._cluster = cluster
        self._resources.callback(_quietly, cluster.close)
        client = distributed.Client(cluster, set_as_default=False)
        self._resources.callback(_quietly, client.close)
        return client


@dataclass(frozen=True)
class _Task:
    """A job under absolute paths, and which of its files were there when it was handed out."""

    job: Job
    distant: Job
    existing: frozenset[str]

    @classmethod
    def of(cls, job: Job, options: DetectOptions) -> _Task:
        existing = {path.name for path in possible_outputs(job, options) if path.exists()}
        source = job.source if is_sample(job.source) else str(Path(job.source).absolute())
        return cls(job, replace(job, source=source), frozenset(existing))

    def is_fresh(self, options: DetectOptions) -> bool:
        """Whether it had no result: one that is there now is of a worker that died since."""
        if not self.existing:
            return True
        try:
            outputs = job_outputs(self.distant, options)
        except SemanticBlurError:  # reported when it is done
            return False
        return self.existing.isdisjoint(path.name for path in outputs)


@dataclass(frozen=True)
class _Chunk:
    """Files for a worker, or some rows of the map of one."""

    tasks: list[_Task]
    alone: bool = False
    rows: range | None = None


@dataclass
class _Divided:
    """A file of which several workers make parts."""

    n_left: int
    n_rows: int
    elapsed_s: float = 0.0
    is_suspect: bool = False  # a worker died of it


@dataclass(frozen=True)
class _Tell:
    """Tells of the progress within files that take long, from a worker, once a second."""

    run: str
    numbers: dict[str, int]  # of the files, since names may hold what cannot be sent
    first_row: int
    told_at: dict[int, float] = field(default_factory=dict)

    def __call__(self, source: str, n_done: int, n_all: int) -> None:
        number, now = self.numbers[source], time.monotonic()
        if n_done >= n_all or now - self.told_at.get(number, -math.inf) >= TELL_S:
            from distributed import get_worker

            self.told_at[number] = now
            get_worker().log_event(TOPIC, (self.run, number, self.first_row, n_done, n_all))


class _Told:
    """Hears of the progress within files, of those that are being done."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._run = secrets.token_hex(4)
        self._files: dict[int, _Told.File] = {}
        self._numbers: dict[str, int] = {}
        self._n_files = 0

    @dataclass
    class File:
        """Where it is, its rows where it is divided, and how many of each part are made."""

        source: str
        n_rows: int
        parts: dict[int, int] = field(default_factory=dict)

    def expect(self, chunk: _Chunk, divided: dict[_Task, _Divided]) -> _Tell:
        """What a worker is given to tell of some files, or rows of one."""
        numbers = {}
        for task in chunk.tasks:
            source = task.job.source
            if source not in self._numbers:
                self._numbers[source] = self._n_files = self._n_files + 1
                n_rows = divided[task].n_rows if task in divided else 0
                self._files[self._numbers[source]] = self.File(source, n_rows)
            numbers[task.distant.source] = self._numbers[source]
        return _Tell(self._run, numbers, -1 if chunk.rows is None else chunk.rows.start)

    def forget(self, task: _Task) -> None:
        """A file is over."""
        self._files.pop(self._numbers.pop(task.job.source, 0), None)

    def hear(self, event: tuple[float, tuple[str, int, int, int, int]]) -> None:
        """What dask calls with when it was told, and what; other runs' too."""
        run, number, first_row, n_done, n_all = event[1]
        file = self._files.get(number) if run == self._run else None
        if file is None:
            return
        if first_row >= 0:
            file.parts[first_row] = n_done
            n_done, n_all = sum(file.parts.values()), file.n_rows
        self._on_progress(file.source, n_done, n_all)


_lock = threading.Lock()
_made: dict[bytes, MapMaker] = {}


def process_detector(pickled_make: bytes) -> MapMaker:
    """The detector of this process, made when it is first asked for; the latest one is kept."""
    with _lock:
        if pickled_make not in _made:
            _made.clear()
            _made[pickled_make] = pickle.loads(pickled_make)()
        return _made[pickled_make]


def dask_setup(worker: Any) -> None:
    """Called by dask in each process of this machine."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the main process's affair
    quieten_readers()  # as on the command line


def _work(
    pickled_make: bytes,
    chunk: _Chunk,
    options: DetectOptions,
    n_threads: int | None,
    tell: _Tell | None,
) -> tuple[SimpleNamespace, Any]:
    """In a worker: the results of files, or how long some rows of a map took."""
    detector = process_detector(pickled_make)
    if n_threads is not None and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(n_threads)
    start, job = time.perf_counter(), chunk.tasks[0].distant
    made: list[FileResult] | float
    if chunk.rows is None:
        made = _detect_chunk(detector, chunk.tasks, options, tell)
    else:
        on_part = functools.partial(tell, job.source) if tell is not None else None
        with suppress(Exception):  # the whole file will fail of the same, and tells of it
            detect_rows(job, detector, options, chunk.rows, on_part)
        made = time.perf_counter() - start
    public = {name: getattr(detector, name) for name in _PUBLIC if hasattr(detector, name)}
    return SimpleNamespace(**public), made


def _detect_chunk(
    detector: MapMaker, tasks: list[_Task], options: DetectOptions, tell: _Tell | None = None
) -> list[FileResult]:
    results: list[FileResult] = []
    for fresh, some in itertools.groupby(tasks, key=lambda task: task.is_fresh(options)):
        own = replace(options, overwrite=True, resume=False) if fresh else options
        jobs = [task.distant for task in some]
        # What another worker made of a stack is of this run: the client deleted what was before.
        results.extend(iter_results(jobs, detector, own, on_progress=tell, fresh=False))
    return results


def _as_asked(
    result: FileResult, task: _Task, options: DetectOptions, distant: DetectOptions
) -> FileResult:
    """With the paths as they were given."""
    outputs = [options.output / path.relative_to(distant.output) for path in result.outputs]

    def named(told: str | None) -> str | None:
        if told is None:
            return None
        told = told.replace(task.distant.source, task.job.source)
        return told.replace(str(distant.output), str(options.output))

    return replace(
        result,
        source=task.job.source,
        outputs=outputs,
        error=named(result.error),
        planes=[replace(plane, error=named(plane.error)) for plane in result.planes],
        unreadable_part=named(result.unreadable_part),
    )


def _killed(job: Job) -> FileResult:
    reason = "the worker process died each time it was tried, perhaps for want of memory"
    return FileResult(job.source, error=f"{job.source}: {reason}")


def _require_package(client: Any) -> None:
    """Ask the scheduler and the workers that are there; without it they would drop out silently."""

    def has_package() -> bool:  # nested, so that it travels by value
        from importlib.util import find_spec

        return find_spec("semanticblur_core") is not None

    answers = {"the scheduler": client.run_on_scheduler(has_package), **client.run(has_package)}
    lacking = [name for name, has in answers.items() if not has]
    if lacking:
        raise ConfigError(
            f"napari-semanticblur is not installed on {lacking[0]} ({len(lacking)} of "
            f"{len(answers)} lack it): scheduler and workers need the packages of this environment"
        )


@contextmanager
def _explaining() -> Iterator[None]:
    """What is asked of a scheduler that may be lost."""
    try:
        yield
    except Exception as error:
        explained = _explained(error)
        if explained is error:
            raise
        raise explained from error


def _explained(error: BaseException) -> BaseException:
    if isinstance(error, ModuleNotFoundError):
        return ConfigError(
            f"a worker has no module {error.name}: install the same packages on all of the cluster"
        )
    if type(error).__name__ in ("FutureCancelledError", "CommClosedError", "CancelledError"):
        return ConfigError("the connection to the scheduler was lost; --resume goes on")
    return error


def _restore_environment(before: dict[str, str]) -> None:
    """Undo what the cluster sets in this process whenever it starts a worker: thread counts."""
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def _import_distributed() -> Any:
    try:
        import distributed
    except ImportError:
        raise ConfigError(
            "several workers need dask.distributed: pip install 'napari-semanticblur[cluster]'"
        ) from None
    return distributed


def _deaf_to_interrupts(make: Callable[[], Any]) -> Any:
    """Make a cluster whose processes Ctrl+C does not reach, while this thread can be interrupted.

    From their first moment: a process that is interrupted while it imports prints its traceback.
    """
    made: Future[Any] = Future()
    before = set(multiprocessing.active_children())

    def run() -> None:
        try:
            if hasattr(signal, "pthread_sigmask"):  # inherited by its threads and their processes
                resource_tracker.ensure_running()  # which would unblock it
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while not made.done():  # on Windows a wait without an end cannot be interrupted
            with suppress(TimeoutError):
                made.exception(timeout=0.5)
        return made.result()
    except KeyboardInterrupt:
        for process in set(multiprocessing.active_children()) - before:
            if process.name.startswith("Dask Worker"):
                process.kill()
        with suppress(Exception):  # it sees that they died, and closes
            made.result(timeout=CONNECT_S).close()
        raise


def _quietly(close: Callable[[], object]) -> None:
    """Close; what fails then has no consequence."""
    with suppress(Exception):
        close()
