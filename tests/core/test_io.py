"""Files that people have: kinds, depths, orientations, compressions, and broken ones."""

import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from semanticblur_core import disk, io
from semanticblur_core.errors import DataError, ImageError


@pytest.fixture
def photo(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".tga", ".jp2", ".tif"])
def test_lossless_rgb_comes_back_as_it_was(tmp_path: Path, photo: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(photo).save(path)
    np.testing.assert_array_equal(io.read_image(path), photo)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_formats_are_read(tmp_path: Path, suffix: str) -> None:
    smooth = np.linspace(0, 255, 30 * 20 * 3).reshape(20, 30, 3).astype(np.uint8)
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(smooth).save(path, quality=95)
    assert np.abs(io.read_image(path).astype(int) - smooth).mean() < 6


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (9, 7), (value, 0, 0)) for value in (10, 200)]
    for name in ("a.gif", "a.png", "a.webp"):
        lossless = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
        assert (io.read_image(tmp_path / name) == (10, 0, 0)).all(), name


@pytest.mark.parametrize("compression", ["lzw", "zlib", "packbits", "zstd", "jpeg", None])
def test_tiff_compressions(tmp_path: Path, photo: np.ndarray, compression: str | None) -> None:
    path = tmp_path / "photo.tif"
    tifffile.imwrite(path, photo, compression=compression, photometric="rgb")
    assert io.read_image(path).shape == photo.shape
    if compression != "jpeg":
        np.testing.assert_array_equal(io.read_image(path), photo)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64"])
def test_deep_grey_tiff_keeps_its_values(
    tmp_path: Path, rng: np.random.Generator, dtype: str
) -> None:
    array = (rng.random((20, 30)) * 1000).astype(dtype)
    tifffile.imwrite(tmp_path / "deep.tif", array, photometric="minisblack")
    read = io.read_image(tmp_path / "deep.tif")
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, array)


def test_planar_tiff_becomes_channels_last(tmp_path: Path, photo: np.ndarray) -> None:
    path = tmp_path / "planar.tif"
    planes = np.ascontiguousarray(photo.transpose(2, 0, 1))
    tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(io.read_image(path), photo)


