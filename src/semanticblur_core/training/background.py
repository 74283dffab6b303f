"""A fine-tuning run in a process of its own, which a window can watch, pause and end at any moment.

It is the command ``semanticblur-core finetune`` itself, so the weights are the command's. The
process writes what happens as lines of JSON and obeys ``pause`` and ``resume``, see `Channel`.
Nothing here loads torch.
"""

from __future__ import annotations

import json
import math
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semanticblur_core import disk, weights
from semanticblur_core.data.journal import Lock
from semanticblur_core.errors import DataError, ImageError, TrainingError, WeightsError

if TYPE_CHECKING:
    from semanticblur_core.training.finetune import FinetuneUpdate

_PREVIEW, _MAP, _BEST = "preview.npy", "preview_map.npy", "best.safetensors"
_RUN = ".run-"
# The window that shows the run comes first where both want the processor.
_NICENESS = 5


@dataclass(frozen=True)
class Progress:
    """State of a run, as `semanticblur_core.training.finetune.FinetuneUpdate`.

    ``result`` holds the values of `FinetuneResult.to_dict`, only with the phase ``done``.
    """

    phase: str
    step: int
    total_steps: int
    loss: float = math.nan
    held_out_loss: float | None = None
    photographs: float | None = None
    is_best: bool = False
    preview: NDArray[np.float32] | None = None
    result: dict[str, Any] | None = None


@dataclass(frozen=True)
class FinetuneCommand:
    """What to run; the options of ``semanticblur-core finetune``.

    ``n_steps`` and ``size`` None are as in the budget and the command.
    """

    data: Path
    output: str
    base: str = "default"
    budget: str = "quick"
    n_steps: int | None = None
    seed: int = 0
    size: int | str = 320
    device: str = "auto"
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def arguments(self) -> list[str]:
        """Arguments after ``semanticblur-core``."""
        parts = ["finetune", f"--data={self.data}", f"--base={self.base}"]
        parts += [f"--output={self.output}", f"--budget={self.budget}", f"--seed={self.seed}"]
        parts += [f"--size={self.size}", f"--device={self.device}"]
        steps = () if self.n_steps is None else (("n_steps", str(self.n_steps)),)
        return parts + [f"--set={key}={value}" for key, value in (*steps, *self.settings)]

    def __str__(self) -> str:
        """For a shell."""
        return shlex.join(["semanticblur-core", *self.arguments])


class BackgroundFinetune:
    """One run in a process of its own.

    Parameters
    ----------
    command
        What to run; its output is to be a name.
    preview
        ``(H, W)`` or ``(H, W, 3)`` uint8 image whose map is wanted as training goes on.

    Attributes
    ----------
    is_paused
        Whether it was told to pause.
    """

    def __init__(self, command: FinetuneCommand, *, preview: NDArray[Any] | None = None) -> None:
        self.command = command
        self.is_paused = False
        self._preview = preview
        self._process: subprocess.Popen[str] | None = None
        self._folder: Path | None = None
        self._lock = threading.Lock()
        self._alive: Lock | None = None
        self._cancelled = self._is_done = False

    def updates(self) -> Iterator[Progress]:
        """Start, and yield what happens; waits for the process between, so call it in a thread.

        Raises
        ------
        TrainingError
            If the process ends with an error, with its own words. The best weights so far stay
            until `keep_best` or `forget`.
        """
        weights.next_version(self.command.output)
        # Beside the models, so that what is left of a run that was ended is moved, not copied.
        folder = weights.models_folder()
        self._is_done = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            prefix = f"{_RUN}{self.command.output}-"
            self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
            self._alive = Lock(self._folder)
        except OSError as error:
            raise TrainingError(f"{folder}: cannot be written: {error.strerror}") from error
        try:
            yield from self._run(self._folder)
        finally:
            if self._is_done:
                self.forget()

    def _run(self, folder: Path) -> Iterator[Progress]:
        if self._preview is not None:
            with disk.replacing(folder / _PREVIEW) as path, path.open("wb") as stream:
                np.save(stream, self._preview)
        arguments = [*self.command.arguments, f"--events={folder}"]
        with self._lock:
            if self._cancelled:
                return
            self._process = process = subprocess.Popen(
                # -P: not the files of the folder that one happens to be in.
                [sys.executable, "-P", "-m", "semanticblur_core", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0)
                | getattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0),
                env=_environment(),
            )
        if self.is_paused:  # before there was anything to tell
            self._tell("pause")
        assert process.stdout is not None
        assert process.stderr is not None
        complaints: queue.SimpleQueue[str] = queue.SimpleQueue()
        errors = process.stderr
        reader = threading.Thread(target=lambda: complaints.put(errors.read()), daemon=True)
        reader.start()
        try:
            for line in process.stdout:
                update = _parse(line, folder)
                if update is not None:
                    self._is_done = self._is_done or update.phase == "done"
                    yield update
            code = process.wait()
        finally:
            self._end()
            reader.join()
            process.stdout.close()
            process.stderr.close()
        if not self._cancelled and (code != 0 or not self._is_done):
            raise TrainingError(_last_words(complaints.get(), code))

    def pause(self) -> None:
        """Rest after the step that is under way; the memory stays taken."""
        self.is_paused = True
        self._tell("pause")

    def resume(self) -> None:
        """Go on."""
        self._tell("resume")
        self.is_paused = False

    def cancel(self) -> None:
        """End at once; the best weights so far stay until `keep_best` or `forget`."""
        with self._lock:
            self._cancelled = True
        self._end()

    def keep_best(self) -> str | None:
        """Make the best weights of a cancelled run a version of the model; its name, or None.

        Raises
        ------
        TrainingError
            If the file cannot be moved there.
        """
        kept = None
        if self._folder is not None and not self._is_done:
            kept = _keep_best(self._folder, self.command.output)
        self.forget()
        return kept

    def forget(self) -> None:
        """Delete what a run left beside its result."""
        if self._alive is not None:
            self._alive.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()

    def _tell(self, word: str) -> None:
        process = self._process
        if process is not None and process.stdin is not None:
            with suppress(OSError, ValueError):
                process.stdin.write(f"{word}\n")
                process.stdin.flush()


