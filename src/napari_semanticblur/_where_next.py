"""Where to annotate next: places of an image and images of a folder, by the model's doubt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from magicgui.widgets import ComboBox, Container, PushButton

from napari_semanticblur import _labelling
from napari_semanticblur._models import recommended
from napari_semanticblur._settings import preferences
from napari_semanticblur._worker import Announcement, Failure, Run
from semanticblur_core.data.labelling import uncertain_places
from semanticblur_core.data.store import read_array
from semanticblur_core.errors import SemanticBlurError

if TYPE_CHECKING:
    from napari.layers import Image, Labels

    from napari_semanticblur._annotation import Annotation

N_LISTED = 10
N_OF_A_PLANE = 3


@dataclass(frozen=True)
class Place:
    """Where to go: an index ``(..., row, column)`` into labels, or the file of an image."""

    where: tuple[int, ...] | Path
    uncertainty: float

    def __str__(self) -> str:
        """One line for people."""
        if isinstance(self.where, Path):
            return f"{self.where.name}: unsure by {self.uncertainty:.0%}"
        *plane, row, column = self.where
        where = f"plane {', '.join(map(str, plane))}, " if plane else ""
        return f"{where}row {row}, column {column}: unsure by {self.uncertainty:.0%}"


class Owner(Protocol):
    """What the ranking takes from the widget that it is a part of."""

    @property
    def is_closed(self) -> bool:
        """Whether it is gone."""
        ...

    def require(self) -> Annotation:
        """What is being painted; an error for people where nothing is."""
        ...

    def with_map(self, action: Callable[[Image], None], *, ranking: bool = False) -> None:
        """Act on the model's map of the image, made first where need be."""
        ...

    @property
    def folder_store(self) -> Any:
        """Where labels of the folder's images are kept; None if no folder is chosen."""
        ...

    def files_without_labels(self) -> list[Path]:
        """Images of the folder that are not labelled."""
        ...

    def sort_files(self, first: Sequence[Path]) -> None:
        """Put these files of the folder first."""
        ...

    def open_file(self, path: Path) -> None:
        """Show a file of the folder."""
        ...

    def go_to(self, index: tuple[int, ...]) -> None:
        """Show a place of the image."""
        ...

    def say(self, text: str) -> None:
        """Tell the user."""
        ...

    def guarded(self, action: Callable[..., object]) -> Callable[..., None]:
        """The action, what it raises told instead."""
        ...


