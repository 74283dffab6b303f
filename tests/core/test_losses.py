"""The loss against scikit-image, hand-computed cases, and the rules for partial labels."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch_operations import Operations

from semanticblur_core.errors import DataError
from semanticblur_core.losses import _window_matrix, blur_loss, label_counts, ssim_loss


@pytest.mark.parametrize("shape", [(11, 11), (40, 57)])
def test_ssim_agrees_with_scikit_image(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    x = rng.random(shape)
    y = np.clip(x + 0.3 * rng.standard_normal(shape), 0, 1)
    expected = structural_similarity(
        x, y, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    got = ssim_loss(*(torch.tensor(a, dtype=torch.float32)[None, None] for a in (x, y)))
    assert 1 - float(got) == pytest.approx(expected, abs=2e-5)


def test_bce_by_hand() -> None:
    logits = torch.tensor([0.0, np.log(3.0)]).view(1, 1, 1, 2)
    target = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    # -log(1/2) and -log(1 - 3/4)
    expected = (np.log(2) + np.log(4)) / 2
    assert float(blur_loss(logits, target, ssim_weight=0).total) == pytest.approx(expected, 1e-6)


def test_total_is_bce_plus_lambda_ssim() -> None:
    logits, target = torch.randn(2, 1, 30, 30), (torch.rand(2, 1, 30, 30) > 0.5).float()
    loss = blur_loss(logits, target, ssim_weight=0.3)
    assert float(loss.total) == pytest.approx(float(loss.bce) + 0.3 * float(loss.ssim), 1e-6)


def test_perfect_prediction_costs_nothing() -> None:
    target = (torch.rand(1, 1, 40, 40) > 0.5).float()
    loss = blur_loss((target - 0.5) * 100, target)
    assert float(loss.total) == pytest.approx(0, abs=1e-5)


def test_full_labels_equal_no_mask() -> None:
    logits, target = torch.randn(2, 1, 33, 35), (torch.rand(2, 1, 33, 35) > 0.5).float()
    whole = torch.ones_like(target, dtype=torch.bool)
    for a, b in zip(
        blur_loss(logits, target), blur_loss(logits, target, labelled=whole), strict=True
    ):
        assert float(a) == pytest.approx(float(b), abs=1e-6)


def test_ignored_pixels_change_nothing_and_get_no_gradient() -> None:
    target = (torch.rand(1, 1, 40, 40) > 0.5).float()
    labelled = torch.zeros_like(target, dtype=torch.bool)
    labelled[..., :25, :25] = True
    logits = torch.randn(1, 1, 40, 40)
    other = torch.where(labelled, logits, torch.randn(1, 1, 40, 40) * 50).requires_grad_()
    strange = torch.where(labelled, target, torch.full_like(target, float("nan")))
    loss = blur_loss(other, strange, labelled=labelled)
    assert loss.total.item() == pytest.approx(
        blur_loss(logits, target, labelled=labelled).total.item(), abs=1e-6
    )
    loss.total.backward()
    assert other.grad is not None
    assert torch.count_nonzero(other.grad[~labelled]) == 0
    assert torch.isfinite(other.grad).all()


def test_only_wholly_labelled_windows_count_for_ssim() -> None:
    x, y = torch.rand(1, 1, 30, 40), torch.rand(1, 1, 30, 40)
    labelled = torch.zeros(1, 1, 30, 40, dtype=torch.bool)
    labelled[..., 4:19, 6:30] = True
    expected = ssim_loss(x[..., 4:19, 6:30], y[..., 4:19, 6:30])
    assert float(ssim_loss(x, y, labelled=labelled)) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("shape", [(10, 10), (8, 40), (40, 3)])
@pytest.mark.parametrize("labels", [None, True])
def test_images_below_a_window_have_no_ssim(shape: tuple[int, int], labels: bool | None) -> None:
    logits = torch.randn(2, 1, *shape, requires_grad=True)
    target = torch.zeros(2, 1, *shape)
    labelled = None if labels is None else torch.ones_like(target, dtype=torch.bool)
    loss = blur_loss(logits, target, labelled=labelled)
    assert loss.ssim.item() == 0
    assert loss.total.item() == loss.bce.item() > 0
    loss.ssim.backward()
    assert torch.count_nonzero(logits.grad) == 0


def test_nothing_labelled_gives_zero() -> None:
    logits = torch.randn(1, 1, 20, 20, requires_grad=True)
    nothing = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    loss = blur_loss(logits, torch.zeros(1, 1, 20, 20), labelled=nothing)
    assert [term.item() for term in loss] == [0, 0, 0]
    loss.total.backward()
    assert torch.count_nonzero(logits.grad) == 0


@pytest.mark.parametrize(("shape", "n_windows"), [((3, 1, 20, 15), 3 * 10 * 5), ((2, 1, 8, 40), 0)])
def test_counts_of_what_is_labelled_throughout(shape: tuple[int, ...], n_windows: int) -> None:
    target = torch.zeros(shape)
    with Operations() as operations:
        counts = label_counts(target)
    assert [float(count) for count in counts] == [target.numel(), n_windows]
    assert [(count.dtype, count.shape) for count in counts] == [(torch.float32, ())] * 2
    # Numbers are written where the target is: for a copy a GPU waits.
    assert operations.names == ["aten.new_full.default"] * 2
    if n_windows:
        assert label_counts(target, torch.ones_like(target, dtype=torch.bool)) == counts


def test_whatever_the_program_computes_in() -> None:
    """Neither its default type nor mixed precision around it, nor what a mask is stored as."""
    logits = torch.linspace(-3, 3, 40 * 40).view(1, 1, 40, 40)
    mask = logits > 1
    expected = blur_loss(logits, mask.float())
    _window_matrix.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        doubled = blur_loss(logits, mask.float())
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = blur_loss(logits, mask.float())
    for found in (doubled, mixed, *(blur_loss(logits, mask.to(t)) for t in _MASK_TYPES)):
        assert found == expected


_MASK_TYPES = (torch.bool, torch.uint8, torch.float64)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_masks_of_other_values_are_refused(dtype: torch.dtype) -> None:
    logits = torch.zeros(1, 1, 16, 16)
    mask = torch.zeros(1, 1, 16, 16, dtype=dtype)
    mask[..., 8:] = 255
    with pytest.raises(DataError, match=r"0\.\.255; a mask of 0 and 255 is to be divided"):
        blur_loss(logits, mask)
    assert blur_loss(logits, mask / 255).total > 0
    # What is not labelled does not matter.
    assert blur_loss(logits, mask, labelled=mask == 0).total > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_labels_of_any_type_are_those_of_bool(dtype: torch.dtype) -> None:
    logits, target = torch.randn(1, 1, 24, 24), (torch.rand(1, 1, 24, 24) > 0.5).float()
    labelled = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    labelled[..., :3, :3] = False
    wanted = blur_loss(logits, target, labelled=labelled)
    assert wanted.ssim > 0
    assert blur_loss(logits, target, labelled=labelled.to(dtype)) == wanted
    assert ssim_loss(logits.sigmoid(), target, labelled=labelled.to(dtype)) == wanted.ssim
    assert label_counts(target, labelled.to(dtype)) == label_counts(target, labelled)


def test_targets_may_be_off_by_rounding_and_no_more() -> None:
    logits = torch.zeros(1, 1, 16, 16)
    blur_loss(logits, torch.full_like(logits, 1 + 2e-7))
    blur_loss(logits, torch.full_like(logits, -2e-7))
    with pytest.raises(DataError, match=r"got 1\.00001\.\.1\.00001"):
        blur_loss(logits, torch.full_like(logits, 1.00001))
