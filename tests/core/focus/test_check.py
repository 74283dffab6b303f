"""Checking images: in order, with bounded memory, bad ones named; masks; the tables of a report."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from semanticblur_core import DetectOptions, FocusOptions, focus_report
from semanticblur_core.errors import ConfigError, ImageError
from semanticblur_core.focus.calibration import Gate
from semanticblur_core.focus.check import ImageFocus, Source, colmap_mask, focus_of_image, judge
from semanticblur_core.focus.report import ranked, stack_rows, to_row, write_csv, write_json
from semanticblur_core.focus.stack import PlaneFocus, StackFocus


class Dark:
    """Calls pixels blurred that are dark."""

    name = "dark"

    def detect(self, image: Any, **_: Any) -> Any:
        grey = image if image.ndim == 2 else image[..., 0]
        unit = grey / 255 if grey.dtype == np.uint8 else grey
        return (1 - unit).astype(np.float32)

    def iter_planes(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


def half(dark_columns: int, dtype: Any = np.uint8) -> np.ndarray:
    image = np.full((20, 40), np.iinfo(dtype).max, dtype)
    image[:, :dark_columns] = 0
    return image


def source(name: str, image: np.ndarray) -> Source:
    return Source(name, Path(name), lambda: image)


def checked(sources: list[Any], **options: Any) -> list[ImageFocus]:
    return [update.image for update in focus_report(sources, Dark(), FocusOptions(**options))]


def test_gates_judge_each_image() -> None:
    sources = [source("a.png", half(10)), source("b.png", half(30))]
    good, bad = checked(sources, gates=(Gate("in_focus_fraction", 0.5), Gate("mean_blur", 0.5)))
    assert good.scores is not None
    assert (good.scores.in_focus_fraction, good.scores.mean_blur) == (0.75, 0.25)
    assert (good.passed, good.failed_gates) == (True, ())
    assert not bad.passed
    assert bad.failed_gates == (
        "in_focus_fraction >= 0.5, got 0.25",
        "mean_blur <= 0.5, got 0.75",
    )


def test_sixteen_bits_are_brought_to_the_range_given() -> None:
    (image,) = checked([source("a.tif", half(10, np.uint16))], value_range=(0, 2 * 65535))
    assert image.scores is not None
    assert image.scores.mean_blur == pytest.approx(0.625, abs=1e-4)


def test_what_cannot_be_checked_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    volume = source("volume", np.zeros((3, 4, 5, 6)))
    images = checked([tmp_path / "broken.png", volume, source("good.png", half(0))])
    assert [image.name for image in images] == ["broken.png", "volume", "good.png"]
    assert "broken.png" in (images[0].error or "")
    assert images[1].error == "volume: expected a grey or RGB image, got (3, 4, 5, 6)"
    assert (images[2].error, images[2].passed) == (None, True)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_image_without_pixels_is_named_and_the_rest_goes_on(dtype: Any) -> None:
    empty = source("empty", np.zeros((0, 5), dtype))
    images = checked([empty, source("good.png", half(0))])
    assert images[0].error == "empty: the image has no pixels, shape (0, 5)"
    assert images[1].passed


def test_few_images_are_held_at_a_time() -> None:
    read: list[int] = []

    def reader(i: int) -> Source:
        def load() -> np.ndarray:
            read.append(i)
            return half(5)

        return Source(str(i), Path(str(i)), load)

    running = focus_report([reader(i) for i in range(50)], Dark())
    for n_done in range(1, 11):
        assert next(running).n_done == n_done
        assert len(read) <= n_done + 5
    running.close()
    assert len(read) <= 15


def test_the_region_is_a_function_or_the_content() -> None:
    def left(_: Source) -> Any:
        region = np.zeros((20, 40), bool)
        region[:, :20] = True
        return region

    (image,) = checked([source("a", half(10))], region=left)
    assert image.scores is not None
    assert (image.scores.in_focus_fraction, image.scores.region_fraction) == (0.5, 0.5)
    (wrong,) = checked([source("a", half(10))], region=lambda _: np.ones((3, 3), bool))
    assert wrong.error == "a: region of (3, 3) for an image of (20, 40)"
    (empty,) = checked(
        [source("a", half(0))], region="content", gates=(Gate("in_focus_fraction", 0.1),)
    )
    assert not empty.passed
    assert empty.failed_gates == (
        "in_focus_fraction >= 0.1, got none, for there is no content or no map",
    )


def test_options_that_mean_nothing_are_refused() -> None:
    wrong: Any
    for wrong, message in (
        ({"region": "contents"}, "region: expected one of image, content, got 'contents'"),
        ({"subject": "center"}, "subject: expected one of centre, saliency, got 'center'"),
        ({"threshold": 2}, r"threshold: expected in \[0, 1\], got 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            FocusOptions(**wrong)
    with pytest.raises(ConfigError, match="threshold"):
        DetectOptions(Path("x"), threshold=-3)
    with pytest.raises(ConfigError, match="every: expected at least 1, got 0"):
        DetectOptions(Path("x"), every=0)
    formats: Any = "png,tif"
    assert DetectOptions(Path("x"), formats=formats).formats == ("png", "tif")


def test_one_file_is_a_report_too(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(half(20)).save(path)
    [update] = focus_report(str(path), Dark())
    assert update.image.name == "a.png"


def test_tiles_and_planes_are_measured_on_request() -> None:
    image, blur = focus_of_image(half(10), Dark(), FocusOptions(tile_size_px=20, measure="network"))
    np.testing.assert_array_equal(image.tiles, [[0.5, 1]])
    assert image.plane is not None
    assert image.plane.score == pytest.approx(0.75)
    assert blur.shape == (20, 40)
    with pytest.raises(ImageError, match="expected a grey or RGB image"):
        focus_of_image(np.zeros((2, 3, 4, 5)), Dark())


def test_classical_scores_need_no_map(tmp_path: Path) -> None:
    options = FocusOptions(tile_size_px=20, measure="tenengrad", thumbnails=True)
    (update,) = focus_report([source("a", half(10))], None, options)
    image = update.image
    assert image.scores is not None
    assert image.scores.tenengrad > 0
    assert math.isnan(image.scores.mean_blur)
    assert (image.tiles, image.overlay) == (None, None)
    assert image.plane is not None
    assert image.plane.tiles.shape == (1, 2)
    with pytest.raises(ConfigError, match="masks need a blur map"):
        next(focus_report([source("a", half(10))], None, FocusOptions(mask_folder=tmp_path)))


def test_images_are_judged_again_without_measuring() -> None:
    (image,) = checked([source("a", half(10))])
    assert image.passed
    again = judge(image, [Gate("mean_blur", 0.1)])
    assert (again.passed, again.failed_gates) == (False, ("mean_blur <= 0.1, got 0.25",))
    assert judge(again, []).passed
    broken = ImageFocus("b", "b", error="torn")
    assert judge(broken, []) is broken


def test_masks_keep_a_margin() -> None:
    blur = np.zeros((9, 9), np.float32)
    blur[4, 4] = 1
    assert np.argwhere(colmap_mask(blur) == 0).tolist() == [[4, 4]]
    assert (colmap_mask(blur, margin_px=1) == 0).sum() == 5
    assert (colmap_mask(blur, margin_px=2) == 0).sum() == 13
    assert (colmap_mask(np.zeros((4, 4), np.float32), margin_px=3) == 255).all()
    with pytest.raises(ImageError, match="at least 0 px, got -1"):
        colmap_mask(blur, margin_px=-1)


@pytest.mark.parametrize("margin_px", [1, 5, 40])
@pytest.mark.parametrize("shape", [(1, 70), (63, 20), (150, 90)])
def test_margins_are_as_wide_as_the_distance_says(
    shape: tuple[int, int], margin_px: int, rng: np.random.Generator
) -> None:
    blur = (rng.random(shape) > 0.99).astype(np.float32)
    blur[0, 0] = 1
    near = ndimage.distance_transform_edt(blur == 0) <= margin_px
    assert ((colmap_mask(blur, margin_px=margin_px) == 0) == near).all()


def test_masks_lie_as_the_file_is_stored(tmp_path: Path) -> None:
    stored = Image.fromarray(half(10))  # dark at the left of the stored pixels
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    stored.save(tmp_path / "upright.jpg", exif=exif, quality=100)
    (image,) = checked([tmp_path / "upright.jpg"], mask_folder=tmp_path / "masks")
    assert (image.height, image.width) == (40, 20)
    mask = np.asarray(Image.open(tmp_path / "masks" / "upright.jpg.png"))
    assert mask.shape == (20, 40)
    assert not mask[:, :9].any()
    assert (mask[:, 11:] == 255).all()


def test_tables_have_every_image_and_no_nan(tmp_path: Path) -> None:
    (image,) = checked([source("a.png", half(0))], region="content", tile_size_px=20)
    broken = ImageFocus("b.png", "b.png", error="b.png: torn")
    rows = [to_row(image), to_row(broken)]
    assert rows[0]["in_focus_fraction"] is None  # there is no content
    assert rows[0]["tiles"] == [[None, None]]
    assert rows[0]["tile_size_px"] == 20
    assert rows[1] == {"name": "b.png", "source": "b.png", "passed": False, "error": "b.png: torn"}
    write_json(tmp_path / "r.json", {"images": rows})
    assert json.loads((tmp_path / "r.json").read_text())["images"] == rows
    write_csv(tmp_path / "r.csv", rows)
    with (tmp_path / "r.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["name"] for line in lines] == ["a.png", "b.png"]
    assert lines[1]["error"] == "b.png: torn"
    write_csv(tmp_path / "r.csv", [to_row(replace(broken, name="=b", error="=b: torn"))])
    with (tmp_path / "r.csv").open(newline="") as stream:
        [line] = csv.DictReader(stream)
    assert (line["name"], line["error"]) == ("./=b", "./=b: torn")


def test_a_series_without_a_score_is_not_the_best() -> None:
    stack = StackFocus("CZ")
    for index, score in {(0, 0): math.nan, (0, 1): math.nan, (1, 0): -2.0, (1, 1): -1.0}.items():
        stack.add(PlaneFocus(index, score, np.zeros((1, 1), np.float32)))
    names = {index: str(index) for index in stack.planes}
    document = stack_rows(stack, names)
    assert document["best_plane"] == {"index": 1, "name": "(1, 1)"}
    assert document["stacks"][0]["curve"]["score"] == [None, None]


def test_ranks_put_the_worst_first() -> None:
    images = checked([source(f"{n}.png", half(n)) for n in (5, 30, 10)])
    assert images[0].scores is not None
    lost = replace(images[0], name="lost", scores=replace(images[0].scores, mean_blur=math.nan))
    order = [image.name for image in ranked([*images, lost], "mean_blur")]
    assert order == ["lost", "30.png", "10.png", "5.png"]
    best = [image.name for image in ranked(images, "in_focus_fraction", best_first=True)]
    assert best == ["5.png", "10.png", "30.png"]
    assert [i.name for i in ranked(images, "name")] == ["10.png", "30.png", "5.png"]


def test_what_is_no_gate_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"expected such as Gate\('in_focus_fraction', 0.3\), got"
    ):
        FocusOptions(gates=[("in_focus_fraction", 0.3)])  # type: ignore[arg-type]


def test_what_a_source_gives_may_be_lists_or_nothing() -> None:
    rows: Any = half(10).tolist()
    (listed,) = checked([Source("a", Path("a"), lambda: rows)])
    assert listed.scores is not None
    nothing: Any = None
    (none,) = checked([Source("b", Path("b"), lambda: nothing)])
    assert none.error == "b: expected real numbers, got object"
