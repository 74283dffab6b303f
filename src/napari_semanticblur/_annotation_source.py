"""What an annotation needs to know of the image that it is made on."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from napari_semanticblur._layers import (
    Source,
    read_source,
    record_of,
    shown_position,
    unwrapped,
)
from semanticblur_core.data.autosave import JOURNALS
from semanticblur_core.data.journal import read_leftover
from semanticblur_core.data.store import AnnotationStore, read_array, same_pixels
from semanticblur_core.errors import ImageError, SemanticBlurError
from semanticblur_core.inference.planes import why_unreadable
from semanticblur_core.io import without_alpha

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image, Labels

Plane = tuple[int, ...]
# Levels of a multiscale image above that many pixels are not painted on.
MAX_PIXELS = 2**31
# What nobody notices to wait for.
AT_ONCE_S = 0.2
_KEPT_BYTES = 2**26
_readings: WeakKeyDictionary[Image, Reading] = WeakKeyDictionary()


def annotated_level(image: Image) -> Source:
    """The finest level that can be painted on as a whole."""
    n_levels = len(image.data) if image.multiscale else 1
    for level in range(n_levels):
        source = read_source(image, level=level)
        if np.prod(labels_shape(source), dtype=float) <= MAX_PIXELS:
            return source
    return read_source(image, level=n_levels - 1)


def find_annotation(viewer: ViewerModel, image: Image) -> Labels | None:
    """The annotation layer of an image, or None."""
    for layer in viewer.layers:
        record = record_of(layer)
        ours = record.get("role") == "annotation"
        if ours and record.get("source_id") == str(image.unique_id):
            found: Labels = unwrapped(layer)
            return found
    return None


def shown_plane(viewer: ViewerModel, layer: Labels) -> Plane | None:
    """Index of the plane of a layer that is shown; None where none is, or more than one."""
    if tuple(viewer.dims.displayed) != (viewer.dims.ndim - 2, viewer.dims.ndim - 1):
        return None
    plane = tuple(int(p) for p in shown_position(layer, viewer))
    # Beside a longer stack the sliders go on where this one has ended.
    inside = all(0 <= i < n for i, n in zip(plane, layer.data.shape[:-2], strict=True))
    return plane if inside else None


def labels_shape(source: Source) -> tuple[int, ...]:
    """Of the labels: the array's but for the samples of RGB."""
    return tuple(source.array.shape[: len(source.layer_axes)])


def is_free_for(store: AnnotationStore, name: str, source: Source, known_as: str) -> bool:
    """Whether a name in a store is this image's, or nobody's: its image and its journals tell.

    Parameters
    ----------
    store, name
        Where.
    source, known_as
        The image and its `fingerprint`.
    """
    left = read_leftover(store.folder / JOURNALS / name)
    if left is not None and left.facts.get("fingerprint") not in (None, known_as):
        return False
    held = store.image_of(name)
    return held is None or shows(held, source)


def shows(path: Path, source: Source) -> bool:
    """Whether a file holds the source's image, as far as three of its planes tell."""
    try:
        held = read_array(path)
    except SemanticBlurError:
        return False
    shape = source.array.shape
    if source.axes.endswith("S"):
        shape = (*shape[:-1], 3)
    if held.size != np.prod(shape):
        return False
    held = held.reshape(shape)
    return all(same_pixels(held[index], plane) for index, plane in _sampled_planes(source))


def fingerprint(source: Source) -> str:
    """What tells an image from another of its name: a sum over its shape and three planes.

    Of a lazy image it is worked out once, see `read_ahead`.

    Raises
    ------
    ImageError
        If one of the planes cannot be read.
    """
    if isinstance(source.array, np.ndarray):
        return _sum_of(source, _sampled_planes(source))
    reading = _reading_of(source) or read_ahead(source)
    assert reading is not None
    reading.join()
    if reading.error is not None:
        raise reading.error
    return reading.fingerprint


def read_ahead(source: Source) -> Reading | None:
    """Begin to read in a thread what is needed of a lazy image; None of one in memory.

    What could not be read is tried again.
    """
    if isinstance(source.array, np.ndarray):
        return None
    reading = _reading_of(source)
    if reading is None or reading.error is not None:
        reading = _readings[source.layer] = Reading(source)
        reading.start()
    return reading


