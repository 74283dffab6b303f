"""Foreign networks as ONNX files."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from semanticblur_core.errors import WeightsError
from semanticblur_core.inference.onnx import OnnxDetector


def save(path: Path, *, channels: int = 3, size: object = "S", outputs: int = 1) -> Path:
    """A network whose map is the mean of its input's channels."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", channels, size, size])
    maps = [
        helper.make_tensor_value_info(f"map{i}", TensorProto.FLOAT, ["N", 1, size, size])
        for i in range(outputs)
    ]
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    nodes = [helper.make_node("ReduceMean", ["image", "axes"], [m.name], keepdims=1) for m in maps]
    graph = helper.make_graph(nodes, "mean", [image], maps, [axes])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def test_map_of_an_image(tmp_path: Path) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = 255
    detector = OnnxDetector(save(tmp_path / "m.onnx", size=32), input_scale="unit")
    assert (detector.height_px, detector.width_px) == (32, 32)
    assert OnnxDetector(str(tmp_path / "m.onnx")).path == tmp_path / "m.onnx"
    blur = detector.detect(image)
    assert (blur.shape, blur.dtype) == ((32, 32), np.float32)
    assert (blur[:, :14] == 0).all()
    assert blur[:, 18:] == pytest.approx(1)
    grey = OnnxDetector(save(tmp_path / "g.onnx", channels=1), input_scale="unit")
    assert grey.detect(image[..., 0]).shape == (320, 320)


def test_logits_and_scales(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", size=8)
    image = np.full((8, 8, 3), 255, np.uint8)
    unit = OnnxDetector(path, input_scale="unit", output_kind="logits").detect(image)
    assert unit == pytest.approx(1 / (1 + np.exp(-1)))
    normalised = OnnxDetector(path, output_kind="logits").detect(image)
    white = np.mean([(1 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))])
    assert normalised == pytest.approx(1 / (1 + np.exp(-white)))
    with pytest.raises(WeightsError, match=r"reaches from 255 to 255; if these are logits"):
        OnnxDetector(path, input_scale="255").detect(image)


def test_what_is_not_such_a_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        OnnxDetector(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="not a readable ONNX network"):
        OnnxDetector(tmp_path / "bad.onnx")
    with pytest.raises(WeightsError, match=r"expected one input of shape"):
        OnnxDetector(save(tmp_path / "five.onnx", channels=5))
    two = save(tmp_path / "two.onnx", outputs=2)
    with pytest.raises(WeightsError, match="several outputs, name one: map0, map1"):
        OnnxDetector(two)
    assert OnnxDetector(two, output="map1", input_scale="unit").detect(np.zeros((9, 9))).max() == 0
    with pytest.raises(WeightsError, match="has no output x"):
        OnnxDetector(two, output="x")
