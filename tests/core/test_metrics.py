"""The field's protocol: by hand, and on the published maps of HiFST."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from semanticblur_core.metrics import BlurScorer, Protocol


def test_scores_by_hand() -> None:
    scorer = BlurScorer()
    blur = np.array([[0.9, 0.6, 0.5, 0.1]], np.float32)
    mask = np.array([[True, False, True, False]])
    image = scorer.add(blur, mask)
    assert (image.tp, image.fp, image.fn, image.tn) == (1, 1, 1, 1)  # 0.5 is not above 0.5
    assert image.mae == pytest.approx((0.1 + 0.6 + 0.5 + 0.1) / 4)
    assert image.f_beta == pytest.approx(1.3 * 0.5 * 0.5 / (0.3 * 0.5 + 0.5))
    assert image.iou == pytest.approx(1 / 3)


def test_f_is_that_of_the_protocol() -> None:
    scorer = BlurScorer(Protocol(beta_squared=1.0))
    image = scorer.add(np.ones((1, 4), np.float32), np.array([[True, False, False, False]]))
    assert (image.precision, image.recall) == (0.25, 1)
    assert image.f_beta == image.to_dict()["f_beta"] == scorer.result().f_beta == 0.4


def test_iou_is_pooled_and_f_is_a_mean() -> None:
    scorer = BlurScorer()
    scorer.add(np.ones((10, 10), np.float32), np.ones((10, 10), bool))
    scorer.add(np.ones((1, 2), np.float32), np.array([[True, False]]))
    result = scorer.result()
    assert result.iou == pytest.approx(101 / 102)
    assert result.f_beta == pytest.approx((1 + 1.3 * 0.5 / (0.3 * 0.5 + 1)) / 2)


@pytest.mark.parametrize(("predicted", "mae"), [(0.0, 0.0), (1.0, 1.0)])
def test_a_wholly_sharp_mask_has_f_zero(predicted: float, mae: float) -> None:
    scorer = BlurScorer()
    image = scorer.add(np.full((4, 4), predicted, np.float32), np.zeros((4, 4), bool))
    assert (image.mae, image.f_beta, image.iou) == (mae, 0, 0)


@pytest.mark.parametrize(
    ("blur", "mask", "message"),
    [
        (np.zeros((2, 2), np.float32), np.zeros((2, 2), np.uint8), "expected bool"),
        (np.zeros((2, 3), np.float32), np.zeros((2, 2), bool), r"shape \(2, 2\), got \(2, 3\)"),
        (np.full((2, 2), 1.5, np.float32), np.zeros((2, 2), bool), "in 0..1, got 1.5"),
        (np.full((2, 2), np.nan, np.float32), np.zeros((2, 2), bool), "in 0..1"),
    ],
)
def test_wrong_input_is_refused(blur: np.ndarray, mask: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlurScorer().add(blur, mask)


def test_published_maps_of_hifst_give_the_published_numbers(data_dir: Path) -> None:
    oracle = data_dir / "cuhk-te1-oracle"
    expected = json.loads((oracle / "expected.json").read_text())
    with (oracle / "expected_per_image.csv").open(newline="") as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    scorer = BlurScorer()
    for name, row in rows.items():
        sharp = np.asarray(Image.open(oracle / "hifst" / f"{name}.png"), np.float64) / 255
        mask = np.asarray(Image.open(oracle / "masks" / f"{name}.png").convert("L")) > 127
        image = scorer.add(1 - sharp, mask, name=name)
        for column in ("mae", "f_beta", "iou"):
            assert getattr(image, column) == pytest.approx(float(row[column]), abs=1e-5), name
    result = scorer.result()
    assert result.n_images == 100
    assert result.mae == pytest.approx(expected["mae_mean_over_images"], abs=1e-5)
    assert result.f_beta == pytest.approx(expected["f_beta_mean_over_images"], abs=1e-5)
    assert result.iou == pytest.approx(expected["iou_pooled"], abs=1e-5)


@given(st.data(), st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_the_torch_path_gives_the_same_numbers(data: st.DataObject, shape: tuple[int, int]) -> None:
    blur = data.draw(arrays(np.float32, shape, elements=st.floats(0, 1, width=32)))
    mask = data.draw(arrays(np.bool_, shape))
    scorers = BlurScorer(), BlurScorer()
    ours = scorers[0].add(blur, mask)
    theirs = scorers[1].add_tensor(torch.from_numpy(blur), torch.from_numpy(mask))
    assert theirs.mae == pytest.approx(ours.mae, abs=1e-6)
    assert (theirs.tp, theirs.fp, theirs.fn, theirs.tn) == (ours.tp, ours.fp, ours.fn, ours.tn)
    assert scorers[1].result().f_beta == scorers[0].result().f_beta


@pytest.mark.parametrize(
    ("blur", "mask", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(2, 2), "expected bool"),
        (torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.bool), "the mask's shape"),
        (torch.full((2, 2), torch.nan), torch.zeros(2, 2, dtype=torch.bool), "in 0..1"),
    ],
)
def test_wrong_tensors_are_refused(blur: torch.Tensor, mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlurScorer().add_tensor(blur, mask)


def test_what_is_wrong_is_told() -> None:
    mask = np.ones((5, 5), np.bool_)
    BlurScorer().add(np.full((5, 5), np.nextafter(np.float32(1), np.float32(2))), mask)
    with pytest.raises(ValueError, match=r"0\.\.1, got 1\.0001\.\.1\.0001"):
        BlurScorer().add(np.full((5, 5), 1.0001, np.float32), mask)
    with pytest.raises(ValueError, match="add_tensor takes tensors"):
        BlurScorer().add(torch.ones(5, 5), torch.ones(5, 5, dtype=torch.bool))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected one mask \(H, W\), got one of shape"):
        BlurScorer().add(np.ones((2, 5, 5), np.float32), np.ones((2, 5, 5), np.bool_))
