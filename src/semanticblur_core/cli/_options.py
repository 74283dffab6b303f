"""Options and reporting shared by commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType

device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda (or cuda:1 ...) or mps."
)
precision_option = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="auto: bfloat16 where the device is faster with it.",
)

mask_polarity_option = click.option(
    "--mask-polarity",
    type=click.Choice(["blur", "sharp"]),
    default="blur",
    show_default=True,
    help="White in masks is it (CUHK: blur; DUT and EBD: sharp).",
)


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
        if pixels < 33:
            self.fail(f"expected at least 33 pixels, got {pixels}", param, ctx)
        return pixels


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
        if not low < high:
            self.fail(f"expected LOW below HIGH, got {value}", param, ctx)
        return low, high


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


class ChannelsType(_ParamType):
    """``each``, ``mean`` or the number of a channel."""

    name = "each|mean|NUMBER"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if value in ("each", "mean") or isinstance(value, int):
            return value  # type: ignore[no-any-return]
        if value.isdecimal():
            return int(value)
        self.fail(f"expected each, mean or the number of a channel, got {value!r}", param, ctx)


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
