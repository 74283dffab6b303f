"""What the axes of an array mean: steps, place and names of channels, as files state them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np

from semanticblur_core.errors import ImageError

# What happens along the channels, see `semanticblur_core.inference.planes.Planes`.
Channels = int | Literal["each", "mean"]

# As OME-XML, ImageJ and OME-Zarr name them.
_MICROMETRES = {
    **{"pm": 1e-6, "picometer": 1e-6, "Å": 1e-4, "angstrom": 1e-4, "nm": 1e-3, "nanometer": 1e-3},
    **{"µm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0},
    **{"mm": 1e3, "millimeter": 1e3, "cm": 1e4, "centimeter": 1e4, "dm": 1e5, "decimeter": 1e5},
    **{"m": 1e6, "meter": 1e6, "in": 25400.0, "inch": 25400.0},
}
_SECONDS = {
    **{"ns": 1e-9, "nanosecond": 1e-9, "µs": 1e-6, "us": 1e-6, "microsecond": 1e-6},
    **{"ms": 1e-3, "msec": 1e-3, "millisecond": 1e-3, "milliseconds": 1e-3},
    **{"s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "usec": 1e-6, "µsec": 1e-6},
    **{"min": 60.0, "minute": 60.0, "minutes": 60.0, "h": 3600.0, "hr": 3600.0, "hour": 3600.0},
    **{"hours": 3600.0, "d": 86400.0, "day": 86400.0, "days": 86400.0},
}
# Micrometres of TIFF's ResolutionUnit.
_RESOLUTION_UNITS = {2: 25400.0, 3: 1e4}
# Printers set 1200 dots an inch, 21 micrometres each.
_LARGEST_OF_MICROSCOPE_UM = 20.0
_MPP = re.compile(r"\bMPP\s*=\s*([0-9.]+)")


@dataclass(frozen=True)
class Scale:
    """Steps, place and names of channels of an array, as far as they are known.

    Attributes
    ----------
    pixel_size_um
        Micrometres a step along an axis.
    time_step_s
        Seconds a step along T.
    unnamed
        Steps other than 1 along axes whose unit is not known.
    origin
        Place of the first index along an axis, in the unit of its step; 0 where none is given.
    channel_names
        One for each index along C, or none.
    """

    pixel_size_um: Mapping[str, float] = field(default_factory=dict)
    time_step_s: float | None = None
    origin: Mapping[str, float] = field(default_factory=dict)
    channel_names: Sequence[str] = ()
    unnamed: Mapping[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> dict[str, float]:
        """Along an axis whose unit is known: micrometres, along T seconds."""
        time = {} if self.time_step_s is None else {"T": self.time_step_s}
        return dict(self.pixel_size_um) | time

    @property
    def pixel_side_um(self) -> float | None:
        """Of square pixels, None where it is not known.

        Raises
        ------
        ImageError
            If they are not square.
        """
        height, width = (self.pixel_size_um.get(axis) for axis in "YX")
        if (
            height is not None
            and width is not None
            and not math.isclose(height, width, rel_tol=0.01)
        ):
            raise ImageError(
                f"pixels of {height:g} x {width:g} um are not square: give the size in pixels"
            )
        return width

    def of_part(self, chosen: Mapping[str, range]) -> Scale:
        """That of the indices that are chosen along some axes."""
        steps, unnamed = self.steps, dict(self.unnamed)
        origin, names = dict(self.origin), self.channel_names
        for known in (steps, unnamed):
            for axis in known.keys() & chosen.keys():
                origin[axis] = origin.get(axis, 0.0) + chosen[axis][0] * known[axis]
                if chosen[axis].step < 0:  # a step is above 0, so their places cannot be told
                    del origin[axis]
                known[axis] *= abs(chosen[axis].step)
        if names and "C" in chosen:
            names = tuple(names[i] for i in chosen["C"])
        return _of_steps(steps, origin, names, unnamed)

    def coarser(self, factors: Mapping[str, float]) -> Scale:
        """That of a level of a pyramid whose steps are so many times as large."""
        sizes = {axis: size * factors.get(axis, 1) for axis, size in self.pixel_size_um.items()}
        return replace(self, pixel_size_um=sizes)

    def ome_metadata(self, axes: str, shape: Sequence[int]) -> dict[str, Any]:
        """Of an array of these axes and lengths, as tifffile takes it for OME-TIFF."""
        metadata: dict[str, Any] = {"axes": axes}
        for axis in "XYZ":
            if axis in axes and axis in self.pixel_size_um:
                metadata[f"PhysicalSize{axis}"] = self.pixel_size_um[axis]
                metadata[f"PhysicalSize{axis}Unit"] = "µm"
        if self.time_step_s is not None and "T" in axes:
            metadata |= {"TimeIncrement": self.time_step_s, "TimeIncrementUnit": "s"}
        lengths = {axis: n for axis, n in zip(axes, shape, strict=True) if axis not in "YXS"}
        if self.channel_names and lengths.get("C") == len(self.channel_names):
            metadata["Channel"] = {"Name": list(self.channel_names)}
        plane: dict[str, Any] = {}
        n_planes = math.prod(lengths.values())
        for axis in "XYZ":
            if axis in axes and axis in self.pixel_size_um and self.origin.get(axis):
                places = np.full(tuple(lengths.values()), self.origin[axis])
                if axis in lengths:
                    along = np.arange(lengths[axis]) * self.pixel_size_um[axis]
                    after = len(lengths) - 1 - list(lengths).index(axis)
                    places += along.reshape(-1, *[1] * after)
                plane[f"Position{axis}"] = places.ravel().tolist()
                plane[f"Position{axis}Unit"] = ["µm"] * n_planes
        return metadata | ({"Plane": plane} if plane else {})


def of_tiff(tiff: Any, series: Any) -> Scale:
    """That of an image of a `tifffile.TiffFile`; nothing of what is said that makes no sense."""
    with suppress(ElementTree.ParseError, ValueError, TypeError):  # that spoils no image
        root = ElementTree.fromstring(tiff.ome_metadata or "<OME/>")
        pixels = ome_pixels(root, tiff, series)
        steps: dict[str, float] = {}
        with suppress(ValueError, TypeError):
            steps |= _stated_pixel_size(tiff, pixels, series.keyframe)
        with suppress(ValueError, TypeError):
            steps |= _stated_time_step(tiff, pixels)
        origin: dict[str, float] = {}
        names: tuple[str, ...] = ()
        if pixels is not None:
            with suppress(ValueError, TypeError):
                origin = _stated_place(pixels)
            found = [e.get("Name", "") for e in pixels if e.tag.endswith("}Channel")]
            names = tuple(found) if any(found) else ()
        return _of_steps(steps, origin, names)
    return Scale()


def ome_pixels(root: ElementTree.Element, tiff: Any, series: Any) -> ElementTree.Element | None:
    """What OME metadata say of the pixels of an image; None where they say nothing."""
    found = [
        (image.get("Name", ""), pixels)
        for image in root.iter()
        for pixels in image
        if pixels.tag.endswith("Pixels")
    ]
    # tifffile makes a series of each, in order, but for those whose file is not there.
    if len(found) == len(tiff.series):
        return found[[each is series for each in tiff.series].index(True)][1]
    if len(found) > 1:
        lengths = dict(zip(series.axes, series.shape, strict=True))
        sides = [str(lengths.get(axis)) for axis in "XY"]
        found = [
            (name, pixels)
            for name, pixels in found
            if name == series.name and [pixels.get(f"Size{axis}") for axis in "XY"] == sides
        ]
    return found[0][1] if len(found) == 1 else None


def of_ngff(
    image: Mapping[str, Any], dataset: Mapping[str, Any], omero: Mapping[str, Any] | None = None
) -> tuple[str, Scale]:
    """Axes, empty if they are not named, and scale of one level of an OME-Zarr image.

    Parameters
    ----------
    image, dataset
        Of the attributes ``multiscales`` and of its ``datasets``.
    omero
        The attribute of that name, which names channels.
    """
    described = image.get("axes") or []
    names = [axis["name"] if isinstance(axis, dict) else axis for axis in described]
    axes = "".join(name[0].upper() for name in names)
    steps: dict[str, float] = {}
    unnamed: dict[str, float] = {}
    origin: dict[str, float] = {}
    channels: tuple[str, ...] = ()
    # What a file says wrong of its pixels' size spoils no image.
    with suppress(TypeError, ValueError, KeyError, AttributeError):
        # That of all levels comes after that of the level.
        scales, places = [1.0] * len(axes), [0.0] * len(axes)
        for each in (dataset, image):
            for transform in each.get("coordinateTransformations") or []:
                if transform["type"] == "scale":
                    by = [float(b) for b in transform["scale"]]
                    scales = [a * b for a, b in zip(scales, by, strict=True)]
                    places = [a * b for a, b in zip(places, by, strict=True)]
                elif transform["type"] == "translation":
                    moves = transform["translation"]
                    places = [a + float(b) for a, b in zip(places, moves, strict=True)]
        for letter, axis, step, place in zip(axes, described, scales, places, strict=True):
            known = _SECONDS if letter == "T" else _MICROMETRES
            factor = _factor(axis.get("unit", ""), known) if isinstance(axis, dict) else None
            if factor is not None:
                steps[letter], origin[letter] = step * factor, place * factor
            elif step != 1 or place:
                unnamed[letter], origin[letter] = step, place
    with suppress(TypeError, KeyError, AttributeError):
        channels = tuple(str(each.get("label") or "") for each in (omero or {})["channels"])
    return axes, _of_steps(steps, origin, channels if any(channels) else (), unnamed)


def _of_steps(
    steps: Mapping[str, float],
    origin: Mapping[str, float],
    names: Sequence[str],
    unnamed: Mapping[str, float] | None = None,
) -> Scale:
    """Of steps of which that along T is in seconds; without those that make no sense."""
    steps, others = (
        {axis: step for axis, step in each.items() if 0 < step < math.inf}
        for each in (steps, unnamed or {})
    )
    known = steps.keys() | others.keys()
    return Scale(
        {axis: step for axis, step in steps.items() if axis != "T"},
        steps.get("T"),
        {axis: at for axis, at in origin.items() if axis in known and at and math.isfinite(at)},
        names,
        others,
    )


def _stated_pixel_size(
    tiff: Any, pixels: ElementTree.Element | None, page: Any
) -> dict[str, float]:
    """Micrometres a step; ``pixels`` is what OME metadata say, where there are any."""
    sizes: dict[str, float] = {}
    if pixels is not None:
        for axis in "XYZ":
            size = pixels.get(f"PhysicalSize{axis}")
            factor = _factor(pixels.get(f"PhysicalSize{axis}Unit", "µm"), _MICROMETRES)
            if size is not None and factor is not None:
                sizes[axis] = float(size) * factor
    elif tiff.imagej_metadata and not tiff.ome_metadata:
        information = tiff.imagej_metadata
        factor = _factor(information.get("unit", ""), _MICROMETRES)
        if factor is not None:
            if "spacing" in information:
                sizes["Z"] = float(information["spacing"]) * factor
            sizes |= _of_resolution(page, factor)
    elif not tiff.ome_metadata:
        sizes = _of_scanner(page)
    return sizes


def _of_scanner(page: Any) -> dict[str, float]:
    """What a TIFF without such metadata says of its first image, if that is of a microscope.

    Aperio's slides say micrometres a pixel. Resolution tags count where pixels come out smaller
    than any that is printed or shown.
    """
    if found := _MPP.search(page.description) if page.description.startswith("Aperio") else None:
        return dict.fromkeys("YX", float(found[1]))
    unit = page.tags.get("ResolutionUnit")
    factor = _RESOLUTION_UNITS.get(2 if unit is None else int(unit.value), 0)
    sizes = _of_resolution(page, factor) if factor else {}
    return sizes if sizes and max(sizes.values()) < _LARGEST_OF_MICROSCOPE_UM else {}


def _of_resolution(page: Any, factor: float) -> dict[str, float]:
    """Steps along X and Y of a page's resolution tags, in units of ``factor``."""
    tags = {axis: page.tags.get(f"{axis}Resolution") for axis in "XY"}
    return {
        axis: tag.value[1] / tag.value[0] * factor
        for axis, tag in tags.items()
        if tag is not None and tag.value[0]
    }