def test_16_bit_png_keeps_its_depth(tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.integers(0, 65536, (20, 30), dtype=np.uint16)
    Image.fromarray(array).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(io.read_image(tmp_path / "deep.png"), array)


def test_alpha_is_dropped_and_palettes_become_colours(tmp_path: Path, photo: np.ndarray) -> None:
    rgba = np.dstack([photo, np.full(photo.shape[:2], 7, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(io.read_image(tmp_path / "rgba.png"), photo)
    tifffile.imwrite(tmp_path / "rgba.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(io.read_image(tmp_path / "rgba.tif"), photo)
    flat = Image.new("RGB", (30, 20), (10, 200, 30))
    flat.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    np.testing.assert_array_equal(io.read_image(tmp_path / "palette.png"), np.asarray(flat))


@pytest.mark.parametrize("code", range(1, 9))
def test_orientation_is_honoured_alike_in_jpeg_and_tiff(tmp_path: Path, code: int) -> None:
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 255  # the corner tells all eight orientations apart together with the shape
    stored[:8, 8:16] = 128
    exif = Image.Exif()
    exif[0x0112] = code
    Image.fromarray(stored).save(tmp_path / "o.png", exif=exif)
    with Image.open(tmp_path / "o.png") as image:
        from PIL import ImageOps

        expected = np.asarray(ImageOps.exif_transpose(image))
    tifffile.imwrite(
        tmp_path / "o.tif", stored, photometric="rgb", extratags=[(274, "H", 1, code, True)]
    )
    np.testing.assert_array_equal(io.read_image(tmp_path / "o.png"), expected)
    np.testing.assert_array_equal(io.read_image(tmp_path / "o.tif"), expected)


def test_unit_range_of_deep_images_is_by_percentile(rng: np.random.Generator) -> None:
    array = rng.integers(1000, 3000, (100, 100)).astype(np.uint16)
    array[0, 0] = 65535
    unit = io.to_unit_range(array)
    assert unit.dtype == np.float32
    assert 0.45 < np.median(unit) < 0.55
    assert (unit.min(), unit.max()) == (0, 1)


def test_unit_range_of_8_bit_is_left_to_division_by_255(photo: np.ndarray) -> None:
    assert io.to_unit_range(photo) is photo
    given = io.to_unit_range(photo, limits=(0, 128))
    np.testing.assert_allclose(given, np.clip(photo / 128, 0, 1), atol=1e-6)


def test_nan_and_constant_images_are_defined() -> None:
    array = np.linspace(0, 1, 10_000, dtype=np.float32).reshape(100, 100)
    array[3, 4], array[5, 6] = np.nan, np.inf
    unit = io.to_unit_range(array)
    assert np.isfinite(unit).all()
    assert unit[3, 4] == 0
    assert (io.to_unit_range(np.full((9, 9), 7.0)) == 0).all()
    sparse = np.zeros((100, 100), np.uint16)
    sparse[5, 5] = 4000
    assert io.to_unit_range(sparse)[5, 5] == 1
    with pytest.raises(ImageError, match="no finite value"):
        io.to_unit_range(np.full((9, 9), np.nan))
    with pytest.raises(ImageError, match="expected real numbers, got complex"):
        io.to_unit_range(np.zeros((9, 9), complex))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.png", b"", "empty"),
        ("text.jpg", b"not an image at all", "not an image"),
        ("text.tif", b"not an image at all", "damaged or unreadable"),
        ("phone.heic", b"x" * 100, "not an image"),
    ],
)
def test_what_is_no_image_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=f"{name}.*{message}"):
        io.read_image(tmp_path / name)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_truncated_files_are_refused(tmp_path: Path, photo: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"photo{suffix}"
    if suffix == ".tif":
        tifffile.imwrite(path, photo, photometric="rgb")
    else:
        Image.fromarray(photo).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match="damaged or unreadable"):
        io.read_image(path)


def test_a_stack_is_refused_with_its_shape(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((5, 20, 30), np.uint8), metadata=None)
    with pytest.raises(ImageError, match=r"shape \(5, 20, 30\)"):
        io.read_image(tmp_path / "stack.tif")


@pytest.mark.parametrize("mode", ["P", "CMYK", "L", "1"])
def test_tiff_colour_spaces_read_as_pillow_reads_them(
    tmp_path: Path, photo: np.ndarray, mode: str
) -> None:
    image = Image.fromarray(photo).convert(mode)
    image.save(tmp_path / "a.tif")
    expected = np.asarray(image if mode in ("L", "1") else image.convert("RGB"))
    np.testing.assert_array_equal(io.read_image(tmp_path / "a.tif"), expected)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16"])
def test_white_is_zero_tiffs_are_turned_round(tmp_path: Path, dtype: str) -> None:
    array = np.arange(400).reshape(20, 20).astype(np.uint16).astype(dtype)
    stored = ~array if dtype == "bool" else np.iinfo(dtype).max - array
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="miniswhite")
    np.testing.assert_array_equal(io.read_image(tmp_path / "a.tif"), array)


def test_a_tiff_of_several_images_is_refused_but_not_for_its_thumbnail(
    tmp_path: Path, photo: np.ndarray
) -> None:
    with tifffile.TiffWriter(tmp_path / "two.tif") as tiff:
        tiff.write(photo, photometric="rgb")
        tiff.write(photo[:10, :10], photometric="rgb")
    with pytest.raises(ImageError, match="holds 2 images, not one"):
        io.read_image(tmp_path / "two.tif")
    with tifffile.TiffWriter(tmp_path / "thumbnail.tif") as tiff:
        tiff.write(photo, photometric="rgb")
        tiff.write(photo[::2, ::2], photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(io.read_image(tmp_path / "thumbnail.tif"), photo)


def test_a_large_panorama_is_not_taken_for_a_bomb(tmp_path: Path) -> None:
    # 200 million pixels, above Pillow's own limit; one bit each, so that the test stays small.
    Image.new("1", (16320, 12255)).save(tmp_path / "large.png")
    assert io.read_image(tmp_path / "large.png").shape == (12255, 16320)


def test_a_decompression_bomb_is_refused(tmp_path: Path, photo: np.ndarray) -> None:
    for name in ("a.png", "a.tif"):
        Image.fromarray(photo).save(tmp_path / name)
        with pytest.raises(ImageError, match=r"more than the limit of 0\.0001 million"):
            io.read_image(tmp_path / name, max_pixels=100)
        assert io.read_image(tmp_path / name, max_pixels=photo.size).shape == photo.shape
    disk.refuse_bomb(tmp_path / "a.png", 1_200_000_000, 1_200_000_000)
    with pytest.raises(ImageError, match="--max-pixels"):
        disk.refuse_bomb(tmp_path / "a.png", 1_200_000_001, 1_200_000_000)


def test_masks(tmp_path: Path) -> None:
    truth = np.array([[True, False], [False, True]])
    Image.fromarray(truth).save(tmp_path / "bits.png")
    Image.fromarray(truth.astype(np.uint8) * 255).save(tmp_path / "bytes.png")
    for name in ("bits.png", "bytes.png"):
        np.testing.assert_array_equal(io.read_mask(tmp_path / name), truth)
    Image.fromarray(truth.astype(np.uint8)).save(tmp_path / "ones.png")
    with pytest.raises(DataError, match="largest value is 1"):
        io.read_mask(tmp_path / "ones.png")


def test_an_unwritable_place_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ImageError, match=r"map\.png: cannot be written: "):
        io.write_png(tmp_path / "file" / "map.png", np.zeros((2, 2), np.uint8))


def test_masked_and_very_wide_images_have_no_nan() -> None:
    wide = np.repeat([[-1.7e308], [1.7e308]], 50, axis=1)
    assert np.isfinite(io.to_unit_range(wide)).all()
    values = np.arange(100, dtype=np.float32).reshape(10, 10)
    unit = io.to_unit_range(np.ma.masked_greater(values, 90))
    assert unit.max() == 1
    assert not np.ma.isMaskedArray(unit)
    np.testing.assert_array_equal(unit[values > 90], 0)
    eight = io.to_unit_range(np.ma.masked_equal(np.full((2, 2), 7, np.uint8), 7))
    assert not np.ma.isMaskedArray(eight)
    assert not eight.any()


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "float64"])
def test_whole_numbers_beyond_those_of_float32_keep_their_steps(dtype: str) -> None:
    offset = 2_000_000_000
    image = (offset + np.arange(600).reshape(20, 30)).astype(dtype)
    unit = io.to_unit_range(image, limits=(offset, offset + 599))
    np.testing.assert_allclose(unit, np.arange(600).reshape(20, 30) / 599, atol=1e-6)


