"""One annotation: a Labels layer on an image, journaled while it is painted. No widget here.

Its metadata, under the key of `METADATA_KEY`: ``role`` ("annotation"), ``source`` and ``source_id``
(name and id of the image layer), ``store`` (folder or None), ``name`` (in the store, or None),
``journal`` (folder), ``read_only``, and ``split`` ("val", "open" where that was taken back, or
None).
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from napari_semanticblur._annotation_source import (
    AT_ONCE_S,
    annotated_level,
    find_annotation,
    fingerprint,
    is_free_for,
    is_of,
    is_read,
    labels_shape,
    layer_path,
    placement_as_json,
    read_ahead,
    read_pixels,
    require_memory,
    shown_plane,
    shows,
    slug,
)
from napari_semanticblur._colors import BLURRED, SHARP, label_colormap
from napari_semanticblur._labelling import add_labels, set_all
from napari_semanticblur._layers import METADATA_KEY, result_placement
from semanticblur_core.data.autosave import JOURNALS, Autosave, submit, user_journals
from semanticblur_core.data.journal import Leftover, Lock, LockedError, read_leftover, replay
from semanticblur_core.data.labels import Split
from semanticblur_core.data.store import AnnotationStore, is_store, read_array, same_pixels
from semanticblur_core.errors import DataError, ImageError, SemanticBlurError

if TYPE_CHECKING:
    from napari.components import ViewerModel
    from napari.layers import Image, Labels

BRUSH_PX = 15
_live: WeakKeyDictionary[Any, Annotation] = WeakKeyDictionary()


def live_annotation(layer: Labels) -> Annotation | None:
    """The annotation of this program that a layer is of, if it goes on."""
    return _live.get(layer)


@dataclass(frozen=True)
class Outcome:
    """How work in the background ended.

    Attributes
    ----------
    problem
        Empty where all is well.
    is_saved
        Whether labels were saved.
    """

    problem: str
    is_saved: bool


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
    is_of_other_data
        The image was given other data than those painted on: nothing is journaled or saved until
        they are back.
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
        if leftover is not None and self.fingerprint is None:
            self.fingerprint = leftover.facts.get("fingerprint")
        self.polarity: Literal["blur", "sharp"] | None = None
        name = leftover.name if leftover else self._item_name(path)
        self.path = path or (layer_path(image) if image is not None else None)
        shape = labels_shape(self.source) if self.source else leftover.shape if leftover else ()
        require_memory(shape, name)
        layer = None if image is None else find_annotation(viewer, image)
        record = {} if layer is None else layer.metadata[METADATA_KEY]
        if layer is not None:  # it stays where it was begun
            store = Path(record["store"]) if record["store"] else None
        self.store, self.name = store, name
        if store is not None:
            AnnotationStore(store, create=True)
            folder = store / JOURNALS / name
        elif leftover is not None:
            folder = leftover.folder
        elif layer is not None:
            folder = Path(record["journal"])
        else:
            folder = user_journals() / f"{slug(name)}-{secrets.token_hex(4)}"
        self._folder = folder
        # What was recovered belongs to the name that it was painted under.
        self._may_be_renamed = leftover is None
        self.autosave: Autosave | None = None
        self.is_read_only = self.is_of_other_data = self.is_closed = False
        self._is_comparing = False
        # A layer that could be painted on before, a copy for example, may show what nobody saved.
        self._shows_newest = layer is not None and not record.get("read_only")
        self.problem = ""
        self.split: Split | None = None
        self._split_said: Literal["val", "open"] | None = None
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="semanticblur-save")
        self._saving: Future[bool] | None = None
        self._is_over = False
        lock = self._try_to_lock()
        try:
            if store is not None:
                self.split = AnnotationStore(store).split_of(self.name)
            saved, recovered = _read_saved(store, self.name, self._folder, shape)
            self._recovered = recovered if layer is None else None
            if layer is not None and not self._shows_newest:
                layer.data = np.zeros(shape, np.uint8) if saved is None else saved.copy()
            if layer is None:
                # Memory that np.zeros gives costs nothing until it is painted on.
                shown = np.zeros(shape, np.uint8) if saved is None else saved.copy()
                layer = self._add_layer(shown, leftover)
            self.layer: Labels = layer
            self.layer.editable = not self.is_read_only
            self._write_record()
            if lock is not None:
                self._begin(lock, saved)
        except BaseException:
            if lock is not None:
                lock.close(delete=True)
            raise
        self.layer.events.paint.connect(self._painted)
        self.layer.events.set_data.connect(self._drawn)
        self.layer.events.selected_label.connect(self._label_chosen)
        if image is not None:
            image.events.data.connect(self._image_changed)
        _live[self.layer] = self

    @property
    def n_recovered(self) -> int:
        """Strokes that came from the journal of a program that did not end well."""
        return 0 if self._recovered is None else self._recovered.n_strokes

    @property
    def title(self) -> str:
        """Name of the image for people."""
        return self.image.name if self.image is not None else self.name

    @property
    def has_lost_store(self) -> bool:
        """Whether the store was deleted, or its disk unmounted."""
        return self.store is not None and not is_store(self.store)

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
        counts, shape = self.autosave.counts, self.autosave.labels.shape
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
        if self._is_comparing:
            self._compare()
        if self._is_comparing:
            self.problem = f"{self.title}: its new data are being read, to see what was painted on"
            return True
        if self.is_of_other_data:
            self.problem = (
                f"{self.title}: has other data than {self.layer.name} was painted on. Nothing more "
                "is saved until those are back; to paint on these, remove that layer (what was "
                "painted is kept) and press Annotate"
            )
            return False
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
            self.autosave.labels = self.layer.data
            self.autosave.look_everywhere()
        self.problem = ""
        in_depth = self.layer.n_edit_dimensions > 2
        return self.autosave.poll(None if in_depth else shown_plane(self.viewer, self.layer))

    def forget_recovered(self) -> None:
        """Take back, in one step of undo, what was recovered and not painted over since."""
        if self._recovered is None:
            return
        before, recovered = before_and_after(
            self._recovered, self.store, self.name, self.layer.data.shape
        )
        now = self.layer.data
        set_all(self.layer, np.where(now == recovered, before, now))
        self._recovered = None

    def adopt(self, image: Image) -> bool:
        """Take an image where its own is not open (any more); whether it was painted on that.

        One that takes its time to be read is not taken at once.
        """
        if self.image is not None and self.image in self.viewer.layers:
            return False
        with suppress(ImageError):
            source = annotated_level(image)
            read_ahead(source)
            if not is_read(source):
                return False
        if not is_of(image, self.layer.data.shape, self.fingerprint):
            return False
        if self.image is not None:
            self.image.events.data.disconnect(self._image_changed)
        self.image, self.source = image, annotated_level(image)
        image.events.data.connect(self._image_changed)
        self._let_paint(True)
        self._write_record()
        return True

    def hold_out(self, on: bool) -> None:
        """Keep the image out of fine-tuning, to judge by; the store is told in the background.

        Raises
        ------
        DataError
            If the annotation is read-only.
        """
        if self.is_read_only:
            raise DataError(self.problem)
        self.split, self._split_said = ("val", "val") if on else (None, "open")
        self._write_record()
        if self.store is None:
            return
        store = AnnotationStore(self.store)
        self._in_background(partial(store.set_split, self.name, self.split), saves=False)

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
        self.poll()
        if self.autosave is None or self.problem:
            raise DataError(self.trouble)
        self._in_background(self.autosave.save(self._write), saves=True)

    def write_now(self) -> None:
        """Write the labels into the store when saves under way are done; called in a thread.

        Raises
        ------
        SemanticBlurError
            If it is read-only, or cannot be written.
        """
        if self.autosave is None or self.problem:
            raise DataError(self.trouble)
        self._saver.submit(lambda: self._write(np.array(self.layer.data))).result()

    def _in_background(self, run: Callable[[], object], *, saves: bool) -> None:
        """One after the other; how the one before ended is told with this one's end."""
        earlier = self._saving

        def run_in_turn() -> bool:
            run()
            has_saved = earlier is not None and earlier.result()
            return saves or has_saved

        self._saving = submit(self._saver, run_in_turn)

    @property
    def is_saving(self) -> bool:
        """Whether a write to the store is under way, or its outcome was not taken yet."""
        return self._saving is not None

    def take_outcome(self) -> Outcome | None:
        """How a write to the store ended; None while there is nothing new."""
        if self._saving is None or not self._saving.done():
            return None
        done, self._saving = self._saving, None
        error = done.exception()
        if error is not None:
            ours = isinstance(error, SemanticBlurError)
            return Outcome(str(error) if ours else f"{self.title}: {error}", is_saved=False)
        if done.result():
            self._recovered = None
        return Outcome("", is_saved=done.result())

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
        name, lock = self._find_name(folder_store, self.name)
        if isinstance(lock, DataError):
            raise lock
        folder = store / JOURNALS / name
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
        if self._split_said is None:
            self.split = folder_store.split_of(name)
            self._write_record()
        else:
            self.hold_out(self._split_said == "val")
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
            if self.image is not None:
                self.image.events.data.disconnect(self._image_changed)
            if self.is_of_other_data:  # what it holds is saved with the data painted on
                self.problem = ""
            if _live.get(self.layer) is self:
                del _live[self.layer]
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

        self._in_background(finish, saves=True)

    def wait(self) -> None:
        """Wait for saves that are under way."""
        self._saver.shutdown(wait=True)

    def _item_name(self, path: Path | None) -> str:
        name = path.stem if path is not None else self.image.name if self.image else "image"
        return re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", name).lstrip(".") or "image"

    def _find_name(self, store: AnnotationStore, name: str) -> tuple[str, Lock | DataError]:
        """The name, or one with a number where the store has another image of that name.

        With it comes the lock on its journals, or why there is none. The store is looked at under
        the lock: before, somebody else can save another image of the name.
        """
        for number in range(1, 1000):
            candidate = name if number == 1 else f"{name} {number}"
            lock = _lock_or_why(store.folder / JOURNALS / candidate)
            if self.problem and candidate == self.name and not isinstance(lock, Lock):
                return candidate, lock  # as before: not looked at every second
            try:
                if self.source is None or self.fingerprint is None:
                    return candidate, lock
                if is_free_for(store, candidate, self.source, self.fingerprint):
                    return candidate, lock
            except BaseException:
                _let_go(lock)
                raise
            _let_go(lock)
        raise DataError(f"{name}: the store has too many images of that name")

    def _try_to_lock(self) -> Lock | None:
        """The lock on the journals, or None with the reason in `problem`."""
        if self.store is not None and self._may_be_renamed:
            self.name, lock = self._find_name(AnnotationStore(self.store), self.name)
            self._folder = self.store / JOURNALS / self.name
        else:
            lock = _lock_or_why(self._folder)
        if isinstance(lock, Lock):
            return lock
        self.problem = str(lock)
        if isinstance(lock, LockedError):
            self.is_read_only = True
            if f"process {os.getpid()} " in self.problem:
                self.problem = (
                    f"{self.title}: is open in another window or as a restored layer, or still "
                    "being saved"
                )
            self.problem += "; it is shown read-only here until that ends"
        return None

    def _try_to_start(self) -> None:
        """Begin the journal if that is possible by now: there is room, or the other let go."""
        try:
            lock = self._try_to_lock()
        except SemanticBlurError as error:
            self.problem = str(error)
            return
        if lock is None:
            return
        was_read_only = self.is_read_only
        try:
            shape = self.layer.data.shape
            saved, recovered = _read_saved(self.store, self.name, self._folder, shape)
            if was_read_only and not self._shows_newest:  # but what was saved at the opening
                self.layer.data = np.zeros(shape, np.uint8) if saved is None else saved.copy()
                self._recovered = recovered
            if was_read_only and self.store is not None:
                self.split = AnnotationStore(self.store).split_of(self.name)
            self.is_read_only = False
            self._begin(lock, saved)
            self.layer.editable = True
            if was_read_only:
                self.layer.mode = "paint"  # which napari takes from what cannot be edited
        except SemanticBlurError as error:
            lock.close(delete=True)
            self.is_read_only, self.problem = was_read_only, str(error)

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
        autosave = Autosave(
            self._folder, self.layer.data, saved=saved, name=name, facts=facts, lock=lock,
            store=store,
        )  # fmt: skip
        self.autosave, self.name, self.store = autosave, name, store
        self._write_record()
        return autosave

    def _write_record(self) -> None:
        """What others are to know of it, into the layer's metadata."""
        record = {
            "role": "annotation",
            "source": self.title,
            "source_id": str(self.image.unique_id) if self.image is not None else None,
            "store": str(self.store) if self.store else None,
            "name": self.name if self.store else None,
            "journal": str(self._folder),
            "read_only": self.is_read_only,
            "split": self.split or self._split_said,
        }
        self.layer.metadata = {**self.layer.metadata, METADATA_KEY: record}

    def _write(self, labels: NDArray[np.uint8]) -> None:
        """Into the store; called in a thread."""
        assert self.store is not None
        if self.has_lost_store:
            raise DataError(is_gone(self.store))
        store = AnnotationStore(self.store)
        if not labels.any() and store.labels_of(self.name) is None:
            return
        held = store.image_of(self.name)
        if held is not None and self.source is not None and not shows(held, self.source):
            raise DataError(
                f"{held}: is not the image that {self.title} shows, so its labels are not saved "
                "there; move that file away, or fine-tune with another store"
            )
        image = self._image_to_keep() if held is None else None
        axes = self.source.axes if self.source is not None else None
        source = str(self.path) if self.path else self.title
        store.write(
            self.name,
            labels,
            image=image,
            source=source,
            axes=axes,
            polarity=self.polarity,
            split=self._split_said,
            painted_in=str(self._folder),
        )

    def _image_to_keep(self) -> Path | NDArray[Any]:
        """The image's file where it reads as what is shown, otherwise the array."""
        if self.source is None:
            raise DataError(
                f"{self.name}: its image is not open, and the store does not hold it; open it first"
            )
        array = read_pixels(self.source)
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

    def _image_changed(self, event: Any = None) -> None:
        """The image was given data: those that were painted on, or others."""
        assert self.image is not None
        if self.autosave is not None and not self.is_of_other_data:
            self.autosave.finish_looking()  # what was painted until now is of the data before
        with suppress(ImageError):  # of which `is_of` says no
            read_ahead(annotated_level(self.image))
        self._is_comparing = True
        self._compare(AT_ONCE_S)

    def _compare(self, wait_s: float = 0) -> None:
        """Whether the image still is the one that was painted on; not while it is being read."""
        assert self.image is not None
        assert self.source is not None
        with suppress(ImageError):
            if not is_read(annotated_level(self.image), wait_s):
                self._let_paint(False)
                return
        self._is_comparing = False
        is_same = is_of(self.image, labels_shape(self.source), self.fingerprint)
        if is_same:
            self.source = annotated_level(self.image)
        self._let_paint(is_same)

    def _let_paint(self, on: bool) -> None:
        """Go on where the image has the data that were painted on; wait for them where not."""
        if on != self.is_of_other_data:
            return
        self.is_of_other_data = not on
        if not self.is_read_only:
            self.layer.editable = on
            if on:
                self.layer.mode = "paint"  # which napari takes from what cannot be edited
        self.poll()

    def _label_chosen(self, event: Any = None) -> None:
        if self.layer.selected_label > BLURRED:
            self.layer.selected_label = BLURRED


