"""Camera raw and HEIC, by optional libraries."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from semanticblur_core import disk
from semanticblur_core.errors import ImageError

HEIC_SUFFIXES = (".heic", ".heif", ".hif")
RAW_SUFFIXES = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef"),
    *(".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2"),
    *(".srf", ".srw", ".x3f"),
)
_INSTALL = "pip install 'napari-semanticblur[camera]', or export it as JPEG or TIFF"
# Of the longer side of the raw image; a preview below it would hide what is slightly soft.
_LEAST_PREVIEW = 0.5


def read_raw(path: Path, max_pixels: int) -> NDArray[np.uint8]:
    """The picture that the camera made of a raw file, upright.

    Most cameras keep it as a JPEG at full size. Where it is missing, or has less than half the
    sides of the raw image, that is developed at half its sides, as the camera balanced its colours.

    Returns
    -------
    ndarray
        ``(H, W, 3)`` uint8.

    Raises
    ------
    ImageError
        If rawpy is not installed, or the file is damaged, or larger than allowed.
    """
    try:
        import rawpy
    except ImportError:
        raise ImageError(f"{path}: camera raw needs rawpy: {_INSTALL}") from None
    try:
        with rawpy.imread(str(path)) as raw:
            sizes = raw.sizes
            disk.refuse_bomb(path, sizes.width * sizes.height, max_pixels)
            long, short = sorted((sizes.width, sizes.height), reverse=True)
            preview = _preview(raw, rawpy)
            if preview is None or max(preview.size) < _LEAST_PREVIEW * long:
                return np.asarray(raw.postprocess(half_size=True, use_camera_wb=True))
            if long > short and sizes.flip in (5, 6) and preview.width > preview.height:
                # The preview did not say that it lies on its side.
                preview = preview.rotate(90 if sizes.flip == 5 else -90, expand=True)
            return np.asarray(preview)
    except rawpy.LibRawError as error:
        reason = b" ".join(part for part in error.args if isinstance(part, bytes)).decode()
        raise ImageError(f"{path}: damaged or unreadable: {reason}") from error


def _preview(raw: Any, rawpy: Any) -> Image.Image | None:
    """The largest picture in it, upright, RGB; None if there is none that can be read."""
    try:
        found = raw.extract_thumb()
        if found.format != rawpy.ThumbFormat.JPEG:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(found.data)) as opened:
                return ImageOps.exif_transpose(opened).convert("RGB")
    except (rawpy.LibRawError, OSError, ValueError, SyntaxError):
        return None


def learn_heic(path: Path) -> None:
    """Let Pillow read HEIC.

    Raises
    ------
    ImageError
        If pillow-heif is not installed.
    """
    try:
        import pillow_heif
    except ImportError:
        raise ImageError(f"{path}: HEIC needs pillow-heif: {_INSTALL}") from None
    pillow_heif.register_heif_opener()


def is_heic(path: Path) -> bool:
    """Whether a file is HEIC by its first bytes, whatever its name says."""
    brands = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
    with path.open("rb") as stream:
        start = stream.read(12)
    return start[4:8] == b"ftyp" and start[8:] in brands
