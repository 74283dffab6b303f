"""What is painted: labels layers and their images, saved into an annotation store."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import ReferenceType, WeakKeyDictionary, ref

import numpy as np
from numpy.typing import NDArray

from napari_semanticblur._annotation import live_annotation
from napari_semanticblur._annotation_source import (
    fingerprint,
    is_free_for,
    read_pixels,
    shows,
)
from napari_semanticblur._colors import BLURRED
from napari_semanticblur._layers import (
    METADATA_KEY,
    Source,
    is_image,
    read_source,
    record_of,
    unwrapped,
)
from semanticblur_core.data.autosave import JOURNALS
from semanticblur_core.data.journal import Lock, LockedError
from semanticblur_core.data.store import AnnotationStore, Item, OtherImageError, is_store
from semanticblur_core.errors import DataError, ImageError
from semanticblur_core.inference.planes import QUICK_RANGE_PIXELS

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image, Labels

# A stack above that many bytes is not copied into a store, only what is painted of it.
WHOLE_STACK_BYTES = 2**30
# What of a layer was saved where by now: only what has changed since is new there.
_saved: WeakKeyDictionary[Any, dict[tuple[Path, str], NDArray[np.uint8]]] = WeakKeyDictionary()
# Images that labels were taken to lie on, of several: hiding one later changes nothing.
_guessed: WeakKeyDictionary[Any, ReferenceType[Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Annotated:
    """A Labels layer and the image that it is painted on.

    ``is_annotation`` of a layer that is to be learned from unless somebody says otherwise;
    ``split`` holds the image out, takes that back, or says nothing; ``journal`` is the folder of
    its journal, "" where it has none.
    """

    labels: Labels
    source: Source
    store: Path | None
    name: str
    is_annotation: bool
    split: Literal["val", "open"] | None = None
    journal: str = ""
    is_read_only: bool = False

    @property
    def origin(self) -> str:
        """File of the image, or its name."""
        return str(self.source.layer.source.path or self.source.layer.name)


def annotated_layers(viewer: ViewerModel) -> list[Annotated]:
    """Labels layers that may be annotations: marked as such, or of the shape of an image.

    Labels that a detection made are left out.
    """
    layers = [unwrapped(layer) for layer in viewer.layers]
    images = [x for x in layers if is_image(x) and METADATA_KEY not in x.metadata]
    order = {layer: i for i, layer in enumerate(layers)}
    found = []
    for layer in layers:
        if type(layer).__name__ != "Labels":
            continue
        record = record_of(layer)
        is_annotation = record.get("role") == "annotation"
        if record and not is_annotation:
            continue
        source = _source_of(layer, images, record, order)
        if source is None:
            continue
        store = record.get("store")
        name = record.get("name") or _file_name(source.layer)
        found.append(
            Annotated(
                layer,
                source,
                Path(store) if store else None,
                name,
                is_annotation and not record.get("read_only"),
                split=record.get("split"),
                journal=record.get("journal", ""),
                is_read_only=record.get("read_only", False),
            )
        )
    return found


def _source_of(
    labels: Labels, images: Sequence[Image], record: dict[str, Any], order: dict[Any, int]
) -> Source | None:
    """Image, and its level, that labels lie on; ``order`` is the place of each layer from below."""
    fitting = []
    for image in images:
        for level in range(len(image.data) if image.multiscale else 1):
            with suppress(ImageError):  # it has no pixels
                source = read_source(image, level=level)
                if tuple(source.array.shape[: image.ndim]) == tuple(labels.data.shape):
                    fitting.append(source)
    # Of "img1" and "img10", "img10 - Labels" is of the latter; what is named after neither lies
    # on the image below it, as far as there is one, and sooner on one that is shown.
    by_name = sorted(fitting, key=lambda s: -len(s.layer.name))
    below = sorted(fitting, key=lambda s: (not s.layer.visible, -order.get(s.layer, -1)))
    ranks: tuple[tuple[list[Source], Callable[[Source], bool]], ...] = (
        (fitting, lambda s: str(s.layer.unique_id) == record.get("source_id")),
        (fitting, lambda s: s.layer.name == record.get("source")),
        (by_name, lambda s: labels.name.startswith(s.layer.name)),
        (fitting, lambda s: labels in _guessed and _guessed[labels]() is s.layer),
        (below, lambda s: order.get(s.layer, -1) < order.get(labels, math.inf)),
        (below, lambda _: True),
    )
    chosen = next((source for found, is_it in ranks for source in found if is_it(source)), None)
    if chosen is not None:
        _guessed[labels] = ref(chosen.layer)
    return chosen


def _file_name(image: Image) -> str:
    path = image.source.path
    name = Path(path).stem if path else image.name
    return re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", name).lstrip(".") or "image"


def save_layers(chosen: Sequence[Annotated], store: Path | None, fallback: Path) -> Path:
    """Bring the labels of layers into one store; its folder.

    What the store holds of an image from before stays where the layer has no labels, but for what
    came from the same annotation and was erased since.

    Parameters
    ----------
    chosen
        Layers.
    store
        Where to; None takes the first layer's own store or, where none has one, ``fallback``, with
        a number if strokes on other images are in there: they are not learned from unasked.

    Raises
    ------
    SemanticBlurError
        If labels hold other codes, somebody else is annotating an image of them, or the store
        cannot be written.
    """
    folder = store or next((each.store for each in chosen if each.store), None)
    folder = folder or _folder_for(chosen, fallback)
    if not chosen:
        AnnotationStore(folder)
        return folder
    try:
        target = AnnotationStore(folder, create=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from error
    for each in chosen:
        if each.is_read_only:
            raise DataError(
                f"{each.labels.name}: is read-only here and may be older than what another viewer "
                "has saved; leave it out and choose its store, or close the image there"
            )
        codes = np.asarray(each.labels.data)
        if codes.size and (codes.min() < 0 or codes.max() > BLURRED):
            raise DataError(
                f"{each.labels.name}: label {codes.max()}; expected 0 = unlabelled, 1 = sharp, "
                "2 = blurred"
            )
        _save_layer(target, each, codes.astype(np.uint8))
    return folder


def _folder_for(chosen: Sequence[Annotated], fallback: Path) -> Path:
    """A folder, with a number if need be, that holds no images but those of layers."""
    for number in itertools.count(1):
        folder = fallback if number == 1 else fallback.with_name(f"{fallback.name} {number}")
        if not folder.exists():
            break
        items = AnnotationStore(folder).items() if is_store(folder) else None
        if items is not None and all(any(_is_of(item, x) for x in chosen) for item in items):
            break
    return folder


def _is_of(item: Item, each: Annotated) -> bool:
    """Whether an item of a store shows the image that a layer is painted on."""
    if each.journal and item.painted_in == each.journal:
        return True
    if item.plane is not None:
        return item.source == each.origin
    return shows(item.image, each.source)


def _save_layer(target: AnnotationStore, each: Annotated, codes: NDArray[np.uint8]) -> None:
    annotation = live_annotation(each.labels)
    if annotation is not None and annotation.is_of_other_data:
        raise DataError(annotation.problem)
    own = None if annotation is None else annotation.store
    if annotation is not None and own is not None and own.resolve() == target.folder.resolve():
        annotation.write_now()
        return
    source = each.source
    array = source.array
    axes = source.axes
    whole = codes.ndim == 2 or int(np.prod(array.shape)) * array.dtype.itemsize < WHOLE_STACK_BYTES
    if whole:
        array = read_pixels(source)
        if axes.endswith("S"):
            array = array[..., :3]
        _write(target, each, each.name, codes, array, axes, None)
        return
    planes = source.planes()
    limits = planes.estimate_range(most_pixels=QUICK_RANGE_PIXELS)
    for index in planes.indices():
        if codes[index].any():
            unit = planes.view(index).read_unit(limits=limits)
            name = f"{each.name} {'-'.join(map(str, index))}"
            axes = "YXS" if source.axes.endswith("S") else "YX"
            _write(target, each, name, codes[index], as_bytes(unit), axes, index)


def _write(
    target: AnnotationStore,
    each: Annotated,
    name: str,
    codes: NDArray[np.uint8],
    array: NDArray[Any],
    axes: str,
    plane: tuple[int, ...] | None,
) -> None:
    """Under that name, or with a number where the store has another image of the name.

    The journal's lock keeps those out who annotate the image: they would not see what is written.
    """
    known_as = fingerprint(each.source) if plane is None else ""
    for number in range(1, 100):
        candidate = name if number == 1 else f"{name} {number}"
        if plane is None and not is_free_for(target, candidate, each.source, known_as):
            continue
        try:
            lock = Lock(target.folder / JOURNALS / candidate)
        except LockedError as error:
            raise DataError(
                f"{each.labels.name}: not saved in {target.folder}: {error}; import it "
                "there, or close that annotation"
            ) from error
        try:
            merged = _with_those_held(target, candidate, each, codes)
            target.write(
                candidate,
                merged,
                image=array,
                source=each.origin,
                axes=axes,
                plane=plane,
                split=each.split,
                painted_in=(each.journal or None) if np.array_equal(merged, codes) else None,
            )
        except OtherImageError:
            continue
        finally:
            lock.close(delete=True)
        _saved.setdefault(each.labels, {})[target.folder, candidate] = codes
        return
    raise DataError(f"{name}: {target.folder} has too many images of that name")


def _with_those_held(
    target: AnnotationStore, name: str, each: Annotated, codes: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Labels that the store holds, and what was painted and erased since this layer was saved."""
    held = target.labels_of(name)
    if held is None or held.squeeze().shape != codes.squeeze().shape:
        return codes
    if each.journal and target.painted_in(name) == each.journal:
        return codes
    before = _saved.get(each.labels, {}).get((target.folder, name))
    if before is None or before.shape != codes.shape:
        before = np.zeros_like(codes)
    return np.where(codes == before, held.reshape(codes.shape), codes)


def as_bytes(unit: NDArray[Any]) -> NDArray[np.uint8]:
    """Pixels in 0..1, or uint8 as they are, as uint8."""
    if unit.dtype != np.uint8:
        unit = np.round(np.clip(np.nan_to_num(unit), 0, 1) * 255)
    pixels: NDArray[np.uint8] = unit.astype(np.uint8)
    return pixels
