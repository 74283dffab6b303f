"""Files appear whole or not at all."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from semanticblur_core import Detector, disk, weights
from semanticblur_core.device import bfloat16_pays
from semanticblur_core.errors import ImageError, WeightsError


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half() -> None:
        with disk.replacing(path) as temporary:
            temporary.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path: Path) -> None:
    """Workers of several machines may have the same number of process."""
    path = tmp_path / "map.txt"
    with disk.replacing(path) as slow, slow.open("w") as stream:
        stream.write("who")
        stream.flush()
        with disk.replacing(path) as fast:
            fast.write_text("all of it")
        stream.write("le")
        stream.flush()
        assert path.read_text() == "all of it"
    assert path.read_text() == "whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.txt"]


@pytest.mark.skipif(os.name == "nt", reason="links and pipes as on Unix")
def test_links_are_followed_and_pipes_stay_pipes(tmp_path: Path) -> None:
    kept = tmp_path / "folder" / "kept.txt"
    kept.parent.mkdir()
    kept.write_text("old")
    (tmp_path / "link.txt").symlink_to(kept)
    disk.write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert kept.read_text() == "new"
    assert list(kept.parent.iterdir()) == [kept]

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    disk.require_writable(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    read: list[str] = []
    reader.start()
    disk.write_text(pipe, "through")
    reader.join()
    assert read == ["through"]
    assert pipe.is_fifo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "link.txt", "pipe"]


@pytest.mark.skipif(os.name != "posix", reason="as POSIX systems do")
def test_a_name_that_is_too_long_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 300)
    with pytest.raises(ImageError, match="cannot be written: File name too long"):
        disk.write_text(path, "x")
    with pytest.raises(ImageError, match="cannot be written: File name too long"):
        disk.require_writable(path)


def test_without_a_home_folder_nothing_is_kept_and_nothing_else_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_weights: Path
) -> None:
    """As of a container that runs under a number which no user has."""

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    for name in ("SEMANTICBLUR_HOME", "XDG_DATA_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert weights.own_models() == []
    with pytest.raises(WeightsError, match="model mine: neither a model"):
        weights.resolve("mine")
    bfloat16_pays.cache_clear()
    blur = Detector(random_weights, device="cpu").detect(np.zeros((40, 40), np.uint8), size=64)
    assert blur.shape == (40, 40)
    path = weights.next_version("mine")
    message = r"mine@1\.safetensors: cannot be written: there is no home.*set SEMANTICBLUR_HOME to"
    for write in (disk.require_writable, lambda file: disk.write_text(file, "x")):
        with pytest.raises(ImageError, match=message):
            write(path)
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path))
    disk.require_writable(weights.next_version("mine"))


@pytest.mark.skipif(os.name != "posix", reason="as POSIX systems do")
def test_a_file_that_is_replaced_stays_as_private_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o600)
    disk.write_text(path, "new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)


@pytest.mark.parametrize("has_links", [True, False])
def test_of_two_that_take_a_new_name_one_gets_it(
    tmp_path: Path, has_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*_: object) -> None:
        raise OSError("no such links here")

    if not has_links:
        monkeypatch.setattr(Path, "hardlink_to", failed)
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    disk.put_new(tmp_path / "one", tmp_path / "m")
    with pytest.raises(disk.TakenError):
        disk.put_new(tmp_path / "two", tmp_path / "m")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"m": "one", "two": "two"}
