"""Evaluating folders: pairing, polarity, sizes, errors, and the oracle."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run as run_command
from PIL import Image

from semanticblur_core import published
from semanticblur_core.data.datasets import Pair
from semanticblur_core.errors import ConfigError, DataError
from semanticblur_core.evaluation import Evaluator, EvalUpdate, evaluate, match


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Four maps and masks whose right half is blurred; the maps are perfect."""
    maps, masks = tmp_path / "maps", tmp_path / "masks"
    maps.mkdir()
    masks.mkdir()
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 30:] = 255
    for name in "abcd":
        Image.fromarray(mask).save(masks / f"{name}.png")
        Image.fromarray(mask).save(maps / f"{name}.bmp")
    return maps, masks


def run(maps: Path, masks: Path, **options: object) -> tuple[Evaluator, list[EvalUpdate]]:
    evaluator = Evaluator()
    pairs, _ = match(maps, masks)
    return evaluator, list(evaluate(pairs, evaluator, **options))  # type: ignore[arg-type]


def test_perfect_maps_of_any_type_and_size_are_perfect(folders: tuple[Path, Path]) -> None:
    maps, masks = folders
    half = np.zeros((20, 30))
    half[:, 15:] = np.nextafter(np.float32(1), np.float32(2))  # a rounded sum or sigmoid
    np.save(maps / "a.npy", half)
    (maps / "a.bmp").unlink()
    Image.fromarray((half.clip(0, 1) * 65535).astype(np.uint16)).save(maps / "b.png")
    (maps / "b.bmp").unlink()
    evaluator, updates = run(maps, masks)
    result = evaluator.result()
    assert [update.problem for update in updates] == [None] * 4
    assert (result.mae, result.f_beta, result.iou) == (0, 1, 1)
    assert result.protocol["resized"] == 2
    assert [score.name for score in result.images] == list("abcd")


def test_polarity_of_either_side(folders: tuple[Path, Path]) -> None:
    maps, masks = folders
    assert run(maps, masks, map_polarity="sharp")[0].result().mae == 1
    both = run(maps, masks, map_polarity="sharp", mask_polarity="sharp")[0].result()
    assert (both.mae, both.f_beta) == (0, 1)


def test_one_bad_file_is_named_and_the_rest_is_scored(folders: tuple[Path, Path]) -> None:
    maps, masks = folders
    np.save(maps / "a.npy", np.full((40, 60), 7.0))
    (maps / "a.bmp").unlink()
    (maps / "b.bmp").write_bytes(b"")
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(masks / "c.png")
    Image.fromarray(np.ones((40, 60), np.uint8)).save(masks / "d.png")
    evaluator, updates = run(maps, masks)
    by_name = {update.name: update for update in updates}
    assert "a.npy: expected floats in 0..1, got 7..7" in str(by_name["a"].problem)
    assert "b.bmp: the file is empty" in str(by_name["b"].problem)
    assert "c.png: the mask is wholly sharp" in str(by_name["c"].note)
    assert "its largest value is 1" in str(by_name["d"].problem)
    assert evaluator.result().n_images == 1


def test_maps_of_another_size_can_be_refused(folders: tuple[Path, Path]) -> None:
    maps, masks = folders
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(maps / "a.bmp")
    _, updates = run(maps, masks, map_resize="error")
    assert "map of 9 x 9 px for a mask of 40 x 60 px" in str(updates[0].problem)