def test_floats_near_the_end_of_their_type_are_no_nan() -> None:
    ramp = np.linspace(-0.9, 0.9, 400).reshape(20, 20)
    for dtype in (np.float32, np.float64):
        image = (ramp * float(np.finfo(dtype).max)).astype(dtype)
        unit = io.to_unit_range(image)
        np.testing.assert_allclose(unit, io.to_unit_range(ramp), atol=1e-3)


@pytest.mark.parametrize("limits", [(-np.inf, np.inf), (0, np.inf), (np.nan, 1), (1, 1)])
def test_limits_are_finite_and_rise(limits: tuple[float, float]) -> None:
    with pytest.raises(ImageError, match="expected finite numbers, LOW below HIGH"):
        io.to_unit_range(np.zeros((4, 4)), limits=limits)


def test_labels_are_no_masks(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1], [2, 2]], np.uint8)).save(tmp_path / "labels.png")
    with pytest.raises(DataError, match="largest value is 2, but a mask is"):
        io.read_mask(tmp_path / "labels.png")


def test_one_value_alone_is_brought_to_the_range_too() -> None:
    assert float(io.to_unit_range(np.float32(3), limits=(0, 10))) == pytest.approx(0.3)  # type: ignore[arg-type]
    tiny = np.array([[0, 1e-40]], np.float32)
    np.testing.assert_allclose(io.to_unit_range(tiny, limits=(0, 2e-40)), [[0, 0.5]], atol=1e-3)


