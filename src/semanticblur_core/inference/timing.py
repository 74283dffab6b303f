"""Times one back end in a process of its own: ``BACKEND MODEL DEVICE SIZE ROUNDS``."""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from semanticblur_core.errors import SemanticBlurError
from semanticblur_core.inference.detector import Detector


def measure(backend: str, model: str, device: str, size_px: int, n_rounds: int) -> None:
    """Print a line of JSON for `semanticblur_core.inference.choice`."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size_px, size_px, 3), np.uint8)
    detector = Detector(model, backend=backend, device=device)
    detector.detect(image, size=size_px)
    first_map_at = time.time()
    seconds = []
    for _ in range(n_rounds + 2):
        start = time.perf_counter()
        detector.detect(image, size=size_px)
        seconds.append(time.perf_counter() - start)
    low, median, high = np.percentile(seconds[2:], (25, 50, 75)).tolist()
    values = {
        "first_map_at": first_map_at,
        "seconds_per_image": median,
        "scatter": (high - low) / median,
        "precision": detector.precision,
        "device": detector.device,
    }
    sys.stdout.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    try:
        measure(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    except SemanticBlurError as error:
        sys.exit(str(error))  # the last line of what is said, which is shown
