"""Reading and writing of images, masks and blur maps: the one place that knows file formats."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from semanticblur_core import camera, disk
from semanticblur_core.errors import DataError, ImageError
from semanticblur_core.scale import Scale

TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf2", ".tf8", ".svs")
PILLOW_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif"),
    *(".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".tga", ".jp2", ".j2k"),
)
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"),
    *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv"),
)
IMAGE_SUFFIXES = (*PILLOW_SUFFIXES, *TIFF_SUFFIXES)
# Read with the extra `camera`.
CAMERA_SUFFIXES = (*camera.RAW_SUFFIXES, *camera.HEIC_SUFFIXES)
MAX_PIXELS = 1_000_000_000
# What tifffile and Bio-Formats call the pictures that scanners store beside a slide.
_BESIDE_A_SLIDE = {
    *("thumbnail", "label", "macro", "overview"),
    *("thumbnail image", "label image", "macro image", "overview image"),
}
# What others' maps may be off 0..1 by: the last bits of a sum or a sigmoid in float32.
ROUNDING = 1e-6
# A JPEG that is black all over has values up to about this; a mask has not only so few values.
_JPEG_NOISE = 30
_JPEG_LABELS = 5  # of 0, 1 and 2, whose edges ring
_FEW_VALUES = 4
_MANY_PIXELS = 0.005
_NEARLY_WHITE = 225
# OME-TIFF may state more planes than it holds, for they may lie in other files; not so many more.
_MOST_PLANES = 1_000_000


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> NDArray[Any]:
    """Read one photograph or one plane.

    Parameters
    ----------
    path
        JPEG, PNG, WebP, AVIF, BMP, PNM, GIF, TGA, JPEG 2000 or TIFF; of what is animated the first
        frame. Camera raw (see `semanticblur_core.camera.read_raw`) and HEIC with the extra
        ``camera``.
    max_pixels
        Rows times columns (times planes) above which the file is refused unread.

    Returns
    -------
    ndarray
        ``(H, W)`` or ``(H, W, 3)`` uint8, or the TIFF's or 16-bit PNG's own dtype. The EXIF
        orientation is applied and an alpha channel is dropped. PNGs of 16-bit *colour* are read
        at 8 bits.

    Raises
    ------
    ImageError
        If the file is missing, empty, damaged, of a format that is not read (or not without a
        library that is not installed), or not one 2D image.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    disk.require_file(path)
    if suffix in camera.RAW_SUFFIXES:
        array: NDArray[Any] = camera.read_raw(path, max_pixels)
    else:
        read = _read_tiff if suffix in TIFF_SUFFIXES else _read_pillow
        array = read(path, max_pixels)
    if array.ndim == 3 and array.shape[2] in (2, 4):
        array = array[..., : array.shape[2] - 1]
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ImageError(
            f"{path}: expected one grey or RGB image, got an array of shape {array.shape}; "
            "detect --axes says what they are, or save the wanted plane or channels as an image"
        )
    if array.size == 0:
        raise ImageError(f"{path}: the image has no pixels, shape {array.shape}")
    return array


def read_shape(path: Path) -> tuple[int, int]:
    """Height and width of a photograph as its header states them, unturned.

    Raises
    ------
    ImageError
        If the header cannot be read.
    """
    if path.suffix.lower() in camera.RAW_SUFFIXES:
        return camera.read_raw_shape(path)
    try:
        with camera.open_pillow(path) as opened:
            return opened.height, opened.width
    except ImageError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise disk.unreadable(path, error) from error


def read_orientation(path: Path) -> int:
    """EXIF or TIFF orientation (1 to 8) that `read_image` applies; 1 where the file says none.

    Raises
    ------
    ImageError
        If the file cannot be read.
    """
    if path.suffix.lower() in camera.RAW_SUFFIXES:
        return 1  # the picture in it is given upright, whatever way that is stored
    try:
        if path.suffix.lower() in TIFF_SUFFIXES:
            with open_tiff(path) as tiff:
                tag = whole_series(path, tiff).keyframe.tags.get("Orientation")
                code = tag.value if tag is not None else 1
        else:
            with camera.open_pillow(path) as opened:
                code = opened.getexif().get(ExifTags.Base.Orientation, 1)
        return int(code) if code in range(1, 9) else 1
    except ImageError:
        raise
    except Exception as error:  # tifffile and Pillow raise many kinds
        raise disk.unreadable(path, error) from error


