"""Print what fine-tuning on five generated microscopy images with strokes does.

    SEMANTICBLUR_DATA=DIR python tests/measure_finetune.py [KIND ...]

Kinds: ``generated`` (needs no data), ``nuclei``, ``blood``. Five images to paint on, 20 others to
measure, and the 60 validation photographs where the data folder is set.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from semanticblur_core import Detector, weights
from semanticblur_core.data.datasets import (
    DecodedPairs,
    find_pairs,
    list_images,
    read_split,
    select,
)
from semanticblur_core.data.defocus import Example, SharpImages, is_held_out, synthesise
from semanticblur_core.data.labels import LabelledImage
from semanticblur_core.device import DeviceChoice, keep_freed_memory
from semanticblur_core.training.finetune import finetune
from semanticblur_core.training.loop import validate

SIZE_PX = 320


def generated_cells(folder: Path, n: int, rng: np.random.Generator) -> list[Path]:
    """Sharp bright-field pictures of grainy cells on an even ground."""
    paths = []
    for k in range(n):
        picture = np.full((480, 480), 0.8)
        y, x = np.mgrid[:480, :480]
        for _ in range(90):
            cy, cx = rng.uniform(0, 480, 2)
            a, b, turn = rng.uniform(10, 26), rng.uniform(8, 16), rng.uniform(0, np.pi)
            u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
            v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
            reach = (u / a) ** 2 + (v / b) ** 2
            picture = np.where(reach < 1, picture * rng.uniform(0.6, 0.85), picture)
            picture = np.where((reach > 0.85) & (reach < 1), picture * 0.7, picture)
        grain = ndimage.gaussian_filter(rng.standard_normal((480, 480)), 0.8)
        picture = picture * (1 + 0.25 * grain / grain.std() * (picture < 0.75))
        path = folder / f"cells{k}.png"
        Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8)).save(path)
        paths.append(path)
    return paths


def partly_blurred(sources: SharpImages, n: int, rng: np.random.Generator) -> list[Example]:
    """Examples with at least a tenth of each class."""
    found: list[Example] = []
    while len(found) < n:
        example = synthesise(sources, 1, SIZE_PX, rng)
        shares = [
            (example.labelled & kind).float().mean() for kind in (example.blurred, ~example.blurred)
        ]
        if min(shares) > 0.1:
            found.append(example)
    return found


def pixels(example: Example) -> NDArray[np.uint8]:
    """``(S, S, 3)``."""
    return (example.image[0].permute(1, 2, 0) * 255).round().byte().numpy()


def painted(example: Example, rng: np.random.Generator, share: float = 0.028) -> NDArray[np.uint8]:
    """Strokes of a brush five pixels wide, of both classes, on at most ``share`` of the pixels."""
    labels = np.zeros((SIZE_PX, SIZE_PX), np.uint8)
    truth = np.where(example.labelled[0, 0], np.where(example.blurred[0, 0], 2, 1), 0)
    while True:
        stroke = np.zeros_like(labels, bool)
        code = int(rng.integers(1, 3))
        rows, columns = np.nonzero(truth == code)
        start = int(rng.integers(len(rows)))
        y, x = float(rows[start]), float(columns[start])
        angle = rng.uniform(0, 2 * np.pi)
        for _ in range(40):
            stroke[int(y) % SIZE_PX, int(x) % SIZE_PX] = True
            angle += rng.normal(0, 0.2)
            y, x = y + np.sin(angle), x + np.cos(angle)
            if not (0 <= y < SIZE_PX and 0 <= x < SIZE_PX):
                break
        stroke = ndimage.binary_dilation(stroke, np.ones((3, 3)), iterations=2) & (truth == code)
        added = np.where(stroke, np.uint8(code), labels)
        if (added > 0).mean() > share:
            return labels
        labels = added


def error(detector: Detector, examples: list[Example]) -> float:
    """MAE where the truth is known."""
    errors = []
    for example in examples:
        gap = np.abs(detector.detect(pixels(example)) - example.blurred[0, 0].numpy())
        errors.append(float(gap[example.labelled[0, 0].numpy()].mean()))
    return float(np.mean(errors))


def measure(kind: str, photos: DecodedPairs | None) -> None:
    """Print a line a figure."""
    rng = np.random.default_rng(4)
    if kind == "generated":
        folder = Path(os.environ.get("TMPDIR", "/tmp")) / "semanticblur-cells"
        folder.mkdir(exist_ok=True)
        files = generated_cells(folder, 16, rng)
        train_files, test_files = files[:5], files[5:]
    else:
        folder = Path(os.environ["SEMANTICBLUR_DATA"]) / "microscopy" / f"{kind}-sharp"
        files = [p for p in list_images(folder) if is_held_out(p.stem)]
        train_files, test_files = files[::3], [p for i, p in enumerate(files) if i % 3]
    to_paint = partly_blurred(SharpImages(train_files, kind="microscopy"), 5, rng)
    others = partly_blurred(SharpImages(test_files, kind="microscopy"), 20, rng)
    images = [
        LabelledImage(f"{kind} {i}", pixels(example), painted(example, rng))
        for i, example in enumerate(to_paint)
    ]
    share = np.mean([(image.labels > 0).mean() for image in images])
    output = Path(os.environ.get("TMPDIR", "/tmp")) / f"semanticblur-{kind}.safetensors"
    output.unlink(missing_ok=True)
    started, cpu_started = time.perf_counter(), time.process_time()
    for update in finetune(
        images, output=output, budget=os.environ.get("BUDGET", "quick"), device="cpu"
    ):
        if update.held_out_loss is not None:
            print(
                f"    step {update.step}: loss {update.loss:.3f}, held out "
                f"{update.held_out_loss:.3f}, {time.perf_counter() - started:.0f} s"
            )
    elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    result = update.result
    assert result is not None
    base, tuned = (Detector(m, device="cpu", precision="float32") for m in ("default", str(output)))
    before, after = error(base, others), error(tuned, others)
    print(
        f"{kind}: {share:.1%} labelled, {elapsed_s:.0f} s ({cpu_s:.0f} s of processor time), best "
        f"step {result.best_step}\n"
        f"  MAE on 20 other images {before:.3f} -> {after:.3f} ({after / before - 1:+.0%})\n"
        f"  held-out strokes {result.before.mae:.3f} -> {result.after.mae:.3f} "
        f"({result.held_out})\n"
        f"  generated photographs {result.forgetting_before:.4f} -> {result.forgetting_after:.4f}"
    )
    if photos is not None:
        cpu = DeviceChoice(torch.device("cpu"), torch.float32, "")
        scores = [validate(weights.load(m)[0], photos, cpu) for m in ("default", str(output))]
        print(f"  validation photographs: MAE {scores[0].mae:.4f} -> {scores[1].mae:.4f}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    keep_freed_memory()
    decoded = None
    if "SEMANTICBLUR_DATA" in os.environ:
        root = Path(os.environ["SEMANTICBLUR_DATA"]) / "cuhk-tr1"
        pairs = find_pairs(root / "images", root / "masks")
        decoded = DecodedPairs(select(pairs, read_split("cuhk-val")))
    for name in sys.argv[1:] or ["generated", "nuclei", "blood"]:
        measure(name, decoded)
