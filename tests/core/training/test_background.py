"""Fine-tuning in a process of its own: watched, paused, killed, left alone."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from semanticblur_core import weights
from semanticblur_core.config import ModelConfig
from semanticblur_core.data.store import AnnotationStore
from semanticblur_core.errors import TrainingError, WeightsError
from semanticblur_core.network import SemanticBlur
from semanticblur_core.training import background
from semanticblur_core.training.background import (
    BackgroundFinetune,
    FinetuneCommand,
    Progress,
    rescue,
)

SMALL = tuple({"n_views": "4", "n_replay": "0", "validate_every": "1"}.items())


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def small_weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    path = tmp_path / "small.safetensors"
    model = SemanticBlur(ModelConfig(backbone="resnet34")).eval()
    weights.save(path, model, provenance={}, metrics={}, licence="test")
    return path


@pytest.fixture
def command(tmp_path: Path, small_weights: Path) -> FinetuneCommand:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64), np.uint8)
    image[:, 32:] = 128
    labels = np.zeros((64, 64), np.uint8)
    for row in range(6, 60, 14):
        labels[row : row + 3, 4:28], labels[row : row + 3, 36:60] = 1, 2
    store = AnnotationStore(tmp_path / "store", create=True)
    store.write("image", labels, image=image)
    return FinetuneCommand(
        store.folder,
        "mine",
        base=str(small_weights),
        n_steps=500,
        size=64,
        device="cpu",
        settings=SMALL,
    )


def collect(run: BackgroundFinetune) -> tuple[threading.Thread, list[Progress]]:
    seen: list[Progress] = []

    def work() -> None:
        seen.extend([])
        for update in run.updates():
            seen.append(update)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, seen


def until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_run_keeps_its_best(command: FinetuneCommand, home: Path) -> None:
    run = BackgroundFinetune(command, preview=np.zeros((40, 50), np.uint8))
    thread, seen = collect(run)
    until(lambda: any(update.is_best for update in seen))
    start = time.monotonic()
    run.cancel()
    kept = run.keep_best()
    thread.join()
    assert time.monotonic() - start < 2
    assert kept == "mine@1"
    info = weights.verify("mine")
    best = [update for update in seen if update.is_best]
    stopped = info.metrics["finetune"]["stopped"]
    assert stopped["held_out_error"] in [update.held_out_loss for update in best]
    first = next(update for update in seen if update.preview is not None)
    assert first.step == 0
    assert first.preview is not None
    assert first.preview.shape == (40, 50)
    assert [path.name for path in (home / "models").iterdir()] == ["mine@1.safetensors"]


def test_a_run_that_was_no_better_yet_leaves_nothing(command: FinetuneCommand, home: Path) -> None:
    run = BackgroundFinetune(command)
    thread, seen = collect(run)
    until(lambda: bool(seen))
    assert seen[0].phase == "preparing"
    run.cancel()
    thread.join()
    assert not any(update.is_best for update in seen)
    assert run.keep_best() is None
    assert list((home / "models").iterdir()) == []


def test_what_a_window_left_that_ended_without_a_word_becomes_a_version(
    command: FinetuneCommand, small_weights: Path, home: Path
) -> None:
    run = BackgroundFinetune(command)
    thread, seen = collect(run)
    until(lambda: bool(seen))
    assert rescue() == []  # it is alive
    run.cancel()
    thread.join()
    run.forget()
    for name in (".run-my model-x1", ".run-my model-x2", ".run-empty-x3"):
        (home / "models" / name).mkdir()
    for name in (".run-my model-x1", ".run-my model-x2"):
        shutil.copyfile(small_weights, home / "models" / name / "best.safetensors")
    assert rescue() == ["my model@1", "my model@2"]
    weights.verify("my model@2")
    assert len(list((home / "models").iterdir())) == 2


def test_it_rests_while_paused(command: FinetuneCommand) -> None:
    run = BackgroundFinetune(command)
    thread, seen = collect(run)
    until(lambda: any(update.phase == "training" for update in seen))
    run.pause()

    def is_still() -> bool:
        n_seen = len(seen)
        time.sleep(3.0)
        return len(seen) == n_seen

    until(is_still)  # the step that was under way is over
    n_seen = len(seen)
    time.sleep(1.0)
    assert len(seen) == n_seen
    assert run.is_paused
    run.resume()
    until(lambda: len(seen) > n_seen + 2)
    run.cancel()
    run.forget()
    thread.join()


def test_it_ends_when_nobody_listens_any_more(command: FinetuneCommand, tmp_path: Path) -> None:
    arguments = [*command.arguments, f"--events={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "semanticblur_core", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(os.environ),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    process.stdin.close()
    process.stdout.read()
    assert process.wait(timeout=30) == 0
    process.stdout.close()
    assert weights.own_models() == []


def test_errors_are_the_command_s_own_words(command: FinetuneCommand, tmp_path: Path) -> None:
    from dataclasses import replace

    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    with pytest.raises(TrainingError, match=r"broken\.safetensors: not a whole safetensors file"):
        list(BackgroundFinetune(replace(command, base=str(broken))).updates())
    with pytest.raises(WeightsError, match="is packaged"):
        list(BackgroundFinetune(replace(command, output="default")).updates())


def test_the_command_for_a_shell() -> None:
    command = FinetuneCommand(Path("my store"), "my model", n_steps=9, seed=3)
    assert str(command) == (
        "semanticblur-core finetune '--data=my store' --base=default '--output=my model' "
        "--budget=quick --seed=3 --size=320 --device=auto --set=n_steps=9"
    )


def stub(path: Path, *lines: str, code: int) -> str:
    """A program that says these lines, keeps a best so far in its folder, and ends."""
    script = [
        "#!/bin/sh",
        'for a in "$@"; do case "$a" in --events=*) folder="${a#--events=}";; esac; done',
        'echo best > "$folder/best.safetensors"',
        *(f"echo '{line}'" for line in lines),
        "echo Traceback >&2",
        "echo 'RuntimeError: the memory ran out' >&2",
        f"exit {code}",
    ]
    path.write_text("\n".join(script) + "\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_process_that_breaks_off_is_no_success(
    command: FinetuneCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A Python traceback ends with code 1; and what was learned by then is not thrown away."""
    step = '{"phase": "training", "step": 1, "total_steps": 9, "loss": 0.5, "held_out_loss": null, '
    step += '"photographs": null, "is_best": true, "preview": false, "result": null}'
    monkeypatch.setattr(sys, "executable", stub(tmp_path / "stub", step, code=code))
    run = BackgroundFinetune(command)
    seen = []
    with pytest.raises(TrainingError, match="the memory ran out"):
        seen.extend(update.step for update in run.updates())
    assert run.keep_best() == "mine@1"
    assert weights.resolve("mine").read_text() == "best\n"
    assert [path.name for path in weights.models_folder().iterdir()] == ["mine@1.safetensors"]


