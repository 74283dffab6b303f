"""``semanticblur-core focus``."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from semanticblur_core.cli._options import (
    ChannelsType,
    PathType,
    PlanesType,
    RangeType,
    ShareType,
    SizeType,
    device_option,
    max_pixels_option,
    method_option,
    precision_option,
    progress_bar,
    refuse_clashes,
    refuse_network_flags,
    say,
)

if TYPE_CHECKING:
    from semanticblur_core.focus.calibration import Gate
    from semanticblur_core.focus.check import FocusOptions, ImageFocus, Source
    from semanticblur_core.focus.stack import StackFocus
    from semanticblur_core.inference.batch import MapMaker

_file = PathType(dir_okay=False, writes=True)
_folder = PathType(file_okay=False)
_share = ShareType()
_SCORES = (
    *("in_focus_fraction", "mean_blur", "largest_in_focus_fraction", "subject_in_focus"),
    *("variance_of_laplacian", "tenengrad", "normalised_variance", "spectrum_slope"),
    "blur_effect",
)
_WORST_PRINTED = 20

_measuring = (
    click.option("--recursive", is_flag=True, help="Look into subfolders of a folder too."),
    method_option,
    click.option("--model", default="default", show_default=True, help="Model of the network."),
    device_option,
    precision_option,
    click.option(
        "--size",
        type=SizeType(),
        default=320,
        show_default=True,
        help="Side the image is squashed to for the network, or native.",
    ),
    click.option(
        "--threshold",
        type=_share,
        default=0.5,
        show_default=True,
        help="A pixel is in focus where the map is not above it.",
    ),
    click.option(
        "--region",
        default="image",
        show_default=True,
        metavar="image|content|DIR",
        help="Where to look: everywhere, at content without empty background, or where the mask "
        "of the same name in a folder is white.",
    ),
    click.option(
        "--subject",
        type=click.Choice(["centre", "saliency"]),
        default="centre",
        show_default=True,
        help="What the subject is taken to be.",
    ),
    click.option(
        "--range",
        "value_range",
        type=RangeType(),
        help="Intensities that count as black and white, if not 8 bits.",
    ),
    max_pixels_option,
)


def _measuring_options(function: Any) -> Any:
    for option in reversed(_measuring):
        function = option(function)
    return function


class _TileType(click.ParamType):  # type: ignore[type-arg]
    """``64`` pixels or ``20um``."""

    name = "PIXELS|MICROMETRESum"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, str]:
        if isinstance(value, tuple):
            return value
        text = value.replace("µm", "um")
        unit = "um" if text.endswith("um") else "px"
        try:
            size = float(text.removesuffix("um").removesuffix("px"))
        except ValueError:
            self.fail(f"expected such as 64 or 20um, got {value!r}", param, ctx)
        if not size > 0 or (unit == "px" and size != int(size)):
            self.fail(f"expected whole pixels or micrometres above 0, got {value!r}", param, ctx)
        return size, unit


@click.group(name="focus", invoke_without_command=True)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="PATH|GLOB|DIR|sample:NAME",
    help="Image, quoted glob or folder. May be given several times.",
)
@_measuring_options
@click.option("--stack", is_flag=True, help="The input, a folder or a file, is one stack.")
@click.option("--axes", help="Axes of a stack's file, such as TZYX, if not as the file says.")
@click.option(
    "--channels", type=ChannelsType(), default="each", show_default=True, help="Of a stack's file."
)
@click.option(
    "--planes",
    type=PlanesType(),
    help="Planes of a stack, from 0: 3, 2:5 (without 5) or one of these for each axis, 0,:.",
)
@click.option(
    "--level",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Resolution level of a stack that is a pyramid, 0 is full.",
)
@click.option(
    "--along", default="Z", show_default=True, help="Axis of a stack to find focus along."
)
@click.option(
    "--measure",
    type=click.Choice(["tenengrad", "laplacian", "network"]),
    default="tenengrad",
    show_default=True,
    help="What says how sharp a plane of a stack is.",
)
@click.option("--composite", type=_file, help="Write a stack's all-in-focus composite (png, tif).")
@click.option("--depth", type=_file, help="Write the index of the sharpest plane (tif).")
@click.option("--overwrite", is_flag=True, help="Let these two replace files.")
@click.option("--report", type=_file, help="Write an HTML page that works offline.")
@click.option("--csv", "csv_file", type=_file, help="Write a line an image.")
@click.option("--json", "json_file", type=_file, help="Write everything that was measured.")
@click.option("--min-in-focus", type=_share, help="Gate: in-focus fraction at least, 0..1.")
@click.option("--max-mean-blur", type=_share, help="Gate: mean blur at most, 0..1.")
@click.option("--min-largest", type=_share, help="Gate: largest part in focus at least, 0..1.")
@click.option("--min-subject", type=_share, help="Gate: subject in focus at least, 0..1.")
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="SCORE=LIMIT",
    help="Gate on any score, such as tenengrad=0.001: the limit is kept on the sharp side.",
)
@click.option(
    "--calibration", metavar="NAME|FILE", help="Gate set from examples by focus calibrate."
)
@click.option("--sort", type=click.Choice([*_SCORES, "name"]), help="Order of results, best first.")
@click.option(
    "--keep-best", type=click.IntRange(1), help="Name the N best by --sort, as of a burst."
)
@click.option(
    "--tile-size", type=_TileType(), help="Also measure tiles of so many pixels, or 20um."
)
@click.option(
    "--mask-output",
    type=_folder,
    help="Write masks for photogrammetry: NAME.EXT.png, black = ignore, as the file is stored.",
)
@click.option(
    "--mask-margin",
    type=click.IntRange(0),
    default=8,
    show_default=True,
    help="Pixels around what is out of focus that masks ignore too.",
)
@click.pass_context
def command(context: click.Context, /, **flags: Any) -> None:
    """Say what is in focus: scores, gates, reports, the best plane of a stack.

    Exit code 1 if an image (of a stack the best plane) does not keep a gate, 2 if one cannot be
    read; the rest is done all the same. `focus calibrate` sets a gate from examples.
    """
    if context.invoked_subcommand is None:
        _check(**flags)
        return
    for name in flags:
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"options go after the further command: focus {context.invoked_subcommand} --..."
            )


@command.command(name="calibrate")
@click.option("--good", required=True, multiple=True, metavar="PATH|GLOB|DIR", help="In focus.")
@click.option("--bad", required=True, multiple=True, metavar="PATH|GLOB|DIR", help="Not in focus.")
@_measuring_options
@click.option("--score", type=click.Choice(_SCORES), help="Use this score, not the best.")
@click.option("--name", help="Store it under this name.  [default: that of the model or method]")
@click.option("--output", type=_file, help="Write it to this file instead.")
def calibrate_command(
    good: tuple[str, ...],
    bad: tuple[str, ...],
    score: str | None,
    name: str | None,
    output: Path | None,
    recursive: bool,
    **measuring: Any,
) -> None:
    """Set a gate from a few images that are in focus and a few that are not.

    The score that separates them best is found, and the limit between. It is stored beside the
    models, for --calibration=NAME.
    """
    from semanticblur_core.focus import calibration
    from semanticblur_core.focus.check import focus_report

    if name and output:
        raise click.UsageError("give --name or --output, not both")
    detector, options, protocol = _prepare(**measuring)
    default_name = Path(detector.name).stem.partition("@")[0] or "default"
    path = output or calibration.stored_path(name or default_name)
    examples: list[list[dict[str, float]]] = []
    n_failed = 0
    problems: list[str] = []
    for inputs in (good, bad):
        sources = _sources(inputs, recursive, problems)
        scores: list[dict[str, float]] = []
        with progress_bar() as progress:
            task = progress.add_task("Measuring", total=len(sources))
            for update in focus_report(sources, detector, options):
                progress.update(task, completed=update.n_done)
                if update.image.scores is None:
                    n_failed += 1
                    say(progress, f"semanticblur-core: {update.image.error}", err=True)
                else:
                    scores.append(update.image.scores.to_dict())
        examples.append(scores)
    found = calibration.calibrate(*examples, protocol=protocol, score=score)
    calibration.save(found, path)
    click.echo(
        f"{found.gate.describe()}, from {found.n_good} good and {found.n_bad} bad examples: AUC "
        f"{found.auc:.3f}, {found.accuracy:.1%} right when each is left out in turn -> {path}"
    )
    if n_failed or problems:
        raise SystemExit(2)


@dataclass(frozen=True)
class _StackInput:
    """A stack that is open: its planes, how to collect them, and the array of a composite."""

    sources: list[Source]
    collected: StackFocus
    value_range: tuple[float, float] | None
    array: Any
    axes: str
    pixel_size_um: Any


def _check(
    *,
    inputs: tuple[str, ...],
    recursive: bool,
    stack: bool,
    axes: str | None,
    channels: Any,
    planes: tuple[slice, ...] | None,
    level: int,
    along: str,
    measure: str,
    composite: Path | None,
    depth: Path | None,
    overwrite: bool,
    report: Path | None,
    csv_file: Path | None,
    json_file: Path | None,
    calibration: str | None,
    sort: str | None,
    keep_best: int | None,
    tile_size: tuple[float, str] | None,
    mask_output: Path | None,
    mask_margin: int,
    **flags: Any,
) -> None:
    if not inputs:
        raise click.UsageError("give --input, or `focus calibrate`")
    along = along.upper()
    if (composite or depth or axes or planes or level) and not stack:
        raise click.UsageError("--composite, --depth, --axes, --planes, --level go with --stack")
    if stack and (mask_output or keep_best):
        raise click.UsageError("--mask-output and --keep-best go without --stack")
    outputs = {
        "--composite": composite,
        "--depth": depth,
        "--report": report,
        "--csv": csv_file,
        "--json": json_file,
    }
    _refuse_outputs({flag: path for flag, path in outputs.items() if path is not None})
    gates = _gates(flags)
    detector, options, protocol = _prepare(
        **{key: flags[key] for key in flags if key not in _GATE_FLAGS}
    )
    if calibration:
        gates.append(_calibrated(calibration, protocol))
    options = replace(
        options,
        gates=tuple(gates),
        measure=measure if stack else None,
        mask_folder=mask_output,
        mask_margin_px=mask_margin,
        thumbnails=report is not None,
    )
    with ExitStack() as resources:
        opened: _StackInput | None = None
        if stack:
            if len(inputs) > 1:
                raise click.UsageError("--stack takes one --input")
            opened = resources.enter_context(
                _open_stack(inputs[0], recursive, axes, channels, planes, level, along, options)
            )
            options = replace(options, value_range=opened.value_range)
        problems: list[str] = []
        sources = opened.sources if opened else _sources(inputs, recursive, problems)
        refuse_clashes(outputs, (source.path for source in sources))
        for path in (composite, depth):
            if path and path.is_file() and not overwrite:
                raise click.UsageError(f"{path}: exists already; --overwrite replaces it")
        if mask_output:
            _refuse_same_masks(sources, mask_output)
        if opened and (composite or depth):
            _refuse_composite(opened, composite)
        options = replace(options, tile_size_px=_tile_px(tile_size, opened))
        results = _Results(detector, protocol, options, opened, sort, keep_best)
        try:
            results.run(sources, report)
        finally:
            # Written after an interruption too: they tell what was done.
            results.write(json_file, csv_file)
        results.print()
        if opened and (composite or depth):
            _write_composite(opened, channels, along, composite, depth)
    if results.n_failed or problems:
        raise SystemExit(2)
    if not results.passed:
        raise SystemExit(1)


class _Results:
    """Images as they are checked, and what is written and printed of them."""

    def __init__(
        self,
        detector: MapMaker,
        protocol: dict[str, Any],
        options: FocusOptions,
        opened: _StackInput | None,
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


_GATE_FLAGS = {
    "min_in_focus": "in_focus_fraction",
    "max_mean_blur": "mean_blur",
    "min_largest": "largest_in_focus_fraction",
    "min_subject": "subject_in_focus",
    "gates": "",
}


def _gates(flags: dict[str, Any]) -> list[Gate]:
    from semanticblur_core.errors import ConfigError
    from semanticblur_core.focus.calibration import Gate

    gates = [
        Gate(score, flags[flag])
        for flag, score in _GATE_FLAGS.items()
        if score and flags[flag] is not None
    ]
    for text in flags["gates"]:
        name, _, limit = text.partition("=")
        try:
            gates.append(Gate(name, float(limit)))
        except ValueError:
            raise ConfigError(
                f"--gate={text}: expected SCORE=LIMIT, such as tenengrad=0.001"
            ) from None
    return gates


def _calibrated(name: str, protocol: dict[str, Any]) -> Gate:
    """The gate of a calibration, if it was measured as this run measures."""
    from semanticblur_core.focus import calibration

    return calibration.load(calibration.resolve(name)).gate_for(protocol)


def _prepare(
    *,
    method: str,
    model: str,
    device: str,
    precision: str,
    size: Any,
    threshold: float,
    region: str,
    subject: Any,
    value_range: tuple[float, float] | None,
    max_pixels: int,
) -> tuple[MapMaker, FocusOptions, dict[str, Any]]:
    """Detector, options without gates, and how things are measured, for calibrations."""
    from semanticblur_core.focus.check import FocusOptions

    refuse_network_flags(method, "model", "device", "precision", "size")
    options = FocusOptions(
        size=size,
        value_range=value_range,
        threshold=threshold,
        region=_region(region),
        subject=subject,
        max_pixels=max_pixels,
    )
    protocol: dict[str, Any] = {"method": method}
    detector: MapMaker
    if method == "network":
        from semanticblur_core.device import keep_freed_memory
        from semanticblur_core.inference.detector import Detector

        keep_freed_memory()
        network = Detector(model, device=device, precision=precision)
        detector = network
        protocol |= {"model": model, "model_sha256": network.sha256, "size": size}
    else:
        from semanticblur_core.focus.classical import ClassicalDetector

        detector = ClassicalDetector(method)
    protocol |= {
        "threshold": threshold,
        "region": region if region in ("image", "content") else "masks",
        "subject": subject,
        "value_range": list(value_range) if value_range else None,
    }
    return detector, options, protocol


def _region(text: str) -> Any:
    if text in ("image", "content"):
        return text
    from semanticblur_core import io
    from semanticblur_core.data.datasets import group_by_stem, list_images
    from semanticblur_core.errors import DataError

    folder = io.expand_home(text)
    masks = group_by_stem(list_images(folder))

    def region(source: Source) -> Any:
        as_written = folder / f"{source.name}.png"  # by --mask-output
        found = [as_written] if as_written.is_file() else masks.get(Path(source.name).stem, [])
        if len(found) != 1:
            raise DataError(f"{source.name}: {len(found)} masks of this name in {folder}")
        return io.read_mask(found[0])

    return region


def _sources(
    inputs: tuple[str, ...], recursive: bool, problems: list[str] | None = None
) -> list[Source]:
    """Images of the inputs; what names none or cannot be read is told of where there are others.

    Without ``problems``, which takes those lines, the first is raised.
    """
    from semanticblur_core.errors import ImageError
    from semanticblur_core.focus.check import Source
    from semanticblur_core.inference.inputs import expand_inputs, is_sample, load

    sources: dict[str, Source] = {}
    found: list[str] = []
    listed = list(expand_inputs(inputs, recursive, found))
    names = {Path(path).name for path, _, _ in listed}
    stems = {Path(name).stem for name in names}
    left_out = []
    for path, relative, named in listed:
        if not named and _is_made_of(Path(path).name, names, stems):
            left_out.append(path)
            continue
        read = _loader(load, path) if is_sample(path) else None
        sources.setdefault(path, Source(relative.as_posix(), Path(path), read))
    if left_out:
        n_files = f"{len(left_out)} file{'s' * (len(left_out) != 1)}"
        click.echo(
            f"semanticblur-core: {n_files} left out as masks or maps of the others, first "
            f"{left_out[0]}; named as inputs they are measured",
            err=True,
        )
    if found and (problems is None or not sources):
        raise ImageError(found[0])
    for line in found:
        click.echo(f"semanticblur-core: {line}", err=True)
    if problems is not None:
        problems += found
    return list(sources.values())


def _is_made_of(name: str, names: set[str], stems: set[str]) -> bool:
    """Whether it is named as the mask (NAME.png) or a map (STEM_blur.png) of one of the others."""
    from semanticblur_core.inference.jobs import is_result_name

    is_mask = name.endswith(".png") and name.removesuffix(".png") in names
    return is_mask or (is_result_name(name) and name.rpartition("_")[0] in stems)


def _loader(load: Callable[[str], Any], path: str) -> Callable[[], Any]:
    return lambda: load(path)


@contextmanager
def _open_stack(
    text: str,
    recursive: bool,
    axes: str | None,
    channels: Any,
    wanted: tuple[slice, ...] | None,
    level: int,
    along: str,
    options: FocusOptions,
) -> Iterator[_StackInput]:
    """The planes of a folder, or of a file of any axes."""
    from semanticblur_core import io, stacks
    from semanticblur_core.focus.stack import FileStack, StackFocus, in_stack_order
    from semanticblur_core.inference.batch import chosen_planes
    from semanticblur_core.inference.planes import Planes

    path = io.expand_home(text)
    if path.suffix.lower() in stacks.STACK_SUFFIXES or stacks.is_zarr(path):
        with stacks.open_stack(path, axes=axes, level=level) as opened:
            yield _open_file(path, opened, channels, wanted, along, options)
        return
    if level:
        raise click.UsageError("--level is of a file that is a pyramid, not of a folder")
    files = {source.path: source for source in _sources((text,), recursive)}
    ordered = in_stack_order(list(files))
    files_stack = FileStack(ordered, max_pixels=options.max_pixels)
    [box] = chosen_planes(Planes(files_stack, files_stack.axes), wanted)
    yield _StackInput(
        sources=[
            replace(files[ordered[i]], index=(i,), read=functools.partial(files_stack.read, i))
            for i in box
        ],
        collected=StackFocus("Z", along=along),
        value_range=options.value_range or files_stack.estimate_range(),
        array=files_stack,
        axes=files_stack.axes,
        pixel_size_um={},
    )


def _open_file(
    path: Path,
    opened: Any,
    channels: Any,
    wanted: tuple[slice, ...] | None,
    along: str,
    options: FocusOptions,
) -> _StackInput:
    from semanticblur_core import io
    from semanticblur_core.errors import ImageError
    from semanticblur_core.focus.session import plane_sources, unit_range
    from semanticblur_core.focus.stack import StackFocus
    from semanticblur_core.inference.batch import chosen_planes
    from semanticblur_core.inference.planes import Planes

    planes = Planes(opened.array, opened.axes, channels)
    io.refuse_bomb(path, math.prod(planes.plane_shape), options.max_pixels)
    if not planes.walked_axes:
        is_read_as_image = path.suffix.lower() in io.TIFF_SUFFIXES
        what = "check it without --stack" if is_read_as_image else "save it as tif or png"
        raise ImageError(f"{path}: holds one plane and is no stack; {what}")
    if along not in planes.walked_axes:
        raise ImageError(
            f"{path}: no axis {along} to find focus along; --along takes one of "
            f"{planes.walked_axes}, --axes names them anew"
        )
    given = options.value_range
    limits = planes.as_limits(given) if given else planes.estimate_range()

    indices = itertools.product(*chosen_planes(planes, wanted))
    sources = plane_sources(planes, indices, name=path.name, path=path, limits=limits)
    return _StackInput(
        sources=sources,
        collected=StackFocus(planes.walked_axes, along=along),
        value_range=unit_range(planes, limits),
        array=opened.array,
        axes=opened.axes,
        pixel_size_um=opened.pixel_size_um,
    )


def _refuse_outputs(outputs: dict[str, Path]) -> None:
    """Refuse what is of no kind of file that could be written, before the work."""
    from semanticblur_core import io

    for flag, suffixes in (
        ("--composite", (".png", *io.TIFF_SUFFIXES)),
        ("--depth", io.TIFF_SUFFIXES),
    ):
        path = outputs.get(flag)
        if path and path.suffix.lower() not in suffixes:
            raise click.UsageError(f"{flag}={path}: is written as {' or '.join(suffixes)}")


def _refuse_same_masks(sources: list[Source], folder: Path) -> None:
    """Refuse masks of which one would take another's place."""
    named: dict[str, Path] = {}
    for source in sources:
        other = named.setdefault(source.name, source.path)
        if other != source.path:
            raise click.UsageError(
                f"{other} and {source.path} would have the same mask, {folder}/{source.name}.png; "
                "check the folder above them with --recursive, or one after the other"
            )


