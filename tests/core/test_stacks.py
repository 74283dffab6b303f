"""Files of any axes: opened lazily, written whole or not at all."""

import json
import os
import re
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tifffile
import zarr

from semanticblur_core import disk, io, stacks
from semanticblur_core.errors import ImageError
from semanticblur_core.inference.jobs import find_jobs
from semanticblur_core.inference.planes import Planes
from semanticblur_core.maps import new_map
from semanticblur_core.scale import Scale

SIZES = {"Z": 2.0, "Y": 0.5, "X": 0.25}
SCALE = Scale(SIZES, 1.5)


def written(path: Path, maps: np.ndarray, axes: str, scale: Scale = SCALE) -> None:
    with new_map(path, maps.shape) as file:
        for plane in maps.reshape(-1, *maps.shape[-2:]):
            file.append(plane[:7])
            file.append(plane[7:])
        if path.suffix == ".npy":
            stacks.write_npy(path, file)
        elif path.suffix == ".zarr":
            stacks.write_zarr(path, file, axes=axes, scale=scale)
        else:
            stacks.write_tiff(path, file, axes=axes, scale=scale)


@pytest.mark.parametrize("large", [False, True])
def test_what_is_written_is_read_back_with_axes_and_pixel_sizes(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr(stacks, "LARGE_PLANE_PIXELS", 0)
        monkeypatch.setattr(stacks, "BLOCK_PX", 16)
        monkeypatch.setattr(stacks, "COARSEST_SIDE_PX", 20)
    maps = rng.random((2, 3, 41, 50)).astype(np.float32)
    for suffix in (".tif", ".zarr", ".npy"):
        path = tmp_path / f"m{suffix}"
        written(path, maps, "TZYX")
        with stacks.open_stack(path) as stack:
            assert stack.axes == "TZYX"
            assert stack.scale.pixel_size_um == ({} if suffix == ".npy" else SIZES)
            assert stack.scale.time_step_s == (None if suffix == ".npy" else 1.5)
            np.testing.assert_array_equal(stack.array[:], maps)
        assert stacks.is_stack(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.npy", "m.tif", "m.zarr"]
    if large:
        with stacks.open_stack(tmp_path / "m.zarr", level=1) as stack:
            assert stack.array.shape == (2, 3, 21, 25)
            assert stack.scale.pixel_size_um == {"Z": 2.0, "Y": 1.0, "X": 0.5}
            halved = maps[:, :, :40].reshape(2, 3, 20, 2, 25, 2).mean(axis=(3, 5))
            np.testing.assert_allclose(stack.array[:, :, :20], halved, rtol=1e-6)
        with stacks.open_stack(tmp_path / "m.zarr", level=2) as stack:
            assert stack.array.shape == (2, 3, 11, 13)


def test_a_zarr_that_is_replaced_is_whole_whenever_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.zarr"
    old, new = np.zeros((2, 41, 50), np.float32), np.ones((2, 41, 50), np.float32)
    written(path, old, "ZYX")
    delete, deleted = shutil.rmtree, []

    def watched(folder: Path, **how: Any) -> None:
        deleted.append(Path(folder))
        delete(folder, **how)

    monkeypatch.setattr(shutil, "rmtree", watched)
    written(path, new, "ZYX")
    assert path not in deleted
    with stacks.open_stack(path) as stack:
        np.testing.assert_array_equal(stack.array[:], new)
    assert list(tmp_path.iterdir()) == [path]


def test_a_zarr_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.zarr"
    written(path, np.zeros((2, 41, 50), np.float32), "ZYX")
    rename = Path.rename

    def failing(source: Path, target: Path) -> Path:
        if target == path and source != renamed[0]:
            raise OSError(5, "Input/output error")
        renamed.append(target)
        return rename(source, target)

    renamed: list[Path] = []
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ImageError, match=r"m\.zarr: cannot be written: Input/output error"):
        written(path, np.ones((2, 41, 50), np.float32), "ZYX")
    with stacks.open_stack(path) as stack:
        assert not stack.array[:].any()
    assert list(tmp_path.iterdir()) == [path]


def test_a_plane_of_a_tiff_is_read_alone(tmp_path: Path, rng: np.random.Generator) -> None:
    data = rng.integers(0, 9999, (6, 64, 70), np.uint16)
    tifffile.imwrite(tmp_path / "s.tif", data, compression="zlib", photometric="minisblack")
    with stacks.open_stack(tmp_path / "s.tif") as stack:
        assert stack.axes == "ZYX"  # tifffile calls the unnamed axis Q or I
        np.testing.assert_array_equal(stack.array[4, 10:20, :5], data[4, 10:20, :5])


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_of_an_uncompressed_strip_only_what_is_asked_for_is_read(
    tmp_path: Path, rng: np.random.Generator, byteorder: Literal["<", ">"]
) -> None:
    path = tmp_path / "s.tif"
    data = rng.integers(0, 9999, (2, 1000, 1500), np.uint16)
    tifffile.imwrite(path, data, photometric="minisblack", byteorder=byteorder)
    with stacks.open_stack(path) as stack:
        assert stack.array.dtype.isnative
        tracemalloc.start()
        try:
            part = stack.array[1, 100:120]
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        np.testing.assert_array_equal(part, data[1, 100:120])
        np.testing.assert_array_equal(stack.array[:], data)
    assert peak_bytes < data[0].nbytes / 10


def test_imagej_and_pyramids(tmp_path: Path, rng: np.random.Generator) -> None:
    data = rng.integers(0, 255, (3, 64, 64), np.uint8)
    tifffile.imwrite(
        tmp_path / "ij.tif", data, imagej=True, resolution=(4, 2),
        metadata={"axes": "ZYX", "spacing": 3.0, "unit": "um"},
    )  # fmt: skip
    with stacks.open_stack(tmp_path / "ij.tif") as stack:
        assert stack.axes == "ZYX"
        assert stack.scale.pixel_size_um == pytest.approx({"Z": 3.0, "X": 0.25, "Y": 0.5})
    with tifffile.TiffWriter(tmp_path / "p.tif") as tif:
        tif.write(data, subifds=1, photometric="minisblack")
        tif.write(data[:, ::2, ::2], subfiletype=1, photometric="minisblack")
    with stacks.open_stack(tmp_path / "p.tif", level=1) as stack:
        assert stack.array.shape == (3, 32, 32)
    with (
        pytest.raises(ImageError, match="expected a level of 0 to 1, got 2"),
        stacks.open_stack(tmp_path / "p.tif", level=2),
    ):
        pass


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((5, 6), "YX"), ((5, 6, 3), "YXS"), ((4, 5, 6), "ZYX"), ((2, 5, 6, 4), "ZYXS")],
)
def test_axes_of_bare_arrays_are_guessed(tmp_path: Path, shape: tuple[int, ...], axes: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape))
    zarr.save(str(tmp_path / "a.zarr"), np.zeros(shape))
    for name in ("a.npy", "a.zarr"):
        with stacks.open_stack(tmp_path / name) as stack:
            assert stack.axes == axes


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((40, 50, 5), {}),
        ((40, 50, 2), {"metadata": None}),
        ((2, 40, 50, 6), {}),
        ((40, 50, 3), {"photometric": "minisblack"}),
    ],
)
def test_channels_that_a_tiff_holds_as_columns_are_not_taken_for_planes(
    tmp_path: Path, shape: tuple[int, ...], how: dict[str, Any]
) -> None:
    path = tmp_path / "c.tif"
    tifffile.imwrite(path, np.zeros(shape, np.uint8), **how)
    assert stacks.is_stack(path)
    message = "does not say the axes of an array of shape .*; --axes names them"
    with pytest.raises(ImageError, match=rf"c\.tif: .*{message}"), stacks.open_stack(path):
        pass
    with stacks.open_stack(path, axes="TYXC"[-len(shape) :]) as stack:
        assert stack.array.shape == shape


