"""The widget "Annotate blur": strokes, helps for them, and a folder they are safe in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import numpy as np
from magicgui.types import FileDialogMode
from magicgui.widgets import (
    CheckBox,
    ComboBox,
    FileEdit,
    FloatSlider,
    Label,
    PushButton,
    Slider,
)
from qtpy.QtWidgets import QApplication, QFileDialog

from napari_semanticblur import _labelling
from napari_semanticblur._annotate_tools import Tools
from napari_semanticblur._annotation import (
    BRUSH_PX,
    Annotation,
    Outcome,
    before_and_after,
    is_gone,
)
from napari_semanticblur._annotation_source import (
    Plane,
    annotated_level,
    find_annotation,
    is_read,
    read_ahead,
    shown_plane,
)
from napari_semanticblur._colors import BLURRED, SHARP, UNLABELLED
from napari_semanticblur._detection import Detection, Settings
from napari_semanticblur._dialogs import ask
from napari_semanticblur._dock import Dock, guarded, row, timer, wrap
from napari_semanticblur._layers import (
    METADATA_KEY,
    camera_of,
    find_result,
    source_images,
    unwrapped,
)
from napari_semanticblur._models import recommended
from napari_semanticblur._recovery import Offer, find_offers, image_of, offer, strokes
from napari_semanticblur._settings import preferences
from napari_semanticblur._where_next import WhereNext
from semanticblur_core import io, weights
from semanticblur_core.data.datasets import list_images
from semanticblur_core.data.journal import Leftover
from semanticblur_core.data.store import AnnotationStore, is_store, read_array
from semanticblur_core.errors import DataError, SemanticBlurError

if TYPE_CHECKING:
    from napari.layers import Image, Labels
    from napari.viewer import Viewer

POLL_MS, SOON_MS = 1000, 50
SHOWN, ALL = "the one shown", "all"
MOST_RANKED = 100  # planes that are analysed for "Where next?" unasked
FROM_FILE = "a file ..."
ASK = "choose what it means ..."
MEANINGS = {
    "not 0 (white) = blurred, 0 = sharp": "blur",
    "not 0 (white) = sharp, 0 = blurred": "sharp",
    "1 = sharp, 2 = blurred, 0 = unlabelled": "codes",
}
STACKS = (".npy",)
_opened: list[ReferenceType[AnnotateWidget]] = []


class AnnotateWidget(Dock):
    """Dock widget for labelling what is sharp and what is blurred.

    Parameters
    ----------
    napari_viewer
        Viewer that it belongs to.
    """

    def __init__(self, napari_viewer: Viewer) -> None:
        self.viewer = napari_viewer
        self._annotations: list[Annotation] = []
        self._closing: list[Annotation] = []
        self._paths: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()
        self._found: list[Offer] = []
        self._files: list[Path] = []
        self._file_index = -1
        self._shown_file: Path | None = None  # perhaps of the folder before
        self._told = ""
        self._used: set[Path] = set()  # stores that were there
        self._folder_store: Path | None = None  # chosen by itself, for the folder
        self._detection: Detection | None = None
        self._awaited: Image | None = None  # to be annotated as soon as it is read
        self.is_closed = False
        self.ask = ask

        self.layer = ComboBox(choices=self._images, label="image")
        self.store = FileEdit(
            mode=FileDialogMode.EXISTING_DIRECTORY, nullable=True, value=None, label="store",
            tooltip="Folder that images and labels are saved in, for fine-tuning. Without one, "
            "strokes are kept in your own folder until you choose.",
        )  # fmt: skip
        self.start_button = PushButton(text="Annotate")
        self.save_button = PushButton(text="Save", tooltip="Writes the labels into the store.")
        self.found = ComboBox(choices=self._offers, label="recovered")
        self.restore_button = PushButton(text="Restore")
        self.discard_button = PushButton(
            text="Discard", tooltip="Deletes what is listed for good, after a question."
        )
        self.take_back_button = PushButton(
            text="Take back what was recovered",
            tooltip="Leaves what was painted since. Ctrl+Z brings it back.",
        )
        self.hold_out = CheckBox(text="Hold out", tooltip=_HOLD_OUT_TIP)
        self.sharp_button = PushButton(text="Sharp (S)")
        self.blurred_button = PushButton(text="Blurred (D)")
        self.erase_button = PushButton(text="Erase (U)")
        self.brush = Slider(
            value=BRUSH_PX, min=1, max=200, label="brush (px)",
            tooltip="Q is smaller, W is larger.",
        )  # fmt: skip
        self.polygon_button = PushButton(text="Polygon", tooltip=_POLYGON_TIP)
        self.superpixels = CheckBox(text="Superpixels (G)", tooltip=_SUPERPIXEL_TIP)
        self.superpixel_px = Slider(value=32, min=8, max=200, label="superpixel (px)")
        self.confidence = FloatSlider(
            value=0.9, min=0.5, max=1, step=0.01, label="sure by",
            tooltip="Pixels are labelled where the map is at least that sure; 0.5 takes all.",
        )  # fmt: skip
        self.planes = ComboBox(choices=[SHOWN, ALL], label="planes")
        self.map_button = PushButton(text="Start from the model's map")
        self.fill_sharp_button = PushButton(text="Rest is sharp")
        self.fill_blurred_button = PushButton(text="Rest is blurred")
        self.import_from = ComboBox(choices=self._importable, label="import")
        self.import_meaning = ComboBox(choices=[ASK, *MEANINGS], label="meaning")
        self.import_button = PushButton(text="Import labels")
        self.folder = FileEdit(
            mode=FileDialogMode.EXISTING_DIRECTORY, nullable=True, value=None, label="folder"
        )
        self.previous_button = PushButton(text="Previous (Shift+N)")
        self.next_button = PushButton(text="Next image (N)")
        self.progress = Label(value="")
        self.status = Label(value="Choose an image and press Annotate.")
        self._recovery = row(self.restore_button, self.discard_button)
        self.where_next = WhereNext(self)
        super().__init__(
            widgets=[
                self.layer, self.store, row(self.start_button, self.save_button),
                self.hold_out, self.found, self._recovery, self.take_back_button,
                row(self.sharp_button, self.blurred_button, self.erase_button), self.brush,
                row(self.polygon_button, self.superpixels), self.superpixel_px,
                self.planes, self.confidence, self.map_button, self.where_next,
                row(self.fill_sharp_button, self.fill_blurred_button),
                self.import_from, self.import_meaning, self.import_button,
                self.folder, row(self.previous_button, self.next_button),
                self.progress, self.status,
            ]
        )  # fmt: skip
        self.native.setObjectName("semanticblur-annotate")
        for line in (self.progress, self.status):
            wrap(line)
        self._tools = Tools(self)
        self._adopt()
        # So that what else follows from a choice comes first.
        self._is_typing = False
        self._soon = timer(self.native, self.guarded(self._folder_chosen), SOON_MS, is_single=True)
        self._connect()
        self._timer = timer(self.native, self._tick, POLL_MS)
        self._timer.start()
        app = QApplication.instance()
        if app is not None:
            app.aboutToQuit.connect(self._closed)
        if not self._annotations:
            self._look_for_leftovers()
        self._show_what_applies()

    def _adopt(self) -> None:
        """Take over from a widget of this viewer whose dock was closed; its annotations go on."""
        for other in [each for each in (known() for known in _opened) if each is not None]:
            if not other.is_closed and unwrapped(other.viewer) is unwrapped(self.viewer):
                annotations, closing = other.hand_over()
                self._annotations += annotations
                self._closing += closing
                self.store.value = other.store.value
                self._folder_store = other._folder_store
                self._used |= other._used
                self.folder.value = other.folder.value
                self._files, self._file_index = other._files, other._file_index
                self._shown_file = other._shown_file
                for image, path in other._paths.items():
                    self._paths[image] = path
        _opened[:] = [known for known in _opened if known() is not None]
        _opened.append(ref(self))
        for annotation in self._annotations:
            self._tools.attach(annotation)

    def hand_over(self) -> tuple[list[Annotation], list[Annotation]]:
        """Let go of what is annotated, and of what is being closed, without ending it."""
        self.is_closed = True
        self._timer.stop()
        self._soon.stop()
        self._stop_runs()
        for annotation in self._annotations:
            self._tools.detach(annotation)
        return self._annotations, self._closing

    def _connect(self) -> None:
        for button, action in {
            self.start_button: self.annotate,
            self.save_button: self.save,
            self.restore_button: self.restore,
            self.discard_button: self.discard,
            self.take_back_button: self.take_back,
            self.sharp_button: lambda: self.choose(SHARP),
            self.blurred_button: lambda: self.choose(BLURRED),
            self.erase_button: lambda: self.choose(UNLABELLED),
            self.polygon_button: self.draw_polygon,
            self.map_button: self.start_from_map,
            self.fill_sharp_button: lambda: self.fill_rest(SHARP),
            self.fill_blurred_button: lambda: self.fill_rest(BLURRED),
            self.import_button: self.import_labels,
            self.previous_button: lambda: self.step(-1),
            self.next_button: lambda: self.step(1),
        }.items():
            button.changed.connect(self.guarded(action))
        self.layer.changed.connect(self._layer_chosen)
        self.store.changed.connect(self.guarded(self._store_chosen))
        # What is typed is taken by Enter or by leaving the line, what the dialog gives at once.
        line = self.folder.line_edit.native
        line.textEdited.connect(self._folder_typed)
        line.editingFinished.connect(self._folder_entered)
        self.folder.changed.connect(self._folder_changed)
        self.hold_out.changed.connect(self.guarded(self._hold_out_switched))
        self.brush.changed.connect(self._tools.brush_moved)
        self.superpixels.changed.connect(self._tools.superpixels_switched)
        self.viewer.layers.events.removed.connect(self._layer_removed)
        self.viewer.layers.selection.events.active.connect(self._layer_selected)
        self.native.destroyed.connect(self._closed)
        self.on_taken_out(self._stop_runs)

    def guarded(self, action: Callable[[], Any]) -> Callable[..., None]:
        """An action whose errors are a line."""
        return guarded(action, self.say)

    # What can be chosen.

    def _images(self, _: Any) -> list[Image]:
        return source_images(self.viewer)

    def _importable(self, _: Any) -> list[Any]:
        from napari.layers import Labels

        ours = {id(annotation.layer) for annotation in self._annotations}
        layers = [each for each in map(unwrapped, self.viewer.layers) if id(each) not in ours]
        return [FROM_FILE, *(layer for layer in layers if isinstance(layer, Labels))]

    def _offers(self, _: Any) -> list[tuple[str, int]]:
        # Of equal texts a combo box knows the last one only.
        texts = [offer(leftover) for leftover, _ in self._found]
        numbers = [texts[: i + 1].count(text) for i, text in enumerate(texts)]
        return [
            (f"{text} ({number})" if texts.count(text) > 1 else text, i)
            for i, (text, number) in enumerate(zip(texts, numbers, strict=True))
        ]

    @property
    def current(self) -> Annotation | None:
        """The annotation whose layer is selected, or that of the image chosen."""
        active = unwrapped(self.viewer.layers.selection.active)
        for annotation in self._annotations:
            if annotation.layer is active:
                return annotation
        return self._annotation_of(self.layer.value)

    def _annotation_of(self, image: Image | None) -> Annotation | None:
        for annotation in self._annotations:
            if image is not None and annotation.image is image:
                return annotation
        return None

    @property
    def _store(self) -> Path | None:
        return _folder(self.store)

    def _made_store(self) -> Path | None:
        """The store that is chosen, made if it is new.

        One that was used here and is gone may be on a disk that was unmounted: it is not made anew.
        """
        store = self._store
        if store is None:
            return None
        if store in self._used and not is_store(store):
            raise DataError(is_gone(store))
        AnnotationStore(store, create=True)
        self._used.add(store)
        return store

    def require(self) -> Annotation:
        """The annotation to act on; begun if there is none yet.

        Raises
        ------
        SemanticBlurError
            If there is no image, another viewer has it, or it was given other data.
        """
        annotation = self.current
        if annotation is None:
            self.annotate()
            annotation = self.current
        if annotation is None and self._awaited is not None:
            raise SemanticBlurError(f"{self._awaited.name} is being read: try again when it is.")
        if annotation is None:
            raise SemanticBlurError("Open an image first.")
        if annotation.is_read_only or annotation.is_of_other_data:
            raise SemanticBlurError(annotation.problem)
        return annotation

    # Actions.

    def annotate(self) -> None:
        """Make the annotation layer of the image chosen, or select the one it has.

        Raises
        ------
        SemanticBlurError
            If the image cannot be annotated.
        """
        image = self.layer.value
        if image is None:
            raise SemanticBlurError("Open an image first.")
        annotation = self._annotation_of(image)
        if annotation is None:
            source = annotated_level(image)
            read_ahead(source)
            if not is_read(source):
                self._awaited = image
                self.say(f"Reading {image.name}: it can be painted on when that is done.")
                return
        self._annotate_read(image)

    def _annotate_read(self, image: Image) -> None:
        """As `annotate`, of an image that is read as far as it has to be."""
        annotation = self._annotation_of(image)
        if annotation is None:
            annotation = self._restored_on(image)
        if annotation is None:
            path, store = self._paths.get(image), self._made_store()
            annotation = self._begin(Annotation(self.viewer, image, store=store, path=path))
        self.viewer.layers.selection.active = annotation.layer
        if annotation.is_of_other_data:
            self.say(annotation.problem)

    def _restored_on(self, image: Image) -> Annotation | None:
        """What is here without its image, restored or because that was removed, if this is it."""
        for annotation in self._annotations:
            if annotation.adopt(image):
                return annotation
        return None

    def _begin(self, annotation: Annotation) -> Annotation:
        self._annotations.append(annotation)
        layer = annotation.layer
        self.viewer.layers.selection.active = layer
        self._tools.attach(annotation)
        self.import_from.reset_choices()
        self._look_for_leftovers()
        if annotation.problem:
            self.say(annotation.problem)
        elif annotation.n_recovered:
            self.say(
                f"Recovered {strokes(annotation.n_recovered)} of {annotation.title} that were not "
                "saved."
            )
        else:
            self.say(f"Paint on {annotation.title}: S sharp, D blurred, U erases. All is kept.")
        self._show_what_applies()
        self._tick()
        return annotation

    def save(self) -> None:
        """Write the labels into the store.

        Raises
        ------
        DataError
            If none is chosen.
        """
        annotation = self.require()
        for image in self._images(None):
            if self._annotation_of(image) is None and annotation.adopt(image):
                break
        n_added = 0
        has_none = annotation.store is None or annotation.has_lost_store
        if has_none and self._store not in (None, annotation.store):
            store = self._made_store()
            assert store is not None
            n_added = annotation.move_to(store)
        annotation.save()
        if n_added:
            self.say(
                f"Saving, with {n_added} pixels that {annotation.store} had labelled before. "
                "Ctrl+Z takes them out again."
            )
        else:
            self.say("Saving ...")
        self._timer.start(SOON_MS)

    def choose(self, code: int) -> None:
        """Paint with a class, 0 erases."""
        layer = self.require().layer
        layer.selected_label = code
        if str(layer.mode) not in ("paint", "polygon", "fill") and not self.superpixels.value:
            layer.mode = "paint"

    def draw_polygon(self) -> None:
        """Turn on napari's polygon tool."""
        self.require().layer.mode = "polygon"
        self.say(_POLYGON_TIP)

    def fill_rest(self, code: int) -> None:
        """Label what is unlabelled of the planes shown or of all of them."""
        layer = self.require().layer
        n = _labelling.fill_rest(layer, self._chosen_planes(layer), code)
        self.say(f"{n} pixels labelled. Ctrl+Z takes it back.")
        self._tick()

    def start_from_map(self) -> None:
        """Label where the model is sure, after a detection if there is no map yet."""
        self.with_map(self._start_from_map)

    def _start_from_map(self, blur_map: Image) -> None:
        layer = self.require().layer
        n = _labelling.start_from_map(
            layer, blur_map, self._chosen_planes(layer), confidence=float(self.confidence.value)
        )
        self.say(f"{n} pixels labelled from the map. Ctrl+Z takes it back.")
        self._tick()

    def go_to(self, index: tuple[int, ...]) -> None:
        """Show a pixel of the annotation in the middle."""
        world = self.require().layer.data_to_world(index)
        first = self.viewer.dims.ndim - len(world)
        for axis in range(len(world) - 2):
            self.viewer.dims.set_point(first + axis, world[axis])
        camera_of(self.viewer).center = tuple(world[-2:])

    def with_map(self, action: Callable[[Image], None], *, ranking: bool = False) -> None:
        """Do something with the blur map of the image, after a detection if there is none yet.

        For a ranking all planes are to have one (of long stacks those chosen), of the model that
        was made last.

        Raises
        ------
        SemanticBlurError
            If no image is open.
        """
        annotation = self.require()
        if annotation.image is None or annotation.image not in self.viewer.layers:
            raise SemanticBlurError(f"Open the image of {annotation.layer.name} first.")
        image = annotation.image
        blur_map = find_result(self.viewer, image, "map")
        every = list(np.ndindex(annotation.layer.data.shape[:-2]))
        takes_all = self.planes.value == ALL or (ranking and len(every) <= MOST_RANKED)
        planes = every if takes_all else list(self._chosen_planes(annotation.layer))
        better = recommended() if ranking else None
        has_all = blur_map is not None and all(
            _labelling.map_index(annotation.layer, blur_map, plane) is not None for plane in planes
        )
        if has_all and (better is None or made_by(blur_map, better)):
            action(blur_map)
            return
        if self._detection is not None:
            return
        chosen = preferences()
        settings = Settings(
            better or chosen.model, chosen.device, level=annotated_level(image).level,
            scope="all" if takes_all else "current",
        )  # fmt: skip
        if blur_map is not None and ranking:  # analysed as the user did
            used = blur_map.metadata[METADATA_KEY].get("settings", {})
            settings = replace(settings, size=used.get("size", settings.size))

        def ended() -> None:
            self._detection = None
            made = None if self.is_closed else find_result(self.viewer, image, "map")
            if made is not None and self.current is annotation:
                find_result(self.viewer, image, "labels").visible = False
                self.viewer.layers.selection.active = annotation.layer
                self.guarded(lambda: action(made))()

        self._detection = Detection(self.viewer, image, settings, on_status=self.say, on_end=ended)
        self._detection.start()

    def import_labels(self) -> None:
        """Take over a mask from a file, or another layer of labels."""
        annotation = self.require()
        if self.import_meaning.value == ASK:
            raise SemanticBlurError("Say what the values of the mask mean: it is not guessed.")
        meaning = MEANINGS[self.import_meaning.value]
        if self.import_from.value == FROM_FILE:
            path = self._ask_for_file()
            if path is None:
                return
            array, name = read_array(path), path.name
            if array.ndim == 3 and array.shape[-1] == 3:
                array = io.read_mask(path)
        else:
            array, name = np.asarray(self.import_from.value.data), self.import_from.value.name
        layer = annotation.layer
        codes = _labelling.codes_of(array, meaning)
        n = _labelling.import_labels(layer, shown_plane(self.viewer, layer), codes)
        if meaning != "codes":
            annotation.polarity = "blur" if meaning == "blur" else "sharp"
        self.say(f"{n} pixels changed to those of {name}. Ctrl+Z takes it back.")
        self._tick()

    def _ask_for_file(self) -> Path | None:
        path, _ = QFileDialog.getOpenFileName(
            self.native, "Open a mask", str(Path.home()), "Masks (*.png *.tif *.tiff *.npy *.bmp)"
        )
        return Path(path) if path else None

    # Recovery.

    def _look_for_leftovers(self) -> None:
        self._found, problems = find_offers(self._store)
        for problem in problems:
            self.say(problem)
        self.found.reset_choices()
        if self._found:
            self.found.value = 0
            self.say(f"{offer(self._found[0][0])}: Restore or Discard?")
        self._show_what_applies()

    def restore(self) -> None:
        """Open what was recovered, on its image if that can be found.

        Raises
        ------
        SemanticBlurError
            If it cannot be read or written.
        """
        if self.found.value is None:
            return
        leftover, store = self._found[self.found.value]
        path = Path(leftover.facts["path"]) if leftover.facts.get("path") else None
        image = image_of(leftover, self._images(None))
        note = ""
        if image is None and path is not None and path.is_file():
            image = self._open_unchanged(path, leftover)
            if image is None:
                note = f" {path.name} is no longer the image that was painted on: without it."
        if image is not None and find_annotation(self.viewer, image) is not None:
            self.layer.value = image
            annotation = self.require()
            name, now = leftover.name, annotation.layer.data
            before, after = before_and_after(leftover, store, name, now.shape)
            # What was erased is erased; what was not touched stays as it is here.
            _labelling.set_all(annotation.layer, np.where(after != before, after, now))
            annotation.secure()
            leftover.discard()
            self._tick()
        else:
            self._begin(Annotation(self.viewer, image, store=store, path=path, leftover=leftover))
            if image is not None:
                self.layer.value = image
        self._look_for_leftovers()
        self.say(f"{offer(leftover)}.{note}")

    def _open_unchanged(self, path: Path, leftover: Leftover) -> Image | None:
        """The image, if its file still holds what was painted on."""
        try:
            image = self._open(path)
        except SemanticBlurError:
            return None
        if image_of(leftover, [image]) is not None:
            return image
        self.viewer.layers.remove(image)
        return None

    def discard(self) -> None:
        """Delete the strokes listed, after a question."""
        if self.found.value is None:
            return
        leftover, _ = self._found[self.found.value]
        if self.ask(f"{offer(leftover)}. Delete them for good?"):
            leftover.discard()
            self.say("Discarded.")
        self._look_for_leftovers()

    def take_back(self) -> None:
        """Take what was recovered out of the layer again; what was painted since stays."""
        annotation = self.current
        if annotation is not None:
            annotation.forget_recovered()
            self.say("As it was saved. Ctrl+Z brings the strokes back.")
        self._show_what_applies()

    def _hold_out_switched(self) -> None:
        annotation, on = self.current, bool(self.hold_out.value)
        if annotation is None or (annotation.split == "val") == on:
            return
        try:
            annotation.hold_out(on)
        finally:
            self._show_what_applies()
        if annotation.store is None:
            self._say_split(annotation)
        self._timer.start(SOON_MS)

    def _say_split(self, annotation: Annotation) -> None:
        if annotation.split == "val":
            self.say(f"{annotation.title} is held out: models are judged by it.")
        else:
            self.say(f"{annotation.title} is not held out: models learn from it.")

    # A folder of images.

    def _folder_typed(self) -> None:
        self._is_typing = True

    def _folder_entered(self) -> None:
        if self._is_typing:
            self._is_typing = False
            self._soon.start()

    def _folder_changed(self) -> None:
        if not self._is_typing:
            self._soon.start()

    def _folder_chosen(self) -> None:
        folder = _folder(self.folder)
        if folder is None or self.is_closed:
            return
        if not folder.is_dir():
            self.say(f"{folder}: no such folder.")
            return
        self._files, self._file_index = list_images(folder, also=STACKS), -1
        if self._store in (None, self._folder_store):
            self._folder_store = folder.parent / f"{folder.name} annotations"
            self.store.value = self._folder_store
        self._made_store()
        without = self.files_without_labels()
        self.step(self._files.index(without[0]) + 1 if without else 1)

    @property
    def folder_store(self) -> Path | None:
        """Store of the folder of images that is open; None where none is."""
        return self._store if self._files else None

    def files_without_labels(self) -> list[Path]:
        """Images of the folder that the store has no labels of."""
        folder = self._made_store() if self._files else None
        if folder is None:
            return []
        store = AnnotationStore(folder)
        return [path for path in self._files if not store.has_labels_of(path)]

    def sort_files(self, first: Sequence[Path]) -> None:
        """Put some images of the folder first; the others follow in their order."""
        shown = self._files[self._file_index] if self._file_index >= 0 else None
        self._files = [*first, *(path for path in self._files if path not in first)]
        self._file_index = -1 if shown is None else self._files.index(shown)

    def open_file(self, path: Path) -> None:
        """Open an image of the folder, see `step`."""
        if path in self._files:
            self.step(self._files.index(path) - self._file_index)

    def step(self, by: int) -> None:
        """Open the next image of the folder, or the one before; what is painted is saved.

        Raises
        ------
        SemanticBlurError
            If no folder is chosen, or the image cannot be read.
        """
        if not self._files:
            raise SemanticBlurError("Choose a folder of images first.")
        index = self._file_index + by
        if by == 0:
            return
        if not 0 <= index < len(self._files):
            self.say("That was the last image." if by > 0 else "That was the first image.")
            return
        files = (*self._files, self._shown_file)
        before = [image for image in self._images(None) if self._paths.get(image, "") in files]
        for annotation in self._annotations:
            if annotation.image in before:
                annotation.secure()  # or the layer, about to go, would be all there is of it
        skipped: list[str] = []
        while True:
            try:
                image = self._open(self._files[index])
                break
            except SemanticBlurError as error:
                # One that cannot be read does not stand in the way of the next.
                skipped.append(str(error))
                index += 1 if by > 0 else -1
                if not 0 <= index < len(self._files):
                    raise SemanticBlurError("; ".join(skipped)) from error
        self._file_index, self._shown_file = index, self._files[index]
        self.layer.value = image
        for old in before:
            self._remove(old)
        self.annotate()
        self.viewer.reset_view()
        opened = self._annotation_of(image)
        n_recovered = 0 if opened is None else opened.n_recovered
        self.say(
            f"{self._files[index].name}: {index + 1} of {len(self._files)}"
            + (f", {strokes(n_recovered)} recovered" * bool(n_recovered))
            + "".join(f"; left out: {text}" for text in skipped)
        )

    def _open(self, path: Path) -> Image:
        array = read_array(path)
        rgb = array.ndim > 2 and array.shape[-1] in (3, 4)
        image: Image = unwrapped(self.viewer.add_image(array, rgb=rgb, name=path.stem))
        self._paths[image] = path
        return image

    def _remove(self, image: Image) -> None:
        """Take an image and what was made of it out of the viewer; the annotation is saved."""
        layers = [find_result(self.viewer, image, kind) for kind in ("labels", "map")]
        layers.append(find_annotation(self.viewer, image))
        for layer in (*layers, image):
            if layer is not None:
                self.viewer.layers.remove(layer)

    # What goes on by itself.

    def _tick(self) -> None:
        if self.is_closed:
            return
        soon, news = False, ""
        self._look_at_awaited()
        for annotation in self._annotations:
            was_read_only = annotation.is_read_only
            soon = annotation.poll() or soon
            if was_read_only and not annotation.is_read_only:
                news = f"{annotation.title} can be painted on now."
        for annotation in (*self._annotations, *self._closing):
            outcome = annotation.take_outcome()
            if outcome is not None:
                self._saved(annotation, outcome)
            soon = soon or annotation.is_saving
        # Not all of an annotation may be written yet when its layer is gone: the disk may be full.
        self._closing = [
            each for each in self._closing if not each.finish_closing() or each.is_saving
        ]
        self._tell_problems()
        if news:
            self.say(news)
        current = self.current
        self.progress.value = "" if current is None else current.progress
        self._timer.setInterval(SOON_MS if soon else POLL_MS)

    def _look_at_awaited(self) -> None:
        """Begin what waited for an image to be read, if that is still the one that is wanted."""
        image = self._awaited
        if image is None:
            return
        if image is not self.layer.value:
            self._awaited = None
        elif is_read(annotated_level(image), 0):
            self._awaited = None
            self.guarded(lambda: self._annotate_read(image))()

    def _saved(self, annotation: Annotation, outcome: Outcome) -> None:
        from napari.utils.notifications import show_error

        if outcome.problem:
            show_error(outcome.problem)
            self.say(f"{outcome.problem}. What is painted is kept; save again.")
        elif annotation in self._annotations:
            if outcome.is_saved:
                stays = self._store not in (None, annotation.store)
                self.say(
                    f"Saved {annotation.name} in {annotation.store}."
                    + f" It stays there: {self._store} is for what is begun now." * stays
                )
            else:
                self._say_split(annotation)
            self._show_what_applies()

    def _tell_problems(self) -> None:
        from napari.utils.notifications import show_warning

        everything = (*self._annotations, *self._closing)
        problems = [annotation.trouble for annotation in everything if annotation.trouble]
        text = problems[0] if problems else ""
        if text == self._told:
            return
        self._told = text
        if text:
            self.say(text)
            show_warning(text)
            return
        saved = self.status.value if self.status.value.startswith("Saved ") else ""
        self.say(f"{saved} Autosave works again; nothing that was painted is lost.".lstrip())

    def _layer_removed(self, event: Any) -> None:
        removed = unwrapped(event.value)
        for annotation in self._annotations:
            if annotation.layer is removed:
                self._annotations.remove(annotation)
                self._tools.detach(annotation)
                annotation.close()
                self._closing.append(annotation)
                self._timer.start(SOON_MS)
                if annotation.store is None:
                    self._look_for_leftovers()
                self._show_what_applies()
                break

    def _closed(self, *_: Any) -> None:
        """Qt's side of this is gone, or will be: journal the last strokes."""
        if self.is_closed:
            return
        self.is_closed = True
        self._stop_runs()
        for annotation in (*self._annotations, *self._closing):
            annotation.close()

    def _stop_runs(self) -> None:
        """End analyses; what is painted goes on being kept, also while no dock shows this."""
        if self._detection is not None:
            self._detection.cancel()
        self.where_next.cancel(silently=True)

    def _layer_chosen(self, *_: Any) -> None:
        if self.is_closed:
            return
        image, before = self.layer.value, self.current
        if image is not None and before is not None and before.image is not image:
            chosen = self._annotation_of(image)
            self.viewer.layers.selection.active = chosen.layer if chosen else image
        self._show_what_applies()
        self._tick()

    def _layer_selected(self, *_: Any) -> None:
        """The layer list leads: the image of a selected annotation is the one chosen."""
        if self.is_closed:
            return
        annotation = self.current
        if annotation is not None and annotation.image in self.layer.choices:
            self.layer.value = annotation.image
        self._show_what_applies()

    def _store_chosen(self) -> None:
        """Only looks: while a path is typed, each letter is a choice."""
        if self._store is not None and is_store(self._store):
            self._used.add(self._store)
        if self._store is None or self._store.is_dir():
            self._look_for_leftovers()

    def say(self, text: str) -> None:
        """Show a line for people."""
        if not self.is_closed:
            self.status.value = text

    def _show_what_applies(self) -> None:
        annotation = self.current
        self.take_back_button.visible = annotation is not None and annotation.n_recovered > 0
        self.found.visible = self._recovery.visible = bool(self._found)
        self.hold_out.visible = annotation is not None
        self.hold_out.value = annotation is not None and annotation.split == "val"
        image = self.layer.value
        self.planes.visible = image is not None and image.ndim > 2

    def _chosen_planes(self, layer: Labels) -> Iterator[Plane]:
        if layer.ndim == 2 or self.planes.value == ALL:
            return iter(np.ndindex(layer.data.shape[:-2]))
        return iter([_labelling.require_plane(layer, shown_plane(self.viewer, layer))])


def made_by(blur_map: Image, model: str) -> bool:
    """Whether a result is of this very version of a model."""
    digest = weights.read_info(weights.resolve(model)).sha256
    return bool(blur_map.metadata[METADATA_KEY].get("model_sha256") == digest)


def _folder(edit: FileEdit) -> Path | None:
    """What is chosen; an empty line is nothing."""
    value = edit.value
    return Path(value) if isinstance(value, Path) and str(value) not in ("", ".") else None


_POLYGON_TIP = "Click the corners; Enter or a double click closes the polygon, Escape drops it."
_SUPERPIXEL_TIP = "A click labels the region of alike pixels around it; a drag moves the view."
_HOLD_OUT_TIP = "Fine-tuning does not learn from this image but judges models by it."
