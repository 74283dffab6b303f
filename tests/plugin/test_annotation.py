"""One annotation, its journal and its store, without a window."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from napari.components import ViewerModel

from napari_semanticblur._annotation import Annotation, Outcome
from napari_semanticblur._layers import METADATA_KEY
from semanticblur_core.data.autosave import Autosave
from semanticblur_core.data.store import AnnotationStore, read_store
from semanticblur_core.errors import DataError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path / "home"))


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 9999, (60, 70), np.uint16)


@pytest.fixture
def annotate() -> Iterator[Any]:
    begun = []

    def begin(image: np.ndarray, store: Path | None, name: str = "img") -> Annotation:
        viewer = ViewerModel()
        begun.append(Annotation(viewer, viewer.add_image(image, name=name), store=store))
        return begun[-1]

    yield begin
    for annotation in begun:
        close(annotation)


def close(annotation: Annotation) -> None:
    annotation.close()
    annotation.wait()


def outcome(annotation: Annotation) -> Outcome:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        found = annotation.take_outcome()
        if found is not None:
            return found
        time.sleep(0.01)
    raise TimeoutError


def save(annotation: Annotation) -> None:
    annotation.poll()
    annotation.save()
    assert outcome(annotation) == Outcome("", is_saved=True)


def test_a_second_viewer_with_another_image_of_the_name_takes_over_nothing(
    annotate: Any, tmp_path: Path
) -> None:
    store = tmp_path / "S"
    first = annotate(picture(1), store)
    second = annotate(picture(2), store)  # nothing tells them apart in the store yet
    assert second.is_read_only
    first.layer.data[5:10] = 1
    first.hold_out(True)
    assert outcome(first) == Outcome("", is_saved=False)
    save(first)
    close(first)
    second.poll()
    assert not second.is_read_only
    assert second.name == "img 2"
    assert second.layer.metadata[METADATA_KEY]["name"] == "img 2"
    assert second.split is None
    assert not second.layer.data.any()
    second.layer.data[30:40] = 2
    save(second)
    one, other = sorted(read_store(store), key=lambda each: each.name)
    np.testing.assert_array_equal(one.image, picture(1))
    np.testing.assert_array_equal(other.image, picture(2))
    assert [np.unique(each.labels).tolist() for each in (one, other)] == [[0, 1], [0, 2]]


def test_a_second_viewer_with_the_same_image_goes_on_from_what_was_saved(
    annotate: Any, tmp_path: Path
) -> None:
    first = annotate(picture(), tmp_path / "S")
    second = annotate(picture(), tmp_path / "S")
    with pytest.raises(DataError, match="read-only"):
        second.hold_out(True)
    first.layer.data[5:10] = 1
    first.hold_out(True)
    outcome(first)
    save(first)
    painted = first.layer.data.copy()
    close(first)
    second.poll()
    assert (second.name, second.split, second.is_read_only) == ("img", "val", False)
    np.testing.assert_array_equal(second.layer.data, painted)


def test_labels_are_not_saved_beside_another_image(annotate: Any, tmp_path: Path) -> None:
    annotation = annotate(picture(), tmp_path / "S")
    annotation.layer.data[5:10] = 1
    save(annotation)
    saved = annotation.layer.data.copy()
    [file] = (tmp_path / "S" / "images").iterdir()
    tifffile.imwrite(file, picture(3))
    annotation.layer.data[20:30] = 2
    annotation.poll()
    annotation.save()
    problem = outcome(annotation).problem
    assert problem.startswith(f"{file}: is not the image that img shows")
    np.testing.assert_array_equal(AnnotationStore(tmp_path / "S").labels_of("img"), saved)
    assert annotation.autosave is not None
    assert annotation.autosave.has_unsaved


@pytest.mark.parametrize("first_is_flat", [False, True])
def test_an_axis_of_length_one_makes_no_other_image(
    annotate: Any, tmp_path: Path, first_is_flat: bool
) -> None:
    forms = [picture(), picture()[None]]
    for image, rows in zip(forms if first_is_flat else forms[::-1], (5, 30), strict=True):
        annotation = annotate(image, tmp_path / "S")
        annotation.layer.data[..., rows : rows + 5, :] = 1
        save(annotation)
        close(annotation)
    [plane] = read_store(tmp_path / "S")
    assert (plane.name, plane.labels.sum()) == ("img", 10 * 70)


def test_holding_out_saves_no_labels_and_keeps_what_was_recovered_apart(
    annotate: Any, tmp_path: Path
) -> None:
    store = AnnotationStore(tmp_path / "S", create=True)
    left = Autosave(store.folder / "journal" / "img", np.zeros((60, 70), np.uint8), name="img")
    left.labels[5:9, 5:30] = 1
    left.finish_looking()
    left.close()
    annotation = annotate(picture(), store.folder)
    annotation.hold_out(True)
    assert outcome(annotation) == Outcome("", is_saved=False)
    assert annotation.n_recovered == 1
    assert (store.labels_of("img"), store.split_of("img")) == (None, "val")
    annotation.poll()
    annotation.save()
    annotation.hold_out(False)  # while it saves: both are told
    assert outcome(annotation) == Outcome("", is_saved=True)
    assert annotation.n_recovered == 0
    assert store.split_of("img") is None
