"""What is painted is on the disk soon, whatever happens to the disk."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from semanticblur_core.data import autosave
from semanticblur_core.data.autosave import Autosave, user_journals
from semanticblur_core.data.journal import LockedError, journal_files, read_leftover, replay
from semanticblur_core.data.store import AnnotationStore, read_store
from semanticblur_core.errors import DataError, ImageError


def on_disk(folder: Path, shape: tuple[int, ...]) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    leftover = read_leftover(folder)
    replay(leftover.changes if leftover else [], labels)
    return labels


def test_every_change_is_on_the_disk_after_a_poll(tmp_path: Path, rng: np.random.Generator) -> None:
    labels = np.zeros((60, 80), np.uint8)
    autosave = Autosave(tmp_path / "photo", labels, name="photo")
    for _ in range(10):
        top, left = rng.integers(0, 50, 2)
        labels[top : top + 8, left : left + 8] = rng.integers(0, 3)
        assert not autosave.poll(())
        assert autosave.flush()
        np.testing.assert_array_equal(on_disk(tmp_path / "photo", labels.shape), labels)
        assert autosave.counts.tolist() == [(labels == 1).sum(), (labels == 2).sum()]
    autosave.close()
    np.testing.assert_array_equal(on_disk(tmp_path / "photo", labels.shape), labels)


def test_nothing_is_written_while_nothing_changes(tmp_path: Path) -> None:
    labels = np.zeros((60, 80), np.uint8)
    autosave = Autosave(tmp_path / "photo", labels, name="photo")
    for _ in range(5):
        autosave.poll(())
    assert autosave.flush()
    assert not autosave.has_unsaved
    assert not journal_files(tmp_path / "photo")
    autosave.close()
    assert not (tmp_path / "photo").exists()


def test_planes_that_are_not_shown_are_found(tmp_path: Path) -> None:
    labels = np.zeros((30, 40, 50), np.uint8)
    autosave = Autosave(tmp_path / "stack", labels, name="stack")
    labels[7, 3, 4] = 1
    labels[20, 5, 6] = 2
    autosave.look_everywhere()
    while autosave.poll((0,)):
        pass
    autosave.flush()
    np.testing.assert_array_equal(on_disk(tmp_path / "stack", labels.shape), labels)
    # Without a hint they are found in turn, one a poll.
    labels[29, 0, 0] = 1
    for _ in range(30):
        autosave.poll((0,))
    autosave.flush()
    np.testing.assert_array_equal(on_disk(tmp_path / "stack", labels.shape), labels)
    autosave.close()


def test_planes_that_changed_last_are_looked_at_first(tmp_path: Path) -> None:
    labels = np.zeros((500, 4, 4), np.uint8)
    autosave = Autosave(tmp_path / "stack", labels, name="stack")
    for plane in (400, 450):
        labels[plane] = 1
        autosave.poll((plane,))
    labels[400] = 0  # undone, while plane 0 is shown
    autosave.look_everywhere()
    for _ in range(2):
        assert autosave.poll((0,), budget_s=0)
    assert autosave.counts[400].tolist() == [0, 0]
    autosave.close()


def test_saving_empties_the_journal_and_what_comes_meanwhile_stays(tmp_path: Path) -> None:
    labels = np.zeros((40, 50), np.uint8)
    autosave = Autosave(tmp_path / "journal", labels, name="photo")
    labels[:5] = 1
    autosave.poll(())
    begun, go_on = threading.Event(), threading.Event()
    written: list[np.ndarray] = []

    def write(array: np.ndarray) -> None:
        begun.set()
        assert go_on.wait(10)
        written.append(array)

    saving = threading.Thread(target=autosave.save(write))
    saving.start()
    assert begun.wait(10)
    labels[10:20] = 2
    autosave.poll(())
    assert autosave.flush()
    go_on.set()
    saving.join()
    assert (written[0][:5] == 1).all()
    leftover = read_leftover(tmp_path / "journal")
    assert leftover is not None
    assert [change.top for change in leftover.changes] == [10]
    recovered = written[0]
    replay(leftover.changes, recovered)
    np.testing.assert_array_equal(recovered, labels)
    autosave.save(lambda array: None)()
    assert not autosave.has_unsaved
    autosave.close()


def test_a_kill_amid_the_deletion_of_journals_brings_no_older_strokes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.zeros((40, 50), np.uint8)
    folder = tmp_path / "j"
    for code in (1, 2, 1, 2, 1, 2):  # each session paints over the one before
        session = Autosave(folder, labels, saved=labels.copy(), name="photo")
        labels[:20] = code
        session.poll(())
        session.close()
    session = Autosave(folder, labels, saved=labels.copy(), name="photo")
    written: list[np.ndarray] = []
    save, unlink = session.save(written.append), Path.unlink
    for left in range(5, 0, -1):

        def dying(path: Path, missing_ok: bool = False) -> None:
            unlink(path, missing_ok=missing_ok)
            if len(journal_files(folder)) == left:  # noqa: B023
                raise InterruptedError

        monkeypatch.setattr(Path, "unlink", dying)
        with pytest.raises(InterruptedError):
            save()
        monkeypatch.undo()
        recovered = written[-1].copy()
        leftover = read_leftover(folder)
        assert leftover is not None
        replay(leftover.changes, recovered)
        np.testing.assert_array_equal(recovered, labels)
    session.close()


def test_a_save_that_fails_keeps_the_journal(tmp_path: Path) -> None:
    labels = np.zeros((40, 50), np.uint8)
    autosave = Autosave(tmp_path / "journal", labels, name="photo")
    labels[:5] = 1

    def fail(array: np.ndarray) -> None:
        raise ImageError("full")

    with pytest.raises(ImageError):
        autosave.save(fail)()
    np.testing.assert_array_equal(on_disk(tmp_path / "journal", labels.shape), labels)
    assert autosave.has_unsaved
    autosave.close()


def test_whatever_keeps_the_journal_from_being_written_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.zeros((40, 50), np.uint8)
    session = Autosave(tmp_path / "j", labels, name="photo")

    def fail(folder: Path) -> Path:
        raise ValueError("no number")

    monkeypatch.setattr(autosave, "next_journal", fail)
    labels[:5] = 1
    session.poll(())
    assert not session.flush(1)
    assert session.error == "no number"
    monkeypatch.undo()
    session.poll(())
    assert session.flush()
    assert not session.error
    session.close()
    np.testing.assert_array_equal(on_disk(tmp_path / "j", labels.shape), labels)


def test_a_journal_goes_on_where_an_earlier_one_ended(tmp_path: Path) -> None:
    labels = np.zeros((40, 50), np.uint8)
    first = Autosave(tmp_path / "j", labels, name="photo")
    labels[:5] = 1
    first.poll(())
    first.close()
    recovered = on_disk(tmp_path / "j", labels.shape)
    second = Autosave(tmp_path / "j", recovered, saved=recovered.copy(), name="photo")
    assert second.counts.tolist() == [250, 0]
    assert second.has_unsaved
    recovered[:2] = 0
    second.poll(())
    second.close()
    np.testing.assert_array_equal(on_disk(tmp_path / "j", labels.shape), recovered)
    assert len(journal_files(tmp_path / "j")) == 2


def test_one_image_is_annotated_once_at_a_time(tmp_path: Path) -> None:
    labels = np.zeros((40, 50), np.uint8)
    autosave = Autosave(tmp_path / "photo", labels, name="photo")
    with pytest.raises(LockedError, match="is being annotated by process"):
        Autosave(tmp_path / "photo", labels, name="photo")
    autosave.close()
    Autosave(tmp_path / "photo", labels, name="photo").close()
    with pytest.raises(DataError, match="uint8"):
        Autosave(tmp_path / "photo", labels.astype(int), name="photo")


def test_a_poll_of_large_planes_does_not_wait(tmp_path: Path) -> None:
    labels = np.zeros((100, 2000, 2000), np.uint8)
    autosave = Autosave(tmp_path / "stack", labels, name="stack")
    times = []
    for i in range(8):
        labels[i, 100 * i : 100 * i + 50, :500] = 1
        autosave.look_everywhere()
        more = True
        while more:
            start = time.perf_counter()
            more = autosave.poll((i,))
            times.append(time.perf_counter() - start)
    assert autosave.flush(10)
    autosave.close()
    leftover = read_leftover(tmp_path / "stack")
    assert leftover is not None
    assert len(leftover.changes) == 8
    # The budget is 20 ms and a plane; the rest is for machines that are busy.
    assert np.median(times) < 0.05


def test_without_a_store_journals_are_the_user_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path))
    assert user_journals() == tmp_path / "journal"


# Run in a process of its own: the limit is of the process.
FULL_DISK = """
import sys
from pathlib import Path
import numpy as np
from semanticblur_core.data.autosave import Autosave
from semanticblur_core.data.store import AnnotationStore

