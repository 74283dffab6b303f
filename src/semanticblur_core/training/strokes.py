"""Labels painted on a few images: what is held out, and views of them to train on."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from semanticblur_core import io
from semanticblur_core.config import FinetuneConfig
from semanticblur_core.data.labels import BLURRED, SHARP, UNLABELLED, LabelledImage
from semanticblur_core.data.squash import squash
from semanticblur_core.errors import DataError

N_CELLS = 8
MANY_IMAGES = 8
MOST_VIEWS = 4
_N_DRAWS = 20
_LEAST_LABELLED_SHARE = 0.2

Size = int | Literal["native"]


@dataclass(frozen=True)
class HeldOut:
    """Labels split in two: ``training[i]`` and ``held_out[i]`` are ``(H, W)`` of image i.

    ``how`` says in words what is held out, None if nothing could be.
    """

    training: list[NDArray[np.uint8]]
    held_out: list[NDArray[np.uint8]]
    how: str | None

    @property
    def has_both(self) -> bool:
        """Whether both classes are held out: by one alone, a model that knows no other is best."""
        return _has_both(self.held_out)


def hold_out(images: Sequence[LabelledImage], share: float, rng: np.random.Generator) -> HeldOut:
    """Keep part of the labels for telling whether training helps.

    Whole images that are marked ``val``; or of eight and more images a share of them, planes of one
    stack together; or else a share of the strokes of each class. A stroke is a connected piece of
    one label; large ones are cut by a grid of 8 x 8 cells over the image, so that wholly labelled
    images work too. Of the only stroke of a class, one end is held out.

    Returns
    -------
    HeldOut
        At least one piece of each class is left to train on. Unless images are marked, both classes
        are held out, or none.

    Raises
    ------
    DataError
        If the images that are not marked ``val`` lack a class, or nothing is labelled in those that
        are.
    """
    everything = [image.labels for image in images]
    marked = [i for i, image in enumerate(images) if image.split == "val"]
    if marked:
        split = _whole_images(everything, marked, f"{len(marked)} images marked for validation")
        for code, word in ((SHARP, "sharp (1)"), (BLURRED, "blurred (2)")):
            if not any((labels == code).any() for labels in split.training):
                raise DataError(
                    f"nothing is labelled {word} in the images that are not held out: paint some "
                    "of it there, or hold out fewer"
                )
        if not any(labels.any() for labels in split.held_out):
            raise DataError(
                f"nothing is labelled in the {len(marked)} images marked for validation: paint "
                "there, or hold out others"
            )
        return split
    free = [i for i, image in enumerate(images) if image.split is None]
    stacks = sorted({_stack(images[i]) for i in free})
    if share and len(stacks) >= MANY_IMAGES:
        for _ in range(_N_DRAWS):
            drawn = set(rng.permutation(stacks)[: max(1, round(share * len(stacks)))].tolist())
            chosen = [i for i in free if _stack(images[i]) in drawn]
            split = _whole_images(everything, chosen, f"{len(chosen)} of {len(images)} images")
            if split.has_both and _has_both(split.training):
                return split
    training = [labels.copy() for labels in everything]
    held_out = [np.zeros_like(labels) for labels in everything]
    counts = []
    for code in (SHARP, BLURRED):
        pieces = [(i, piece) for i in free for piece in _pieces(everything[i] == code)]
        order = rng.permutation(len(pieces))
        if len(pieces) == 1:
            [(i, piece)] = pieces
            pieces = [(i, part) for part in _ends(piece)]
            # An end, not a piece between two that are learned from.
            order = np.arange(len(pieces))[:: -1 if rng.integers(2) else 1]
        n_held_out = min(math.ceil(share * len(pieces)), len(pieces) - 1) if share else 0
        for k in order[: max(0, n_held_out)]:
            i, piece = pieces[k]
            training[i][piece] = UNLABELLED
            held_out[i][piece] = code
        counts.append(f"{max(0, n_held_out)} of {len(pieces)}")
    if not _has_both(held_out):
        nothing = [np.zeros_like(labels) for labels in everything]
        return HeldOut([labels.copy() for labels in everything], nothing, None)
    return HeldOut(training, held_out, f"strokes: {counts[0]} sharp, {counts[1]} blurred")


def _whole_images(
    everything: Sequence[NDArray[np.uint8]], chosen: Sequence[int], how: str
) -> HeldOut:
    """Hold out all labels of the chosen images."""
    training, held_out = (
        [
            labels if (i in chosen) == is_held_out else np.zeros_like(labels)
            for i, labels in enumerate(everything)
        ]
        for is_held_out in (False, True)
    )
    return HeldOut(training, held_out, how)


def _stack(image: LabelledImage) -> str:
    """What planes of one stack have in common: ``name`` of ``name[3]``."""
    return re.sub(r"\[[\d, ]+\]$", "", image.name)


def _has_both(parts: Sequence[NDArray[np.uint8]]) -> bool:
    return all(any((part == code).any() for part in parts) for code in (SHARP, BLURRED))


def _ends(piece: tuple[NDArray[np.intp], ...]) -> list[tuple[NDArray[np.intp], ...]]:
    """A stroke in four parts along its longer side; whole if it is a dot."""
    longer = max(piece, key=np.ptp)
    if np.ptp(longer) + 1 < 4:
        return [piece]
    part = (longer - longer.min()) * 4 // (np.ptp(longer) + 1)
    return [tuple(x[part == k] for x in piece) for k in range(4) if (part == k).any()]


def _pieces(mask: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.intp], ...]]:
    """Pixels of each connected piece; those larger than two cells are cut by the grid."""
    height, width = mask.shape
    rows = np.arange(height) * N_CELLS // height
    columns = np.arange(width) * N_CELLS // width
    cells = rows[:, None] * N_CELLS + columns[None]
    connected, n = ndimage.label(mask, structure=np.ones((3, 3)))
    for index, box in enumerate(ndimage.find_objects(connected, n), start=1):
        inside = connected[box] == index
        large = inside.sum() > 2 * mask.size / N_CELLS**2
        parts = cells[box] * inside if large else inside.astype(np.intp)
        keys = np.unique(cells[box][inside]) if large else np.array([1])
        for key in keys:
            y, x = np.nonzero((parts == key) & inside)
            yield y + box[0].start, x + box[1].start


@dataclass(frozen=True)
class View:
    """A square that the network sees: ``image`` ``(3, S, S)`` float32 in 0..1, codes ``(S, S)``.

    ``of`` is the number of the image that it shows.
    """

    image: Tensor
    training: Tensor
    held_out: Tensor
    of: int


def plain_views(
    images: Sequence[LabelledImage], split: HeldOut, size: Size, config: FinetuneConfig
) -> list[View]:
    """The images as the network sees them in use: squashed, or windows at native size.

    Only windows with labels are kept.
    """
    side = config.image_size_px
    views = []
    parts = zip(images, split.training, split.held_out, strict=True)
    for i, (image, training, held_out) in enumerate(parts):
        rgb = io.as_rgb(io.to_unit_range(image.image, limits=image.value_range, name=image.name))
        labels = np.stack([training, held_out])
        if size == "native":
            if min(rgb.shape[:2]) < side:
                raise DataError(
                    f"{image.name}: {rgb.shape[0]} x {rgb.shape[1]} px is less than the "
                    f"{side} x {side} px trained on at native size"
                )
            for rows in _windows(rgb.shape[0], side):
                for columns in _windows(rgb.shape[1], side):
                    part = labels[:, rows, columns]
                    if part.any():
                        views.append(_view(_unit(rgb[rows, columns]), part, i))
        elif labels.any():
            reduced = np.stack([reduce_labels(x, side) for x in labels])
            views.append(_view(squash(rgb, side, side), reduced, i))
    if not _has_both([view.training.numpy() for view in views]):
        raise DataError(
            f"the strokes of a class are thinner than a pixel where the images are squashed to "
            f"{side} px: paint thicker ones, or analyse at a larger size or native"
        )
    return views


def augmented_views(
    views: Sequence[View], n: int, *, crops: bool, rng: np.random.Generator
) -> list[View]:
    """Turned, mirrored, cropped and recoloured copies of views that have labels to train on.

    Cropping enlarges by up to a quarter, as much as leaves sharp what was sharp. There are n, or as
    many as there are views, up to four times n: of each image in turn, the views of one in a
    random order.
    """
    usable = _in_turn([view for view in views if (view.training > 0).any()], rng)
    made = []
    for k in range(max(n, min(len(usable), MOST_VIEWS * n))):
        view = usable[k % len(usable)]
        image, labels = view.image, view.training
        side = image.shape[-1]
        if crops:
            part = round(side * rng.uniform(0.8, 1))
            top, left = (int(v) for v in rng.integers(0, side - part + 1, 2))
            box = (..., slice(top, top + part), slice(left, left + part))
            if (labels[box] > 0).any():
                image = F.interpolate(image[box][None], (side, side), mode="bilinear")[0]
                codes = labels[box][None, None].float()
                labels = F.interpolate(codes, (side, side), mode="nearest-exact")[0, 0].byte()
        turns = int(rng.integers(4))
        image, labels = torch.rot90(image, turns, (-2, -1)), torch.rot90(labels, turns, (-2, -1))
        if rng.random() < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        image = (image * rng.uniform(0.85, 1.15)).clamp(0, 1) ** rng.uniform(0.85, 1.18)
        labels = labels.contiguous()
        made.append(View(image.contiguous(), labels, torch.zeros_like(labels), view.of))
    return made


def _in_turn(views: Sequence[View], rng: np.random.Generator) -> list[View]:
    """A view of each image, then another of each, as long as there are any."""
    seen: dict[int, int] = {}
    turns: list[tuple[int, int, int]] = []
    for k in rng.permutation(len(views)).tolist():
        turns.append((seen.setdefault(views[k].of, 0), len(turns), k))
        seen[views[k].of] += 1
    return [views[k] for _, _, k in sorted(turns)]


def reduce_labels(labels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Labels ``(H, W)`` at ``(side, side)``: the commoner class, where a fifth is labelled.

    Of large images less, so that a stroke of one of their pixels stays.
    """
    shares = torch.from_numpy(np.stack([labels == SHARP, labels == BLURRED])[None]).float()
    antialias = max(labels.shape) > side
    shares = F.interpolate(shares, (side, side), mode="bilinear", antialias=antialias)[0]
    codes = torch.where(shares[1] > shares[0], BLURRED, SHARP)
    least = min(_LEAST_LABELLED_SHARE, 0.49 * side / max(labels.shape))
    codes[shares.sum(dim=0) < least] = UNLABELLED
    return codes.byte().numpy()


def _windows(full: int, side: int) -> list[slice]:
    """As few windows as cover an axis, evenly spread."""
    n = math.ceil(full / side)
    starts = [round(i * (full - side) / max(1, n - 1)) for i in range(n)]
    return [slice(start, start + side) for start in starts]


def _unit(rgb: NDArray[np.float32] | NDArray[np.uint8]) -> NDArray[np.float32]:
    if rgb.dtype == np.uint8:
        return rgb.astype(np.float32) / np.float32(255)
    return rgb.astype(np.float32)


def _view(rgb: NDArray[np.float32], labels: NDArray[np.uint8], of: int) -> View:
    image = torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))
    training, held_out = torch.from_numpy(np.ascontiguousarray(labels))
    return View(image, training, held_out, of)
