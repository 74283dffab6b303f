"""Annotation store: a plain folder of images and of labels painted on them.

``STORE/images/<name>.<ext>``, ``STORE/labels/<name>.png`` (``.tif`` for stacks) and
``STORE/dataset.json``. Labels are uint8: 0 = unlabelled, 1 = sharp, 2 = blurred. Files are replaced
as a whole, and what they replace is kept in ``STORE/previous``. Labels that the JSON file does not
know of are read too, so that a folder made by hand is a store.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import time
import unicodedata
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semanticblur_core import disk, io
from semanticblur_core.data.datasets import Pair, list_images
from semanticblur_core.data.journal import Lock, LockedError
from semanticblur_core.data.labels import BLURRED, SHARP, LabelledImage, Split
from semanticblur_core.errors import DataError, SemanticBlurError

FORMAT_VERSION = 1
N_PREVIOUS = 20
# A first save of a large stack over a network takes its time.
_LOCK_WAIT_S = 60.0
_LOCK_NAME = ".lock"
# Files of labels that are tried before a folder without dataset.json is taken for a store.
_N_LOOKED_AT = 5
_NPY = (".npy",)
_LABEL_SUFFIXES = (".png", *io.TIFF_SUFFIXES)


class OtherImageError(DataError):
    """The store holds another image of that name."""


@dataclass(frozen=True)
class Item:
    """What the store knows of one image.

    ``image`` and ``labels`` are files; ``axes`` the image's axis names (``YX``, ``YXS``, ``ZYX``
    ...) but for those of length one; ``plane`` its index in the source it was taken from;
    ``sha256`` that of the image file; ``time`` when labels were last written (ISO 8601, UTC);
    ``polarity`` what white meant in imported masks; ``painted_in`` the folder of the journal whose
    labels they are, all of them.
    """

    name: str
    image: Path
    labels: Path
    source: str = ""
    axes: str = ""
    plane: tuple[int, ...] | None = None
    sha256: str = ""
    time: str = ""
    polarity: str | None = None
    split: Split | None = None
    painted_in: str | None = None


class AnnotationStore:
    """Reads and writes an annotation store.

    Parameters
    ----------
    folder
        The store.
    create
        Make it if it is not there.

    Raises
    ------
    DataError
        If it is not there, or is not a store.
    """

    def __init__(self, folder: str | Path, *, create: bool = False) -> None:
        self.folder = folder = Path(folder)
        if create:
            for name in ("images", "labels"):
                try:
                    (folder / name).mkdir(parents=True, exist_ok=True)
                except (OSError, ValueError) as error:  # a name with a zero byte
                    reason = getattr(error, "strerror", None) or error
                    raise DataError(f"{folder}: cannot be made: {reason}") from error
        if not is_store(folder):
            raise DataError(f"{folder}: no annotation store (no labels and images folder in it)")

    def items(self, on_problem: Callable[[str], None] | None = None) -> list[Item]:
        """Everything that has labels, sorted by name.

        Parameters
        ----------
        on_problem
            Told of each item that cannot be used, which is left out; without it that is raised.

        Raises
        ------
        DataError
            If ``dataset.json`` is damaged or of another version, says something else of an item
            than a store does, or labels have no image.
        """
        index = self._read_index()
        try:
            files = list_images(self.folder / "images", also=_NPY)
        except DataError:
            files = []
        # Of two of a name the first, as in `image_of`.
        images = {_composed(path.stem): path for path in reversed(files)}
        found = []
        label_files = _label_files(self.folder)
        for problem in self._problems_of_splits(index, label_files, images):
            if on_problem is None:
                raise DataError(problem)
            on_problem(problem)
        for path in label_files:
            name = _composed(path.stem)
            try:
                values = self._values_of(index, name)
                if name not in images:
                    raise DataError(f"{path}: no image of that name in {self.folder / 'images'}")
            except DataError as error:
                if on_problem is None:
                    raise
                on_problem(str(error))
                continue
            plane = values.get("plane")
            found.append(
                Item(
                    name=name,
                    image=images[name],
                    labels=path,
                    source=values.get("source") or "",
                    axes=values.get("axes") or "",
                    plane=None if plane is None else tuple(plane),
                    sha256=values.get("sha256") or "",
                    time=values.get("time") or "",
                    polarity=values.get("polarity"),
                    split=values.get("split"),
                    painted_in=values.get("painted_in"),
                )
            )
        return found

    def _problems_of_splits(
        self, index: dict[str, Any], label_files: Sequence[Path], images: Container[str]
    ) -> Iterator[str]:
        """Marks of items that are not there: what was to be held out would be trained on.

        Images may be marked before they are labelled, for nobody trains on them.
        """
        labelled = {_composed(path.stem) for path in label_files}
        for name, values in index["items"].items():
            if name in labelled or not (isinstance(values, dict) and values.get("split")):
                continue
            if name in images or values.get("unlabelled"):
                continue
            without = Path(name).stem in labelled
            hint = "names are without extensions" if without else "rename it or take it out"
            yield (
                f"{self.folder / 'dataset.json'}: {name} is marked {values['split']}, but there "
                f"are no labels of that name; {hint}"
            )

    def write(
        self,
        name: str,
        labels: NDArray[np.uint8],
        *,
        image: Path | NDArray[Any] | None = None,
        source: str | None = None,
        axes: str | None = None,
        plane: Sequence[int] | None = None,
        polarity: Literal["blur", "sharp"] | None = None,
        split: Split | Literal["open"] | None = None,
        painted_in: str | None = None,
    ) -> Path:
        """Write the labels of an image; those they replace are kept.

        Parameters
        ----------
        name
            Name stem of image and labels.
        labels
            uint8 ``(H, W)``, or ``(..., H, W)`` of a stack. Axes of length one before the last two
            are dropped: an image is the same with and without them.
        image
            The image: a file to copy, or an array; of one image, alpha is left out. None when the
            store holds it already.
        source, axes, plane, polarity, split
            See `Item`; None keeps what is known. A split of ``"open"`` forgets it.
        painted_in
            See `Item`; it holds for these labels only.

        Returns
        -------
        Path
            The file of labels.

        Raises
        ------
        OtherImageError
            If the store holds another image of that name.
        DataError
            If the name cannot be a file's, the labels are of another kind or do not fit the image,
            the store holds no image of that name, ``dataset.json`` is damaged, or somebody else has
            kept the store locked.
        ImageError
            If the image cannot be read, or a file cannot be written; the labels before it are
            untouched.
        """
        name = _composed(name)
        if not name or name.startswith(".") or set(name) & set('/\\:*?"<>|\0'):
            raise DataError(f"{name!r}: not a name that a file can have")
        if labels.dtype != np.uint8 or labels.ndim < 2:
            raise DataError(f"{name}: expected labels (..., H, W) of uint8")
        if labels.max(initial=0) > BLURRED:
            where = np.unravel_index(int(labels.argmax()), labels.shape)
            raise DataError(
                f"{name}: label {labels.max()} at {', '.join(map(str, where))}; expected "
                "0 = unlabelled, 1 = sharp, 2 = blurred"
            )
        letters = (axes or "").removesuffix("S")
        if axes and len(letters) == labels.ndim:
            kept = [a for a, n in zip(letters[:-2], labels.shape, strict=False) if n != 1]
            axes = "".join(kept) + axes[labels.ndim - 2 :]
        labels = labels.reshape(_without_ones(labels.shape))
        stacked = labels.ndim > 2
        path = self.folder / "labels" / f"{name}{'.tif' if stacked else '.png'}"
        if isinstance(image, Path) and image.suffix.lower() not in (*io.IMAGE_SUFFIXES, *_NPY):
            image = read_array(image)  # camera raw and the like: its pixels
        if isinstance(image, np.ndarray) and image.shape[:2] == labels.shape:
            image = io.without_alpha(image)  # as it will be read
        with self._locked():
            index = self._read_index()
            values = self._values_of(index, name)
            held = self.image_of(name)
            shown = held if image is None else image
            if shown is None:
                raise DataError(f"{name}: {self.folder} holds no image of that name yet")
            known = axes or values.get("axes") or ""
            shape = _shape_of(shown, known) if isinstance(shown, Path) else shown.shape
            if _is_colour(shape, known, labels.shape) is None:
                raise DataError(
                    f"{name}: labels of shape {labels.shape} for an image of {shape}; give "
                    "one for each pixel"
                )
            if image is not None:
                values["sha256"] = self._put_image(name, image, held)
            if values.pop("painted_in", None):
                # Before the labels: should this end amid it, it does not hold for the new ones.
                self._write_index(index)
            self._keep_previous(path)
            with disk.replacing(path, durable=True) as temporary:
                if stacked:
                    import tifffile

                    tifffile.imwrite(
                        temporary, labels, compression="zlib", photometric="minisblack"
                    )
                else:
                    Image.fromarray(labels).save(temporary, format="PNG")
            for other in _files_of(path.parent, name, _LABEL_SUFFIXES):
                if not other.samefile(path):
                    self._keep_previous(other)
                    other.unlink()
            given = {"source": source, "axes": axes, "polarity": polarity, "split": split}
            given["painted_in"] = painted_in
            given["plane"] = None if plane is None else list(plane)  # type: ignore[assignment]
            values |= {key: value for key, value in given.items() if value is not None}
            if split == "open":
                del values["split"]
            values.pop("unlabelled", None)
            values["time"] = datetime.now(UTC).isoformat(timespec="seconds")
            self._write_index(index)
        return path

    def split_of(self, name: str) -> Split | None:
        """Whether an image is held out; None where nothing is said or there is none."""
        found: Split | None = self._values_of(self._read_index(), name).get("split")
        return found

    def painted_in(self, name: str) -> str | None:
        """See `Item`."""
        found: str | None = self._values_of(self._read_index(), name).get("painted_in")
        return found

    def set_split(self, name: str, split: Split | None) -> None:
        """Say whether an image is held out; it need not have labels yet, or be there.

        Raises
        ------
        DataError
            If ``dataset.json`` is damaged, or somebody else has kept the store locked.
        ImageError
            If it cannot be written.
        """
        with self._locked():
            index = self._read_index()
            values = self._values_of(index, name)
            values.pop("split", None)
            if split is not None:
                values["split"] = split
            values.pop("unlabelled", None)
            if split and not _files_of(self.folder / "labels", name, _LABEL_SUFFIXES):
                values["unlabelled"] = True
            self._write_index(index)

    def previous(self, name: str) -> list[Path]:
        """Kept earlier labels of an image, oldest first; at most the last 20."""
        kept = []
        for path in _starting(self.folder / "previous", f"{name}."):
            stem, _, number = path.stem.rpartition(".")
            if _composed(stem) == _composed(name) and number.isdecimal():
                kept.append((int(number), path))
        return [path for _, path in sorted(kept)]

    def read(self, item: Item) -> list[LabelledImage]:
        """The planes of an item on which anything is labelled; one for a photograph.

        Raises
        ------
        DataError, ImageError
            If a file cannot be read, or image and labels do not fit each other.
        """
        image, labels = read_array(item.image), read_labels(item.labels)
        if not item.axes and labels.ndim == 3 and labels.shape[-1] in (3, 4):
            raise DataError(
                f"{item.labels}: a colour picture of {labels.shape[0]} x {labels.shape[1]} px; "
                "labels are saved as 8-bit grey"
            )
        labels = labels.reshape(_without_ones(labels.shape))
        colour = _is_colour(image.shape, item.axes, labels.shape)
        if colour is None:
            raise DataError(
                f"{item.labels}: labels of shape {labels.shape} for an image of {image.shape}"
            )
        image = image[..., :3].reshape(*labels.shape, 3) if colour else image.reshape(labels.shape)
        # Channels differ in what they show and in how bright it is: each has a range of its own.
        letters = item.axes.removesuffix("S")
        place = letters.find("C") if len(letters) == labels.ndim else -1
        by_channel = 0 <= place < labels.ndim - 2
        ranges = [
            _stack_range(part) if labels.ndim > 2 else None
            for part in (np.moveaxis(image, place, 0) if by_channel else [image])
        ]
        planes = []
        for index in np.ndindex(labels.shape[:-2]):
            if labels[index].any():
                where = f"[{', '.join(map(str, index))}]" if index else ""
                value_range = ranges[index[place] if by_channel else 0]
                planes.append(
                    LabelledImage(
                        item.name + where, image[index], labels[index], value_range, item.split
                    )
                )
        return planes

    def labels_of(self, name: str) -> NDArray[np.uint8] | None:
        """Labels of an image, as they are on the disk; None where there are none.

        Raises
        ------
        DataError
            If the file is damaged or of another kind.
        """
        files = _files_of(self.folder / "labels", name, _LABEL_SUFFIXES)
        return read_labels(_newest(files)) if files else None

    def image_of(self, name: str) -> Path | None:
        """File of the image of that name, or None."""
        files = _files_of(self.folder / "images", name, (*io.IMAGE_SUFFIXES, *_NPY))
        return files[0] if files else None

    def has_labels_of(self, image: Path) -> bool:
        """Whether an image file has labels, under its name or that and a number; pixels tell."""
        folder = self.folder / "labels"
        alike = re.compile(re.escape(_composed(image.stem)) + r"( \d+)?")
        names = {_composed(path.stem) for path in _starting(folder, image.stem)}
        for name in filter(alike.fullmatch, names):
            held = self.image_of(name)
            labels = _files_of(folder, name, _LABEL_SUFFIXES)
            if held is not None and labels and _same_image(held, image):
                return True
        return False

    def _put_image(self, name: str, image: Path | NDArray[Any], held: Path | None) -> str:
        """Copy the image into the store unless it is there; its file's sha256."""
        if isinstance(image, Path):
            target = self.folder / "images" / f"{name}{image.suffix.lower()}"
        else:
            photo = image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2:] == (3,))
            target = self.folder / "images" / f"{name}{'.png' if photo else '.tif'}"
        if held is not None:
            same = (
                _sha256(held) == _sha256(image)
                if isinstance(image, Path)
                else same_pixels(read_array(held), image)
            )
            if not same:
                raise OtherImageError(f"{held}: is another image of that name; choose another name")
            return _sha256(held)
        with disk.replacing(target, durable=True) as temporary:
            if isinstance(image, Path):
                shutil.copyfile(image, temporary)
            elif target.suffix == ".png":
                Image.fromarray(image).save(temporary, format="PNG")
            else:
                import tifffile

                tifffile.imwrite(temporary, image, compression="zlib", photometric="minisblack")
        return _sha256(target)

    def _keep_previous(self, path: Path) -> None:
        if not path.is_file():
            return
        kept = self.previous(path.stem)
        if kept and kept[-1].read_bytes() == path.read_bytes():
            return
        number = int(kept[-1].stem.rpartition(".")[2]) + 1 if kept else 1
        target = self.folder / "previous" / f"{path.stem}.{number:06d}{path.suffix}"
        with disk.replacing(target, durable=True) as temporary:
            shutil.copyfile(path, temporary)
        for old in [*kept, target][:-N_PREVIOUS]:
            old.unlink(missing_ok=True)

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / "dataset.json"
        if not path.exists():
            return {"format_version": FORMAT_VERSION, "items": {}}
        try:
            index = json.loads(path.read_text("utf-8-sig"))
            version, items = index["format_version"], index["items"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: damaged ({error}); without it the labels can still be read: move it away"
            ) from error
        if not isinstance(items, dict):
            raise DataError(f"{path}: items: expected a mapping, got {type(items).__name__}")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}: a store of format version {version}; this release reads {FORMAT_VERSION}"
            )
        named: dict[str, Any] = {}
        for name, values in items.items():
            known = named.setdefault(_composed(name), values)
            if isinstance(known, dict) and isinstance(values, dict):
                known |= values  # of a name in two forms
        return {**index, "items": named}

    def _values_of(self, index: dict[str, Any], name: str) -> dict[str, Any]:
        """What the index says of an image, to be changed in it."""
        values: dict[str, Any] = index["items"].setdefault(_composed(name), {})
        if problem := _problem_of(values):
            raise DataError(f"{self.folder / 'dataset.json'}: {name}: {problem}")
        return values

    def _write_index(self, index: dict[str, Any]) -> None:
        with disk.replacing(self.folder / "dataset.json", durable=True) as temporary:
            temporary.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", "utf-8")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, also of other processes."""
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                lock = Lock(self.folder, _LOCK_NAME)
                break
            except LockedError:
                if time.monotonic() > deadline:
                    raise DataError(
                        f"{self.folder}: another program has been writing to the store for "
                        f"{_LOCK_WAIT_S:.0f} s; try again"
                    ) from None
                time.sleep(0.02)
        try:
            yield
        finally:
            lock.close(delete=True)


