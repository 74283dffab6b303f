"""Gates on focus scores, and "in focus" in the user's own terms, set from good and bad examples."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semanticblur_core import disk, weights
from semanticblur_core.errors import ConfigError, DataError
from semanticblur_core.focus.scores import HIGHER_IS_SHARPER, MAP_SCORES

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Gate:
    """A limit that a score must keep.

    Parameters
    ----------
    score
        Name, one of `semanticblur_core.focus.scores.HIGHER_IS_SHARPER`.
    limit
        The score passes if it is at least this, or at most for those where low is sharp.

    Raises
    ------
    ConfigError
        If there is no such score or the limit is no number.
    """

    score: str
    limit: float

    def __post_init__(self) -> None:
        if self.score not in HIGHER_IS_SHARPER:
            raise ConfigError(
                f"gate on {self.score!r}: expected one of {', '.join(HIGHER_IS_SHARPER)}"
            )
        if not math.isfinite(self.limit):
            raise ConfigError(f"gate on {self.score}: expected a number, got {self.limit}")

    def passes(self, scores: Mapping[str, float]) -> bool:
        """Whether the limit is kept; a score that is NaN does not pass."""
        value = scores[self.score]
        return value >= self.limit if HIGHER_IS_SHARPER[self.score] else value <= self.limit

    def describe(self) -> str:
        """For people, such as ``in_focus_fraction >= 0.5``."""
        sign = ">=" if HIGHER_IS_SHARPER[self.score] else "<="
        return f"{self.score} {sign} {self.limit:.4g}"


@dataclass(frozen=True)
class Calibration:
    """A gate set from examples, and what it was measured with.

    Attributes
    ----------
    score, limit
        The gate.
    auc
        Share of pairs of a good and a bad example that the score ranks rightly.
    accuracy
        Share of the examples that the gate judges rightly when it is set without them (each left
        out in turn).
    n_good, n_bad
        Examples.
    protocol
        How scores were measured: method, model and its sha256, size, threshold, region, subject.
        The gate holds for the same only.
    """

    score: str
    limit: float
    auc: float
    accuracy: float
    n_good: int
    n_bad: int
    protocol: dict[str, Any]

    @property
    def gate(self) -> Gate:
        """The gate."""
        return Gate(self.score, self.limit)

    def gate_for(self, protocol: Mapping[str, Any]) -> Gate:
        """The gate, for scores that are measured so.

        Raises
        ------
        ConfigError
            If the examples were measured otherwise.
        """
        for key, value in self.protocol.items():
            # The classical scores do not depend on map, region and subject.
            matters = self.score in MAP_SCORES or key == "value_range"
            if matters and protocol.get(key) != value:
                raise ConfigError(
                    f"the calibration on {self.score} was measured with {key} {value}, this run "
                    f"has {protocol.get(key)}; measure alike or calibrate anew"
                )
        return self.gate


def calibrate(
    good: Sequence[Mapping[str, float]],
    bad: Sequence[Mapping[str, float]],
    *,
    protocol: dict[str, Any],
    score: str | None = None,
) -> Calibration:
    """The score that separates good from bad examples best, and the limit between them.

    The best has the highest area under its ROC curve; of equals that with the widest gap in
    standard deviations. The limit is the middle of the gap, or where examples overlap the one that
    judges the largest shares of good and of bad rightly. A score that is NaN counts as worse than
    any; one that no bad example has is taken only if there is no other, and its limit is that of
    the worst good one.

    Parameters
    ----------
    good, bad
        Scores by name of each example.
    protocol
        How they were measured.
    score
        The score to use, if not the best.

    Raises
    ------
    ConfigError
        If no good example has the score.
    DataError
        If there are fewer than two examples of a kind, or no score separates them at all.
    """
    if min(len(good), len(bad)) < 2:
        raise DataError(
            f"calibration needs at least 2 good and 2 bad examples, got {len(good)} and {len(bad)}"
        )
    names = [score] if score else list(HIGHER_IS_SHARPER)
    best = _choose(names, good, bad)
    if best is None:
        raise ConfigError(
            f"calibration: no good example has a value of {score or 'any score'}; give others, or "
            "choose another score or region"
        )
    chosen, limit, auc = best
    if auc <= 0.5:
        raise DataError(
            f"no score tells good from bad examples: the best is {chosen}, AUC {auc:.2f}"
            + ("; are good and bad swapped?" if auc < 0.2 else "")
        )
    n_right = 0
    for examples, others, is_good in ((good, bad, True), (bad, good, False)):
        for i, example in enumerate(examples):
            rest = [*examples[:i], *examples[i + 1 :]]
            without = _choose(names, *((rest, others) if is_good else (others, rest)))
            if without is not None:  # or else there is no gate to be right
                n_right += Gate(*without[:2]).passes(example) == is_good
    return Calibration(
        score=chosen,
        limit=limit,
        auc=auc,
        accuracy=n_right / (len(good) + len(bad)),
        n_good=len(good),
        n_bad=len(bad),
        protocol=protocol,
    )


def calibrations_folder() -> Path:
    """Folder of stored calibrations, beside the user's models; it need not exist."""
    return weights.models_folder().parent / "calibrations"