def is_gone(store: Path) -> str:
    """What to say of a store that was there."""
    return f"{store}: is gone; bring it back, or choose another store"


def _lock_or_why(folder: Path) -> Lock | DataError:
    try:
        return Lock(folder)
    except DataError as error:
        return error


def _let_go(lock: Lock | DataError) -> None:
    if isinstance(lock, Lock):
        lock.close(delete=True)


def before_and_after(
    leftover: Leftover, store: Path | None, name: str, shape: tuple[int, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Labels as they were saved, and as unsaved changes leave them.

    Raises
    ------
    DataError
        If they do not fit.
    """
    held = _labels_in(store, name, shape)
    before = np.zeros(shape, np.uint8) if held is None else held
    after = before.copy()
    replay(leftover.changes, after)
    return before, after


def _read_saved(
    store: Path | None, name: str, folder: Path, shape: tuple[int, ...]
) -> tuple[NDArray[np.uint8] | None, Leftover | None]:
    """Labels as they are on the disk, store and journals together; and what is in journals.

    Only under the lock on the folder do they stay so.
    """
    leftover = read_leftover(folder)
    if leftover is None:
        return _labels_in(store, name, shape), None
    return before_and_after(leftover, store, name, shape)[1], leftover


def _labels_in(store: Path | None, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    labels = None if store is None else AnnotationStore(store).labels_of(name)
    if labels is None:
        return None
    if labels.size != np.prod(shape):
        raise DataError(f"{name}: the store's labels of {labels.shape} do not fit {shape}")
    return np.array(labels).reshape(shape)  # a store drops axes of length one
