"""The command line as a person meets it: help, exit codes, one-line errors, files and JSON."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image

from semanticblur_core import weights
from semanticblur_core.errors import ImageError
from semanticblur_core.io import write_png

COMMAND = [sys.executable, "-m", "semanticblur_core"]


def test_help_names_the_commands_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from semanticblur_core.cli import cli\n"
        "try: cli.main(['-h'])\n"
        "except SystemExit: pass\n"
        "print('HEAVY', [m for m in ('torch', 'numpy', 'PIL', 'napari', 'skimage') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for command in ("detect", "eval", "models", "train", "bench"):
        assert command in done.stdout


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys, semanticblur_core, napari_semanticblur; "
        "print([m for m in ('torch', 'numpy', 'napari', 'qtpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_detecting_loads_no_compiler_and_no_torchvision() -> None:
    """Which takes as long again as loading torch."""
    code = (
        "import sys, numpy as np; from semanticblur_core import Detector\n"
        "detector = Detector(backend='torch', device='cpu')\n"
        "assert detector.detect(np.zeros((40, 50), np.uint8)).shape == (40, 50)\n"
        "print([m for m in ('torch', 'torchvision', 'torch._dynamo', 'sympy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['torch']"


def test_version_and_bad_usage() -> None:
    assert run("--version").stdout.startswith("semanticblur-core, version ")
    wrong = run("detect", "--input", "x.png")
    assert wrong.returncode == 2
    assert "--output" in wrong.stderr
    assert run("nonsense").returncode == 2
    assert run("detect", "--input=x", "--output=y", "--size=20").returncode == 2


def test_detect_from_files_to_files(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"broken")
    done = run(
        "detect",
        f"--input={folder}",
        "--input",
        "sample:cat",
        "--output=out",
        "--overlay",
        "--format=png,npy",
        "--json=out/report.json",
        "--device=cpu",
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "bad.png: not an image" in done.stderr
    assert "2 of 3 images done" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [Path(image["input"]).name for image in report["images"]] == ["good.png", "sample:cat"]
    assert [Path(failure["input"]).name for failure in report["failures"]] == ["bad.png"]
    cat = report["images"][1]
    assert (cat["height"], cat["width"]) == (300, 451)
    blur = np.load(tmp_path / "out" / "cat_blur.npy")
    assert cat["mean_blur"] == pytest.approx(float(blur.mean()), abs=1e-6)
    assert cat["blurred_fraction"] == pytest.approx(float((blur > 0.5).mean()))
    assert cat["threshold"] == 0.5
    assert cat["elapsed_s"] > 0
    assert report["protocol"]["size"] == 320
    assert len(report["model_sha256"]) == 64
    assert (tmp_path / "out" / "cat_overlay.png").is_file()


def test_detect_refuses_wrong_weights_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(b"PK\x03\x04 whatever")
    done = run("detect", "--input=sample:cat", "--output=out", "--model=model.pth", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "model.pth: not a whole safetensors file" in done.stderr
    assert not (tmp_path / "out").exists()


def test_models(tmp_path: Path, random_weights: Path) -> None:
    listed = run("models", "list")
    assert listed.stdout.startswith("default: resnet50, ")
    assert "blur positive, map > 0.5" in listed.stdout
    info = json.loads(run("models", "info", str(random_weights)).stdout)
    assert info["architecture"]["backbone"] == "resnet50"
    assert info["licence"] == "test"
    assert "whole" in run("models", "verify", "default").stdout
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(random_weights.read_bytes()[:5000])
    done = run("models", "verify", str(damaged))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_train_resume_and_use(tmp_path: Path, pair_folders: tuple[Path, Path]) -> None:
    (tmp_path / "val.txt").write_text("photo0\nphoto1\n")
    arguments = [
        "train",
        f"--images={pair_folders[0]}",
        f"--masks={pair_folders[1]}",
        "--output=run",
        "--val-split=val.txt",
        "--set=epochs=1",
        "--set=batch_size=2",
        "--set=image_size_px=64",
        "--device=cpu",
    ]
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1: MAE " in done.stdout
    assert "scores: blur positive, map > 0.5" in done.stdout
    assert "6 images to train on, 2 to validate" in done.stdout
    again = run(*arguments, cwd=tmp_path)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    # Whatever the stopwatch of --precision=auto says today, the run keeps its own.
    for stored in ("float32", "bfloat16"):
        state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
        state["identity"]["computed on"] = f"cpu, torch.{stored}"
        torch.save(state, tmp_path / "run" / "last.ckpt")
        resumed = run(*arguments, "--resume", cwd=tmp_path)
        assert resumed.returncode == 0, resumed.stderr
        assert f"; {stored}\n" in resumed.stdout
    assert "all 1 epochs were done before" in resumed.stdout
    info = json.loads(run("models", "info", "run/best.safetensors", cwd=tmp_path).stdout)
    assert info["provenance"]["start"] == {"from": "random initialisation"}
    assert info["provenance"]["recipe"]["batch_size"] == 2
    assert "nearest-exact" in info["metrics"]["protocol"]["analysis"]
    used = run(
        "detect",
        f"--input={pair_folders[0]}/photo0.png",
        "--output=out",
        "--model=run/best.safetensors",
        cwd=tmp_path,
    )
    assert used.returncode == 0, used.stderr


def test_bench_model_reports_ratios_and_counts(tmp_path: Path) -> None:
    done = run(
        "bench",
        "model",
        "--size=64",
        "--rounds=3",
        "--precision=float32",
        "--batch=2",
        "--device=cpu",
        "--json=b.json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "batch 2, eager" in done.stdout
    result = json.loads((tmp_path / "b.json").read_text())
    assert (result["batch_size"], result["compiled"]) == (2, False)
    (timing,) = result["timings"]
    assert timing["ratio"] == pytest.approx(timing["network_ms"] / timing["backbone_ms"])
    assert result["n_parameters"]["total"] == 25_280_866


def test_a_foreign_backbone_is_refused(tmp_path: Path, pair_folders: tuple[Path, Path]) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"encoder.weight": zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "val.txt").write_text("photo0\n")
    done = run(
        "train",
        f"--images={pair_folders[0]}",
        f"--masks={pair_folders[1]}",
        "--output=run",
        "--val-split=val.txt",
        "--backbone-weights=other.safetensors",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "not weights of a ResNet-50" in done.stderr


def test_eval_of_maps_and_of_a_model(tmp_path: Path, pair_folders: tuple[Path, Path]) -> None:
    images, masks = pair_folders
    out = tmp_path / "out"
    done = run(
        *("eval", f"--maps={masks}", f"--masks={masks}", "--compare=table4"),
        *(f"--json={out}/r.json", f"--csv={out}/r.csv", f"--plots={out}/plots"),
    )
    assert done.returncode == 0, done.stderr
    assert "protocol: blur positive, map > 0.5, beta^2 0.3" in done.stdout
    table = [line for line in done.stdout.splitlines() if line.endswith("quoted")]
    assert len(table) == 12
    assert "measured here, 8 images" in done.stdout
    report = json.loads((out / "r.json").read_text())
    assert (report["mae"], report["f_beta"], report["iou"], report["n_images"]) == (0, 1, 1, 8)
    assert report["protocol"]["resized"] == 0
    assert len(report["per_image"]) == 8
    assert (out / "r.csv").read_text().startswith("name,h,w,mae,tp,fp,fn,tn,precision,recall,")
    for name in ("pr_curve.png", "examples.png"):
        with Image.open(out / "plots" / name) as picture:
            assert picture.size[0] > 200

    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(sorted(images.iterdir())[0])
    done = run("eval", f"--images={images}", f"--masks={masks}", "--device=cpu", "--positive=sharp")
    assert done.returncode == 2
    assert "image of 9 x 9 px for a mask of 72 x 96 px" in done.stderr
    assert "7 images" in done.stdout
    assert "sharp positive" in done.stdout
    assert "squashed to 320 x 320" in done.stdout


def test_eval_refuses_what_it_cannot_do(tmp_path: Path, pair_folders: tuple[Path, Path]) -> None:
    _, masks = pair_folders
    neither = run("eval", f"--masks={masks}")
    assert (neither.returncode, "give --images or --maps" in neither.stderr) == (2, True)
    (tmp_path / "empty").mkdir()
    empty = run("eval", f"--maps={tmp_path / 'empty'}", f"--masks={masks}")
    assert empty.returncode == 2
    assert "no images in it" in empty.stderr
    assert empty.stderr.count("\n") == 1


def test_data_check_says_what_is_there(pair_folders: tuple[Path, Path]) -> None:
    images, _ = pair_folders
    done = run("data", "check", str(images.parent), "--json=r.json", cwd=images.parent)
    assert done.returncode == 0, done.stderr
    assert "pairs: 8; known set: none" in done.stdout
    assert "blurred: mean 50.0%" in done.stdout
    assert json.loads((images.parent / "r.json").read_text())["n_pairs"] == 8
    sorted(images.iterdir())[0].write_bytes(b"")
    broken = run("data", "check", str(images.parent))
    assert broken.returncode == 2
    assert "the file is empty" in broken.stderr


def test_eval_flags_that_do_not_go_together_are_refused(pair_folders: tuple[Path, Path]) -> None:
    images, masks = pair_folders
    for flags, message in (
        ((f"--images={images}", "--map-polarity=sharp"), "go with --maps"),
        ((f"--maps={masks}", "--model=default"), "--model goes with --images"),
        ((f"--images={images}", "--model=none.onnx"), "none.onnx: no such file"),
        ((f"--images={images}", "--model=none.onnx", "--flip"), "--flip: not of a foreign ONNX"),
        ((f"--images={images}", "--onnx-input=unit"), "--onnx-input: of a foreign --model="),
        ((f"--data={images}",), "--masks: is not of --data"),
    ):
        done = run("eval", *flags, f"--masks={masks}")
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of another kind")
@pytest.mark.parametrize("what", ["detect", "--help"])
def test_a_reader_that_leaves_is_no_failed_gate(
    tmp_path: Path, rng: np.random.Generator, what: str
) -> None:
    arguments = [what]
    if what == "detect":
        Image.fromarray(rng.integers(0, 256, (40, 40), np.uint8)).save(tmp_path / "a.png")
        arguments += [f"--input={tmp_path}", f"--output={tmp_path / 'out'}", "--method=lbp"]
    process = subprocess.Popen(
        [sys.executable, "-m", "semanticblur_core", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (process.wait(60), process.stderr.read()) == (141, b"")
    process.stderr.close()


def test_a_result_under_another_protocol_is_marked_in_the_table(
    pair_folders: tuple[Path, Path],
) -> None:
    _, masks = pair_folders
    done = run(
        *("eval", f"--maps={masks}", f"--masks={masks}", "--compare=table4:ebd"),
        *("--protocol=max-mean", "--positive=sharp"),
    )
    assert "NOT comparable: protocol max-mean, sharp positive" in done.stdout
    assert "no figures published: BTBNet, BTBNet2, DefuNet" in done.stdout


def test_train_says_which_flags_the_recipe_cannot_use(
    tmp_path: Path, pair_folders: tuple[Path, Path]
) -> None:
    images, masks = pair_folders
    common = ("train", f"--images={images}", f"--masks={masks}", f"--output={tmp_path / 'run'}")
    unused = run(*common, "--recipe=paper", f"--sharp={images}")
    assert (unused.returncode, "--sharp: recipe paper makes none of it" in unused.stderr) == (
        2,
        True,
    )
    lonely = run(*common, "--recipe=mixed", f"--sharp-masks={masks}")
    assert (lonely.returncode, "--sharp-masks: goes with --sharp" in lonely.stderr) == (2, True)


def test_bench_train_times_loader_and_step(pair_folders: tuple[Path, Path], tmp_path: Path) -> None:
    images, masks = pair_folders
    small = tmp_path / "small.yaml"
    small.write_text("image_size_px: 64\nbatch_size: 4\nsynthetic_photographs: 2\n")
    shared = (
        "bench", "train", f"--images={images}", f"--masks={masks}", f"--sharp={images}",
        "--device=cpu", "--precision=float32", "--rounds=3", "--json=out.json",
    )  # fmt: skip
    done = run(*shared, f"--recipe={small}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["images_per_s"]) == {"loader", "step", "training"}
    assert result["loader_over_model"] > 1
    assert 0.05 < result["training_over_step"] < 20  # on a busy machine too
    done = run(*shared, f"--recipe={small}", "--pairs=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "1 training images are fewer than the 2 of one batch" in done.stderr


def test_bench_of_an_image_and_of_a_folder(tmp_path: Path) -> None:
    shared = ("--backend=torch", "--device=cpu", "--json=b.json")
    done = run("bench", "image", "--megapixels=0.3", "--rounds=1", *shared, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    seconds = json.loads((tmp_path / "b.json").read_text())["seconds"]
    assert seconds["read, detect, write"] == pytest.approx(
        seconds["read"] + seconds["detect"] + seconds["write"]
    )
    assert seconds["HiFST"] > 0
    done = run("bench", "batch", "--images=3", *shared, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "b.json").read_text())["images_per_s"] > 0


def test_paths_in_the_home_folder_and_late_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from semanticblur_core.cli._options import PathType, ShareType, SizeType, refuse_clashes

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert PathType().convert("~/maps", None, None) == tmp_path / "maps"
    assert PathType().convert("~nobody-of-that-name/x", None, None).name == "x"
    (tmp_path / "file").write_text("")
    with pytest.raises(ImageError, match="cannot be written"):
        PathType(writes=True).convert(tmp_path / "file" / "x.json", None, None)
    with pytest.raises(click.BadParameter, match="nan"):
        ShareType().convert("nan", None, None)
    with pytest.raises(click.BadParameter, match="at most 4096"):
        SizeType().convert("100000", None, None)
    photo = tmp_path / "photo.jpg"
    with pytest.raises(click.UsageError, match="is an input"):
        refuse_clashes({"--json": photo, "--csv": None}, [tmp_path / "." / "photo.jpg"])
    with pytest.raises(click.UsageError, match="name the same file"):
        refuse_clashes({"--json": photo, "--csv": photo}, [])


def test_names_near_the_limit_of_file_systems_are_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 120 + ".png")
    write_png(path, np.zeros((4, 4), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_lines_beside_a_bar_are_printed_as_they_are() -> None:
    import io

    from rich.console import Console
    from rich.progress import Progress

    from semanticblur_core.cli._options import say

    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=40)
    text = "sample:cat: [bold] 47.3 % out of focus -> a/rather/long/name.png"
    with Progress(console=console, transient=True) as progress:
        progress.add_task("Detecting", total=1)
        say(progress, text, err=True)
    assert text + "\n" in terminal.getvalue()


def test_names_do_nothing_to_a_terminal_nor_to_a_spreadsheet(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("bad\x1b[31m\r\u202egpj.jpg", "new\nline.jpg"):
        (tmp_path / "in" / name).write_bytes(b"junk")
    for name in ("=1+1.png", "@a.png", "-rf.png"):
        Image.fromarray(np.eye(64, dtype=np.uint8) * 255).save(tmp_path / "in" / name)
    done = run(*("focus", "--input=in", "--method=lbp", "--csv=f.csv"), cwd=tmp_path)
    assert done.returncode == 2
    assert "bad\\x1b[31m\\x0d\\u202egpj.jpg: " in done.stderr
    assert "line.jpg: not an image" in done.stderr  # with the reason
    rows = list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))
    assert {"./=1+1.png", "./@a.png", "./-rf.png"} <= {row["name"] for row in rows}
    made = ("--input==1+1.png", "--method=lbp", "--output=o", "--table=t.csv")
    assert run("detect", *made, cwd=tmp_path / "in").returncode == 0
    [row] = csv.DictReader((tmp_path / "in" / "t.csv").read_text().splitlines())
    assert row["input"] == "./=1+1.png"
    again = run("detect", *made, "--resume", cwd=tmp_path / "in")
    assert (again.returncode, "done before" in again.stdout) == (0, True)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders")
def test_what_is_named_as_an_image_and_is_none_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    Image.fromarray(np.eye(64, dtype=np.uint8)).save(tmp_path / "in" / "a.png")
    for command in (("detect", "--output=o"), ("focus",)):
        done = run(*command, "--input=in", "--method=lbp", cwd=tmp_path)
        assert done.returncode == 2
        assert "pipe.jpg: a folder, a pipe or a device, and no file" in done.stderr


def test_a_model_of_odd_metadata_hides_no_other(random_weights: Path, tmp_path: Path) -> None:
    model, _ = weights.load(random_weights)
    (tmp_path / "models").mkdir()
    odd: dict[str, Any] = {"metrics": {"mae": "x"}, "provenance": {"start": "somewhere"}}
    weights.save(tmp_path / "models" / "m@1.safetensors", model, licence="x", **odd)
    done = run("models", "list", home=tmp_path)
    assert (done.returncode, "m@1: " in done.stdout) == (0, True), done.stderr