folder, how = Path(sys.argv[1]), sys.argv[2]
if how == "limit":
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

def fill():
    if how == "limit":  # no file may grow beyond that
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        return
    with (folder / "filler").open("wb", buffering=0) as stream:
        size = 1 << 16
        while size:
            try:
                stream.write(bytes(size))
            except OSError:
                size //= 2

def free():
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    else:
        (folder / "filler").unlink()

rng = np.random.default_rng(0)
image = rng.integers(0, 256, (256, 256), np.uint8)
store = AnnotationStore(folder / "store", create=True)
labels = np.zeros((256, 256), np.uint8)
autosave = Autosave(store.folder / "journal" / "photo", labels, name="photo")

def save():
    autosave.save(lambda array: store.write("photo", array, image=image))()

labels[:10] = 1
save()
labels[10:20] = 2
autosave.poll(())
assert autosave.flush() and not autosave.error
fill()
labels[20:120] = rng.integers(1, 3, (100, 256), np.uint8)
autosave.poll(())
assert not autosave.flush(1)
assert autosave.error, "nobody was told"
try:
    save()
except Exception as error:
    print(type(error).__name__)
labels[200] = 1
autosave.poll(())
assert not autosave.flush(1)
if sys.argv[3] == "kill":
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
free()
autosave.poll(())
assert autosave.flush() and not autosave.error
autosave.close()
"""


@pytest.fixture(params=["limit", "tmpfs"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder that a process can fill, and how."""
    if request.param == "limit":
        pytest.importorskip("resource", reason="this system limits no file sizes")
        yield tmp_path, "limit"
        return
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if not sys.platform.startswith("linux") or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting a small disk takes Linux and the rights to do it")
    yield tmp_path, "tmpfs"
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("end", ["kill", "free"])
def test_a_full_disk_loses_nothing_that_was_saved(small_disk: tuple[Path, str], end: str) -> None:
    folder, how = small_disk
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, folder, how, end],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr
    store = folder / "store"
    [saved] = read_store(store)
    assert (saved.labels[:10] == 1).all()
    recovered = saved.labels.copy()
    leftover = read_leftover(store / "journal" / "photo")
    assert leftover is not None
    replay(leftover.changes, recovered)
    expected = np.zeros((256, 256), np.uint8)
    expected[:10], expected[10:20] = 1, 2
    if end == "free":
        rng = np.random.default_rng(0)
        rng.integers(0, 256, (256, 256), np.uint8)
        expected[20:120] = rng.integers(1, 3, (100, 256), np.uint8)
        expected[200] = 1
    np.testing.assert_array_equal(recovered, expected)


