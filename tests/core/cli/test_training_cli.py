"""Commands around training: stores, recipes, tables, models of one's own."""

import csv
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run

from semanticblur_core import io, weights
from semanticblur_core.config import TrainConfig
from semanticblur_core.data.datasets import DecodedPairs, find_pairs
from semanticblur_core.data.store import AnnotationStore
from semanticblur_core.device import DeviceChoice
from semanticblur_core.inference.detector import Detector
from semanticblur_core.network import SemanticBlur
from semanticblur_core.training import finetune as finetuning
from semanticblur_core.training import loop
from semanticblur_core.training.loop import train


@pytest.fixture
def store(pair_folders: tuple[Path, Path], tmp_path: Path) -> AnnotationStore:
    """The eight photographs, a band of each half labelled, the first two held out."""
    made = AnnotationStore(tmp_path / "store", create=True)
    for i, path in enumerate(sorted(pair_folders[0].iterdir())):
        truth = io.read_mask(pair_folders[1] / path.name)
        labels = np.where(truth, np.uint8(2), np.uint8(1))
        labels[:20], labels[40:] = 0, 0
        made.write(path.stem, labels, image=path, split="val" if i < 2 else None)
    return made


def test_a_store_is_trained_on_scored_and_checked(store: AnnotationStore, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("epochs: 1\nbatch_size: 3\nimage_size_px: 64\nschedule: cosine\n")
    output = tmp_path / "run"
    done = run(
        *("train", f"--data={store.folder}", f"--output={output}", f"--recipe={recipe}"),
        *("--device=cpu", "--precision=float32"),
    )
    assert done.returncode == 0, done.stderr
    assert "6 images to train on, 2 to validate" in done.stdout
    assert "min left" in done.stdout
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    with (output / "history.csv").open(newline="") as stream:
        [row] = csv.DictReader(stream)
    scored = run(
        *("eval", f"--data={store.folder}", f"--model={output / 'best.safetensors'}"),
        *("--device=cpu", f"--json={tmp_path / 'scores.json'}"),
    )
    assert scored.returncode == 0, scored.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["n_images"] == 8
    assert scores["protocol"]["analysis"].startswith("labelled pixels only; images squashed to 320")
    assert "float32 on cpu" in scores["protocol"]["analysis"]
    held_out = [row["mae"] for row in scores["per_image"] if row["name"] in ("photo0", "photo1")]
    assert float(row["val_mae"]) == pytest.approx(np.mean(held_out), abs=2e-3)
    checked = run("data", "check", str(store.folder))
    assert checked.returncode == 0, checked.stderr
    assert "labelled images: 8" in checked.stdout
    assert "photo0: 72 x 96 px, sharp 13.89%, blurred 13.89%, val" in checked.stdout
    for command in (("eval", f"--data={store.folder}"), ("data", "check", str(store.folder))):
        refused = run(*command, f"--json={store.folder / 'dataset.json'}")
        assert refused.returncode == 2
        assert "--json" in refused.stderr
    (store.folder / "labels" / "photo3.png").write_bytes(b"")
    (store.folder / "images" / "photo4.png").unlink()
    scored = run(
        *("eval", f"--data={store.folder}", f"--model={output / 'best.safetensors'}"),
        *("--device=cpu", f"--json={tmp_path / 'scores.json'}"),
    )
    assert scored.returncode == 2
    assert sorted(line.split(": ")[1] for line in scored.stderr.splitlines()) == [
        str(store.folder / "labels" / "photo3.png"),
        str(store.folder / "labels" / "photo4.png"),
    ]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["n_images"], scores["n_failed"]) == (6, 2)


def test_a_table_of_the_paper_with_one_command(
    pair_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    split = tmp_path / "val.txt"
    split.write_text("photo0\nphoto1\n")
    arguments = ["ablate", "--table=3", f"--images={pair_folders[0]}", f"--masks={pair_folders[1]}"]
    arguments += [f"--output={tmp_path / 'runs'}", "--epochs=1", "--set=batch_size=6"]
    arguments += ["--set=image_size_px=48", f"--val-split={split}", "--device=cpu"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "each variant: 1 epochs of 6 images (1 steps of 6, 48 px)" in done.stdout
    assert "0.067   0.942   0.909" in done.stdout
    report = json.loads((tmp_path / "runs" / "table3.json").read_text())
    assert len(report["rows"]) == 5
    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "runs" / "table3.json").read_text()) == report


