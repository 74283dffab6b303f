"""Scoring a folder of blur maps, or a network on a folder of images, against masks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semanticblur_core import io, measures
from semanticblur_core.config import require_choice
from semanticblur_core.data.datasets import Pair, group_by_stem, list_images, stem_of
from semanticblur_core.errors import DataError, SemanticBlurError
from semanticblur_core.inference.upsampling import upsample_nearest
from semanticblur_core.metrics import BlurScorer, ImageScore, Protocol

Polarity = Literal["blur", "sharp"]
MapResize = Literal["nearest", "bilinear", "error"]
ProtocolName = Literal["dbd", "adaptive-1.5", "adaptive-2", "max-image", "max-mean", "max-pr"]

F_BETA_OF: dict[str, str] = {
    "dbd": "mean over images, binary at map > threshold",
    "adaptive-1.5": "mean over images, binary at the 8-bit map >= 1.5 x its mean",
    "adaptive-2": "mean over images, binary at the 8-bit map >= 2 x its mean",
    "max-image": "mean over images of each one's maximum over 256 thresholds",
    "max-mean": "maximum over 256 thresholds of the mean over images",
    "max-pr": "maximum over 256 thresholds, of mean precision and mean recall",
}
_N_THREADS = 2
# What goes wrong with one image and is reported, so that the rest is scored.
ONE_FAILED = (SemanticBlurError, ValueError, OSError, MemoryError, RuntimeError)

Predict = Callable[[Pair], NDArray[np.float32]]


@dataclass(frozen=True)
class EvalUpdate:
    """One pair scored, or why not; ``note`` says something about a pair that was scored."""

    name: str
    n_done: int
    n_total: int
    score: ImageScore | None = None
    problem: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of a set of images.

    ``mae``, ``f_beta`` and ``iou`` are the protocol's; ``wider`` holds the other measures by name
    (see `semanticblur_core.measures`), those of one class with the suffix ``_blur`` or ``_sharp``;
    ``precision`` and ``recall`` are the mean curve over the 256 grey levels.
    """

    mae: float
    f_beta: float
    iou: float
    n_images: int
    protocol: dict[str, Any]
    wider: dict[str, float]
    precision: list[float]
    recall: list[float]
    images: list[ImageScore]
    wider_per_image: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the wider measures beside the protocol's own."""
        rows = zip(self.images, self.wider_per_image, strict=True)
        return {
            "mae": self.mae,
            "f_beta": self.f_beta,
            "iou": self.iou,
            "n_images": self.n_images,
            "protocol": self.protocol,
            **self.wider,
            "curve": {"precision": self.precision, "recall": self.recall},
            "per_image": [score.to_dict() | wider for score, wider in rows],
        }


