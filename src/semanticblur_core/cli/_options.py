"""Options and reporting shared by commands."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from semanticblur_core.cli._echo import echo, readable
from semanticblur_core.config import MAX_SIZE_PX, MIN_SIZE_PX

if TYPE_CHECKING:
    from rich.progress import Progress

    from semanticblur_core.data.labels import LabelledImage

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType

device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda (or cuda:1 ...) or mps."
)
precision_option = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto: bfloat16 where the device is faster with it.",
)

backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", "torch", "compile", "onnxruntime", "openvino"]),
    default="auto",
    show_default=True,
    help="What computes the network. auto: what `bench backends` found to be fastest here, torch "
    "until it was run.",
)
flip_option = click.option(
    "--flip", is_flag=True, help="Average with the mirrored image's map, in twice the time."
)
method_option = click.option(
    "--method",
    type=click.Choice(["network", "hifst", "lbp", "dbdf"]),
    default="network",
    show_default=True,
    help="network: the model. Others need no weights: HiFST, local binary patterns, or spectrum, "
    "gradient and kurtosis.",
)
max_pixels_option = click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=1_000_000_000,
    show_default=True,
    help="Larger images are refused instead of filling the memory.",
)
level_option = click.option(
    "--level",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Resolution level of a pyramid, 0 is full.",
)
series_option = click.option(
    "--series",
    type=click.IntRange(0),
    metavar="N",
    help="Which image of a TIFF that holds several, from 0.",
)
mask_polarity_option = click.option(
    "--mask-polarity",
    type=click.Choice(["blur", "sharp"]),
    default="blur",
    show_default=True,
    help="White in masks is it (CUHK: blur; DUT and EBD: sharp).",
)


# Sides of a photograph that is still squashed without a word.
_LONGEST = 4


class PathType(click.Path):
    """A path of which a leading ``~`` is the home folder: shells leave it after ``=``.

    With ``writes`` a file that could not be written is refused at once, not after the work.
    """

    def __init__(self, *, writes: bool = False, **how: Any) -> None:
        super().__init__(path_type=Path, **how)
        self.writes = writes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from semanticblur_core.disk import expand_home

        path = expand_home(value)
        super().convert(path, param, ctx)
        if self.writes:
            from semanticblur_core.disk import require_writable

            require_writable(path)
        return path


class ShareType(click.FloatRange):
    """A number of 0 to 1; unlike click's own, not one that is none (NaN)."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not in the range 0<=x<=1.", param, ctx)
        return number


class SizeType(_ParamType):
    """``native`` or a number of pixels."""

    name = "native|PIXELS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if isinstance(value, int):
            return value
        if value == "native":
            return "native"
        try:
            pixels = int(value)
        except ValueError:
            self.fail(f"expected native or a number of pixels, got {value!r}", param, ctx)
        if pixels < MIN_SIZE_PX:
            self.fail(f"expected at least {MIN_SIZE_PX} pixels, got {pixels}", param, ctx)
        if pixels > MAX_SIZE_PX:
            self.fail(
                f"expected at most {MAX_SIZE_PX} pixels, got {pixels}; native "
                "works in tiles of any image",
                param,
                ctx,
            )
        return pixels


class RangesType(_ParamType):
    """``LOW,HIGH`` once, or for each channel of a stack."""

    name = "LOW,HIGH[,LOW,HIGH...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[float, float], ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = [float(part) for part in value.split(",")]
            pairs = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        except ValueError:
            self.fail(f"expected numbers LOW,HIGH[,LOW,HIGH...], got {value!r}", param, ctx)
        if not all(-math.inf < low < high < math.inf for low, high in pairs):
            self.fail(f"expected finite numbers, LOW below HIGH, got {value}", param, ctx)
        return pairs


class RangeType(_ParamType):
    """``LOW,HIGH``."""

    name = "LOW,HIGH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        try:
            low, high = (float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"expected two numbers LOW,HIGH, got {value!r}", param, ctx)
        if not -math.inf < low < high < math.inf:
            self.fail(f"expected finite numbers, LOW below HIGH, got {value}", param, ctx)
        return low, high


class ScalesType(_ParamType):
    """Numbers separated by commas."""

    name = "S[,S...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"expected numbers separated by commas, got {value!r}", param, ctx)


class PlanesType(_ParamType):
    """Numbers and ranges, one for each axis: ``0,2:5``."""

    name = "I|I:J,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[slice, ...]:
        if isinstance(value, tuple):
            return value
        slices = []
        for part in value.split(","):
            first, colon, last = part.partition(":")
            try:
                start = int(first) if first or not colon else 0
                stop = (int(last) if last else None) if colon else start + 1
            except ValueError:
                self.fail(f"expected numbers or ranges such as 3 or 2:5, got {part!r}", param, ctx)
            if start < 0 or (stop is not None and stop <= start):
                self.fail(f"expected a plane from 0 on or a rising range, got {part!r}", param, ctx)
            slices.append(slice(start, stop))
        return tuple(slices)


planes_option = click.option(
    "--planes",
    type=PlanesType(),
    help="Planes of a stack, from 0: 3, 2:5 (without 5) or one of these for each axis, 0,2:5.",
)