def is_store(folder: Path) -> bool:
    """Whether a folder holds images and labels as an annotation store does.

    Without ``dataset.json`` the first file of labels that can be read decides: a data set's
    ``labels`` of 0 and 255 are masks. Others that are no labels are told of when they are used.
    """
    if not ((folder / "labels").is_dir() and (folder / "images").is_dir()):
        return False
    if (folder / "dataset.json").exists():
        return True
    for path in _label_files(folder)[:_N_LOOKED_AT]:
        with suppress(SemanticBlurError):
            pixels = _read_codes(path)
            if pixels.dtype == np.bool_ or {255} <= set(np.unique(pixels).tolist()) <= {0, 255}:
                return False
            read_labels(path)
            return True
    return True


def _label_files(folder: Path) -> list[Path]:
    """One of each name: a writer that was killed may have left an older one beside it."""
    named: dict[str, list[Path]] = {}
    for path in sorted((folder / "labels").iterdir()):
        if path.suffix.lower() in _LABEL_SUFFIXES and not path.name.startswith("."):
            named.setdefault(_composed(path.stem), []).append(path)
    return [_newest(files) for files in named.values()]


def _files_of(folder: Path, name: str, suffixes: Sequence[str]) -> list[Path]:
    """Files of that name and one of the suffixes, however they are capitalised."""
    return [
        path
        for path in _starting(folder, f"{name}.")
        if _composed(path.stem) == _composed(name) and path.suffix.lower() in suffixes
    ]


