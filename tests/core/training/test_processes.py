"""Training as processes: killed and resumed, and several that share each batch."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from semanticblur_core.training.checkpoint import load_checkpoint

SCRIPT = Path(__file__).with_name("train_process.py")
SETTINGS = {
    "epochs": 2,
    "batch_size": 2,
    "image_size_px": 64,
    "augmentation": "crop",
    "ema_decay": 0.9,
    "cutmix_share": 0.5,
    "seed": 4,
}


def command(
    folders: tuple[Path, Path], run: Path, settings: dict[str, Any], *flags: str
) -> list[str]:
    run.mkdir(exist_ok=True)
    return [str(SCRIPT), *map(str, folders), str(run), json.dumps(settings), *flags]


def finish(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_in_an_epoch_and_resumed_it_ends_with_the_same_weights(
    pair_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    n_steps = 3  # of the four of an epoch
    finish(*command(pair_folders, tmp_path / "whole", SETTINGS))
    arguments = command(pair_folders, tmp_path / "parts", SETTINGS, "--slow")
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(n_steps):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    state = load_checkpoint(tmp_path / "parts" / "last.ckpt")
    assert (state["epoch"], state["batch"]) == (0, 3)
    finish(*command(pair_folders, tmp_path / "parts", SETTINGS, "--resume"))
    ends = [load_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "parts")]
    for kind in ("model", "averaged"):
        for key, tensor in ends[0][kind].items():
            assert torch.equal(tensor, ends[1][kind][key]), (kind, key)
    columns = ("mean_loss", "val_mae")
    tables = [[[row[c] for c in columns] for row in end["history"]] for end in ends]
    assert tables[0] == tables[1]


def test_two_processes_end_with_the_weights_of_one(
    pair_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """A low rate, for Adam turns the rounding of tiny gradients into steps of full size."""
    settings = SETTINGS | {
        "batch_size": 4,
        "frozen_statistics": True,
        "learning_rate": 1e-5,
        "accumulate": 2,
    }
    finish(*command(pair_folders, tmp_path / "one", settings | {"accumulate": 1}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    finish(
        *("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"),
        *command(pair_folders, tmp_path / "two", settings),
    )
    ends = [load_checkpoint(tmp_path / name / "last.ckpt") for name in ("one", "two")]
    for key, tensor in ends[0]["model"].items():
        torch.testing.assert_close(ends[1]["model"][key], tensor, rtol=0, atol=1e-5, msg=key)
    losses = [float(end["history"][-1]["mean_loss"]) for end in ends]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_processes_stop_after_the_same_step(
    pair_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    finish(
        *("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"),
        *command(pair_folders, tmp_path / "two", SETTINGS | {"batch_size": 2}, "--stop"),
    )
    state = load_checkpoint(tmp_path / "two" / "last.ckpt")
    assert (state["epoch"], state["batch"]) == (0, 2)