def to_stored_orientation(array: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo an orientation: rows and columns ``(H, W, ...)`` as they lie in the file."""
    # 6 and 8 are each other's inverse, the others their own.
    return to_upright(array, {6: 8, 8: 6}.get(orientation, orientation))


def read_rgb8(path: Path) -> NDArray[np.uint8]:
    """Read a photograph as ``(H, W, 3)`` uint8; deeper images are scaled as in `to_unit_range`."""
    unit = to_unit_range(read_image(path), name=str(path))
    rgb = as_rgb(unit)
    if rgb.dtype == np.uint8:
        return rgb
    return np.round(rgb * 255).astype(np.uint8)


def read_mask(path: str | Path) -> NDArray[np.bool_]:
    """Read a mask of 255 (or 1-bit True) = blurred, 0 = sharp: ``(H, W)`` bool.

    Raises
    ------
    DataError
        If it is not grey, or its values are those of labels rather than of a mask: none of them is
        white and not all are 0, or they are few and others than black and white (0, 1 and 255;
        0, 128 and 255).
    """
    array = read_image(path)
    if array.ndim == 3:
        if not (array == array[..., :1]).all():
            raise DataError(f"{path}: expected a grey mask, got colours")
        array = array[..., 0]
    if array.dtype == np.bool_:
        return array
    if array.dtype != np.uint8:
        raise DataError(f"{path}: expected an 8-bit or 1-bit mask, got {array.dtype}")
    # Some rows at a time, for they are counted as numbers of eight bytes.
    blocks = range(0, len(array), 256)
    each = (np.bincount(array[top : top + 256].ravel(), minlength=256) for top in blocks)
    counts = np.sum(list(each), axis=0)
    values = np.flatnonzero(counts).tolist()
    is_jpeg = Path(path).suffix.lower() in (".jpg", ".jpeg")
    many = _MANY_PIXELS * array.size
    if is_jpeg and values[-1] <= _JPEG_NOISE and not _has_labels(array, values[-1]):
        # Wholly sharp.
        return np.zeros(array.shape, np.bool_)
    # Edges that were smoothed have many values in between, each of few pixels.
    between = counts[_JPEG_NOISE + 1 if is_jpeg else 1 : _NEARLY_WHITE].max()
    if values[-1] > 127 and len(values) <= _FEW_VALUES and between >= many:
        raise DataError(
            f"{path}: its values are {', '.join(map(str, values))}, but a mask is 0 = sharp and "
            "255 = blurred alone; what is not to count is left unlabelled in an annotation store"
        )
    if 0 < values[-1] <= 127:
        raise DataError(
            f"{path}: its largest value is {values[-1]}, but a mask is 0 = sharp and 255 = "
            "blurred; a mask of 0 and 1 is to be multiplied by 255, labels are read from a store"
        )
    return array > 127


def _has_labels(array: NDArray[np.uint8], largest: int) -> bool:
    """Whether it is even areas that are not 0, as of labels that became a JPEG; noise is none."""
    if largest > _JPEG_LABELS:
        return False
    from scipy.ndimage import maximum_filter, minimum_filter

    is_flat = maximum_filter(array, 3) == minimum_filter(array, 3)
    marked = array > 0
    return bool((is_flat & marked).sum() > 0.5 * marked.sum() >= 0.5 * _MANY_PIXELS * array.size)


def read_map(path: str | Path) -> NDArray[np.float32]:
    """Read a blur map of any method: ``(H, W)`` float32 in 0..1.

    Integers are divided by the largest value of their type, floats (TIFF, npy) must be in 0..1.

    Raises
    ------
    ImageError
        If it cannot be read, is not one grey image, or its floats leave 0..1.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ImageError(f"{path}: not a readable npy file: {error}") from error
    else:
        array = read_image(path)
    if not isinstance(array, np.ndarray):
        raise ImageError(f"{path}: expected one array, got an archive of several")
    if array.ndim == 3 and array.shape[2] == 3 and (array == array[..., :1]).all():
        array = array[..., 0]
    if array.ndim != 2 or array.size == 0:
        raise ImageError(f"{path}: expected a grey map, got an array of shape {array.shape}")
    largest = 1.0
    if np.issubdtype(array.dtype, np.unsignedinteger):
        if array.max() == 1:
            raise ImageError(
                f"{path}: its largest value is 1 of {np.iinfo(array.dtype).max}; a map of 0 and 1 "
                "must be of floats or 1-bit, or be multiplied"
            )
        largest = float(np.iinfo(array.dtype).max)
    elif array.dtype != np.bool_ and not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"{path}: expected a map of 8 or 16 bits or of floats, got {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if not -ROUNDING <= low <= high <= largest + ROUNDING:
        raise ImageError(f"{path}: expected floats in 0..1, got {low:g}..{high:g}")
    result: NDArray[np.float32] = (array / np.float64(largest)).clip(0, 1).astype(np.float32)
    return result


def to_unit_range(
    array: NDArray[Any], *, limits: tuple[float, float] | None = None, name: str = "image"
) -> NDArray[Any]:
    """Intensity to 0..1: the convention of every part of this package.

    Parameters
    ----------
    array
        Any real dtype.
    limits
        Values that become 0 and 1. None: 0 and 255 for uint8 (returned as it is, to be divided by
        255 where it is used), False and True for bool, otherwise the 0.1 and 99.9 percentiles, or
        the extremes where these two coincide.
    name
        For error messages.

    Returns
    -------
    ndarray
        uint8 as it came, or float32 in 0..1, where a constant image becomes 0. NaN and infinite
        values count as the low limit, and so does what a masked array masks.

    Raises
    ------
    ImageError
        If the dtype is not real, no value is finite, or limits are not finite and increasing.
    """
    array = unmasked(array)
    if limits is None and array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise ImageError(f"{name}: expected real numbers, got {array.dtype}")
    # float32 holds whole numbers up to 2^24 only.
    is_exact = array.dtype.itemsize < 4 or array.dtype == np.float32
    values: NDArray[Any] = np.array(array, np.float32 if is_exact else np.float64)
    if limits is None:
        found = robust_limits(values)
        if found is None:
            raise ImageError(f"{name}: no finite value (all NaN or infinite)")
        low, high = found
    else:
        try:
            low, high = (float(value) for value in limits)
        except (TypeError, ValueError):
            raise ImageError(f"range {limits}: expected two numbers, LOW below HIGH") from None
        if not -math.inf < low < high < math.inf:
            raise ImageError(f"range {low:g},{high:g}: expected finite numbers, LOW below HIGH")
    if high <= low:
        return np.zeros(array.shape, np.float32)
    single = np.finfo(np.float32)
    if max(-low, high) > float(single.max) / 4 or high - low < float(single.tiny):
        values = values.astype(np.float64)
    np.nan_to_num(values, copy=False, nan=low, posinf=low, neginf=low)
    np.clip(values, low, high, out=values)
    if math.isinf(high - low):
        values, low, high = values / 2, low / 2, high / 2
    values -= low
    values /= high - low
    # Rounded, the limits of float32 values may lie beyond those given.
    return np.clip(values, 0, 1, out=values).astype(np.float32, copy=False)


def robust_limits(values: NDArray[Any]) -> tuple[float, float] | None:
    """The 0.1 and 99.9 percentiles, or the extremes where these coincide.

    They are equal for a constant; None where no value is finite.
    """
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return None
    low, high = (float(v) for v in np.percentile(finite, (0.1, 99.9)))
    if low == high:  # fewer than one pixel in a thousand differs
        low, high = float(finite.min()), float(finite.max())
    return low, high


def increasing(limits: tuple[float, float]) -> tuple[float, float]:
    """Limits as they are, or above that of a constant."""
    low, high = limits
    # Above 2^53 one more is no more.
    return limits if low < high else (low, max(low + 1, math.nextafter(low, math.inf)))


def unmasked(array: Any) -> NDArray[Any]:
    """An array of what `numpy.asarray` takes; what a masked array masks is NaN, in 8 bits 0."""
    if not isinstance(array, np.ma.MaskedArray):
        return np.asarray(array)
    if array.dtype in (np.uint8, np.bool_):
        return np.ma.filled(array, 0)
    return np.ma.filled(array.astype(np.float64), np.nan) if array.dtype.kind in "iuf" else array


def finite_pixels(array: NDArray[Any], *, channel_axis: int = -1) -> NDArray[np.bool_] | None:
    """Which pixels have a value in each channel, ``(H, W)``; None where all have.

    Parameters
    ----------
    array
        ``(H, W)``, or with channels.
    channel_axis
        Where those are.
    """
    if array.dtype.kind != "f":
        return None
    known: NDArray[np.bool_] = np.isfinite(array)
    if known.ndim > 2:
        known = np.logical_and.reduce(known, axis=channel_axis)
    return None if known.all() else known


def without_alpha(array: NDArray[Any]) -> NDArray[Any]:
    """``(H, W, 3)`` of ``(H, W, 4)``; anything else as it is."""
    return array[..., :3] if array.ndim == 3 and array.shape[2] == 4 else array


def as_rgb(array: NDArray[Any]) -> NDArray[Any]:
    """Grey repeated to three channels: ``(H, W, 3)``."""
    return np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else array


def write_png(path: Path, array: NDArray[np.uint8]) -> None:
    """Write ``(H, W)`` or ``(H, W, 3)`` uint8."""
    with disk.replacing(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG", compress_level=3)


def write_tiff(path: Path, array: NDArray[np.float32]) -> None:
    """Write a ``(H, W)`` float32 map, deflate-compressed."""
    import tifffile

    with disk.replacing(path) as temporary:
        tifffile.imwrite(temporary, array, compression="zlib", photometric="minisblack")


def write_image(path: Path, array: NDArray[Any], *, scale: Scale | None = None) -> None:
    """Write ``(H, W)`` or ``(H, W, 3)`` of any real dtype as TIFF, or of 8 bits also as PNG.

    A TIFF with a pixel size becomes an OME-TIFF.

    Raises
    ------
    ImageError
        If the suffix is of neither, or a PNG is asked for of other than 8 bits.
    """
    suffix = path.suffix.lower()
    if suffix == ".png" and array.dtype == np.uint8:
        write_png(path, array)
        return
    if suffix not in TIFF_SUFFIXES:
        raise ImageError(
            f"{path}: {array.dtype} pixels are written as .tif, 8-bit ones also as .png"
        )
    import tifffile

    axes = "YX" if array.ndim == 2 else "YXS"
    metadata = (scale or Scale()).ome_metadata(axes, array.shape)
    with disk.replacing(path) as temporary:
        tifffile.imwrite(
            temporary,
            array,
            compression="zlib",
            photometric="rgb" if array.ndim == 3 else "minisblack",
            ome=len(metadata) > 1,
            metadata=metadata,
        )


def write_npy(path: Path, array: NDArray[np.float32]) -> None:
    """Write a numpy file."""
    with disk.replacing(path) as temporary, temporary.open("wb") as stream:
        # Not np.save: on a full disk it does not say that it is full.
        header = {"descr": "<f4", "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(stream, header)  # type: ignore[no-untyped-call]
        stream.write(np.ascontiguousarray(array, dtype="<f4").data)


def _read_pillow(path: Path, max_pixels: int) -> NDArray[Any]:
    try:
        with camera.open_pillow(path) as opened:
            disk.refuse_bomb(path, opened.width * opened.height, max_pixels)
            camera.refuse_lying_picture(path, opened, path.stat().st_size)
            return _pillow_array(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            raise ImageError(f"{path}: a video, not an image; `detect` reads its frames") from None
        raise ImageError(f"{path}: not an image that can be read") from None
    except ImageError:
        raise
    except Exception as error:  # its decoders raise many kinds
        raise disk.unreadable(path, error) from error


def _pillow_array(image: Image.Image) -> NDArray[Any]:
    if image.mode == "1":
        return np.asarray(image)
    if image.mode in ("I;16", "I;16B", "I", "F"):
        array = np.asarray(image)
        fits = image.mode == "I" and array.min() >= 0 and array.max() <= 65535
        return array.astype(np.uint16) if fits else array
    if image.mode in ("L", "LA"):
        return np.asarray(image.convert("L"))
    # Palettes, CMYK, YCbCr, Lab and the rest. RGBA keeps its colours, alpha is dropped.
    return np.asarray(image.convert("RGB"))


def _read_tiff(path: Path, max_pixels: int) -> NDArray[Any]:
    import tifffile

    try:
        with open_tiff(path) as tiff:
            refuse_lying_tiff(path, tiff)
            series = whole_series(path, tiff)
            page = series.keyframe
            if page.index == 0 and not is_plain_photometric(page):
                # Palettes, CMYK, Lab: Pillow knows how to turn them into RGB; it reads the first.
                return _read_pillow(path, max_pixels)
            axes = series.axes
            samples = series.shape[axes.index("S")] if "S" in axes else 1
            _refuse_channels(path, page, axes, samples)
            disk.refuse_bomb(path, math.prod(series.shape) // max(samples, 1), max_pixels)
            array: NDArray[Any] = series.asarray()
            tag = page.tags.get("Orientation")
            orientation = int(tag.value) if tag is not None else 1
            inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    except ImageError:
        raise
    except Exception as error:  # tifffile and its codecs raise many kinds
        raise disk.unreadable(path, error) from error
    if axes.startswith("S") and array.ndim == 3:
        array = np.moveaxis(array, 0, -1)
    lengths = array.shape[: max(0, array.ndim - (3 if axes.endswith("S") else 2))]
    if all(length == 1 for length in lengths):
        array = array.reshape(array.shape[len(lengths) :])
    if inverted:
        array = invert(array)
    return to_upright(array, orientation)


def _refuse_channels(path: Path, page: Any, axes: str, samples: int) -> None:
    """Refuse grey with further samples that are not said to be alpha: one of them is meant.

    Three are taken for RGB.
    """
    from tifffile import EXTRASAMPLE, PHOTOMETRIC

    is_grey = page.photometric in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE)
    alpha = {EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA}
    if is_grey and samples in (2, 4) and alpha.isdisjoint(page.extrasamples):
        raise ImageError(
            f"{path}: holds {samples} channels that are not said to be colours; detect "
            f"--axes={axes.replace('S', 'C')} takes each for an image, or save the wanted one"
        )


@contextmanager
def open_tiff(path: Path) -> Iterator[Any]:
    """A ``tifffile.TiffFile`` whose images can be counted.

    Raises
    ------
    ImageError
        If it is an image of another format, or its chain of images comes back to one of them:
        tifffile would follow it for ever.
    """
    import tifffile

    try:
        opened = tifffile.TiffFile(path)
    except tifffile.TiffFileError:
        if (kind := _pillow_format(path)) not in (None, "TIFF"):
            raise ImageError(
                f"{path}: is {kind} and no TIFF, whatever its name; rename it"
            ) from None
        raise
    with opened as tiff:
        form, stream = tiff.tiff, tiff.filehandle
        offset, seen = tiff.pages.first.offset, set[int]()
        while offset != 0:
            if offset in seen:
                raise ImageError(
                    f"{path}: damaged: its chain of images leads back to an earlier one"
                )
            seen.add(offset)
            stream.seek(offset)
            count = stream.read(form.tagnosize)
            if len(count) < form.tagnosize:
                break
            [n_tags] = struct.unpack(form.tagnoformat, count)
            stream.seek(offset + form.tagnosize + n_tags * form.tagsize)
            following = stream.read(form.offsetsize)
            if len(following) < form.offsetsize:
                break
            [offset] = struct.unpack(form.offsetformat, following)
        if (n_stated := _ome_planes(tiff)) > max(_MOST_PLANES, 10 * len(seen)):
            # tifffile would list them all.
            raise ImageError(
                f"{path}: damaged: states {n_stated} planes and holds {len(seen)} images"
            )
        yield tiff


def whole_series(path: Path, tiff: Any, wanted: int | None = None) -> Any:
    """The image of an open TIFF, a tifffile series: not a thumbnail, wherever that lies.

    Parameters
    ----------
    path, tiff
        The file.
    wanted
        Which of several images, from 0.

    Raises
    ------
    ImageError
        If it holds several and none is chosen, or none of that number.
    """
    whole = [
        series
        for series in tiff.series
        if not (series.keyframe.is_reduced or series.name.casefold() in _BESIDE_A_SLIDE)
    ]
    whole = whole or list(tiff.series[:1])
    if wanted is not None:
        if not 0 <= wanted < len(whole):
            raise ImageError(f"{path}: expected a series of 0 to {len(whole) - 1}, got {wanted}")
        return whole[wanted]
    if len(whole) > 1:
        raise ImageError(
            f"{path}: holds {len(whole)} images, not one image or stack; `detect` and `focus` take "
            f"one by --series=0 to {len(whole) - 1}, for others save it as a file of its own"
        )
    return whole[0]


def _pillow_format(path: Path) -> str | None:
    """Such as JPEG; None of what Pillow does not know."""
    with suppress(Exception), camera.open_pillow(path) as image:  # it raises many kinds
        return image.format
    return None


def refuse_lying_tiff(path: Path, tiff: Any, wanted: int | None = None) -> None:
    """Refuse an open TIFF whose header promises pixels that it does not hold.

    tifffile would fill them up with zeros, or take a stack that was cut off for one image.

    Raises
    ------
    ImageError
        If it has no pixels, or lacks strips, tiles or planes.
    """
    first = tiff.pages.first
    _refuse_lacking_pieces(path, first)
    len(tiff.pages)  # follows the chain of images to its end, where a zero has to be
    tiff.filehandle.seek(tiff.pages.next_page_offset)
    if any(tiff.filehandle.read(tiff.tiff.offsetsize)):
        raise ImageError(f"{path}: truncated: ends after {len(tiff.pages)} images, more are stated")
    series = whole_series(path, tiff, wanted)
    if series.keyframe is not first:
        _refuse_lacking_pieces(path, series.keyframe)
    if series.kind in ("ome", "mmstack"):  # these have None where a plane is missing
        n_stated, n_planes = len(series), sum(page is not None for page in series)
    else:
        n_planes = math.prod(
            n for axis, n in zip(series.axes, series.shape, strict=True) if axis not in "YXS"
        )
        n_stated = _ome_planes(tiff, series)
        if len(tiff.series) == 1:
            n_stated = max(n_stated, int((tiff.imagej_metadata or {}).get("images", 1)))
    if n_planes < n_stated:
        raise ImageError(
            f"{path}: truncated or without its other files: states {n_stated} planes, {n_planes} "
            "are there"
        )


def _refuse_lacking_pieces(path: Path, page: Any) -> None:
    if page.imagelength == 0 or page.imagewidth == 0:
        raise ImageError(f"{path}: the image has no pixels, {page.imagelength} x {page.imagewidth}")
    n_pieces, n_stated = len(page.dataoffsets), math.prod(page.chunked)
    if n_pieces < n_stated:
        raise ImageError(
            f"{path}: truncated: its size needs {n_stated} strips or tiles, {n_pieces} are there"
        )


def _ome_planes(tiff: Any, series: Any = None) -> int:
    """Planes that OME metadata state of an image, or of all; 0 where there are none."""
    from xml.etree import ElementTree

    from semanticblur_core.scale import ome_pixels

    try:
        root = ElementTree.fromstring(tiff.ome_metadata or "<OME/>")
        if series is None:
            found = [e for e in root.iter() if e.tag.endswith("}Pixels")]
        else:
            own = ome_pixels(root, tiff, series)
            found = [] if own is None else [own]
        return sum(math.prod(int(each.get(f"Size{a}", 1)) for a in "ZT") for each in found)
    except (ElementTree.ParseError, ValueError):  # tifffile does without them too
        return 0


def is_plain_photometric(page: Any) -> bool:
    """Whether tifffile's array is grey or RGB as it stands."""
    from tifffile import COMPRESSION, PHOTOMETRIC

    plain = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.RGB)
    # JPEG decoders turn YCbCr into RGB themselves.
    decoded = page.photometric == PHOTOMETRIC.YCBCR and page.compression in (
        COMPRESSION.JPEG,
        COMPRESSION.OJPEG,
    )
    return page.photometric in plain or decoded


def invert(array: NDArray[Any]) -> NDArray[Any]:
    """White-is-zero to black-is-zero, for types that have a white."""
    if array.dtype == np.bool_:
        return ~array
    if np.issubdtype(array.dtype, np.unsignedinteger):
        inverted: NDArray[Any] = np.iinfo(array.dtype).max - array
        return inverted
    return array


def to_upright(array: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Apply an EXIF/TIFF orientation code (1 to 8) to rows and columns ``(H, W, ...)``."""
    if orientation in (5, 6, 7, 8):
        array = np.swapaxes(array, 0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)