def rescue() -> list[str]:
    """Make versions of what runs left whose window ended without a word; their names.

    Raises
    ------
    TrainingError
        If a file cannot be moved.
    """
    kept = []
    for folder in sorted(weights.models_folder().glob(f"{_RUN}*-*")):
        try:
            lock = Lock(folder)
        except DataError:  # a run that is alive has locked it
            continue
        with lock:
            try:
                name = _keep_best(folder, folder.name.removeprefix(_RUN).rpartition("-")[0])
            except WeightsError:  # no name of a model; it stays, and keeps no other from it
                continue
        shutil.rmtree(folder, ignore_errors=True)
        kept += [] if name is None else [name]
    return kept


def _keep_best(folder: Path, name: str) -> str | None:
    best = folder / _BEST
    if not best.is_file():
        return None
    while True:
        target = weights.next_version(name)
        try:
            disk.put_new(best, target)
        except disk.TakenError:  # another run took the version meanwhile
            continue
        except OSError as error:
            raise TrainingError(f"{target}: cannot be written: {error.strerror}") from error
        return target.stem


class Channel:
    """The other end: what the process says and hears.

    Parameters
    ----------
    folder
        Holds the image to preview, if any; takes its map and the best weights so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if hasattr(os, "nice"):
            os.nice(_NICENESS)
        self._may_go = threading.Event()
        self._may_go.set()
        self._is_alone = False
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def best_so_far(self) -> Path:
        """File of the best weights so far."""
        return self._folder / _BEST

    def preview(self) -> NDArray[Any] | None:
        """Image whose map is wanted."""
        path = self._folder / _PREVIEW
        if not path.is_file():
            return None
        image: NDArray[Any] = np.load(path, allow_pickle=False)
        return image

    def say(self, update: FinetuneUpdate) -> bool:
        """Write a line; then wait while paused. False once nobody listens any more."""
        values: dict[str, Any] = {
            "phase": update.phase,
            "step": update.step,
            "total_steps": update.total_steps,
            "loss": update.loss if math.isfinite(update.loss) else None,
            "held_out_loss": update.held_out_loss,
            "photographs": update.photographs,
            "is_best": update.is_best,
            "preview": update.preview is not None,
            "result": None if update.result is None else update.result.to_dict(),
        }
        if update.preview is not None:
            try:
                with disk.replacing(self._folder / _MAP) as path, path.open("wb") as stream:
                    np.save(stream, update.preview)
            except ImageError:  # on Windows, while the other end reads the one before
                values["preview"] = False
        try:
            print(json.dumps(values), flush=True)  # noqa: T201
        except OSError:
            return False
        self._may_go.wait()
        return not self._is_alone

    def _listen(self) -> None:
        # Not through sys.stdin: its lock, held by a thread, would break the end of the program.
        text = b""
        while True:
            try:
                part = os.read(0, 1024)
            except OSError:
                part = b""
            if not part:
                self._is_alone = True
                self._may_go.set()
                return
            *lines, text = (text + part).split(b"\n")
            for line in lines:
                if line.strip() == b"pause":
                    self._may_go.clear()
                elif line.strip() == b"resume":
                    self._may_go.set()


def _parse(line: str, folder: Path) -> Progress | None:
    """A line of the process; None if it is no news of ours."""
    try:
        values = json.loads(line)
        values["loss"] = math.nan if values["loss"] is None else values["loss"]
        shown = values.pop("preview")
        update = Progress(**values, preview=np.load(folder / _MAP) if shown else None)
    except (ValueError, TypeError, KeyError, OSError):
        return None
    return update


def _last_words(text: str, code: int) -> str:
    """The line for people of what an ended process complained about."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith("semanticblur-core: "):
            return line.removeprefix("semanticblur-core: ")
    said = f": {lines[-1]}" if lines else "; perhaps the memory ran out"
    return f"the training process ended with code {code}{said}"


def _environment() -> dict[str, str]:
    """The same modules as here, wherever they were imported from."""
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}
