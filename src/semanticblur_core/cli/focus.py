"""``semanticblur-core focus``."""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from semanticblur_core.cli._echo import echo
from semanticblur_core.cli._focus_inputs import Part, find_sources, open_stack
from semanticblur_core.cli._focus_results import Results, write_composite
from semanticblur_core.cli._options import (
    ChannelsType,
    PathType,
    RangeType,
    ShareType,
    SizeType,
    device_option,
    level_option,
    max_pixels_option,
    method_option,
    planes_option,
    precision_option,
    progress_bar,
    refuse_clashes,
    refuse_flags,
    refuse_network_flags,
    say,
    series_option,
)

if TYPE_CHECKING:
    from semanticblur_core.cli._focus_inputs import StackInput
    from semanticblur_core.focus.calibration import Gate
    from semanticblur_core.focus.check import FocusOptions, Source
    from semanticblur_core.inference.map_maker import MapMaker

_file = PathType(dir_okay=False, writes=True)
_folder = PathType(file_okay=False)
_share = ShareType()
_SCORES = (
    *("in_focus_fraction", "mean_blur", "largest_in_focus_fraction", "subject_in_focus"),
    *("variance_of_laplacian", "tenengrad", "normalised_variance", "spectrum_slope"),
    "blur_effect",
)

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
        if not 0 < size < math.inf or (unit == "px" and size != int(size)):
            self.fail(f"expected whole pixels or micrometres above 0, got {value!r}", param, ctx)
        return size, unit