class Evaluator:
    """Collects every measure one image at a time, in constant memory beside a row per image.

    Parameters
    ----------
    protocol
        Name of the protocol that decides which F-beta counts.
    positive
        The positive class; ``sharp`` inverts map and mask.
    analysis
        What was done to images or maps, for the protocol's description.

    Attributes
    ----------
    n_resized
        Maps that were brought to their mask's size.
    largest
        Largest value of any map, 0..1.
    """

    def __init__(
        self,
        protocol: ProtocolName = "dbd",
        *,
        positive: Polarity = "blur",
        analysis: str = "maps as given",
    ) -> None:
        require_choice("protocol", protocol, ProtocolName)
        require_choice("positive", positive, Polarity)
        self.name: ProtocolName = protocol
        self.positive: Polarity = positive
        base = Protocol(positive_class=positive, analysis=analysis, f_beta=F_BETA_OF[protocol])
        if positive == "sharp":
            base = replace(base, iou="pooled over all pixels, sharp class")
        self._scorer = BlurScorer(base)
        self._wider: list[dict[str, float]] = []
        levels = measures.N_LEVELS
        self._curves = {name: np.zeros(levels) for name in ("precision", "recall", "f", "e")}
        bins = np.zeros(measures.N_CALIBRATION_BINS)
        self._calibration = measures.CalibrationCounts(bins, bins, bins)
        self.n_resized = 0
        self.largest = 0.0

    def measure(self, blur: NDArray[np.float32], mask: NDArray[np.bool_], name: str) -> _Measured:
        """Every measure of one image, changing nothing; safe to call from threads."""
        scorer = BlurScorer(self._scorer.protocol)
        largest = float(blur.max(initial=0))
        if self.positive == "sharp":
            blur, mask = 1 - blur, ~mask
        score = scorer.add(blur, mask, name=name)
        counts = measures.level_counts(blur, mask)
        precision, recall = measures.precision_recall(counts)
        beta_squared = scorer.protocol.beta_squared
        f = measures.f_measure(precision, recall, beta_squared)
        e = measures.e_measure_curve(counts)
        wider = {
            "structure_measure": measures.structure_measure(blur, mask),
            "weighted_f_beta": measures.weighted_f(blur, mask),
            "max_f_beta": float(f.max()),
            "adaptive_1_5_f_beta": measures.adaptive_f(blur, mask, 1.5, beta_squared),
            "adaptive_2_f_beta": measures.adaptive_f(blur, mask, 2.0, beta_squared),
            "mean_e_measure": float(e.mean()),
            "boundary_f": measures.boundary_f(blur > self._scorer.protocol.threshold, mask),
        }
        curves = {"precision": precision, "recall": recall, "f": f, "e": e}
        calibration = measures.calibration_counts(blur, mask)
        return _Measured(score, wider, curves, calibration, largest)

    def add(self, measured: _Measured) -> ImageScore:
        """Take in one image's measures."""
        self._scorer.images.append(measured.score)
        self._wider.append(measured.wider)
        for name, curve in measured.curves.items():
            self._curves[name] += curve
        self._calibration = measures.CalibrationCounts(
            *(a + b for a, b in zip(self._calibration, measured.calibration, strict=True))
        )
        return measured.score

    def result(self) -> Evaluation:
        """Scores of everything added so far.

        Raises
        ------
        ValueError
            If nothing was added.
        """
        scores = self._scorer.result()
        n = scores.n_images
        curves = {name: curve / n for name, curve in self._curves.items()}
        mean = {key: float(np.mean([row[key] for row in self._wider])) for key in self._wider[0]}
        beta_squared = scores.protocol.beta_squared
        pr = measures.f_measure(curves["precision"], curves["recall"], beta_squared)
        wider = {
            "structure_measure": mean["structure_measure"],
            "weighted_f_beta": mean["weighted_f_beta"],
            "max_f_beta": float(curves["f"].max()),
            "max_image_f_beta": mean["max_f_beta"],
            "max_pr_f_beta": float(pr.max()),
            "adaptive_1_5_f_beta": mean["adaptive_1_5_f_beta"],
            "adaptive_2_f_beta": mean["adaptive_2_f_beta"],
            "mean_e_measure": mean["mean_e_measure"],
            "max_e_measure": float(curves["e"].max()),
            "boundary_f": mean["boundary_f"],
            "calibration_error": measures.expected_calibration_error(self._calibration),
        }
        headline = {
            "dbd": scores.f_beta,
            "adaptive-1.5": wider["adaptive_1_5_f_beta"],
            "adaptive-2": wider["adaptive_2_f_beta"],
            "max-image": wider["max_image_f_beta"],
            "max-mean": wider["max_f_beta"],
            "max-pr": wider["max_pr_f_beta"],
        }
        protocol = {"name": self.name, **scores.to_dict()["protocol"], "resized": self.n_resized}
        return Evaluation(
            mae=scores.mae,
            f_beta=headline[self.name],
            iou=scores.iou,
            n_images=n,
            protocol=protocol,
            wider={f"{name}_{self.positive}": value for name, value in wider.items()},
            precision=curves["precision"].tolist(),
            recall=curves["recall"].tolist(),
            images=list(self._scorer.images),
            wider_per_image=[
                {f"{name}_{self.positive}": value for name, value in row.items()}
                for row in self._wider
            ],
        )

    def describe(self) -> str:
        """The protocol in one line for people."""
        text = self._scorer.protocol.describe()
        if self.name == "dbd":
            return text
        return f"{text}; but F: {F_BETA_OF[self.name]} (that of each image stays at 0.5)"


@dataclass(frozen=True)
class _Measured:
    score: ImageScore
    wider: dict[str, float]
    curves: dict[str, measures.Floats]
    calibration: measures.CalibrationCounts
    largest: float