def _stated_time_step(tiff: Any, pixels: ElementTree.Element | None) -> dict[str, float]:
    """Seconds a step along T, as `_stated_pixel_size`."""
    value, unit = None, "s"
    if pixels is not None:
        value, unit = pixels.get("TimeIncrement"), pixels.get("TimeIncrementUnit", "s")
    elif tiff.imagej_metadata and not tiff.ome_metadata:
        information = tiff.imagej_metadata
        value, unit = information.get("finterval"), information.get("tunit", "sec")
    factor = _factor(unit, _SECONDS)
    return {} if value is None or factor is None else {"T": float(value) * factor}


def _stated_place(pixels: ElementTree.Element) -> dict[str, float]:
    """Place of the first plane in micrometres; a microscope's own frame of reference has none."""
    first = {"TheC": "0", "TheT": "0", "TheZ": "0"}
    for plane in pixels:
        if plane.tag.endswith("}Plane") and first.items() <= plane.attrib.items():
            found = {}
            for axis in "XYZ":
                factor = _factor(plane.get(f"Position{axis}Unit"), _MICROMETRES)
                if factor is not None and (place := plane.get(f"Position{axis}")) is not None:
                    found[axis] = float(place) * factor
            return found
    return {}


def _factor(unit: object, known: Mapping[str, float]) -> float | None:
    """How many of ours one unit is; micro comes as the letter mu too, from ImageJ even escaped."""
    name = str(unit).strip().replace("\\u00B5", "µ").replace("\N{GREEK SMALL LETTER MU}", "µ")
    return known.get(name)
