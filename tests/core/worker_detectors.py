"""Detectors for worker processes, which can import nothing from a test module."""

import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from semanticblur_core import Detector
from semanticblur_core.errors import WeightsError
from semanticblur_core.inference.planes import ALL, DetectUpdate, Planes
from semanticblur_core.inference.tiling import TileGrid


class KillsItsProcess:
    """A detector that a certain image is the death of."""

    name = "killer"

    def detect(self, image: np.ndarray, **keywords: object) -> np.ndarray:
        if image.shape[0] == 41:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros(image.shape[:2], np.float32)


class IsSlow:
    """A detector that takes longer than a stop waits."""

    name = "slow"

    def detect(self, image: np.ndarray, **keywords: object) -> np.ndarray:
        time.sleep(2)
        return np.zeros(image.shape[:2], np.float32)


class MeanIsBlur:
    """A map of the mean of each tile or plane, without a network's time."""

    name = "mean"

    def made(self) -> None:
        """A plane, or a strip of one."""

    def detect(self, image: np.ndarray, **keywords: object) -> np.ndarray:
        return np.full(image.shape[:2], image.mean(), np.float32)

    def iter_planes(
        self, array: Any, axes: str, *, indices: Any, channels: Any, size: Any, value_range: Any
    ) -> Iterator[DetectUpdate]:
        planes = Planes(array, axes, channels)
        for n, index in enumerate(indices, start=1):
            blur = self.detect(planes.view(index).read_unit(limits=value_range))
            self.made()
            whole = np.broadcast_to(np.True_, blur.shape)
            yield DetectUpdate(tuple(index), n, len(indices), blur, whole, ALL, True)

    def iter_strips(
        self, read: Any, grid: TileGrid, *, wanted: range
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """With tiles of the row after read before a row is given, as on a GPU."""
        tiles = [tile for tile in grid if wanted.start - 1 <= tile.row < wanted.stop]
        means = [float(read(tile.rows, tile.columns).mean()) for tile in tiles]
        ends = [*grid.row_starts[1:], grid.height]
        for row in wanted:
            top, end = grid.row_starts[row], ends[row]
            strip = np.zeros((end - top, grid.width), np.float32)
            for tile, mean in zip(tiles, means, strict=True):
                if tile.row == row:
                    strip[:, tile.columns] = mean
            self.made()
            yield slice(top, end), strip


class LeavesTracks(MeanIsBlur):
    """Takes its time, and tells in a folder which processes it was in."""

    def __init__(self, folder: str, deadly_value: float = math.inf) -> None:
        self.folder, self.deadly_value = Path(folder), deadly_value

    def detect(self, image: np.ndarray, **keywords: object) -> np.ndarray:
        if image.max() >= self.deadly_value:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().detect(image)

    def made(self) -> None:
        (self.folder / str(os.getpid())).touch()
        time.sleep(0.1)


def no_such_model(name: str) -> None:
    raise WeightsError(f"{name}: no such model")


def named_by_threads(model: str, backend: str) -> Detector:
    """A detector whose name is the number of threads that computes it."""
    detector = Detector(model, device="cpu", backend=backend)
    detector.name = str(session_threads(detector))
    return detector


def session_threads(detector: Detector) -> int:
    """Threads of ONNX Runtime's session or OpenVINO's request."""
    engine = detector.engine
    if detector.backend == "onnxruntime":
        return engine._session.get_session_options().intra_op_num_threads
    return engine._request.get_compiled_model().get_property("INFERENCE_NUM_THREADS")
