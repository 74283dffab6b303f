"""Pairs of a photograph and its mask, and named splits of the known data sets."""

from __future__ import annotations

import functools
import hashlib
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import io
from semanticblur_core.data.labels import BLURRED, LabelledImage
from semanticblur_core.errors import DataError, SemanticBlurError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """A photograph and its mask (255 or True = blurred), found by their common stem."""

    name: str
    image: Path
    mask: Path


def find_pairs(images: str | Path, masks: str | Path) -> list[Pair]:
    """Pairs of the files of two folders by name stem, extensions may differ; sorted by name.

    Raises
    ------
    DataError
        If a folder is missing or empty, a stem occurs twice, or a file has no partner.
    """
    by_stem = [_by_stem(folder) for folder in (images, masks)]
    for here, there, other in ((0, 1, masks), (1, 0, images)):
        lonely = sorted(set(by_stem[here]) - set(by_stem[there]))
        if lonely:
            path = by_stem[here][lonely[0]]
            more = f" (and {len(lonely) - 1} more)" if len(lonely) > 1 else ""
            raise DataError(f"{path}: no file of the same name in {other}{more}")
    return [Pair(stem, by_stem[0][stem], by_stem[1][stem]) for stem in sorted(by_stem[0])]


def list_images(folder: str | Path, *, also: Sequence[str] = ()) -> list[Path]:
    """Image files right in a folder, sorted by name; hidden files are left out.

    ``also`` names more suffixes to count as images.

    Raises
    ------
    DataError
        If the folder is missing or holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in (*io.IMAGE_SUFFIXES, *also) and not path.name.startswith(".")
    ]
    if not found:
        raise DataError(f"{folder}: no images in it ({', '.join((*io.IMAGE_SUFFIXES, *also))})")
    return found


def stem_of(path: Path) -> str:
    """Name stem by which files are partners: in one form of Unicode, for Macs use another."""
    return unicodedata.normalize("NFC", path.stem)


def note_subfolders(folder: str | Path) -> str | None:
    """A line that tells of images below a folder, where `list_images` does not look, if any."""
    folder = Path(folder)
    below = [
        path
        for path in folder.glob("*/**/*")
        if path.suffix.lower() in io.IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    if not below:
        return None
    n = f"{len(below)} image{'s' * (len(below) != 1)}"
    return f"{folder}: {n} in folders below it not read, first {min(below).relative_to(folder)}"


def group_by_stem(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Files of each name stem, in their order."""
    grouped: dict[str, list[Path]] = {}
    for path in paths:
        grouped.setdefault(stem_of(path), []).append(path)
    return grouped


def _by_stem(folder: str | Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in list_images(folder):
        stem = stem_of(path)
        if stem in found:
            raise DataError(f"{path}: {found[stem].name} has the same name stem")
        found[stem] = path
    return found


def read_split(name: str) -> list[str]:
    """Name stems of a split: a list that ships with the package, or a text file of one's own.

    Parameters
    ----------
    name
        ``cuhk-val`` (60 of the 604 training photographs, held out of training here),
        ``cuhk-te1`` (the 100 test photographs of the field), or a path.
    """
    packaged = resources.files("semanticblur_core.data") / "splits" / f"{name}.txt"
    source = packaged if packaged.is_file() else Path(name)
    if not source.is_file():
        raise DataError(f"split {name}: neither a packaged split nor a file")
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"split {name}: not a readable text file: {error}") from error
    lines = (unicodedata.normalize("NFC", line.strip()) for line in text.splitlines())
    names = list(dict.fromkeys(line for line in lines if line))
    if not names:
        raise DataError(f"split {name}: the list is empty")
    return names


