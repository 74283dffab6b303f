"""Speed of detection on this machine: back ends, one large photograph, a folder."""

from __future__ import annotations

import functools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from semanticblur_core import io
from semanticblur_core.errors import SemanticBlurError
from semanticblur_core.focus import classical
from semanticblur_core.focus.scores import tile_means
from semanticblur_core.inference.backends import BACKENDS
from semanticblur_core.inference.batch import detect_files
from semanticblur_core.inference.detector import Detector
from semanticblur_core.inference.inputs import sample_photographs
from semanticblur_core.inference.jobs import DetectOptions, find_jobs
from semanticblur_core.machine import describe_machine

_T = TypeVar("_T")
_HIFST_MEGAPIXELS = 4
# Threads go on spinning when their work is done: until then the cores are not the next one's.
_REST_S = 0.05


def bench_backends(
    *, size_px: int, n_rounds: int, model: str = "default"
) -> Generator[tuple[int, int], None, dict[str, Any]]:
    """Time each back end of `Detector` against torchvision's bare ResNet-50 in bfloat16, eager.

    Parameters
    ----------
    size_px
        Side of the square images.
    n_rounds
        Rounds for each back end, after three of warm-up; each times it and the backbone on one of
        three photographs (scikit-image's), in turn.
    model
        Packaged model, own model or file of weights.

    Yields
    ------
    tuple
        Rounds done and rounds in all.

    Returns
    -------
    dict
        JSON values: machine, and for each back end ``ms``, ``backbone_ms``, their ``ratio``,
        ``precision``, and ``mean_difference`` and ``largest_difference`` of its maps of the
        photographs from torch's in float32; or ``error``.

    Notes
    -----
    Batch 1, torch's own number of threads. A back end is timed from the image as an array in 0..1
    to its map as an array, the backbone from a prepared tensor to its last feature map. One back
    end at a time is loaded: the threads of another would go on spinning into the next one's time.
    """
    # Here alone, so that the others' memory is that of what is measured.
    import torch

    from semanticblur_core.benchmarks import bare_backbone

    precision = "bfloat16"
    backbone = bare_backbone().to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    reference = Detector(model, device="cpu", precision="float32", backend="torch").engine
    photographs = sample_photographs(size_px, size_px)
    expected = [reference.run(image[None])[0] for image in photographs]
    found: dict[str, dict[str, Any]] = {}
    warm_up, total = 3, n_rounds + 3
    for i, name in enumerate(BACKENDS):
        try:
            backend = Detector(model, device="cpu", backend=name).engine
            backend.run(photographs[0][None])  # which compiles, where that is to be done
        except SemanticBlurError as error:
            found[name] = {"error": str(error)}
            continue
        seconds: dict[str, list[float]] = {"backbone": [], name: []}
        differences = []
        for k in range(total):
            which_photograph = k % len(photographs)
            images = photographs[which_photograph][None]
            tensor = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.bfloat16)
            for which in seconds if k % 2 else reversed(seconds):
                time.sleep(_REST_S)
                start = time.perf_counter()
                if which == "backbone":
                    with torch.inference_mode():
                        backbone(tensor)
                else:
                    maps = backend.run(images)
                seconds[which].append(time.perf_counter() - start)
            if k < len(photographs):
                differences.append(np.abs(maps[0] - expected[which_photograph]))
            yield i * total + k + 1, len(BACKENDS) * total
        ms, backbone_ms = (
            statistics.median(seconds[which][warm_up:]) * 1e3 for which in (name, "backbone")
        )
        found[name] = {
            "ms": ms,
            "backbone_ms": backbone_ms,
            "ratio": ms / backbone_ms,
            "precision": backend.precision,
            "mean_difference": float(np.mean(differences)),
            "largest_difference": float(np.max(differences)),
        }
    return {
        "machine": describe_machine(),
        "size_px": size_px,
        "n_rounds": n_rounds,
        "n_threads": torch.get_num_threads(),
        "backbone_precision": precision,
        "backends": found,
    }


