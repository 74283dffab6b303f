"""Files of any number of axes, opened without reading them, and stacks of maps written back."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import disk, io
from semanticblur_core.errors import ImageError
from semanticblur_core.maps import MapFile
from semanticblur_core.scale import Channels, Scale, of_ngff, of_tiff

STACK_SUFFIXES = (*io.TIFF_SUFFIXES, ".npy", ".zarr")
BLOCK_PX = 512
LARGE_PLANE_PIXELS = 16_000_000
COARSEST_SIDE_PX = 2048
FEWEST_COLUMNS = 16
_MOST_CRUMBS = 2**20
_CRUMB_VALUES = 1024
# By the number of axes, where a file does not name them.
_USUAL_AXES = {2: "YX", 3: "ZYX", 4: "TZYX", 5: "TCZYX"}


@dataclass(frozen=True)
class Stack:
    """An array on disk.

    Attributes
    ----------
    array
        Has ``shape``, ``dtype`` and slicing; read where it is sliced.
    axes
        One letter an axis, see `semanticblur_core.inference.planes.Planes`.
    scale
        Steps, place and names of channels, as far as the file says.
    only_channel
        Name of the one channel of an array without an axis of channels.
    n_levels
        Resolution levels of the file, this one among them.
    """

    array: Any
    axes: str
    scale: Scale = field(default_factory=Scale)
    only_channel: str = ""
    n_levels: int = 1

    def channel(self, wanted: int | str) -> Channels:
        """What `Planes` takes: the number of a channel that is named as the file names it.

        Parameters
        ----------
        wanted
            ``"each"``, ``"mean"``, a number, or a name in any case. A number that is too large may
            be a name, too: those of channels are often wavelengths.

        Raises
        ------
        ImageError
            If the file names no such channel, or several.
        """
        if wanted == "each" or wanted == "mean":
            return wanted  # type: ignore[return-value]
        if str(wanted).strip().casefold() == (self.only_channel.strip().casefold() or None):
            return "each"
        names = [name.strip().casefold() for name in self.scale.channel_names]
        found = [i for i, name in enumerate(names) if name == str(wanted).strip().casefold()]
        if isinstance(wanted, int) and (wanted < len(names) or not found):
            return wanted  # which `Planes` refuses if there is none
        if len(found) != 1:
            known = ", ".join(self.scale.channel_names) or "none"
            several = "several are called so" if found else "there is none"
            raise ImageError(
                f"channel {wanted!r}: {several}; the file names its channels: {known}; a number "
                "from 0 names them, too"
            )
        return found[0]


@contextmanager
def open_stack(
    path: str | Path, *, axes: str | None = None, level: int = 0, series: int | None = None
) -> Iterator[Stack]:
    """Open a TIFF (OME, ImageJ or plain), a npy file or a Zarr (plain or OME).

    Parameters
    ----------
    path
        File, or folder of a Zarr.
    axes
        What the axes are, if not as the file says.
    level
        Resolution level of a pyramid, 0 is full.
    series
        Which image of a TIFF that holds several, from 0.

    Raises
    ------
    ImageError
        If it is missing, damaged, or holds no array with rows and columns.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_dir():
        disk.require_file(path)
    with ExitStack() as resources:
        with _explained(path):
            if series is not None and suffix not in io.TIFF_SUFFIXES:
                raise ImageError(f"{path}: --series is of TIFF files that hold several images")
            if suffix == ".npy":
                array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
                if not isinstance(array, np.ndarray):
                    raise ImageError(f"{path}: expected one array, got an archive of several")
                _refuse_level(path, level)
                found = _guess_axes(array.shape)
                scale, n_levels = Scale(), 1
            elif is_zarr(path) or suffix == ".zarr":
                if path.is_dir() and not any(path.iterdir()):
                    raise ImageError(f"{path}: an empty folder, not a Zarr")
                array, found, scale, n_levels = _open_zarr(path, level)
            else:
                array, found, scale, n_levels = _open_tiff(path, level, series, resources)
        named = (axes or found).upper()
        if len(named) != len(array.shape):
            what = f"axes {named!r} do not fit" if named else "the file does not say the axes of"
            raise ImageError(
                f"{path}: {what} an array of shape {tuple(array.shape)}; "
                f"--axes names them, {len(array.shape)} letters with Y and X among them"
            )
        n_channels = array.shape[named.index("C")] if "C" in named else 0
        only = scale.channel_names[0] if len(scale.channel_names) == 1 and not n_channels else ""
        if len(scale.channel_names) != n_channels:
            scale = replace(scale, channel_names=())
        yield Stack(array, named, scale, only, n_levels)


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr, or an array or image within one: by its name or what it holds."""
    with suppress(OSError):  # a folder that may not be looked into
        return path.is_dir() and (
            path.suffix.lower() == ".zarr"
            or any((path / name).is_file() for name in (".zarray", ".zgroup", "zarr.json"))
        )
    return False


def plate_images(path: Path) -> list[Path]:
    """The fields of a plate in OME-Zarr, well by well; none of anything else.

    A well that cannot be read stands for its fields, so that its reader tells of it.
    """
    images: list[Path] = []
    damaged = (OSError, ValueError, TypeError, LookupError, AttributeError)
    try:
        wells = [path / str(well["path"]) for well in _stored_attributes(path)["plate"]["wells"]]
    except damaged:  # no plate, or none that can be read
        return []
    for folder in wells:
        try:
            fields = [str(field["path"]) for field in _stored_attributes(folder)["well"]["images"]]
        except damaged:
            images.append(folder)
        else:
            images += [folder / field for field in fields]
    return images


def is_ome_tiff(path: Path) -> bool:
    """Whether it is named as one."""
    return path.name.lower().endswith((".ome.tif", ".ome.tiff"))


def first_file(path: Path) -> Path | None:
    """The file that an OME-TIFF in several files begins in, if that is another than this."""
    with suppress(Exception), io.open_tiff(path) as tiff:  # what is damaged its reader tells
        return _begins_in(path, tiff)
    return None


def _begins_in(path: Path, tiff: Any) -> Path | None:
    """As `first_file`, of an open TIFF."""
    root = ElementTree.fromstring(tiff.ome_metadata or "<OME/>")
    begins: list[tuple[tuple[int, ...], str, str]] = []
    for i, pixels in enumerate(e for e in root.iter() if e.tag.endswith("}Pixels")):
        for data in (e for e in pixels if e.tag.endswith("}TiffData")):
            place = (i, *(int(data.get(f"First{axis}", 0)) for axis in "TCZ"))
            for e in data:
                if e.tag.endswith("}UUID"):
                    begins.append((place, e.text or "", e.get("FileName", "")))
    if not begins:
        return None
    _, uuid, name = min(begins)
    # A file that was renamed or copied names itself as before; its identifier is the same.
    is_own = uuid == root.get("UUID") or name in ("", path.name)
    return None if is_own else path.with_name(name)


def _stored_attributes(path: Path) -> dict[str, Any]:
    """OME's attributes of a Zarr group, without the library, which takes its time to import."""
    if (path / ".zattrs").is_file():
        return _of_ome(json.loads((path / ".zattrs").read_text(encoding="utf-8")))
    return _of_ome(json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"])


def is_stack(path: Path) -> bool:
    """Whether a file holds more than one image: it is to be opened with `open_stack`."""
    suffix = path.suffix.lower()
    if suffix in (".npy", ".zarr") or is_zarr(path):
        return True
    if suffix not in io.TIFF_SUFFIXES or not path.is_file() or path.stat().st_size == 0:
        return False
    try:
        with io.open_tiff(path) as tiff:
            series = io.whole_series(path, tiff)
            inside = math.prod(
                length
                for axis, length in zip(series.axes, series.shape, strict=True)
                if axis in "YXS"
            )
            return bool(math.prod(series.shape) > inside)
    except Exception:  # whatever is wrong with it is reported by the reader of images
        return False


def read_scale(path: Path, *, series: int | None = None) -> Scale:
    """Steps and place, also of a TIFF that is not opened as a stack.

    Parameters
    ----------
    path, series
        As of `open_stack`.

    Raises
    ------
    ImageError
        If it is missing or damaged.
    """
    if path.suffix.lower() in io.TIFF_SUFFIXES:
        with _explained(path), io.open_tiff(path) as tiff:
            return of_tiff(tiff, io.whole_series(path, tiff, series))
    with open_stack(path) as stack:
        return stack.scale


def plane_pixels(path: Path) -> int:
    """Rows times columns of a TIFF's image; 0 if it cannot be read."""
    try:
        with io.open_tiff(path) as tiff:
            series = io.whole_series(path, tiff)
            lengths = dict(zip(series.axes, series.shape, strict=True))
            return int(lengths["Y"]) * int(lengths["X"])
    except Exception:  # whatever is wrong with it is reported by the reader of images
        return 0


def write_npy(path: Path, maps: MapFile) -> None:
    """Write a numpy file."""
    header = {"descr": "<f4", "fortran_order": False, "shape": maps.shape}
    with disk.replacing(path) as temporary, temporary.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)  # type: ignore[no-untyped-call]
        maps.copy_to(stream)


