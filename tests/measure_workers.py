"""Images a second of one and two single-threaded workers: python measure_workers.py FOLDER [N].

CPU time a photograph is printed too: on a machine that others use, it is what can be compared.
"""

import functools
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil

from semanticblur_core import DetectionCluster, DetectOptions, Detector, find_jobs
from semanticblur_core.inference.jobs import Job


def cpu_s() -> float:
    """CPU time of the worker processes."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(t.user + t.system for t in times)


def measure(n_workers: int, jobs: list[Job]) -> tuple[float, float]:
    make = functools.partial(
        Detector, "default", device="cpu", precision="bfloat16", backend="torch"
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        DetectionCluster(make, n_workers=n_workers) as cluster,
    ):
        options = DetectOptions(Path(folder))
        cluster._n_threads = 1
        warm = [replace(job, output_stem=f"warm/{i}") for i, job in enumerate(jobs[:8])]
        list(cluster.detect_files(warm, options))  # a model in each worker
        cpu, start = cpu_s(), time.perf_counter()
        results = list(cluster.detect_files(jobs, options))
        seconds = time.perf_counter() - start
        assert all(result.error is None for result in results)
        return len(jobs) / seconds, (cpu_s() - cpu) / len(jobs)


if __name__ == "__main__":
    found, _ = find_jobs([sys.argv[1]], Path("nowhere"))
    jobs = found[: int(sys.argv[2]) if len(sys.argv) > 2 else 100]
    ratios = []
    for _ in range(3):
        (one, cpu_one), (two, cpu_two) = measure(1, jobs), measure(2, jobs)
        ratios.append(two / one)
        print(
            f"1 worker {one:.2f}/s, {cpu_one:.3f} CPU s a photograph; 2 workers {two:.2f}/s, "
            f"{cpu_two:.3f} CPU s; ratio {two / one:.2f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.2f}")
