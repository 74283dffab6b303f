"""Training: learns, resumes to the same weights, stops clearly."""

import csv
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch_operations import Operations

from semanticblur_core.config import ModelConfig, TrainConfig
from semanticblur_core.data import transforms
from semanticblur_core.data.datasets import DecodedPairs, find_pairs
from semanticblur_core.data.defocus import SharpImages
from semanticblur_core.data.labels import LabelledImage
from semanticblur_core.data.transforms import cutmix, normalise
from semanticblur_core.device import DeviceChoice
from semanticblur_core.errors import ConfigError, DataError, TrainingError
from semanticblur_core.losses import blur_loss
from semanticblur_core.metrics import Scores
from semanticblur_core.network import SemanticBlur
from semanticblur_core.training import loader, loop
from semanticblur_core.training.checkpoint import load_checkpoint, require_space
from semanticblur_core.training.loader import make_batches
from semanticblur_core.training.logs import draw_curves
from semanticblur_core.training.loop import (
    TrainUpdate,
    backward,
    launch_fabric,
    learning_rate,
    make_optimizer,
    train,
)
from semanticblur_core.training.recipes import recipe

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
        self.device = CPU

    def keep(self, model: SemanticBlur, scores: Scores, epoch: int) -> None:
        self.best.append((epoch, scores.mae))

    def updates(self, *, resume: bool = False, epochs: int | None = None) -> list[TrainUpdate]:
        generator = train(
            self.model,
            self.pairs,
            self.validation,
            self.config,
            run_dir=self.run_dir,
            device=self.device,
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


def test_parts_of_a_batch_give_the_gradient_of_the_whole(
    pairs: DecodedPairs, tmp_path: Path
) -> None:
    """With BatchNorm as it was, for its statistics are those of a part."""
    values = CONFIG.to_dict() | {"epochs": 1, "frozen_statistics": True, "learning_rate": 1e-5}
    ends = []
    for parts in (1, 3):
        config = TrainConfig.from_dict(values | {"accumulate": parts})
        Run(pairs, tmp_path / f"parts{parts}", config).updates()
        ends.append(load_checkpoint(tmp_path / f"parts{parts}" / "last.ckpt")["model"])
    for key, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][key], tensor, rtol=0, atol=1e-5, msg=key)


class _Small(SemanticBlur):
    """A network for whose batches memory does not suffice beyond ``most`` images."""

    most = 1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training and len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images)


def test_out_of_memory_halves_the_batch_and_accumulates(
    pairs: DecodedPairs, tmp_path: Path
) -> None:
    run = Run(pairs, tmp_path / "run")
    run.model.__class__ = _Small
    updates = run.updates()
    assert len(updates) == 4
    assert all(np.isfinite(update.loss) for update in updates)
    _Small.most = 0
    run.run_dir = tmp_path / "another"
    try:
        with pytest.raises(TrainingError, match="out of memory with 1 images at once"):
            run.updates()
    finally:
        _Small.most = 1


def test_frozen_statistics_stay_in_every_stage(pairs: DecodedPairs, tmp_path: Path) -> None:
    config = TrainConfig.from_dict(CONFIG.to_dict() | {"epochs": 1, "frozen_statistics": True})
    run = Run(pairs, tmp_path / "run", config)
    before = {k: t.clone() for k, t in run.model.state_dict().items()}
    run.updates()
    after = run.model.state_dict()
    statistics = [k for k in before if "running_" in k or "num_batches" in k]
    assert len(statistics) > 100
    assert all(torch.equal(before[k], after[k]) for k in statistics)
    assert not torch.equal(before["decoder.norm1.weight"], after["decoder.norm1.weight"])


