"""The annotation store: what goes in comes out, and nothing that was painted is lost."""

import json
import os
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from semanticblur_core.data.journal import Lock
from semanticblur_core.data.store import (
    AnnotationStore,
    OtherImageError,
    check_store,
    is_store,
    read_labels,
    read_store,
)
from semanticblur_core.errors import DataError, ImageError, SemanticBlurError


def photo(value: int = 7) -> np.ndarray:
    return np.full((20, 30, 3), value, np.uint8)


def strokes(code: int = 1) -> np.ndarray:
    labels = np.zeros((20, 30), np.uint8)
    labels[3:6, 4:20] = code
    return labels


def edit_index(folder: Path, name: str, said: object) -> None:
    """Let ``dataset.json`` say that of an image."""
    index = json.loads((folder / "dataset.json").read_text())
    index["items"][name] = said
    (folder / "dataset.json").write_text(json.dumps(index))


def test_labels_and_image_come_back_as_they_went_in(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path / "S", create=True)
    path = store.write(
        "a", strokes(2), image=photo(), source="x.png", axes="YXS", plane=[3], split="val"
    )
    assert path == tmp_path / "S" / "labels" / "a.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), strokes(2))
    [item] = AnnotationStore(tmp_path / "S").items()
    assert (item.source, item.axes, item.plane, item.split) == ("x.png", "YXS", (3,), "val")
    [image] = read_store(tmp_path / "S")
    np.testing.assert_array_equal(image.image, photo())
    np.testing.assert_array_equal(image.labels, strokes(2))
    index = json.loads((tmp_path / "S" / "dataset.json").read_text())
    assert index["format_version"] == 1
    assert len(index["items"]["a"]["sha256"]) == 64


