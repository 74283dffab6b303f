"""Painted layers come into a store, and what it holds from before stays."""

from pathlib import Path

import numpy as np
import pytest
from napari.components import ViewerModel

from napari_semanticblur._painted import annotated_layers, save_layers
from semanticblur_core.data.store import AnnotationStore
from semanticblur_core.errors import DataError


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
