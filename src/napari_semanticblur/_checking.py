"""Focus checks in the background: jobs in, planes checked out. No widget here."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_semanticblur._layers import Source, labelled_region
from napari_semanticblur._worker import Announcement, Failure, Run
from semanticblur_core.errors import ImageError, SemanticBlurError
from semanticblur_core.focus.check import FocusOptions
from semanticblur_core.focus.session import ArrayFocus, PlaneChecked
from semanticblur_core.focus.stack import CompositeUpdate, all_in_focus
from semanticblur_core.inference.planes import Channels

if TYPE_CHECKING:
    from semanticblur_core.inference.map_maker import MapMaker

CLASSICAL, NETWORK = "classical", "network"


@dataclass(frozen=True)
class Settings:
    """How focus is measured.

    Attributes
    ----------
    method
        ``network``, a hand-crafted method of `semanticblur_core.focus.classical`, or ``classical``:
        no map, the classical scores alone.
    model, device
        Of the network.
    tile_size_px
        Side of the tiles.
    region
        ``image``, or ``content`` without empty background.
    labels
        Layer of labels: look where it is not 0.
    """

    method: str = NETWORK
    model: str = "default"
    device: str = "auto"
    tile_size_px: int = 64
    region: str = "image"
    labels: Any = None

    @property
    def options(self) -> FocusOptions:
        """For the core."""
        region: Any = self.region
        return FocusOptions(region=region, tile_size_px=self.tile_size_px, thumbnails=True)

    @property
    def key(self) -> tuple[Any, ...]:
        """What the scores depend on."""
        of_network = (_sha256(self.model),) if self.method == NETWORK else ()
        labels = str(self.labels.unique_id) if self.labels is not None else ""
        return (self.method, *of_network, self.tile_size_px, self.region, labels)

    @property
    def said(self) -> dict[str, Any]:
        """For people, by name."""
        of_network = {"model": self.model} if self.method == NETWORK else {}
        region = self.region if self.labels is None else f"labels of {self.labels.name}"
        tiles = {"tiles": f"{self.tile_size_px} px", "region": region}
        return {"method": self.method, **of_network, **tiles}

    @property
    def protocol(self) -> dict[str, Any]:
        """As `semanticblur-core focus calibrate` notes it."""
        options = self.options
        protocol: dict[str, Any] = {"method": self.method}
        if self.method == NETWORK:
            sha256 = _sha256(self.model)
            protocol |= {"model": self.model, "model_sha256": sha256, "size": options.size}
        return protocol | {
            "threshold": options.threshold,
            "region": self.region if self.labels is None else "masks",
            "subject": options.subject,
            "value_range": None,
        }


def _sha256(model: str) -> str:
    from semanticblur_core import weights

    return weights.read_info(weights.resolve(model)).sha256


@dataclass(frozen=True, eq=False)
class Job:
    """Planes of one layer, to be measured for the session that knows it.

    ``prints`` gets, by index, what tells whether the region of a plane is still that.
    """

    source: Source
    session: ArrayFocus
    indices: list[tuple[int, ...]]
    channels: Channels = "each"
    prints: dict[tuple[int, ...], int] = field(default_factory=dict)

    def options(self, settings: Settings) -> FocusOptions:
        """For the core, with the labels of each plane where they are the region."""
        if settings.labels is None:
            return settings.options
        region = labelled_region(self.source, self.source.planes(self.channels), settings.labels)

        def region_of(plane: Any) -> NDArray[np.bool_]:
            found = region(plane.index)
            self.prints[plane.index] = zlib.crc32(np.packbits(found).data)
            return found

        return replace(settings.options, region=region_of)

    def repainted(self, labels: Any) -> list[tuple[int, ...]]:
        """Planes known whose labels are others than when they were measured."""
        region = labelled_region(self.source, self.source.planes(self.channels), labels)
        return [
            index
            for index in self.session.images
            if index in self.prints
            and self.prints[index] != zlib.crc32(np.packbits(region(index)).data)
        ]


class Checking:
    """One run over some planes of some layers.

    Parameters
    ----------
    jobs, settings
        What is measured, and how.
    on_status
        Called in the main thread with a line for people.
    on_plane
        Called in the main thread after every plane, with planes done.
    on_end
        Called once in the main thread with "done", "cancelled" or a `Failure`.

    Attributes
    ----------
    problems
        Of layers that could not be measured, where there are others: these go on.
    unreadable
        Why planes could not be read, one line each.
    """

    def __init__(
        self,
        jobs: list[Job],
        settings: Settings,
        *,
        on_status: Callable[[str], None],
        on_plane: Callable[[int], None],
        on_end: Callable[[str | Failure], None],
    ) -> None:
        self.jobs, self.settings = jobs, settings
        self.n_planes = sum(len(job.indices) for job in jobs)
        self._on_status, self._on_plane = on_status, on_plane
        self._n_done = 0
        self.problems: list[str] = []
        self.unreadable: list[str] = []
        names = ", ".join(job.source.layer.name for job in jobs[:3])
        self._run = Run(
            self._work,
            title=f"Focus quality: {names}",
            n_steps=self.n_planes,
            on_update=self._update,
            on_end=on_end,
            on_cancel=self.cancel,
        )

    def start(self) -> None:
        """Start in the background."""
        self._run.start()

    def cancel(self) -> None:
        """Stop at the next plane; what is done is kept."""
        self._run.cancel()

    @property
    def why_cancelled(self) -> str:
        """See `Run.why_cancelled`."""
        return self._run.why_cancelled

    def _work(self) -> Iterator[Any]:
        settings = self.settings
        detector: MapMaker | None = None
        if settings.method == NETWORK:
            from napari_semanticblur import _models

            if not _models.is_loaded(settings.model, settings.device):
                yield Announcement(
                    "Loading PyTorch and the model; the first time takes a moment ..."
                )
            detector = _models.detector(settings.model, settings.device)
        elif settings.method != CLASSICAL:
            from semanticblur_core.focus.classical import ClassicalDetector

            detector = ClassicalDetector(settings.method)
        for job in self.jobs:
            try:
                with closing(
                    job.session.check(
                        job.source.array,
                        job.source.axes,
                        detector,
                        job.options(settings),
                        indices=job.indices,
                        channels=job.channels,
                    )
                ) as running:
                    for update in running:
                        yield job, update
            except SemanticBlurError as error:
                name = job.source.layer.name
                problem = str(error) if str(error).startswith(name) else f"{name}: {error}"
                self.problems.append(problem)
        if len(self.problems) == len(self.jobs):
            raise ImageError(self.problems[0])

    def _update(self, update: Any) -> int:
        if isinstance(update, Announcement):
            self._on_status(update.text)
            return 0
        job, checked = update
        assert isinstance(checked, PlaneChecked)
        job.session.add(checked)
        if checked.image.error is not None:
            self.unreadable.append(checked.image.error)
        self._n_done += 1
        self._on_plane(self._n_done)
        return self._n_done


def compose(
    source: Source,
    channels: Channels,
    along: str,
    at: tuple[int, ...],
    *,
    on_progress: Callable[[int, int], None],
    on_end: Callable[[str | Failure, CompositeUpdate | None, list[str]], None],
) -> Run:
    """A run that makes the all-in-focus composite of the stack at an index; not started yet.

    ``on_end`` also gets why planes could not be read; these are left out.
    """
    planes = source.planes(channels)
    place = planes.walked_axes.index(along)
    n_planes = planes.lengths[place]
    last: list[CompositeUpdate] = []
    unreadable: list[str] = []

    composite = partial(
        all_in_focus, source.array, source.axes, along=along, at=at, channels=channels
    )

    def work() -> Iterator[CompositeUpdate]:
        try:
            with closing(composite()) as running:
                yield from running
        except ImageError:
            readable = []
            for i in range(n_planes):
                yield CompositeUpdate(i, 2 * n_planes)
                try:
                    planes.view((*at[:place], i, *at[place:])).read()
                except ImageError as error:
                    unreadable.append(str(error))
                else:
                    readable.append(i)
            if not readable or not unreadable:
                raise
            with closing(composite(positions=readable)) as running:
                yield from running

    def update(made: CompositeUpdate) -> int:
        last[:] = [made]
        on_progress(made.n_done, made.n_total)
        return made.n_done

    run = Run(
        work,
        title=f"All in focus: {source.layer.name}",
        n_steps=2 * n_planes,
        on_update=update,
        on_end=lambda outcome: on_end(outcome, last[0] if last else None, unreadable),
        on_cancel=lambda: run.cancel(),
    )
    return run