def resolve(name: str) -> Path:
    """File of a calibration: a path, or the name of a stored one.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    stored = calibrations_folder() / f"{name}.json"
    if path.name == name and stored.is_file():
        return stored
    known = ", ".join(stored_names()) or "none"
    raise ConfigError(f"calibration {name}: neither a file nor a stored one ({known})")


def stored_path(name: str) -> Path:
    """File that a calibration of this name is stored in.

    Raises
    ------
    ConfigError
        If it cannot be a name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ConfigError(
            f"calibration {name!r}: a name is of letters, digits, dashes and underscores"
        )
    return calibrations_folder() / f"{name}.json"


def stored_names() -> list[str]:
    """Names of the stored calibrations."""
    return sorted(found.stem for found in calibrations_folder().glob("*.json"))


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration as JSON."""
    document = {"format_version": FORMAT_VERSION, **asdict(calibration)}
    disk.write_text(path, json.dumps(document, indent=1) + "\n")


def load(path: Path) -> Calibration:
    """Read a calibration.

    Raises
    ------
    ConfigError
        If it cannot be read, or is no calibration of this release.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("format_version")
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{path}: a calibration of format version {version}; this release reads "
                f"{FORMAT_VERSION}"
            )
        calibration = Calibration(**values)
        calibration.gate  # noqa: B018  (its checks are wanted)
        return calibration
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: not a calibration: {error}") from error


def _choose(
    names: Sequence[str], good: Sequence[Mapping[str, float]], bad: Sequence[Mapping[str, float]]
) -> tuple[str, float, float] | None:
    """Name, limit and AUC of the best of the scores; None where no good example has one."""
    best: tuple[tuple[bool, float, float], str, float] | None = None
    for name in names:
        sign = 1 if HIGHER_IS_SHARPER[name] else -1
        # A score that could not be had counts as worse than any.
        a, b = (
            np.nan_to_num([sign * example[name] for example in kind], nan=-np.inf)
            for kind in (good, bad)
        )
        known_a, known_b = a[a > -np.inf], b[b > -np.inf]
        if known_a.size == 0:
            continue
        wins = (a[:, None] > b[None]).mean() + (a[:, None] == b[None]).mean() / 2
        gap = 0.0
        if known_b.size:
            spread = math.sqrt((known_a.var() + known_b.var()) / 2) or 1e-12
            gap = float((known_a.mean() - known_b.mean()) / spread)
        # One that no bad example has says little, but more than one that separates nothing.
        rank = known_b.size > 0 and bool(wins > 0.5), float(wins), gap
        if best is None or rank > best[0]:
            best = rank, name, sign * _limit(a, b)
    return None if best is None else (best[1], best[2], best[0][1])


def _limit(good: Any, bad: Any) -> float:
    """Where the mean of the shares judged rightly is largest, the middle of the widest such gap.

    Or the lowest of the values, where none but those that could not be had are to fail.
    """
    values = np.unique(np.concatenate([good, bad]))
    values = values[values > -np.inf]
    limits = np.concatenate([values[:1], (values[1:] + values[:-1]) / 2])
    right = (good[:, None] >= limits).mean(axis=0) + (bad[:, None] < limits).mean(axis=0)
    gaps = np.where(right >= right.max() - 1e-9, np.diff(values, prepend=values[0]), -1)
    return float(limits[gaps.argmax()])
