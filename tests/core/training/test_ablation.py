"""The paper's tables: every variant trained once, finished ones not again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from semanticblur_core import io
from semanticblur_core.config import ModelConfig, TrainConfig
from semanticblur_core.data.datasets import DecodedPairs, find_pairs
from semanticblur_core.device import DeviceChoice
from semanticblur_core.errors import TrainingError
from semanticblur_core.training import ablation
from semanticblur_core.training.ablation import TABLES, AblationRow, Variant, ablate

CPU = DeviceChoice(torch.device("cpu"), torch.float32, "test")
TINY = TrainConfig(epochs=1, batch_size=4, image_size_px=64)


@pytest.fixture
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ModelConfig(backbone="resnet34")
    plain = ModelConfig(backbone="resnet34", channel_attention=False, semantic_enhancement=False)
    rows = (
        Variant("whole", small, {}, (0.1, 0.9, 0.8)),
        Variant("without", plain, {"ssim_weight": 0.0}, (0.2, 0.8, 0.7)),
    )
    same = Variant("whole, in another table", small, {}, (0.3, 0.7, 0.6))
    monkeypatch.setattr(ablation, "TABLES", {2: rows, 3: (same,)})


def run(
    folders: tuple[Path, Path],
    output: Path,
    config: TrainConfig = TINY,
    table: int = 2,
    device: DeviceChoice = CPU,
) -> tuple[list[AblationRow], int]:
    pairs = DecodedPairs(find_pairs(*folders))
    rows, n_steps = [], 0
    for update in ablate(
        table, pairs, DecodedPairs(pairs.pairs[:2]), config, output=output, device=device
    ):
        n_steps += update.training is not None
        if update.row is not None:
            rows.append(update.row)
    return rows, n_steps


@pytest.mark.usefixtures("small_table")
def test_a_table_is_trained_once_and_refuses_other_settings(
    pair_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    rows, n_steps = run(pair_folders, tmp_path)
    assert n_steps == 4  # two steps of each
    assert [row.name for row in rows] == ["whole", "without"]
    assert rows[0].n_parameters > rows[1].n_parameters
    assert rows[0].published == (0.1, 0.9, 0.8)
    assert all(0 < row.mae < 1 and row.best_epoch == 1 for row in rows)
    again, n_steps = run(pair_folders, tmp_path)
    assert n_steps == 0
    assert again == rows
    with pytest.raises(TrainingError, match=r"result\.json: was made with other settings"):
        run(pair_folders, tmp_path, TrainConfig(epochs=2, batch_size=4, image_size_px=64))


@pytest.mark.usefixtures("small_table")
def test_a_variant_that_two_tables_share_is_trained_once(
    pair_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, _ = run(pair_folders, tmp_path)[0]
    (tmp_path / "table2-2" / ablation.RESULT).write_text("damaged")
    begun = tmp_path / "table3-1" / ablation.LAST_CHECKPOINT
    begun.parent.mkdir()
    begun.write_bytes(b"of a run that is not needed any more")
    [row], n_steps = run(pair_folders, tmp_path, table=3)
    assert n_steps == 0
    assert not begun.exists()
    assert (row.name, row.published) == ("whole, in another table", (0.3, 0.7, 0.6))
    assert (row.mae, row.f_beta, row.iou) == (whole.mae, whole.f_beta, whole.iou)
    shutil.rmtree(tmp_path / "table2-1")
    assert run(pair_folders, tmp_path, table=3) == ([row], 0)


@pytest.mark.usefixtures("small_table")
def test_a_variant_of_another_precision_is_not_taken_over(
    pair_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    run(pair_folders, tmp_path)
    other = DeviceChoice(torch.device("cpu"), torch.bfloat16, "test")
    assert run(pair_folders, tmp_path, table=3, device=other)[1] == 2


def test_the_tables_are_the_papers() -> None:
    """Rows of tables 1 to 3 as printed; all but the switch at issue stays at its default."""
    default = ModelConfig()
    assert [variant.name for variant in TABLES[1]] == [
        "VGG-16",
        "ResNet-34",
        "ResNet-50",
        "EfficientNet-B4",
    ]
    assert [variant.published[0] for variant in TABLES[2]] == [0.058, 0.049, 0.043, 0.039]
    assert [v.training["ssim_weight"] for v in TABLES[3]] == [0, 0.05, 0.1, 0.2, 0.3]
    assert TABLES[1][2].model == TABLES[2][3].model == TABLES[3][2].model == default
    switches = ("channel_attention", "spatial_attention", "semantic_enhancement")
    n_on = [sum(getattr(v.model, switch) for switch in switches) for v in TABLES[2]]
    assert n_on == [0, 1, 2, 3]


@pytest.mark.usefixtures("small_table")
def test_other_masks_under_the_same_names_are_other_images(
    pair_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    run(pair_folders, tmp_path)
    for path in pair_folders[1].iterdir():
        io.write_png(path, np.where(io.read_mask(path), np.uint8(0), np.uint8(255)))
    with pytest.raises(TrainingError, match="made with other settings or images"):
        run(pair_folders, tmp_path)


@pytest.mark.usefixtures("small_table")
def test_one_of_several_processes_is_refused(
    pair_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    with pytest.raises(TrainingError, match="start it without torchrun"):
        run(pair_folders, tmp_path)