def test_journals_that_were_deleted_are_written_anew(tmp_path: Path) -> None:
    labels = np.zeros((3, 40, 50), np.uint8)
    saved = labels.copy()
    saved[2, 5:9] = labels[2, 5:9] = 2
    autosave = Autosave(tmp_path / "j", labels, saved=saved, name="stack")
    labels[0, 3:7, 4:9] = 1
    labels[2] = 0  # erased, of what is saved
    autosave.finish_looking()
    assert autosave.flush(5)
    shutil.rmtree(tmp_path / "j")
    labels[1, 10:20] = 2
    autosave.finish_looking()
    assert autosave.flush(5)
    autosave.close()
    found = read_leftover(tmp_path / "j")
    assert found is not None
    replay(found.changes, saved)
    np.testing.assert_array_equal(saved, labels)


def test_a_store_that_is_gone_is_waited_for_and_not_made_again(tmp_path: Path) -> None:
    store, labels = tmp_path / "S", np.zeros((40, 50), np.uint8)
    AnnotationStore(store, create=True)
    folder = store / "journal" / "photo"
    autosave = Autosave(folder, labels, name="photo", store=store)
    labels[3:7] = 1
    autosave.finish_looking()
    assert autosave.flush(5)
    shutil.rmtree(store)
    assert not autosave.flush(5)  # nothing new is painted, but what was is on no disk any more
    assert autosave.error == f"{store} is gone; bring it back, or save in another store"
    labels[20:24] = 2
    autosave.finish_looking()
    assert not autosave.flush(5)
    assert not store.exists()
    AnnotationStore(store, create=True)
    assert autosave.flush(5)
    assert not autosave.error
    autosave.close()
    found, back = read_leftover(folder), np.zeros_like(labels)
    assert found is not None
    replay(found.changes, back)
    np.testing.assert_array_equal(back, labels)
