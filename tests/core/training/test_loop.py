"""Training: learns, resumes to the same weights, stops clearly."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from semanticblur_core.config import ModelConfig, TrainConfig
from semanticblur_core.data.datasets import DecodedPairs, find_pairs
from semanticblur_core.data.defocus import SharpImages
from semanticblur_core.device import DeviceChoice
from semanticblur_core.errors import ConfigError, TrainingError
from semanticblur_core.metrics import Scores
from semanticblur_core.network import SemanticBlur
from semanticblur_core.training.checkpoint import load_checkpoint
from semanticblur_core.training.loop import TrainUpdate, learning_rate, train

CPU = DeviceChoice(torch.device("cpu"), torch.float32, "test")
CONFIG = TrainConfig(
    epochs=2, batch_size=4, image_size_px=64, augmentation="crop", ema_decay=0.9, seed=4
)


@pytest.fixture
def pairs(pair_folders: tuple[Path, Path]) -> DecodedPairs:
    return DecodedPairs(find_pairs(*pair_folders))


def network() -> SemanticBlur:
    torch.manual_seed(8)
    return SemanticBlur(ModelConfig(backbone="resnet34"))


class Run:
    """A run whose updates and best weights are kept."""

    def __init__(self, pairs: DecodedPairs, run_dir: Path, config: TrainConfig = CONFIG) -> None:
        run_dir.mkdir(exist_ok=True)
        self.model = network()
        self.pairs, self.run_dir, self.config = pairs, run_dir, config
        self.validation = DecodedPairs(pairs.pairs[:1])
        self.best: list[tuple[int, float]] = []
        self.sharp: dict[str, SharpImages] = {}

    def keep(self, model: SemanticBlur, scores: Scores, epoch: int) -> None:
        self.best.append((epoch, scores.mae))

    def updates(self, *, resume: bool = False, epochs: int | None = None) -> list[TrainUpdate]:
        generator = train(
            self.model,
            self.pairs,
            self.validation,
            self.config,
            run_dir=self.run_dir,
            device=CPU,
            save_best=self.keep,
            sharp=self.sharp,
            resume=resume,
        )
        done = []
        for update in generator:
            done.append(update)
            if update.scores is not None and update.epoch == epochs:
                generator.close()
                break
        return done


def test_training_learns_what_separates_noise_from_smoothness(
    pairs: DecodedPairs, tmp_path: Path
) -> None:
    config = TrainConfig(
        epochs=1, batch_size=2, image_size_px=64, learning_rate=5e-4, augmentation="flip", seed=1
    )
    often = DecodedPairs(pairs.pairs * 10)
    updates = Run(often, tmp_path / "run", config).updates()
    losses = [u.loss for u in updates]
    assert len(losses) == 40
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:4])


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    pairs: DecodedPairs, tmp_path: Path
) -> None:
    whole = Run(pairs, tmp_path / "whole")
    all_updates = whole.updates()
    first = Run(pairs, tmp_path / "parts")
    first.updates(epochs=1)
    second = Run(pairs, tmp_path / "parts")
    updates = second.updates(resume=True)
    assert updates[0].epoch == 2
    ends = [load_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "parts")]
    for kind in ("model", "averaged"):
        for key, tensor in ends[0][kind].items():
            assert torch.equal(tensor, ends[1][kind][key]), (kind, key)
    assert ends[0]["best_mae"] == ends[1]["best_mae"]
    assert whole.best == first.best + second.best
    assert [epoch for epoch, _ in whole.best] == [u.epoch for u in all_updates if u.is_best]
    columns = ("epoch", "mean_loss", "val_mae", "val_f_beta", "val_iou")
    tables = []
    for name in ("whole", "parts"):
        with (tmp_path / name / "history.csv").open(newline="") as stream:
            tables.append([[row[c] for c in columns] for row in csv.DictReader(stream)])
    assert tables[0] == tables[1]
    assert [row[0] for row in tables[0]] == ["1", "2"]


def test_averaged_weights_differ_from_the_last_ones(pairs: DecodedPairs, tmp_path: Path) -> None:
    Run(pairs, tmp_path / "run").updates(epochs=1)
    state = load_checkpoint(tmp_path / "run" / "last.ckpt")
    key = "decoder.conv2.weight"
    assert not torch.equal(state["model"][key], state["averaged"][key])


def test_frozen_stages_keep_their_weights_and_statistics(
    pairs: DecodedPairs, tmp_path: Path
) -> None:
    config = TrainConfig.from_dict(
        CONFIG.to_dict() | {"epochs": 1, "frozen_stages": 1, "early_rate_factor": 0.0}
    )
    run = Run(pairs, tmp_path / "run", config)
    before = {k: t.clone() for k, t in run.model.state_dict().items()}
    run.updates()
    after = run.model.state_dict()
    for key, tensor in before.items():
        if key.startswith("backbone.stages.0."):
            assert torch.equal(tensor, after[key]), key
    # A rate of zero keeps the weights of early stages, but not their statistics.
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert "backbone.stages.1.0.conv1.weight" not in changed
    assert "backbone.stages.1.0.bn1.running_mean" in changed
    assert "backbone.stages.3.0.conv1.weight" in changed


def test_resuming_with_other_settings_is_refused(pairs: DecodedPairs, tmp_path: Path) -> None:
    Run(pairs, tmp_path / "run").updates(epochs=1)
    other = TrainConfig.from_dict(CONFIG.to_dict() | {"learning_rate": 0.5, "seed": 1})
    with pytest.raises(TrainingError, match=r"other settings \(learning_rate, seed\)"):
        Run(pairs, tmp_path / "run", other).updates(resume=True)
    fewer = Run(pairs, tmp_path / "run")
    fewer.validation = DecodedPairs(pairs.pairs[1:2])
    with pytest.raises(TrainingError, match=r"other settings \(images\)"):
        fewer.updates(resume=True)


@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_a_missing_or_damaged_checkpoint_is_one_clear_line(
    pairs: DecodedPairs, tmp_path: Path, content: bytes | None
) -> None:
    run = Run(pairs, tmp_path / "run")
    if content is not None:
        (run.run_dir / "last.ckpt").write_bytes(content)
    with pytest.raises(TrainingError, match=r"last\.ckpt: ") as caught:
        run.updates(resume=True)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_stops_the_run(pairs: DecodedPairs, tmp_path: Path) -> None:
    run = Run(pairs, tmp_path / "run")
    with torch.no_grad():
        run.model.decoder.conv3.weight.fill_(np.nan)
    with pytest.raises(TrainingError, match="the loss became nan at step 1; a lower"):
        run.updates()


def test_fewer_images_than_a_batch_is_refused(pairs: DecodedPairs, tmp_path: Path) -> None:
    config = TrainConfig(epochs=1, batch_size=9, image_size_px=64)
    with pytest.raises(TrainingError, match="8 training images are fewer than the 9 of one batch"):
        Run(pairs, tmp_path / "run", config).updates()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seed": -1}, "seed: expected a whole number of at least 0, got -1"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"learning_rate": float("nan")}, "learning_rate: expected above 0, got nan"),
        ({"ssim_weight": -0.1}, "ssim_weight"),
        ({"frozen_stages": 5}, "frozen_stages"),
        ({"augmentation": "rotate"}, "rotate"),
        ({"ema_decay": 1}, "ema_decay"),
        ({"momentum": 1}, "unknown setting momentum"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(setting)


def test_learning_rate_follows_the_paper() -> None:
    config = TrainConfig()
    assert learning_rate(0, 1000, config) == pytest.approx(1e-4)
    assert learning_rate(500, 1000, config) == pytest.approx(1e-4 * 0.5**0.9)
    assert 0 < learning_rate(999, 1000, config) < 1e-6


def test_the_paper_recipe_is_the_paper() -> None:
    from semanticblur_core.training.recipes import recipe

    paper = recipe("paper")
    assert (paper.epochs, paper.batch_size, paper.image_size_px) == (100, 6, 320)
    assert (paper.learning_rate, paper.poly_power, paper.gradient_clip_norm) == (1e-4, 0.9, 0.5)
    assert (paper.ssim_weight, paper.augmentation) == (0.1, "none")


MIXED = TrainConfig.from_dict(
    CONFIG.to_dict() | {"synthetic_photographs": 2, "synthetic_microscopy": 1}
)


def test_a_run_with_synthetic_images_resumes_to_the_same_weights(
    pairs: DecodedPairs, tmp_path: Path
) -> None:
    files = [pair.image for pair in pairs.pairs]
    sharp = {
        "photograph": SharpImages(files[:4]),
        "microscopy": SharpImages(files[4:], kind="microscopy"),
    }
    runs = {name: Run(pairs, tmp_path / name, MIXED) for name in ("whole", "parts")}
    again = Run(pairs, tmp_path / "parts", MIXED)
    for run in (*runs.values(), again):
        run.sharp = sharp
    updates = runs["whole"].updates()
    assert updates[-1].total_steps == 16  # 8 pairs, one a batch
    runs["parts"].updates(epochs=1)
    again.updates(resume=True)
    ends = [load_checkpoint(tmp_path / name / "last.ckpt")["model"] for name in runs]
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


def test_a_recipe_with_synthetic_images_needs_sharp_ones(
    pairs: DecodedPairs, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"2 of each batch from sharp images \(photograph\)"):
        Run(pairs, tmp_path / "run", MIXED).updates()
    with pytest.raises(ConfigError, match="no place for pairs"):
        TrainConfig(batch_size=2, synthetic_photographs=2)