def match(
    sources: str | Path,
    masks: str | Path,
    names: Sequence[str] | None = None,
    *,
    maps: bool = True,
) -> tuple[list[Pair], list[str]]:
    """Pair the files of two folders by name stem; a line for each without a clear partner.

    Maps may have the names that ``semanticblur-core detect`` gives them.

    Parameters
    ----------
    sources
        Folder of images or maps.
    masks
        Folder of masks.
    names
        Stems to score; None scores all.
    maps
        Whether ``sources`` holds maps, which may be npy files.

    Raises
    ------
    DataError
        If a folder is missing or empty, or no pair is left.
    """
    sources, masks = Path(sources), Path(masks)
    found = list_images(sources, also=(".npy",) if maps else ())
    theirs = group_by_stem(list_images(masks))
    mine = _group_maps(found, theirs) if maps else group_by_stem(found)
    problems = []
    stems = sorted(set(mine) | set(theirs)) if names is None else list(dict.fromkeys(names))
    pairs = []
    for stem in stems:
        candidates = [(mine.get(stem, []), sources), (theirs.get(stem, []), masks)]
        for (paths, folder), (partners, _) in zip(candidates, candidates[::-1], strict=True):
            if len(paths) > 1:
                listed = ", ".join(path.name for path in paths)
                problems.append(f"{folder / stem}: ambiguous, {listed} share a name stem")
            elif not paths and partners:
                problems.append(f"{partners[0]}: no file of the same name in {folder}")
            elif not paths and folder == sources:
                problems.append(f"{stem}: in the list, but in neither {sources} nor {masks}")
        if all(len(paths) == 1 for paths, _ in candidates):
            pairs.append(Pair(stem, mine[stem][0], theirs[stem][0]))
    if not pairs:
        detail = (
            f"; {len(problems)} files without a partner, first {problems[0]}" if problems else ""
        )
        raise DataError(f"{sources}, {masks}: no pair of one name{detail}")
    return pairs, problems


def _is_rounded(path: Path) -> bool:
    """Whether it is a map of 8 bits rather than of floats."""
    return path.suffix.lower() not in (".npy", *io.TIFF_SUFFIXES)


def _group_maps(paths: Sequence[Path], masks: Container[str]) -> dict[str, list[Path]]:
    """Maps by the name of their mask; ``NAME_blur`` and ``NAME.EXT_blur`` are those of ``NAME``.

    Of several formats of one such map the most exact counts. Overlays beside maps are passed over.
    """
    grouped: dict[str, list[Path]] = {}
    stems = {stem_of(path) for path in paths}
    for path in paths:
        name = stem = stem_of(path)
        if name in masks:
            pass
        elif name.endswith("_blur"):
            name = name.removesuffix("_blur")
            is_file_name = Path(name).suffix.lower() in (*io.IMAGE_SUFFIXES, ".npy")
            name = Path(name).stem if is_file_name and name not in masks else name
        elif name.endswith("_overlay") and f"{name.removesuffix('_overlay')}_blur" in stems:
            continue
        others = grouped.setdefault(name, [])
        if name != stem and others and stem_of(others[0]) == stem:
            others[:] = [min(path, others[0], key=_is_rounded)]
        else:
            others.append(path)
    return grouped


def evaluate(
    pairs: Iterable[Pair],
    evaluator: Evaluator,
    *,
    predict: Predict | None = None,
    map_polarity: Polarity = "blur",
    mask_polarity: Polarity = "blur",
    map_resize: MapResize = "nearest",
) -> Generator[EvalUpdate]:
    """Score pairs one by one; close the generator to stop.

    Parameters
    ----------
    pairs
        What to score: the image or map of a pair against its mask.
    evaluator
        Takes in the measures; its ``result()`` is the outcome.
    predict
        Gives the blur map of a pair at any size, for example from a network: ``(H, W)`` in 0..1,
        but for the last bits of float32. Without it the pair's own file is read as a map.
    map_polarity, mask_polarity
        What is white in maps and masks.
    map_resize
        How maps of another size are brought to their mask's: nearest-exact (as torch calls it),
        antialiased bilinear, or not at all.

    Yields
    ------
    EvalUpdate
        One for each pair, in order; a pair that cannot be scored has ``problem`` set.

    Raises
    ------
    ConfigError
        At once, if a polarity or the way of resizing is none.
    DataError
        At once, if folders were given rather than pairs.

    Examples
    --------
    >>> from semanticblur_core import Detector, evaluate, io
    >>> from semanticblur_core.evaluation import Evaluator, match
    >>> detector = Detector(precision="float32", upsampling="nearest-exact")
    >>> pairs, problems = match("photos", "masks", maps=False)
    >>> evaluator = Evaluator()
    >>> for update in evaluate(
    ...     pairs, evaluator, predict=lambda pair: detector.detect(io.read_rgb8(pair.image))
    ... ):
    ...     print(update.name, update.problem or update.score.mae)
    >>> evaluator.result().mae
    """
    require_choice("map_polarity", map_polarity, Polarity)
    require_choice("mask_polarity", mask_polarity, Polarity)
    require_choice("map_resize", map_resize, MapResize)
    if isinstance(pairs, (str, Path)):
        raise DataError(f"{pairs}: expected pairs of files; `match` finds them in two folders")
    return _evaluate(list(pairs), evaluator, predict, map_polarity, mask_polarity, map_resize)