def test_narrow_planes_with_named_axes_are_taken_as_named(tmp_path: Path) -> None:
    narrow = np.zeros((40, 50, 5), np.uint8)
    tifffile.imwrite(tmp_path / "n.tif", narrow, metadata={"axes": "ZYX"})
    with stacks.open_stack(tmp_path / "n.tif") as stack:
        assert stack.axes == "ZYX"


def test_white_is_zero_is_inverted_as_of_an_image(tmp_path: Path, rng: np.random.Generator) -> None:
    data = rng.integers(0, 9999, (3, 40, 50), np.uint16)
    tifffile.imwrite(tmp_path / "s.tif", data, photometric="miniswhite")
    tifffile.imwrite(tmp_path / "one.tif", data[1], photometric="miniswhite")
    with stacks.open_stack(tmp_path / "s.tif") as stack:
        assert (stack.axes, stack.array.shape, stack.array.dtype) == ("ZYX", data.shape, np.uint16)
        plane = Planes(stack.array, stack.axes).view((1,)).read()
    np.testing.assert_array_equal(plane, 65535 - data[1])
    np.testing.assert_array_equal(plane, io.read_image(tmp_path / "one.tif"))


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_white_is_zero_is_stored_as_anything_is(tmp_path: Path, compression: str | None) -> None:
    chunks = []
    for kind in ("minisblack", "miniswhite"):
        path = tmp_path / f"{kind}.tif"
        tile = (64, 64) if compression else None
        image = np.zeros((200, 200), np.uint8)
        tifffile.imwrite(path, image, photometric=kind, compression=compression, tile=tile)
        with stacks.open_stack(path) as stack:
            chunks.append(getattr(stack.array, "chunks", None))
    assert chunks == [(64, 64) if compression else None] * 2


def test_jpeg_planes_are_decoded_to_rgb(tmp_path: Path) -> None:
    red = np.zeros((2, 64, 64, 3), np.uint8)
    red[..., 0] = 200
    tifffile.imwrite(tmp_path / "s.tif", red, photometric="rgb", compression="jpeg")
    with stacks.open_stack(tmp_path / "s.tif") as stack:
        assert stack.axes == "ZYXS"
        assert np.abs(stack.array[1].astype(int) - red[1]).max() < 5