def select(pairs: Sequence[Pair], names: Sequence[str]) -> list[Pair]:
    """The pairs of the given names, in their order.

    Raises
    ------
    DataError
        If one is missing.
    """
    by_name = {pair.name: pair for pair in pairs}
    missing = [name for name in names if name not in by_name]
    if missing:
        is_file = Path(missing[0]).stem in by_name
        raise DataError(
            f"{len(missing)} of {len(names)} names are missing, first {missing[0]}"
            + ("; names are without extensions" if is_file else "")
        )
    return [by_name[name] for name in names]


def read_pair(pair: Pair) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Photograph ``(H, W, 3)`` uint8 and mask ``(H, W)`` bool, True = blurred.

    Raises
    ------
    DataError
        If their sizes differ.
    """
    image, mask = io.read_rgb8(pair.image), io.read_mask(pair.mask)
    if image.shape[:2] != mask.shape:
        raise DataError(
            f"{pair.mask}: mask of {mask.shape[0]} x {mask.shape[1]} px for an image of "
            f"{image.shape[0]} x {image.shape[1]} px"
        )
    return image, mask


class DecodedPairs:
    """Pairs decoded once and kept in memory at their own size, 4 bytes a pixel.

    Parameters
    ----------
    pairs
        What to decode; 600 photographs of 640 x 427 px take about 0.7 GB.
    mask_polarity
        What white in the masks means.

    Raises
    ------
    SemanticBlurError
        If a pair cannot be used; of several the first is named.

    Attributes
    ----------
    pairs
        What was decoded; empty where they came from labels.
    names
        One for each image.
    """

    def __init__(
        self, pairs: Sequence[Pair], *, mask_polarity: Literal["blur", "sharp"] = "blur"
    ) -> None:
        # Evaluating maps needs the rest of this module, but not torch's 400 MB.
        import torch

        self.pairs = list(pairs)
        self.names = [pair.name for pair in pairs]
        self._tensors: list[tuple[Tensor, Tensor]] = []
        unusable: list[SemanticBlurError] = []
        for pair in pairs:
            try:
                image, mask = read_pair(pair)
            except SemanticBlurError as error:
                unusable.append(error)
                continue
            mask = mask == (mask_polarity == "blur")
            self._tensors.append(
                (
                    torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
                    torch.from_numpy(mask[None].astype(np.uint8) * 255),
                )
            )
        if len(unusable) == 1:
            raise unusable[0]
        if unusable:
            raise DataError(
                f"{unusable[0]}; {len(unusable)} of {len(pairs)} pairs cannot be used, all of "
                "which `semanticblur-core data check FOLDER` lists"
            )

    def __len__(self) -> int:
        return len(self._tensors)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of names, images and labels, in order."""
        found = hashlib.sha256()
        for name, tensors in zip(self.names, self._tensors, strict=True):
            sums = [zlib.crc32(tensor.numpy().tobytes()) for tensor in tensors]
            found.update(repr((name, sums, [list(tensor.shape) for tensor in tensors])).encode())
        return found.hexdigest()

    @classmethod
    def from_labels(cls, images: Sequence[LabelledImage]) -> Self:
        """Images of which only a part may be labelled."""
        import torch

        made = cls([])
        for item in images:
            rgb = io.as_rgb(io.to_unit_range(item.image, limits=item.value_range, name=item.name))
            if rgb.dtype != np.uint8:
                rgb = np.round(rgb * 255).astype(np.uint8)
            mask = np.stack([item.labels == BLURRED, item.labels > 0]).astype(np.uint8) * 255
            made.names.append(item.name)
            made._tensors.append(
                (
                    torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1))),
                    torch.from_numpy(mask if item.labels.min() == 0 else mask[:1]),
                )
            )
        return made

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image ``(3, H, W)`` uint8 and mask ``(1, H, W)`` uint8, 255 = blurred.

        For a network and a loss of one's own: `semanticblur_core.data.transforms.normalise` gives
        what the network takes, ``mask > 127`` what `semanticblur_core.blur_loss` does.

        Of an image that is labelled in part, ``(2, H, W)``: the second channel is 255 = labelled.
        """
        return self._tensors[index]