def _evaluate(
    pairs: Sequence[Pair],
    evaluator: Evaluator,
    predict: Predict | None,
    map_polarity: Polarity,
    mask_polarity: Polarity,
    map_resize: MapResize,
) -> Generator[EvalUpdate]:
    """As `evaluate`, whose arguments were checked."""

    def score(pair: Pair, given: Any) -> tuple[_Measured, bool, str | None]:
        mask = io.read_mask(pair.mask)
        if mask_polarity == "sharp":
            mask = ~mask
        blur = io.read_map(pair.image) if predict is None else _predicted(pair, given)
        if map_polarity == "sharp":
            blur = 1 - blur
        resized = blur.shape != mask.shape
        if resized:
            if blur.shape == mask.shape[::-1]:
                raise DataError(
                    f"{pair.image}: map of {_size(blur)} px for a mask of {_size(mask)} px: rows "
                    "and columns are interchanged"
                )
            if map_resize == "error":
                raise DataError(
                    f"{pair.image}: map of {_size(blur)} px for a mask of {_size(mask)} px"
                )
            blur = resize_map(blur, *mask.shape, how=map_resize)
        note = None
        if mask.all() or not mask.any():
            kind = "blur" if mask.any() else "sharp"
            none = "" if kind == evaluator.positive else ", so its F and IoU are 0 whatever the map"
            note = f"{pair.mask}: the mask is wholly {kind}{none}"
        return evaluator.measure(blur, mask, pair.name), resized, note

    n_done = 0
    with ThreadPoolExecutor(_N_THREADS) as pool:
        for pair, future in _ahead(pool, pairs, predict, score):
            n_done += 1
            try:
                measured, resized, note = future.result()
            except ONE_FAILED as error:
                problem = str(error) or f"{pair.image}: {type(error).__name__}"
                yield EvalUpdate(pair.name, n_done, len(pairs), problem=problem)
                continue
            evaluator.n_resized += resized
            evaluator.largest = max(evaluator.largest, measured.largest)
            yield EvalUpdate(
                pair.name, n_done, len(pairs), score=evaluator.add(measured), note=note
            )


def _ahead(
    pool: ThreadPoolExecutor,
    pairs: Sequence[Pair],
    predict: Predict | None,
    score: Callable[..., Any],
) -> Iterator[tuple[Pair, Future[Any]]]:
    """Scores in the pool, a few pairs ahead; the network runs in this thread."""
    waiting: deque[tuple[Pair, Future[Any]]] = deque()
    for pair in pairs:
        if predict is None:
            waiting.append((pair, pool.submit(score, pair, None)))
        else:
            try:
                waiting.append((pair, pool.submit(score, pair, predict(pair))))
            except ONE_FAILED as error:
                failed: Future[Any] = Future()
                failed.set_exception(error)
                waiting.append((pair, failed))
        if len(waiting) > 2 * _N_THREADS:
            yield waiting.popleft()
    yield from waiting


def _predicted(pair: Pair, given: Any) -> NDArray[np.float32]:
    """What ``predict`` gave, where it is a map; rounded values count as 0 and 1, as in files."""
    if given is None:
        raise DataError(f"{pair.image}: predict gave None, expected a map (H, W)")
    # A network may give half precision, which Pillow does not resize.
    blur = np.asarray(given, np.float32)
    if blur.ndim != 2 or blur.size == 0:
        raise DataError(
            f"{pair.image}: predict gave an array of shape {blur.shape}, expected a map (H, W)"
        )
    low, high = float(blur.min()), float(blur.max())
    if not -io.ROUNDING <= low <= high <= 1 + io.ROUNDING:
        raise DataError(f"{pair.image}: predict gave {low:g}..{high:g}, expected a map in 0..1")
    return blur.clip(0, 1)


def resize_map(
    blur: NDArray[np.float32], height: int, width: int, *, how: Literal["nearest", "bilinear"]
) -> NDArray[np.float32]:
    """Bring a map ``(h, w)`` to ``(height, width)``, nearest-exact or antialiased bilinear."""
    if how == "nearest":
        return upsample_nearest(blur, (height, width))
    resized = Image.fromarray(blur).resize((width, height), Image.Resampling.BILINEAR)
    clipped: NDArray[np.float32] = np.asarray(resized, np.float32).clip(0, 1)
    return clipped


def _size(array: NDArray[Any]) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"
