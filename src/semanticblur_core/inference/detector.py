"""From images and stacks to blur maps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from semanticblur_core import io, weights
from semanticblur_core.config import MAX_SIZE_PX, MIN_SIZE_PX, ModelConfig
from semanticblur_core.data.squash import squash
from semanticblur_core.errors import ConfigError, ImageError
from semanticblur_core.inference.backends import (
    BACKENDS,
    Backend,
    Resizing,
    Upsampling,
    is_exported,
    open_exported,
    resize_map,
)
from semanticblur_core.inference.choice import ensure_exported, pick_backend
from semanticblur_core.inference.planes import (
    ALL,
    BATCH_PIXELS,
    Channels,
    DetectUpdate,
    Planes,
    Region,
)
from semanticblur_core.inference.tiling import OVERLAP_PX, TILE_SIZE_PX, Tile, TileGrid
from semanticblur_core.inference.upsampling import to_logits, upsample_guided

if TYPE_CHECKING:
    import torch

    from semanticblur_core.network import SemanticBlur

PAPER_SIZE_PX = 320
# A GPU is idle with one image at a time; on two cores batches of 2 to 8 were no faster than one.
GPU_BATCH_SIZE = 16

# Modes of Pillow whose numbers are grey levels or RGB.
_PLAIN_MODES = ("1", "L", "I", "F", "RGB", "RGBA")

_Item = TypeVar("_Item")
Reader = Callable[[slice, slice], NDArray[Any]]


class Detector:
    """Finds what is out of focus; loads the network once.

    Parameters
    ----------
    model
        ``"default"`` (the packaged weights), a model of your own, the path of a file of weights or
        of an ONNX file that ``semanticblur-core export`` wrote, or a network.
    device
        ``auto``, ``cpu``, ``cuda`` or ``mps``.
    precision
        ``auto``, ``float32``, ``bfloat16`` or, on CUDA, ``float16``.
    flip
        Average the map with that of the mirrored image: twice the time.
    backend
        ``torch``, ``compile`` (``torch.compile``), ``onnxruntime``, ``openvino``, or ``auto``: what
        was measured to be fastest on this machine, see
        `semanticblur_core.inference.choice.pick_backend`; torch until something was. All take the
        number of threads from ``OMP_NUM_THREADS`` where it is set when they start.
    n_images
        How many are to come, for ``auto``: a back end that starts slowly pays for many. Counted as
        squares of 320 px: a tile of 512 px is 2.6 of them.
    upsampling
        How a map is brought to the image's size: ``guided`` by the image's own edges (where the
        image is larger than the square that it was squashed to), ``bilinear``, or
        ``nearest-exact`` as the evaluation protocol wants it. Native maps need none.
    scales
        Squashed images are analysed at ``size`` times each of these and the logits averaged:
        ``(1, 1.4)`` is better on photographs and takes three times as long. Not for native size.
    batch_size
        Images, planes or tiles computed at once; 0 is 1 on a CPU and 16 on a GPU.

    Attributes
    ----------
    backend, device, precision, reason, batch_size
        What it computes in and on, why, and how many at once.
    flip, upsampling, scales
        As given.
    name
        The model as it was asked for, or ``"network"``.
    config, info, sha256
        Architecture; metadata of the file of weights, None for others; sha256 of the weights.

    Raises
    ------
    WeightsError, ConfigError
        If the weights or the device cannot be had.
    SemanticBlurError
        If the back end is not installed.

    Examples
    --------
    >>> from skimage.data import chelsea
    >>> from semanticblur_core import Detector
    >>> blur = Detector().detect(chelsea())  # (300, 451) float32, 1 = out of focus
    """

    def __init__(
        self,
        model: str | Path | SemanticBlur = "default",
        *,
        device: str = "auto",
        precision: str = "auto",
        flip: bool = False,
        backend: str = "auto",
        n_images: float = 1,
        upsampling: Upsampling = "guided",
        scales: Sequence[float] = (1.0,),
        batch_size: int = 0,
    ) -> None:
        require_backend(backend)
        _require_upsampling(upsampling)
        if isinstance(model, Path):
            model = str(model)
        if not isinstance(model, str) and not hasattr(model, "config"):
            raise ConfigError(
                f"model: expected a name, a file or a SemanticBlur network, got {model!r}"
            )
        if not isinstance(flip, (bool, np.bool_)):
            raise ConfigError(f"flip: expected True or False, got {flip!r}")
        if not isinstance(batch_size, (int, np.integer)) or batch_size < 0:
            raise ConfigError(f"batch_size: expected 1 or more, or 0 to choose, got {batch_size!r}")
        if not (isinstance(n_images, (int, float, np.number)) and n_images >= 0):
            raise ConfigError(f"n_images: expected a number from 0, got {n_images!r}")
        if not isinstance(device, str):
            raise ConfigError(f"device: expected auto, cpu, cuda or mps, got {device!r}")
        self.flip, self.upsampling = bool(flip), upsampling
        self.scales = _as_scales(scales)
        self.name = model if isinstance(model, str) else "network"
        self.info: weights.WeightsInfo | None = None
        self.sha256: str | None = None
        self.config: ModelConfig
        self._backend: Backend
        if isinstance(model, str) and is_exported(model):
            exported = open_exported(
                Path(model), backend=backend, device=device, precision=precision
            )
            self._backend, self.config = exported, exported.info.architecture
            self.sha256 = exported.info.sha256
        else:
            n_images *= (1 + flip) * sum(scale**2 for scale in self.scales)
            self._load(model, device, precision, backend, n_images)
        self._network = None if isinstance(model, str) else model
        self._batch_size = batch_size

    def __repr__(self) -> str:
        return (
            f"Detector({self.name!r}, backend={self.backend!r}, device={self.device!r}, "
            f"precision={self.precision!r})"
        )

    @functools.cached_property
    def identity(self) -> str:
        """sha256 of the weights, also of a network that comes from no file."""
        if self._network is None:
            return str(self.sha256)
        return weights.digest({k: v.cpu() for k, v in self._network.state_dict().items()})

    def _load(
        self, model: str | SemanticBlur, device: str, precision: str, backend: str, n_images: float
    ) -> None:
        """Set what is known of the model, and its back end."""
        why = ""
        if not isinstance(model, str):
            self.config = model.config
            if backend not in ("auto", "torch", "compile"):
                raise ConfigError(f"backend {backend}: runs files of weights, not networks")
        else:
            self.info = weights.read_info(weights.resolve(model))
            self.config, self.sha256 = self.info.architecture, self.info.sha256
            if backend == "auto" and device in ("auto", "cpu"):
                backend, why = pick_backend(self.info, n_images, precision, device)
        if backend in ("onnxruntime", "openvino"):
            assert isinstance(model, str)
            self._backend = open_exported(
                ensure_exported(model), backend=backend, device=device, precision=precision
            )
            self._backend.reason = why or "as asked"
            return
        from semanticblur_core.inference.torch_backend import TorchBackend

        self._backend = TorchBackend(
            weights.load(model)[0] if isinstance(model, str) else model,
            device=device,
            precision=precision,
            compiled=backend == "compile",
        )

    @property
    def engine(self) -> Backend:
        """What computes the network: arrays in 0..1 to maps."""
        return self._backend

    @property
    def backend(self) -> str:
        """One of ``torch``, ``compile``, ``onnxruntime`` and ``openvino``."""
        return self._backend.name

    @property
    def device(self) -> str:
        """``cpu``, ``cuda`` ...; another one after a GPU ran out of memory."""
        return self._backend.device

    @property
    def batch_size(self) -> int:
        """Images, planes or tiles computed at once."""
        return self._batch_size or (1 if self.device == "cpu" else GPU_BATCH_SIZE)

    @property
    def precision(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``."""
        return self._backend.precision

    @property
    def reason(self) -> str:
        """Why it computes so, one line for people."""
        return self._backend.reason

    def detect(
        self,
        image: ArrayLike,
        *,
        size: int | Literal["native"] = PAPER_SIZE_PX,
        value_range: tuple[float, float] | None = None,
        upsampling: Upsampling | None = None,
        on_tile: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Blur map of one image.

        Parameters
        ----------
        image
            ``(H, W)`` or ``(H, W, 3)``, any real dtype; a fourth channel (alpha) is dropped.
            Of Pillow's images those in colour, whatever their mode, become RGB.
        size
            The image is squashed to ``size`` x ``size`` pixels for the network (320 is the paper's
            protocol); ``"native"`` analyses it at its own size, in overlapping tiles of 512 px.
        value_range
            Intensities that count as black and white, see `semanticblur_core.io.to_unit_range`.
        upsampling
            Another way than the detector's own.
        on_tile
            Called at native size with the tiles of an image that are done, and all of it.

        Returns
        -------
        ndarray
            ``(H, W)`` float32 in 0..1, 1 = out of focus.

        Raises
        ------
        ImageError
            If the image is not one grey or RGB image, or is smaller than 33 px at native size.
        ConfigError
            If the size or the upsampling is none.
        """
        return self.detect_batch(
            [image], size=size, value_range=value_range, upsampling=upsampling, on_tile=on_tile
        )[0]

    def detect_batch(
        self,
        images: Sequence[ArrayLike],
        *,
        size: int | Literal["native"] = PAPER_SIZE_PX,
        value_range: tuple[float, float] | None = None,
        upsampling: Upsampling | None = None,
        on_tile: Callable[[int, int], None] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Blur maps of several images, as `detect`; one pass unless the size is native."""
        if len(images) == 0:
            return []
        if upsampling is not None:
            _require_upsampling(upsampling)
        if size == "native":
            return [self._detect_native(image, value_range, on_tile) for image in images]
        require_size(size, self.scales)
        pixels = [_prepare(image, value_range) for image in images]
        return self._run_squashed(pixels, size, upsampling or self.upsampling)

    def detect_tensors(
        self,
        images: list[NDArray[Any]],
        *,
        size: int = PAPER_SIZE_PX,
        value_range: tuple[float, float] | None = None,
        upsampling: Resizing = "bilinear",
    ) -> list[torch.Tensor]:
        """Blur maps as `detect_batch`, ``(H, W)`` float32, left on the device; torch only, no flip.

        Raises
        ------
        ConfigError
            If the back end is another.
        """
        from semanticblur_core.inference.torch_backend import TorchBackend

        if not isinstance(self._backend, TorchBackend) or self.flip:
            raise ConfigError(f"backend {self.backend}: tensors come from torch, without flip")
        require_size(size)
        prepared = np.stack([squash(_prepare(image, value_range), size, size) for image in images])
        shapes = [image.shape for image in images]
        return self._backend.tensors_resized(prepared, shapes, upsampling)

    def iter_planes(
        self,
        array: Any,
        axes: str,
        *,
        indices: Sequence[int | Sequence[int]] | None = None,
        channels: Channels = "each",
        size: int | Literal["native"] = PAPER_SIZE_PX,
        value_range: tuple[float, float] | Sequence[tuple[float, float]] | None = None,
        tile_size_px: int = TILE_SIZE_PX,
        overlap_px: int = OVERLAP_PX,
        visible: Region | None = None,
        upsampling: Upsampling | None = None,
    ) -> Generator[DetectUpdate]:
        """Detect an array of any number of axes, plane by plane, tile by tile; close it to stop.

        Parameters
        ----------
        array, axes, channels
            See `semanticblur_core.inference.planes.Planes`: read only where a plane or tile is due.
        indices
            Planes, as indices along the walked axes, in the order wanted; by default all. A number
            will do where one axis is walked.
        size
            As in `detect`: one piece a plane, or ``"native"`` tiles.
        value_range
            Intensities that become 0 and 1, or a pair for each channel of a mean. By default, and
            unless the type is 8-bit, percentiles estimated from planes spread over the whole array.
        tile_size_px, overlap_px
            Of native tiles.
        visible
            Rows and columns whose tiles come first.
        upsampling
            Another way than the detector's own.

        Yields
        ------
        DetectUpdate
            After every tile at native size, else after every plane.

        Raises
        ------
        ImageError, ConfigError
            If axes, indices, sizes or the upsampling do not fit.
        """
        if size == "native":
            self._require_one_scale()
        else:
            require_size(size, self.scales)
        if upsampling is not None:
            _require_upsampling(upsampling)
        planes = Planes(array, axes, channels)
        limits = planes.estimate_range() if value_range is None else planes.as_limits(value_range)
        wanted = planes.indices() if indices is None else map(_as_index, indices)
        views = [planes.view(index) for index in wanted]
        if size != "native":
            n_done = 0
            n_held = max(1, BATCH_PIXELS // math.prod(planes.plane_shape))
            for some in _batched(views, min(self.batch_size, n_held)):
                pixels = [io.as_rgb(view.read_unit(limits=limits)) for view in some]
                maps = self._run_squashed(pixels, size, upsampling or self.upsampling)
                del pixels  # not in memory beside the next
                for view, blur in zip(some, maps, strict=True):
                    n_done += 1
                    whole = np.broadcast_to(np.True_, blur.shape)
                    yield DetectUpdate(view.index, n_done, len(views), blur, whole, ALL, True)
            return
        grid = TileGrid(*planes.plane_shape, tile_size_px, overlap_px)
        n_done, n_total = 0, len(views) * len(grid)
        for view in views:
            read = functools.partial(view.read_unit, limits=limits)
            blur = np.zeros(view.shape, np.float32)
            to_come, finished = grid.tiles_over(), np.zeros(view.shape, np.bool_)
            for i, (tile, part) in enumerate(self.iter_tiles(read, grid, visible=visible)):
                region = (tile.rows, tile.columns)
                blur[region] = _summed(blur[region], part)
                to_come[region] -= 1
                finished[region] = to_come[region] == 0
                n_done += 1
                done = i + 1 == len(grid)
                yield DetectUpdate(view.index, n_done, n_total, blur, finished, region, done)

    def iter_tiles(
        self,
        read: Reader,
        grid: TileGrid,
        *,
        visible: Region | None = None,
        tile_rows: range | None = None,
    ) -> Iterator[tuple[Tile, NDArray[np.float32]]]:
        """Weighted blur maps of the tiles of a plane at native size; their sum is the map.

        Parameters
        ----------
        read
            Function of a slice of rows and one of columns: uint8, or float32 in 0..1, grey or RGB.
        grid
            Tiles to walk.
        visible
            Rows and columns whose tiles come first.
        tile_rows
            Rows of the grid to walk; None walks all.
        """
        _require_native(grid.height, grid.width)
        tiles = [tile for tile in grid if tile_rows is None or tile.row in tile_rows]
        if visible is not None:
            rows, columns = visible
            tiles.sort(
                key=lambda tile: not (_overlap(tile.rows, rows) and _overlap(tile.columns, columns))
            )
        for some in _batched(tiles, self.batch_size):
            pixels = [_as_unit_float(io.as_rgb(read(tile.rows, tile.columns))) for tile in some]
            for tile, blur in zip(some, self._run(np.stack(pixels)), strict=True):
                yield tile, blur * grid.weights(tile)

    def iter_strips(
        self, read: Reader, grid: TileGrid, *, wanted: range | None = None
    ) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Finished rows of a plane's map at native size, from the top, in constant memory.

        Parameters
        ----------
        read, grid
            As of `iter_tiles`.
        wanted
            Strips that are wanted, of which there is one a row of the grid: from the first pixel
            row of its tiles to that of the next. None gives all. Tiles above them that reach into
            them are computed, too.

        Yields
        ------
        tuple
            A slice of rows and their map, ``(rows, W)`` float32.
        """
        height = grid.tile_shape[0]
        starts = [*grid.row_starts, grid.height]
        wanted = range(len(grid.row_starts)) if wanted is None else wanted
        first = next(i for i, start in enumerate(starts) if start + height > starts[wanted.start])
        pending = np.zeros((height, grid.width), np.float32)
        for tile, part in self.iter_tiles(read, grid, tile_rows=range(first, wanted.stop)):
            pending[:, tile.columns] = _summed(pending[:, tile.columns], part)
            if tile.column + 1 < len(grid.column_starts):
                continue
            top, following = starts[tile.row], starts[tile.row + 1]
            n_finished = following - top
            if tile.row in wanted:
                yield slice(top, following), pending[:n_finished].copy()
            pending[: height - n_finished] = pending[n_finished:].copy()
            pending[height - n_finished :] = 0

    def _detect_native(
        self,
        image: ArrayLike,
        value_range: tuple[float, float] | None,
        on_tile: Callable[[int, int], None] | None,
    ) -> NDArray[np.float32]:
        self._require_one_scale()
        pixels = _prepare(image, value_range)
        grid = TileGrid(*pixels.shape[:2])
        blur = np.zeros(pixels.shape[:2], np.float32)
        tiles = self.iter_tiles(lambda rows, columns: pixels[rows, columns], grid)
        for n_done, (tile, part) in enumerate(tiles, start=1):
            region = (tile.rows, tile.columns)
            blur[region] = _summed(blur[region], part)
            if on_tile is not None:
                on_tile(n_done, len(grid))
        return blur

    def _require_one_scale(self) -> None:
        if self.scales != (1.0,):
            raise ConfigError(f"scales {self.scales}: only for images squashed to a size")

    def _run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """``(N, H, W)`` maps of ``(N, H, W, 3)`` images in 0..1."""
        blur = self._backend.run(images)
        if self.flip:
            mirrored = np.ascontiguousarray(images[:, :, ::-1])
            blur = (blur + self._backend.run(mirrored)[:, :, ::-1]) * np.float32(0.5)
        return blur

    def _run_squashed(
        self, images: Sequence[NDArray[Any]], size: int, upsampling: Upsampling
    ) -> list[NDArray[np.float32]]:
        """Maps of images ``(H, W, 3)``, uint8 or in 0..1, squashed and brought back."""
        if self.scales == (1.0,) and upsampling != "guided" and not self.flip:
            squashed = np.stack([squash(pixels, size, size) for pixels in images])
            shapes = [pixels.shape for pixels in images]
            return self._backend.run_resized(squashed, shapes, upsampling)
        sides = sorted({max(MIN_SIZE_PX, round(size * scale)) for scale in self.scales})
        blurs: NDArray[np.float32]
        if len(sides) == 1:
            squashed = np.stack([squash(pixels, sides[0], sides[0]) for pixels in images])
            blurs = self._run(squashed)
        else:
            shape = (sides[-1], sides[-1])
            logits = np.zeros((len(images), *shape), np.float32)
            for side in sides:
                squashed = np.stack([squash(pixels, side, side) for pixels in images])
                for total, blur in zip(logits, self._run(squashed), strict=True):
                    total += to_logits(resize_map(blur, shape, "bilinear"))
            blurs = np.reciprocal(1 + np.exp(logits * np.float32(-1 / len(sides))))
        maps = []
        for blur, small, pixels in zip(blurs, squashed, images, strict=True):
            if upsampling == "guided" and min(pixels.shape[:2]) > sides[-1]:
                maps.append(upsample_guided(blur, small, pixels))
            else:
                mode = "bilinear" if upsampling == "guided" else upsampling
                maps.append(resize_map(blur, pixels.shape[:2], mode))
        return maps


def _batched(items: Sequence[_Item], n: int) -> Iterator[Sequence[_Item]]:
    """Up to n of them at a time, in order."""
    for start in range(0, len(items), n):
        yield items[start : start + n]


def _prepare(image: Any, value_range: tuple[float, float] | None) -> NDArray[Any]:
    """``(H, W, 3)`` uint8, or float32 in 0..1."""
    if image is None or isinstance(image, (str, bytes, Path)):
        what = type(image).__name__
        raise ImageError(
            f"expected an array (H, W) or (H, W, 3), got {what}; `detect_files` reads files"
        )
    try:
        if isinstance(image, Image.Image) and not (
            image.mode in _PLAIN_MODES or image.mode.startswith("I;16")
        ):
            image = image.convert("L" if image.mode == "LA" else "RGB")
        image = io.without_alpha(io.unmasked(image))
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, tensors with gradients
        reason = str(error).splitlines()[0]
        raise ImageError(f"expected an array (H, W) or (H, W, 3): {reason}") from error
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ImageError(
            f"expected an image (H, W) or (H, W, 3), got shape {image.shape}; `iter_planes` takes "
            "other axes by their names"
        )
    if 0 in image.shape:
        raise ImageError(f"the image has no pixels, shape {image.shape}")
    return io.as_rgb(io.to_unit_range(image, limits=value_range))


def _as_unit_float(pixels: NDArray[Any]) -> NDArray[np.float32]:
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / np.float32(255)
    return pixels


def require_backend(backend: str) -> None:
    """Refuse what is neither a back end nor ``auto``, as a `ConfigError`."""
    if backend not in ("auto", *BACKENDS):
        raise ConfigError(f"backend {backend!r}: expected auto, {', '.join(BACKENDS)}")


def require_size(size: object, scales: Sequence[float] = (1.0,)) -> None:
    """Refuse a side that squashed images cannot have, as a `ConfigError`."""
    if not isinstance(size, (int, np.integer)):
        raise ConfigError(f"size: expected a whole number of pixels or native, got {size!r}")
    if size < MIN_SIZE_PX:
        raise ConfigError(f"size: expected at least {MIN_SIZE_PX} px or native, got {size}")
    if size * max(scales) > MAX_SIZE_PX:
        times = f" times {max(scales):g}" if scales != (1.0,) else ""
        raise ConfigError(
            f"size: expected at most {MAX_SIZE_PX} px, got {size}{times}; native works in tiles of "
            "any image"
        )


def _as_index(index: int | Sequence[int]) -> Sequence[int]:
    return (int(index),) if isinstance(index, (int, np.integer)) else index


def _as_scales(scales: object) -> tuple[float, ...]:
    numbers = tuple(scales) if isinstance(scales, Iterable) else ()
    if not numbers or not all(isinstance(n, Real) and 0.2 <= float(n) <= 10 for n in numbers):
        raise ConfigError(f"scales: expected a sequence of numbers of 0.2 to 10, got {scales!r}")
    return tuple(float(number) for number in numbers)


def _require_upsampling(upsampling: str) -> None:
    if upsampling not in get_args(Upsampling):
        raise ConfigError(
            f"upsampling {upsampling!r}: expected one of {', '.join(get_args(Upsampling))}"
        )


def _require_native(height: int, width: int) -> None:
    if min(height, width) < MIN_SIZE_PX:
        raise ImageError(
            f"native size needs at least {MIN_SIZE_PX} x {MIN_SIZE_PX} px, got {height} x {width}"
        )


def _summed(blur: NDArray[np.float32], part: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum of weighted maps, which rounding must not lift above 1."""
    total: NDArray[np.float32] = np.minimum(blur + part, np.float32(1))
    return total


def _overlap(a: slice, b: slice) -> bool:
    """Whether two slices share an index; open ends reach all the way."""
    low, high = b.start or 0, math.inf if b.stop is None else b.stop
    return bool(a.start < high and low < a.stop)
