"""`Detector`: any image in, a map of its size in 0..1 out, by the protocol it names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import chelsea
from torch.nn import functional as F

from semanticblur_core import Detector
from semanticblur_core.config import ModelConfig
from semanticblur_core.errors import ConfigError, ImageError
from semanticblur_core.inference.upsampling import to_logits
from semanticblur_core.network import SemanticBlur


@pytest.fixture(scope="module")
def network() -> SemanticBlur:
    torch.manual_seed(1)
    model = SemanticBlur(ModelConfig(backbone="resnet34"))
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.fixture(scope="module")
def detector(network: SemanticBlur) -> Detector:
    return Detector(network, device="cpu", precision="float32")


def test_the_protocol_is_squash_sigmoid_nearest_exact(
    network: SemanticBlur, detector: Detector, rng: np.random.Generator
) -> None:
    image = rng.integers(0, 256, (90, 131, 3), dtype=np.uint8)
    small = Image.fromarray(image).resize((320, 320), Image.Resampling.BILINEAR)
    x = torch.from_numpy(np.asarray(small, np.float32) / 255).permute(2, 0, 1)[None]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.inference_mode():
        expected = torch.sigmoid(network((x - mean) / std))
        expected = F.interpolate(expected, size=(90, 131), mode="nearest-exact")[0, 0].numpy()
    got = detector.detect(image, upsampling="nearest-exact")
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(
    "shape", [(50, 70), (50, 70, 3), (50, 70, 4), (40, 300), (7, 5), (1, 1, 3)]
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "bool"])
def test_any_image_gives_a_map_of_its_size(
    detector: Detector, rng: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> None:
    image = (rng.random(shape) * 200).astype(dtype)
    blur = detector.detect(image, size=64)
    assert blur.shape == shape[:2]
    assert blur.dtype == np.float32
    assert 0 <= blur.min() <= blur.max() <= 1


def test_a_batch_gives_what_single_images_give(
    detector: Detector, rng: np.random.Generator
) -> None:
    images = [rng.integers(0, 256, (h, 60, 3), dtype=np.uint8) for h in (40, 50, 50)]
    for size in (64, "native"):
        together = detector.detect_batch(images, size=size)
        for image, blur in zip(images, together, strict=True):
            np.testing.assert_allclose(blur, detector.detect(image, size=size), atol=1e-4)


def test_native_size_analyses_the_pixels_as_they_are(
    network: SemanticBlur, detector: Detector, rng: np.random.Generator
) -> None:
    image = rng.integers(0, 256, (41, 77, 3), dtype=np.uint8)
    native = detector.detect(image, size="native")
    assert native.shape == (41, 77)
    assert np.abs(native - detector.detect(image, size=320)).max() > 1e-3
    with pytest.raises(ImageError, match="at least 33 x 33 px, got 20 x 77"):
        detector.detect(image[:20], size="native")


def test_grey_is_repeated_and_range_is_honoured(
    detector: Detector, rng: np.random.Generator
) -> None:
    grey = rng.integers(0, 256, (60, 60), dtype=np.uint8)
    expected = detector.detect(np.dstack([grey] * 3), size=64)
    np.testing.assert_allclose(detector.detect(grey, size=64), expected, atol=1e-5)
    deep = grey.astype(np.float64) * 4
    scaled = detector.detect(deep, size=64, value_range=(0, 1020))
    np.testing.assert_allclose(scaled, expected, atol=0.02)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 40, 40), np.uint8), r"got shape \(5, 40, 40\)"),
        (np.zeros((40, 40, 5), np.uint8), r"got shape \(40, 40, 5\)"),
        (np.zeros((0, 40), np.uint8), "no pixels"),
        (np.full((40, 40), np.nan), "no finite value"),
        (None, "expected an array"),
        ([[1, 2], [3]], "expected an array"),
        ("photo.jpg", "got str; `detect_files` reads files"),
    ],
)
def test_what_is_no_image_is_refused(detector: Detector, image: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        detector.detect(image)


def test_wrong_settings_are_refused(network: SemanticBlur, detector: Detector) -> None:
    with pytest.raises(ConfigError, match="at least 33 px or native, got 16"):
        detector.detect(np.zeros((40, 40), np.uint8), size=16)
    with pytest.raises(ConfigError, match="device 'abacus'"):
        Detector(network, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no such GPU"):
            Detector(network, device="cuda")
    with pytest.raises(ConfigError, match="precision 'float8'"):
        Detector(network, precision="float8")
    wrong: Any
    for wrong in (320.5, "320", None):
        with pytest.raises(ConfigError, match="expected a whole number of pixels or native"):
            detector.detect(np.zeros((40, 40), np.uint8), size=wrong)
    for wrong, message in (
        ({"batch_size": -1}, "batch_size: expected 1 or more"),
        ({"upsampling": "cubic"}, "upsampling 'cubic': expected one of guided"),
        ({"scales": 1}, "scales: expected a sequence of numbers"),
        ({"scales": "12"}, "scales: expected a sequence of numbers"),
        ({"scales": [None]}, "scales: expected a sequence of numbers"),
        ({"n_images": -1}, "n_images: expected a number from 0, got -1"),
        ({"n_images": float("nan")}, "n_images: expected a number from 0, got nan"),
        ({"device": None}, "device: expected auto, cpu, cuda or mps, got None"),
        ({"flip": "no"}, "flip: expected True or False, got 'no'"),
        ({"flip": 1}, "flip: expected True or False, got 1"),
        ({"model": None}, "expected a name, a file or a SemanticBlur network"),
    ):
        with pytest.raises(ConfigError, match=message):
            Detector(**{"model": network, **wrong})
    for call in (
        detector.detect,
        lambda image, size: list(detector.iter_planes(image, "YX", size=size)),
    ):
        with pytest.raises(ConfigError, match="at most 4096 px, got 100000; native works in tiles"):
            call(np.zeros((40, 40), np.uint8), size=100_000)
    with pytest.raises(ConfigError, match="at most 4096 px, got 2000 times 3;"):
        Detector(network, device="cpu", scales=(1, 3)).detect(np.zeros((40, 40)), size=2000)
    with pytest.raises(ConfigError, match="upsampling 'cubic'"):
        detector.detect(np.zeros((40, 40), np.uint8), upsampling="cubic")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="upsampling 'cubic'"):
        list(detector.iter_planes(np.zeros((40, 40)), "YX", upsampling="cubic"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="upsampling"):
        detector.detect(np.zeros((40, 40), np.uint8), size="native", upsampling="cubic")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="expected two numbers"):
        detector.detect(np.zeros((40, 40)), value_range=(0, 1, 2))  # type: ignore[arg-type]


def test_a_number_is_the_plane_of_one_axis(detector: Detector, rng: np.random.Generator) -> None:
    stack = rng.integers(0, 256, (4, 40, 50), dtype=np.uint8)
    updates = list(detector.iter_planes(stack, "ZYX", indices=[3, np.int64(1), (0,)], size=64))
    assert [update.index for update in updates] == [(3,), (1,), (0,)]
    np.testing.assert_array_equal(updates[0].blur, detector.detect(stack[3], size=64))
    with pytest.raises(
        ImageError, match=r"plane \(3,\): expected an index within \(2, 2\) along TZ"
    ):
        list(detector.iter_planes(stack.reshape(2, 2, 40, 50), "TZYX", indices=[3], size=64))


def test_lists_and_paths_are_taken(random_weights: Path) -> None:
    detector = Detector(random_weights, device="cpu", precision="float32")
    assert detector.name == str(random_weights)
    image = np.arange(1600, dtype=np.uint8).reshape(40, 40)
    assert detector.detect_batch([]) == []
    assert Detector(random_weights, device="cpu", batch_size=np.int64(4)).batch_size == 4
    assert Detector(random_weights, device="cpu", scales=np.array([1.0])).scales == (1.0,)
    expected = detector.detect(image.astype(np.int64), size=64)
    np.testing.assert_array_equal(
        detector.detect(image.astype(np.int64).tolist(), size=64), expected
    )


@pytest.mark.parametrize("mode", ["P", "CMYK", "YCbCr", "HSV", "LA"])
def test_pictures_of_pillow_mean_what_they_show(detector: Detector, mode: str) -> None:
    picture = Image.fromarray(chelsea())
    if mode == "LA":
        shown = picture.convert("L")
        given = shown.convert("LA")
    else:
        given = picture.convert(mode)
        shown = given.convert("RGB")
    expected = detector.detect(np.asarray(shown), size=64)
    np.testing.assert_array_equal(detector.detect(given, size=64), expected)  # type: ignore[arg-type]


def test_pictures_of_sixteen_bits_keep_them(detector: Detector) -> None:
    levels = np.linspace(0, 60_000, 1600).astype(np.uint16).reshape(40, 40)
    picture = Image.fromarray(levels)
    assert picture.mode.startswith("I;16")
    expected = detector.detect(levels, size=64)
    np.testing.assert_array_equal(detector.detect(picture, size=64), expected)  # type: ignore[arg-type]


def test_a_detector_says_why_it_runs_where_it_runs(network: SemanticBlur) -> None:
    assert "as asked" in Detector(network, device="cpu", precision="float32").reason
    assert Detector(network, precision="bfloat16").precision == "bfloat16"


def test_flipping_makes_the_map_of_the_mirrored_image_the_mirrored_map(
    random_weights: Path, rng: np.random.Generator
) -> None:
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    detector = Detector(str(random_weights), device="cpu", precision="float32", flip=True)
    plain = Detector(str(random_weights), device="cpu", precision="float32")
    there, back = (detector.detect(x, size=64) for x in (image, image[:, ::-1]))
    np.testing.assert_allclose(there, back[:, ::-1], atol=1e-5)
    both = plain.detect(image, size=64), plain.detect(image[:, ::-1], size=64)[:, ::-1]
    np.testing.assert_allclose(there, (both[0] + both[1]) / 2, atol=1e-5)


def test_scales_average_logits(network: SemanticBlur, rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (50, 60, 3), np.uint8)
    both = Detector(network, device="cpu", precision="float32", scales=(1, 1.5))
    one = Detector(network, device="cpu", precision="float32")
    # An image no larger than the square, so that its map is resized bilinearly.
    parts = [to_logits(one.detect(image, size=size)) for size in (64, 96)]
    expected = 1 / (1 + np.exp(-np.mean(parts, axis=0)))
    np.testing.assert_allclose(both.detect(image, size=64), expected, atol=0.02)
    with pytest.raises(ConfigError, match="only for images squashed"):
        both.detect(image, size="native")
    with pytest.raises(ConfigError, match=r"scales: expected a sequence of numbers"):
        Detector(network, device="cpu", scales=())
