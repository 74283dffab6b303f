"""Wider measures: against an independent library, and properties on any input."""

import numpy as np
import py_sod_metrics
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from semanticblur_core import measures
from semanticblur_core.evaluation import Evaluator, resize_map

KINDS = ("noise", "smooth", "good", "inverted", "binary", "constant", "one pixel", "edge")


def generated(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A map, of grey levels in 0..1, and a mask."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(20, 70, 2))
    field = ndimage.gaussian_filter(rng.standard_normal(shape), 6)
    mask = field > np.quantile(field, rng.uniform(0.2, 0.8))
    soft = ndimage.gaussian_filter(mask.astype(float), 2)
    grey = {
        "noise": rng.random(shape),
        "smooth": ndimage.gaussian_filter(rng.random(shape), 4),
        "good": soft,
        "inverted": 1 - soft,
        "binary": (rng.random(shape) > 0.5).astype(float),
        "constant": np.full(shape, 0.4),
        "one pixel": soft,
        "edge": soft,
    }[kind]
    if kind == "one pixel":
        mask = np.zeros(shape, bool)
        mask[5, 7] = True
    if kind == "edge":
        mask = np.zeros(shape, bool)
        mask[:, 0] = True
    return np.round(grey * 255) / 255, mask


@pytest.mark.filterwarnings("ignore:This class will be removed")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_pysodmetrics(kind: str, seed: int) -> None:
    blur, mask = generated(kind, seed)
    theirs = {
        "s": py_sod_metrics.Smeasure(),
        "w": py_sod_metrics.WeightedFmeasure(),
        "e": py_sod_metrics.Emeasure(),
        "f": py_sod_metrics.Fmeasure(),
    }
    # The library truncates 255 b, which loses levels to rounding: lift the map a little for curves.
    lifted = np.minimum(blur + 1e-9, 1)
    for name, metric in theirs.items():
        metric.step(lifted if name in "ef" else blur, mask, normalize=False)
    counts = measures.level_counts(blur.astype(np.float32), mask)
    precision, recall = measures.precision_recall(counts)
    assert measures.structure_measure(blur, mask) == pytest.approx(
        theirs["s"].get_results()["sm"], abs=1e-6
    )
    assert measures.weighted_f(blur, mask) == pytest.approx(
        theirs["w"].get_results()["wfm"], abs=1e-6
    )
    curve = theirs["e"].get_results()["em"]["curve"]
    np.testing.assert_allclose(measures.e_measure_curve(counts), _by_level(curve), atol=1e-6)
    found = theirs["f"].get_results()["fm"]
    f = measures.f_measure(precision, recall, 0.3)
    np.testing.assert_allclose(f, _by_level(found["curve"]), atol=1e-6)
    adaptive = measures.adaptive_f(lifted, mask, 2, 0.3)
    assert adaptive == pytest.approx(found["adp"], abs=1e-6)


def _by_level(curve: np.ndarray) -> np.ndarray:
    """Their curves go from level 255 down to 0, ours up."""
    return np.asarray(curve)[::-1]


@pytest.mark.parametrize("blurred", [True, False])
def test_masks_of_one_class_have_the_documented_values(blurred: bool) -> None:
    mask = np.full((20, 30), blurred)
    blur = np.full((20, 30), 0.8)
    counts = measures.level_counts(blur, mask)
    assert measures.structure_measure(blur, mask) == pytest.approx(0.8 if blurred else 0.2)
    e = measures.e_measure_curve(counts)
    assert (e[10], e[250]) == pytest.approx((1, 0) if blurred else (0, 1), abs=2e-3)
    assert measures.weighted_f(np.full((20, 30), float(blurred)), mask) == float(blurred)
    assert measures.boundary_f(blur > 0.5, mask) == 1
    assert measures.adaptive_f(blur, mask, 1.0, 0.3) == float(blurred)


def test_boundary_f_forgives_two_pixels_and_not_three() -> None:
    mask = np.zeros((40, 40), bool)
    mask[:, 20:] = True
    assert measures.boundary_f(np.roll(mask, 2, axis=1)[:, 5:-5], mask[:, 5:-5]) == 1
    assert measures.boundary_f(np.roll(mask, 3, axis=1)[:, 5:-5], mask[:, 5:-5]) == 0
    assert measures.boundary_f(np.zeros_like(mask), mask) == 0


def test_calibration_error_of_a_map_that_says_what_is_so() -> None:
    rng = np.random.default_rng(0)
    blur = rng.random((300, 300))
    truth = rng.random((300, 300)) < blur
    honest = measures.calibration_counts(blur, truth)
    assert measures.expected_calibration_error(honest) < 0.01
    bold = measures.calibration_counts((blur > 0.5).astype(float), truth)
    assert measures.expected_calibration_error(bold) == pytest.approx(0.25, abs=0.01)


def maps_and_masks() -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
    unit = st.floats(0, 1, width=32)
    return shapes.flatmap(
        lambda shape: st.tuples(
            arrays.arrays(np.float32, shape, elements=unit), arrays.arrays(bool, shape)
        )
    )


def scored(pairs: list[tuple[np.ndarray, np.ndarray]], positive: str = "blur") -> dict[str, float]:
    evaluator = Evaluator(positive=positive)  # type: ignore[arg-type]
    for blur, mask in pairs:
        evaluator.add(evaluator.measure(blur, mask, ""))
    result = evaluator.result()
    wider = {key.removesuffix(f"_{positive}"): value for key, value in result.wider.items()}
    return {"mae": result.mae, "f_beta": result.f_beta, "iou": result.iou} | wider


@given(maps_and_masks())
@settings(deadline=None, max_examples=60)
def test_every_measure_stays_in_range(pair: tuple[np.ndarray, np.ndarray]) -> None:
    for name, value in scored([pair]).items():
        assert -1e-9 <= value <= 1 + 1e-9, name


@given(maps_and_masks())
@settings(deadline=None, max_examples=40)
def test_inverting_both_sides_only_changes_the_class(pair: tuple[np.ndarray, np.ndarray]) -> None:
    blur, mask = pair
    inverted = (1 - blur, ~mask)
    for name, value in scored([inverted], "sharp").items():
        twice = 1 - (1 - blur)
        assert value == pytest.approx(scored([(twice, mask)])[name], abs=1e-6), name


@given(st.lists(maps_and_masks(), min_size=2, max_size=4), st.randoms())
@settings(deadline=None, max_examples=30)
def test_order_does_not_matter(pairs: list[tuple[np.ndarray, np.ndarray]], random: object) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = scored(pairs), scored(shuffled)
    assert first == pytest.approx(second, abs=1e-9)


@given(arrays.arrays(bool, (9, 11)).filter(np.any))
@settings(deadline=None, max_examples=40)
def test_a_perfect_map_is_perfect(mask: np.ndarray) -> None:
    found = scored([(mask.astype(np.float32), mask)])
    assert (found["mae"], found["f_beta"], found["iou"]) == (0, 1, 1)
    for name in ("weighted_f_beta", "boundary_f", "max_f_beta"):
        assert found[name] == pytest.approx(1, abs=1e-6), name
    assert found["calibration_error"] == 0


def test_nearest_resize_is_torchs_nearest_exact() -> None:
    import torch

    blur = np.random.default_rng(1).random((32, 31), np.float32)
    for size in ((45, 64), (17, 100), (32, 31), (427, 640), (184, 213)):
        theirs = torch.nn.functional.interpolate(
            torch.from_numpy(blur)[None, None], size=size, mode="nearest-exact"
        )
        np.testing.assert_array_equal(resize_map(blur, *size, how="nearest"), theirs[0, 0].numpy())
