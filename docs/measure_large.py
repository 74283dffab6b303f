"""Time and memory of large images at native size, streamed from tiled TIFF to Zarr.

    python docs/measure_large.py [MEGAPIXELS ...]

Every image is generated (scikit-image's `astronaut`, repeated and blurred in places), detected by
the command line in a process of its own, after one tile that takes the model's first run, and
deleted. The process's peak memory is the system's figure.
"""

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import ndimage
from skimage.data import astronaut

TILE_PX = 512


def tiles(side_px: int) -> Iterator[NDArray[np.uint8]]:
    """Tiles of the image, row by row; every third one out of focus."""
    sharp = astronaut()
    soft = ndimage.gaussian_filter(sharp, (6, 6, 0))
    n = math.ceil(side_px / TILE_PX)
    for i in range(n * n):
        yield soft if i % 3 == 0 else sharp


def measure(megapixels: float, folder: Path, backend: str) -> None:
    """Generate, detect, print a line."""
    sources = {"first": TILE_PX, "large": round(math.sqrt(megapixels * 1e6))}
    command = [sys.executable, "-m", "semanticblur_core", "detect"]
    for name, side_px in sources.items():
        source = folder / f"{name}.tif"
        with tifffile.TiffWriter(source, bigtiff=True) as writer:
            writer.write(
                tiles(side_px), shape=(side_px, side_px, 3), dtype=np.uint8,
                tile=(TILE_PX, TILE_PX), photometric="rgb", compression="jpeg",
            )  # fmt: skip
        command.append(f"--input={source}")
    command += [f"--output={folder / 'maps'}", "--size=native", "--format=zarr", "--overwrite"]
    report = folder / "report.json"
    command += [f"--backend={backend}", "--axes=YXS", f"--json={report}"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    elapsed_s = time.perf_counter() - start
    assert isinstance(usage, resource.struct_rusage)
    if status:
        raise SystemExit(f"{megapixels:g} megapixels: failed")
    image = json.loads(report.read_text())["images"][-1]
    n = image["height"] * image["width"] / 1e6
    print(
        f"{n:.0f} megapixels: {elapsed_s:.0f} s with start-up, {image['elapsed_s'] / n:.2f} "
        f"s/megapixel without, at most {usage.ru_maxrss / 1024:.0f} MiB",
        flush=True,
    )


if __name__ == "__main__":
    backend = os.environ.get("SEMANTICBLUR_BACKEND", "torch")
    with tempfile.TemporaryDirectory() as name:
        for text in sys.argv[1:] or ["4", "400", "1000"]:
            measure(float(text), Path(name), backend)