def write_tiff(path: Path, maps: MapFile, *, axes: str, scale: Scale) -> None:
    """Write an OME-TIFF piece by piece, BigTIFF where it has to be, tiled where it is large."""
    import tifffile

    planes = np.ndindex(maps.shape[:-2])
    tiled = math.prod(maps.shape[-2:]) > LARGE_PLANE_PIXELS
    pieces: Iterator[NDArray[np.float32]]
    if tiled:
        pieces = (tile for index in planes for tile in _tiles(maps, index))
    else:
        pieces = (maps.read(index, slice(None)) for index in planes)
    is_ome = set(axes) <= set("TCZYX")
    metadata = scale.ome_metadata(axes, maps.shape) if is_ome else {"axes": axes}
    with disk.replacing(path) as temporary:
        tifffile.imwrite(
            temporary,
            pieces,
            shape=maps.shape,
            dtype=np.float32,
            ome=is_ome,
            bigtiff=math.prod(maps.shape) * 4 > 2**31,
            compression="zlib",
            compressionargs={"level": 1},
            photometric="minisblack",
            tile=(BLOCK_PX, BLOCK_PX) if tiled else None,
            metadata=metadata,
        )


def write_zarr(path: Path, maps: MapFile, *, axes: str, scale: Scale) -> None:
    """Write an OME-Zarr (NGFF 0.4), each resolution level half the one before."""
    import zarr

    temporary = disk.temporary_name(path)
    kinds = {"T": "time", "C": "channel", "Z": "space", "Y": "space", "X": "space"}
    # The standard wants time first, then channels or what else there is, then space.
    ranks = {"T": 0, "Z": 2, "Y": 3, "X": 4}
    order = sorted(range(len(axes)), key=lambda i: ranks.get(axes[i], 1))
    axes = "".join(axes[i] for i in order)
    steps = scale.steps
    described: list[dict[str, str]] = []
    for axis in axes:
        entry = {"name": axis.lower()}
        if axis in kinds:
            entry["type"] = kinds[axis]
        if axis in steps:
            entry["unit"] = "second" if axis == "T" else "micrometer"
        described.append(entry)
    known = dict(scale.unnamed) | steps
    factors = [float(known.get(axis, 1)) for axis in axes]
    places = [float(scale.origin.get(axis, 0)) for axis in axes]
    datasets: list[Any] = []
    resources = ExitStack()
    try:
        group = zarr.open_group(temporary, mode="w", zarr_format=2)
        resources.enter_context(disk.held(temporary))
        shape, finer = tuple(maps.shape[i] for i in order), None
        while True:
            chunks = (*(1 for _ in shape[:-2]), *(min(BLOCK_PX, n) for n in shape[-2:]))
            name = str(len(datasets))
            level = group.create_array(
                name, shape=shape, chunks=chunks, dtype="float32",
                chunk_key_encoding={"name": "v2", "separator": "/"},
            )  # fmt: skip
            for index in np.ndindex(shape[:-2]):
                place = [index[order.index(i)] for i in range(len(index))]
                for top in range(0, shape[-2], BLOCK_PX):
                    rows = slice(top, min(top + BLOCK_PX, shape[-2]))
                    source = (
                        maps.read(place, rows) if finer is None else _halved(finer, index, rows)
                    )
                    level[(*index, rows)] = source
            transforms: list[Any] = [{"type": "scale", "scale": factors}]
            if any(places):
                transforms.append({"type": "translation", "translation": places})
            datasets.append({"path": name, "coordinateTransformations": transforms})
            if max(shape[-2:]) <= COARSEST_SIDE_PX:
                break
            finer = level
            shape = (*shape[:-2], *((n + 1) // 2 for n in shape[-2:]))
            factors = [*factors[:-2], *(2 * factor for factor in factors[-2:])]
        image: Any = {"version": "0.4", "name": path.stem, "axes": described, "datasets": datasets}
        group.attrs["multiscales"] = [image]
        if scale.channel_names and "C" in axes:
            window = {"min": 0.0, "max": 1.0, "start": 0.0, "end": 1.0}
            group.attrs["omero"] = {
                "channels": [
                    {"label": name, "active": True, "color": "FFFFFF", "window": window}
                    for name in scale.channel_names
                ]
            }
        _take_place(temporary, path)
    except OSError as error:
        raise disk.unwritable(path, error) from error
    finally:
        resources.close()
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, path: Path) -> None:
    """Rename a folder to ``path``; what was there is deleted under another name, never half."""
    old = disk.temporary_name(path)
    if path.exists():
        path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    disk.remove(old)


def _tiles(maps: MapFile, index: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
    """Tiles of one plane, row by row; those at the far edges padded with zeros."""
    height, width = maps.shape[-2:]
    for top in range(0, height, BLOCK_PX):
        band = maps.read(index, slice(top, min(top + BLOCK_PX, height)))
        for left in range(0, width, BLOCK_PX):
            tile = np.zeros((BLOCK_PX, BLOCK_PX), np.float32)
            part = band[:, left : left + BLOCK_PX]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def _halved(finer: Any, index: tuple[int, ...], rows: slice) -> NDArray[np.float32]:
    """Means of 2 x 2 pixels of the finer level; a last odd row or column stands for two."""
    height = finer.shape[-2]
    band = np.asarray(finer[(*index, slice(2 * rows.start, min(2 * rows.stop, height)))])
    odd = [n % 2 for n in band.shape]
    band = np.pad(band, ((0, odd[0]), (0, odd[1])), mode="edge")
    n_rows, n_columns = band.shape[0] // 2, band.shape[1] // 2
    means: NDArray[np.float32] = band.reshape(n_rows, 2, n_columns, 2).mean(axis=(1, 3))
    return means


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever goes wrong in opening a file, in one line with its name."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # the libraries raise many kinds
        raise disk.unreadable(path, error) from error


def _guess_axes(shape: tuple[int, ...]) -> str:
    if len(shape) in (3, 4) and shape[-1] in (3, 4):
        return _USUAL_AXES[len(shape) - 1] + "S"
    return "" if _has_few_columns(shape) else _USUAL_AXES.get(len(shape), "")


def _has_few_columns(shape: tuple[int, ...]) -> bool:
    """Whether the last axis is rather channels, of a kind that is not to be guessed."""
    return len(shape) > 2 and shape[-1] < FEWEST_COLUMNS <= min(shape[-3:-1])


def _open_tiff(
    path: Path, level: int, wanted: int | None, resources: ExitStack
) -> tuple[Any, str, Scale, int]:
    import tifffile
    import zarr

    tiff = resources.enter_context(io.open_tiff(path))
    io.refuse_lying_tiff(path, tiff, wanted)
    series = io.whole_series(path, tiff, wanted)
    with suppress(ElementTree.ParseError, ValueError):  # of what says it wrong the pages are here
        first = _begins_in(path, tiff)
        if first is not None and first.is_file():
            raise ImageError(
                f"{path}: one of several files of the image that begins in {first}; name that "
                "one, which stands for all of them"
            )
    if not 0 <= level < len(series.levels):
        raise ImageError(f"{path}: expected a level of 0 to {len(series.levels) - 1}, got {level}")
    chosen = series.levels[level]
    _refuse_foreign_colours(path, chosen.keyframe)
    array: Any
    if chosen.dataoffset is not None:
        array = _Mapped.of_series(chosen)
    else:
        # Of a pyramid, the level is named: else it would be the group of all levels.
        array = zarr.open(resources.enter_context(series.aszarr(level=level)), mode="r")
    if chosen.keyframe.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        array = _Inverted(array)
    lengths = zip(series.axes, chosen.shape, series.shape, strict=True)
    factors = {axis: full / length for axis, length, full in lengths if axis in "YX"}
    scale = of_tiff(tiff, series).coarser(factors)
    return array, _tiff_axes(series), scale, len(series.levels)


@dataclass(frozen=True)
class _Mapped:
    """Pixels that lie uncompressed in one piece of a file: what is sliced is read, no whole strip.

    Mapped anew each time, since pages of a map that stays open count as memory in use.
    """

    path: Path
    offset: int
    stored_dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @classmethod
    def of_series(cls, series: Any) -> _Mapped:
        """Of a tifffile series that has an offset; raises where the file is too short."""
        file = series.keyframe.parent
        stored = np.dtype(series.dtype).newbyteorder(file.byteorder)
        mapped = cls(Path(file.filehandle.path), series.dataoffset, stored, tuple(series.shape))
        mapped._map()
        return mapped

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.stored_dtype.newbyteorder("=")

    def __getitem__(self, key: Any) -> NDArray[Any]:
        return np.array(self._map()[key], self.dtype)

    def _map(self) -> np.memmap[Any, Any]:
        return np.memmap(self.path, self.stored_dtype, "r", self.offset, self.shape)


@dataclass(frozen=True)
class _Inverted:
    """An array of white-is-zero, turned to black-is-zero where it is sliced."""

    stored: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        kind: np.dtype[Any] = self.stored.dtype
        return kind

    @property
    def chunks(self) -> Any:
        """Of what is stored; None where it is in one piece."""
        return getattr(self.stored, "chunks", None)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        return io.invert(np.asarray(self.stored[key]))


def _refuse_foreign_colours(path: Path, page: Any) -> None:
    """Refuse what only whole images are converted from: palettes, CMYK, rotated by a tag."""
    what = ""
    if not io.is_plain_photometric(page):
        what = f"its colours are stored as {getattr(page.photometric, 'name', page.photometric)}"
    tag = page.tags.get("Orientation")
    if tag is not None and tag.value in range(2, 9):
        what = f"its pixels are stored turned or mirrored (orientation {tag.value})"
    if what:
        raise ImageError(
            f"{path}: {what}; stacks and images read in pieces have to be upright grey or RGB, "
            "save it as such"
        )


def _tiff_axes(series: Any) -> str:
    """Axes of a TIFF; empty where those it does not name cannot be guessed."""
    axes = str(series.axes)
    if set(axes) <= set("IQYX") and _has_few_columns(series.shape):
        return ""
    # Planes that a file does not name: I, Q and the like; one of them is taken for Z.
    if "Z" not in axes:
        for letter in "IQ":
            axes = axes.replace(letter, "Z", 1) if letter in axes and "Z" not in axes else axes
    return axes


def _refuse_level(path: Path, level: int) -> None:
    if level:
        raise ImageError(f"{path}: has no resolution levels, so none is {level}")


def _open_zarr(path: Path, level: int) -> tuple[Any, str, Scale, int]:
    import zarr

    opened: Any = zarr.open(path, mode="r")
    if isinstance(opened, zarr.Array):
        _refuse_level(path, level)
        _refuse_crumbs(path, opened)
        axes, scale = _described_above(path) or ("", Scale())
        if len(axes) == opened.ndim:
            return opened, axes, scale, 1
        return opened, _dimension_axes(opened) or _guess_axes(opened.shape), Scale(), 1
    attributes = _ome_attributes(opened)
    if "bioformats2raw.layout" in attributes and "multiscales" not in attributes and "0" in opened:
        # A group of images, of which the first is the scan; labels and overviews follow.
        opened = opened["0"]
        attributes = _ome_attributes(opened)
    scales = attributes.get("multiscales")
    if not scales:
        raise ImageError(
            f"{path}: a Zarr group without OME multiscales; name an image or array inside it, "
            f"{path / 'NAME'}"
        )
    datasets = scales[0]["datasets"]
    if not 0 <= level < len(datasets):
        raise ImageError(f"{path}: expected a level of 0 to {len(datasets) - 1}, got {level}")
    array = opened[datasets[level]["path"]]
    _refuse_crumbs(path, array)
    axes, scale = of_ngff(scales[0], datasets[level], attributes.get("omero"))
    return array, axes or _guess_axes(array.shape), scale, len(datasets)


def _refuse_crumbs(path: Path, array: Any) -> None:
    """Refuse so many chunks of so few values that reading them would take hours."""
    lengths = zip(array.shape, array.chunks, strict=True)
    n_chunks = math.prod(math.ceil(n / max(1, chunk)) for n, chunk in lengths)
    if n_chunks > _MOST_CRUMBS and math.prod(array.chunks) < _CRUMB_VALUES:
        raise ImageError(
            f"{path}: {n_chunks:,} chunks of {array.chunks}, too many to be read; store it in "
            "larger ones"
        )


def _described_above(path: Path) -> tuple[str, Scale] | None:
    """What the image that an array is a level of says of it, if there is one."""
    import zarr

    path = path.absolute()
    for folder in path.parents[:2]:  # levels lie in the image's group or in a group of their own
        if not is_zarr(folder):
            return None
        # A parent that is no group, or one that is damaged, describes nothing.
        with suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
            attributes = _ome_attributes(zarr.open_group(folder, mode="r"))
            for image in attributes["multiscales"]:
                for dataset in image["datasets"]:
                    if folder / dataset["path"] == path:
                        return of_ngff(image, dataset, attributes.get("omero"))
    return None


def _dimension_axes(array: Any) -> str:
    """Axes of a Zarr array that names its dimensions (format 3), empty where it does not."""
    names = getattr(array.metadata, "dimension_names", None) or ()
    letters = "".join(name[0].upper() for name in names if name)
    fits = len(letters) == array.ndim == len(set(letters)) and {"Y", "X"} <= set(letters)
    return letters if fits else ""


def _ome_attributes(group: Any) -> dict[str, Any]:
    return _of_ome(dict(group.attrs))


def _of_ome(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes as OME-Zarr 0.4 has them; from 0.5 on they are under one key."""
    found: dict[str, Any] = attributes.get("ome", attributes)
    return found