class WhereNext(Container):  # type: ignore[type-arg]
    """Buttons that rank, and the list of what they found.

    Parameters
    ----------
    owner
        The widget that it is a part of.
    """

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._places: list[Place] = []
        self._visited: set[tuple[int, ...]] = set()
        self._annotation: Annotation | None = None
        self._run: Run | None = None
        self._is_silent = False
        self.place_button = PushButton(text="Where next?", tooltip=_PLACE_TIP)
        self.image_button = PushButton(text="Which image next?", tooltip=_IMAGE_TIP)
        self.ranking = ComboBox(choices=self._choices, label="by doubt", nullable=True)
        buttons = Container(
            widgets=[self.place_button, self.image_button], layout="horizontal", labels=False
        )
        super().__init__(widgets=[buttons, self.ranking], labels=False)
        self.margins = (0, 0, 0, 0)
        buttons.margins = (0, 0, 0, 0)
        self.place_button.changed.connect(owner.guarded(self.rank_places))
        self.image_button.changed.connect(owner.guarded(self.rank_images))
        self.ranking.changed.connect(owner.guarded(self._chosen))
        self.ranking.visible = False

    def _choices(self, _: Any) -> list[Place]:
        return list(self._places)

    @property
    def is_running(self) -> bool:
        """Whether it is ranking."""
        return self._run is not None

    def cancel(self, *, silently: bool = False) -> None:
        """Stop ranking; what was found counts, unless silently."""
        self._is_silent = silently
        if self._run is not None:
            self._run.cancel()

    def rank_places(self) -> None:
        """Rank the places of the image, and go to the first that was not visited; again: stop."""
        if self.is_running:
            self.cancel()
        else:
            self._owner.with_map(self._rank_places, ranking=True)

    def _rank_places(self, blur_map: Image) -> None:
        annotation = self._owner.require()
        if annotation is not self._annotation:
            self._annotation, self._visited = annotation, set()
        found: list[Place] = []
        self._start(
            lambda: places_of(annotation.layer, blur_map),
            n_steps=int(np.prod(annotation.layer.data.shape[:-2])),
            on_update=found.extend,
            on_end=lambda: self._go_to_first(found),
        )

    def _go_to_first(self, found: list[Place]) -> None:
        found.sort(key=lambda place: -place.uncertainty)
        self._show(found[:N_LISTED])
        if not found:
            self._owner.say("The model is sure wherever nothing is labelled.")
            return
        new = [place for place in self._places if place.where not in self._visited]
        if not new:
            self._visited.clear()
        self.ranking.value = (new or self._places)[0]

    def rank_images(self) -> None:
        """Rank the images of the folder that have no labels, and open the first; again: stop.

        Raises
        ------
        SemanticBlurError
            If no folder is chosen.
        """
        if self.is_running:
            self.cancel()
            return
        owner = self._owner
        paths = owner.files_without_labels()
        if owner.folder_store is None:
            raise SemanticBlurError("Choose a folder of images first.")
        if not paths:
            owner.say("Every image of the folder has labels.")
            return
        chosen = preferences()
        found: list[Place] = []
        self._start(
            lambda: doubts_of(paths, recommended() or chosen.model, chosen.device),
            n_steps=len(paths),
            on_update=found.append,
            on_end=lambda: self._open_first(found),
        )

    def _open_first(self, found: list[Place]) -> None:
        found.sort(key=lambda place: -place.uncertainty)
        self._owner.sort_files([place.where for place in found if isinstance(place.where, Path)])
        self._show(found[:N_LISTED])
        if found:
            self.ranking.value = found[0]

    def _start(
        self,
        make: Callable[[], Iterator[Any]],
        *,
        n_steps: int,
        on_update: Callable[[Any], None],
        on_end: Callable[[], None],
    ) -> None:
        n_done = 0
        self._is_silent = False

        def update(given: Any) -> int:
            nonlocal n_done
            if isinstance(given, Announcement):
                self._owner.say(given.text)
                return n_done
            n_done += 1
            on_update(given)
            self._owner.say(f"{n_done} of {n_steps} looked at; press again to stop.")
            return n_done

        def ended(outcome: str | Failure) -> None:
            self._run = None
            if self._owner.is_closed or self._is_silent:
                return
            if isinstance(outcome, Failure):
                self._owner.say(outcome.text)
            elif outcome == "cancelled" and not n_done:  # as by a double click
                self._owner.say("Stopped")
            else:  # what was found before a cancel counts
                self._owner.guarded(on_end)()

        self._run = Run(
            make, title="Where to annotate next", n_steps=n_steps, on_update=update,
            on_end=ended, on_cancel=self.cancel,
        )  # fmt: skip
        self._run.start()

    def _show(self, places: list[Place]) -> None:
        with self.ranking.changed.blocked():
            self._places = places
            self.ranking.reset_choices()
            self.ranking.value = None
        self.ranking.visible = bool(places)

    def _chosen(self) -> None:
        place = self.ranking.value
        if place is None:
            return
        if isinstance(place.where, Path):
            self._owner.open_file(place.where)
        else:
            self._visited.add(place.where)
            self._owner.go_to(place.where)
        self._owner.say(f"{place}. Paint what you know.")


def places_of(layer: Labels, blur_map: Image) -> Iterator[list[Place]]:
    """The most uncertain places of each plane of an annotation that a map has."""
    for plane in np.ndindex(layer.data.shape[:-2]):
        blur = _labelling.map_plane(layer, blur_map, plane)
        found = [] if blur is None else uncertain_places(blur, layer.data[plane])
        yield [
            Place((*plane, each.row, each.column), each.uncertainty)
            for each in found[:N_OF_A_PLANE]
        ]


def doubts_of(paths: Sequence[Path], model: str, device: str) -> Iterator[Any]:
    """How unsure a model is of each image as a whole; of a stack, of its middle plane."""
    from napari_semanticblur import _models

    if not _models.is_loaded(model, device):
        yield Announcement("Loading PyTorch and the model; the first time takes a moment ...")
    detector = _models.detector(model, device)
    for path in paths:
        try:
            array = read_array(path)
            while array.ndim > 2 and not (array.ndim == 3 and array.shape[-1] in (3, 4)):
                array = array[len(array) // 2]
            blur = detector.detect(array)
        except SemanticBlurError as error:
            yield Announcement(str(error))
            continue
        yield Place(path, float(1 - np.abs(2 * blur - 1).mean()))


_PLACE_TIP = (
    "Lists the places where the model's map is least sure and nothing is labelled, of all planes, "
    "and goes to the first; pressed again, to the next."
)
_IMAGE_TIP = "Lists the images of the folder without labels by how unsure the model is of them."
