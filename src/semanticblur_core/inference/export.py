"""The network as one ONNX file, and as a package in the bioimage.io model format."""

from __future__ import annotations

import contextlib
import hashlib
import io as text_io
import json
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from semanticblur_core import disk, io, weights
from semanticblur_core.data.transforms import normalise
from semanticblur_core.errors import SemanticBlurError
from semanticblur_core.inference.inputs import sample_photographs
from semanticblur_core.network import SemanticBlur
from semanticblur_core.network.decoder import HEAD_CHANNELS

OPSET = 18
TOLERANCE = 1e-4
# A multiple of the coarsest stride is not needed, but every side has to pass five halvings.
MIN_SIDE_PX = 64
_HEAD = HEAD_CHANNELS[0]
# Photographs and their size.
_CHECKED_SHAPES = ((3, 320, 320), (1, 200, 333))


class _ExportForm(nn.Module):
    """Images in 0..1 to maps in 0..1: nothing is left to do outside the file.

    The head is that of `semanticblur_core.network.SemanticBlur.head`, channels first and with
    resizing as such instead of matrix products. In OpenVINO on a CPU, which reorders the feature
    maps for every matrix product, a map takes 0.8 of the time.
    """

    def __init__(self, network: SemanticBlur) -> None:
        super().__init__()
        self.network = network.for_inference(torch.float32)

    def forward(self, image: Tensor) -> Tensor:
        network = self.network
        assert network.fixed is not None
        composite = network.fixed()
        features = network.backbone(normalise(image))
        pyramid = [self._attend(i, f, composite.level[i]) for i, f in enumerate(features)]
        if composite.semantic is not None:
            assert composite.semantic_bias is not None
            third, fourth = pyramid[2][:, _HEAD:], pyramid[3][:, _HEAD:]
            semantic = third + _resize_like(fourth, third) + composite.semantic_bias[:, None, None]
            parts = torch.split(_pointwise(semantic, composite.semantic), _HEAD, dim=1)
            pyramid = [
                level[:, :_HEAD] + _resize_like(part, level)
                for level, part in zip(pyramid, parts, strict=True)
            ]
        for i, offset in enumerate(composite.offset):
            pyramid[i] = pyramid[i] + offset[:, None, None]
        for i in (2, 1, 0):
            pyramid[i] = pyramid[i] + _resize_like(pyramid[i + 1], pyramid[i])
        # What is constant, or a factor, is applied before the maps are as large as the image.
        pyramid = [beta * level for beta, level in zip(network.decoder.beta, pyramid, strict=True)]
        pyramid[0] = pyramid[0] + composite.head_bias[:, None, None]
        first, *others = (_resize_like(level, image) for level in pyramid)
        logits = network.decoder.predict(sum(others, start=first))
        return torch.sigmoid(logits)

    def _attend(self, index: int, features: Tensor, weight: Tensor) -> Tensor:
        """Attended features (equations 4-9) times ``weight`` ``(K, C)``: ``(N, K, H_i, W_i)``."""
        network, attended = self.network, features
        if network.channel_attention:
            mean, maximum = features.mean(dim=(2, 3)), features.amax(dim=(2, 3))
            of_channels = network.channel_attention[index](mean, maximum)
            attended = features * of_channels[:, :, None, None]
        product = _pointwise(attended, weight)
        if not network.spatial_attention:
            return product
        mean, maximum = features.mean(dim=1), features.amax(dim=1)
        of_pixels: Tensor = network.spatial_attention[index](mean, maximum)
        return product * of_pixels[:, None]


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution with ``weight`` ``(out, in)``."""
    return functional.conv2d(x, weight[:, :, None, None])


def _resize_like(x: Tensor, other: Tensor) -> Tensor:
    return functional.interpolate(x, size=other.shape[2:], mode="bilinear")


def require_onnx_name(path: str | Path) -> None:
    """Refuse a file that could not be used by its name, before the work.

    Raises
    ------
    SemanticBlurError
        If it does not end in .onnx.
    """
    if Path(path).suffix.lower() != ".onnx":
        raise SemanticBlurError(f"{path}: expected a file named .onnx, as --model takes it")


def export_onnx(model: str | Path, path: str | Path) -> float:
    """Write a model as one ONNX file and check it.

    Parameters
    ----------
    model
        Packaged model, own model or file of weights.
    path
        File to write; replaced as a whole.

    Returns
    -------
    float
        Largest difference between the file's maps in ONNX Runtime and torch's, on photographs of
        two sizes; or of the logits as a share of the largest one, whichever is more.

    Raises
    ------
    WeightsError
        If the model cannot be read.
    SemanticBlurError
        If the name does not end in .onnx, onnx, onnxscript or onnxruntime is missing, or the
        difference is more than 1e-4.

    Notes
    -----
    Opset 18. Input ``image``: ``(N, 3, H, W)`` float32, RGB in 0..1, N, H and W free, H and W at
    least 64. Output ``blur``: ``(N, 1, H, W)`` float32, 1 = out of focus. The metadata under the
    key ``semanticblur`` names architecture, provenance and the sha256 of the weights.
    """
    path = Path(path)
    require_onnx_name(path)
    onnx = _require_onnx()
    network, info = weights.load(model)
    form = _ExportForm(network).eval()
    free = {
        0: torch.export.Dim("batch", min=1, max=1024),
        2: torch.export.Dim("height", min=MIN_SIDE_PX, max=65536),
        3: torch.export.Dim("width", min=MIN_SIDE_PX, max=65536),
    }
    with _quiet():
        program = torch.onnx.export(
            form,
            (torch.rand(2, 3, 320, 352),),
            dynamo=True,
            dynamic_shapes={"image": free},
            input_names=["image"],
            output_names=["blur"],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    metadata = {
        "architecture": info.architecture.to_dict(),
        "provenance": info.provenance,
        "metrics": info.metrics,
        "licence": info.licence,
        "sha256": info.sha256,
        "software": f"napari-semanticblur {version('napari-semanticblur')}",
        "input": "image (N, 3, H, W) float32, RGB in 0..1",
        "output": "blur (N, 1, H, W) float32, 1 = out of focus",
    }
    entry = proto.metadata_props.add()
    entry.key, entry.value = weights.METADATA_KEY, json.dumps(metadata)
    proto.producer_name = "napari-semanticblur"
    onnx.checker.check_model(proto)
    with disk.replacing(path, durable=True) as temporary:
        temporary.write_bytes(proto.SerializeToString())
        difference = _largest_difference(form, temporary)
        if not difference <= TOLERANCE:
            raise SemanticBlurError(
                f"{path}: its maps or logits differ from torch's by {difference:.2g}, more than "
                f"{TOLERANCE:g}; not written"
            )
    return difference


def export_bioimageio(model: str | Path, folder: str | Path) -> float:
    """Write a model in the bioimage.io format 0.5: description, ONNX file, test arrays, cover.

    Parameters
    ----------
    model
        As in `export_onnx`.
    folder
        Folder to make; it must not exist.

    Returns
    -------
    float
        As `export_onnx`.

    Raises
    ------
    SemanticBlurError
        As `export_onnx`, or if the folder exists.
    """
    import yaml

    folder = Path(folder)
    if folder.exists():
        raise SemanticBlurError(f"{folder}: exists already; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        temporary = Path(name) / folder.name
        temporary.mkdir()
        difference = export_onnx(model, temporary / "weights.onnx")
        _write_tests(model, temporary)
        info = weights.read_info(weights.resolve(model))
        description = _describe(model, info, temporary)
        (temporary / "rdf.yaml").write_text(
            yaml.safe_dump(description, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        temporary.replace(folder)
    return difference


def _largest_difference(form: _ExportForm, path: Path) -> float:
    """Between the file in ONNX Runtime and torch, on photographs; see `export_onnx`.

    Logits count too, since a map of nothing but 0 and 1 would hide any difference.
    """
    import onnx
    import onnxruntime

    proto = onnx.load(path)
    [sigmoid] = [node for node in proto.graph.node if "blur" in node.output]
    logits = onnx.helper.make_tensor_value_info(sigmoid.input[0], onnx.TensorProto.FLOAT, None)
    proto.graph.output.append(logits)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    worst = 0.0
    for n, height, width in _CHECKED_SHAPES:
        batch = sample_photographs(height, width)[:n].transpose(0, 3, 1, 2)
        found_maps, found_logits = session.run(None, {"image": np.ascontiguousarray(batch)})
        with torch.inference_mode():
            expected = form.network(normalise(torch.from_numpy(batch)))
            maps_off = np.abs(found_maps - torch.sigmoid(expected).numpy()).max()
            logits_off = np.abs(found_logits - expected.numpy()).max()
        largest_logit = max(1.0, float(expected.abs().max()))
        worst = max(worst, float(maps_off), float(logits_off) / largest_logit)
    return worst


def _write_tests(model: str | Path, folder: Path) -> None:
    """Test arrays and a cover from a photograph that ships with scikit-image."""
    from skimage.data import chelsea

    from semanticblur_core.data.squash import squash
    from semanticblur_core.inference.backends import OnnxRuntimeBackend
    from semanticblur_core.inference.overlay import draw_overlay

    image = squash(chelsea(), 320, 320)
    blur = OnnxRuntimeBackend(folder / "weights.onnx", device="cpu").run(image[None])
    np.save(folder / "test_input.npy", np.ascontiguousarray(image.transpose(2, 0, 1)[None]))
    np.save(folder / "test_output.npy", blur[:, None])
    rgb = np.round(image * 255).astype(np.uint8)
    cover = np.hstack([rgb, draw_overlay(rgb, blur[0], threshold=0.5, value_range=None)])
    io.write_png(folder / "cover.png", cover)
    (folder / "README.md").write_text(
        f"# SemanticBlur, model {_plain(model)}\n\n"
        "Finds what is out of focus. Input: RGB in 0..1; photographs are squashed to 320 x 320 px. "
        "Output: 1 = out of focus.\n\n"
        "# Validation\n\nScores and their protocol are under `config` in rdf.yaml.\n",
        encoding="utf-8",
    )


def _describe(model: str | Path, info: weights.WeightsInfo, folder: Path) -> dict[str, Any]:
    """Description in the bioimage.io model format 0.5."""

    def space(axis: str, size: Any) -> dict[str, Any]:
        return {"type": "space", "id": axis, "size": size}

    def file(name: str) -> dict[str, str]:
        return {"source": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}

    def like(axis: str) -> dict[str, str]:
        return {"tensor_id": "image", "axis_id": axis}

    free = {"min": MIN_SIDE_PX, "step": 1}
    data = {"type": "float32", "range": [0.0, 1.0]}
    return {
        "type": "model",
        "format_version": "0.5.4",
        "name": f"SemanticBlur {_plain(model)}",
        "description": "Finds what is out of focus in an image: defocus blur detection.",
        "authors": [{"name": "SemanticBlur developers"}],
        "cite": [
            {
                "text": "Haider, Gazis, Zahoor: SemanticBlur (2026)",
                "doi": "10.62762/TIS.2025.879161",
            }
        ],
        "license": "BSD-3-Clause",
        "documentation": file("README.md"),
        "covers": [file("cover.png")],
        "tags": ["defocus", "blur", "focus", "semantic-segmentation", "2d"],
        "inputs": [
            {
                "id": "image",
                "description": "RGB in 0..1",
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": ["red", "green", "blue"]},
                    space("y", free),
                    space("x", free),
                ],
                "data": data,
                "test_tensor": file("test_input.npy"),
            }
        ],
        "outputs": [
            {
                "id": "blur",
                "description": "1 = out of focus",
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": ["blur"]},
                    space("y", like("y")),
                    space("x", like("x")),
                ],
                "data": data,
                "test_tensor": file("test_output.npy"),
            }
        ],
        "weights": {"onnx": {**file("weights.onnx"), "opset_version": OPSET}},
        "config": {
            "semanticblur": {
                "sha256": info.sha256,
                "architecture": info.architecture.to_dict(),
                "metrics": info.metrics,
                "licence": info.licence,
            }
        },
    }


def _plain(model: str | Path) -> str:
    """Name of a model, or of its file, in the characters that the format allows."""
    return "".join(
        c if c.isascii() and (c.isalnum() or c in "_-") else " " for c in Path(model).stem
    )


def _require_onnx() -> Any:
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise SemanticBlurError(
            f'export needs {error.name}: pip install "napari-semanticblur[export]"'
        ) from error
    assert onnxruntime
    assert onnxscript
    return onnx


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports each of its steps, and warns of its own deprecations."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(text_io.StringIO()):
        warnings.simplefilter("ignore")
        yield
