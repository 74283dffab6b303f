"""Photographs as Pillow opens them, and camera raw and HEIC by optional libraries."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from semanticblur_core import disk
from semanticblur_core.errors import ImageError

HEIC_SUFFIXES = (".heic", ".heif", ".hif")
RAW_SUFFIXES = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef"),
    *(".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2"),
    *(".srf", ".srw", ".x3f"),
)
_INSTALL = "pip install 'napari-semanticblur[camera]', or export it as JPEG or TIFF"
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
# Of the longer side of the raw image; a preview below it would hide what is slightly soft.
_LEAST_PREVIEW = 0.5
_MOST_DEFLATED = 1032
_pillow_limit = threading.Lock()
# Of metadata and the like in files that it reads all the same, not of bombs. For good: to do so for
# a while is not safe in threads. At the end, so that every other filter of the process goes first.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\b", append=True)


def open_pillow(source: Path | io.BytesIO) -> Image.Image:
    """Open without Pillow's own limit, which is below a panorama's size; for `disk.refuse_bomb`."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(source)
        except UnidentifiedImageError:
            if isinstance(source, io.BytesIO) or not _is_heic(source):  # whatever its name says
                raise
            _learn_heic(source)
            return Image.open(source)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def refuse_lying_picture(path: Path, image: Image.Image, n_bytes: int) -> None:
    """Refuse a JPEG or PNG of more pixels than fit in so many bytes: readers would make them up.

    Raises
    ------
    ImageError
        If it is so.
    """
    if image.format == "PNG":
        # Deflate takes a byte for at most 1032.
        bits = {"1": 1, "L": 1, "P": 1, "LA": 16, "RGB": 24, "RGBA": 32}.get(image.mode, 16)
        is_lying = image.width * image.height * bits / 8 > _MOST_DEFLATED * n_bytes
    elif image.format == "JPEG" and "progressive" not in image.info:
        # Baseline JPEG spends at least two bits on each block of 8 x 8 pixels.
        is_lying = (image.width // 8) * (image.height // 8) * 2 > n_bytes * 8
    else:
        return
    if is_lying:
        raise ImageError(
            f"{path}: truncated: {image.width} x {image.height} pixels do not fit in its "
            f"{n_bytes} bytes"
        )


def read_raw(path: Path, max_pixels: int) -> NDArray[np.uint8]:
    """The picture that the camera made of a raw file, upright.

    Most cameras keep it as a JPEG at full size. Where it is missing, or has less than half the
    sides of the raw image, that is developed at half its sides, as the camera balanced its colours.

    Returns
    -------
    ndarray
        ``(H, W, 3)`` uint8, or ``(H, W, 1)`` of a sensor without colours.

    Raises
    ------
    ImageError
        If rawpy is not installed, or the file is damaged, or larger than allowed.
    """
    with _open_raw(path) as raw:
        sizes = raw.sizes
        disk.refuse_bomb(path, sizes.width * sizes.height, max_pixels)
        preview = _preview(raw, path, max_pixels)
        least_px = _LEAST_PREVIEW * max(sizes.width, sizes.height)
        if preview is None or max(preview.size) < least_px:
            return np.asarray(raw.postprocess(half_size=True, use_camera_wb=True))
        lies = sizes.width > sizes.height and preview.width > preview.height
        if lies and sizes.flip in (5, 6):  # the preview did not say that it is to be turned
            preview = preview.rotate(90 if sizes.flip == 5 else -90, expand=True)
        return np.asarray(preview)


def read_raw_shape(path: Path) -> tuple[int, int]:
    """Height and width of a raw image, unturned; what `read_raw` gives may be half of it.

    Raises
    ------
    ImageError
        As `read_raw`.
    """
    with _open_raw(path) as raw:
        return int(raw.sizes.height), int(raw.sizes.width)


@contextmanager
def _open_raw(path: Path) -> Iterator[Any]:
    """A raw file in rawpy, whose errors become those of images."""
    try:
        import rawpy
    except ImportError:
        raise ImageError(f"{path}: camera raw needs rawpy: {_INSTALL}") from None
    try:
        with path.open("rb") as stream, rawpy.imread(stream) as raw:
            yield raw
    except rawpy.LibRawError as error:
        reason = b" ".join(part for part in error.args if isinstance(part, bytes)).decode()
        raise ImageError(f"{path}: damaged or unreadable: {reason}") from error


def _preview(raw: Any, path: Path, max_pixels: int) -> Image.Image | None:
    """The largest picture in it, upright, RGB; None if there is none that can be read."""
    try:
        found = raw.extract_thumb()
        # Of the other kinds, bitmaps, none is large.
        with open_pillow(io.BytesIO(found.data)) as opened:
            disk.refuse_bomb(path, opened.width * opened.height, max_pixels)
            refuse_lying_picture(path, opened, len(found.data))
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception:  # LibRaw and Pillow raise many kinds
        return None


def _learn_heic(path: Path) -> None:
    """Let Pillow read HEIC."""
    try:
        import pillow_heif
    except ImportError:
        raise ImageError(f"{path}: HEIC needs pillow-heif: {_INSTALL}") from None
    pillow_heif.register_heif_opener()


def _is_heic(path: Path) -> bool:
    """Whether a file is HEIC by its first bytes."""
    with path.open("rb") as stream:
        start = stream.read(12)
    return start[4:8] == b"ftyp" and start[8:] in _HEIC_BRANDS
