"""Detectors for worker processes, which can import nothing from a test module."""

import os
import signal
import time

import numpy as np

from semanticblur_core import Detector
from semanticblur_core.errors import WeightsError


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
