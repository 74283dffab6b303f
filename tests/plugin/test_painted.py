"""Painted layers come into a store, and what it holds from before stays."""

import threading
import time
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from napari.components import ViewerModel

from napari_semanticblur._annotation import Annotation
from napari_semanticblur._painted import annotated_layers, save_layers
from semanticblur_core.data.autosave import user_journals
from semanticblur_core.data.journal import find_leftovers
from semanticblur_core.data.store import AnnotationStore, read_store
from semanticblur_core.errors import DataError, ImageError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def annotated(image: np.ndarray, *, name: str = "cells", **how: Any) -> Annotation:
    viewer = ViewerModel()
    return Annotation(viewer, viewer.add_image(image, name=name), **how)


def close(*annotations: Annotation) -> None:
    for annotation in annotations:
        annotation.close()
        annotation.wait()


def cells(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 9999, (40, 50), np.uint16)


def test_labels_held_from_before_stay_until_the_layer_itself_erases_its_own(
    tmp_path: Path,
) -> None:
    image = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50)
    store = AnnotationStore(tmp_path / "S", create=True)
    held = np.zeros((40, 50), np.uint8)
    held[:10] = 1
    store.write("cells", held, image=image)
    viewer = ViewerModel()
    viewer.add_image(image, name="cells")
    labels = viewer.add_labels(np.zeros((40, 50), np.uint8), name="cells strokes")
    labels.data[5:20, 10:20] = 2
    [painted] = annotated_layers(viewer)
    assert save_layers([painted], store.folder, tmp_path / "other") == store.folder
    expected = np.where(labels.data == 0, held, labels.data)
    np.testing.assert_array_equal(store.labels_of("cells"), expected)
    # A stroke that is erased after it was saved does not come back.
    labels.data[:] = expected
    labels.data[15:20] = 0
    save_layers([painted], store.folder, tmp_path / "other")
    np.testing.assert_array_equal(store.labels_of("cells"), labels.data)
    assert len(store.previous("cells")) == 2