def _starting(folder: Path, start: str) -> list[Path]:
    """Files of a folder whose names start so, in whatever form of Unicode; none without it."""
    start = _composed(start)
    # Of thousands of files, all of which a folder of images is asked about, paths take too long.
    names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208
    return sorted(folder / name for name in names if _composed(name).startswith(start))


def _newest(files: Sequence[Path]) -> Path:
    return max(files, key=lambda path: path.stat().st_mtime_ns) if len(files) > 1 else files[0]


def read_labels(path: Path) -> NDArray[np.uint8]:
    """Read a file of labels: ``(H, W)`` or ``(..., H, W)`` uint8 of 0, 1 and 2.

    Raises
    ------
    DataError
        If it is not of that kind.
    """
    array = _read_codes(path)
    if array.dtype != np.uint8 or array.ndim < 2 or array.size == 0 or array.max() > BLURRED:
        raise DataError(
            f"{path}: expected 8-bit labels 0 = unlabelled, 1 = sharp, 2 = blurred, got "
            f"{array.dtype} {array.shape}, largest value {array.max(initial=0)}; masks of 0 and "
            "255 go with --masks"
        )
    return array


def _read_codes(path: Path) -> NDArray[Any]:
    """Values of a file of labels; of a PNG with a palette the indices, whatever their colours."""
    if path.suffix.lower() == ".png":
        with suppress(OSError, ValueError), Image.open(path) as opened:  # told of below
            if opened.mode == "P":
                return np.asarray(opened)
    return read_array(path)


