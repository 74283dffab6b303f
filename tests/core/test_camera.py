"""Camera raw and HEIC: upright, the camera's own picture where it is large enough."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from command_line import run
from PIL import Image
from skimage.data import astronaut
from skimage.metrics import structural_similarity

from semanticblur_core import camera, io
from semanticblur_core.data.store import AnnotationStore
from semanticblur_core.errors import ImageError

_UPRIGHT, _HELD_UPRIGHT = 1, 6
_WHITE = 16000


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """Higher than wide."""
    return astronaut()[:, 100:420].copy()


def write_dng(path: Path, rgb: np.ndarray, preview: np.ndarray | None, orientation: int) -> None:
    """What a camera with an RGGB sensor stores of a scene that looks so, unturned."""
    height, width = rgb.shape[:2]
    linear = (rgb / 255) ** 2.2 * _WHITE
    sensor = np.empty((height, width), np.uint16)
    for row, column, channel in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 2)):
        sensor[row::2, column::2] = linear[row::2, column::2, channel]
    identity = [value for one in np.eye(3).ravel() for value in (int(one), 1)]
    of_camera: list[Any] = [
        (50706, "B", 4, bytes((1, 4, 0, 0)), True),  # DNGVersion
        (271, "s", 0, "Maker", True),
        (272, "s", 0, "Camera", True),
        (50708, "s", 0, "Maker Camera", True),
        (50721, 10, 9, identity, True),  # ColorMatrix1
        (50728, 5, 3, [1] * 6, True),  # AsShotNeutral
        (50778, "H", 1, 21, True),
        (274, "H", 1, orientation, True),
    ]
    of_sensor: list[Any] = [
        (33421, "H", 2, (2, 2), True),
        (33422, "B", 4, bytes((0, 1, 1, 2)), True),
        (50714, "H", 1, 0, True),
        (50717, "H", 1, _WHITE, True),
    ]
    with tifffile.TiffWriter(path) as tiff:
        how: dict[str, Any] = {"photometric": "cfa", "metadata": None}
        if preview is None:
            tiff.write(sensor, extratags=of_camera + of_sensor, **how)
            return
        tiff.write(
            np.asarray(Image.fromarray(preview).convert("YCbCr")), photometric="ycbcr",
            compression="jpeg", rowsperstrip=len(preview), subfiletype=1, subifds=1,
            extratags=of_camera, metadata=None,
        )  # fmt: skip
        tiff.write(sensor, subfiletype=0, extratags=of_sensor, **how)


def alike(found: np.ndarray, wanted: np.ndarray) -> float:
    """Structural similarity of what is seen, at the smaller one's size."""
    small = np.asarray(Image.fromarray(wanted).convert("L").resize(found.shape[1::-1]))
    return float(structural_similarity(np.asarray(Image.fromarray(found).convert("L")), small))