@given(
    share=st.floats(0, 1),
    n=st.integers(1, 4),
    seed=st.integers(0, 1000),
    size=st.tuples(st.integers(3, 20), st.integers(3, 20)),
)
def test_cutmix_keeps_label_and_pixel_together(
    share: float, n: int, seed: int, size: tuple[int, int]
) -> None:
    """Pixels that say of themselves which target they came with still do after mixing."""
    rng = np.random.default_rng(seed)
    targets = torch.from_numpy(rng.integers(0, 2, (n, 1, *size))).float()
    images = targets.expand(-1, 3, -1, -1) + 2 * torch.arange(n).view(n, 1, 1, 1)
    before = images.clone()
    mixed, mixed_targets = cutmix(images, targets, share=share, rng=rng)
    assert torch.equal(images, before)
    assert torch.equal(mixed[:, :1] % 2, mixed_targets)
    origin = (mixed[:, 0] // 2).long()
    for i in range(n):
        assert set(origin[i].unique().tolist()) <= {i, (i + 1) % n}
    if share == 0:
        assert torch.equal(mixed, images)


def test_pairs_that_are_defocused_further_bring_labels_of_their_own(pairs: DecodedPairs) -> None:
    config = replace(CONFIG, redefocus_share=0.5)
    plain = list(make_batches(pairs, [], CONFIG, 0))
    batches = list(make_batches(pairs, [], config, 0))
    again = list(make_batches(pairs, [], config, 0))
    n_changed = 0
    for before, after, same in zip(plain, batches, again, strict=True):
        assert torch.equal(after[0], same[0])
        for i in range(len(after[0])):
            if torch.equal(before[0][i], after[0][i]):
                continue
            n_changed += 1
            assert after[2] is not None
            assert (after[1][i] >= before[1][i]).all()  # what was blurred stays so
    assert 0 < n_changed < sum(len(batch[0]) for batch in plain)
    with pytest.raises(ConfigError, match=r"redefocus_share: expected in \[0, 1\], got 2"):
        replace(CONFIG, redefocus_share=2)


def test_cosine_schedule_is_half_a_cosine() -> None:
    config = TrainConfig(schedule="cosine", warmup_steps=9)
    assert learning_rate(500, 1000, config) == pytest.approx(0.5e-4)
    assert learning_rate(250, 1000, config) == pytest.approx(1e-4 * (1 + 2**-0.5) / 2)
    assert learning_rate(0, 1000, config) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: 3", {"epochs": 3}),
        ("recipe: mixed\nlearning_rate: 1e-4", {"learning_rate": 1e-4, "batch_size": 8}),
        ("frozen_statistics: true\ncutmix_share: 1", {"cutmix_share": 1.0}),
    ],
)
def test_recipes_are_read_from_yaml(tmp_path: Path, text: str, expected: dict[str, object]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    config = recipe(str(path)).to_dict()
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "expected a mapping"),
        ("epochs: [", "not YAML"),
        ("epochs: x", "epochs: expected int, got 'x'"),
        ("learning_rate: fast", "learning_rate: expected a number"),
        ("momentum: 1", "unknown setting momentum"),
        ("recipe: none", "recipe 'none': expected one of"),
    ],
)
def test_recipes_in_yaml_that_make_no_sense_are_one_clear_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        recipe(str(path))
    assert "\n" not in str(caught.value)


