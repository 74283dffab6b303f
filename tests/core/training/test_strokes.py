"""Labels on a few images: what is held out, and what the network is shown of them."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semanticblur_core.config import FinetuneConfig
from semanticblur_core.data.labels import LabelledImage
from semanticblur_core.errors import DataError
from semanticblur_core.training.strokes import (
    augmented_views,
    hold_out,
    plain_views,
    reduce_labels,
)


def painted(seed: int, n_strokes: int = 6, split: str | None = None) -> LabelledImage:
    rng = np.random.default_rng(seed)
    labels = np.zeros((80, 100), np.uint8)
    for i in range(n_strokes):
        labels[4 + i * 12 : 8 + i * 12, 5:60] = 1 + i % 2
    image = rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)
    return LabelledImage(f"image{seed}", image, labels, split=split)  # type: ignore[arg-type]


@given(seed=st.integers(0, 50), share=st.floats(0.05, 0.9), n=st.integers(1, 10))
def test_training_and_held_out_labels_part_what_was_painted(
    seed: int, share: float, n: int
) -> None:
    images = [painted(i) for i in range(n)]
    split = hold_out(images, share, np.random.default_rng(seed))
    for image, training, held_out in zip(images, split.training, split.held_out, strict=True):
        assert not ((training > 0) & (held_out > 0)).any()
        np.testing.assert_array_equal(training + held_out, image.labels)
    for part in (split.training, split.held_out):
        assert all(any((labels == code).any() for labels in part) for code in (1, 2))


def test_strokes_are_held_out_whole() -> None:
    images = [painted(0, n_strokes=6)]
    split = hold_out(images, 0.3, np.random.default_rng(0))
    assert split.how == "strokes: 1 of 3 sharp, 1 of 3 blurred"
    rows = [set(np.unique(split.held_out[0][4 + i * 12])) - {0} for i in range(6)]
    assert sum(bool(row) for row in rows) == 2


def test_images_marked_for_validation_are_held_out_and_nothing_else() -> None:
    images = [painted(0), painted(1, split="val"), painted(2, split="train")]
    split = hold_out(images, 0.25, np.random.default_rng(0))
    assert [bool(labels.any()) for labels in split.held_out] == [False, True, False]
    assert split.how == "1 images marked for validation"


def test_images_marked_for_validation_are_never_learned_from() -> None:
    sharp_only = painted(0)
    sharp_only.labels[sharp_only.labels == 2] = 0
    images = [sharp_only, painted(1, split="val")]
    with pytest.raises(
        DataError, match=r"nothing is labelled blurred \(2\) in the images that are"
    ):
        hold_out(images, 0.25, np.random.default_rng(0))


def test_planes_of_one_stack_are_held_out_together() -> None:
    """A neighbour of a plane that was trained on tells little about other stacks."""
    images = [
        dataclasses.replace(painted(10 * i + z), name=f"s{i}[{z}]")
        for i in range(8)
        for z in (0, 1)
    ]
    split = hold_out(images, 0.25, np.random.default_rng(0))
    assert split.how == "4 of 16 images"
    is_held_out = np.array([bool(labels.any()) for labels in split.held_out]).reshape(8, 2)
    assert (is_held_out[:, 0] == is_held_out[:, 1]).all()
    split = hold_out(images[:8], 0.25, np.random.default_rng(0))
    assert split.how is not None
    assert split.how.startswith("strokes")


def test_whole_images_held_out_hold_both_classes() -> None:
    images = [painted(i, n_strokes=4) for i in range(10)]
    for i, image in enumerate(images[:8]):
        image.labels[image.labels == 1 + i % 2] = 0
    for seed in range(20):
        split = hold_out(images, 0.2, np.random.default_rng(seed))
        assert split.has_both
        assert any((labels == 1).any() for labels in split.training)


def test_of_a_single_stroke_one_end_is_held_out() -> None:
    """By one class alone, a model that calls everything so would look best."""
    images = [painted(0, n_strokes=2)]
    images[0].labels[70:74, 5:60] = 2
    split = hold_out(images, 0.25, np.random.default_rng(0))
    assert split.how == "strokes: 1 of 4 sharp, 1 of 2 blurred"
    assert split.has_both
    sharp = np.flatnonzero((split.held_out[0] == 1).any(axis=0))
    assert 12 <= sharp.size <= 15
    assert np.ptp(sharp) + 1 == sharp.size
    ends = set()
    for seed in range(20):
        split = hold_out(images, 0.25, np.random.default_rng(seed))
        columns = np.flatnonzero((split.held_out[0] == 1).any(axis=0))
        ends.add("first" if columns[0] == 5 else "last" if columns[-1] == 59 else "neither")
    assert ends == {"first", "last"}


def test_where_a_class_has_but_a_dot_nothing_is_held_out() -> None:
    labels = painted(0).labels
    labels[labels == 1] = 0
    labels[1, 1] = 1
    image = LabelledImage("dot", painted(0).image, labels)
    split = hold_out([image], 0.25, np.random.default_rng(0))
    assert split.how is None
    assert not split.held_out[0].any()
    np.testing.assert_array_equal(split.training[0], labels)


@pytest.mark.parametrize(("n_images", "n_made"), [(3, 30), (60, 60), (200, 120)])
def test_all_images_are_learned_from(n_images: int, n_made: int) -> None:
    images = [painted(i) for i in range(n_images)]
    split = hold_out(images, 0.0, np.random.default_rng(0))
    plain = plain_views(images, split, 64, FinetuneConfig(image_size_px=64))
    made = augmented_views(plain, 30, crops=True, rng=np.random.default_rng(0))
    assert len(made) == n_made
    counts = np.bincount([view.of for view in made], minlength=n_images)
    assert counts.max() - counts.min() <= 1


def test_windows_of_one_image_do_not_crowd_out_the_others() -> None:
    large = LabelledImage("large", np.zeros((480, 480), np.uint8), np.ones((480, 480), np.uint8))
    images = [large, painted(1), painted(2)]
    split = hold_out(images, 0.0, np.random.default_rng(0))
    plain = plain_views(images, split, "native", FinetuneConfig(image_size_px=48))
    assert len(plain) > 100
    made = augmented_views(plain, 10, crops=False, rng=np.random.default_rng(0))
    assert {view.of for view in made[:3]} == {0, 1, 2}


def test_strokes_that_vanish_are_said_to_be_too_thin() -> None:
    labels = np.zeros((2400, 2400), np.uint8)
    labels[100:500:50, 100:2000:50] = 1
    labels[1000:1400] = 2
    image = LabelledImage("wide", np.zeros((2400, 2400), np.uint8), labels)
    split = hold_out([image], 0.25, np.random.default_rng(0))
    with pytest.raises(DataError, match="thinner than a pixel where the images are squashed to 64"):
        plain_views([image], split, 64, FinetuneConfig(image_size_px=64))


def test_a_wholly_labelled_image_is_cut_into_pieces() -> None:
    labels = np.ones((80, 80), np.uint8)
    labels[:, 40:] = 2
    image = LabelledImage("whole", np.zeros((80, 80), np.uint8), labels)
    split = hold_out([image], 0.25, np.random.default_rng(0))
    assert split.how == "strokes: 8 of 32 sharp, 8 of 32 blurred"
    assert (split.held_out[0] > 0).mean() == pytest.approx(0.25)


def test_thin_strokes_survive_reduction_and_keep_their_class() -> None:
    labels = np.zeros((400, 400), np.uint8)
    labels[100:103] = 1
    labels[300:303] = 2
    small = reduce_labels(labels, 100)
    assert (small[25] == 1).all()
    assert (small[75] == 2).all()
    assert set(np.unique(small)) == {0, 1, 2}
    assert not (small[:50] == 2).any()
    assert not (small[50:] == 1).any()


def test_views_at_native_size_cover_every_label() -> None:
    image = painted(3)
    split = hold_out([image], 0.25, np.random.default_rng(0))
    views = plain_views([image], split, "native", FinetuneConfig(image_size_px=48))
    assert {tuple(view.image.shape) for view in views} == {(3, 48, 48)}
    n_seen = sum(int((view.training > 0).sum()) for view in views)
    assert n_seen >= (split.training[0] > 0).sum()
    with pytest.raises(DataError, match="80 x 100 px is less than the 96 x 96 px"):
        plain_views([image], split, "native", FinetuneConfig(image_size_px=96))


@given(seed=st.integers(0, 200))
def test_augmented_views_keep_label_and_pixel_together(seed: int) -> None:
    """Where the picture shows class 2 in white and class 1 in black, so does every view."""
    labels = np.zeros((64, 64), np.uint8)
    labels[8:24, 8:56], labels[40:60, 20:40] = 1, 2
    image = np.full((64, 64), 128, np.uint8)
    image[labels == 1], image[labels == 2] = 0, 255
    example = LabelledImage("x", image, labels, split="train")
    split = hold_out([example], 0.0, np.random.default_rng(0))
    plain = plain_views([example], split, 64, FinetuneConfig(image_size_px=64))
    [view] = augmented_views(plain, 1, crops=True, rng=np.random.default_rng(seed))
    grey = view.image.mean(dim=0)
    inside = [
        -torch.nn.functional.max_pool2d(-(view.training == code).float()[None], 5, 1, 2)[0] > 0
        for code in (1, 2)
    ]
    assert (grey[inside[0]] < 0.1).all()
    assert (grey[inside[1]] > 0.8).all()


@pytest.mark.parametrize("width", [700, 1280, 6400])
def test_a_stroke_of_one_pixel_survives_reduction_from_any_size(width: int) -> None:
    labels = np.zeros((200, width), np.uint8)
    for column in (101, 202, 303, 404, 505, 606):
        labels[:, column] = 1
    assert (reduce_labels(labels, 320) == 1).any(axis=0).sum() >= 6


def test_images_marked_for_validation_need_labels() -> None:
    blank = np.zeros((80, 100), np.uint8)
    images = [painted(0), dataclasses.replace(painted(1), labels=blank, split="val")]
    with pytest.raises(DataError, match="nothing is labelled in the 1 images marked for validat"):
        hold_out(images, 0.25, np.random.default_rng(0))
