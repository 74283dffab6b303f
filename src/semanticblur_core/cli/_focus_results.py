"""What ``semanticblur-core focus`` writes and prints."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from semanticblur_core.cli._options import progress_bar, say

if TYPE_CHECKING:
    from semanticblur_core.cli._focus_inputs import StackInput
    from semanticblur_core.focus.check import FocusOptions, ImageFocus, Source
    from semanticblur_core.inference.batch import MapMaker

_WORST_PRINTED = 20


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
    ) -> None:
        self._detector, self._protocol, self._options = detector, protocol, options
        self._opened, self._sort, self._keep_best = opened, sort, keep_best
        self._gated = bool(options.gates)
        self.images: list[ImageFocus] = []
        self._finished = False

    def run(self, sources: list[Source], report: Path | None) -> None:
        from semanticblur_core.focus.check import focus_report
        from semanticblur_core.focus.report import HtmlReport

        with ExitStack() as resources:
            progress = resources.enter_context(progress_bar())
            html = resources.enter_context(HtmlReport(report)) if report else None
            task = progress.add_task("Checking focus", total=len(sources))
            try:
                for update in focus_report(sources, self._detector, self._options):
                    image = update.image
                    if html is not None:
                        html.add(image)
                    # A report of many images holds their pictures; memory does not.
                    self.images.append(replace(image, thumbnail=None, overlay=None))
                    if self._opened and image.plane is not None:
                        self._opened.collected.add(image.plane)
                    progress.update(task, completed=update.n_done)
                    if image.error is not None:
                        say(progress, f"semanticblur-core: {image.error}", err=True)
                self._finished = True
            finally:
                if html is not None:
                    html.summary = self._summary()

    @property
    def n_failed(self) -> int:
        """Images that could not be read."""
        return sum(image.error is not None for image in self.images)

    @property
    def passed(self) -> bool:
        """Whether all that the gates are for keep them."""
        return self._finished and all(image.passed for image in self._judged())

    def write(self, json_file: Path | None, csv_file: Path | None) -> None:
        from semanticblur_core.focus.report import to_row, write_csv, write_json

        if not (self._finished or self.images):
            return  # what an earlier run wrote stays
        rows = [to_row(image) for image in self._ordered()]
        if self._keep_best:
            kept = {id(image) for image in self._kept()}
            for row, image in zip(rows, self._ordered(), strict=True):
                row["kept"] = id(image) in kept
        if csv_file:
            write_csv(csv_file, rows)
        if json_file:
            from semanticblur_core import __version__

            document = {
                "software": f"napari-semanticblur {__version__}",
                "protocol": self._protocol,
                "gates": [gate.describe() for gate in self._options.gates],
                "passed": self.passed and not self.n_failed,
                "interrupted": not self._finished,
                "images": [row for row in rows if "error" not in row],
                "failures": [
                    {"name": row["name"], "error": row["error"]} for row in rows if "error" in row
                ],
                **self._stack_rows(),
            }
            write_json(json_file, document)

    def print(self) -> None:
        for image in self._ordered() if len(self.images) <= _WORST_PRINTED else self._worst():
            if image.scores is not None:
                word = f"{'passed' if image.passed else 'FAILED'}, " if self._gated else ""
                why = f" ({'; '.join(image.failed_gates)})" if image.failed_gates else ""
                click.echo(
                    f"{image.name}: {word}{image.scores.in_focus_fraction:.1%} in focus, mean "
                    f"blur {image.scores.mean_blur:.3f}{why}"
                )
        if self._keep_best:
            n_of_name = Counter(image.name for image in self.images)
            kept = [i.name if n_of_name[i.name] == 1 else i.source for i in self._kept()]
            click.echo(f"kept: {', '.join(kept)}")
        for one in self._stack_rows().get("stacks", []):
            at = "".join(f" at {axis}={i}" for axis, i in one["at"].items())
            best = one["best_plane"]
            click.echo(
                f"best plane{at}: {best['name']} (index {best['index']}, peak {one['peak']:.2f})"
            )
        n_read = len(self.images) - self.n_failed
        text = f"{n_read} {'plane' if self._opened else 'image'}{'s' * (n_read != 1)}"
        text += f", {self.n_failed} unreadable"
        if self._gated:
            judged = self._judged()
            kind = "best planes" if self._opened else "images"
            text += f"; {sum(image.passed for image in judged)} of {len(judged)} {kind} passed"
        click.echo(text)

    def _ordered(self) -> list[ImageFocus]:
        from semanticblur_core.focus.report import ranked

        return ranked(self.images, self._sort, best_first=True) if self._sort else self.images

    def _worst(self) -> list[ImageFocus]:
        from semanticblur_core.focus.report import ranked

        click.echo(f"the {_WORST_PRINTED} worst:")
        score = self._sort if self._sort and self._sort != "name" else "in_focus_fraction"
        return ranked(self._readable, score)[:_WORST_PRINTED]

    def _kept(self) -> list[ImageFocus]:
        from semanticblur_core.focus.report import ranked

        score = self._sort if self._sort and self._sort != "name" else "in_focus_fraction"
        return ranked(self._readable, score, best_first=True)[: self._keep_best]

    def _judged(self) -> list[ImageFocus]:
        """Images that the gates are for: all, or of a stack the best planes."""
        if not self._opened:
            return self._readable
        names = {one["best_plane"]["name"] for one in self._stack_rows().get("stacks", [])}
        return [image for image in self._readable if image.name in names]

    @property
    def _readable(self) -> list[ImageFocus]:
        return [image for image in self.images if image.scores is not None]

    def _stack_rows(self) -> dict[str, Any]:
        from semanticblur_core.focus.report import stack_rows

        if not self._opened or not self._opened.collected.planes:
            return {}
        names = {source.index: source.name for source in self._opened.sources}
        step_um = self._opened.pixel_size_um.get(self._opened.collected.along)
        return stack_rows(self._opened.collected, names, step_um=step_um)

    def _summary(self) -> dict[str, Any]:
        """What the HTML page shows beside the rows."""
        gates = ", ".join(gate.describe() for gate in self._options.gates) or "none"
        said = ", ".join(
            f"{key} {str(value)[:12] if key == 'model_sha256' else value}"
            for key, value in self._protocol.items()
            if value is not None
        )
        summary: dict[str, Any] = {
            "description": f"Gates: {gates}. Measured with: {said}.",
            "gated": self._gated,
            **self._stack_rows(),
        }
        if self._keep_best:
            kept = {id(image) for image in self._kept()}
            summary["kept"] = [i for i, image in enumerate(self.images) if id(image) in kept]
        return summary


def write_composite(
    opened: StackInput, channels: Any, along: str, composite: Path | None, depth: Path | None
) -> None:
    from semanticblur_core import io
    from semanticblur_core.focus.stack import all_in_focus

    collected = opened.collected
    at = collected.others(opened.sources[0].index)
    place = collected.walked_axes.index(along)
    positions = [source.index[place] for source in opened.sources]
    last = None
    with progress_bar() as progress:
        task = progress.add_task("Composing", total=None)
        for last in all_in_focus(
            opened.array, opened.axes, along=along, at=at, channels=channels, positions=positions
        ):
            progress.update(task, completed=last.n_done, total=last.n_total)
    assert last is not None
    if composite and last.composite is not None:
        io.write_image(composite, last.composite, pixel_size_um=opened.pixel_size_um)
    if depth and last.depth is not None:
        io.write_image(depth, last.depth, pixel_size_um=opened.pixel_size_um)
    click.echo(f"all in focus -> {', '.join(str(path) for path in (composite, depth) if path)}")