@pytest.mark.parametrize(
    ("shape", "how", "message"),
    [
        ((3, 40, 50, 4), {"photometric": "separated"}, "colours are stored as SEPARATED"),
        (
            (3, 40, 50),
            {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)},
            "colours are stored as PALETTE",
        ),
        (
            (3, 40, 50),
            {"photometric": "minisblack", "extratags": [(274, 3, 1, 6, True)]},
            "turned or mirrored \\(orientation 6\\)",
        ),
    ],
)
def test_colours_and_turns_that_only_images_are_converted_from_are_refused(
    tmp_path: Path, shape: tuple[int, ...], how: dict[str, Any], message: str
) -> None:
    tifffile.imwrite(tmp_path / "s.tif", np.zeros(shape, np.uint8), **how)
    with (
        pytest.raises(ImageError, match=rf"s\.tif: .*{message}.*upright grey or RGB") as caught,
        stacks.open_stack(tmp_path / "s.tif"),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("no array")
    zarr.open_group(tmp_path / "bare.zarr", mode="w")
    tifffile.imwrite(tmp_path / "whole.tif", np.zeros((5, 64, 64), np.uint16))
    (tmp_path / "cut.tif").write_bytes((tmp_path / "whole.tif").read_bytes()[:9000])
    np.save(tmp_path / "six.npy", np.zeros((1, 1, 1, 1, 5, 6)))
    for name, message in {
        "gone.npy": "no such file",
        "empty.npy": "0 bytes",
        "text.npy": "damaged or unreadable",
        "bare.zarr": "without OME multiscales",
        "six.npy": "does not say the axes of an array of shape",
    }.items():
        with (
            pytest.raises(ImageError, match=f"{name}.*{message}") as caught,
            stacks.open_stack(tmp_path / name) as stack,
        ):
            Planes(stack.array, stack.axes).view((0,)).read()
        assert "\n" not in str(caught.value)
    with (
        pytest.raises(ImageError, match=r"cut\.tif: truncated: ends after 1 images"),
        stacks.open_stack(tmp_path / "cut.tif"),
    ):
        pass
    tifffile.imwrite(tmp_path / "one.tif", np.zeros((64, 64), np.uint16))
    (tmp_path / "short.tif").write_bytes((tmp_path / "one.tif").read_bytes()[:-99])
    with (
        pytest.raises(ImageError, match=r"short\.tif: damaged or unreadable"),
        stacks.open_stack(tmp_path / "short.tif"),
    ):
        pass
    data = np.random.default_rng(0).integers(0, 9999, (5, 64, 64), np.uint16)
    tifffile.imwrite(tmp_path / "rotten.tif", data, photometric="minisblack", compression="zlib")
    rotten = bytearray((tmp_path / "rotten.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "rotten.tif") as tiff:
        offset = tiff.pages[3].dataoffsets[0]
    rotten[offset : offset + 50] = bytes(50)
    (tmp_path / "rotten.tif").write_bytes(rotten)
    with (
        pytest.raises(ImageError, match="plane Z=3: cannot be read"),
        stacks.open_stack(tmp_path / "rotten.tif") as stack,
    ):
        Planes(stack.array, stack.axes).view((3,)).read()


def test_a_map_without_room_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(ImageError, match="does not fit on the disk"),
        new_map(tmp_path / "m.tif", (10**9, 10**6)),
    ):
        pass
    with new_map(tmp_path / "m.tif", (3, 4)) as file:
        file.append(np.ones((3, 4), np.float32))
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def write_pyramid(path: Path, data: np.ndarray, axes: str, compression: str | None) -> None:
    """Three levels, tiled, half a micrometre a pixel."""
    rgb: dict[str, Any] = {"photometric": "rgb" if axes.endswith("S") else "minisblack"}
    how = {**rgb, "tile": (32, 32), "compression": compression}
    sizes = {f"PhysicalSize{axis}": 0.5 for axis in "XY"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(data, subifds=2, metadata={"axes": axes, **sizes}, **how)
        for step in (2, 4):
            part = tuple(slice(None, None, step if axis in "YX" else None) for axis in axes)
            tiff.write(data[part], subfiletype=1, **how)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("axes", ["YX", "YXS", "ZYX"])
def test_each_level_of_a_tiled_pyramid_has_its_pixels_and_their_size(
    tmp_path: Path, rng: np.random.Generator, axes: str, compression: str | None
) -> None:
    lengths = {"Z": 3, "Y": 128, "X": 192, "S": 3}
    data = rng.integers(0, 255, [lengths[axis] for axis in axes], np.uint8)
    write_pyramid(tmp_path / "p.ome.tif", data, axes, compression)
    for level, step in enumerate((1, 2, 4)):
        part = tuple(slice(None, None, step if axis in "YX" else None) for axis in axes)
        with stacks.open_stack(tmp_path / "p.ome.tif", level=level) as stack:
            assert stack.axes == axes
            np.testing.assert_array_equal(stack.array[:], data[part])
            assert stack.scale.pixel_size_um == {"X": 0.5 * step, "Y": 0.5 * step}


def test_one_of_several_images_has_its_own_axes_and_scale(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    images = [rng.integers(0, 255, shape, np.uint8) for shape in ((30, 40), (3, 64, 96), (20, 20))]
    path = tmp_path / "several.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for i, image in enumerate(images):
            axes = "ZYX"[-image.ndim :]
            sizes = {f"PhysicalSize{axis}": 0.5 + i for axis in axes}
            metadata = {"axes": axes, **sizes, "Name": "thumbnail" if i == 2 else f"scene {i}"}
            tiff.write(image, photometric="minisblack", metadata=metadata)
    with (
        pytest.raises(ImageError, match=r"holds 2 images.*--series=0 to 1"),
        stacks.open_stack(path),
    ):
        pass
    for i, image in enumerate(images[:2]):
        with stacks.open_stack(path, series=i) as stack:
            np.testing.assert_array_equal(stack.array[:], image)
            assert stack.axes == "ZYX"[-image.ndim :]
            assert stack.scale.pixel_size_um == dict.fromkeys(stack.axes, 0.5 + i)
        assert stacks.read_scale(path, series=i).pixel_side_um == 0.5 + i
    np.save(tmp_path / "a.npy", images[0])
    for file, i, message in (
        (path, 2, "expected a series of 0 to 1, got 2"),
        (tmp_path / "a.npy", 0, "--series is of TIFF files"),
    ):
        with pytest.raises(ImageError, match=message), stacks.open_stack(file, series=i):
            pass


def _scenes(folder: Path, ids: str, *, leave_out: str = "") -> None:
    """One scene a file, all named in each."""
    folder.mkdir()
    images = "".join(
        f'<Image ID="Image:{i}" Name="scene {name}"><Pixels ID="Pixels:{i}" '
        'DimensionOrder="XYCZT" Type="uint8" SizeX="64" SizeY="48" SizeC="1" SizeZ="1" SizeT="1" '
        f'PhysicalSizeX="{i + 0.25}" PhysicalSizeY="{i + 0.25}"><Channel ID="Channel:{i}:0" '
        f'SamplesPerPixel="1"/><TiffData IFD="0" PlaneCount="1"><UUID FileName="{name}.ome.tif">'
        f"urn:uuid:{name}</UUID></TiffData></Pixels></Image>"
        for i, name in enumerate(ids)
    )
    for i, name in enumerate(ids):
        head = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'
        xml = f'{head} UUID="urn:uuid:{name}">{images}</OME>'
        if name not in leave_out:
            image = np.full((48, 64), i, np.uint8)
            tifffile.imwrite(folder / f"{name}.ome.tif", image, description=xml, metadata=None)


def test_scenes_in_files_of_their_own_begin_in_the_first(tmp_path: Path) -> None:
    _scenes(tmp_path / "all", "cab")
    for i in range(3):
        with stacks.open_stack(tmp_path / "all" / "c.ome.tif", series=i) as stack:
            assert stack.array[0, 0] == i
            assert stack.scale.pixel_side_um == i + 0.25
    begins = pytest.raises(ImageError, match=r"begins in .*c\.ome\.tif")
    with begins, stacks.open_stack(tmp_path / "all" / "a.ome.tif", series=0):
        pass


def test_scenes_of_files_that_are_missing_lend_no_size(tmp_path: Path) -> None:
    _scenes(tmp_path / "some", "cab", leave_out="c")
    for i, size in enumerate((1.25, 2.25)):
        assert stacks.read_scale(tmp_path / "some" / "a.ome.tif", series=i).pixel_side_um == size


def test_a_stack_that_was_cut_off_is_refused_as_a_series_too(tmp_path: Path) -> None:
    planes = np.zeros((3, 20, 30), np.uint8)
    description = "ImageJ=1.11a\nimages=5\nslices=5\n"
    with tifffile.TiffWriter(tmp_path / "s.tif") as tiff:
        for i, plane in enumerate(planes):
            text = description if i == 0 else None
            tiff.write(plane, description=text, metadata=None, photometric="minisblack")
    for series in (None, 0):
        refused = pytest.raises(ImageError, match="states 5 planes, 3")
        with refused, stacks.open_stack(tmp_path / "s.tif", series=series):
            pass


def test_the_size_of_pixels_is_not_that_of_the_macro_before_the_image(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for name, side in (("macro image", 30), ("scan", 0.25)):
            size = {"PhysicalSizeX": side, "PhysicalSizeY": side, "Name": name}
            image = np.zeros((64 if side < 1 else 20, 64), np.uint8)
            tiff.write(image, photometric="minisblack", metadata={"axes": "YX", **size})
    with stacks.open_stack(path) as stack:
        assert (stack.array.shape, stack.scale.pixel_side_um) == ((64, 64), 0.25)


def test_a_thumbnail_before_the_image_is_not_the_image(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    data = rng.integers(0, 255, (64, 96), np.uint8)
    path = tmp_path / "t.tif"
    how: dict[str, Any] = {"photometric": "minisblack", "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(data[::8, ::8], subfiletype=1, **how)
        tiff.write(data, extratags=[(274, 3, 1, 3, True)], **how)
    np.testing.assert_array_equal(io.read_image(path), data[::-1, ::-1])
    assert io.read_orientation(path) == 3
    assert stacks.plane_pixels(path) == 64 * 96
    assert not stacks.is_stack(path)
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(data[::8, ::8], subfiletype=1, **how)
        tiff.write(np.stack([data, data + 1]), **how)
    assert stacks.is_stack(path)
    with stacks.open_stack(path) as stack:
        np.testing.assert_array_equal(stack.array[:], np.stack([data, data + 1]))


OME_OF_TWO_FILES = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1">
<Image ID="Image:0">
<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="50" SizeY="40" SizeZ="2" SizeC="1"
SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>
<TiffData FirstZ="0" IFD="0"{count}><UUID FileName="a.ome.tif">urn:uuid:1</UUID></TiffData>
<TiffData FirstZ="1" IFD="0"{count}><UUID FileName="b.ome.tif">urn:uuid:2</UUID></TiffData>
</Pixels></Image></OME>"""


@pytest.mark.parametrize("count", ["", ' PlaneCount="1"'])
def test_planes_that_ome_metadata_state_and_no_file_holds_are_not_taken_for_black(
    tmp_path: Path, rng: np.random.Generator, count: str
) -> None:
    data = rng.integers(1, 255, (2, 40, 50), np.uint8)
    path = tmp_path / "a.ome.tif"
    description = OME_OF_TWO_FILES.format(count=count)
    tifffile.imwrite(path, data[0], description=description, metadata=None)
    message = "states 2 planes, 1 are there"
    with pytest.raises(ImageError, match=message), stacks.open_stack(path):
        pass
    with pytest.raises(ImageError, match=message):
        io.read_image(path)
    second = description.replace('UUID="urn:uuid:1"', 'UUID="urn:uuid:2"', 1)
    tifffile.imwrite(tmp_path / "b.ome.tif", data[1], description=second, metadata=None)
    with stacks.open_stack(path) as stack:
        np.testing.assert_array_equal(stack.array[:], data)


def test_ome_metadata_that_state_more_planes_than_the_file_has(tmp_path: Path) -> None:
    path = tmp_path / "s.ome.tif"
    tifffile.imwrite(path, np.ones((6, 40, 50), np.uint8), ome=True, metadata={"axes": "TYX"})
    lying = path.read_bytes().replace(b'SizeT="6"', b'SizeT="9"')
    path.write_bytes(lying.replace(b'PlaneCount="6"', b'PlaneCount="9"'))
    with (
        pytest.raises(ImageError, match="states 9 planes, 6 are there"),
        stacks.open_stack(path),
    ):
        pass


@pytest.mark.parametrize("unit", ["um", "\N{MICRO SIGN}m", "\\u00B5m", "micron", "microns"])
def test_imagej_names_the_micrometre_in_many_ways(tmp_path: Path, unit: str) -> None:
    path = tmp_path / "ij.tif"
    written_as = "um" if unit == "\N{MICRO SIGN}m" else unit
    metadata = {"axes": "ZYX", "spacing": 3.0, "unit": written_as}
    data = np.zeros((2, 40, 50), np.uint8)
    tifffile.imwrite(path, data, imagej=True, resolution=(4, 2), metadata=metadata)
    if written_as != unit:  # as ImageJ writes it, and tifffile does not
        path.write_bytes(path.read_bytes().replace(b"unit=um", "unit=\xb5m".encode("latin-1")))
    assert stacks.read_scale(path).pixel_size_um == pytest.approx({"Z": 3.0, "X": 0.25, "Y": 0.5})


@pytest.mark.parametrize(
    ("unit", "size"), [("\N{GREEK SMALL LETTER MU}m", 0.25), ("nm", 0.00025), ("pixel", None)]
)
def test_units_of_ome_metadata(tmp_path: Path, unit: str, size: float | None) -> None:
    path = tmp_path / "s.ome.tif"
    metadata = {"axes": "YX", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": unit}
    tifffile.imwrite(path, np.zeros((40, 50), np.uint8), ome=True, metadata=metadata)
    assert stacks.read_scale(path).pixel_size_um.get("X") == size


def test_a_pixel_size_that_is_no_number_spoils_no_image(tmp_path: Path) -> None:
    path = tmp_path / "s.ome.tif"
    metadata = {"axes": "YX", "PhysicalSizeX": 123.25}
    tifffile.imwrite(path, np.zeros((40, 50), np.uint8), ome=True, metadata=metadata)
    path.write_bytes(path.read_bytes().replace(b'"123.25"', b'"a 1/4 "'))
    assert stacks.read_scale(path).pixel_size_um == {}


def test_an_image_of_bioformats2raw_is_found_at_the_top_and_by_its_own_folder(
    tmp_path: Path,
) -> None:
    path = tmp_path / "scan"
    group = zarr.open_group(path, mode="w", zarr_format=2)
    group.attrs["bioformats2raw.layout"] = 3
    image = group.create_group("0")
    image.create_array("0", shape=(2, 40, 50), chunks=(1, 40, 50), dtype="u1")[1] = 7
    scale = {"type": "scale", "scale": [2, 250, 0.25e-3]}
    units = {"z": "micrometer", "y": "nanometer", "x": "millimeter"}
    image.attrs["multiscales"] = [
        {
            "version": "0.4",
            "axes": [{"name": n, "type": "space", "unit": unit} for n, unit in units.items()],
            "datasets": [{"path": "0", "coordinateTransformations": [scale]}],
        }
    ]
    for place in (path, path / "0", path / "0" / "0"):  # the level's own folder, too
        assert stacks.is_stack(place)
        with stacks.open_stack(place) as stack:
            assert stack.axes == "ZYX"
            assert stack.scale.pixel_size_um == pytest.approx({"Z": 2.0, "Y": 0.25, "X": 0.25})
            assert stack.array[1].max() == 7
    with stacks.open_stack(path / "0" / "0") as stack:
        assert stack.array.shape == (2, 40, 50)
    (tmp_path / "plain").mkdir()
    assert not stacks.is_zarr(tmp_path / "plain")


def test_ome_zarr_has_nested_chunks_and_its_axes_in_the_order_of_the_standard(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    maps = rng.random((2, 3, 4, 41, 50)).astype(np.float32)
    written(tmp_path / "m.zarr", maps, "ZCTYX")
    with stacks.open_stack(tmp_path / "m.zarr") as stack:
        assert stack.axes == "TCZYX"
        assert stack.scale.pixel_size_um == SIZES
        np.testing.assert_array_equal(stack.array[:], maps.transpose(2, 1, 0, 3, 4))
    assert (tmp_path / "m.zarr" / "0" / "3" / "2" / "1" / "0" / "0").is_file()
    described = json.loads((tmp_path / "m.zarr" / "0" / ".zarray").read_text())
    assert described["dimension_separator"] == "/"


@pytest.mark.skipif(os.name == "nt", reason="no such locks")
def test_what_is_being_written_is_not_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def sweep() -> None:
        for path in tmp_path.glob(".*.part"):
            disk.remove_if_stale(path)
            assert path.exists()
            seen.append(path.name[:6])

    halved = stacks._halved

    def watched(*arguments: Any) -> np.ndarray:
        sweep()
        return halved(*arguments)

    monkeypatch.setattr(stacks, "BLOCK_PX", 16)
    monkeypatch.setattr(stacks, "COARSEST_SIDE_PX", 30)
    monkeypatch.setattr(stacks, "_halved", watched)
    written(tmp_path / "m.zarr", np.zeros((1, 41, 50), np.float32), "ZYX")
    with disk.replacing(tmp_path / "m.npy") as temporary:
        temporary.write_bytes(b"half")
        sweep()
    assert set(seen) == {".m.zar", ".m.npy"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.npy", "m.zarr"]
    for name in (".m.npy.01234567.part", ".m.zarr.01234567.part", ".m.tif.01234567.map.part"):
        stale = tmp_path / name
        stale.mkdir() if "zarr" in name else stale.touch()
        disk.remove_if_stale(stale)
        assert not stale.exists()


def test_pixel_size_of_ome_zarr_takes_both_scales_and_no_nonsense(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=2)
    group.create_array("0", shape=(2, 4, 4), dtype="uint8")
    axes = [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]

    def sizes(own: list[Any], common: list[Any]) -> dict[str, float]:
        own_scale, common_scale = ([{"type": "scale", "scale": scale}] for scale in (own, common))
        group.attrs["multiscales"] = [
            {
                "version": "0.4",
                "axes": axes,
                "datasets": [{"path": "0", "coordinateTransformations": own_scale}],
                "coordinateTransformations": common_scale,
            }
        ]
        with stacks.open_stack(path) as stack:
            return dict(stack.scale.pixel_size_um)

    assert sizes([1, 1, 2], [2, 0.5, 0.5]) == {"Z": 2, "Y": 0.5, "X": 1}
    assert sizes([0, -1, 2], [1, 1, 1]) == {"X": 2}
    assert sizes([1, "much", 2], [1, 1, 1]) == {}


def test_time_steps_of_other_writers_are_seconds(tmp_path: Path) -> None:
    frames = np.zeros((3, 8, 9), np.uint16)
    path = tmp_path / "a.tif"
    metadata: dict[str, Any] = {"axes": "TYX", "TimeIncrement": 250, "TimeIncrementUnit": "ms"}
    tifffile.imwrite(path, frames, ome=True, metadata=metadata)
    with stacks.open_stack(path) as stack:
        assert (stack.axes, stack.scale.time_step_s) == ("TYX", 0.25)
    assert stacks.read_scale(path).pixel_size_um == {}
    tifffile.imwrite(path, frames, imagej=True, metadata={"axes": "TYX", "finterval": 2.5})
    with stacks.open_stack(path) as stack:
        assert (stack.axes, stack.scale.time_step_s) == ("TYX", 2.5)
    metadata = {"axes": "TYX", "finterval": 250, "tunit": "ms"}
    tifffile.imwrite(path, frames, imagej=True, metadata=metadata)
    with stacks.open_stack(path) as stack:
        assert stack.scale.time_step_s == 0.25
    # A step that is no number spoils nothing else.
    metadata = {"axes": "TYX", "TimeIncrement": "0,5", "PhysicalSizeX": 0.5}
    tifffile.imwrite(path, frames, ome=True, metadata=metadata)
    with stacks.open_stack(path) as stack:
        assert (stack.scale.pixel_size_um, stack.scale.time_step_s) == ({"X": 0.5}, None)
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    group.create_array("0", shape=(2, 4, 4), dtype="uint8")
    axes: list[dict[str, str]] = [{"name": "t", "type": "time", "unit": "minute"}]
    axes += [{"name": n, "type": "space", "unit": "micrometer"} for n in "yx"]
    scale = [{"type": "scale", "scale": [2, 0.5, 0.5]}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    with stacks.open_stack(tmp_path / "a.zarr") as stack:
        assert (stack.scale.pixel_size_um, stack.scale.time_step_s) == ({"Y": 0.5, "X": 0.5}, 120)


def test_an_archive_is_no_array(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with path.open("wb") as stream:
        np.savez(stream, a=np.zeros((4, 5)))
    with (
        pytest.raises(ImageError, match=r"a\.npy: expected one array, got an archive of several"),
        stacks.open_stack(path),
    ):
        pass


def test_a_zarr_that_names_its_dimensions_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    zarr.create_array(
        path, shape=(2, 3, 20, 30), dtype="uint8", dimension_names=["c", "z", "y", "x"]
    )
    with stacks.open_stack(path) as stack:
        assert stack.axes == "CZYX"


def test_levels_are_of_pyramids(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 40, 40), np.uint8))
    array = zarr.create_array(tmp_path / "a.zarr", shape=(3, 40, 40), dtype="u1")
    array[...] = 1
    for name in ("a.npy", "a.zarr"):
        with (
            pytest.raises(ImageError, match="has no resolution levels, so none is 3"),
            stacks.open_stack(tmp_path / name, level=3),
        ):
            pass


def test_place_and_names_of_channels_go_from_file_to_file(tmp_path: Path) -> None:
    maps = np.zeros((2, 3, 8, 9), np.float32)
    origin = {"Z": 7.0, "Y": -3.0, "X": 0.5}
    scale = Scale(SIZES, origin=origin, channel_names=("DAPI", "GFP & Cy3"))
    for suffix in (".ome.tif", ".zarr"):
        path = tmp_path / f"m{suffix}"
        written(path, maps, "CZYX", scale)
        with stacks.open_stack(path) as stack:
            assert stack.scale == scale
        with stacks.open_stack(path, axes="TZYX") as stack:
            assert stack.scale.channel_names == ()
    with tifffile.TiffFile(tmp_path / "m.ome.tif") as tiff:
        assert tiff.ome_metadata
        planes = re.findall(
            r'<Plane TheC="(\d)" TheZ="(\d)"[^>]* PositionZ="([^"]*)"', tiff.ome_metadata
        )
    assert planes == [(c, z, str(7.0 + 2 * int(z))) for c in "01" for z in "012"]


def test_a_part_has_its_own_place_steps_and_channels() -> None:
    whole = Scale({"Z": 2.0, "X": 0.5}, 3.0, {"Z": 10.0, "X": 4.0}, ("a", "b", "c"))
    part = whole.of_part({"T": range(2, 3), "C": range(1, 3), "Z": range(1, 9, 2)})
    assert part == Scale({"Z": 4.0, "X": 0.5}, 3.0, {"Z": 12.0, "X": 4.0, "T": 6.0}, ("b", "c"))
    assert Scale().of_part({"Z": range(3, 4), "C": range(1)}) == Scale()


def test_a_translation_of_all_levels_comes_after_their_scales(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    group.create_array("0", shape=(4, 4), dtype="uint8")
    axes = [{"name": n, "type": "space", "unit": "nanometer"} for n in "yx"]
    own: list[Any] = [{"type": "scale", "scale": [500, 250]}]
    own.append({"type": "translation", "translation": [1000, 0]})
    of_all = [{"type": "scale", "scale": [2, 2]}, {"type": "translation", "translation": [0, 100]}]
    datasets = [{"path": "0", "coordinateTransformations": own}]
    image: dict[str, Any] = {"version": "0.4", "axes": axes, "datasets": datasets}
    group.attrs["multiscales"] = [image | {"coordinateTransformations": of_all}]
    with stacks.open_stack(tmp_path / "a.zarr") as stack:
        assert stack.scale.pixel_size_um == {"Y": 1.0, "X": 0.5}
        assert stack.scale.origin == pytest.approx({"Y": 2.0, "X": 0.1})


def test_steps_and_place_without_a_unit_stay(tmp_path: Path) -> None:
    scale = Scale({"Y": 0.5}, origin={"X": 8.0, "Z": 5.0}, unnamed={"X": 1.0, "Z": 2.0})
    path = tmp_path / "m.zarr"
    written(path, np.zeros((4, 8, 9), np.float32), "ZYX", scale)
    with stacks.open_stack(path) as stack:
        assert stack.scale == scale
        assert stack.scale.of_part({"Z": range(1, 4, 2)}).origin["Z"] == 7.0
    axes = json.loads((path / ".zattrs").read_text())["multiscales"][0]["axes"]
    assert [axis.get("unit") for axis in axes] == [None, "micrometer", None]


def test_a_frame_of_reference_without_a_unit_is_no_place(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    metadata = {"axes": "YX", "PhysicalSizeX": 0.5, "Plane": {"PositionX": [12.0]}}
    tifffile.imwrite(path, np.zeros((8, 9), np.uint8), ome=True, metadata=metadata)
    assert stacks.read_scale(path) == Scale({"X": 0.5})


def test_a_later_file_of_an_image_in_several_names_the_first(tmp_path: Path) -> None:
    ids = [f"urn:uuid:{i}" for i in range(2)]
    files = "".join(
        f'<TiffData FirstT="{i}" IFD="0" PlaneCount="1">'
        f'<UUID FileName="t{i}.ome.tif">{ids[i]}</UUID></TiffData>'
        for i in range(2)
    )
    for i in range(2):
        xml = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{ids[i]}">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" '
            'SizeX="50" SizeY="40" SizeZ="1" SizeC="1" SizeT="2"><Channel ID="C:0"/>'
            f"{files}</Pixels></Image></OME>"
        )
        plane = np.full((40, 50), i, np.uint8)
        tifffile.imwrite(tmp_path / f"t{i}.ome.tif", plane, description=xml, metadata=None)
    with stacks.open_stack(tmp_path / "t0.ome.tif") as stack:
        assert (stack.axes, stack.array.shape) == ("TYX", (2, 40, 50))
    with (
        pytest.raises(ImageError, match=r"t1\.ome\.tif: one of several .*begins in .*t0\.ome\.tif"),
        stacks.open_stack(tmp_path / "t1.ome.tif"),
    ):
        pass
    assert stacks.first_file(tmp_path / "t0.ome.tif") is None
    assert stacks.first_file(tmp_path / "t1.ome.tif") == tmp_path / "t0.ome.tif"
    jobs, left_out = find_jobs([str(tmp_path)], tmp_path / "out")
    assert ([Path(job.source).name for job in jobs], left_out) == (["t0.ome.tif"], [])
    # Under another name it is an image of its own.
    shutil.copy(tmp_path / "t0.ome.tif", tmp_path / "copy.ome.tif")
    assert stacks.first_file(tmp_path / "copy.ome.tif") is None
    with stacks.open_stack(tmp_path / "copy.ome.tif") as stack:
        assert stack.array.shape == (2, 40, 50)
    (tmp_path / "copy.ome.tif").unlink()
    (tmp_path / "t0.ome.tif").unlink()
    assert len(find_jobs([str(tmp_path)], tmp_path / "out")[0]) == 1


def test_a_side_is_of_square_pixels() -> None:
    assert Scale({"Y": 0.5, "X": 0.5}).pixel_side_um == 0.5
    assert Scale().pixel_side_um is None
    with pytest.raises(ImageError, match=r"pixels of 1 x 0\.25 um are not square"):
        _ = Scale({"Y": 1.0, "X": 0.25}).pixel_side_um


def test_a_channel_goes_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "cells.ome.tif"
    names = ["DAPI", "488", "GFP", "gfp"]
    array = np.zeros((4, 8, 8), np.uint16)
    tifffile.imwrite(path, array, metadata={"axes": "CYX", "Channel": {"Name": names}})

    with stacks.open_stack(path) as stack:
        assert [stack.channel(wanted) for wanted in ("each", "mean", 3)] == ["each", "mean", 3]
        assert [stack.channel(wanted) for wanted in ("dapi", "488", 488)] == [0, 1, 1]
        assert stack.channel(77) == 77  # refused where it is taken
        with pytest.raises(ImageError, match=r"'Cy5': there is none; .* channels: DAPI, 488, GFP"):
            stack.channel("Cy5")
        with pytest.raises(ImageError, match="several are called so"):
            stack.channel("GFP")


def test_no_channel_has_a_name(tmp_path: Path) -> None:
    np.save(tmp_path / "stack.npy", np.zeros((2, 2, 2, 8, 8), np.uint8))
    with (
        stacks.open_stack(tmp_path / "stack.npy") as stack,
        pytest.raises(ImageError, match="names its channels: none; a number"),
    ):
        stack.channel("DAPI")


def write_slide(path: Path, rgb: np.ndarray) -> None:
    """As Aperio's scanners store one: levels, and pictures beside it that are as whole by flag."""
    head = "Aperio Image Library v10.0.51"
    tiled = {"tile": (64, 64), "photometric": "rgb", "metadata": None}
    plain = {"photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(rgb, description=f"{head}\n|AppMag = 40|MPP = 0.2500", **tiled)
        tiff.write(rgb[::8, ::8].copy(), description=f"{head}\nthumbnail", **plain)
        tiff.write(rgb[::2, ::2].copy(), description=f"{head}\nlevel", **tiled)
        tiff.write(rgb[:40].copy(), description=f"{head}\nlabel", subfiletype=1, **plain)
        tiff.write(rgb[:60].copy(), description=f"{head}\nmacro", subfiletype=9, **plain)


@pytest.mark.parametrize("name", ["slide.svs", "slide.tif"])
def test_a_slide_is_read_without_the_pictures_beside_it(
    tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    rgb = rng.integers(0, 256, (192, 256, 3), np.uint8)
    write_slide(tmp_path / name, rgb)
    np.testing.assert_array_equal(io.read_image(tmp_path / name), rgb)
    for level, step in ((0, 1), (1, 2)):
        with stacks.open_stack(tmp_path / name, level=level) as slide:
            np.testing.assert_array_equal(slide.array[:], rgb[::step, ::step])
            assert slide.scale.pixel_size_um == {"Y": 0.25 * step, "X": 0.25 * step}


def test_a_scan_is_read_without_its_label(tmp_path: Path, rng: np.random.Generator) -> None:
    scan = rng.integers(0, 256, (64, 80, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "s.ome.tif") as tiff:
        for name, rows in (("scan", 64), ("label image", 20), ("macro image", 30)):
            tiff.write(scan[:rows], photometric="rgb", metadata={"axes": "YXS", "Name": name})
    np.testing.assert_array_equal(io.read_image(tmp_path / "s.ome.tif"), scan)


@pytest.mark.parametrize(
    ("resolution", "unit", "size"),
    [(40_000, "CENTIMETER", 0.25), (50_800, "INCH", 0.5), (300, "INCH", None), (400, "NONE", None)],
)
def test_resolution_tags_of_microscopes_are_pixel_sizes(
    tmp_path: Path, resolution: int, unit: Any, size: float | None
) -> None:
    plane = np.zeros((8, 8), np.uint8)
    how = {"resolution": (resolution, resolution), "resolutionunit": unit}
    tifffile.imwrite(tmp_path / "a.tif", plane, **how)
    found = stacks.read_scale(tmp_path / "a.tif").pixel_size_um
    assert found == ({} if size is None else pytest.approx({"Y": size, "X": size}))


def test_the_one_channel_has_a_name_too(tmp_path: Path) -> None:
    how = {"axes": "ZYX", "Channel": {"Name": ["DAPI"]}}
    tifffile.imwrite(tmp_path / "a.ome.tif", np.zeros((3, 8, 8), np.uint16), metadata=how)
    with stacks.open_stack(tmp_path / "a.ome.tif") as stack:
        assert stack.channel("dapi") == "each"
        with pytest.raises(ImageError, match="'GFP': there is none"):
            stack.channel("GFP")


def test_what_would_take_for_ever_is_refused_at_once(tmp_path: Path) -> None:
    zarr.create_array(
        tmp_path / "z.zarr", shape=(20_000, 20_000), chunks=(1, 1), dtype="uint8", zarr_format=2
    )
    with (
        pytest.raises(ImageError, match="400,000,000 chunks of"),
        stacks.open_stack(tmp_path / "z.zarr"),
    ):
        pass
    plane = np.zeros((64, 64), np.uint8)
    tifffile.imwrite(tmp_path / "s.ome.tif", plane, metadata={"axes": "YX"})
    with tifffile.TiffFile(tmp_path / "s.ome.tif") as tiff:
        xml = (tiff.ome_metadata or "").replace('SizeZ="1"', 'SizeZ="100000000"')
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, plane, description=xml, metadata=None)
    start = time.monotonic()
    with pytest.raises(ImageError, match="states 100000000 planes"), stacks.open_stack(path):
        pass
    assert time.monotonic() - start < 5