def test_models_of_ones_own_are_listed_renamed_and_deleted(
    random_weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("mine@1", "twin@1"):
        (folder / f"{name}.safetensors").write_bytes(random_weights.read_bytes())
    assert "mine@1: " in run("models", "list", home=tmp_path).stdout
    assert run("models", "rename", "mine", "ours", home=tmp_path).returncode == 0
    assert run("models", "verify", "ours", home=tmp_path).returncode == 0
    sha256 = weights.read_info(random_weights).sha256
    (tmp_path / "exported").mkdir()
    for digest in (sha256, "0" * 64):
        (tmp_path / "exported" / f"{digest[:32]}-2.onnx").touch()
    assert run("models", "delete", "ours", home=tmp_path).returncode == 0
    assert {path.name[:32] for path in (tmp_path / "exported").iterdir()} == {sha256[:32], "0" * 32}
    assert run("models", "delete", "twin", home=tmp_path).returncode == 0
    assert [path.name[0] for path in (tmp_path / "exported").iterdir()] == ["0"]
    gone = run("models", "verify", "ours", home=tmp_path)
    assert gone.returncode == 2
    assert "model ours: neither a model (default) nor a file" in gone.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("finetune", "--output=x"), "give --data, or both --images and --masks"),
        (("finetune", "--output=x", "--data=nowhere"), "nowhere: holds neither"),
        (("train", "--output=x"), "give --data, or both --images and --masks"),
        (("eval", "--data=nowhere"), "nowhere: no annotation store"),
        (("detect", "--input=sample:cat", "--output=x", "--precision=float16"), "float16"),
    ],
)
def test_wrong_usage_is_one_clear_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_resumed_run_takes_no_other_masks_and_keeps_its_network(
    pair_folders: tuple[Path, Path], tmp_path: Path, random_weights: Path
) -> None:
    (tmp_path / "val.txt").write_text("\ufeffphoto0\nphoto1\nphoto1\n", encoding="utf-8")
    train = (
        "train", f"--images={pair_folders[0]}", f"--masks={pair_folders[1]}",
        f"--val-split={tmp_path / 'val.txt'}", f"--output={tmp_path / 'run'}", "--device=cpu",
        "--precision=float32", "--set=epochs=1", "--set=batch_size=3", "--set=image_size_px=64",
    )  # fmt: skip
    done = run(*train, f"--init={random_weights}")
    assert done.returncode == 0, done.stderr
    assert "6 images to train on, 2 to validate" in done.stdout
    stale = tmp_path / "run" / ".last.ckpt.0123abcd.part"
    stale.write_bytes(b"killed")
    again = run(*train, "--resume")
    assert again.returncode == 0, again.stderr
    assert "all 1 epochs were done before" in again.stdout
    assert not stale.exists()
    other = run(*train, "--resume", "--mask-polarity=sharp")
    assert other.returncode == 2
    assert "made with other settings (images)" in other.stderr


