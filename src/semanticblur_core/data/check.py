"""Looks through a data set of images and masks and says what is there."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semanticblur_core import io
from semanticblur_core.data.datasets import (
    group_by_stem,
    list_images,
    note_subfolders,
    stem_of,
)
from semanticblur_core.errors import DataError, SemanticBlurError

KNOWN_SETS: dict[int, str] = {
    704: "CUHK, all defocus images (white = blurred)",
    604: "CUHK, the training split (white = blurred)",
    100: "CUHK, the test split (white = blurred)",
    500: "DUT, the test set (white = sharp)",
    150: "CTCUG",
    1605: "EBD (white = sharp)",
}
_MASK_WORDS = ("gt", "mask", "masks", "label", "labels", "groundtruth", "ground_truth", "truth")
_N_PROBED = 5


@dataclass
class DataReport:
    """What a data set holds; paths in ``problems`` come with their reason.

    ``blurred_fraction`` is of each mask, in 0..1 under ``mask_polarity``; ``duplicates`` lists
    groups of images that look the same at 16 x 16 grey pixels.
    """

    images: Path
    masks: Path
    mask_polarity: str
    n_pairs: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    blurred_fraction: dict[str, float] = field(default_factory=dict)
    one_class: list[str] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    known_set: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "images": str(self.images),
            "masks": str(self.masks),
            "mask_polarity": self.mask_polarity,
            "n_pairs": self.n_pairs,
            "sizes": dict(self.sizes.most_common()),
            "blurred_fraction": self.blurred_fraction,
            "one_class": self.one_class,
            "duplicates": self.duplicates,
            "problems": self.problems,
            "known_set": self.known_set,
        }


def find_folders(root: Path) -> tuple[Path, Path]:
    """Image folder and mask folder of a data set, wherever they lie below ``root``.

    The two folders whose files share most name stems; the masks are the one named so (gt, mask,
    label ...), or else the one that holds grey images of few values.

    Raises
    ------
    DataError
        If there is no such pair of folders, or more than one as good.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    stems: dict[Path, set[str]] = {}
    for folder in (root, *sorted(path for path in root.rglob("*") if path.is_dir())):
        try:
            stems[folder] = {stem_of(path) for path in list_images(folder)}
        except DataError:
            continue
    shared = {(a, b): len(stems[a] & stems[b]) for a, b in combinations(stems, 2)}
    most = max(shared.values(), default=0)
    best = [pair for pair, count in shared.items() if count == most and count > 0]
    if not best:
        raise DataError(f"{root}: no two folders below it hold images of the same names")
    if len(best) > 1:
        listed = "; ".join(f"{a.name} and {b.name}" for a, b in best)
        raise DataError(f"{root}: several folders hold images of the same names ({listed})")
    first, second = best[0]
    is_mask = [_is_named_as_masks(folder) for folder in (first, second)]
    if is_mask[0] == is_mask[1]:
        is_mask = [_looks_like_masks(folder) for folder in (first, second)]
    if is_mask == [True, False]:
        return second, first
    if is_mask == [False, True]:
        return first, second
    raise DataError(f"{first}, {second}: cannot tell which of them holds the masks")


def _is_named_as_masks(folder: Path) -> bool:
    words = folder.name.lower().replace("-", "_").split("_")
    return folder.name.lower() in _MASK_WORDS or any(word in _MASK_WORDS for word in words)


def _looks_like_masks(folder: Path) -> bool:
    files = list_images(folder)
    for path in files[:: max(1, len(files) // _N_PROBED)]:
        try:
            array = io.read_image(path)
        except SemanticBlurError:
            continue
        grey = array.ndim == 2 or bool((array == array[..., :1]).all())
        # JPEG masks ring around their edges: nearly all pixels near black or white will do.
        if not grey or array.dtype not in (np.uint8, np.bool_) or _share_between(array) > 0.1:
            return False
    return True


def _share_between(array: NDArray[Any]) -> float:
    """Share of grey pixels that are neither near black nor near white."""
    if array.dtype != np.uint8:
        return 0.0
    return float(np.count_nonzero((array > 30) & (array < 225)) / array.size)


def check_data(
    images: Path, masks: Path, *, mask_polarity: Literal["blur", "sharp"] = "blur"
) -> Generator[tuple[int, int, DataReport]]:
    """Look through a data set; close the generator to stop.

    Parameters
    ----------
    images, masks
        Folders, paired by name stem.
    mask_polarity
        What white in masks means.

    Yields
    ------
    tuple
        Pairs done, pairs in all, and the report so far, complete with the last one.
    """
    report = DataReport(images, masks, mask_polarity)
    by_stem = [group_by_stem(list_images(folder)) for folder in (images, masks)]
    for here, there, other in ((0, 1, masks), (1, 0, images)):
        mine, theirs = by_stem[here], by_stem[there]
        for stem, paths in mine.items():
            if len(paths) > 1:
                names = ", ".join(path.name for path in paths)
                report.problems.append(f"{paths[0].parent}: {names} share a name stem")
            if stem not in theirs:
                report.problems.append(f"{paths[0]}: no file of the same name in {other}")
    report.problems += [line for folder in (images, masks) if (line := note_subfolders(folder))]
    stems = sorted(set(by_stem[0]) & set(by_stem[1]))
    looks: dict[str, list[str]] = {}
    for n_done, stem in enumerate(stems, start=1):
        try:
            path = by_stem[0][stem][0]
            image, mask = io.read_image(path), io.read_mask(by_stem[1][stem][0])
            between = _share_between(io.read_image(by_stem[1][stem][0]))
            look = _look(image, str(path))
        except SemanticBlurError as error:
            report.problems.append(str(error))
        else:
            if image.shape[:2] != mask.shape:
                report.problems.append(
                    f"{by_stem[1][stem][0]}: mask of {mask.shape[1]} x {mask.shape[0]} px for an "
                    f"image of {image.shape[1]} x {image.shape[0]} px"
                )
            if between > 0.1:
                report.problems.append(
                    f"{by_stem[1][stem][0]}: {between:.0%} of its pixels are neither near black "
                    "nor near white; above 127 counts as white"
                )
            blurred = float(mask.mean())
            blurred = blurred if mask_polarity == "blur" else 1 - blurred
            report.n_pairs += 1
            report.sizes[f"{image.shape[1]} x {image.shape[0]}"] += 1
            report.blurred_fraction[stem] = blurred
            if blurred in (0, 1):
                report.one_class.append(stem)
            looks.setdefault(look, []).append(stem)
        if n_done < len(stems):
            yield n_done, len(stems), report
    report.duplicates = [group for group in looks.values() if len(group) > 1]
    report.known_set = KNOWN_SETS.get(report.n_pairs)
    yield len(stems), len(stems), report


def _look(image: NDArray[Any], name: str) -> str:
    """What an image looks like: a digest of 16 x 16 grey pixels in 16 steps."""
    unit = io.as_rgb(io.to_unit_range(image, name=name))
    grey = np.asarray(unit, np.float32).mean(axis=2)
    scale = 255.0 if unit.dtype == np.uint8 else 1.0
    small = Image.fromarray(grey / scale).resize((16, 16), Image.Resampling.BOX)
    steps = np.round(np.asarray(small) * 15).astype(np.uint8)
    return hashlib.sha256(steps.tobytes()).hexdigest()