def test_maps_of_half_precision_are_scored(folders: tuple[Path, Path]) -> None:
    def predict(_: Pair) -> Any:
        return np.tile(np.linspace(0, 1, 30, dtype=np.float16), (20, 1))

    evaluator, updates = run(*folders, map_resize="bilinear", predict=predict)
    assert [update.problem for update in updates] == [None] * 4
    assert evaluator.result().f_beta == 1


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (None, "a.bmp: predict gave None, expected a map (H, W)"),
        (np.zeros((40, 60, 1)), "predict gave an array of shape (40, 60, 1), expected a map"),
        (np.zeros((0, 60)), "predict gave an array of shape (0, 60), expected a map"),
        (np.full((40, 60), 255, np.uint8), "predict gave 255..255, expected a map in 0..1"),
        (np.full((40, 60), np.nan), "predict gave nan..nan, expected a map in 0..1"),
        (np.full((40, 60), 1.001), "predict gave 1.001..1.001, expected a map in 0..1"),
    ],
)
def test_what_predict_gives_is_a_map(folders: tuple[Path, Path], given: Any, problem: str) -> None:
    """The files are maps themselves, so one that is scored in place of nothing would be perfect."""
    evaluator, updates = run(*folders, predict=lambda _: given)
    assert problem in str(updates[0].problem)
    assert all(update.score is None for update in updates)
    with pytest.raises(ValueError, match="no images"):
        evaluator.result()


def test_rounded_maps_of_predict_are_maps(folders: tuple[Path, Path]) -> None:
    rounded = np.zeros((40, 60))
    rounded[:, :30], rounded[:, 30:] = -1e-7, 1 + 1e-7
    evaluator, updates = run(*folders, predict=lambda _: rounded)
    assert [update.problem for update in updates] == [None] * 4
    assert evaluator.result().mae == 0


def test_missing_and_ambiguous_partners_are_named(folders: tuple[Path, Path]) -> None:
    maps, masks = folders
    (maps / "a.bmp").unlink()
    (masks / "b.png").unlink()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(maps / "c.png")
    pairs, problems = match(maps, masks)
    assert [pair.name for pair in pairs] == ["d"]
    text = "\n".join(problems)
    assert "a.png: no file of the same name in" in text
    assert "b.bmp: no file of the same name in" in text
    assert "ambiguous, c.bmp, c.png share a name stem" in text
    _, problems = match(maps, masks, ["d", "zz"])
    assert problems == [f"zz: in the list, but in neither {maps} nor {masks}"]
    with pytest.raises(DataError, match="no pair of one name"):
        match(maps, masks, ["zz"])


def test_maps_have_the_names_that_detect_gives_them(tmp_path: Path) -> None:
    maps, masks = tmp_path / "maps", tmp_path / "masks"
    for folder, names in (
        (maps, ["a_blur", "a_overlay", "b.jpg_blur", "c_blur", "c.d_blur", "e_overlay", "e_blur"]),
        (masks, ["a", "b", "c", "c_blur", "e", "e_overlay"]),
    ):
        folder.mkdir()
        for name in names:
            Image.new("L", (4, 4)).save(folder / f"{name}.png")
    np.save(maps / "b.jpg_blur.npy", np.zeros((4, 4), np.float32))
    pairs, problems = match(maps, masks)
    assert [pair.image.name for pair in pairs if pair.name == "b"] == ["b.jpg_blur.npy"]
    assert {pair.image.stem: pair.mask.stem for pair in pairs} == {
        "a_blur": "a",
        "b.jpg_blur": "b",
        "c_blur": "c_blur",
        "e_blur": "e",
        "e_overlay": "e_overlay",
    }
    assert [Path(line.partition(":")[0]).name for line in problems] == ["c.png", "c.d_blur.png"]


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("dbd", 0.0),
        ("max-image", 1.0),
        ("max-mean", 1.0),
        ("max-pr", 1.0),
        ("adaptive-1.5", 1.0),
        ("adaptive-2", 0.0),
    ],
)
def test_protocols_choose_the_f_that_counts(protocol: str, expected: float) -> None:
    mask = np.zeros((10, 10), bool)
    mask[:, 5:] = True
    blur = np.where(mask, 0.45, 0.12).astype(np.float32)
    if protocol == "adaptive-2":
        blur = blur + np.float32(0.2)  # twice the mean is then above every value
    evaluator = Evaluator(protocol)  # type: ignore[arg-type]
    evaluator.add(evaluator.measure(blur, mask, "x"))
    result = evaluator.result()
    assert result.f_beta == pytest.approx(expected if protocol != "dbd" else 0.0)
    assert result.protocol["name"] == protocol
    assert ("but F:" in evaluator.describe()) == (protocol != "dbd")