def test_what_is_overwritten_is_kept_up_to_twenty_times(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    store.write("a.b", strokes(), image=photo())
    (tmp_path / "previous").mkdir()
    (tmp_path / "previous" / "a.b.copy.png").touch()  # somebody else's
    assert store.previous("a.b") == []
    for i in range(25):
        labels = strokes()
        labels[0, 0], labels[0, i] = 1, 2
        store.write("a.b", labels)
    kept = store.previous("a.b")
    assert len(kept) == 20
    last = read_labels(kept[-1])
    assert last[0, 23] == 2
    assert store.previous("a") == []
    assert read_labels(tmp_path / "labels" / "a.b.png")[0, 24] == 2


def test_a_failed_write_leaves_the_labels_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AnnotationStore(tmp_path, create=True)
    store.write("a", strokes(), image=photo())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(Exception, match=r"a\.png: cannot be written: No space left"):
        store.write("a", strokes(2))
    monkeypatch.undo()
    np.testing.assert_array_equal(read_labels(tmp_path / "labels" / "a.png"), strokes())
    assert not (tmp_path / ".lock").exists()
    store.write("a", strokes(2))


def test_a_stack_gives_its_labelled_planes_with_one_range_of_intensity(tmp_path: Path) -> None:
    stack = np.arange(3 * 16 * 20, dtype=np.uint16).reshape(3, 16, 20)
    labels = np.zeros(stack.shape, np.uint8)
    labels[1, 2] = 1
    labels[2, 3] = 2
    store = AnnotationStore(tmp_path, create=True)
    assert store.write("z", labels, image=stack, axes="ZYX").suffix == ".tif"
    planes = read_store(tmp_path)
    assert [plane.name for plane in planes] == ["z[1]", "z[2]"]
    np.testing.assert_array_equal(planes[1].image, stack[2])
    low, high = np.percentile(stack, (0.1, 99.9))
    assert {plane.value_range for plane in planes} == {(low, high)}
    # Fewer than one pixel in a thousand is bright, as of beads: the extremes count.
    sparse = np.zeros((3, 100, 100), np.uint16)
    sparse[1, 50, 50] = 4000
    labels = np.ones(sparse.shape, np.uint8)
    store.write("beads", labels, image=sparse, axes="ZYX")
    found = {plane.value_range for plane in read_store(tmp_path) if "beads" in plane.name}
    assert found == {(0, 4000)}


@pytest.mark.parametrize("first_is_flat", [False, True])
@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_an_image_is_the_same_with_and_without_an_axis_of_length_one(
    tmp_path: Path, first_is_flat: bool, suffix: str
) -> None:
    stack = np.arange(20 * 30, dtype=np.uint16).reshape(1, 20, 30)
    store = AnnotationStore(tmp_path / "S", create=True)
    forms = [(stack[0], strokes(1), "YX"), (stack, strokes(2)[None], "ZYX")]
    for image, labels, axes in forms if first_is_flat else forms[::-1]:
        given = image
        if suffix == ".npy":
            given = tmp_path / "a.npy"
            np.save(given, stack)
        store.write("a", labels, image=given, axes=axes)
        np.testing.assert_array_equal(store.labels_of("a"), labels.squeeze())
    [plane] = read_store(store.folder)
    assert (plane.name, plane.image.shape) == ("a", (20, 30))
    np.testing.assert_array_equal(plane.labels, strokes(2 if first_is_flat else 1))
    assert len(store.previous("a")) == 1


def test_a_name_has_one_file_of_labels_and_of_two_the_newest_counts(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    store.write("a", strokes(1), image=photo())
    # As an earlier release wrote them, or a writer that was killed left them.
    old = tmp_path / "labels" / "a.tif"
    tifffile.imwrite(old, strokes(2)[None], photometric="minisblack")
    os.utime(old, (1, 1))
    [plane] = read_store(tmp_path)
    np.testing.assert_array_equal(plane.labels, strokes(1))
    store.write("a", strokes(1))
    assert not old.exists()
    assert [path.suffix for path in store.previous("a")] == [".png", ".tif"]


def test_channels_are_found_beside_axes_of_length_one(tmp_path: Path) -> None:
    stack = np.stack([np.full((20, 30), value, np.uint16) for value in (0, 1000, 2000)])[None]
    stack[..., ::2] += 500
    labels = np.zeros(stack.shape, np.uint8)
    labels[0, :, 0] = 1
    for axes, n_ranges in (("CZYX", 1), ("ZCYX", 3)):
        store = AnnotationStore(tmp_path / axes, create=True)
        store.write("a", labels, image=stack, axes=axes)
        assert len({plane.value_range for plane in read_store(store.folder)}) == n_ranges


def test_an_image_file_is_known_by_its_pixels_not_by_its_name(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path / "S", create=True)
    files = []
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        files.append(tmp_path / str(i) / "a.png")
        Image.fromarray(photo(i)).save(files[i])
    store.write("a", strokes(), image=files[0])
    assert [store.has_labels_of(path) for path in files] == [True, False, False]
    store.write("a 2", strokes(), image=photo(2))  # the same pixels in another file
    store.write("a b", strokes(), image=files[1])
    assert [store.has_labels_of(path) for path in files] == [True, False, True]


def test_a_folder_made_by_hand_is_a_store(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    Image.fromarray(photo()).save(tmp_path / "images" / "p.JPG", format="JPEG")
    Image.fromarray(strokes()).save(tmp_path / "labels" / "p.PNG", format="PNG")
    store = AnnotationStore(tmp_path)
    assert [image.name for image in read_store(tmp_path)] == ["p"]
    assert store.image_of("p") == tmp_path / "images" / "p.JPG"
    np.testing.assert_array_equal(store.labels_of("p"), strokes())


def test_masks_in_a_folder_named_labels_are_no_store(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    Image.fromarray(strokes(255)).save(tmp_path / "labels" / "p.png")
    assert not is_store(tmp_path)


def test_another_image_of_the_same_name_is_refused(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    store.write("a", strokes(), image=photo())
    store.write("a", strokes(), image=photo())
    with pytest.raises(DataError, match="another image of that name"):
        store.write("a", strokes(), image=photo(9))
    with pytest.raises(DataError, match="holds no image of that name"):
        store.write("b", strokes())


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a:b", "a\0b"])
def test_names_that_leave_the_store_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="not a name"):
        AnnotationStore(tmp_path, create=True).write(name, strokes(), image=photo())


def test_the_lock_of_a_killed_writer_is_lifted(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    (tmp_path / ".lock").touch()  # the system has let go of it
    store.write("a", strokes(), image=photo())
    assert not (tmp_path / ".lock").exists()


def test_a_writer_waits_as_long_as_another_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AnnotationStore(tmp_path, create=True)
    with Lock(tmp_path, ".lock"):
        # An old lock is a lock: a first save of a large stack takes more than a moment.
        os.utime(tmp_path / ".lock", (time.time() - 600, time.time() - 600))
        monkeypatch.setattr("semanticblur_core.data.store._LOCK_WAIT_S", 0.1)
        with pytest.raises(DataError, match="another program has been writing"):
            store.write("a", strokes(), image=photo())
    store.write("a", strokes(), image=photo())


def test_an_image_with_nan_is_known_again(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    image = photo().astype(np.float32)
    image[3, 4] = np.nan
    store.write("a", strokes(), image=image)
    store.write("a", strokes(2), image=image.copy())
    image[0, 0] += 1
    with pytest.raises(OtherImageError, match="another image of that name"):
        store.write("a", strokes(), image=image)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_image_with_alpha_is_known_again(tmp_path: Path, dtype: type) -> None:
    store = AnnotationStore(tmp_path, create=True)
    image = np.dstack([photo(), np.full((20, 30), 200, np.uint8)]).astype(dtype)
    for code in (1, 2):
        store.write("a", strokes(code), image=image, axes="YXS")
    [plane] = read_store(tmp_path)
    np.testing.assert_array_equal(plane.image, photo())


@pytest.mark.parametrize(
    ("shape", "axes", "labelled"),
    [
        ((20, 30), "YX", (5, 5)),
        ((20, 30, 3), "YXS", (30, 20)),
        ((4, 20, 30), "ZYX", (20, 30)),
        ((4, 20, 30, 3), "ZYXS", (3, 20, 30)),
        ((2, 20, 30), "CYX", (20, 30)),
    ],
)
@pytest.mark.parametrize("says_axes", [False, True])
def test_labels_that_do_not_fit_the_image_are_refused(
    tmp_path: Path,
    shape: tuple[int, ...],
    axes: str,
    labelled: tuple[int, ...],
    says_axes: bool,
) -> None:
    image, said = np.zeros(shape, np.uint8), axes if says_axes else None
    np.save(tmp_path / "a.npy", image)
    store = AnnotationStore(tmp_path / "S", create=True)
    for given in (image, tmp_path / "a.npy"):
        with pytest.raises(DataError, match=r"a: labels of shape .* for an image of"):
            store.write("a", np.ones(labelled, np.uint8), image=given, axes=said)
    assert store.image_of("a") is None
    fitting = np.ones(shape[:-1] if "S" in axes else shape, np.uint8)
    store.write("a", fitting, image=image, axes=said)
    with pytest.raises(DataError, match=r"a: labels of shape .* for an image of"):
        store.write("a", np.ones(labelled, np.uint8))
    assert {plane.labels.shape for plane in read_store(store.folder)} == {(20, 30)}


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_an_image_that_is_not_there_is_named(tmp_path: Path, suffix: str) -> None:
    store = AnnotationStore(tmp_path / "S", create=True)
    with pytest.raises(ImageError, match=rf"x{suffix}: no such file"):
        store.write("m", strokes(), image=tmp_path / f"x{suffix}")


def test_of_two_images_of_a_name_all_take_the_same(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    store.write("a", strokes(), image=photo())
    tifffile.imwrite(tmp_path / "images" / "a.tif", photo(9), photometric="rgb")
    [item] = store.items()
    assert item.image == store.image_of("a") == tmp_path / "images" / "a.png"


def test_labels_are_not_said_to_be_of_a_journal_when_a_write_ends_halfway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AnnotationStore(tmp_path, create=True)
    store.write("a", strokes(), image=photo(), painted_in="j", split="val")
    write_index = store._write_index

    def full(index: dict[str, Any]) -> None:
        if (store.labels_of("a") == 2).any():
            raise ImageError("full")
        write_index(index)

    monkeypatch.setattr(store, "_write_index", full)
    with pytest.raises(ImageError):
        store.write("a", strokes(2))
    assert store.painted_in("a") is None
    assert store.split_of("a") == "val"


@pytest.mark.parametrize("side", [2048, 2049])
def test_the_range_of_a_stack_is_of_all_columns_and_colours_of_a_pattern(
    tmp_path: Path, side: int
) -> None:
    """Stripes where the width is even, a checkerboard where it is odd."""
    values = np.arange(2 * side**2, dtype=np.uint32) % 2 * 10_000
    stack = values.astype(np.uint16).reshape(2, side, side)
    np.save(tmp_path / "z.npy", stack)
    labels = np.zeros(stack.shape, np.uint8)
    labels[0, 0] = 1
    store = AnnotationStore(tmp_path / "S", create=True)
    store.write("z", labels, image=tmp_path / "z.npy", axes="ZYX")
    [plane] = read_store(store.folder)
    assert plane.value_range == (0, 10_000)


def test_an_image_is_held_out_and_no_longer(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    store.set_split("a", "val")
    assert store.items() == []
    store.write("a", strokes(), image=photo())
    assert store.split_of("a") == "val"
    assert [image.split for image in read_store(tmp_path)] == ["val"]
    store.write("a", strokes(), split="open")
    assert store.split_of("a") is None
    assert store.split_of("unknown") is None
    assert [image.split for image in read_store(tmp_path)] == [None]


def test_check_says_what_is_wrong(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    for value, name in enumerate(("changed", "codes", "good", "size")):
        store.write(name, strokes(2), image=photo(value))
    Image.fromarray(photo(8)).save(tmp_path / "images" / "changed.png")
    Image.fromarray(strokes(255)).save(tmp_path / "labels" / "codes.png")
    Image.fromarray(strokes()[1:]).save(tmp_path / "labels" / "size.png")
    rows, problems = check_store(tmp_path)
    assert [row["name"] for row in rows] == ["changed", "good"]
    assert rows[1]["blurred"] == pytest.approx(48 / 600)
    assert len(problems) == 3
    assert "changed since it was labelled" in problems[0]
    assert "largest value 255" in problems[1]
    assert "labels of shape (19, 30)" in problems[2]


def test_the_same_image_under_two_names_is_told(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    for name in ("a", "b"):
        store.write(name, strokes(), image=photo())
    rows, [problem] = check_store(tmp_path)
    assert len(rows) == 2
    assert "b.png: the same image as a; keep the labels of one" in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format_version": 9, "items": {}}', "a store of format version 9"),
        ('{"format_version": 1, "items": []}', "items: expected a mapping, got list"),
    ],
)
def test_a_damaged_index_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    store = AnnotationStore(tmp_path, create=True)
    store.write("a", strokes(), image=photo())
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=rf"dataset\.json: {message}") as caught:
        store.items()
    assert "\n" not in str(caught.value)


def test_an_index_that_was_edited_on_windows_is_read(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    store.write("a", strokes(), image=photo(), split="val")
    path = tmp_path / "dataset.json"
    path.write_text(path.read_text(), "utf-8-sig")
    assert store.split_of("a") == "val"


COMPOSED, APART = (unicodedata.normalize(form, "Blüte 1") for form in ("NFC", "NFD"))


def test_an_image_stays_held_out_where_a_system_spells_its_name_otherwise(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    for code in (1, 2):
        store.write(COMPOSED, strokes(code), image=photo(), split="val", painted_in="j")
    for path in [path for path in tmp_path.glob("*/*") if COMPOSED in path.name]:
        path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))
    [item] = store.items()
    assert (item.split, item.painted_in) == ("val", "j")
    assert store.has_labels_of(item.image)
    for name in (COMPOSED, APART):
        assert (store.split_of(name), store.painted_in(name)) == ("val", "j")
        np.testing.assert_array_equal(store.labels_of(name), strokes(2))
    for name, code in ((APART, 1), (COMPOSED, 2)):
        store.write(name, strokes(code), image=photo())
        [image] = read_store(tmp_path)
        assert image.split == "val"
        np.testing.assert_array_equal(image.labels, strokes(code))
    assert [len(store.previous(name)) for name in (COMPOSED, APART)] == [3, 3]
    assert list(json.loads((tmp_path / "dataset.json").read_text())["items"]) == [COMPOSED]


def test_of_a_name_in_two_spellings_the_mark_counts(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    store.write(COMPOSED, strokes(), image=photo())
    edit_index(tmp_path, APART, {"split": "val"})
    assert [image.split for image in read_store(tmp_path)] == ["val"]


def test_an_empty_or_missing_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no annotation store"):
        AnnotationStore(tmp_path / "none")
    AnnotationStore(tmp_path / "S", create=True)
    with pytest.raises(DataError, match="nothing in it is labelled yet"):
        read_store(tmp_path / "S")
    with pytest.raises(DataError, match="cannot be made: "):
        AnnotationStore(tmp_path / "a\0b", create=True)


def test_an_old_tiff_stack_with_few_columns_is_not_taken_for_colour(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    stack = np.zeros((4, 9, 11), np.uint8)
    labels = stack.copy()
    labels[0, 0, 0] = 1
    tifffile.imwrite(tmp_path / "stack.tif", stack, photometric="minisblack")
    store.write("s", labels, image=tmp_path / "stack.tif")
    assert [image.image.shape for image in read_store(tmp_path)] == [(9, 11)]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"split": "validation"}, "split: expected train or val, got 'validation'"),
        ({"split": ["val"]}, "split: expected train or val"),
        ({"plane": 3}, "plane: expected a list of whole numbers, got 3"),
        ({"axes": 5}, "axes: expected text, got 5"),
        ({"painted_in": ["j"]}, "painted_in: expected text"),
        (None, "expected a mapping, got None"),
    ],
)
def test_what_the_json_says_of_an_item_is_checked(
    tmp_path: Path, said: object, message: str
) -> None:
    store = AnnotationStore(tmp_path, create=True)
    for name in ("a", "b"):
        store.write(name, strokes(), image=photo())
    edit_index(tmp_path, "a", said)
    calls: list[Callable[[], object]] = [
        lambda: read_store(tmp_path),
        lambda: store.split_of("a"),
        lambda: store.painted_in("a"),
        lambda: store.set_split("a", "val"),
        lambda: store.write("a", strokes()),
    ]
    for call in calls:
        with pytest.raises(DataError, match=rf"dataset\.json: a: {message}"):
            call()
    rows, problems = check_store(tmp_path)
    assert [row["name"] for row in rows] == ["b"]
    assert len(problems) == 1
    assert message in problems[0]


def test_a_check_goes_on_past_items_without_their_image(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    for name in ("a", "b", "c"):
        store.write(name, strokes(), image=photo())
    next((tmp_path / "images").glob("a.*")).unlink()
    lost = next((tmp_path / "images").glob("b.*"))
    lost.unlink()
    lost.symlink_to("nowhere")
    rows, problems = check_store(tmp_path)
    assert [row["name"] for row in rows] == ["c"]
    assert len(problems) == 2


def test_a_damaged_file_of_labels_makes_no_masks_of_the_others(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    for name in ("a", "b"):
        store.write(name, strokes(), image=photo())
    (tmp_path / "dataset.json").unlink()
    path = tmp_path / "labels" / "a.png"
    path.write_bytes(path.read_bytes()[:30])
    assert is_store(tmp_path)
    with pytest.raises(SemanticBlurError, match=r"a\.png"):
        read_store(tmp_path)


def test_labels_in_colour_are_no_stack(tmp_path: Path) -> None:
    """An image of three channels and labels of three are of one shape."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    Image.fromarray(np.ones((20, 30, 3), np.uint8)).save(tmp_path / "labels" / "a.png")
    with pytest.raises(
        DataError, match=r"a\.png: a colour picture of 20 x 30 px; labels are saved"
    ):
        read_store(tmp_path)


def test_a_wrong_value_in_labels_is_told_of_and_makes_no_masks_of_them(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    wrong = np.ones((8, 9), np.uint8)
    for value in (3, 128, 255):
        wrong[0] = value
        Image.fromarray(wrong).save(tmp_path / "labels" / "b0.png")
        Image.fromarray(wrong).save(tmp_path / "images" / "b0.png")
        assert is_store(tmp_path)
        with pytest.raises(DataError, match=rf"b0\.png.*{value}"):
            read_store(tmp_path)
    Image.fromarray(np.full((8, 9), 255, np.uint8)).save(tmp_path / "labels" / "b0.png")
    assert not is_store(tmp_path)
    Image.fromarray(wrong > 1).save(tmp_path / "labels" / "b0.png")
    assert not is_store(tmp_path)
    (tmp_path / "labels" / "b0.png").unlink()
    masks = np.stack([np.zeros((8, 9), np.uint8), np.full((8, 9), 255, np.uint8)] * 3)
    tifffile.imwrite(tmp_path / "labels" / "b0.tif", masks, photometric="minisblack")
    assert not is_store(tmp_path)


def test_marks_of_what_is_not_there_are_told(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path, create=True)
    store.write("a", strokes(), image=photo())
    edit_index(tmp_path, "a.png", {"split": "val"})
    with pytest.raises(DataError, match=r"a\.png is marked val.*without extensions"):
        store.items()
    problems: list[str] = []
    assert [item.name for item in store.items(problems.append)] == ["a"]
    assert len(problems) == 1
    edit_index(tmp_path, "a.png", {"source": "somewhere"})
    assert len(store.items()) == 1
    Image.fromarray(photo()).save(tmp_path / "images" / "later.png")
    edit_index(tmp_path, "later", {"split": "val"})  # before anything of it is labelled
    store.set_split("to come", "val")
    assert len(store.items()) == 1
    Image.fromarray(photo()).save(tmp_path / "images" / "a.1.png")
    store.set_split("a.1", "val")
    store.set_split("never", None)
    assert len(store.items()) == 1
    edit_index(tmp_path, "gone", {"split": "val"})
    with pytest.raises(DataError, match=r"gone is marked val.*rename it or take it out"):
        store.items()


@pytest.mark.parametrize("colours", [[0, 0, 0, 255, 0, 0, 0, 255, 0], [0, 0, 0, 9, 9, 9, 8, 8, 8]])
def test_labels_with_a_palette_are_its_indices(tmp_path: Path, colours: list[int]) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    labels = strokes(2)
    labels[10:12] = 1
    image = Image.fromarray(labels, mode="P")
    image.putpalette(colours)
    image.save(tmp_path / "labels" / "a.png")
    Image.fromarray(photo()).save(tmp_path / "images" / "a.png")
    assert is_store(tmp_path)
    [item] = read_store(tmp_path)
    assert np.array_equal(item.labels, labels)