@pytest.mark.parametrize("orientation", [_UPRIGHT, _HELD_UPRIGHT])
@pytest.mark.parametrize("preview_step", [None, 1, 4])
def test_raw_files_are_read_upright(
    tmp_path: Path, photo: np.ndarray, orientation: int, preview_step: int | None
) -> None:
    pytest.importorskip("rawpy")
    stored = photo if orientation == _UPRIGHT else np.rot90(photo).copy()
    preview = None if preview_step is None else stored[::preview_step, ::preview_step].copy()
    write_dng(tmp_path / "a.dng", stored, preview, orientation)
    found = io.read_image(tmp_path / "a.dng")
    # A small preview is not taken: the image is developed, at half its sides.
    height, width = photo.shape[:2]
    step = 1 if preview_step == 1 else 2
    assert found.shape == (height // step, width // step, 3)
    assert found.dtype == np.uint8
    assert alike(found, photo) > 0.75
    assert io.read_orientation(tmp_path / "a.dng") == 1


def test_raw_and_jpeg_beside_each_other(tmp_path: Path, photo: np.ndarray) -> None:
    pytest.importorskip("rawpy")
    write_dng(tmp_path / "a.dng", photo, photo, _UPRIGHT)
    Image.fromarray(photo).save(tmp_path / "a.jpg", quality=95)
    (tmp_path / "b.nef").write_bytes(b"x" * 100)
    done = run("detect", f"--input={tmp_path}", f"--output={tmp_path}/out", "--method=lbp")
    assert done.returncode == 2
    assert done.stderr == (
        f"semanticblur-core: {tmp_path}/b.nef: damaged or unreadable: Unsupported file format or "
        "not RAW file\n"
    )
    raw, jpeg = (
        np.asarray(Image.open(tmp_path / "out" / name), float)
        for name in ("a.dng_blur.png", "a_blur.png")
    )
    assert np.abs(raw - jpeg).mean() < 8
    with pytest.raises(ImageError, match="more than the limit"):
        io.read_image(tmp_path / "a.dng", max_pixels=100)


def test_a_preview_that_cannot_be_read_is_passed_over(tmp_path: Path, photo: np.ndarray) -> None:
    pytest.importorskip("rawpy")
    write_dng(tmp_path / "a.dng", photo, photo, _UPRIGHT)
    found = (tmp_path / "a.dng").read_bytes()
    frame = found.index(b"\xff\xc0") + 5  # height and width in the JPEG's header
    lying = found[:frame] + (20000).to_bytes(2) * 2 + found[frame + 4 :]
    (tmp_path / "a.dng").write_bytes(lying)
    height, width = photo.shape[:2]
    assert io.read_image(tmp_path / "a.dng").shape == (height // 2, width // 2, 3)
    assert io.read_shape(tmp_path / "a.dng") == (height, width)


def test_a_raw_file_without_colours_is_grey(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.dng").write_bytes(b"x")
    developed = np.zeros((4, 5, 1), np.uint8)  # as LibRaw gives it
    monkeypatch.setattr(camera, "read_raw", lambda *_: developed)
    assert io.read_image(tmp_path / "a.dng").shape == (4, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_names_that_are_not_utf8_are_read(tmp_path: Path, photo: np.ndarray) -> None:
    pytest.importorskip("rawpy")
    path = tmp_path / os.fsdecode(b"n\xff.dng")
    write_dng(path, photo, None, _UPRIGHT)
    assert io.read_image(path).ndim == 3


def test_labels_of_photographs_that_need_the_extra_keep_their_pixels(
    tmp_path: Path, photo: np.ndarray
) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.fromarray(photo)).save(tmp_path / "a.heic", quality=90)
    store = AnnotationStore(tmp_path / "store", create=True)
    store.write("a", np.ones(photo.shape[:2], np.uint8), image=tmp_path / "a.heic")
    held = store.image_of("a")
    assert held is not None
    np.testing.assert_array_equal(io.read_image(held), io.read_image(tmp_path / "a.heic"))
    store.write("a", np.ones(photo.shape[:2], np.uint8), image=tmp_path / "a.heic")


def test_heic_is_read_whatever_its_name_says(tmp_path: Path, photo: np.ndarray) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.fromarray(photo)).save(tmp_path / "a.heic", quality=90)
    (tmp_path / "IMG_1.jpg").write_bytes((tmp_path / "a.heic").read_bytes())
    for name in ("a.heic", "IMG_1.jpg"):
        found = io.read_image(tmp_path / name)
        assert found.shape == photo.shape
        assert alike(found, photo) > 0.9
    (tmp_path / "cut.heic").write_bytes((tmp_path / "a.heic").read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"cut\.heic: damaged or unreadable"):
        io.read_image(tmp_path / "cut.heic")


_GUARDED = """
import sys, warnings
from PIL import Image
warnings.simplefilter("error", Image.DecompressionBombWarning)
warnings.filterwarnings("error", message="Palette images")
from semanticblur_core import io
Image.MAX_IMAGE_PIXELS = 60
for what in (lambda image: image, lambda image: image.convert("RGB")):
    try:
        with Image.open(sys.argv[1]) as image:
            what(image)
    except Warning as warning:
        print(type(warning).__name__)
    Image.MAX_IMAGE_PIXELS = None
"""
_READ = """
import sys
from PIL import Image
from semanticblur_core import io
print(io.read_image(sys.argv[1]).shape)
Image.MAX_IMAGE_PIXELS = 60
Image.open(sys.argv[1]).close()
"""


def test_what_a_program_wants_of_warnings_stays_in_force(tmp_path: Path) -> None:
    """Those of Pillow are kept from who asks for none, and switched off for nobody else."""
    chatty = Image.new("P", (8, 8))
    chatty.putpalette(list(range(256)) * 3)
    chatty.save(tmp_path / "chatty.png", transparency=bytes(256))

    def python(code: str) -> tuple[str, str]:
        command = [sys.executable, "-c", code, str(tmp_path / "chatty.png")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout, done.stderr

    out, errors = python(_READ)
    assert out == "(8, 8, 3)\n"
    assert errors.count("Warning:") == errors.count("DecompressionBombWarning:") == 1
    assert python(_GUARDED)[0] == "DecompressionBombWarning\nUserWarning\n"


def test_without_the_extra_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("rawpy", "pillow_heif"):
        monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "a.cr3").write_bytes(b"x" * 100)
    with pytest.raises(ImageError, match=r"a\.cr3: camera raw needs rawpy: pip install"):
        io.read_image(tmp_path / "a.cr3")
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    (tmp_path / "b.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40))
    with pytest.raises(ImageError, match=r"b\.jpg: HEIC needs pillow-heif: pip install"):
        io.read_image(tmp_path / "b.jpg")
