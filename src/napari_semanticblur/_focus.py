"""The widget "Focus quality"."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from magicgui.widgets import (
    CheckBox,
    ComboBox,
    FloatSpinBox,
    Label,
    ProgressBar,
    PushButton,
    SpinBox,
)

from napari_semanticblur._checking import CLASSICAL, NETWORK, Checking, Job, Settings, compose
from napari_semanticblur._dock import Dock, complain, guarded, row, timer, wrap
from napari_semanticblur._focus_layers import look_at_tile, show_composite, show_heat_map
from napari_semanticblur._focus_plot import FocusPlot
from napari_semanticblur._focus_rows import (
    SCORE_NAMES,
    TILE_HEADERS,
    PlaneRows,
    tile_rows,
)
from napari_semanticblur._focus_sessions import Sessions
from napari_semanticblur._focus_table import FocusTable, Row
from napari_semanticblur._layers import (
    Source,
    coarse_level,
    plane_index,
    read_source,
    show_plane,
    source_images,
    unwrapped,
)
from napari_semanticblur._models import models
from napari_semanticblur._settings import preferences
from napari_semanticblur._worker import Failure, Run
from semanticblur_core import weights
from semanticblur_core.errors import ImageError, SemanticBlurError
from semanticblur_core.focus import calibration
from semanticblur_core.focus.calibration import Gate
from semanticblur_core.focus.scores import HIGHER_IS_SHARPER, MAP_SCORES
from semanticblur_core.focus.session import ArrayFocus, focus_axis

if TYPE_CHECKING:
    from napari.layers import Image
    from napari.viewer import Viewer

METHODS = {
    "network": NETWORK,
    "classical scores, no map": CLASSICAL,
    "HiFST": "hifst",
    "local binary patterns": "lbp",
    "spectrum and gradients": "dbdf",
}
CURRENT, ALL, LAYERS = "the one shown", "all of this layer", "shown one of every layer"
# Scores from 0 to 1 whose middle is a limit that makes sense.
BOUNDED = (*MAP_SCORES, "blur_effect")
EVERYWHERE, CONTENT = "the whole image", "content only"
NO_GATE, LIMIT = "none", "limit:"
PLANES, TILES = "layers and planes", "tiles of the plane shown"
# A level of a multiscale layer is measured that has about the pixels of a photograph.
LEVEL_SIDE_PX = 1024
_REFRESH_MS = 200
_SHOWN = "What is shown was measured with"


class FocusWidget(Dock):
    """Dock widget that says what is in focus, in layers, planes and tiles.

    Parameters
    ----------
    napari_viewer
        Viewer that it belongs to.
    """

    def __init__(self, napari_viewer: Viewer) -> None:
        self._viewer = napari_viewer
        self._sessions = Sessions()
        self._checking: Checking | None = None
        self._composing: Run | None = None
        self._composed: Image | None = None
        self._stopped_because = ""
        self._changed: set[Any] = set()
        self._rows = PlaneRows()
        self._channels: list[Any] = ["each"]
        self._limit_for = ""
        self._problems: list[str] = []
        self._is_closed = False
        chosen = preferences()
        self.layer = ComboBox(choices=self._images, label="image")
        self.method = ComboBox(
            choices=list(METHODS), value="network", label="method", tooltip=_METHOD_TIP
        )
        self.model = ComboBox(choices=self._models, label="model")
        if chosen.model in self.model.choices:
            self.model.value = chosen.model
        self.planes = ComboBox(choices=[CURRENT, ALL, LAYERS], label="planes", value=ALL)
        self.channels = ComboBox(choices=lambda _: self._channels, label="channels")
        self.region = ComboBox(choices=self._regions, label="look at", tooltip=_REGION_TIP)
        self.tile_size_px = SpinBox(value=64, min=8, max=4096, label="tiles (px)")
        self.check_button = PushButton(text="Check focus")
        self.again_button = PushButton(text="Anew", tooltip="Forget this layer's scores and check.")
        self.cancel_button = PushButton(text="Cancel", enabled=False)
        self.follow = CheckBox(value=True, text="check new planes as the stack grows", label="")
        self.progress = ProgressBar(value=0, min=0, max=1, label="")
        self.status = Label(value="")
        self.score = ComboBox(choices=list(SCORE_NAMES), label="score", tooltip=_SCORE_TIP)
        self.gate = ComboBox(choices=self._gates, label="gate", tooltip=_GATE_TIP)
        self.limit = FloatSpinBox(value=0.5, min=-1e6, max=1e6, step=0.01, label="limit")
        self.show_rows = ComboBox(choices=[PLANES, TILES], label="table")
        self.best_button = PushButton(text="Best plane")
        self.heat_button = PushButton(text="Heat map")
        self.composite_button = PushButton(text="All in focus")
        self.csv_button = PushButton(text="Save CSV")
        self.html_button = PushButton(text="Save report")
        super().__init__(
            widgets=[
                self.layer, self.method, self.model, self.planes, self.channels, self.region,
                self.tile_size_px,
                row(self.check_button, self.again_button, self.cancel_button),
                self.follow, self.progress, self.status,
                self.score, self.gate, self.limit, self.show_rows,
                row(self.best_button, self.heat_button, self.composite_button),
                row(self.csv_button, self.html_button),
            ]
        )  # fmt: skip
        self.native.setObjectName("semanticblur-focus")
        self.progress.visible = False
        wrap(self.status)
        self.plot, self.table = FocusPlot(), FocusTable()
        layout = self.column
        layout.insertWidget(layout.count() - 2, self.plot)
        layout.insertWidget(layout.count() - 2, self.table, 1)
        self.plot.plane_chosen.connect(self._plane_chosen)
        self.table.row_chosen.connect(self._row_chosen)
        self._refresh_timer = timer(self.native, self._refresh, _REFRESH_MS, is_single=True)
        self.layer.changed.connect(self._layer_chosen)
        self.method.changed.connect(self._show_what_applies)
        for control in (self.method, self.model, self.region, self.tile_size_px):
            control.changed.connect(self._guarded(self._measuring_chosen))
        for control in (self.score, self.gate):
            control.changed.connect(self._score_chosen)
        self.limit.changed.connect(self._limit_moved)
        self.show_rows.changed.connect(self._refresh_soon)
        self.check_button.changed.connect(self.check)
        self.again_button.changed.connect(self.check_anew)
        self.cancel_button.changed.connect(self.cancel)
        self.best_button.changed.connect(self._guarded(self.go_to_best_plane))
        self.heat_button.changed.connect(self._guarded(self.show_heat_map))
        self.composite_button.changed.connect(self._guarded(self.make_composite))
        self.csv_button.changed.connect(self._guarded(lambda: self._ask_and_save("csv")))
        self.html_button.changed.connect(self._guarded(lambda: self._ask_and_save("html")))
        self._viewer.dims.events.current_step.connect(self._refresh_soon)
        self._viewer.layers.events.removed.connect(self._layer_removed)
        models.changed.connect(self._models_changed)
        self.native.destroyed.connect(self._closed)
        self.on_taken_out(self._closed)
        self._layer_chosen(self.layer.value)

    @property
    def settings(self) -> Settings:
        """How focus is measured, as the widget says now."""
        return Settings(
            method=METHODS[self.method.value],
            model=self.model.value,
            device=preferences().device,
            tile_size_px=int(self.tile_size_px.value),
            region="content" if self.region.value == CONTENT else "image",
            labels=None if isinstance(self.region.value, str) else unwrapped(self.region.value),
        )

    @property
    def score_name(self) -> str:
        """The score chosen, by its name in the core."""
        return SCORE_NAMES[self.score.value]

    @property
    def is_running(self) -> bool:
        """Whether planes are being measured or composed."""
        return self._checking is not None or self._composing is not None

    def session(self, layer: Any = None) -> ArrayFocus | None:
        """What is known of a layer; of the chosen one by default."""
        layer = unwrapped(layer or self.layer.value)
        return None if layer is None else self._sessions.shown(layer)

    def gates(self) -> list[Gate]:
        """The gate that rows are judged by, or none.

        Raises
        ------
        ConfigError
            If a calibration was made otherwise than planes are measured here.
        """
        if self.gate.value in (NO_GATE, None):
            return []
        if self.gate.value == LIMIT:
            return [Gate(self.score_name, float(self.limit.value))]
        found = calibration.load(calibration.resolve(self.gate.value))
        session = self.session()
        measured = self.settings if session is None else self._sessions.settings(session)
        return [found.gate_for(measured.protocol)]

    def check(self) -> None:
        """Measure the planes asked for that are not known yet."""
        if self.is_running:
            return
        layers: list[Any] = [self.layer.value]
        if self.planes.value == LAYERS:
            layers = self._images(None)
        if None in layers or not layers:
            self._say("Open an image first.")
            return
        self._guarded(lambda: self._start_on(layers))()

    def check_anew(self) -> None:
        """Forget the chosen layer's scores and measure them again."""
        if self.is_running:
            return

        def anew() -> None:
            self._job(unwrapped(self.layer.value))  # or they would be forgotten for nothing
            session = self.session()
            if session is not None:
                session.forget()
            self.check()

        self._guarded(anew)()

    def cancel(self) -> None:
        """Stop at the next plane; what is done is kept."""
        for run in (self._checking, self._composing):
            if run is not None:
                self._say("Stopping ...")
                run.cancel()

    def go_to_best_plane(self) -> None:
        """Move the slider to the sharpest plane by the chosen score."""
        _, session, _, at = self._stack_here()
        curve = session.curve(self.score_name, at)
        if curve is None:
            raise ImageError(f"{self.layer.value.name}: check its planes with this score first")
        self._plane_chosen(curve.best)
        self._say(f"Best plane {session.along.lower()} {curve.best}, peak at {curve.peak:.2f}")

    def show_heat_map(self) -> None:
        """Show the tiles of all planes known as a layer: share in focus, or Tenengrad."""
        source, session = self._known()
        heat = "in_focus" if self.score_name in MAP_SCORES else "tenengrad"
        show_heat_map(self._viewer, source, session, cast(Any, heat))
        self._say(f"{'Share in focus' if heat == 'in_focus' else 'Tenengrad'} of tiles")

    def make_composite(self) -> None:
        """Make a layer that is in focus everywhere from the stack shown."""
        if self.is_running:
            raise ImageError("cancel what is running first")
        source, channels = self._source(unwrapped(self.layer.value)), self.channels.value
        planes = source.planes(channels)
        along = focus_axis(planes.walked_axes)
        if not along:
            raise ImageError(f"{source.layer.name}: a single plane, no stack")
        _, at = _split(plane_index(source, self._viewer, planes), planes.walked_axes, along)
        layer, data = source.layer, source.layer.data

        def changed(_: Any) -> None:
            if layer.data is not data:
                self._stop_because(f"the data of {layer.name} was changed")

        def ended(outcome: str | Failure, last: Any, unreadable: list[str]) -> None:
            run, self._composing, self._composed = self._composing, None, None
            layer.events.data.disconnect(changed)
            if self._is_closed:
                return
            self._enable()
            self._catch_up(follow=False)
            if isinstance(outcome, Failure):
                self._complain(f"{layer.name}: {outcome.text}")
            elif self._stopped_because or last is None or last.composite is None:
                self._say_stopped("" if run is None else run.why_cancelled)
            else:
                show_composite(self._viewer, source, channels, along, at, last)
                self._say(f"All in focus: done{_left_out(unreadable)}")

        layer.events.data.connect(changed)
        self._composing = compose(
            source, channels, along, at, on_progress=self._progressed, on_end=ended
        )
        self._composed, self._stopped_because = layer, ""
        self._enable()
        self._say("Composing ...")
        self._composing.start()

    def export(self, path: Path) -> None:
        """Write what the table knows as CSV or, by the suffix, as an HTML page.

        Raises
        ------
        ImageError
            If nothing was checked, or it cannot be written.
        """
        from semanticblur_core.focus.report import stack_rows, to_row, write_csv, write_html

        gates = self.gates()
        known = [self.session(layer) for layer in self._images(None)]
        sessions = [each for each in known if each is not None and each.images]
        images = [image for each in sessions for _, image in each.judged(gates)]
        if not images:
            raise ImageError("check some planes first")
        if path.suffix.lower() == ".csv":
            write_csv(path, [to_row(image) for image in images])
            return
        measured = [self._sessions.settings(each).said for each in sessions]
        told = [", ".join(f"{key} {value}" for key, value in each.items()) for each in measured]
        said = "; ".join(dict.fromkeys(told))
        summary: dict[str, Any] = {
            "description": f"Gates: {', '.join(g.describe() for g in gates) or 'none'}. "
            f"Measured with: {said}.",
            "gated": bool(gates),
            "sort": self.score_name,
            "descending": not HIGHER_IS_SHARPER[self.score_name],
        }
        session = self.session()
        if session is not None and session.along:
            stack = session.stack(self.score_name)
            if stack.planes:
                names = {index: image.name for index, image in session.images.items()}
                low_is_sharp = not HIGHER_IS_SHARPER[self.score_name]
                summary |= stack_rows(stack, names, low_is_sharp=low_is_sharp)
        write_html(path, images, summary)

    # Choices

    def _images(self, _: Any) -> list[Image]:
        return source_images(self._viewer)

    def _regions(self, _: Any) -> list[Any]:
        """Everywhere, content, or where a labels layer is not 0."""
        from napari.layers import Labels

        layers = map(unwrapped, self._viewer.layers)
        return [EVERYWHERE, CONTENT, *(each for each in layers if isinstance(each, Labels))]

    def _models(self, _: Any) -> list[str]:
        return [*weights.PACKAGED, *weights.own_models()]

    def _models_changed(self, name: str) -> None:
        """One was made, deleted or renamed; what is chosen follows its new name."""
        if self._is_closed:
            return
        before, stem = self.model.value, name.partition("@")[0]
        self.model.reset_choices()
        if before not in self.model.choices and stem in self.model.choices:
            self.model.value = stem

    def _gates(self, _: Any) -> list[str]:
        return [NO_GATE, LIMIT, *calibration.stored_names()]

    # From layers to sessions

    def _source(self, layer: Any) -> Source:
        if layer is None:
            raise ImageError("open an image first")
        level = coarse_level(layer, at_least_px=LEVEL_SIDE_PX)
        return read_source(layer, level=level, viewer=self._viewer)

    def _channels_of(self, layer: Any) -> Any:
        return self.channels.value if layer is unwrapped(self.layer.value) else "each"

    def _session_for(self, source: Source) -> ArrayFocus:
        """The session of a layer, for its data and the settings of now."""
        layer = source.layer
        if layer not in self._sessions:
            layer.events.data.connect(self._data_changed)
            layer.events.name.connect(self._renamed)
        channels, settings = self._channels_of(layer), self.settings
        session = self._sessions.show(layer, channels, settings)
        session.adopt(source.array, source.axes, channels, settings.key)
        return session

    def _job(self, layer: Any) -> Job:
        source = self._source(layer)
        session = self._session_for(source)
        channels = self._channels_of(layer)
        planes = source.planes(channels)
        job = Job(source, session, [], channels, self._sessions.prints(session))
        labels = self.settings.labels
        if labels is not None:
            session.forget_planes(job.repainted(labels))
        if self.planes.value == ALL:
            return replace(job, indices=session.missing(planes))
        shown = plane_index(source, self._viewer, planes)
        return replace(job, indices=[] if session.is_known(shown) else [shown])

    def _known(self) -> tuple[Source, ArrayFocus]:
        source = self._source(unwrapped(self.layer.value))
        session = self.session()
        if session is None or not session.images:
            raise ImageError(f"{source.layer.name}: check its focus first")
        return source, session

    def _stack_here(self) -> tuple[Source, ArrayFocus, int, tuple[int, ...]]:
        """Source and session of the chosen layer, and the plane shown: along focus, and others."""
        source, session = self._known()
        if not session.along:
            raise ImageError(f"{source.layer.name}: a single plane, no stack")
        shown = plane_index(source, self._viewer, source.planes(session.channels))
        return source, session, *_split(shown, session.walked_axes, session.along)

    # Runs

    def _start_on(self, layers: list[Any]) -> None:
        """Check layers; of several, those that cannot be checked now are left out."""
        jobs, problems = [], list[str]()
        for layer in layers:
            try:
                jobs.append(self._job(unwrapped(layer)))
            except SemanticBlurError as error:
                if len(layers) == 1:
                    raise
                problems.append(str(error))
        if not jobs:
            raise ImageError(problems[0])
        self._start(jobs, problems)

    @property
    def _left_out(self) -> str:
        """Of layers and planes that cannot be measured, to follow a line."""
        unreadable = [] if self._checking is None else self._checking.unreadable
        return _left_out([*self._problems, *unreadable])

    def _start(self, jobs: list[Job], problems: Sequence[str] = ()) -> None:
        if self.is_running:
            return
        self._problems, self._stopped_because = list(problems), ""
        jobs = [job for job in jobs if job.indices]
        if not jobs:
            self._say(f"These planes are checked already{self._left_out}")
            self._refresh()
            return
        self._checking = Checking(
            jobs, self.settings, on_status=self._say, on_plane=self._plane_done, on_end=self._ended
        )
        self._enable()
        self._progressed(0, self._checking.n_planes)
        self._say("Starting ...")
        self._checking.start()

    def _plane_done(self, n_done: int) -> None:
        if self._checking is not None and not self._is_closed:
            self._progressed(n_done, self._checking.n_planes)
            n_checked = n_done - len(self._checking.unreadable)
            self._say(f"{n_checked} of {self._checking.n_planes} planes checked{self._left_out}")
            self._refresh_soon()

    def _ended(self, outcome: str | Failure) -> None:
        checking, self._checking = self._checking, None
        if self._is_closed:
            return
        self._enable()
        if self.gate.value == LIMIT and self._limit_for != self.score_name:
            self._score_chosen()
        self._refresh()
        assert checking is not None
        new_problems = [*checking.problems, *checking.unreadable]
        self._problems += new_problems
        if isinstance(outcome, Failure):
            self._complain(outcome.text)
        elif outcome == "cancelled":
            self._say_stopped(checking.why_cancelled, self._left_out)
        elif new_problems:
            self._complain(f"Checked{self._left_out}")
        self._catch_up(follow=outcome == "done")

    def _progressed(self, n_done: int, n_total: int) -> None:
        if not self._is_closed:
            self.progress.max, self.progress.value = n_total, n_done

    def _enable(self) -> None:
        for button in (self.check_button, self.again_button, self.composite_button):
            button.enabled = not self.is_running
        self.cancel_button.enabled = self.progress.visible = self.is_running

    def _data_changed(self, event: Any) -> None:
        """A layer has other data: new planes of a stack that grew, or another image."""
        layer = unwrapped(event.source)
        if self._is_closed or layer not in self._sessions:
            return
        if self.is_running:
            self._changed.add(layer)
        else:
            self._take_new_data(layer, follow=True)

    def _catch_up(self, *, follow: bool) -> None:
        """Take the data that layers got during a run."""
        changed, self._changed = self._changed, set()
        for layer in changed:
            self._take_new_data(layer, follow=follow)

    def _take_new_data(self, layer: Any, *, follow: bool) -> None:
        if layer not in self._sessions:
            return
        try:
            source = self._source(layer)
            shown = self._sessions.shown(layer)
            assert shown is not None
            before, known = shown.lengths, len(shown.images)
            session = self._session_for(source)
            self._sessions.forget_others(layer)
        except SemanticBlurError as error:
            self._complain(str(error))
            return
        self._refresh()
        if not session.images:
            self._say(f"{layer.name} has other data: check it again" if known else "")
            return
        channels = self._channels_of(layer)
        new = session.beyond(before)
        if new and follow and self.follow.value and not self.is_running:
            prints = self._sessions.prints(session)
            self._start([Job(source, session, new, channels, prints)])

    def _renamed(self, event: Any) -> None:
        layer = unwrapped(event.source)
        session = self._sessions.shown(layer)
        if session is not None:
            session.rename(layer.name)
            self._refresh_soon()

    def _layer_removed(self, event: Any) -> None:
        layer = unwrapped(event.value)
        if self._is_closed:
            return
        jobs = [] if self._checking is None else self._checking.jobs
        if layer in (self._composed, *(job.source.layer for job in jobs)):
            self._stop_because(f"the layer {layer.name} was removed")
        if layer not in self._sessions:
            return
        self._sessions.drop(layer)
        layer.events.data.disconnect(self._data_changed)
        layer.events.name.disconnect(self._renamed)
        self._refresh_soon()

    # What is shown

    def _refresh_soon(self) -> None:
        if not self._is_closed and not self._refresh_timer.isActive():
            self._refresh_timer.start()

    def _refresh(self) -> None:
        if self._is_closed:
            return
        start = time.perf_counter()
        try:
            gates = self.gates()
        except SemanticBlurError as error:
            self._say(str(error))
            gates = []
        if self.show_rows.value == PLANES:
            known = [(each, self.session(each)) for each in self._images(None)]
            sessions = [(layer, session) for layer, session in known if session is not None]
            rows = self._rows.rows(sessions, gates, first=self.score.value)
            self.table.show_rows(self._rows.headers, rows)
        else:
            self.table.show_rows(TILE_HEADERS, self._tiles_shown(gates))
        self._refresh_plot(gates)
        # Thousands of planes take a while: less often then, so that the window stays alive.
        took_ms = 1000 * (time.perf_counter() - start)
        self._refresh_timer.setInterval(max(_REFRESH_MS, round(10 * took_ms)))

    def _refresh_plot(self, gates: list[Gate]) -> None:
        curve, position = None, -1
        try:
            _, session, position, at = self._stack_here()
            curve = session.curve(self.score_name, at)
        except SemanticBlurError:  # no stack, or nothing known of it yet
            pass
        if curve is not None and len(curve.positions) < 2:
            curve = None
        layer = self.layer.value
        self.plot.setVisible(layer is not None and layer.ndim > 2)
        limit = next((gate.limit for gate in gates if gate.score == self.score_name), math.nan)
        self.plot.show_curve(curve, title=self.score.value, shown=position, limit=limit)

    def _tiles_shown(self, gates: list[Gate]) -> list[Row]:
        try:
            source, session = self._known()
            shown = plane_index(source, self._viewer, source.planes(session.channels))
        except SemanticBlurError:
            return []
        image = session.images.get(shown)
        return [] if image is None else tile_rows(source.layer, shown, image, gates)

    def _score_chosen(self) -> None:
        """Another score or kind of gate: a limit amid the values that are known."""
        self.limit.visible = self.gate.value == LIMIT
        values = [value for each in self._sessions for value in each.values(self.score_name)]
        if self.score_name in BOUNDED:
            self.limit.step, self.limit.value = 0.01, 0.5
        elif values:
            spread = max(values) - min(values) or abs(values[0]) or 1.0
            self.limit.step = 10.0 ** (math.floor(math.log10(spread)) - 2)
            self.limit.value = sum(values) / len(values)
        self._limit_for = self.score_name if self.score_name in BOUNDED or values else ""
        self._refresh_soon()

    def _limit_moved(self) -> None:
        self._limit_for = self.score_name
        self._refresh_soon()

    def _measuring_chosen(self) -> None:
        """Show what was measured as is chosen now, or tell that what is shown was not."""
        if self._is_closed or self.is_running:
            return
        settings, others = self.settings, []
        for layer in self._images(None):
            session = self.session(layer)
            if session is None or not session.images:
                continue
            before = self._sessions.settings(session)
            if before.key == settings.key:
                continue
            # Labels may have been painted on since.
            known = settings.labels is None
            if not (known and self._sessions.switch(layer, session.channels, settings)):
                others.append(before.said)
        if others:
            said = ", ".join(f"{name} {value}" for name, value in others[0].items())
            self._say(f"{_SHOWN} {said}: check again for what is chosen now.")
        elif self.status.value.startswith(_SHOWN):
            self._say("")
        self._refresh_soon()

    def _plane_chosen(self, position: int) -> None:
        source, session, _, at = self._stack_here()
        place = session.walked_axes.index(session.along)
        planes = source.planes(session.channels)
        show_plane(source, self._viewer, planes, (*at[:place], position, *at[place:]))

    def _row_chosen(self, target: Any) -> None:
        layer, index, tile = target
        session = self.session(layer)
        if layer not in self._viewer.layers or session is None or index not in session.images:
            return
        self.layer.value = layer
        source = self._source(layer)
        show_plane(source, self._viewer, source.planes(session.channels), index)
        if tile is not None:
            look_at_tile(self._viewer, source, session, tile)

    def _layer_chosen(self, layer: Any) -> None:
        if self._is_closed:
            return
        self._channels = ["each"]
        if layer is not None:
            try:
                source = self._source(unwrapped(layer))
                planes = source.planes()
                if "C" in planes.walked_axes:
                    n_channels = planes.lengths[planes.walked_axes.index("C")]
                    self._channels += [*range(n_channels), *(["mean"] * ("S" not in source.axes))]
            except SemanticBlurError as error:
                self._say(str(error))
        self.channels.reset_choices()
        self._show_what_applies()
        self._refresh_soon()

    def _show_what_applies(self) -> None:
        if self._is_closed:
            return
        self.model.visible = METHODS[self.method.value] == NETWORK
        self.channels.visible = len(self._channels) > 1
        self.limit.visible = self.gate.value == LIMIT
        if METHODS[self.method.value] == CLASSICAL and self.score_name in MAP_SCORES:
            self.score.value = "Tenengrad"

    def _ask_and_save(self, suffix: str) -> None:
        from qtpy.QtWidgets import QFileDialog

        path, _ = QFileDialog.getSaveFileName(
            self.native, "Save", str(Path.home() / f"focus.{suffix}"), f"*.{suffix}"
        )
        if path:
            whole = path if path.lower().endswith(f".{suffix}") else f"{path}.{suffix}"
            self.export(Path(whole))
            self._say(f"Saved {whole}")

    def _guarded(self, action: Callable[[], None]) -> Callable[[], None]:
        """The action; what a person can act on becomes a line."""
        return guarded(action, self._say)

    def _stop_because(self, reason: str) -> None:
        self._stopped_because = reason
        self.cancel()

    def _say_stopped(self, by_others: str, left_out: str = "") -> None:
        because = self._stopped_because or by_others
        self._say(f"Stopped{f': {because}' if because else ''}{left_out}")

    def _complain(self, text: str) -> None:
        complain(text, self._say)

    def _say(self, text: str) -> None:
        if not self._is_closed:
            self.status.value = text

    def _closed(self) -> None:
        """Qt's side of this is gone: stop, and touch none of it again."""
        self._is_closed = True
        for run in (self._checking, self._composing):
            if run is not None:
                run.cancel()


def _left_out(problems: Sequence[str]) -> str:
    """What is left out and why the first of it is, to follow a line."""
    return f"; {len(problems)} left out: {problems[0]}" if problems else ""


def _split(index: tuple[int, ...], walked_axes: str, along: str) -> tuple[int, tuple[int, ...]]:
    """Place along one axis, and along the others."""
    place = walked_axes.index(along)
    return index[place], (*index[:place], *index[place + 1 :])


_METHOD_TIP = (
    "What says where an image is blurred: the network, or a method without weights. The classical "
    "scores need no map and load no PyTorch."
)
_REGION_TIP = (
    "Where the scores of the map look: everywhere, at content without empty background, or where "
    "a labels layer is not 0. The classical scores are of the whole plane."
)
_SCORE_TIP = (
    "What the plot, the best plane, the gate and the heat map go by. The first four are of the "
    "blur map; the others compare images of one scene or kind only."
)
_GATE_TIP = (
    "Rows that keep it are green, others red. A name is a calibration that semanticblur-core "
    "focus calibrate has stored."
)
