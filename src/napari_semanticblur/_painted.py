"""What is painted: labels layers and their images, saved into an annotation store."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from napari_semanticblur._colors import BLURRED, UNLABELLED
from napari_semanticblur._layers import METADATA_KEY, Source, is_image, read_source, unwrapped
from semanticblur_core.data.store import AnnotationStore, OtherImageError, read_labels
from semanticblur_core.errors import DataError

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image, Labels

# A stack above that many bytes is not copied into a store, only what is painted of it.
WHOLE_STACK_BYTES = 2**30
# Where a layer was saved by now: from then on its labels are all that count there.
_saved: WeakKeyDictionary[Any, set[tuple[Path, str]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Annotated:
    """A Labels layer and the image that it is painted on."""

    labels: Labels
    source: Source
    store: Path | None
    name: str
    is_annotation: bool


def annotated_layers(viewer: ViewerModel) -> list[Annotated]:
    """Labels layers that may be annotations: marked as such, or of the shape of an image.

    Labels that a detection made are left out.
    """
    layers = [unwrapped(layer) for layer in viewer.layers]
    images = [x for x in layers if is_image(x) and METADATA_KEY not in x.metadata]
    found = []
    for layer in layers:
        if type(layer).__name__ != "Labels":
            continue
        record = layer.metadata.get(METADATA_KEY)
        record = record if isinstance(record, dict) else {}
        is_annotation = record.get("role") == "annotation"
        if record and not is_annotation:
            continue
        source = _source_of(layer, images, record)
        if source is None:
            continue
        store = record.get("store")
        name = record.get("name") or _file_name(source.layer)
        found.append(Annotated(layer, source, Path(store) if store else None, name, is_annotation))
    return found


def _source_of(labels: Labels, images: Sequence[Image], record: dict[str, Any]) -> Source | None:
    """Image, and its level, that labels lie on."""
    fitting = []
    for image in images:
        for level in range(len(image.data) if image.multiscale else 1):
            source = read_source(image, level=level)
            if tuple(source.array.shape[: image.ndim]) == tuple(labels.data.shape):
                fitting.append(source)
    ranks = (
        lambda s: str(s.layer.unique_id) == record.get("source_id"),
        lambda s: s.layer.name == record.get("source"),
        lambda s: labels.name.startswith(s.layer.name),
        lambda s: True,
    )
    return next((source for is_it in ranks for source in fitting if is_it(source)), None)


def _file_name(image: Image) -> str:
    path = image.source.path
    name = Path(path).stem if path else image.name
    return re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", name).lstrip(".") or "image"


def save_layers(chosen: Sequence[Annotated], store: Path | None, fallback: Path) -> Path:
    """Bring the labels of layers into one store; its folder.

    What the store holds of an image from before stays where the layer has no labels.

    Parameters
    ----------
    chosen
        Layers.
    store
        Where to; None takes the first layer's own store, or ``fallback`` where none has one.

    Raises
    ------
    SemanticBlurError
        If labels hold other codes, or the store cannot be written.
    """
    folder = store or next((each.store for each in chosen if each.store), None) or fallback
    if not chosen:
        AnnotationStore(folder)
        return folder
    try:
        target = AnnotationStore(folder, create=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from error
    for each in chosen:
        codes = np.asarray(each.labels.data)
        if codes.size and (codes.min() < 0 or codes.max() > BLURRED):
            raise DataError(
                f"{each.labels.name}: label {codes.max()}; expected 0 = unlabelled, 1 = sharp, "
                "2 = blurred"
            )
        _save_layer(target, each, codes.astype(np.uint8))
    return folder


def _save_layer(target: AnnotationStore, each: Annotated, codes: NDArray[np.uint8]) -> None:
    if each.store == target.folder:
        held = {item.name: item for item in target.items()}.get(each.name)
        if held is not None:
            if not np.array_equal(read_labels(held.labels), codes.squeeze()):
                target.write(each.name, codes)
            return
    source = each.source
    array = source.array
    axes = source.axes
    whole = codes.ndim == 2 or int(np.prod(array.shape)) * array.dtype.itemsize < WHOLE_STACK_BYTES
    if whole:
        array = np.asarray(array)
        if axes.endswith("S"):
            array = array[..., :3]
        _write(target, each, each.name, codes, array, axes, None)
        return
    planes = source.planes()
    limits = planes.estimate_range()
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
    """Under that name, or with a number where the store has another image of the name."""
    source = str(each.source.layer.source.path or each.source.layer.name)
    saved = _saved.setdefault(each.labels, set())
    for number in range(1, 100):
        candidate = name if number == 1 else f"{name} {number}"
        merged = codes
        if (target.folder, candidate) not in saved:
            merged = _with_those_held(target, candidate, codes)
        try:
            target.write(candidate, merged, image=array, source=source, axes=axes, plane=plane)
        except OtherImageError:
            continue
        saved.add((target.folder, candidate))
        return
    raise DataError(f"{name}: {target.folder} has too many images of that name")


def _with_those_held(
    target: AnnotationStore, name: str, codes: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Labels, and where there are none those that the store holds from before."""
    held = target.labels_of(name)
    if held is None or held.squeeze().shape != codes.squeeze().shape:
        return codes
    return np.where(codes == UNLABELLED, held.reshape(codes.shape), codes)


def as_bytes(unit: NDArray[Any]) -> NDArray[np.uint8]:
    """Pixels in 0..1, or uint8 as they are, as uint8."""
    if unit.dtype != np.uint8:
        unit = np.round(np.clip(np.nan_to_num(unit), 0, 1) * 255)
    pixels: NDArray[np.uint8] = unit.astype(np.uint8)
    return pixels
