"""What ``semanticblur-core focus`` writes and prints."""

from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semanticblur_core import disk
from semanticblur_core.cli._echo import echo
from semanticblur_core.cli._options import progress_bar, say, warn_of_squashing
from semanticblur_core.cli._stop import Stop

if TYPE_CHECKING:
    from rich.progress import Progress

    from semanticblur_core.cli._focus_inputs import Part, StackInput
    from semanticblur_core.focus.check import FocusOptions, ImageFocus, Source
    from semanticblur_core.focus.earlier import EarlierRun
    from semanticblur_core.focus.report import HtmlReport
    from semanticblur_core.focus.scores import FocusScores
    from semanticblur_core.inference.map_maker import MapMaker

_PRINTED = 20
_SAVED_EVERY_S = 30
# Times what the last one took: many images are slow to write.
_SAVES_WAIT = 20


class Results:
    """Images as they are checked, and what is written and printed of them."""

    def __init__(
        self,
        detector: MapMaker,
        protocol: dict[str, Any],
        options: FocusOptions,
        opened: StackInput | None,
        sort: str | None,
        keep_best: int | None,
        tile_size: tuple[float, str] | None,
        part: Part,
        min_fields: float,
    ) -> None:
        from semanticblur_core import __version__

        self._detector, self._protocol, self._options = detector, protocol, options
        self._opened, self._sort, self._keep_best = opened, sort, keep_best
        self._cut_planes, self._min_fields = part.cut_planes, min_fields
        self._gated = bool(options.gates)
        self._measured_with: dict[str, Any] = {
            "software": f"napari-semanticblur {__version__}",
            "protocol": protocol,
            "precision": getattr(detector, "precision", None),
            "tile_size": list(tile_size) if tile_size else None,
            "part": part.to_dict() or None,
        }
        self._masks: dict[str, Any] | None = None
        if options.mask_folder is not None:
            folder = str(options.mask_folder.absolute())
            self._masks = {"folder": folder, "margin_px": options.mask_margin_px}
        self._earlier: EarlierRun | None = None
        self.images: list[ImageFocus] = []
        self._order: dict[tuple[str, str], int] = {}
        self._n_of_name: Counter[str] = Counter()
        self._n_new = 0
        self._finished = False

    def run(
        self,
        sources: list[Source],
        *,
        report: Path | None,
        json_file: Path | None,
        csv_file: Path | None,
        resume: bool,
    ) -> None:
        """Check all, and write what is wanted; what was done also where it is stopped."""
        from semanticblur_core.focus.earlier import EarlierRun

        for source in sources:
            self._order.setdefault((source.name, str(source.path)), len(self._order))
            self._n_of_name[source.name] += 1
        with ExitStack() as resources:
            parts = disk.left_behind(report) if report else []
            if resume and json_file:
                # Also of reports that a killed run left: they hold the pictures that it made.
                earlier = EarlierRun(
                    json_file,
                    self._measured_with,
                    masks=self._masks,
                    reports=[*parts, report] if report else None,
                )
                self._earlier = resources.enter_context(closing(earlier))
            try:
                self._measure(sources, report, json_file)
            finally:
                self._write(json_file, csv_file)
                if not self._finished and self._n_new:
                    resumed = "; --resume goes on" if json_file and not self._opened else ""
                    echo(f"semanticblur-core: {self._how_far()}{resumed}", err=True)
        for part in parts:
            disk.remove_if_stale(part)

    def _measure(self, sources: list[Source], report: Path | None, json_file: Path | None) -> None:
        from semanticblur_core.focus.check import focus_report
        from semanticblur_core.focus.report import HtmlReport

        saved_at, wait_s = time.monotonic(), float(_SAVED_EVERY_S)
        if self._masks is not None:  # which masks are its own is known from the first one on
            saved_at = -math.inf
        with ExitStack() as resources:
            progress = resources.enter_context(progress_bar())
            html = resources.enter_context(HtmlReport(report)) if report else None
            task = progress.add_task("Checking focus", total=len(sources))
            stop = Stop()
            resources.enter_context(stop.heeded())
            try:
                sources = self._take_over(sources, html)
                progress.update(task, completed=len(self.images))
                coming = focus_report(sources, self._detector, self._options)
                for update in stop.each(resources.enter_context(closing(coming))):
                    self._add(update.image, html)
                    progress.advance(task)
                    self._tell(update.image, progress)
                    if time.monotonic() - saved_at > wait_s:
                        wait_s = self._save(json_file, progress)
                        saved_at = time.monotonic()
                self._finished = True
            finally:
                if html is not None:
                    html.summary = self._summary()

    def _tell(self, image: ImageFocus, progress: Progress) -> None:
        for problem in (image.error, image.mask_error):
            if problem is not None:
                say(progress, f"semanticblur-core: {problem}", err=True)
        if self._protocol.get("size") not in (None, "native"):
            warn_of_squashing(progress, self._name(image), image.width, image.height)

    def _name(self, image: ImageFocus) -> str:
        """What people know it by: its name, or its path where others are called so."""
        return (
            image.name if self._n_of_name[image.name] <= 1 else _with_path(image.name, image.source)
        )

    def _how_far(self) -> str:
        return f"stopped after {len(self.images)} of {len(self._order)} {self._kind}s"

    @property
    def _kind(self) -> str:
        return "field" if self._cut_planes else "plane" if self._opened else "image"

    def _add(self, image: ImageFocus, html: HtmlReport | None, *, is_new: bool = True) -> None:
        if html is not None:
            html.add(image, is_new=is_new)
        # A report of many images holds their pictures; memory does not.
        self.images.append(replace(image, thumbnail=None, overlay=None))
        self._n_new += is_new
        if self._opened and image.plane is not None:
            self._opened.collected.add(image.plane)

    def _take_over(self, sources: list[Source], html: HtmlReport | None) -> list[Source]:
        """Take over what was measured before; the sources that are to be measured."""
        from semanticblur_core.focus.check import judge

        if self._earlier is None:
            return sources
        waiting = []
        for source in sources:
            image = self._earlier.take(source)
            if image is None:
                waiting.append(source)
            else:
                self._add(judge(image, self._options.gates), html, is_new=False)
        if self._earlier.n_lacking:
            echo(
                f"semanticblur-core: {self._earlier.n_lacking} measured again: without a picture "
                "in the report that is there, or a mask in that folder",
                err=True,
            )
        return waiting

    def _save(self, json_file: Path | None, progress: Progress) -> float:
        """Keep what was measured so far, whatever happens; seconds until it is worth it again."""
        from semanticblur_core.errors import SemanticBlurError

        start = time.monotonic()
        if json_file is not None and not disk.is_special(json_file):
            try:
                self._write(json_file, None)
            except SemanticBlurError as error:  # perhaps there is room again at the end
                say(progress, f"semanticblur-core: {error}; going on", err=True)
        return max(_SAVED_EVERY_S, _SAVES_WAIT * (time.monotonic() - start))

    @property
    def n_failed(self) -> int:
        """Images that could not be read."""
        return sum(image.error is not None for image in self.images)

    @property
    def n_without_mask(self) -> int:
        """Images whose mask could not be written."""
        return sum(image.mask_error is not None for image in self.images)

    @property
    def passed(self) -> bool:
        """Whether all that the gates are for keep them."""
        if self._cut_planes:
            return self._finished and all(row["passed"] for row in self._plane_rows())
        return self._finished and all(image.passed for image in self._judged())

    def _write(self, json_file: Path | None, csv_file: Path | None) -> None:
        from semanticblur_core.focus.report import to_row, write_csv, write_json

        if not (self._finished or self._n_new):
            return  # what an earlier run wrote stays
        rows = [to_row(image) for image in self._ordered()]
        if self._keep_best:
            kept = {id(image) for image in self._kept()}
            for row, image in zip(rows, self._ordered(), strict=True):
                row["kept"] = id(image) in kept
        if csv_file:
            write_csv(csv_file, rows)
        if json_file:
            document = {
                **self._measured_with,
                "masks": self._masks or (self._earlier and self._earlier.masks),
                "gates": [gate.describe() for gate in self._options.gates],
                "passed": self.passed and not self.n_failed,
                "interrupted": not self._finished,
                "images": [row for row in rows if "error" not in row],
                "failures": [
                    {key: row[key] for key in ("name", "source", "error")}
                    for row in rows
                    if "error" in row
                ],
                **({"planes": self._plane_rows()} if self._cut_planes else {}),
                **self._stack_rows(),
            }
            if begun := self._masks_begun(document["masks"]):
                document["masks_begun"] = begun
            if self._earlier is not None:
                document["not_checked"] = self._earlier.rows_besides(self.images)
            write_json(json_file, document)

    def _masks_begun(self, masks: Any) -> list[str]:
        """Images whose masks there may be though no row says so: they are the run's to replace."""
        names = set[str]()
        before = self._earlier
        if before and before.masks and masks and before.masks.get("folder") == masks["folder"]:
            names |= before.mask_names
        if self._masks is not None and not self._finished:
            names |= {name for name, _ in self._order}
        return sorted(names - {image.name for image in self.images if image.has_mask})

    def print(self) -> None:
        for image in self._ordered() if len(self.images) <= _PRINTED else self._first():
            if image.scores is not None:
                word = f"{'passed' if image.passed else 'FAILED'}, " if self._gated else ""
                why = f" ({'; '.join(image.failed_gates)})" if image.failed_gates else ""
                echo(f"{self._name(image)}: {word}{_described(image.scores)}{why}")
        if self._keep_best:
            kept = [self._name(image) for image in self._kept()]
            few = " (no others passed)" if self._gated and len(kept) < self._keep_best else ""
            echo(f"kept: {', '.join(kept) or 'none'}{few}")
        for one in self._stack_rows().get("stacks", []):
            at = "".join(f" at {axis}={i}" for axis, i in one["at"].items())
            best = one["best_plane"]
            echo(f"best plane{at}: {best['name']} (index {best['index']}, peak {one['peak']:.2f})")
        planes = self._plane_rows()
        n_of_name = Counter(row["name"] for row in planes)
        for row in planes:
            name = row["name"]
            shown = name if n_of_name[name] == 1 else _with_path(name, row["source"])
            echo(f"{shown}: {_described_plane(row, self._gated)}")
        n_read = len(self.images) - self.n_failed
        kind = self._kind
        text = _counted(n_read, kind)
        text += f", {self.n_failed} unreadable"
        if n_before := len(self.images) - self._n_new:
            text += f", {n_before} measured before"
        if self._gated:
            judged = self._judged()
            kind = "best planes" if self._opened else f"{kind}s"
            text += f"; {sum(image.passed for image in judged)} of {len(judged)} {kind} passed"
        echo(text)

    def _ordered(self) -> list[ImageFocus]:
        from semanticblur_core.focus.report import ranked

        if self._sort:
            return ranked(self.images, self._sort, best_first=True)
        return sorted(self.images, key=lambda image: self._order[image.name, image.source])

    def _first(self) -> list[ImageFocus]:
        """Of many, those that come first by --sort, or else the worst."""
        from semanticblur_core.focus.report import ranked

        if self._sort:
            echo(f"the first {_PRINTED} by {self._sort}:")
            return self._ordered()[:_PRINTED]
        echo(f"the {_PRINTED} with the least in focus:")
        return ranked(self._readable, "in_focus_fraction")[:_PRINTED]

    def _kept(self) -> list[ImageFocus]:
        """The best of those that keep the gates."""
        from semanticblur_core.focus.report import ranked

        score = self._sort if self._sort and self._sort != "name" else "in_focus_fraction"
        passed = [image for image in self._readable if image.passed]
        return ranked(passed, score, best_first=True)[: self._keep_best]

    def _judged(self) -> list[ImageFocus]:
        """Images that the gates are for: all, or of a stack the best planes."""
        if not self._opened:
            return self._readable
        names = {one["best_plane"]["name"] for one in self._stack_rows().get("stacks", [])}
        return [image for image in self._readable if image.name in names]

    @property
    def _readable(self) -> list[ImageFocus]:
        return [image for image in self.images if image.scores is not None]

    def _plane_rows(self) -> list[dict[str, Any]]:
        from semanticblur_core.focus.fields import plane_rows

        return plane_rows(
            self._cut_planes, self.images, min_fields=self._min_fields, gated=self._gated
        )

    def _stack_rows(self) -> dict[str, Any]:
        from semanticblur_core.focus.report import stack_rows

        if not self._opened or not self._opened.collected.planes:
            return {}
        names = {source.index: source.name for source in self._opened.sources}
        step_um = self._opened.scale.pixel_size_um.get(self._opened.collected.along)
        return stack_rows(self._opened.collected, names, step_um=step_um)

    def _summary(self) -> dict[str, Any]:
        """What the HTML page shows beside the rows."""
        from semanticblur_core.focus.scores import HIGHER_IS_SHARPER

        gates = ", ".join(gate.describe() for gate in self._options.gates) or "none"
        said = ", ".join(
            f"{key} {str(value)[:12] if key == 'model_sha256' else value}"
            for key, value in self._protocol.items()
            if value is not None
        )
        stopped = "" if self._finished else f"{self._how_far().capitalize()}. "
        summary: dict[str, Any] = {
            "description": f"{stopped}Gates: {gates}. Measured with: {said}.",
            "gated": self._gated,
            **self._stack_rows(),
            "planes": [
                {**row, "picture": plane.picture}
                for row, plane in zip(self._plane_rows(), self._cut_planes, strict=True)
                if plane.picture is not None
            ],
        }
        if self._sort:  # best first
            summary["sort"] = self._sort
            summary["descending"] = HIGHER_IS_SHARPER.get(self._sort, False)
        if self._keep_best:
            kept = {id(image) for image in self._kept()}
            summary["kept"] = [i for i, image in enumerate(self.images) if id(image) in kept]
        return summary


