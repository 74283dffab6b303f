"""Pairs, splits and augmentation."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semanticblur_core.config import TrainConfig
from semanticblur_core.data.datasets import (
    DecodedPairs,
    find_pairs,
    list_images,
    note_subfolders,
    read_pair,
    read_split,
    select,
)
from semanticblur_core.data.transforms import augment
from semanticblur_core.errors import DataError, ImageError


def test_pairs_are_found_by_stem(pair_folders: tuple[Path, Path]) -> None:
    images, masks = pair_folders
    Image.open(images / "photo3.png").save(images / "photo3.bmp")
    (images / "photo3.png").unlink()
    pairs = find_pairs(images, masks)
    assert [pair.name for pair in pairs] == [f"photo{i}" for i in range(8)]
    assert find_pairs(str(images), str(masks)) == pairs
    assert list_images(str(images)) == list_images(images)
    image, mask = read_pair(pairs[3])
    assert image.shape == (72, 96, 3)
    assert mask[:, :48].all()
    assert not mask[:, 48:].any()


def test_inconsistent_folders_are_refused(pair_folders: tuple[Path, Path]) -> None:
    images, masks = pair_folders
    (masks / "photo2.png").unlink()
    with pytest.raises(DataError, match=r"photo2\.png: no file of the same name"):
        find_pairs(images, masks)
    (images / "photo2.png").unlink()
    Image.open(images / "photo3.png").save(images / "photo3.bmp")
    with pytest.raises(DataError, match="same name stem"):
        find_pairs(images, masks)
    with pytest.raises(DataError, match="no such folder"):
        find_pairs(images / "nowhere", masks)
    (images.parent / "empty").mkdir()
    with pytest.raises(DataError, match="no images in it"):
        find_pairs(images.parent / "empty", masks)


def test_a_mask_of_another_size_is_refused(pair_folders: tuple[Path, Path]) -> None:
    images, masks = pair_folders
    Image.new("L", (10, 10)).save(masks / "photo0.png")
    with pytest.raises(DataError, match="mask of 10 x 10 px for an image of 72 x 96 px"):
        read_pair(find_pairs(images, masks)[0])


def test_splits(tmp_path: Path, pair_folders: tuple[Path, Path]) -> None:
    (tmp_path / "mine.txt").write_text("photo5\n\nphoto1\n")
    names = read_split(str(tmp_path / "mine.txt"))
    assert [p.name for p in select(find_pairs(*pair_folders), names)] == ["photo5", "photo1"]
    with pytest.raises(DataError, match="2 of 2 names are missing, first x"):
        select(find_pairs(*pair_folders), ["x", "y"])
    with pytest.raises(DataError, match="split nonsense"):
        read_split("nonsense")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    for name, message in (("empty", "the list is empty"), ("binary", "not a readable text file")):
        with pytest.raises(DataError, match=message):
            read_split(str(tmp_path / f"{name}.txt"))


@pytest.mark.parametrize("kind", ["none", "flip", "crop", "colour"])
def test_image_and_mask_move_together(kind: str) -> None:
    config = TrainConfig(image_size_px=48, augmentation=kind)
    mask = torch.zeros(1, 96, 120, dtype=torch.uint8)
    mask[:, 20:60, 30:80] = 255
    image = mask.repeat(3, 1, 1) // 2 + 40
    for seed in range(20):
        images, targets = augment([(image, mask)], config, [np.random.default_rng(seed)])
        assert images.shape == (1, 3, 48, 48)
        assert targets.shape == (1, 1, 48, 48)
        x, y = images[0], targets[0]
        assert set(y.unique().tolist()) <= {0.0, 1.0}
        bright = x.mean(dim=0)
        middle = (bright.max() + bright.min()) / 2
        assert float(((bright > middle) == (y[0] > 0.5)).float().mean()) > 0.97


def test_crops_are_never_enlarged() -> None:
    from semanticblur_core.data.transforms import _crop_box

    config = TrainConfig(image_size_px=64, augmentation="colour", crop_min_side=0.1)
    for seed in range(50):
        top, left, height, width = _crop_box((100, 300), config, np.random.default_rng(seed))
        assert height >= 64
        assert width >= 64
        assert 0 <= top <= 100 - height
        assert 0 <= left <= 300 - width


def test_augmentation_depends_on_its_seed_alone() -> None:
    image = torch.randint(0, 256, (3, 90, 90), dtype=torch.uint8)
    mask = torch.zeros(1, 90, 90, dtype=torch.uint8)
    config = TrainConfig(image_size_px=48, augmentation="colour")
    seeds = [np.random.default_rng(seed) for seed in (1, 1, 2)]
    (a, b, c), _ = augment([(image, mask)] * 3, config, seeds)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_of_masks_some_of_which_are_partial_the_others_are_labelled_everywhere() -> None:
    config = TrainConfig(image_size_px=48, augmentation="none")
    image = torch.zeros(3, 48, 48, dtype=torch.uint8)
    whole = torch.zeros(1, 48, 48, dtype=torch.uint8)
    whole[:, 20:] = 255
    labelled = torch.zeros(1, 48, 48, dtype=torch.uint8)
    labelled[:, :, :10] = 255
    partial = torch.cat([whole & labelled, labelled])
    rngs = [np.random.default_rng(0)] * 2
    _, targets = augment([(image, whole), (image, partial)], config, rngs)
    expected = torch.stack([torch.cat([whole, whole * 0 + 255]), partial]) / 255
    assert torch.equal(targets, expected)


def test_names_are_partners_in_either_form_of_unicode(pair_folders: tuple[Path, Path]) -> None:
    images, masks = pair_folders
    (images / "photo0.png").rename(images / unicodedata.normalize("NFC", "été.png"))
    (masks / "photo0.png").rename(masks / unicodedata.normalize("NFD", "été.png"))
    pairs = find_pairs(images, masks)
    split = images.parent / "val.txt"
    split.write_text(unicodedata.normalize("NFD", "été"), encoding="utf-8")
    assert [pair.name for pair in select(pairs, read_split(str(split)))] == ["été"]
    with pytest.raises(DataError, match=r"1 of 1 names are missing.*without extensions"):
        select(pairs, ["photo1.png"])


def test_images_below_a_folder_are_told_of(pair_folders: tuple[Path, Path]) -> None:
    images, _ = pair_folders
    assert note_subfolders(images) is None
    (images / "more").mkdir()
    (images / "photo7.png").rename(images / "more" / "photo7.png")
    assert f"{images}: 1 image in folders below it not read, first more" in (
        note_subfolders(images) or ""
    )


def test_all_pairs_that_cannot_be_used_are_counted(pair_folders: tuple[Path, Path]) -> None:
    images, masks = pair_folders
    pairs = find_pairs(images, masks)
    (masks / "photo2.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"photo2\.png: [^;]*$"):
        DecodedPairs(pairs)
    (images / "photo5.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"photo2\.png: .*; 2 of 8 pairs cannot be used, all"):
        DecodedPairs(pairs)
