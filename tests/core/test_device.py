"""Which precision is taken, and that it is the same the next time."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from semanticblur_core import device


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of a machine whose processor has bfloat16, of which nothing is remembered."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN has no bfloat16 to time")
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    device.bfloat16_pays.cache_clear()
    yield tmp_path
    device.bfloat16_pays.cache_clear()


def in_a_new_process() -> torch.dtype:
    device.bfloat16_pays.cache_clear()
    return device.choose_device("cpu", "auto").dtype


@pytest.mark.parametrize("pays", [False, True])
def test_a_stopwatch_decides_once(home: Path, monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    answers = iter([pays, not pays])
    monkeypatch.setattr(device, "_bfloat16_is_faster", lambda: next(answers))
    expected = torch.bfloat16 if pays else torch.float32
    assert [in_a_new_process() for _ in range(3)] == [expected] * 3
    assert device.settle_precision("cpu", "auto") == str(expected).removeprefix("torch.")
    assert device.settle_precision("cpu", "float32") == "float32"
    [path] = home.iterdir()
    assert list(json.loads(path.read_text()).values()) == [pays]
    path.write_text("[]")
    assert in_a_new_process() != expected


def test_of_two_processes_that_measure_at_once_the_first_one_counts(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken() -> bool:
        monkeypatch.setattr(device, "_bfloat16_is_faster", lambda: True)
        assert in_a_new_process() == torch.bfloat16
        return False

    monkeypatch.setattr(device, "_bfloat16_is_faster", overtaken)
    assert in_a_new_process() == torch.bfloat16


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").touch()
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(home / "file" / "below"))
    monkeypatch.setattr(device, "_bfloat16_is_faster", lambda: False)
    assert in_a_new_process() == torch.float32
