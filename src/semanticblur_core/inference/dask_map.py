"""Dask in, dask out: blur maps of an array of any size, computed where and when they are wanted."""

from __future__ import annotations

import functools
import pickle
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import io, weights
from semanticblur_core.errors import ConfigError, ImageError, WeightsError
from semanticblur_core.inference.backends import is_exported
from semanticblur_core.inference.cluster import process_detector
from semanticblur_core.inference.detector import require_backend, require_size
from semanticblur_core.inference.planes import Channels, Planes, range_of_samples


def detect_dask(
    array: Any,
    axes: str,
    *,
    model: str = "default",
    device: str = "auto",
    precision: str = "auto",
    flip: bool = False,
    backend: str = "auto",
    size: int | Literal["native"] = 320,
    channels: Channels = "each",
    value_range: tuple[float, float] | Sequence[tuple[float, float]] | None = None,
) -> Any:
    """Blur maps of a dask array, lazily, one task a plane; `Detector.iter_planes` for dask.

    Parameters
    ----------
    array
        Dask array, or anything that `dask.array.asarray` takes (zarr, a memory map).
    axes, channels
        See `semanticblur_core.inference.planes.Planes`.
    model, device, precision, flip
        See `semanticblur_core.Detector`; each process of a dask.distributed cluster loads its own
        once, a file of weights under the same absolute path; here it must be, too.
    backend
        Likewise, but ``auto`` is torch on all machines, whatever was measured there; of an
        exported file, ONNX Runtime.
    size
        As in `semanticblur_core.Detector.detect`.
    value_range
        Intensities that become 0 and 1, or a pair for each channel. By default, and unless the type
        is 8-bit, one task estimates percentiles from at most 16 planes of each channel, spread over
        the whole array, for all planes of one ``compute``. Give them (or
        ``Planes(array, axes).estimate_range()``) where single planes are computed by and by.

    Returns
    -------
    dask.array.Array
        Float32 in 0..1, 1 = out of focus: the walked axes in their order, then rows and columns;
        a chunk a plane. Computing a plane reads that plane only, and those of the estimate.

    Raises
    ------
    ConfigError, ImageError, WeightsError
        If dask is missing, axes, channels and array do not fit, or there is no such size, back end
        or model.

    Examples
    --------
    >>> maps = detect_dask(dask.array.from_zarr("stack.zarr"), "TZYX", value_range=(100, 4000))
    >>> maps.to_zarr("maps.zarr")  # on the threads of this machine, or on a distributed.Client
    """
    try:
        import dask
        import dask.array as da
    except ImportError:
        raise ConfigError("this needs dask: pip install 'napari-semanticblur[cluster]'") from None

    # Now, not hours later on a cluster.
    if size != "native":
        require_size(size)
    require_backend(backend)
    model = str(model)
    if not is_exported(model):
        weights.resolve(model)
    elif not Path(model).is_file():
        raise WeightsError(f"{model}: no such file")
    if backend == "auto" and not is_exported(model):
        backend = "torch"
    if Path(model).is_file():
        model = str(Path(model).absolute())  # workers are in folders of their own
    array = da.asarray(array)
    planes = Planes(array, axes, channels)
    channels = planes.channels  # of numpy's whole numbers, Python's
    if isinstance(channels, int):  # the other channels are not even read
        array = array[tuple(channels if axis == "C" else slice(None) for axis in axes)]
        axes, channels = axes.replace("C", ""), "each"
        planes = Planes(array, axes, channels)
    walked = planes.walked_axes
    inside = "".join(axis for axis in "CYXS" if axis in axes and axis not in walked)
    array = array.transpose([axes.index(axis) for axis in walked + inside])
    array = array.rechunk((1,) * len(walked) + (-1,) * len(inside))

    ranges: Any = None
    if value_range is not None:
        ranges = da.asarray(np.array(planes.as_limits(value_range)))
    elif array.dtype not in (np.uint8, np.bool_):
        indices, step = planes.range_samples()
        cut = tuple(slice(None, None, step) if axis in "YX" else slice(None) for axis in inside)
        samples = [array[(*index, *cut)] for index in indices]
        estimate = functools.partial(
            _estimate, inside=inside, channels=[planes.channel(index) for index in indices],
            n_ranges=planes.n_ranges, is_mean=channels == "mean",
        )  # fmt: skip
        found = dask.delayed(estimate)(samples)
        ranges = da.from_delayed(found, (planes.n_ranges, 2), np.float64)

    letters = dict(zip(walked + inside, string.ascii_lowercase, strict=False))
    with_ranges: tuple[Any, ...] = (None, None)
    if ranges is not None:
        of_channels = "C" in walked  # then each block has that of its own
        with_ranges = (ranges.rechunk((1 if of_channels else -1, -1)),)
        with_ranges += ((letters["C"] if of_channels else "A") + "B",)
    return da.blockwise(
        _detect_block,
        "".join(letters[axis] for axis in (*walked, "Y", "X")),
        array,
        "".join(letters[axis] for axis in walked + inside),
        *with_ranges,
        make=pickle.dumps(functools.partial(_make, model, device, precision, flip, backend)),
        axes=walked + inside,
        channels=channels,
        size=size,
        concatenate=True,
        dtype=np.float32,
        meta=np.empty((0,) * (len(walked) + 2), np.float32),
    )


def _make(model: str, device: str, precision: str, flip: bool, backend: str) -> Any:
    from semanticblur_core.inference.detector import Detector

    return Detector(model, device=device, precision=precision, flip=flip, backend=backend)


def _estimate(samples: list[NDArray[Any]], *, inside: str, **keywords: Any) -> NDArray[np.float64]:
    samples = [io.unmasked(sample) for sample in samples]
    if "S" in inside:
        samples = [sample[..., :3] for sample in samples]
    return np.array(range_of_samples(samples, **keywords))


def _detect_block(
    block: NDArray[Any],
    ranges: NDArray[np.float64] | None,
    *,
    make: bytes,
    axes: str,
    channels: Channels,
    size: int | Literal["native"],
) -> NDArray[np.float32]:
    """Map of one plane, with its walked axes of length one."""
    detector = process_detector(make)
    limits = None if ranges is None else [(float(low), float(high)) for low, high in ranges]
    blur = None
    for update in detector.iter_planes(
        block, axes, indices=None, channels=channels, size=size, value_range=limits
    ):
        blur = update.blur
    if blur is None:
        raise ImageError(f"no plane in a block of shape {block.shape}")
    n_walked = sum(axis not in "YXS" and (axis != "C" or channels == "each") for axis in axes)
    return blur.reshape((1,) * n_walked + blur.shape)