def test_another_image_of_the_name_gets_a_name_of_its_own_and_other_errors_are_told(
    tmp_path: Path,
) -> None:
    store = AnnotationStore(tmp_path / "S", create=True)
    strokes = np.ones((40, 50), np.uint8)
    store.write("cells", strokes, image=np.zeros((40, 50), np.uint8))
    viewer = ViewerModel()
    viewer.add_image(np.ones((40, 50), np.uint8), name="cells")
    viewer.add_labels(strokes * 2, name="cells strokes")
    save_layers(annotated_layers(viewer), store.folder, tmp_path)
    assert sorted(item.name for item in store.items()) == ["cells", "cells 2"]
    (store.folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        save_layers(annotated_layers(viewer), store.folder, tmp_path)
    assert sorted(path.stem for path in (store.folder / "labels").iterdir()) == ["cells", "cells 2"]


def test_strokes_of_others_stay_however_often_a_layer_is_saved(tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path / "S", create=True)
    held = np.zeros((40, 50), np.uint8)
    held[:10] = 1
    store.write("cells", held, image=cells())
    viewer = ViewerModel()
    viewer.add_image(cells(), name="cells")
    labels = viewer.add_labels(np.zeros((40, 50), np.uint8), name="cells strokes")
    labels.data[20:30] = 2
    for _ in range(3):
        save_layers(annotated_layers(viewer), store.folder, tmp_path)
        np.testing.assert_array_equal(store.labels_of("cells"), held + labels.data)


@pytest.mark.parametrize("has_store", [False, True])
def test_an_image_that_is_held_out_is_so_in_every_store(tmp_path: Path, has_store: bool) -> None:
    annotation = annotated(cells(), store=tmp_path / "own" if has_store else None)
    annotation.layer.data[:5] = 1
    viewer, target = annotation.viewer, tmp_path / "target" if has_store else None
    for on, split in ((True, "val"), (False, None)):
        annotation.hold_out(on)
        folder = save_layers(annotated_layers(viewer), target, tmp_path / "fallback")
        assert [plane.split for plane in read_store(folder)] == [split]
    close(annotation)


def test_labels_that_may_be_older_than_saved_ones_are_refused(tmp_path: Path) -> None:
    store = tmp_path / "S"
    first = annotated(cells(), store=store)
    first.layer.data[:5] = 1
    save_layers(annotated_layers(first.viewer), None, tmp_path / "fallback")
    second = annotated(cells(), store=store)
    first.layer.data[:5], first.layer.data[20:30] = 2, 1
    save_layers(annotated_layers(first.viewer), None, tmp_path / "fallback")
    assert not annotated_layers(second.viewer)[0].is_annotation  # not chosen by itself
    for target in (None, store, tmp_path / "other"):
        with pytest.raises(DataError, match="cells annotation: is read-only here"):
            save_layers(annotated_layers(second.viewer), target, tmp_path / "fallback")
    np.testing.assert_array_equal(AnnotationStore(store).labels_of("cells"), first.layer.data)
    close(second, first)


def test_what_somebody_is_annotating_is_left_to_them(tmp_path: Path) -> None:
    store = tmp_path / "S"
    annotation = annotated(cells(), store=store)
    annotation.layer.data[:5] = 1
    save_layers(annotated_layers(annotation.viewer), None, tmp_path)
    viewer = ViewerModel()
    viewer.add_image(cells(), name="cells")
    viewer.add_labels(np.full((40, 50), 2, np.uint8), name="cells strokes")
    with pytest.raises(DataError, match=r"cells strokes: not saved in .*is being annotated by"):
        save_layers(annotated_layers(viewer), store, tmp_path)
    close(annotation)
    save_layers(annotated_layers(viewer), store, tmp_path)
    [plane] = read_store(store)
    assert (plane.labels == 2).all()
    assert not (store / "journal" / "cells").exists()


def test_a_save_that_is_under_way_does_not_end_up_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotation = annotated(cells(), store=tmp_path / "S")
    begun, saved, write = threading.Event(), threading.Event(), AnnotationStore.write

    def slow(*args: Any, **keywords: Any) -> Any:
        begun.set()
        if threading.current_thread() is tuning:
            assert saved.wait(10)
        return write(*args, **keywords)

    monkeypatch.setattr(AnnotationStore, "write", slow)
    layers = annotated_layers(annotation.viewer)
    tuning = threading.Thread(target=save_layers, args=(layers, None, tmp_path / "fallback"))
    annotation.layer.data[:5] = 1
    tuning.start()
    assert begun.wait(10)
    annotation.layer.data[20:30] = 2
    annotation.poll()
    annotation.save()
    while annotation.take_outcome() is None:
        time.sleep(0.01)
    saved.set()
    tuning.join()
    held = AnnotationStore(tmp_path / "S").labels_of("cells")
    np.testing.assert_array_equal(held, annotation.layer.data)
    close(annotation)


def test_a_stroke_that_is_erased_in_a_later_session_does_not_come_back(tmp_path: Path) -> None:
    first = annotated(cells())
    first.layer.data[:5], first.layer.data[20:30] = 1, 2
    first.poll()
    store = save_layers(annotated_layers(first.viewer), None, tmp_path / "my model")
    close(first)
    [leftover] = find_leftovers(user_journals())[0]
    second = annotated(cells(), leftover=leftover)
    second.layer.data[20:30] = 0
    assert save_layers(annotated_layers(second.viewer), None, tmp_path / "my model") == store
    np.testing.assert_array_equal(AnnotationStore(store).labels_of("cells"), second.layer.data)
    close(second)


def test_strokes_on_other_images_are_not_learned_from_unasked(tmp_path: Path) -> None:
    fallback = tmp_path / "my model"
    one, other = annotated(cells(1)), annotated(cells(2))
    both = [annotated_layers(each.viewer)[0] for each in (one, other)]
    for each in (one, other):
        each.layer.data[:5] = 1
    folders = [save_layers(chosen, None, fallback) for chosen in (both[:1], both[1:], both[:1])]
    assert folders == [fallback, tmp_path / "my model 2", fallback]
    assert len(read_store(fallback)) == 1
    # More images beside those that are there are added.
    assert save_layers(both, None, fallback) == fallback
    assert len(read_store(fallback)) == 2
    close(one, other)


def test_labels_go_to_the_image_that_they_are_named_after_or_lie_on() -> None:
    viewer = ViewerModel()
    for name in ("img1", "img10"):
        viewer.add_image(cells(), name=name)
    viewer.add_labels(np.zeros((40, 50), np.uint8), name="img10 - Labels")
    viewer.add_labels(np.zeros((40, 50), np.uint8), name="Labels")
    viewer.add_image(cells(), name="above")
    found = {one.labels.name: one.source.layer.name for one in annotated_layers(viewer)}
    assert found == {"img10 - Labels": "img10", "Labels": "img10"}


def test_labels_are_not_saved_beside_data_that_came_later(tmp_path: Path) -> None:
    annotation = annotated(cells(), store=tmp_path / "S")
    annotation.layer.data[:5] = 1
    assert annotation.image is not None
    annotation.image.data = cells(1)
    for store in (None, tmp_path / "other"):
        with pytest.raises(DataError, match="cells: has other data than cells annotation was"):
            save_layers(annotated_layers(annotation.viewer), store, tmp_path / "fallback")
    annotation.image.data = cells()
    save_layers(annotated_layers(annotation.viewer), None, tmp_path / "fallback")
    [plane] = read_store(tmp_path / "S")
    np.testing.assert_array_equal(plane.image, cells())
    close(annotation)


def test_pixels_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    class CodecError(Exception):
        pass

    is_broken = False

    def plane(block_info: Any = None) -> np.ndarray:
        if is_broken:
            raise CodecError("decoder broke\nat length")
        return np.zeros((1, 40, 50), np.uint8)

    viewer = ViewerModel()
    array = da.map_blocks(plane, chunks=((1,) * 3, (40,), (50,)), dtype=np.uint8)
    viewer.add_image(array, name="lazy", contrast_limits=(0, 255))
    viewer.add_labels(np.ones((3, 40, 50), np.uint8), name="lazy strokes")
    is_broken = True
    with pytest.raises(ImageError, match=r"^lazy: cannot be read: decoder broke$"):
        save_layers(annotated_layers(viewer), None, tmp_path / "fallback")