def test_recipes_in_yaml_may_stand_on_each_other_but_not_on_themselves(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(f"recipe: {second}\nepochs: 3\n")
    second.write_text("recipe: best\nbatch_size: 5\n")
    assert recipe(str(first)) == replace(recipe("best"), epochs=3, batch_size=5)
    second.write_text(f"recipe: {first}\n")
    with pytest.raises(ConfigError, match=r"first\.yaml: is a recipe made of itself"):
        recipe(str(first))


def test_a_full_disk_stops_the_run_and_keeps_the_last_state(
    pairs: DecodedPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(pairs, tmp_path / "run").updates(epochs=1)
    before = (tmp_path / "run" / "last.ckpt").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data: No space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"last\.ckpt: cannot be written: .*No space left"):
        Run(pairs, tmp_path / "run").updates(resume=True)
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before
    assert [path.name for path in (tmp_path / "run").glob("*.part")] == []


def test_arguments_are_checked_before_the_first_step(pairs: DecodedPairs, tmp_path: Path) -> None:
    right: dict[str, object] = {
        "model": network(),
        "training": pairs,
        "validation": pairs,
        "config": CONFIG,
        "run_dir": tmp_path,
        "device": CPU,
        "save_best": lambda *_: None,
    }
    for name, wrong, message in (
        ("model", "default", r"model: expected a SemanticBlur, as .*, got 'default'"),
        ("training", [], "training: expected a DecodedPairs"),
        ("config", "best", "config: expected a TrainConfig"),
        ("device", "cpu", "device: expected a DeviceChoice"),
        ("validation", DecodedPairs([]), "validation: holds no images"),
        ("training", DecodedPairs([]), "fewer than the 4 of one batch"),
    ):
        with pytest.raises((ConfigError, TrainingError), match=message):
            train(**(right | {name: wrong}))  # type: ignore[arg-type]


def test_an_epoch_of_two_passes_is_validated_once(pairs: DecodedPairs, tmp_path: Path) -> None:
    twice = replace(CONFIG, passes_per_epoch=2)
    once = [b for epoch in (2, 3) for b in make_batches(pairs, [], CONFIG, epoch)]
    for batch, expected in zip(make_batches(pairs, [], twice, 1), once, strict=True):
        assert torch.equal(batch[0], expected[0])
    [later, *_] = make_batches(pairs, [], twice, 1, first=3)
    assert torch.equal(later[0], once[3][0])
    updates = Run(pairs, tmp_path / "run", twice).updates(epochs=1)
    assert len(updates) == len(once)
    assert [update.scores is not None for update in updates] == [False] * (len(once) - 1) + [True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_made_on_a_gpu_are_those_of_the_cpu(pairs: DecodedPairs) -> None:
    """But for rounding, and for the noise of synthetic images, drawn by each device in its way."""
    config = replace(CONFIG, augmentation="colour", cutmix_share=0.5, synthetic_photographs=2)
    sources = [(SharpImages([pair.image for pair in pairs.pairs]), 2)]
    for here, there in zip(
        make_batches(pairs, sources, config, 0),
        make_batches(pairs, sources, config, 0, device=torch.device("cuda", 0)),
        strict=True,
    ):
        assert here[2] is not None
        assert there[2] is not None
        assert {tensor.device.type for tensor in there if tensor is not None} == {"cuda"}
        assert float((here[0][:2] - there[0][:2].cpu()).abs().max()) < 1e-4
        for ours, theirs in zip(here[1:], there[1:], strict=True):
            assert ours is not None
            assert theirs is not None
            assert float((ours.float() - theirs.cpu().float()).abs().mean()) < 1e-3
        assert float((here[0] - there[0].cpu()).abs().mean()) < 0.05


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR"),
    ],
)
def test_batches_are_made_on_the_cpu_where_a_gpu_is_full(
    pairs: DecodedPairs, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def full(_: torch.device) -> None:
        raise error

    monkeypatch.setattr(loader, "_loader_stream", full)
    loader._warn_of_cpu.cache_clear()
    on_gpu = {"device": torch.device("cuda", 0)}
    with pytest.warns(UserWarning, match="cuda:0 has no memory left.*made on the CPU, slowly") as w:
        batches = list(make_batches(pairs, [], CONFIG, 0, **on_gpu))
    assert len(w) == 1
    for batch, expected in zip(batches, make_batches(pairs, [], CONFIG, 0), strict=True):
        assert torch.equal(batch[0], expected[0])
    next(make_batches(pairs, [], CONFIG, 0, **on_gpu))  # a second warning would be an error


def test_other_errors_of_a_gpu_end_the_batches(
    pairs: DecodedPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: torch.device) -> None:
        raise RuntimeError("cuFFT error: CUFFT_INVALID_SIZE")

    monkeypatch.setattr(loader, "_loader_stream", broken)
    with pytest.raises(RuntimeError, match="CUFFT_INVALID_SIZE"):
        next(make_batches(pairs, [], CONFIG, 0, device=torch.device("cuda", 0)))


def test_images_labelled_in_part_are_trained_on_where_labelled(tmp_path: Path) -> None:
    """The unlabelled half would teach the opposite."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    labels = np.zeros((64, 64), np.uint8)
    labels[:, :20] = 1
    decoded = DecodedPairs.from_labels([LabelledImage("x", image, labels)] * 4)
    config = TrainConfig(epochs=1, batch_size=4, image_size_px=64, augmentation="none")
    [(_, targets, labelled)] = list(make_batches(decoded, [], config, 0))
    assert labelled is not None
    assert labelled[:, 0, :, :20].all()
    assert not labelled[:, 0, :, 20:].any()
    assert not targets[labelled].any()
    run = Run(decoded, tmp_path / "run", config)
    run.validation = decoded
    [update] = run.updates()
    assert update.scores is not None
    assert np.isfinite(update.loss)


def test_learning_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = "epoch,step,mean_loss,learning_rate,images_per_s,val_mae,val_f_beta,val_iou\n"
    (tmp_path / "history.csv").write_text(text + "1,5,0.7,1e-4,2,0.3,0.6,0.5\n")
    draw_curves(tmp_path / "history.csv", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_history_is_whole_though_a_run_was_killed_before_it_was_written(
    pairs: DecodedPairs, tmp_path: Path
) -> None:
    run = Run(pairs, tmp_path / "run")
    run.updates()
    whole = (tmp_path / "run" / "history.csv").read_bytes()
    assert (whole.count(b"\n"), whole.count(b"\r")) == (3, 0)
    (tmp_path / "run" / "history.csv").write_bytes(whole[: whole.rstrip().rindex(b"\n") + 1])
    assert run.updates(resume=True) == []
    assert (tmp_path / "run" / "history.csv").read_bytes() == whole


def test_validation_without_labels_is_refused_before_the_first_step(
    pairs: DecodedPairs, tmp_path: Path
) -> None:
    run = Run(pairs, tmp_path / "run")
    blank = LabelledImage("x", np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8))
    run.validation = DecodedPairs.from_labels([blank])
    with pytest.raises(TrainingError, match="validation: nothing of x is labelled"):
        run.updates()


def test_a_recipe_that_a_recipe_names_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("epochs: 3\n")
    (tmp_path / "mine.yaml").write_text("recipe: base.yaml\nbatch_size: 5\n")
    assert recipe(str(tmp_path / "mine.yaml")) == TrainConfig(epochs=3, batch_size=5)
    (tmp_path / "base.yaml").write_text(f"recipe: ../{tmp_path.name}/mine.yaml\n")
    with pytest.raises(ConfigError, match="is a recipe made of itself"):
        recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    "wrong", [{"epochs": True}, {"learning_rate": None}, {"frozen_statistics": "false"}]
)
def test_settings_of_another_type_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: expected "):
        TrainConfig.from_dict(wrong)


def in_float16(run: Run, norms: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose gradients have these norms, computed in float32, which alone a CPU can."""
    given = iter(norms)
    run.device = CPU._replace(dtype=torch.float16)
    monkeypatch.setattr(loop, "launch_fabric", lambda device, config: launch_fabric(CPU, config))
    monkeypatch.setattr(Fabric, "clip_gradients", lambda *_, **__: torch.tensor(next(given)))


def test_float16_that_overflows_for_ever_stops_the_run(
    pairs: DecodedPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step would be left out, to the end."""
    nan, inf = float("nan"), float("inf")
    monkeypatch.setattr(loop, "MOST_OVERFLOWS", 3)
    run = Run(DecodedPairs(pairs.pairs * 4), tmp_path / "run")
    in_float16(run, [inf, nan, 0.5, nan, inf, nan, 0.5], monkeypatch)
    message = (
        "the gradient's norm of 3 steps in a row became nan at step 6; "
        "float32 or a lower learning rate would do"
    )
    with pytest.raises(TrainingError, match=message):
        run.updates()


def test_float16_may_overflow_now_and_then(
    pairs: DecodedPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inf = float("inf")
    assert 16 < loop.MOST_OVERFLOWS <= 100  # 2^16 is what torch's loss scale begins with
    run = Run(pairs, tmp_path / "run")
    in_float16(run, [inf, inf, 0.5, inf], monkeypatch)
    assert len(run.updates()) == 4


def test_the_average_follows_weights_and_statistics() -> None:
    model, averaged = network(), network()
    expected = {k: tensor.clone() for k, tensor in averaged.state_dict().items()}
    average = loop._averaging(averaged, model, 0.5)
    for step in (0, 30):
        model.train()(torch.rand(2, 3, 64, 64))  # changes the statistics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        average(step)
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                weight = 1 - min(0.5, (1 + step) / (10 + step))
                expected[key] = torch.lerp(expected[key], tensor, weight)
    for key, tensor in averaged.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], msg=key)


@pytest.mark.parametrize(
    ("device", "dtype", "fused"),
    [
        ("cuda:0", torch.float32, True),
        ("cuda:0", torch.bfloat16, True),
        ("cuda:0", torch.float16, None),  # with which Fabric refuses to clip
        ("cpu", torch.float32, None),
        ("cpu", torch.bfloat16, None),
    ],
)
def test_adam_is_one_kernel_on_a_gpu(device: str, dtype: torch.dtype, fused: bool | None) -> None:
    choice = DeviceChoice(torch.device(device), dtype, "test")
    optimizer = make_optimizer(network(), replace(CONFIG, early_rate_factor=0.1), choice)
    assert [group["fused"] for group in optimizer.param_groups] == [fused, fused]


@pytest.mark.parametrize("n_parts", [1, 3])
def test_the_loss_is_read_once_a_batch(pairs: DecodedPairs, n_parts: int) -> None:
    """What reads a number waits for the GPU."""
    fabric, model = launch_fabric(CPU, CONFIG), network()
    wrapped, optimizer = fabric.setup(model, make_optimizer(model, CONFIG, CPU))
    model.eval()  # for BatchNorm's statistics would be those of a part
    [batch, *_] = make_batches(pairs, [], CONFIG, 0)
    with torch.no_grad():
        expected = blur_loss(model(normalise(batch[0])), batch[1]).total
    with Operations() as operations:
        value, _ = backward(fabric, wrapped, optimizer, batch, CONFIG, n_parts)
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert "aten._local_scalar_dense.default" not in operations.names
    assert "aten.convolution_backward.default" in operations.names


def test_images_are_normalised_by_constants_that_are_kept() -> None:
    """A GPU would wait for each copy; what was made in inference must serve training."""
    images = torch.rand(2, 3, 5, 7)
    with torch.inference_mode():
        expected = normalise(images.double())
    assert float(expected[0, 1, 0, 0]) == pytest.approx((float(images[0, 1, 0, 0]) - 0.456) / 0.224)
    learned = images.double().requires_grad_()
    normalise(learned).sum().backward()
    assert learned.grad is not None
    with Operations() as operations:
        assert torch.equal(normalise(images.double()), expected)
    assert [name for name in operations.names if "lift" in name or "copy" in name] == [
        "aten._to_copy.default"  # to double, in this test
    ]
    assert normalise(images).dtype == torch.float32


def test_constants_of_an_export_are_not_kept() -> None:
    """They are no tensors to compute with."""

    class Normalise(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return normalise(images)

    transforms._mean_and_std.cache_clear()
    images = torch.rand(1, 3, 4, 4)
    exported = torch.export.export(Normalise(), (images,))
    assert transforms._mean_and_std.cache_info().currsize == 0
    assert torch.equal(exported.module()(images), normalise(images))


def test_random_numbers_of_a_run_and_of_the_program_are_apart(
    pairs: DecodedPairs, tmp_path: Path
) -> None:
    program = torch.rand(9, generator=torch.Generator().manual_seed(7)).tolist()

    def losses(folder: str, *, draws: bool) -> list[float]:
        run = Run(pairs, tmp_path / folder, replace(CONFIG, epochs=1))
        torch.manual_seed(8)
        # Whose layers draw random numbers in training.
        model = SemanticBlur(ModelConfig(backbone="efficientnet_b4"))
        torch.manual_seed(7)
        how: dict[str, Any] = {"run_dir": run.run_dir, "device": CPU, "save_best": run.keep}
        found = []
        for i, update in enumerate(train(model, run.pairs, run.validation, run.config, **how)):
            found.append(update.loss)
            if draws:
                assert torch.rand(1).item() == pytest.approx(program[i])
        return found

    assert losses("a", draws=True) == losses("b", draws=False)


def test_threads_that_feed_a_gpu_compute_alone() -> None:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with (
            loader._one_thread_each(torch.device("cuda")) as prepare,
            ThreadPoolExecutor(1, "", prepare) as pool,
        ):
            assert pool.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
        with loader._one_thread_each(torch.device("cpu")) as prepare:
            assert prepare is None
    finally:
        torch.set_num_threads(n_threads)


def test_a_folder_holds_one_run(pairs: DecodedPairs, tmp_path: Path) -> None:
    Run(pairs, tmp_path / "run").updates(epochs=1)
    before = (tmp_path / "run" / "last.ckpt").read_bytes()
    with pytest.raises(TrainingError, match=r"last\.ckpt: of an earlier run, --resume goes on"):
        Run(pairs, tmp_path / "run").updates()
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before
    (tmp_path / "run" / "last.ckpt").unlink()
    with pytest.raises(TrainingError, match=r"history\.csv: of an earlier run, without its state"):
        Run(pairs, tmp_path / "run").updates()


def test_two_runs_do_not_train_in_one_folder(pairs: DecodedPairs, tmp_path: Path) -> None:
    def started() -> Generator[TrainUpdate]:
        run = Run(pairs, tmp_path / "run")
        return train(
            *(run.model, pairs, run.validation, CONFIG),
            run_dir=run.run_dir, device=CPU, save_best=run.keep,
        )  # fmt: skip

    with closing(started()) as first:
        next(first)
        with pytest.raises(DataError, match="run: is being trained in by process"):
            next(started())
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"last.ckpt"}


def test_a_run_that_is_closed_at_any_step_is_resumed(pairs: DecodedPairs, tmp_path: Path) -> None:
    whole = Run(pairs, tmp_path / "whole")
    whole.updates()
    parts = Run(pairs, tmp_path / "parts")
    updates = train(
        *(parts.model, pairs, parts.validation, CONFIG),
        run_dir=parts.run_dir, device=CPU, save_best=parts.keep,
    )  # fmt: skip
    assert next(updates).step == 1
    torch.rand(3)  # the program's own
    updates.close()
    rest = Run(pairs, tmp_path / "parts").updates(resume=True)
    assert [update.step for update in rest] == [2, 3, 4]
    ends = [load_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "parts")]
    for key, tensor in ends[0]["averaged"].items():
        assert torch.equal(tensor, ends[1]["averaged"][key]), key


def test_room_for_the_states_is_looked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=700 * 2**20))
    require_space(tmp_path / "not" / "there", 20_000_000)
    with pytest.raises(TrainingError, match="700 MiB free, and the states of a run take up to 763"):
        require_space(tmp_path / "not" / "there", 25_000_000)


def test_a_checkpoint_of_anything_else_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"format_version": 1}, path)
    with pytest.raises(TrainingError, match="not a training checkpoint of this release"):
        load_checkpoint(path)
    torch.save({"format_version": 1, "code": SimpleNamespace()}, path)
    with pytest.raises(TrainingError, match="holds other than tensors, numbers and text"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "text",
    [
        "epochs: 2024-13-45",
        f"epochs: {'9' * 5000}",
        f"learning_rate: {'9' * 400}",
        "[" * 3000,
        "image_size_px: 9000000000000000000",
        "recipe: [best]",
        "a: &a [x, x]\nb: &b [*a, *a]\nepochs: [*b, *b]",
    ],
)
def test_slips_in_recipes_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        recipe(str(tmp_path / "r.yaml"))
    assert "r.yaml" in str(caught.value)
    assert len(str(caught.value)) < 600
