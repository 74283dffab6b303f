"""One annotation: a Labels layer on an image, journaled while it is painted. No widget here.

Its metadata, under the key of `METADATA_KEY`: ``role`` ("annotation"), ``source`` and ``source_id``
(name and id of the image layer), ``store`` (folder or None), ``name`` (in the store, or None) and
``journal`` (folder).
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from napari_semanticblur._annotation_source import (
    annotated_level,
    find_annotation,
    fingerprint,
    labels_shape,
    layer_path,
    placement_as_json,
    require_memory,
    shown_plane,
    shows,
    slug,
)
from napari_semanticblur._colors import BLURRED, SHARP, label_colormap
from napari_semanticblur._labelling import add_labels, set_all
from napari_semanticblur._layers import METADATA_KEY, result_placement
from semanticblur_core.data.autosave import JOURNALS, Autosave, user_journals
from semanticblur_core.data.journal import Leftover, Lock, LockedError, read_leftover, replay
from semanticblur_core.data.store import AnnotationStore, Split, read_array, same_pixels
from semanticblur_core.errors import DataError, SemanticBlurError

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image, Labels

BRUSH_PX = 15


class Annotation:
    """A Labels layer that is saved while it is painted.

    Parameters
    ----------
    viewer
        Where the layer is, or is to be added.
    image
        Image layer that it belongs to; None where only its journal is left.
    store
        Folder of the annotation store; None keeps the journal in the user's folder.
    path
        File of the image, if it is one.
    leftover
        Unsaved changes outside any store to go on from.

    Attributes
    ----------
    layer
        The Labels layer.
    is_read_only
        Another viewer has the image open: nothing is journaled or saved from here until it lets go.
    is_closed
        It has let go, though strokes may be left to write: see `finish_closing`.
    split
        ``"val"`` where the image is held out of fine-tuning, to judge by.

    Raises
    ------
    SemanticBlurError
        If the image cannot be annotated, or store or journal cannot be used.
    """

    def __init__(
        self,
        viewer: ViewerModel,
        image: Image | None,
        *,
        store: Path | None = None,
        path: Path | None = None,
        leftover: Leftover | None = None,
    ) -> None:
        self.viewer, self.image = viewer, image
        self.source = None if image is None else annotated_level(image)
        self.fingerprint = None if self.source is None else fingerprint(self.source)
        self.polarity: Literal["blur", "sharp"] | None = None
        name = leftover.name if leftover else self._item_name(path)
        self.path = path or (layer_path(image) if image is not None else None)
        shape = labels_shape(self.source) if self.source else leftover.shape if leftover else ()
        require_memory(shape, name)
        layer = None if image is None else find_annotation(viewer, image)
        if layer is not None and store is None and layer.metadata[METADATA_KEY]["store"]:
            store = Path(layer.metadata[METADATA_KEY]["store"])
        self.store, self.name = store, name
        if store is not None:
            store_there = AnnotationStore(store, create=True)
            self.name = leftover.name if leftover else self._free_name(store_there, name)
            folder = store / JOURNALS / self.name
        elif leftover is not None:
            folder = leftover.folder
        elif layer is not None:
            folder = Path(layer.metadata[METADATA_KEY]["journal"])
        else:
            folder = user_journals() / f"{slug(name)}-{secrets.token_hex(4)}"
        self._folder = folder
        self.autosave: Autosave | None = None
        self.is_read_only = self.is_closed = False
        self.problem = ""
        self.split: Split | None = None if store is None else store_there.split_of(self.name)
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="semanticblur-save")
        self._saving: Future[None] | None = None
        self._is_over = False
        lock = self._try_to_lock()
        try:
            saved, recovered = _read_saved(store, self.name, folder, shape)
            self._recovered = recovered if layer is None else None
            if layer is None:
                # Memory that np.zeros gives costs nothing until it is painted on.
                shown = np.zeros(shape, np.uint8) if saved is None else saved.copy()
                layer = self._add_layer(shown, leftover)
            self.layer: Labels = layer
            self.layer.editable = not self.is_read_only
            if lock is not None:
                self._begin(lock, saved)
        except BaseException:
            if lock is not None:
                lock.close(delete=True)
            raise
        self.layer.events.paint.connect(self._painted)
        self.layer.events.set_data.connect(self._drawn)
        self.layer.events.selected_label.connect(self._label_chosen)

    @property
    def n_recovered(self) -> int:
        """Strokes that came from the journal of a program that did not end well."""
        return 0 if self._recovered is None else self._recovered.n_strokes

    @property
    def title(self) -> str:
        """Name of the image for people."""
        return self.image.name if self.image is not None else self.name

    @property
    def trouble(self) -> str:
        """What keeps strokes from being saved, in one line; empty when all is well."""
        if self.problem or self.autosave is None or not self.autosave.error:
            return self.problem
        where = f"Autosave cannot write to {self.autosave.folder}: {self.autosave.error}. "
        if self.is_closed:
            return f"{where}The strokes on {self.title} are in memory; it tries again every second"
        return f"{where}Painting goes on in memory; it tries again every second"

    @property
    def progress(self) -> str:
        """Share labelled, of each class, of the plane shown and of the stack."""
        if self.autosave is None:
            return ""
        counts, shape = self.autosave.counts, self.layer.data.shape
        n_plane = shape[-2] * shape[-1]
        plane = shown_plane(self.viewer, self.layer)
        parts = []
        if plane is not None:
            sharp, blurred = (counts[plane] / n_plane).tolist()
            parts.append(
                f"{'this plane ' if plane else ''}{sharp + blurred:.1%} labelled: "
                f"{sharp:.1%} sharp, {blurred:.1%} blurred"
            )
        if plane != ():
            planes = counts.reshape(-1, 2).sum(axis=1)
            parts.append(
                f"{np.count_nonzero(planes)} of {planes.size} planes, "
                f"{planes.sum() / (n_plane * planes.size):.1%} of all"
            )
        return "; ".join(parts)

    def poll(self) -> bool:
        """Have what was painted journaled; whether planes are left to look at."""
        if self.autosave is None:
            self._try_to_start()
        if self.autosave is None:
            return False
        if self.layer.data is not self.autosave.labels:
            same = self.layer.data.shape == self.autosave.labels.shape
            if not same or self.layer.data.dtype != np.uint8:
                self.problem = (
                    f"{self.layer.name}: was given data of {self.layer.data.shape} "
                    f"{self.layer.data.dtype}; expected {self.autosave.labels.shape} uint8. "
                    "Nothing is saved until it is so again"
                )
                return False
            self.problem = ""
            self.autosave.labels = self.layer.data
            self.autosave.look_everywhere()
        in_depth = self.layer.n_edit_dimensions > 2
        return self.autosave.poll(None if in_depth else shown_plane(self.viewer, self.layer))

    def forget_recovered(self) -> None:
        """Take back, in one step of undo, what was recovered and not painted over since."""
        if self._recovered is None:
            return
        held = None if self.store is None else AnnotationStore(self.store).labels_of(self.name)
        shape = self.layer.data.shape
        before = np.zeros(shape, np.uint8) if held is None else held.reshape(shape)
        recovered = before.copy()
        replay(self._recovered.changes, recovered)
        now = self.layer.data
        set_all(self.layer, np.where(now == recovered, before, now))
        self._recovered = None

    def hold_out(self, on: bool) -> None:
        """Keep the image out of fine-tuning, to judge by; the store is told in the background."""
        self.split = "val" if on else None
        if self.store is None:
            return
        store = AnnotationStore(self.store)
        self._in_background(partial(store.set_split, self.name, self.split))

    def secure(self) -> None:
        """Wait until all that was painted is on the disk.

        Raises
        ------
        DataError
            If it cannot be written.
        """
        if self.is_read_only:
            return
        self.poll()
        if self.problem:
            if self.autosave is None and not self.layer.data.any():
                return
            raise DataError(self.problem)
        if self.autosave is not None:
            self.autosave.finish_looking()
            if not self.autosave.flush(10):
                raise DataError(self.trouble or f"{self.title}: the disk does not answer")

    def save(self) -> None:
        """Write the labels into the store, in the background; `take_outcome` tells the end.

        Raises
        ------
        DataError
            If there is no store.
        """
        if self.store is None:
            raise DataError(f"{self.title}: choose a folder for the store first")
        if self.autosave is None:
            raise DataError(self.trouble)
        self._in_background(self.autosave.save(self._write))

    def _in_background(self, run: Callable[[], object]) -> None:
        """One after the other; a problem of the one before is told with this one's end."""
        earlier = self._saving

        def run_in_turn() -> None:
            run()
            if earlier is not None:
                earlier.result()

        self._saving = self._saver.submit(run_in_turn)

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way, or its outcome was not taken yet."""
        return self._saving is not None

    def take_outcome(self) -> str | None:
        """How a save ended: a problem, or "" where all is well; None while there is nothing new."""
        if self._saving is None or not self._saving.done():
            return None
        error = self._saving.exception()
        self._saving = None
        if error is None:
            self._recovered = None
            return ""
        return str(error) if isinstance(error, SemanticBlurError) else f"{self.title}: {error}"

    def move_to(self, store: Path) -> int:
        """Journal into a store from now on; what was in the user's folder moves there.

        Labels that the store holds of the image are added where none are painted here, in one step
        of undo.

        Returns
        -------
        int
            Pixels that were added.

        Raises
        ------
        SemanticBlurError
            If the store cannot be used. All stays as it was.
        """
        folder_store = AnnotationStore(store, create=True)
        name = self._free_name(folder_store, self.name)
        folder = store / JOURNALS / name
        lock = Lock(folder)
        before, n_added = self.autosave, 0
        place = (self.name, self.store, self._folder, self.layer.metadata)
        self.autosave = None
        try:
            saved, _ = _read_saved(store, name, folder, self.layer.data.shape)
            if saved is not None:
                n_added = add_labels(self.layer, saved)
            self._folder = folder
            moved = self._journal_to(lock, saved, name=name, store=store)
            moved.finish_looking()
            if not moved.flush(10):
                moved.close()
                raise DataError(f"{folder}: cannot be written: {moved.error or 'no answer'}")
        except SemanticBlurError:
            lock.close(delete=True)
            if n_added:
                self.layer.undo()
            self.autosave = before
            self.name, self.store, self._folder, self.layer.metadata = place
            raise
        if before is not None:
            before.discard()
        if self.split is None:
            self.split = folder_store.split_of(name)
        else:
            self.hold_out(self.split == "val")
        return n_added

    def close(self) -> bool:
        """Journal the last strokes, save in the background if there is a store, and let go.

        Returns
        -------
        bool
            Whether that is done; if not, as on a full disk, `finish_closing` tries again.
        """
        if not self.is_closed:
            self.is_closed = True
            self.layer.events.paint.disconnect(self._painted)
            self.layer.events.set_data.disconnect(self._drawn)
            self.layer.events.selected_label.disconnect(self._label_chosen)
        return self.finish_closing()

    def finish_closing(self) -> bool:
        """Try again to write what a closed annotation holds; whether nothing is left."""
        if self._is_over:
            return True
        if self.autosave is None and not self.is_read_only and self.layer.data.any():
            self._try_to_start()
            if self.autosave is None:
                return False
        if self.autosave is not None:
            if self.autosave.labels is self.layer.data:
                self.autosave.finish_looking()
            if not self.autosave.flush():
                return False
            self._end(self.autosave)
        self._is_over, self.autosave, self.is_read_only = True, None, True
        self._saver.shutdown(wait=False)
        return True

    def _end(self, autosave: Autosave) -> None:
        if self.store is None or not autosave.has_unsaved:
            autosave.close()
            return
        run = autosave.save(self._write)

        def finish() -> None:
            try:
                run()
            finally:
                autosave.close()

        self._in_background(finish)

    def wait(self) -> None:
        """Wait for saves that are under way."""
        self._saver.shutdown(wait=True)

    def _item_name(self, path: Path | None) -> str:
        name = path.stem if path is not None else self.image.name if self.image else "image"
        return re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", name).lstrip(".") or "image"

    def _free_name(self, store: AnnotationStore, name: str) -> str:
        """The name, or one with a number where the store has another image of that name."""
        for number in range(1, 1000):
            candidate = name if number == 1 else f"{name} {number}"
            held = store.image_of(candidate)
            if self.source is None:
                return candidate
            left = read_leftover(store.folder / JOURNALS / candidate)
            ours = left is None or left.facts.get("fingerprint") in (None, self.fingerprint)
            if ours and (held is None or shows(held, self.source)):
                return candidate
        raise DataError(f"{name}: the store has too many images of that name")

    def _try_to_lock(self) -> Lock | None:
        """The lock on the journals, or None with the reason in `problem`."""
        try:
            return Lock(self._folder)
        except LockedError as error:
            self.is_read_only = True
            if f"process {os.getpid()} " in str(error):
                self.problem = f"{self.title}: is open in another window, or still being saved"
            else:
                self.problem = str(error)
            self.problem += "; it is shown read-only here until that ends"
        except DataError as error:
            self.problem = str(error)
        return None

    def _try_to_start(self) -> None:
        """Begin the journal if that is possible by now: there is room, or the other let go."""
        lock = self._try_to_lock()
        if lock is None:
            return
        try:
            shape = self.layer.data.shape
            saved, recovered = _read_saved(self.store, self.name, self._folder, shape)
            if self.is_read_only:  # what is shown is as old as the opening
                self.layer.data = np.zeros(shape, np.uint8) if saved is None else saved.copy()
                self._recovered = recovered
            self._begin(lock, saved)
            self.is_read_only = False
            self.layer.editable = True
        except SemanticBlurError as error:
            lock.close(delete=True)
            self.problem = str(error)

    def _begin(self, lock: Lock, saved: NDArray[np.uint8] | None) -> None:
        self._journal_to(lock, saved, name=self.name, store=self.store)
        self.problem = ""

    def _add_layer(self, labels: NDArray[np.uint8], leftover: Leftover | None) -> Labels:
        from napari.layers import Labels

        if self.source is not None:
            placement = result_placement(self.source, [0] * self.source.layer.ndim)
        else:
            placement = dict(leftover.facts.get("placement", {})) if leftover else {}
        layer = Labels(
            labels, name=f"{self.title} annotation", colormap=label_colormap(), opacity=0.5,
            **placement,
        )  # fmt: skip
        self.viewer.add_layer(layer)
        layer.brush_size = BRUSH_PX
        layer.selected_label = SHARP
        layer.mode = "paint"
        return layer

    def _journal_to(
        self,
        lock: Lock,
        saved: NDArray[np.uint8] | None,
        *,
        name: str,
        store: Path | None,
    ) -> Autosave:
        facts: dict[str, Any] = {
            "path": str(self.path) if self.path else None,
            "layer": self.title,
            "fingerprint": self.fingerprint,
            "placement": placement_as_json(self.layer),
        }
        record = {
            "role": "annotation",
            "source": self.title,
            "source_id": str(self.image.unique_id) if self.image is not None else None,
            "store": str(store) if store else None,
            "name": name if store else None,
            "journal": str(self._folder),
        }
        self.layer.metadata = {**self.layer.metadata, METADATA_KEY: record}
        autosave = Autosave(
            self._folder, self.layer.data, saved=saved, name=name, facts=facts, lock=lock
        )
        self.autosave, self.name, self.store = autosave, name, store
        return autosave

    def _write(self, labels: NDArray[np.uint8]) -> None:
        """Into the store; called in a thread."""
        assert self.store is not None
        store = AnnotationStore(self.store, create=True)
        if not labels.any() and store.labels_of(self.name) is None:
            return
        image = None if store.image_of(self.name) else self._image_to_keep()
        axes = self.source.axes if self.source is not None else None
        source = str(self.path) if self.path else self.title
        store.write(
            self.name, labels, image=image, source=source, axes=axes, polarity=self.polarity
        )

    def _image_to_keep(self) -> Path | NDArray[Any]:
        """The image's file where it reads as what is shown, otherwise the array."""
        if self.source is None:
            raise DataError(
                f"{self.name}: its image is not open, and the store does not hold it; open it first"
            )
        array = np.asarray(self.source.array)
        if self.path is not None and self.path.is_file():
            try:
                if same_pixels(read_array(self.path), array):
                    return self.path
            except SemanticBlurError:
                pass
        if self.source.axes.endswith("S"):
            array = array[..., :3]
        return array

    # From napari, in the main thread.

    def _painted(self, event: Any = None) -> None:
        if self.autosave is not None:
            self.autosave.stroke_ended()
            self.autosave.look_everywhere()

    def _drawn(self, event: Any = None) -> None:
        """Undo and redo tell nobody, but they draw."""
        if self.autosave is not None:
            self.autosave.look_everywhere()

    def _label_chosen(self, event: Any = None) -> None:
        if self.layer.selected_label > BLURRED:
            self.layer.selected_label = BLURRED


def _read_saved(
    store: Path | None, name: str, folder: Path, shape: tuple[int, ...]
) -> tuple[NDArray[np.uint8] | None, Leftover | None]:
    """Labels as they are on the disk, store and journals together; and what is in journals.

    Only under the lock on the folder do they stay so.
    """
    labels = None if store is None else AnnotationStore(store).labels_of(name)
    leftover = read_leftover(folder)
    if labels is None and leftover is None:
        return None, None
    if labels is None:
        labels = np.zeros(shape, np.uint8)
    elif labels.size != np.prod(shape):
        raise DataError(f"{name}: the store's labels of {labels.shape} do not fit {shape}")
    labels = np.array(labels).reshape(shape)  # readers of TIFF drop axes of length one
    if leftover is not None:
        replay(leftover.changes, labels)
    return labels, leftover