def _described(scores: FocusScores) -> str:
    if not math.isfinite(scores.mean_blur):
        return "no content"
    return f"{scores.in_focus_fraction:.1%} in focus, mean blur {scores.mean_blur:.3f}"


def _with_path(name: str, source: str) -> str:
    """The path of a file, and which of its planes and fields a name says."""
    file = Path(source).name
    _, found, part = name.rpartition(f"{file}[")
    return f"{source}[{part}" if found else source


def _counted(n: int, kind: str) -> str:
    return f"{n} {kind}{'s' * (n != 1)}"


def _described_plane(row: dict[str, Any], gated: bool) -> str:
    share, n_empty = row["in_focus_fraction"], row["n_fields_without_content"]
    text = ""
    if gated:
        text += f"{'passed' if row['passed'] else 'FAILED'}, "
    if share is None:
        text += "no content"
    else:
        text += f"{share:.1%} in focus, mean blur {row['mean_blur']:.3f}"
    text += f", {_counted(row['n_fields'], 'field')}"
    if gated:
        text += f", {row['n_fields_passed']} passed"
    return text + (f", {n_empty} without content left out" if n_empty else "")


def write_composite(
    opened: StackInput, along: str, composite: Path | None, depth: Path | None
) -> None:
    from semanticblur_core import io
    from semanticblur_core.focus.stack import all_in_focus

    collected = opened.collected
    if not collected.planes:
        return  # each has been told of
    at = collected.others(opened.sources[0].index)
    place = collected.walked_axes.index(along)
    readable = [source for source in opened.sources if source.index in collected.planes]
    if n_lost := len(opened.sources) - len(readable):
        echo(
            f"semanticblur-core: composed without what cannot be read ({n_lost} of "
            f"{len(opened.sources)} planes)",
            err=True,
        )
    positions = [source.index[place] for source in readable]
    last = None
    with progress_bar() as progress:
        task = progress.add_task("Composing", total=None)
        for last in all_in_focus(
            opened.array,
            opened.axes,
            along=along,
            at=at,
            channels=opened.channels,
            positions=positions,
        ):
            progress.update(task, completed=last.n_done, total=last.n_total)
    assert last is not None
    if composite and last.composite is not None:
        io.write_image(composite, last.composite, scale=opened.scale)
    if depth and last.depth is not None:
        io.write_image(depth, last.depth, scale=opened.scale)
    echo(f"all in focus -> {', '.join(str(path) for path in (composite, depth) if path)}")