def test_flags_that_a_run_would_not_heed_are_refused(
    store: AnnotationStore, tmp_path: Path, pair_folders: tuple[Path, Path]
) -> None:
    data = f"--data={store.folder}"
    for command, message in (
        (("train", data, "--val-split=mine"), "--val-split: of --images and --masks"),
        (("train", data, "--mask-polarity=sharp"), "--mask-polarity: of --images and --masks"),
        (("finetune", data, "--set=seed=5"), "--set=seed: --seed says it"),
        (("finetune", data, "--set=image_size_px=64"), "--set=image_size_px: --size says it, but"),
        (("finetune", data), "a name is of letters, digits"),
        (
            ("train", f"--images={pair_folders[0]}", f"--masks={store.folder / 'labels'}",
             f"--val-split={tmp_path / 'v.txt'}"),
            "largest value is 2, but a mask is",
        ),
    ):  # fmt: skip
        (tmp_path / "v.txt").write_text("photo0\n")
        done = run(*command, f"--output={tmp_path / 'x'}", "--device=cpu")
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_model_is_written_to_a_file(store: AnnotationStore, tmp_path: Path) -> None:
    output = tmp_path / "made" / "mine.safetensors"
    arguments = ["finetune", f"--data={store.folder}", f"--output={output}", "--size=64"]
    arguments += ["--device=cpu"]
    for name in ("n_steps", "n_views", "n_replay", "replay_size", "batch_size"):
        arguments.append(f"--set={name}=1")
    done = run(*arguments)
    assert done.returncode in (0, 1), done.stderr
    assert f"--model={output}" in done.stdout
    assert output.is_file()
    again = run(*arguments)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_a_run_that_python_began_is_resumed(
    pair_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    pairs = find_pairs(*pair_folders)
    config = TrainConfig(epochs=1, batch_size=3, image_size_px=64)
    device = DeviceChoice(torch.device("cpu"), torch.float32, "test")
    torch.manual_seed(0)
    for _ in train(
        *(SemanticBlur(), DecodedPairs(pairs[1:]), DecodedPairs(pairs[:1]), config),
        run_dir=tmp_path, device=device, save_best=lambda *_: None,
    ):  # fmt: skip
        pass
    (tmp_path / "val.txt").write_text(pairs[0].name)
    done = run(
        *("train", f"--images={pair_folders[0]}", f"--masks={pair_folders[1]}", "--resume"),
        *(f"--output={tmp_path}", f"--val-split={tmp_path / 'val.txt'}", "--device=cpu"),
        *("--set=epochs=1", "--set=batch_size=3", "--set=image_size_px=64"),
    )
    assert done.returncode == 0, done.stderr
    assert "start: Python" in done.stdout


def _tiny(pair_folders: tuple[Path, Path], tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "val.txt").write_text("photo0\n")
    return (
        *("train", f"--images={pair_folders[0]}", f"--masks={pair_folders[1]}"),
        *(f"--val-split={tmp_path / 'val.txt'}", f"--output={tmp_path / 'run'}", "--device=cpu"),
        *("--precision=float32", "--set=epochs=2", "--set=batch_size=2", "--set=image_size_px=48"),
        "--network=backbone=resnet34",
    )


def test_a_stop_keeps_the_state_and_weights_say_what_they_saw(
    pair_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = _tiny(pair_folders, tmp_path)
    whole = loop.train

    def ended(*arguments: Any, **named: Any) -> Iterator[Any]:
        updates = whole(*arguments, **named)
        for update in updates:
            if update.step == 4:
                signal.raise_signal(signal.SIGTERM)
            try:
                yield update
            except GeneratorExit:
                updates.close()
                raise

    monkeypatch.setattr(loop, "train", ended)
    done = run(*tiny, "--mask-polarity=sharp")
    monkeypatch.undo()
    assert done.returncode == 130
    assert "stopped at step 4 of 6; --resume goes on" in done.stderr
    again = run(*tiny, "--mask-polarity=sharp")
    assert (again.returncode, "of an earlier run" in again.stderr) == (2, True)
    resumed = run(
        *(flag for flag in tiny if "network" not in flag), "--resume", "--mask-polarity=sharp"
    )
    assert resumed.returncode == 0, resumed.stderr
    info = weights.read_info(tmp_path / "run" / "best.safetensors")
    assert info.architecture.backbone == "resnet34"
    assert info.provenance["white_in_masks"] == "sharp"
    assert len(info.provenance["data_sha256"]["validation"]) == 64
    for name in ("last.ckpt", "history.csv"):
        (tmp_path / "run" / name).unlink()
    done = run(*tiny)
    assert (done.returncode, "best.safetensors: of an earlier run" in done.stderr) == (2, True)
    other = run(*tiny, "--network=backbone=alexnet")
    assert (other.returncode, "expected one of vgg16" in other.stderr) == (2, True)


@pytest.mark.parametrize(("at", "code"), [(3, 130), (6, 0)])
def test_a_stop_at_the_end_of_an_epoch_leaves_out_nothing(
    pair_folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    code: int,
) -> None:
    whole = loop.train

    def ended(*arguments: Any, **named: Any) -> Iterator[Any]:
        for update in whole(*arguments, **named):
            if update.step == at:
                signal.raise_signal(signal.SIGTERM)
            yield update

    monkeypatch.setattr(loop, "train", ended)
    done = run(*_tiny(pair_folders, tmp_path))
    assert done.returncode == code
    assert done.stdout.count("/2: MAE") == at / 3
    assert ("stopped at step" in done.stderr) == (code == 130)
    assert len((tmp_path / "run" / "history.csv").read_text().splitlines()) == 1 + at / 3


def test_a_stop_of_finetuning_keeps_the_best_so_far(
    store: AnnotationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finetuning.finetune

    def ended(*arguments: Any, **named: Any) -> Iterator[Any]:
        for update in whole(*arguments, **named):
            if update.step == 1 and update.phase == "training":
                signal.raise_signal(signal.SIGTERM)
            yield update

    monkeypatch.setattr(finetuning, "finetune", ended)
    arguments = ["finetune", f"--data={store.folder}", f"--output={tmp_path / 'm.safetensors'}"]
    arguments += ["--size=64", "--device=cpu", "--set=n_steps=50"]
    for name in ("n_views", "n_replay", "replay_size", "batch_size"):
        arguments.append(f"--set={name}=1")
    done = run(*arguments)
    assert (done.returncode, "the best so far is kept" in done.stderr) == (130, True), done.stderr
    assert weights.read_info(tmp_path / "m.safetensors").provenance


@pytest.mark.parametrize("size", ["64", "native"])
def test_a_model_is_scored_at_the_size_asked_for(
    pair_folders: tuple[Path, Path], random_weights: Path, tmp_path: Path, size: str
) -> None:
    made = (
        *("eval", f"--images={pair_folders[0]}", f"--masks={pair_folders[1]}", "--device=cpu"),
        *(f"--model={random_weights}", f"--json={tmp_path / 'e.json'}", f"--size={size}"),
    )
    done = run(*made)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["model_sha256"] == weights.read_info(random_weights).sha256
    named = "squashed to 64 x 64" if size == "64" else "in tiles at their own size"
    assert f"images {named}, maps" in report["protocol"]["analysis"]
    detector = Detector(str(random_weights), device="cpu", precision="float32")
    image = io.read_rgb8(pair_folders[0] / "photo0.png")
    blur = detector.detect(
        image, size=int(size) if size == "64" else "native", upsampling="nearest-exact"
    )
    mae = np.abs(blur - io.read_mask(pair_folders[1] / "photo0.png")).mean()
    assert report["per_image"][0]["mae"] == pytest.approx(mae, abs=1e-5)