class _FocusGroup(click.Group):
    """Tells of files that a shell made of a pattern, which are no commands."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and Path(args[0]).exists():
            raise click.UsageError(
                f"{args[0]}: is no option; quote a pattern, or give --input several times"
            )
        return super().resolve_command(ctx, args)


@click.group(name="focus", cls=_FocusGroup, invoke_without_command=True)
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
    "--channels",
    type=ChannelsType(),
    default="each",
    show_default=True,
    help="Of a stack's file: each, mean, or one by number or name.",
)
@planes_option
@level_option
@series_option
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
@click.option(
    "--overwrite", is_flag=True, help="Let these two, and masks of photogrammetry, replace files."
)
@click.option("--report", type=_file, help="Write an HTML page that works offline.")
@click.option("--csv", "csv_file", type=_file, help="Write a line an image.")
@click.option("--json", "json_file", type=_file, help="Write everything that was measured.")
@click.option(
    "--resume",
    is_flag=True,
    help="Take over from --json what an earlier run measured of files that have not changed; "
    "gates are applied anew.",
)
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
    "--fields",
    type=_TileType(),
    help="Cut slides, and other large images, into fields of view of so many pixels at most, or "
    "250um, and check each as an image.",
)
@click.option(
    "--min-fields",
    type=_share,
    default=1.0,
    show_default=True,
    help="Of --fields: a plane passes where at least this share of its fields does.",
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
    options = _options(**measuring)
    region = measuring["region"]
    detector, protocol = _detector(**measuring)
    default_name = Path(detector.name).stem.partition("@")[0] or "default"
    path = output or calibration.stored_path(name or default_name)
    examples: list[list[dict[str, float]]] = []
    n_failed = 0
    problems: list[str] = []
    for inputs in (good, bad):
        sources = find_sources(inputs, recursive, options.max_pixels, problems)
        options = replace(options, region=_region(region, sources))
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
    replaces = ", in place of an earlier one" if path.exists() else ""
    calibration.save(found, path)
    echo(
        f"{found.gate.describe()}, from {found.n_good} good and {found.n_bad} bad examples: AUC "
        f"{found.auc:.3f}, {found.accuracy:.1%} right when each is left out in turn -> "
        f"{path}{replaces}"
    )
    if n_failed or problems:
        raise SystemExit(2)


def _check(
    *,
    inputs: tuple[str, ...],
    recursive: bool,
    stack: bool,
    axes: str | None,
    channels: Any,
    planes: tuple[slice, ...] | None,
    level: int,
    series: int | None,
    along: str,
    measure: str,
    composite: Path | None,
    depth: Path | None,
    overwrite: bool,
    report: Path | None,
    csv_file: Path | None,
    json_file: Path | None,
    resume: bool,
    calibration: str | None,
    sort: str | None,
    keep_best: int | None,
    fields: tuple[float, str] | None,
    min_fields: float,
    tile_size: tuple[float, str] | None,
    mask_output: Path | None,
    mask_margin: int,
    **flags: Any,
) -> None:
    from semanticblur_core import disk
    from semanticblur_core.focus.check import mask_path
    from semanticblur_core.focus.earlier import earlier_masks

    if not inputs:
        raise click.UsageError("give --input, or `focus calibrate`")
    along = along.upper()
    if not stack:
        refuse_flags(
            "goes with --stack",
            *("along", "measure", "composite", "depth"),
        )
    elif mask_output or keep_best or resume or fields:
        raise click.UsageError(
            "--mask-output, --keep-best, --resume and --fields go without --stack"
        )
    elif len(inputs) > 1:
        raise click.UsageError("--stack takes one --input")
    if resume and not json_file:
        raise click.UsageError("--resume goes with --json, the file that it goes on from")
    if resume and flags["region"] not in ("image", "content"):
        raise click.UsageError("--resume goes without masks of --region, which may have changed")
    if not fields:
        refuse_flags("goes with --fields", "min_fields")
    elif mask_output:
        raise click.UsageError("--mask-output goes without --fields")
    elif flags["region"] not in ("image", "content"):
        raise click.UsageError("--fields goes with --region=image or content")
    outputs = {
        "--composite": composite,
        "--depth": depth,
        "--report": report,
        "--csv": csv_file,
        "--json": json_file,
    }
    _refuse_outputs({flag: path for flag, path in outputs.items() if path is not None})
    gates = _gates(flags)
    measuring = {key: flags[key] for key in flags if key not in _GATE_FLAGS}
    options = replace(
        _options(**measuring),
        measure=measure if stack else None,
        mask_folder=mask_output,
        mask_margin_px=mask_margin,
        thumbnails=report is not None,
    )
    with ExitStack() as resources:
        opened: StackInput | None = None
        problems: list[str] = []
        if stack:
            opened = resources.enter_context(
                open_stack(
                    inputs[0], recursive, axes, channels, planes, level, series, along, options
                )
            )
            options = replace(options, value_range=opened.value_range)
        part = Part(
            axes,
            channels,
            planes,
            level,
            series,
            fields,
            options.value_range,
            max_pixels=options.max_pixels,
            by_content=options.region == "content",
            with_pictures=report is not None,
        )
        resources.callback(part.close)
        sources = (
            opened.sources
            if opened
            else find_sources(inputs, recursive, options.max_pixels, problems, part)
        )
        options = replace(options, region=_region(flags["region"], sources))
        masks = [mask_path(mask_output, source.name) for source in sources] if mask_output else []
        refuse_clashes(outputs, (source.path for source in sources), masks)
        for path in (composite, depth):
            if path and path.is_file() and not overwrite:
                raise click.UsageError(f"{path}: exists already; --overwrite replaces it")
        if mask_output:
            _refuse_same_masks(sources, mask_output)
            _refuse_taken_masks(sources, masks, flags["region"])
            if not overwrite:
                mine = earlier_masks(json_file, mask_output) if resume and json_file else set()
                named = zip(masks, sources, strict=True)
                _refuse_existing(path for path, source in named if source.name not in mine)
            disk.require_writable(mask_output / "mask.png")
        if opened and (composite or depth):
            _refuse_composite(opened, composite)
        detector, protocol = _detector(**measuring)
        if calibration:
            gates.append(_calibrated(calibration, protocol))
        options = replace(
            options, gates=tuple(gates), tile_size_px=_tile_px(tile_size, opened, series)
        )
        results = Results(
            detector, protocol, options, opened, sort, keep_best, tile_size, part, min_fields
        )
        results.run(sources, report=report, json_file=json_file, csv_file=csv_file, resume=resume)
        results.print()
        if opened and (composite or depth):
            write_composite(opened, along, composite, depth)
    if results.n_failed or results.n_without_mask or problems:
        raise SystemExit(2)
    if not results.passed:
        raise SystemExit(1)


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


def _options(
    *,
    size: Any,
    threshold: float,
    region: Any,
    subject: Any,
    value_range: tuple[float, float] | None,
    max_pixels: int,
    **_: Any,
) -> FocusOptions:
    """How is measured, without gates."""
    from semanticblur_core.focus.check import FocusOptions

    return FocusOptions(
        size=size,
        value_range=value_range,
        threshold=threshold,
        region=region if region in ("image", "content") else "image",  # masks come with the images
        subject=subject,
        max_pixels=max_pixels,
    )


def _detector(
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
    **_: Any,
) -> tuple[MapMaker, dict[str, Any]]:
    """What finds blur, and how things are measured, for calibrations."""
    refuse_network_flags(method, "model", "device", "precision", "size")
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
    return detector, protocol


def _region(text: str, sources: list[Source]) -> Any:
    """Where to look, of each image; masks lie as the photographs do, or all in the folder."""
    if text in ("image", "content"):
        return text
    from semanticblur_core import disk, io
    from semanticblur_core.data.datasets import group_by_stem, list_images
    from semanticblur_core.errors import DataError
    from semanticblur_core.focus.check import mask_path

    folder = disk.expand_home(text)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    # By the folders that they lie in: a raw file has the mask of the JPEG beside it.
    folders = {source: os.path.abspath(source.path.parent) for source in sources}  # noqa: PTH100
    n_of_name = _count((source.name, folders[source]) for source in sources)
    n_of_place = _count((_place(source), folders[source]) for source in sources)
    n_of_stem = _count((_stem(source), folders[source]) for source in sources)

    @functools.cache
    def by_stem(where: Path) -> dict[str, list[Path]]:
        has_images = any(
            path.suffix.lower() in io.IMAGE_SUFFIXES and not path.name.startswith(".")
            for path in where.iterdir()
        )
        return group_by_stem(list_images(where)) if has_images else {}

    def region(source: Source) -> Any:
        same_mask = f"{source.path}: other images of this name have the same mask"
        if n_of_name[source.name] > 1:
            raise DataError(same_mask)
        as_written = mask_path(folder, source.name)  # by --mask-output, as the photograph is stored
        if as_written.is_file():
            is_file = source.path.name == Path(source.name).name and source.path.is_file()
            turned = io.read_orientation(source.path) if is_file else 1
            return io.to_upright(io.read_mask(as_written), turned)
        beside = folder / Path(source.name).parent
        found = by_stem(beside).get(_stem(source), []) if beside.is_dir() else []
        if found and n_of_place[_place(source)] > 1:
            raise DataError(same_mask)
        if not found and beside != folder:
            found = by_stem(folder).get(_stem(source), [])
            if found and n_of_stem[_stem(source)] > 1:
                raise DataError(
                    f"{source.name}: {found[0]} might be of {n_of_stem[_stem(source)]} images; "
                    "masks lie in folders as the images do"
                )
        if len(found) != 1:
            raise DataError(f"{source.name}: {len(found)} masks of this name in {folder}")
        return io.read_mask(found[0])

    return region


def _stem(source: Source) -> str:
    from semanticblur_core.data.datasets import stem_of

    return stem_of(Path(source.name))


def _place(source: Source) -> tuple[Path, str]:
    return Path(source.name).parent, _stem(source)


def _count(pairs: Iterable[tuple[Any, str]]) -> Counter[Any]:
    """Of each first one, how many different second ones there are."""
    return Counter(first for first, _ in set(pairs))


def _refuse_outputs(outputs: dict[str, Path]) -> None:
    """Refuse what is of no kind of file that could be written, before the work."""
    tiffs = (".tif", ".tiff")
    for flag, suffixes in (
        ("--composite", (".png", *tiffs)),
        ("--depth", tiffs),
    ):
        path = outputs.get(flag)
        if path and path.suffix.lower() not in suffixes:
            raise click.UsageError(f"{flag}={path}: is written as {' or '.join(suffixes)}")


def _refuse_same_masks(sources: list[Source], folder: Path) -> None:
    """Refuse masks of which one would take another's place."""
    from semanticblur_core.focus.check import mask_path

    named: dict[str, Path] = {}
    for source in sources:
        other = named.setdefault(source.name, source.path)
        if other != source.path:
            raise click.UsageError(
                f"{other} and {source.path} would have the same mask, "
                f"{mask_path(folder, source.name)}; "
                "check the folder above them with --recursive, or one after the other"
            )