class ChannelsType(_ParamType):
    """``each``, ``mean``, or a channel by its number or its name."""

    name = "each|mean|NUMBER|NAME"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if value in ("each", "mean") or isinstance(value, int):
            return value  # type: ignore[no-any-return]
        if not value.strip():
            self.fail("expected each, mean, or the number or name of a channel", param, ctx)
        return int(value) if value.isdecimal() else value


class ListType(_ParamType):
    """Comma-separated choices."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices = choices
        self.name = f"{'|'.join(choices)}[,...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        parts = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        wrong = [part for part in parts if part not in self.choices]
        if wrong:
            self.fail(f"expected of {', '.join(self.choices)}, got {wrong[0]!r}", param, ctx)
        return parts


def refuse_network_flags(method: str, *names: str) -> None:
    """Refuse flags of the network that were given beside another method, as `refuse_flags`."""
    if method != "network":
        refuse_flags(f"of the network only, and --method={method} is none", *names)


def refuse_flags(why: str, *names: str) -> None:
    """Refuse flags, named by their parameters, that were given where they are without effect.

    Raises
    ------
    click.UsageError
        Naming the first of them.
    """
    context = click.get_current_context()
    assert {option.name for option in context.command.params} >= set(names)
    for option in context.command.params:
        if option.name in names and (
            context.get_parameter_source(option.name) == click.core.ParameterSource.COMMANDLINE
        ):
            raise click.UsageError(f"{option.opts[0]}: {why}")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on the error stream; shown on a terminal only."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        yield progress


def say(progress: Progress, text: str, *, err: bool = False) -> None:
    """Print a line while a bar is shown: above it where both are on one terminal."""
    if progress.console.is_terminal and (err or sys.stdout.isatty()):
        # Names of files may hold bytes that are no text.
        text = readable(text.encode("utf-8", "replace").decode())
        progress.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
    else:
        echo(text, err=err)


def warn_of_squashing(progress: Progress, name: str, width: int, height: int) -> None:
    """Tell of an image so long that squashing it to a square hides what is blurred."""
    if max(height, width) > _LONGEST * max(1, min(height, width)):
        say(
            progress,
            f"semanticblur-core: {name}: {width} x {height} px are squashed to a square, which "
            "hides blur in so long an image; --size=native analyses it in tiles",
            err=True,
        )


def refuse_clashes(
    outputs: Mapping[str, Path | None], inputs: Iterable[Path], results: Iterable[Path] = ()
) -> None:
    """Refuse output files that are inputs, one another, or other results.

    Parameters
    ----------
    outputs
        Files by the flags that name them.
    inputs
        Files that are read.
    results
        Files that are written besides.

    Raises
    ------
    click.UsageError
        Naming the first.
    """
    named = {flag: path for flag, path in outputs.items() if path is not None}
    seen: dict[str, str] = {}
    names = {path.name for path in named.values()}
    # By the name first: there may be a million inputs, and each look at the disk takes its time.
    read, written = (
        {os.path.realpath(path) for path in paths if path.name in names} if named else set()
        for paths in (inputs, results)
    )
    for flag, path in named.items():
        place = os.path.realpath(path)
        other = seen.setdefault(place, flag)
        if other != flag:
            raise click.UsageError(f"{other} and {flag} name the same file, {path}")
        if place in read:
            raise click.UsageError(f"{flag}={path}: is an input; give the output another name")
        if place in written:
            raise click.UsageError(f"{flag}={path}: is the name of a result; give it another")


def override(text: str, config: Any, flag: str = "--set") -> tuple[str, Any]:
    """Key and value of ``KEY=VALUE`` for a field of a configuration, of the field's type."""
    from semanticblur_core.errors import ConfigError

    key, separator, value = text.partition("=")
    known = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if not separator or key not in known:
        raise ConfigError(f"{flag}={text}: expected KEY=VALUE with KEY one of {', '.join(known)}")
    if isinstance(known[key], bool):
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"{flag}={text}: expected true or false")
        return key, value.lower() == "true"
    try:
        return key, type(known[key])(value)
    except ValueError:
        kind = type(known[key]).__name__
        raise ConfigError(f"{flag}={text}: expected a value of type {kind}") from None


def read_labelled(
    data: Path | None, images: Path | None, masks: Path | None, mask_polarity: str = "blur"
) -> list[LabelledImage]:
    """Labelled images of an annotation store, or of a folder of images and one of masks."""
    from semanticblur_core.data.datasets import find_pairs
    from semanticblur_core.data.store import is_store, labelled_pairs, read_store
    from semanticblur_core.errors import DataError

    if (data is None) == (images is None) or (images is None) != (masks is None):
        raise click.UsageError("give --data, or both --images and --masks")
    if data is not None and is_store(data):
        return read_store(data)
    if data is not None:
        images, masks = data / "images", data / "masks"
        if not masks.is_dir():
            raise DataError(f"{data}: holds neither images/ and labels/ nor images/ and masks/")
    assert images is not None
    assert masks is not None
    return labelled_pairs(find_pairs(images, masks), blurred_is_white=mask_polarity == "blur")
