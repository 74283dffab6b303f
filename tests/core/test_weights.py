"""Files of weights: round trip, refusal of anything else, the packaged default."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from semanticblur_core import Detector, disk, weights
from semanticblur_core.config import ModelConfig
from semanticblur_core.errors import WeightsError
from semanticblur_core.inference import choice
from semanticblur_core.network import SemanticBlur


def test_round_trip_keeps_the_function(tmp_path: Path) -> None:
    torch.manual_seed(5)
    original = SemanticBlur().eval()
    path = tmp_path / "a.safetensors"
    weights.save(path, original, provenance={}, metrics={}, licence="test")
    loaded, info = weights.load(str(path))
    assert info.architecture == ModelConfig()
    assert info.size_bytes < 52e6
    with torch.inference_mode():
        images = torch.randn(1, 3, 64, 64)
        a, b = original(images), loaded(images)
    assert float((a - b).abs().max()) < 0.02 * float(a.max() - a.min())


@pytest.mark.skipif(os.name == "nt", reason="other permissions")
def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    model = SemanticBlur(ModelConfig(backbone="resnet34"))
    before = os.umask(0o022)
    try:
        weights.save(tmp_path / "m.safetensors", model, provenance={}, metrics={}, licence="x")
    finally:
        os.umask(before)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o644


def test_vectors_stay_float32_and_matrices_are_halved(random_weights: Path) -> None:
    for key, tensor in load_file(random_weights).items():
        assert tensor.dtype == (torch.float16 if tensor.ndim > 1 else torch.float32), key


def test_verify_accepts_a_whole_file(random_weights: Path) -> None:
    assert weights.verify(str(random_weights)).sha256 == weights.read_info(random_weights).sha256


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as handle:
        return dict(handle.metadata())


def test_a_changed_tensor_is_found(random_weights: Path, tmp_path: Path) -> None:
    tensors = load_file(random_weights)
    tensors["decoder.beta"] += 1e-6
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path, metadata=metadata_of(random_weights))
    with pytest.raises(WeightsError, match="do not match their sha256"):
        weights.verify(str(path))


def write_variant(kind: str, good: Path, path: Path) -> None:
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:-1000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pickle":
        torch.save({"a": torch.zeros(2)}, path)
    elif kind == "foreign":
        save_file({"a": torch.zeros(2)}, path)
    elif kind == "missing tensor":
        tensors = load_file(good)
        del tensors["decoder.conv2.weight"]
        save_file(tensors, path, metadata=metadata_of(good))
    elif kind == "extra tensor":
        save_file(load_file(good) | {"x": torch.zeros(2)}, path, metadata=metadata_of(good))
    elif kind in ("newer", "other architecture", "odd number", "no json", "list"):
        values = json.loads(metadata_of(good)["semanticblur"])
        if kind == "newer":
            values["format_version"] = 99
        if kind == "other architecture":
            values["architecture"]["semantic_channels"] = 81
        if kind == "odd number":
            values["architecture"]["attention_reduction"] = 1.5
        text = {"no json": "{", "list": "[]"}.get(kind, json.dumps(values))
        save_file(load_file(good), path, metadata={"semanticblur": text})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "truncated, or of another kind"),
        ("empty", "truncated, or of another kind"),
        ("pickle", "truncated, or of another kind"),
        ("foreign", "not of SemanticBlur"),
        ("missing tensor", r"1 tensors are missing, first decoder\.conv2\.weight"),
        ("extra tensor", "1 tensors do not belong"),
        ("newer", "format version 99"),
        ("other architecture", "do not fit the architecture"),
        ("odd number", "damaged metadata: attention_reduction: expected a whole number"),
        ("no json", "damaged metadata"),
        ("list", "damaged metadata"),
    ],
)
def test_other_files_are_refused_in_one_line(
    random_weights: Path, tmp_path: Path, kind: str, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    write_variant(kind, random_weights, path)
    with pytest.raises(WeightsError, match=message) as caught:
        weights.load(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"model nonsense: neither a model \(default"):
        weights.load("nonsense")


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    model = SemanticBlur(ModelConfig(backbone="resnet34"))
    with torch.no_grad():
        model.decoder.conv2.weight[0, 0, 0, 0] = np.inf
    path = tmp_path / "bad.safetensors"
    with pytest.raises(WeightsError, match=r"decoder\.conv2\.weight is not finite"):
        weights.save(path, model, provenance={}, metrics={}, licence="")
    assert not path.exists()


@pytest.mark.parametrize("what", ["provenance", "metrics"])
def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path: Path, what: str) -> None:
    model = SemanticBlur(ModelConfig(backbone="resnet34"))
    said = {"provenance": {}, "metrics": {}} | {what: {"mae": np.float32(0.5)}}
    message = r"no\.safetensors: provenance, metrics or licence cannot be written as JSON: Object"
    with pytest.raises(WeightsError, match=message):
        weights.save(tmp_path / "new" / "no.safetensors", model, licence="x", **said)
    assert not (tmp_path / "new").exists()


def test_files_go_by_text_as_well_as_by_path(tmp_path: Path) -> None:
    model = SemanticBlur(ModelConfig(backbone="resnet34"))
    path = tmp_path / "m.safetensors"
    weights.save(str(path), model, provenance={}, metrics={}, licence="x")
    assert weights.resolve(path) == weights.resolve(str(path)) == path
    assert weights.load(path)[1].sha256 == weights.verify(path).sha256
    with pytest.raises(WeightsError, match="neither a model"):
        weights.resolve(tmp_path / "none.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="as POSIX systems do")
def test_a_name_that_no_file_can_have_is_one_short_line() -> None:
    for find in (weights.resolve, weights.load, weights.read_info, Detector):
        with pytest.raises(WeightsError, match=r"^x{20}\.\.\.: File name too long$"):
            find("x" * 5000)  # type: ignore[operator]


def test_the_packaged_default_is_whole_and_tells_its_story() -> None:
    info = weights.verify("default")
    assert info.architecture == ModelConfig()
    assert info.size_bytes < 52e6
    assert info.provenance["recipe"]
    assert info.metrics["n_images"] == 60
    assert info.metrics["protocol"]["positive_class"] == "blur"
    assert info.licence


def test_a_network_made_for_inference_is_not_saved(tmp_path: Path) -> None:
    model = SemanticBlur(ModelConfig(backbone="resnet34")).for_inference()
    with pytest.raises(WeightsError, match="made for inference cannot be saved"):
        weights.save(tmp_path / "x.safetensors", model, provenance={}, metrics={}, licence="")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (".weight", float("nan"), "no finite numbers"),
        ("running_var", -1.0, "negative variances"),
    ],
)
def test_weights_that_compute_nothing_are_refused(
    tmp_path: Path, random_weights: Path, key: str, value: float, message: str
) -> None:
    info = weights.read_info(random_weights)
    tensors = load_file(random_weights)
    name = next(k for k in tensors if k.endswith(key))
    tensors[name] = torch.full_like(tensors[name], value)
    with safe_open(random_weights, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "odd.safetensors", metadata=metadata)
    with pytest.raises(WeightsError, match=message):
        weights.load(str(tmp_path / "odd.safetensors"))
    assert info.sha256


def test_the_file_may_change_once_it_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    torch.manual_seed(0)
    weights.save(path, SemanticBlur(), provenance={}, metrics={}, licence="test", half=False)
    model, _ = weights.load(str(path))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with path.open("r+b") as stream:  # the same file, not one in its place
        stream.seek(path.stat().st_size // 2)
        stream.write(bytes(path.stat().st_size // 4))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_names_that_differ_by_capitals_alone_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path))
    (tmp_path / "models" / "folder@1.safetensors").mkdir(parents=True)
    (tmp_path / "models" / "cells@1.safetensors").touch()
    assert weights.own_models() == ["cells"]
    assert weights.next_version("cells").name == "cells@2.safetensors"
    with pytest.raises(WeightsError, match="model Cells: there is one called cells"):
        weights.next_version("Cells")
    (tmp_path / "models" / "Cells@1.safetensors").touch()  # both are there already
    if len(weights.own_models()) == 2:
        assert weights.next_version("Cells").name == "Cells@2.safetensors"


def _renamed(path: Path, target: Path, sha256: str) -> Path:
    """A copy that says of itself to be other weights."""
    with safe_open(path, framework="pt") as handle:
        values = json.loads(handle.metadata()[weights.METADATA_KEY])
    text = json.dumps(values | {"sha256": sha256})
    save_file(load_file(path), target, metadata={weights.METADATA_KEY: text})
    return target


def test_digests_are_the_same_without_torch(random_weights: Path) -> None:
    info = weights.read_verified(random_weights)
    assert info.sha256 == weights.digest(load_file(random_weights))


@pytest.mark.parametrize("sha256", ["../../pwn", "*", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_what_names_files_is_a_digest(random_weights: Path, tmp_path: Path, sha256: str) -> None:
    path = _renamed(random_weights, tmp_path / "m.safetensors", sha256)
    with pytest.raises(WeightsError, match="damaged metadata: its sha256 is none"):
        weights.read_info(path)


def test_weights_do_not_pass_for_others(
    random_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path))
    other = weights.read_info(weights.resolve("default")).sha256
    path = _renamed(random_weights, tmp_path / "m.safetensors", other)
    exported = choice.exported_file(other)
    exported.parent.mkdir(parents=True)
    exported.write_bytes(b"of the default")
    with pytest.raises(WeightsError, match="do not match their sha256"):
        choice.ensure_exported(str(path))
    assert choice.ensure_exported("default") == exported


def test_nothing_is_replaced_by_what_is_to_be_new(random_weights: Path, tmp_path: Path) -> None:
    model, _ = weights.load(random_weights)
    path = tmp_path / "m@1.safetensors"
    weights.save(path, model, provenance={}, metrics={}, licence="x", new=True)
    before = path.read_bytes()
    with pytest.raises(disk.TakenError):
        weights.save(path, model, provenance={"a": 1}, metrics={}, licence="x", new=True)
    assert (path.read_bytes(), len(list(tmp_path.iterdir()))) == (before, 1)