@pytest.mark.parametrize(
    "wrong",
    [{"map_polarity": "Sharp"}, {"mask_polarity": "inverted"}, {"map_resize": "cubic"}],
)
def test_a_misspelt_setting_scores_nothing(wrong: dict[str, Any]) -> None:
    [name] = wrong
    with pytest.raises(ConfigError, match=f"{name}: expected one of "):
        evaluate([], Evaluator(), **wrong)
    with pytest.raises(ConfigError, match="positive: expected one of blur, sharp, got 'Sharp'"):
        Evaluator(positive="Sharp")  # type: ignore[arg-type]


def test_folders_are_not_pairs() -> None:
    with pytest.raises(DataError, match="maps: expected pairs of files; `match` finds them"):
        evaluate("maps", Evaluator())  # type: ignore[arg-type]


def test_unknown_protocol_and_empty_result() -> None:
    with pytest.raises(ConfigError, match="protocol: expected one of dbd"):
        Evaluator("best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no images"):
        Evaluator().result()


def test_published_rows() -> None:
    cuhk = dict(published.rows("cuhk"))
    assert cuhk["SemanticBlur (paper)"] == (0.039, 0.969, 0.951)
    assert cuhk["D-DFFNet"] == (0.036, 0.973, 0.951)
    assert cuhk["DefuNet"] is None
    assert dict(published.rows("ebd"))["D-DFFNet"] == (0.084, 0.826, 0.882)
    assert len(cuhk) == 13


def test_maps_of_hifst_give_the_independent_numbers(data_dir: Path) -> None:
    oracle = data_dir / "cuhk-te1-oracle"
    expected = json.loads((oracle / "expected.json").read_text())
    evaluator, _ = run(oracle / "hifst", oracle / "masks", map_polarity="sharp")
    result = evaluator.result()
    assert result.mae == pytest.approx(expected["mae_mean_over_images"], abs=1e-4)
    assert result.f_beta == pytest.approx(expected["f_beta_mean_over_images"], abs=1e-4)
    assert result.iou == pytest.approx(expected["iou_pooled"], abs=1e-4)
    for key in (
        "structure_measure_blur",
        "weighted_f_beta_blur",
        "max_f_beta_blur",
        "mean_e_measure_blur",
        "max_e_measure_blur",
    ):
        assert result.wider[key] == pytest.approx(expected[key], abs=1e-4), key
    with (oracle / "expected_per_image.csv").open(newline="") as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    for score in result.images:
        for column in ("mae", "precision", "recall", "f_beta", "iou"):
            assert getattr(score, column) == pytest.approx(
                float(rows[score.name][column]), abs=1e-5
            )


def test_scoring_maps_loads_no_torch() -> None:
    code = "import sys, semanticblur_core.evaluation; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_maps_that_lie_on_their_side_are_not_scored(folders: tuple[Path, Path]) -> None:
    maps, masks = folders
    Image.open(maps / "b.bmp").transpose(Image.Transpose.TRANSPOSE).save(maps / "b.bmp")
    evaluator, updates = run(maps, masks)
    assert "rows and columns are interchanged" in (updates[1].problem or "")
    assert evaluator.result().n_images == 3


def test_maps_that_call_nothing_blurred_are_told_of(folders: tuple[Path, Path]) -> None:
    maps, masks = folders

    def said(factor: int) -> str:
        for name in "abcd":
            white = np.asarray(Image.open(masks / f"{name}.png")).astype(np.uint16)
            Image.fromarray(white * np.uint16(factor)).save(maps / f"{name}.png")
            (maps / f"{name}.bmp").unlink(missing_ok=True)
        done = run_command("eval", f"--maps={maps}", f"--masks={masks}")
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "no map has a value above 0.0623 of 1, so nothing is called blurred" in said(16)
    assert said(257) == ""