def _refuse_composite(opened: _StackInput, composite: Path | None) -> None:
    import numpy as np

    if len({opened.collected.others(source.index) for source in opened.sources}) > 1:
        walked, along = opened.collected.walked_axes, opened.collected.along
        one = ",".join(":" if axis == along else "0" for axis in walked)
        raise click.UsageError(
            "--composite, --depth: of one stack; this one has several along its other axes, of "
            f"{walked}: --planes takes one, such as {one}"
        )
    if composite and composite.suffix.lower() == ".png" and opened.array.dtype != np.uint8:
        raise click.UsageError(
            f"--composite={composite}: {opened.array.dtype} pixels are written as .tif"
        )


def _tile_px(
    tile_size: tuple[float, str] | None, opened: _StackInput | None
) -> int | Callable[[Source], int] | None:
    """Side of the tiles; in micrometres, each file's own pixel size says how many pixels."""
    from semanticblur_core import stacks
    from semanticblur_core.focus.scores import tile_size_in_px

    if tile_size is None:
        return None
    size, unit = tile_size
    if unit == "px":
        return int(size)
    if opened and opened.pixel_size_um:
        return tile_size_in_px(size, opened.pixel_size_um.get("X"))

    def of_source(source: Source) -> int:
        has_size = source.path.suffix.lower() in stacks.STACK_SUFFIXES and source.path.exists()
        sizes = stacks.read_pixel_size(source.path) if has_size else {}
        return tile_size_in_px(size, sizes.get("X"))

    # Planes of one stack are alike.
    return of_source(opened.sources[0]) if opened else of_source


def _write_composite(
    opened: _StackInput, channels: Any, along: str, composite: Path | None, depth: Path | None
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