def test_another_format_under_the_name_of_a_tiff_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.new("L", (40, 40)).save(path, "JPEG")
    with pytest.raises(ImageError, match=r"a\.tif: is JPEG and no TIFF.*rename it"):
        io.read_image(path)
    path.write_bytes(b"anything else")
    with pytest.raises(ImageError, match=r"a\.tif: damaged or unreadable: not a TIFF file"):
        io.read_image(path)


def test_reading_in_threads_leaves_warnings_alone(tmp_path: Path) -> None:
    """Python's own way of silencing them for a while is of the whole process."""
    Image.new("RGB", (400, 400)).save(tmp_path / "a.jpg")
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(io.read_image, [tmp_path / "a.jpg"] * 40):
            assert list(warnings.filters) == before


@pytest.mark.parametrize(
    ("values", "is_mask"),
    [((0, 1, 255), False), ((0, 128, 255), False), ((0, 255), True), ((0, 254, 255), True)],
)
def test_labels_are_not_taken_for_masks(
    tmp_path: Path, values: tuple[int, ...], is_mask: bool
) -> None:
    mask = np.zeros((60, 60), np.uint8)
    for i, value in enumerate(values):
        mask[20 * i : 20 * i + 20] = value
    Image.fromarray(mask).save(tmp_path / "m.png")
    if is_mask:
        assert np.array_equal(io.read_mask(tmp_path / "m.png"), mask > 127)
        return
    with pytest.raises(DataError, match=f"its values are {', '.join(map(str, values))}, but"):
        io.read_mask(tmp_path / "m.png")


def test_masks_with_smoothed_edges_and_noise_of_jpeg_are_masks(tmp_path: Path) -> None:
    disc = np.hypot(*(np.mgrid[:200, :200] - 100)) < 70
    Image.fromarray(disc.astype(np.uint8) * 255).resize((100, 100)).save(tmp_path / "smooth.png")
    Image.fromarray(disc.astype(np.uint8) * 255).save(tmp_path / "disc.jpg", quality=30)
    sharp = np.random.default_rng(0).integers(0, 3, (64, 64)).astype(np.uint8)
    Image.fromarray(sharp).save(tmp_path / "sharp.jpg", quality=95)
    sharp = np.zeros((64, 64), np.uint8)
    sharp[8, 8:16] = 2
    Image.fromarray(sharp).save(tmp_path / "nearly.jpg", quality=100)
    assert io.read_mask(tmp_path / "smooth.png").mean() == pytest.approx(0.385, abs=0.01)
    assert np.mean(io.read_mask(tmp_path / "disc.jpg") != disc) < 0.01
    assert not io.read_mask(tmp_path / "sharp.jpg").any()
    assert not io.read_mask(tmp_path / "nearly.jpg").any()
    straight = np.zeros((320, 320), np.uint8)
    straight[56:312, 65:162] = 255
    for quality in (50, 70, 90):  # black that becomes 1 or 3 in whole blocks
        Image.fromarray(straight).save(tmp_path / "straight.jpg", quality=quality)
        assert np.mean(io.read_mask(tmp_path / "straight.jpg") != (straight > 127)) < 0.02
    for quality in (75, 90, 95, 100):
        Image.fromarray(disc + np.uint8(1)).save(tmp_path / "labels.jpg", quality=quality)
        with pytest.raises(DataError, match="largest value is"):
            io.read_mask(tmp_path / "labels.jpg")


def test_a_png_that_promises_more_than_it_can_hold_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(20_001)))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(ImageError, match="20000 x 20000 pixels do not fit in its"):
        io.read_image(tmp_path / "bomb.png")
    for mode in ("1", "L", "RGB", "I;16"):  # as small as they can be
        Image.new(mode, (3000, 3000)).save(tmp_path / "black.png", optimize=True)
        assert not io.read_image(tmp_path / "black.png").any()