def _refuse_taken_masks(sources: list[Source], masks: list[Path], region: str) -> None:
    """Refuse masks that would take the place of an image, or of a mask that is read."""
    from semanticblur_core import disk

    names = {path.name for path in masks}
    read = {
        os.path.realpath(source.path): source.path
        for source in sources
        if source.path.name in names
    }
    folder = None if region in ("image", "content") else os.path.realpath(disk.expand_home(region))
    for path in masks:
        place = os.path.realpath(path) if read or folder else ""
        if place in read:
            raise click.UsageError(f"--mask-output: {path} is an input; give another folder")
        if folder and Path(folder) in Path(place).parents and path.is_file():
            raise click.UsageError(
                f"--mask-output: {path} is read by --region; give another folder"
            )


def _refuse_existing(masks: Iterable[Path]) -> None:
    for path in masks:
        if path.exists():
            raise click.UsageError(f"{path}: exists already; --overwrite replaces masks")


def _refuse_composite(opened: StackInput, composite: Path | None) -> None:
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
    tile_size: tuple[float, str] | None, opened: StackInput | None, series: int | None
) -> float | Callable[[Source], float] | None:
    """Side of the tiles; in micrometres, each file's own pixel size says how many pixels."""
    from semanticblur_core import stacks
    from semanticblur_core.errors import ImageError
    from semanticblur_core.focus.scores import tile_size_in_px

    if tile_size is None:
        return None
    size, unit = tile_size
    if unit == "px":
        return int(size)
    if opened and opened.scale.pixel_size_um:
        try:
            return tile_size_in_px(size, opened.scale.pixel_side_um)
        except ImageError as error:
            raise ImageError(f"{opened.sources[0].path}: {error}") from error

    def of_source(source: Source) -> float:
        if source.pixel_side_um is not None:
            return tile_size_in_px(size, source.pixel_side_um)
        has_size = source.path.suffix.lower() in stacks.STACK_SUFFIXES and source.path.exists()
        side = stacks.read_scale(source.path, series=series).pixel_side_um if has_size else None
        return tile_size_in_px(size, side)

    # Planes of one stack are alike.
    return of_source(opened.sources[0]) if opened else of_source