def test_a_pause_before_the_process_is_there_holds(command: FinetuneCommand) -> None:
    run = BackgroundFinetune(command)
    run.pause()
    thread, seen = collect(run)
    until(lambda: bool(seen))
    time.sleep(1)
    n_seen = len(seen)
    assert n_seen <= 2
    run.resume()
    until(lambda: len(seen) > n_seen)
    run.cancel()
    run.forget()
    thread.join()


def test_files_of_the_folder_that_one_is_in_are_not_run(
    command: FinetuneCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "photos"
    here.mkdir()
    for name in ("semanticblur_core", "random", "yaml"):
        (here / f"{name}.py").write_text("from pathlib import Path; Path('ran').touch(); 1 / 0")
    monkeypatch.chdir(here)
    with pytest.raises(TrainingError, match="holds neither"):
        list(BackgroundFinetune(replace(command, data=tmp_path / "nowhere")).updates())
    assert not (here / "ran").exists()


def test_versions_of_a_name_are_taken_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path))
    weights.models_folder().mkdir(parents=True)
    told = [
        weights.next_version("m"),
        *(weights.models_folder() / f"m@{i}.safetensors" for i in (1, 2)),
    ]
    told[0].write_text("another's")
    monkeypatch.setattr(weights, "next_version", lambda _: told.pop(0))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.safetensors").write_text("mine")
    assert background._keep_best(tmp_path / "run", "m") == "m@2"
    texts = {path.name: path.read_text() for path in weights.models_folder().iterdir()}
    assert texts == {"m@1.safetensors": "another's", "m@2.safetensors": "mine"}