def labels_of_mask(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Labels of a mask that is True where blurred: every pixel is labelled."""
    return np.where(mask, np.uint8(BLURRED), np.uint8(SHARP))


def same_pixels(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether arrays are equal but for axes of length one, NaN where the other is NaN too."""
    return np.array_equal(one.squeeze(), other.squeeze(), equal_nan=one.dtype.kind in "fc")


def _same_image(one: Path, other: Path) -> bool:
    """Whether files hold the same image; false where one cannot be read."""
    if one.stat().st_size == other.stat().st_size and _sha256(one) == _sha256(other):
        return True
    try:
        return same_pixels(read_array(one), read_array(other))
    except SemanticBlurError:
        return False


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Lengths of the axes, less those of one before the last two."""
    return (*(n for n in shape[:-2] if n != 1), *shape[-2:])


def _is_colour(shape: tuple[int, ...], axes: str, labelled: tuple[int, ...]) -> bool | None:
    """Whether the last axis of an image is colour; None if labels of that shape do not fit it."""
    colour = axes.endswith("S") or (
        not axes and shape[-1:] in ((3,), (4,)) and _without_ones(shape[:-1]) == labelled
    )
    return colour if _without_ones(shape[:-1] if colour else shape) == labelled else None


def read_store(folder: str | Path) -> list[LabelledImage]:
    """Every image and plane of a store on which anything is labelled.

    Raises
    ------
    DataError
        If there is none, or as in `AnnotationStore`.
    """
    store = AnnotationStore(folder)
    found = [plane for item in store.items() for plane in store.read(item)]
    if not found:
        raise DataError(f"{folder}: nothing in it is labelled yet")
    return found


def _problem_of(values: Any) -> str:
    """What is wrong with what ``dataset.json`` says of an item; empty if nothing is."""
    if not isinstance(values, dict):
        return f"expected a mapping, got {values!r}"
    split, plane = values.get("split"), values.get("plane")
    if split is not None and split not in get_args(Split):
        return f"split: expected {' or '.join(get_args(Split))}, got {split!r}"
    if plane is not None and not (
        isinstance(plane, list) and all(isinstance(i, int) for i in plane)
    ):
        return f"plane: expected a list of whole numbers, got {plane!r}"
    for key in ("source", "axes", "sha256", "time", "polarity", "painted_in"):
        if not isinstance(values.get(key), str | None):
            return f"{key}: expected text, got {values[key]!r}"
    return ""


def labelled_pairs(pairs: Sequence[Pair], *, blurred_is_white: bool = True) -> list[LabelledImage]:
    """Photographs with masks as labelled images; every pixel is labelled."""
    return [
        LabelledImage(
            pair.name,
            io.read_image(pair.image),
            labels_of_mask(io.read_mask(pair.mask) == blurred_is_white),
        )
        for pair in pairs
    ]


def check_store(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What a store holds, a row an item, and what is wrong with it, a line each."""
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    store = AnnotationStore(folder)
    alike: dict[str, str] = {}
    for item in store.items(problems.append):
        try:
            found = _sha256(item.image)
            if item.sha256 and found != item.sha256:
                problems.append(f"{item.image}: changed since it was labelled")
            other = alike.setdefault(found, item.name)
            if other != item.name:
                problems.append(
                    f"{item.image}: the same image as {other}; keep the labels of one of them, or "
                    "models are judged by what they learn from"
                )
            store.read(item)
            labels = read_labels(item.labels)
        except SemanticBlurError as error:
            problems.append(str(error))
            continue
        except OSError as error:
            problems.append(f"{item.image}: cannot be read: {error.strerror or error}")
            continue
        shares = [float((labels == code).mean()) for code in (SHARP, BLURRED)]
        rows.append(
            {
                "name": item.name,
                "shape": list(labels.shape),
                "sharp": shares[0],
                "blurred": shares[1],
                "split": item.split,
                "time": item.time,
            }
        )
    return rows, problems


def read_array(path: Path) -> NDArray[Any]:
    """Read a photograph, or a stack of any number of axes, as the store reads it.

    Raises
    ------
    DataError, ImageError
        If it is missing, damaged or of a format that is not read.
    """
    suffix = path.suffix.lower()
    try:
        disk.require_file(path)
        if suffix == ".npy":
            array: NDArray[Any] = np.load(path, allow_pickle=False)
            return array
        if suffix in io.TIFF_SUFFIXES:
            import tifffile

            stack: NDArray[Any] = np.asarray(tifffile.imread(path))
            return stack if _is_stack(stack.shape) else io.read_image(path)
    except SemanticBlurError:
        raise
    except Exception as error:  # tifffile and its codecs raise many kinds
        raise disk.unreadable(path, error) from error
    return io.read_image(path)


def _shape_of(path: Path, axes: str) -> tuple[int, ...]:
    """The shape of what `read_array` returns, by the file's header where that can be read.

    Of one image it has colours unless the axes say otherwise, to which labels are the same.
    """
    suffix = path.suffix.lower()
    with suppress(Exception):  # of what cannot be read `read_array` says why
        if suffix == ".npy":
            return tuple(np.load(path, mmap_mode="r", allow_pickle=False).shape)
        if suffix in io.TIFF_SUFFIXES:
            with io.open_tiff(path) as tiff:
                shape = tuple(tiff.series[0].shape)
            if _is_stack(shape):
                return shape
            height, width = shape[:2]
        else:
            height, width = io.read_shape(path)
        turned = (width, height) if io.read_orientation(path) >= 5 else (height, width)
        return turned if axes and not axes.endswith("S") else (*turned, 3)
    return read_array(path).shape


def _is_stack(shape: tuple[int, ...]) -> bool:
    return len(shape) > 3 or (len(shape) == 3 and shape[-1] > 4)


def _stack_range(stack: NDArray[Any]) -> tuple[float, float] | None:
    """The limits that `io.to_unit_range` takes, of a whole stack, from a regular sample."""
    if stack.dtype in (np.uint8, np.bool_):
        return None
    # A step that shares a factor with an axis would miss some columns, an even one half of a
    # checkerboard.
    steps = itertools.count(max(1, stack.size // 4_000_000))
    step = next(step for step in steps if math.gcd(step, 2 * stack.size) == 1)
    found = io.robust_limits(stack.reshape(-1)[::step])
    return found if found is not None and found[0] < found[1] else None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _composed(name: str) -> str:
    """A name in one form of Unicode: macOS may have taken its letters and accents apart."""
    return unicodedata.normalize("NFC", name)
