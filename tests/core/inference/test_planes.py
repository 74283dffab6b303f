"""Stacks of any axes: what is read, in which order, with which intensities."""

import itertools
import time
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch

from semanticblur_core import Detector, SemanticBlur
from semanticblur_core.errors import ImageError
from semanticblur_core.inference.planes import QUICK_RANGE_PIXELS, Planes


class Counting:
    """An array that remembers what was read of it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.keys = array, []
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, key: Any) -> np.ndarray:
        self.keys.append(key)
        return self.array[key]


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(3)
    return Detector(SemanticBlur(), device="cpu", precision="float32")


@pytest.mark.parametrize(
    ("shape", "axes", "channels", "walked", "lengths"),
    [
        ((9, 8), "YX", "each", "", ()),
        ((9, 8, 3), "YXS", "each", "", ()),
        ((2, 4, 9, 8), "TZYX", "each", "TZ", (2, 4)),
        ((2, 4, 9, 8), "TCYX", "each", "TC", (2, 4)),
        ((2, 4, 9, 8), "TCYX", 1, "T", (2,)),
        ((2, 4, 9, 8), "TCYX", "mean", "T", (2,)),
        ((8, 9, 5), "XYZ", "each", "Z", (5,)),
        ((3, 2, 9, 8), "SZYX", "each", "Z", (2,)),
    ],
)
def test_axes_are_walked_or_kept(
    shape: tuple[int, ...], axes: str, channels: Any, walked: str, lengths: tuple[int, ...]
) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    planes = Planes(array, axes, channels)
    assert (planes.walked_axes, planes.lengths) == (walked, lengths)
    assert planes.plane_shape == (9, 8)
    assert len(list(planes.indices())) == len(planes)
    view = planes.view((0,) * len(lengths))
    expected = {"mean": (4, 9, 8)}.get(channels, (9, 8, 3) if "S" in axes else (9, 8))
    assert view.read().shape == expected
    assert view.read(slice(2, 5), slice(0, 3)).shape[-2 if "S" not in axes else 0] in (3, 4)


def test_a_plane_is_the_array_at_its_index(rng: np.random.Generator) -> None:
    array = rng.integers(0, 1000, (8, 3, 9, 2), np.uint16)  # X C Y Z
    plane = Planes(array, "XCYZ", 2).view((1,)).read()
    np.testing.assert_array_equal(plane, array[:, 2, :, 1].T)


@pytest.mark.parametrize(
    ("axes", "channels", "message"),
    [
        ("YX", "each", "expected 4 different letters"),
        ("ZZYX", "each", "different letters"),
        ("TCZY", "each", "expected Y and X"),
        ("TYXS", "each", "3 or 4 samples along S"),
        ("TZYX", 0, "name no channels"),
        ("TCYX", 7, "expected 0 to 1"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes: str, channels: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        Planes(np.zeros((2, 2, 9, 8)), axes, channels)


def test_only_the_planes_asked_for_are_read(detector: Detector) -> None:
    array = Counting(np.zeros((50, 40, 44), np.uint8))
    [update] = detector.iter_planes(array, "ZYX", indices=[(31,)], size=64)
    assert [key[0] for key in array.keys] == [31]
    assert (update.index, update.n_total, update.blur.shape) == ((31,), 1, (40, 44))


def test_the_range_is_the_stack_s_not_the_plane_s(detector: Detector) -> None:
    stack = np.zeros((3, 40, 40), np.uint16)
    stack[0, :, ::2], stack[1, :, ::2], stack[2, :, ::2] = 10, 100, 1000
    planes = Planes(stack, "ZYX")
    limits = planes.estimate_range()
    assert limits == [(0.0, 1000.0)]
    assert planes.view((1,)).read_unit(limits=limits).max() == pytest.approx(0.1)
    given = [u.blur for u in detector.iter_planes(stack, "ZYX", size=64, value_range=(0, 1000))]
    found = [u.blur for u in detector.iter_planes(stack, "ZYX", size=64)]
    np.testing.assert_array_equal(given, found)


def test_a_mean_of_channels_gives_each_its_own_range() -> None:
    image = np.stack([np.tile([0, 10], (40, 20)), np.tile([0, 5000], (40, 20))]).astype(np.uint16)
    planes = Planes(image, "CYX", "mean")
    limits = planes.estimate_range()
    assert limits == [(0.0, 10.0), (0.0, 5000.0)]
    assert np.unique(planes.view(()).read_unit(limits=limits)).tolist() == [0.0, 1.0]
    with pytest.raises(ImageError, match="expected 2 intensity ranges, got 1"):
        planes.as_limits([(0, 1)])


def test_each_channel_has_its_own_range(detector: Detector) -> None:
    """One of 10 counts beside one of 50 000 is no black plane; alone it gives the same map."""
    rng = np.random.default_rng(0)
    stack = rng.integers(0, 11, (2, 3, 40, 40)).astype(np.uint16)  # ZCYX
    stack[:, 1] *= 5000
    stack[:, 2] = 0
    planes = Planes(stack, "ZCYX")
    limits = planes.estimate_range()
    assert limits == [(0.0, 10.0), (0.0, 50_000.0), (0.0, 1.0)]
    assert planes.view((1, 0)).read_unit(limits=limits).max() == 1
    for channel in (0, 1):
        alone = Planes(stack, "ZCYX", channel).estimate_range()
        assert alone == [limits[channel]]
        each = detector.iter_planes(stack, "ZCYX", indices=[(1, channel)], size=64)
        one = detector.iter_planes(stack, "ZCYX", indices=[(1,)], channels=channel, size=64)
        np.testing.assert_array_equal(next(each).blur, next(one).blur)
    # Of a channel that is not read nothing is known but what the others are like.
    assert planes.estimate_range([(0, 1)]) == [(0.0, 50_000.0)] * 3
    nothing = np.where(np.arange(2)[:, None, None] == 0, np.nan, np.linspace(0, 9, 40))
    assert len(Planes(nothing * np.ones((2, 40, 40)), "CYX").estimate_range() or ()) == 2


def test_nan_and_constant_planes_are_detected(detector: Detector) -> None:
    stack = np.full((3, 40, 40), np.nan, np.float32)
    stack[1] = 7
    stack[2] = np.linspace(0, 9, 40)
    for update in detector.iter_planes(stack, "ZYX", size=64):
        assert np.isfinite(update.blur).all()
    with pytest.raises(ImageError, match="no finite value"):
        list(detector.iter_planes(stack[:1], "ZYX", size=64))


@pytest.mark.parametrize("value", [7.0, 1e20, -3e38])
def test_a_constant_stack_is_all_black_however_bright(value: float) -> None:
    planes = Planes(np.full((2, 40, 40), value, np.float32), "ZYX")
    limits = planes.estimate_range()
    np.testing.assert_array_equal(planes.view((1,)).read_unit(limits=limits), np.zeros((40, 40)))


def test_updates_count_tiles_and_finish_planes(detector: Detector) -> None:
    stack = np.zeros((2, 60, 60), np.uint8)
    updates = list(detector.iter_planes(stack, "TYX", size="native", tile_size_px=40, overlap_px=8))
    assert [u.n_done for u in updates] == list(range(1, 9))
    assert [u.n_total for u in updates] == [8] * 8
    assert [u.plane_done for u in updates] == [False, False, False, True] * 2
    assert updates[3].blur is updates[0].blur


def test_what_is_said_to_be_finished_is(detector: Detector) -> None:
    """Where tiles are still to come, their sum is not the map."""
    plane = np.random.default_rng(0).integers(0, 256, (60, 90), np.uint8)
    whole = detector.detect(plane, size=64)  # loads it
    assert whole.shape == (60, 90)
    states = [
        (u.blur.copy(), u.finished.copy())
        for u in detector.iter_planes(plane, "YX", size="native", tile_size_px=40, overlap_px=8)
    ]
    blur, finished = states[-1]
    assert finished.all()
    shares = [part.mean() for _, part in states]
    assert 0 < shares[0] < shares[1] < 1
    for so_far, part in states:
        np.testing.assert_array_equal(so_far[part], blur[part])


class Chunked:
    """An array that says its chunks, as Zarr does, and counts which of them are read."""

    def __init__(self, array: np.ndarray, chunks: tuple[int, ...]) -> None:
        self.array, self.chunks = array, chunks
        self.shape, self.dtype = array.shape, array.dtype
        self.read: set[tuple[int, ...]] = set()

    def __getitem__(self, key: tuple[int | slice, ...]) -> np.ndarray:
        spans = []
        for part, length, side in zip(key, self.shape, self.chunks, strict=True):
            inside = range(length)[part] if isinstance(part, slice) else [part]
            spans.append(sorted({i // side for i in inside}))
        self.read |= set(itertools.product(*spans))
        return np.asarray(self.array[key])


def test_the_range_of_a_large_plane_in_chunks_is_that_of_a_few_of_them() -> None:
    rng = np.random.default_rng(0)
    plane = np.broadcast_to(rng.integers(0, 9999, (1, 10_000, 1), np.uint16), (2, 10_000, 10_000))
    lazy = Chunked(plane, (1, 500, 500))
    reading = Planes(lazy, "ZYX").iter_range([(1,)], most_pixels=QUICK_RANGE_PIXELS)
    n_read = [len(lazy.read) for _ in reading]
    assert n_read == list(range(68))  # it can be closed before each of 67 chunks, of 400
    assert {z for z, _, _ in lazy.read} == {1}
    assert len({y for _, y, _ in lazy.read}) == 20
    assert len({x for _, _, x in lazy.read}) == 20
    [(low, high)] = Planes(lazy, "ZYX").estimate_range([(1,)]) or []
    assert (low, high) == pytest.approx(np.percentile(plane[1, :, 0], (0.1, 99.9)), abs=30)


def test_the_range_of_few_chunks_is_that_of_an_array_in_memory(rng: np.random.Generator) -> None:
    for axes, channels in (("CYX", "each"), ("CYX", "mean"), ("CYX", 1)):
        array = rng.normal(size=(2, 1300, 1100)).astype(np.float32)
        lazy = Chunked(array, (1, 300, 512))
        expected = Planes(array, axes, channels).estimate_range()
        assert Planes(lazy, axes, channels).estimate_range() == expected


def test_many_planes_share_what_is_read_for_their_range() -> None:
    lazy = Chunked(
        np.broadcast_to(np.arange(4096, dtype=np.uint16), (40, 4096, 4096)), (1, 256, 256)
    )
    Planes(lazy, "ZYX").estimate_range(most_pixels=QUICK_RANGE_PIXELS)
    assert len({z for z, _, _ in lazy.read}) == 16
    assert len(lazy.read) == 16 * 16  # of 40 x 256
    huge = Planes(Chunked(np.broadcast_to(np.uint16(1), (100_000, 100_000)), (256, 256)), "YX")
    start = time.perf_counter()
    some, others = huge._range_pieces(401, 1, QUICK_RANGE_PIXELS)
    assert (len(some), len(some) + len(others)) == (256, 391**2)
    assert time.perf_counter() - start < 5  # minutes, where each piece was looked for in a list


def test_no_chunk_of_a_sparse_slide_is_passed_over() -> None:
    plane = np.zeros((10_240, 10_240), np.uint16)
    quick = Chunked(plane, (1024, 1024))
    Planes(quick, "YX").estimate_range(most_pixels=QUICK_RANGE_PIXELS)
    i, j = next(at for at in np.ndindex(10, 10) if at not in quick.read)
    plane[1024 * i : 1024 * (i + 1), 1024 * j : 1024 * (j + 1)] = 9999
    limits = [(0, 9999)]
    assert Planes(plane, "YX").estimate_range() == limits
    assert Planes(Chunked(plane, (1024, 1024)), "YX").estimate_range() == limits


def test_a_plane_of_which_only_a_corner_is_known_has_a_range() -> None:
    array = np.full((5000, 5000), np.nan, np.float32)
    array[3000:3100, 10:110] = np.linspace(2, 3, 100)
    limits = Planes(Chunked(array, (500, 500)), "YX").estimate_range() or []
    assert limits[0] == pytest.approx((2, 3), abs=0.2)


@pytest.mark.parametrize("channels", [True, 1.0, "foo"])
def test_channels_that_mean_nothing_are_refused(channels: Any) -> None:
    with pytest.raises(ImageError, match="expected 'each', 'mean' or a number"):
        Planes(np.zeros((2, 8, 8), np.uint8), "CYX", channels)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("size", [64, "native"])
def test_what_is_masked_counts_for_planes_as_for_images(
    detector: Detector, rng: np.random.Generator, dtype: str, size: Any
) -> None:
    array = rng.integers(0, 200, (50, 60)).astype(dtype)
    array[:9] = 255 if dtype == "uint8" else 50_000
    masked = np.ma.masked_greater(array, 200)
    [update] = [u for u in detector.iter_planes(masked, "YX", size=size) if u.plane_done]
    expected = detector.detect(masked, size=size)
    np.testing.assert_array_equal(update.blur, expected)
    assert np.abs(expected - detector.detect(array, size=size)).max() > 0.001
    lazy = da.from_array(masked, chunks=25)
    [update] = [u for u in detector.iter_planes(lazy, "YX", size=size) if u.plane_done]
    np.testing.assert_allclose(update.blur, expected, atol=1e-5)


def test_tensors_are_planes(detector: Detector, rng: np.random.Generator) -> None:
    array = rng.integers(0, 256, (2, 40, 50), dtype=np.uint8)
    ours, theirs = (
        [update.blur for update in detector.iter_planes(given, "ZYX", size=64)]
        for given in (array, torch.from_numpy(array))
    )
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ImageError, match="expected an array, got a tensor: Can't call numpy"):
        Planes(torch.zeros(2, 40, 50, requires_grad=True), "ZYX")


def test_a_numpy_integer_is_a_channel() -> None:
    channel: Any = np.int64(1)
    planes = Planes(np.arange(128, dtype=np.uint8).reshape(2, 8, 8), "CYX", channel)
    assert planes.view(()).read()[0, 0] == 64


def test_numbers_that_are_not_real_are_refused() -> None:
    with pytest.raises(ImageError, match="expected real numbers, got complex128"):
        Planes(np.zeros((8, 8), complex), "YX")


def test_ranges_may_be_arrays() -> None:
    planes = Planes(np.zeros((2, 40, 40), np.uint16), "CYX")
    ranges: Any
    for ranges in (np.array([[0, 5], [0, 9]]), [np.array([0, 5]), (0, 9)]):
        assert planes.as_limits(ranges) == [(0.0, 5.0), (0.0, 9.0)]
    assert planes.as_limits(np.array([1, 2])) == [(1.0, 2.0)] * 2  # type: ignore[arg-type]
    for ranges in (3, [1, 2, 3], ["a", "b"], None):
        with pytest.raises(ImageError, match="expected LOW and HIGH, or a pair a channel"):
            planes.as_limits(ranges)


def test_the_range_is_that_of_all_colours_of_a_mosaic() -> None:
    mosaic = np.tile(np.array([[0, 20000], [240, 5000]], np.uint16), (400, 600))
    assert Planes(mosaic, "YX").estimate_range() == [(0, 20000)]
    with pytest.raises(ImageError, match="no planes to take the range"):
        Planes(mosaic, "YX").estimate_range([])


def test_channels_of_a_mean_share_what_is_read_for_their_range() -> None:
    array = np.broadcast_to(np.uint16(1), (40, 20_000, 20_000))
    lazy = Chunked(array, (40, 256, 256))
    some, _ = Planes(lazy, "CYX", "mean")._range_pieces(81, 1, 2**28)
    assert len(some) == 2**28 // (40 * 256 * 256)


def test_all_planes_of_a_single_image_are_that_one() -> None:
    planes = Planes(np.zeros((48, 64)), "YX")
    assert planes.box([slice(None)]) == planes.box([slice(0, None), slice(None)]) == []
    with pytest.raises(ImageError, match="1 ranges for 0 axes"):
        planes.box([slice(0, 2)])
    stack = Planes(np.zeros((3, 48, 64)), "ZYX")
    assert stack.box([slice(None), slice(1, None)]) == [range(1, 3)]


@pytest.mark.parametrize("axes", ["ZYX", "CZYX"])
def test_the_range_is_that_of_the_pieces_that_can_be_read(axes: str) -> None:
    rng = np.random.default_rng(0)
    shape = (2, 3, 512, 512)[-len(axes) :]
    values = rng.integers(100, 5000, shape, dtype=np.uint16)

    def piece(part: np.ndarray, block_info: Any = None) -> np.ndarray:
        if block_info[0]["chunk-location"][-3:] == (1, 1, 0):
            raise ValueError("codec broke")
        return part

    lazy = da.from_array(values, chunks=(1,) * (len(shape) - 2) + (256, 256)).map_blocks(
        piece, dtype=np.uint16, meta=np.empty((0,) * len(shape), np.uint16)
    )
    channels = "mean" if "C" in axes else "each"
    found = Planes(lazy, axes, channels).estimate_range()
    whole = Planes(values, axes, channels).estimate_range()
    np.testing.assert_allclose(found, whole, rtol=0.05)


def test_a_range_is_found_though_all_planes_that_are_looked_at_first_are_damaged() -> None:
    def plane(block_info: Any = None) -> np.ndarray:
        z = block_info[None]["chunk-location"][0]
        if z % 2 == 0:
            raise ValueError("codec broke")
        return np.linspace(0, 1000, 64 * 64, dtype=np.uint16).reshape(1, 64, 64)

    lazy = da.map_blocks(plane, chunks=((1,) * 31, (64,), (64,)), dtype=np.uint16)
    planes = Planes(lazy, "ZYX")
    assert all(index[0] % 2 == 0 for index in planes.range_samples()[0])
    [[low, high]] = planes.estimate_range() or []
    assert (low, high) == pytest.approx((0, 1000), abs=3)
    with pytest.raises(ImageError, match="plane Z=30: cannot be read: codec broke"):
        planes.estimate_range([(0,), (30,)])