def is_read(source: Source, wait_s: float = AT_ONCE_S) -> bool:
    """Whether `fingerprint` answers at once, if need be after a short wait."""
    reading = _reading_of(source)
    if reading is None:
        return isinstance(source.array, np.ndarray)
    reading.join(wait_s)
    return not reading.is_alive()


class Reading(threading.Thread):
    """The planes that tell a lazy image from others, as they are read.

    Attributes
    ----------
    array
        What is read.
    fingerprint, error
        The result.
    planes
        Those that were read, where they are small.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(name="semanticblur-read", daemon=True)  # napari is not kept from ending
        self.array = source.array
        self.fingerprint = ""
        self.error: Exception | None = None
        self.planes: list[tuple[Plane, NDArray[Any]]] = []
        self._source: Source | None = source

    def run(self) -> None:
        source, self._source = self._source, None  # which would keep the layer
        assert source is not None
        try:
            planes = list(_read_samples(source))
            self.fingerprint = _sum_of(source, planes)
            if sum(plane.nbytes for _, plane in planes) <= _KEPT_BYTES:
                self.planes = planes
        except Exception as error:
            self.error = error


def _reading_of(source: Source) -> Reading | None:
    reading = _readings.get(source.layer)
    return reading if reading is not None and reading.array is source.array else None


def _sum_of(source: Source, planes: Iterable[tuple[Plane, NDArray[Any]]]) -> str:
    total = hashlib.sha256(f"{labels_shape(source)} {source.array.dtype}".encode())
    for _, plane in planes:
        total.update(np.ascontiguousarray(plane).data)
    return total.hexdigest()


def _sampled_planes(source: Source) -> Iterator[tuple[Plane, NDArray[Any]]]:
    """First, middle and last plane of a stack, the plane of an image; alpha is left out."""
    reading = _reading_of(source)
    if reading is not None and not reading.is_alive() and reading.planes:
        return iter(reading.planes)
    return _read_samples(source)


def _read_samples(source: Source) -> Iterator[tuple[Plane, NDArray[Any]]]:
    lengths = labels_shape(source)[:-2]
    samples = {tuple(int(share * (n - 1)) for n in lengths) for share in (0, 0.5, 1)}
    for index in sorted(samples):
        yield index, without_alpha(read_pixels(source, index))


def read_pixels(source: Source, index: Plane = ()) -> NDArray[Any]:
    """Pixels of a plane, or of the whole array, as they are stored.

    Raises
    ------
    ImageError
        If the array fails to give them.
    """
    try:
        return np.asarray(source.array[index])
    except MemoryError:
        raise
    except Exception as error:  # whatever reads lazily: codecs, networks, a user's function
        why = why_unreadable(source.axes[: len(index)], index, error)
        raise ImageError(f"{source.layer.name}: {why}") from error


def is_of(image: Image, shape: tuple[int, ...], known_as: str | None) -> bool:
    """Whether an image is the one of that `labels_shape` and `fingerprint`; not if unreadable."""
    try:
        source = annotated_level(image)
        return labels_shape(source) == shape and fingerprint(source) == known_as
    except ImageError:
        return False


def layer_path(image: Image) -> Path | None:
    path = image.source.path
    return Path(path) if path else None


def placement_as_json(layer: Labels) -> dict[str, Any]:
    """Transforms that a layer's constructor takes, as JSON values."""
    return {
        "scale": np.asarray(layer.scale).tolist(),
        "translate": np.asarray(layer.translate).tolist(),
        "rotate": np.asarray(layer.rotate).tolist(),
        "shear": np.asarray(layer.shear).tolist(),
        "affine": np.asarray(layer.affine.affine_matrix).tolist(),
        "units": [str(unit) for unit in layer.units],
        "axis_labels": list(layer.axis_labels),
    }


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "image"


def require_memory(shape: tuple[int, ...], name: str) -> None:
    import psutil

    needed, free = 2 * float(np.prod(shape, dtype=float)), psutil.virtual_memory().available
    if needed > 0.8 * free:
        raise ImageError(
            f"{name}: labels of {' x '.join(map(str, shape))} need {needed / 2**30:.1f} GiB of "
            f"memory and {free / 2**30:.1f} are free; annotate a part of it, cropped"
        )
