"""Looking through data sets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semanticblur_core.data.check import DataReport, check_data, find_folders
from semanticblur_core.errors import DataError


def check(images: Path, masks: Path, polarity: str = "blur") -> DataReport:
    *_, (n_done, n_total, report) = check_data(images, masks, mask_polarity=polarity)  # type: ignore[arg-type]
    assert n_done == n_total
    return report


@pytest.mark.parametrize(
    ("images", "masks"),
    [("image", "gt"), ("DUT500-Source", "DUT500-GT"), ("te/imgs", "te/second")],
)
def test_layouts_are_found(
    tmp_path: Path, pair_folders: tuple[Path, Path], images: str, masks: str
) -> None:
    root = tmp_path / "set"
    for name, folder in zip((images, masks), pair_folders, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        folder.rename(root / name)
    assert find_folders(root) == (root / images, root / masks)


def test_folders_that_are_not_a_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        find_folders(tmp_path / "none")
    with pytest.raises(DataError, match="no two folders"):
        find_folders(tmp_path)


def test_what_is_wrong_is_named(pair_folders: tuple[Path, Path]) -> None:
    images, masks = pair_folders
    files = sorted(images.iterdir())
    files[0].with_suffix(".bmp").write_bytes(files[0].read_bytes())
    files[1].write_bytes(b"")
    (masks / files[2].name).unlink()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(masks / files[3].name)
    files[4].write_bytes(files[5].read_bytes())
    report = check(images, masks)
    text = "\n".join(report.problems)
    assert len(report.problems) == 4
    assert "share a name stem" in text
    assert f"{files[1]}: the file is empty" in text
    assert f"{files[2]}: no file of the same name" in text
    assert "mask of 9 x 9 px for an image of 96 x 72 px" in text
    assert report.n_pairs == 6
    assert report.one_class == [files[3].stem]
    assert report.duplicates == [[files[4].stem, files[5].stem]]
    assert report.sizes == {"96 x 72": 6}
    assert report.blurred_fraction[files[6].stem] == pytest.approx(0.5)
    assert report.known_set is None


def test_polarity_is_the_one_asked_for(pair_folders: tuple[Path, Path]) -> None:
    images, masks = pair_folders
    mask = np.zeros((72, 96), np.uint8)
    mask[:18] = 255
    first = sorted(masks.iterdir())[0]
    Image.fromarray(mask).save(first)
    assert check(images, masks).blurred_fraction[first.stem] == 0.25
    assert check(images, masks, "sharp").blurred_fraction[first.stem] == 0.75


def test_the_training_split_of_cuhk_is_recognised(data_dir: Path) -> None:
    root = data_dir / "cuhk-tr1"
    assert find_folders(root) == (root / "images", root / "masks")
    report = check(root / "images", root / "masks")
    assert report.known_set == "CUHK, the training split (white = blurred)"
    assert report.problems == []


def test_deep_images_beside_a_folder_of_masks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("photos", "drawn"):
        (tmp_path / folder).mkdir()
    Image.fromarray(rng.integers(0, 60_000, (40, 40)).astype(np.uint16)).save(
        tmp_path / "photos" / "a.png"
    )
    Image.fromarray(np.eye(40) > 0).save(tmp_path / "drawn" / "a.png")
    assert find_folders(tmp_path) == (tmp_path / "photos", tmp_path / "drawn")


def test_what_is_no_clear_mask_is_told_of(pair_folders: tuple[Path, Path]) -> None:
    images, masks = pair_folders
    grey = np.linspace(0, 255, 72 * 96).reshape(72, 96).astype(np.uint8)
    Image.fromarray(grey).save(masks / "photo1.png")
    (images / "more").mkdir()
    Image.fromarray(grey).save(images / "more" / "x.png")
    *_, (_, _, report) = check_data(images, masks)
    assert report.n_pairs == 8
    one, other = report.problems
    assert "1 image in folders below it not read" in one
    assert f"{masks / 'photo1.png'}: 76% of its pixels are neither near black" in other