def bench_image(
    *, megapixels: float, n_rounds: int, detector: Detector, size: int | Literal["native"]
) -> Generator[tuple[int, int], None, dict[str, Any]]:
    """Time one large photograph from JPEG to PNG map, beside a hand-crafted score and method.

    Parameters
    ----------
    megapixels
        Of the photograph: scikit-image's ``astronaut`` enlarged to 3:2, as a JPEG.
    n_rounds
        Times each is done; medians count.
    detector, size
        What finds blur, warm, and at which analysis size.

    Yields
    ------
    tuple
        Rounds done and rounds in all.

    Returns
    -------
    dict
        JSON values: machine, settings, ``seconds`` of reading, detecting, writing, all three, of
        the variance of the Laplacian in tiles of 64 px and, up to 4 megapixels, of HiFST; and
        ``peak_memory_mib`` of the process.
    """
    from PIL import Image
    from skimage.data import astronaut

    detect = functools.partial(detector.detect, size=size)
    width = round(math.sqrt(megapixels * 1e6 * 1.5))
    photo = Image.fromarray(astronaut()).resize((width, round(width / 1.5)))
    seconds: dict[str, list[float]] = {}

    def clock(name: str, action: Callable[..., _T], *args: Any) -> _T:
        start = time.perf_counter()
        result = action(*args)
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "photo.jpg", Path(folder) / "map.png"
        photo.save(source, quality=92)
        del photo
        for i in range(n_rounds + 1):
            if i == 1:
                seconds.clear()  # the first round warms up
            image = clock("read", io.read_image, source)
            blur = clock("detect", detect, image)
            levels = np.round(blur * 255).astype(np.uint8)
            clock("write", io.write_png, target, levels)
            if i == 0:
                peak_memory_mib = _peak_memory_mib()
            del blur, levels
            grey = classical.grey(image)
            clock("variance of Laplacian in tiles", _laplacian_tiles, grey)
            if megapixels <= _HIFST_MEGAPIXELS:
                clock("HiFST", classical.hifst, grey)
            del grey
            yield i + 1, n_rounds + 1
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    medians["read, detect, write"] = medians["read"] + medians["detect"] + medians["write"]
    return {
        "machine": describe_machine(),
        "megapixels": megapixels,
        "size": size,
        "backend": detector.backend,
        "device": detector.device,
        "precision": detector.precision,
        "n_rounds": n_rounds,
        "seconds": medians,
        "peak_memory_mib": peak_memory_mib,
    }


def bench_batch(
    *, n_images: int, detector: Detector
) -> Generator[tuple[int, int], None, dict[str, Any]]:
    """Time `detect` on a folder of one-megapixel JPEGs, files read and maps written.

    Parameters
    ----------
    n_images
        Photographs, after two of warm-up (or a batch, where the detector takes several at once).
    detector
        What finds blur.

    Yields
    ------
    tuple
        Images done and images in all.

    Returns
    -------
    dict
        JSON values: machine, settings, ``images_per_s``.
    """
    from PIL import Image
    from skimage.data import astronaut

    warm_up = max(2, detector.batch_size)
    total = n_images + warm_up
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo = Image.fromarray(astronaut()).resize((1224, 816))
        for i in range(total):
            photo.save(folder / f"{i:06d}.jpg", quality=92)
        jobs, _ = find_jobs([name], folder / "maps")
        start = time.perf_counter()
        for i, result in enumerate(detect_files(jobs, detector, DetectOptions(folder / "maps"))):
            if result.error is not None:
                raise SemanticBlurError(result.error)
            if i + 1 == warm_up:
                start = time.perf_counter()
            yield i + 1, total
        elapsed_s = time.perf_counter() - start
    return {
        "machine": describe_machine(),
        "n_images": n_images,
        "backend": detector.backend,
        "device": detector.device,
        "precision": detector.precision,
        "images_per_s": n_images / elapsed_s,
    }


def _laplacian_tiles(grey: NDArray[np.float32]) -> NDArray[np.float64]:
    """Variance of the Laplacian in tiles of 64 px."""
    response = ndimage.laplace(grey, mode="nearest")
    mean, square = (tile_means(values, 64) for values in (response, response * response))
    variance: NDArray[np.float64] = square - mean.astype(np.float64) ** 2
    return variance


def _peak_memory_mib() -> float | None:
    """Most memory this process had so far; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
