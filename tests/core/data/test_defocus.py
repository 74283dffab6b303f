"""Synthetic defocus: kernels, compositing, labels."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semanticblur_core.data.defocus import (
    BLURRED_RADIUS_PX,
    SharpImages,
    aperture_kernels,
    blur_levels,
    defocus,
    defocus_photographs,
    is_held_out,
    synthesise,
)
from semanticblur_core.errors import DataError


def kernel(radius: float, n_blades: int = 0) -> torch.Tensor:
    return aperture_kernels(
        torch.tensor([radius]),
        n_blades=torch.tensor([n_blades]),
        rotation_rad=torch.tensor([0.3]),
        size_px=25,
    )[0]


@pytest.mark.parametrize("radius", [0.0, 0.3, 0.7, 1.0, 2.5, 8.0])
def test_kernels_sum_to_one_and_are_centred(radius: float) -> None:
    found = kernel(radius)
    axis = torch.arange(25) - 12.0
    assert float(found.sum()) == pytest.approx(1, abs=1e-6)
    assert float((found.sum(0) * axis).sum()) == pytest.approx(0, abs=1e-5)
    assert float(found[0].max()) == 0


def test_a_disc_has_the_area_and_spread_of_its_radius() -> None:
    found = kernel(8.0)
    axis = torch.arange(25) - 12.0
    assert 1 / float(found.max()) == pytest.approx(math.pi * 64, rel=0.02)
    variance = float((found.sum(0) * axis**2).sum())
    assert variance == pytest.approx(8.0**2 / 4, rel=0.03)


def test_a_polygon_lies_within_its_circle() -> None:
    disc, hexagon = kernel(8.0), kernel(8.0, 6)
    assert bool((hexagon[disc == 0] == 0).all())
    share = float(disc.max() / hexagon.max())
    assert share == pytest.approx(3 * math.sqrt(3) / 2 / math.pi, abs=0.06)


def test_blurring_does_not_move_or_dim() -> None:
    image = torch.zeros(1, 1, 64, 64)
    image[0, 0, 20, 40] = 1
    blurred = blur_levels(image, kernel(4.0)[None, None])[0, 0, 0]
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-4)
    rows, columns = torch.nonzero(blurred > 1e-4, as_tuple=True)
    assert (float(rows.float().mean()), float(columns.float().mean())) == (20, 40)


def test_a_sharp_object_leaves_no_halo_on_the_blurred_background() -> None:
    alpha = torch.zeros(1, 1, 64, 64)
    alpha[..., 20:44, 20:44] = 1
    back = torch.full((1, 3, 64, 64), 0.2)
    photo = torch.where(alpha > 0, torch.ones_like(back), back)
    image, share = defocus(
        photo,
        torch.full((1, 1, 64, 64), 6.0),
        front=photo,
        alpha=alpha,
        hidden=alpha,
        front_radius_px=torch.tensor([0.0]),
    )
    # FFT and normalised convolution: not exact to the bit.
    assert torch.allclose(image, photo, atol=2e-2)
    assert torch.allclose(share, alpha, atol=1e-4)


def test_a_defocused_object_is_mixed_with_what_lies_behind() -> None:
    alpha = torch.zeros(1, 1, 64, 64)
    alpha[..., :32] = 1
    back = torch.zeros(1, 3, 64, 64)
    image, share = defocus(
        back,
        torch.zeros(1, 1, 64, 64),
        front=torch.ones_like(back),
        alpha=alpha,
        front_radius_px=torch.tensor([5.0]),
    )
    assert torch.allclose(image[:, :1], share, atol=1e-5)
    across = share[0, 0, 32]
    assert float(across[24]) == pytest.approx(1, abs=1e-4)
    assert 0.3 < float(across[32]) < 0.5 < float(across[31]) < 0.7
    assert float(across[40]) == pytest.approx(0, abs=1e-4)


def test_radii_beyond_the_largest_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 16"):
        defocus(torch.zeros(1, 3, 64, 64), torch.full((1, 1, 64, 64), 17.0))


@pytest.fixture
def sharp_folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for i in range(3):
        noise = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{i}.png")
    mask = np.zeros((90, 120), np.uint8)
    mask[30:60, 30:90] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "1.png")
    return tmp_path


@pytest.mark.parametrize("kind", ["photograph", "microscopy"])
def test_labels_follow_the_radius_and_blurred_parts_are_smoother(
    sharp_folder: Path, kind: str
) -> None:
    files = sorted((sharp_folder / "images").iterdir())
    sources = SharpImages(files, masks=sharp_folder / "masks", kind=kind)  # type: ignore[arg-type]
    assert sources.with_mask == [1]
    made = synthesise(sources, 40, 64, np.random.default_rng(3))
    assert made.image.shape == (40, 3, 64, 64)
    assert 0 <= float(made.image.min()) <= float(made.image.max()) <= 1
    assert torch.equal(made.blurred, made.radius_px > BLURRED_RADIUS_PX)
    doubtful = (made.radius_px > 0.6) & (made.radius_px < 1.5)
    assert not bool((doubtful & made.labelled).any())
    assert bool(made.blurred.all(-1).all(-1).any())
    assert not bool(made.blurred.any(-1).any(-1).all())
    detail = (made.image[..., 1:] - made.image[..., :-1]).abs().mean(1, keepdim=True)
    detail = torch.nn.functional.pad(detail, (0, 1))
    far = made.radius_px > 4
    near = made.radius_px < 0.3
    assert float(detail[far].mean()) < 0.6 * float(detail[near].mean())


def test_the_same_seed_draws_the_same_images(sharp_folder: Path) -> None:
    sources = SharpImages(sorted((sharp_folder / "images").iterdir()))
    first, second = (synthesise(sources, 3, 64, np.random.default_rng(1)) for _ in range(2))
    assert torch.equal(first.image, second.image)


def test_no_images_and_masks_of_another_size_are_refused(sharp_folder: Path) -> None:
    with pytest.raises(DataError, match="no sharp images"):
        SharpImages([])
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(sharp_folder / "masks" / "2.png")
    with pytest.raises(DataError, match=r"2.png: not of the size"):
        SharpImages(sorted((sharp_folder / "images").iterdir()), masks=sharp_folder / "masks")


def test_a_photograph_that_is_defocused_further_keeps_true_labels() -> None:
    """The left half was blurred; the right is texture, whose detail tells what became of it."""
    rng = np.random.default_rng(0)
    texture = torch.from_numpy(rng.random((1, 96, 96))).float().expand(3, -1, -1)
    target = torch.zeros(1, 96, 96)
    target[..., :48] = 1
    # Where nothing was labelled, only what has become blurred is known.
    none = torch.cat([target, torch.zeros_like(target)])
    images, n = texture.expand(40, -1, -1, -1), 40
    made, labels = defocus_photographs(
        images, target.expand(n, -1, -1, -1), np.random.default_rng(0)
    )
    again, partial = defocus_photographs(
        images, none.expand(n, -1, -1, -1), np.random.default_rng(0)
    )
    assert torch.equal(made, again)
    assert (made.shape, labels.shape) == ((n, 3, 96, 96), (n, 2, 96, 96))
    assert 0 <= float(made.min()) <= float(made.max()) <= 1
    assert not (partial[:, 1] > 0)[~(partial[:, 0] > 0)].any()
    n_mixed = n_whole = 0
    for image, (blurred, labelled) in zip(made, labels > 0, strict=True):
        assert (blurred & labelled)[:, :48].all()
        detail = image.mean(0).diff(dim=0)[:, 60:].abs()
        there, known = blurred[1:, 60:], labelled[1:, 60:]
        n_whole += bool((there & known).all())
        becomes, stays = (detail[part] for part in (there & known, ~there & known))
        if len(becomes) > 200 and len(stays) > 200:
            assert becomes.mean() < 0.7 * stays.mean()
            n_mixed += 1
    assert min(n_mixed, n_whole) >= 5


def test_about_one_in_eight_is_held_out() -> None:
    assert 0.1 < np.mean([is_held_out(f"photo{i}") for i in range(2000)]) < 0.15


def test_names_that_are_not_utf_8_are_held_out_or_not_and_others_as_ever() -> None:
    assert not any(is_held_out(f"IMG_{chr(code)}") for code in (0xDCFF, 0xD800))
    # Their CRC-32 by gzip.
    held_out = {"photo0": False, "photo7": True, "Blüte1": False, "Blüte2": True}
    assert {name: is_held_out(name) for name in held_out} == held_out


def test_a_radius_that_varies_blurs_nearly_as_much_as_a_uniform_one(
    rng: np.random.Generator,
) -> None:
    back = torch.from_numpy(rng.random((1, 3, 96, 96), np.float32))
    for radius in (0.6, 1.2, 1.8, 2.7, 4.0, 9.0):
        uniform, _ = defocus(back, torch.full((1, 1, 96, 96), radius))
        varying = torch.full((1, 1, 96, 96), radius)
        varying[..., 90:, :] = 12.0
        mixed, _ = defocus(back, varying)
        ratio = float(mixed[..., 20:70, 20:70].std() / uniform[..., 20:70, 20:70].std())
        assert ratio == pytest.approx(1, abs=0.2), radius
