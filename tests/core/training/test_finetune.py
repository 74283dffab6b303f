"""Fine-tuning: learns from strokes, repeats itself, says when it did not help."""

import copy
import dataclasses
import json
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage import data

from semanticblur_core import Detector, finetune, weights
from semanticblur_core.config import FinetuneConfig, ModelConfig
from semanticblur_core.data.labels import LabelledImage
from semanticblur_core.data.store import AnnotationStore
from semanticblur_core.device import choose_device
from semanticblur_core.errors import ConfigError, DataError, WeightsError
from semanticblur_core.metrics import Protocol, Scores
from semanticblur_core.network import SemanticBlur
from semanticblur_core.training import photographs
from semanticblur_core.training.finetune import (
    FinetuneResult,
    FinetuneUpdate,
    _some_of_each_class,
)
from semanticblur_core.training.strokes import View
from semanticblur_core.training.tuner import Tuner

TINY = FinetuneConfig(
    n_steps=12,
    n_views=6,
    n_replay=2,
    replay_size=1,
    validate_every=4,
    learning_rate=0.03,
    image_size_px=64,
    window_px=40,
    replay_weight=1.0,
    importance_damping=0.0,  # what the maps of an untrained network depend on is worth nothing
    forgetting_limit=1.0,
    drift_limit=1.0,
)


# The packaged model calls noise sharp; these strokes say the opposite.
SWAP = np.array([0, 2, 1], np.uint8)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("base") / "small.safetensors"
    model = SemanticBlur(ModelConfig(backbone="resnet34")).eval()
    weights.save(path, model, provenance={}, metrics={}, licence="test", half=False)
    return str(path)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def noise_and_smooth(n: int = 3) -> list[LabelledImage]:
    """Noise on one side, smooth on the other, four strokes of each class on each."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(n):
        image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        labels = np.zeros((64, 64), np.uint8)
        image[:, 32:] = 128
        for row in range(6, 60, 14):
            labels[row : row + 3, 4:28], labels[row : row + 3, 36:60] = 1, 2
        images.append(LabelledImage(f"image{i}", image, labels))
    return images


def run(base: str, config: FinetuneConfig = TINY, **keywords: object) -> list[FinetuneUpdate]:
    images = keywords.pop("images", None) or noise_and_smooth()
    return list(
        finetune(images, base=base, budget=config, size=64, device="cpu", **keywords)  # type: ignore[arg-type]
    )


def result_of(updates: list[FinetuneUpdate]) -> FinetuneResult:
    assert updates[-1].phase == "done"
    assert updates[-1].result is not None
    return updates[-1].result


def test_it_learns_and_the_name_is_usable_at_once(home: Path) -> None:
    images = [swapped(image) for image in noise_and_smooth()]
    config = dataclasses.replace(TINY, n_steps=24)  # 12 end where both classes are 0.5
    result = result_of(run("default", config, images=images, output="my microscope"))
    assert result.after.mae < 0.5 * result.before.mae
    assert result.path == home / "models" / "my microscope@1.safetensors"
    detector = Detector(result.model or "", device="cpu", precision="float32")
    blur = detector.detect(images[0].image, size=64)
    labels = images[0].labels
    assert blur[labels == 2].mean() > blur[labels == 1].mean()
    info = weights.read_info(result.path)
    assert info.metrics["mae"] == result.after.mae
    assert info.metrics["finetune"]["before"]["mae"] == result.before.mae
    assert info.provenance["recipe"]["n_steps"] == config.n_steps
    assert info.provenance["start"]["from"] == weights.resolve("default").name


def swapped(image: LabelledImage) -> LabelledImage:
    return dataclasses.replace(image, labels=SWAP[image.labels])


def test_versions_count_up_and_the_name_is_the_newest(small_model: str) -> None:
    one = dataclasses.replace(TINY, n_steps=1)
    paths = [result_of(run(small_model, one, output="mine")).path for _ in range(2)]
    assert [path.name for path in paths if path] == ["mine@1.safetensors", "mine@2.safetensors"]
    assert weights.resolve("mine") == paths[1]
    assert weights.resolve("mine@1") == paths[0]
    assert weights.own_models() == ["mine"]
    weights.rename_model("mine", "ours")
    assert [path.name for path in weights.model_versions("ours")] == [
        "ours@1.safetensors",
        "ours@2.safetensors",
    ]
    weights.delete_model("ours@2")
    assert weights.resolve("ours").name == "ours@1.safetensors"
    weights.delete_model("ours")
    with pytest.raises(WeightsError, match="model ours: "):
        weights.resolve("ours")


@pytest.mark.parametrize("frozen_stages", [4, 3, 0])
def test_frozen_stages_stay_and_the_rest_moves(small_model: str, frozen_stages: int) -> None:
    config = dataclasses.replace(TINY, n_steps=2, frozen_stages=frozen_stages, held_out_share=0.0)
    result = result_of(run(small_model, config, output="m"))
    before, after = (weights.load(name)[0].state_dict() for name in (small_model, "m"))
    for stage in range(4):
        key = f"backbone.stages.{stage}.{'4.0' if stage == 0 else '0'}.conv1.weight"
        # The new weights are stored as float16.
        same = torch.equal(before[key].half(), after[key].half())
        assert same == (stage < frozen_stages), key
    statistics = [k for k in before if "running_" in k]
    assert all(torch.equal(before[k], after[k]) for k in statistics)
    assert result.held_out is None


def test_the_same_seed_gives_the_same_weights(small_model: str) -> None:
    for name in ("a", "b"):
        run(small_model, output=name, seed=5)
    run(small_model, output="c", seed=6)
    digests = [weights.read_info(weights.resolve(name)).sha256 for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_stopping_keeps_the_best_so_far_and_closing_keeps_nothing(
    small_model: str, home: Path
) -> None:
    n_asked = 0

    def stop_at_the_third() -> bool:
        nonlocal n_asked
        n_asked += 1
        return n_asked == 3

    result = result_of(run(small_model, output="stopped", should_stop=stop_at_the_third))
    assert result.n_steps == 3
    assert result.path is not None
    generator = finetune(
        noise_and_smooth(), base=small_model, budget=TINY, size=64, device="cpu", output="closed"
    )
    next(generator)
    generator.close()
    assert weights.own_models() == ["stopped"]


def test_a_preview_comes_with_each_look_at_the_held_out_strokes(small_model: str) -> None:
    [image] = noise_and_smooth(1)
    updates = run(small_model, preview=image.image)
    shown = [update for update in updates if update.preview is not None]
    assert [update.step for update in shown] == [0, 4, 8, 12]
    assert all(update.held_out_loss is not None for update in shown)
    assert shown[0].preview is not None
    assert shown[0].preview.shape == (64, 64)
    assert result_of(updates).path is None


def test_what_photographs_do_not_bear_is_not_kept() -> None:
    """The strokes say of noise and smoothness what is wrong in photographs."""
    images = [swapped(image) for image in noise_and_smooth()]
    updates = run("default", dataclasses.replace(TINY, forgetting_limit=0.0), images=images)
    first = next(update for update in updates if update.photographs is not None)
    assert first.photographs is not None
    for update in updates:
        if update.is_best:
            assert update.photographs is not None
            assert update.photographs <= first.photographs
    free = run("default", images=images)
    assert max(u.photographs for u in free if u.photographs is not None) > first.photographs
    assert any(update.is_best for update in free)


@pytest.mark.parametrize(
    ("errors", "kept"),
    [
        ([0.5, 0.1, 0.2, 0.2, 0.4, 0.401, 0.45], 10),
        ([0.5, 0.1, 0.2, 0.2, 0.6, 0.6, 0.6], 2),
        ([0.5, 0.6, 0.6, 0.6, 0.5, 0.5, 0.5], 0),
    ],
    ids=["second half, the later of a tie", "first half", "no better than the base"],
)
def test_which_weights_are_kept(
    errors: list[float], kept: int, small_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = iter(errors)
    monkeypatch.setattr(
        "semanticblur_core.training.finetune.held_out_loss", lambda *_: next(script)
    )
    updates = run(small_model, dataclasses.replace(TINY, validate_every=2, patience=9))
    assert result_of(updates).best_step == kept


def test_weights_that_photographs_depend_on_move_less() -> None:
    torch.manual_seed(3)
    model = SemanticBlur(ModelConfig(backbone="resnet34")).eval()
    config = dataclasses.replace(TINY, importance_damping=1.0)
    image = torch.from_numpy(data.astronaut()[:64, :64].transpose(2, 0, 1) / np.float32(255))
    moves = []
    for indices in ([], [0]):
        tuner = Tuner(copy.deepcopy(model), config, choose_device("cpu", "float32"))
        tuner.remember("replay", image)
        assert len(list(tuner.spare("replay", indices, np.random.default_rng(0)))) == len(indices)
        start = [p.detach().clone() for p in tuner._learning]
        tuner.step(tuner.logits("replay", [0]).square().mean(), 0.1)
        moves.append([(p - s).detach() for p, s in zip(tuner._learning, start, strict=True)])
    factors = tuner._factors
    assert factors is not None
    for free, spared, factor in zip(*moves, factors, strict=True):
        torch.testing.assert_close(spared, free * factor, rtol=1e-3, atol=1e-6)
    everything = torch.cat([factor.flatten() for factor in factors])
    assert 0 < everything.min() < 0.1
    assert everything.max() == 1


def test_a_run_spares_what_photographs_depend_on(small_model: str, tmp_path: Path) -> None:
    base = weights.load(small_model)[0].state_dict()
    lengths = []
    for damping in (0.0, 1.0):
        path = tmp_path / f"{damping}.safetensors"
        config = dataclasses.replace(TINY, importance_damping=damping, held_out_share=0.0)
        run(small_model, config, output=path)
        tuned = weights.load(str(path))[0].state_dict()
        lengths.append(sum(float((tuned[k] - base[k]).float().square().sum()) for k in base))
    assert 0 < lengths[1] < 0.9 * lengths[0]


@pytest.mark.parametrize(("n_images", "furthest"), [(1, 0.6), (2, 0.7), (5, 1.0), (7, 1.0)])
def test_few_images_reach_less_far(
    n_images: int, furthest: float, small_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    averaged = Tuner.averaged

    def spy(tuner: Tuner, share: float = 1.0) -> AbstractContextManager[None]:
        shares.append(share)
        return averaged(tuner, share)

    monkeypatch.setattr(Tuner, "averaged", spy)
    config = dataclasses.replace(TINY, n_steps=4, n_views=n_images)
    run(small_model, config, images=noise_and_smooth(n_images))
    assert max(shares) == pytest.approx(furthest)


def test_maps_of_photographs_stay_much_the_same(tmp_path: Path) -> None:
    images = [swapped(image) for image in noise_and_smooth()]
    photos = [data.astronaut(), data.camera(), data.chelsea(), data.coffee(), data.rocket()]
    base = Detector("default", device="cpu")

    def drift(limit: float) -> float:
        path = tmp_path / f"{limit}.safetensors"
        run("default", dataclasses.replace(TINY, drift_limit=limit), images=images, output=path)
        tuned = Detector(str(path), device="cpu")
        gaps = [
            float(np.abs(tuned.detect(photo, size=64) - base.detect(photo, size=64)).mean())
            for photo in photos
        ]
        return float(np.mean(gaps))

    assert drift(0.02) < 0.03
    assert drift(1.0) > 0.05


@pytest.mark.parametrize(("size", "expected"), [(None, 64), (np.int64(80), 80), ("native", 64)])
def test_the_size_of_a_budget_is_taken_unless_another_is_given(
    small_model: str, size: Any, expected: int
) -> None:
    config = dataclasses.replace(TINY, n_steps=1)
    how: Any = {} if size is None else {"size": size}
    for update in finetune(
        noise_and_smooth(), base=Path(small_model), budget=config, device="cpu", output="m", **how
    ):
        last = update
    assert last.result is not None
    recipe = weights.read_info(weights.resolve("m")).provenance["recipe"]
    assert (recipe["size"], recipe["image_size_px"]) == (
        "native" if size == "native" else expected,
        expected,
    )


def test_the_best_so_far_is_a_file_at_any_moment(small_model: str, tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    best = None
    for update in finetune(
        noise_and_smooth(),
        base=small_model,
        budget=TINY,
        size=64,
        device="cpu",
        best_so_far=str(path),
    ):
        best = update if update.is_best else best
        assert path.exists() == (best is not None)
        if best is not None:
            report = weights.verify(str(path)).metrics["finetune"]
            stopped, first = report["stopped"], report["forgetting_first"]
            assert stopped["step"] == best.step
            assert stopped["held_out_error"] == best.held_out_loss
    assert best is not None
    # Going on from it, what photographs lost is counted from the first model on.
    assert update.result is not None
    assert first == update.result.forgetting_first == update.result.forgetting_before
    again = result_of(run(str(path), dataclasses.replace(TINY, n_steps=1)))
    assert again.forgetting_first == min(first, again.forgetting_before)


def test_a_full_disk_is_said_before_the_training(
    small_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: (9, 8, 10**6))
    with pytest.raises(WeightsError, match="1 MB free, and a new model takes"):
        finetune(noise_and_smooth(), base=small_model, budget=TINY, size=64, output="m")


def test_wrong_labels_are_not_called_better() -> None:
    """The image that is held out says what the base knows, the others the opposite."""
    images = noise_and_smooth(4)
    marked = [dataclasses.replace(images[0], split="val"), *map(swapped, images[1:])]
    result = result_of(run("default", images=marked))
    assert result.best_step == 0
    assert result.after.mae == result.before.mae
    assert not result.is_better


@pytest.mark.parametrize(
    ("before", "after", "is_better"),
    [(0.1, 0.099, False), (0.1, 0.097, True), (0.01, 0.0098, False), (0.01, 0.009, True)],
)
def test_a_tie_is_not_called_better(before: float, after: float, is_better: bool) -> None:
    scores = [Scores(mae, 0.9, 0.9, 1, Protocol()) for mae in (before, after)]
    known = {"forgetting_before": 0.1, "forgetting_after": 0.1, "forgetting_first": 0.1}
    result = FinetuneResult(
        None, None, *scores, **known, held_out="x", held_out_both=True, best_step=1, n_steps=1
    )
    assert result.is_better == is_better


def test_what_cannot_be_is_refused(small_model: str, tmp_path: Path) -> None:
    blank = LabelledImage("x", np.zeros((64, 64), np.uint8), np.ones((64, 64), np.uint8))
    with pytest.raises(DataError, match=r"nothing is labelled blurred \(2\)"):
        run(small_model, images=[blank])
    with pytest.raises(WeightsError, match="model hifst: is a method without weights"):
        weights.next_version("hifst")
    with pytest.raises(WeightsError, match="model default: is packaged"):
        run(small_model, output="default")
    for name in ("../x", "a@b", ""):
        with pytest.raises(WeightsError, match="a name is of letters"):
            run(small_model, output=name)
    with pytest.raises(WeightsError, match="a name has at most 100 characters"):
        run(small_model, output="a" * 101)
    with pytest.raises(WeightsError, match=r"a file of weights ends in \.safetensors"):
        run(small_model, output="mine.pth")
    taken = tmp_path / "taken.safetensors"
    taken.touch()
    with pytest.raises(WeightsError, match="exists already"):
        run(small_model, output=taken)
    with pytest.raises(ConfigError, match="budget 'slow': expected one of quick, thorough"):
        finetune(noise_and_smooth(), budget="slow")
    for wrong in ("store", Path("store"), [np.zeros((9, 9))], None):
        with pytest.raises(DataError, match="images: expected what `read_store` returns"):
            finetune(wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected uint8 labels"):
        LabelledImage("x", np.zeros((4, 4)), np.zeros((4, 5), np.uint8))


# In a process of its own, as the command is: what other tests leave behind in this one (loaded
# libraries, thread pools, the environment) is allowed to change the last bits.
_FUNCTION = """
import json, sys
from pathlib import Path
from semanticblur_core import finetune
from semanticblur_core.config import FinetuneConfig
from semanticblur_core.data.store import read_store
store, base, budget = sys.argv[1:]
budget = FinetuneConfig.from_dict(json.loads(budget))
images = read_store(Path(store))
list(finetune(images, base=base, output="function", budget=budget, seed=2, size=64, device="cpu"))
"""


def test_the_command_gives_the_weights_of_the_function(small_model: str, tmp_path: Path) -> None:
    store = AnnotationStore(tmp_path / "store", create=True)
    for image in noise_and_smooth():
        store.write(image.name, image.labels, image=image.image)
    values = TINY.to_dict()
    subprocess.run(
        [sys.executable, "-c", _FUNCTION, str(store.folder), small_model, json.dumps(values)],
        timeout=240,
        check=True,
        env=_environment(),
    )
    settings = [f"--set={key}={value}" for key, value in values.items() if key != "seed"]
    command = [sys.executable, "-m", "semanticblur_core", "finetune", f"--data={store.folder}"]
    command += [f"--base={small_model}", "--output=command", "--size=64", "--seed=2"]
    done = subprocess.run(
        [*command, "--device=cpu", f"--json={tmp_path / 'table.json'}", *settings],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=_environment(),
    )
    assert done.returncode in (0, 1), done.stderr
    assert "before   after" in done.stdout
    assert "use it as --model=command@1" in done.stdout
    digests = [weights.read_info(weights.resolve(n)).sha256 for n in ("function", "command")]
    assert digests[0] == digests[1]
    report = json.loads((tmp_path / "table.json").read_text())
    assert (done.returncode == 0) == report["is_better"]


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ) | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_of_many_held_out_views_some_of_each_class_are_looked_at() -> None:
    def view(code: int) -> View:
        labels = torch.full((2, 2), code, dtype=torch.uint8)
        return View(torch.zeros(3, 2, 2), torch.zeros_like(labels), labels, of=0)

    views = [view(1 + i % 2) for i in range(121)]  # every other one would be of one class
    kept = _some_of_each_class(views, 60)
    assert len(kept) <= 60
    n_sharp = sum(bool((each.held_out == 1).all()) for each in kept)
    assert 20 <= n_sharp <= len(kept) - 20
    assert _some_of_each_class(views, 121) == views


def test_a_file_that_another_run_made_meanwhile_costs_no_training(
    small_model: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.safetensors"
    updates = []
    for update in finetune(
        noise_and_smooth(), base=small_model, budget=TINY, size=64, device="cpu", output=path
    ):
        path.touch()
        updates.append(update)
    assert result_of(updates).path == tmp_path / "mine-2.safetensors"
    assert weights.load(str(tmp_path / "mine-2.safetensors"))


def test_photographs_are_there_for_any_size() -> None:
    for example in photographs.watched(FinetuneConfig(image_size_px=800)):
        assert example.image.shape == (1, 3, 800, 800)
        assert example.blurred.shape == example.labelled.shape == (1, 1, 800, 800)


def test_float16_is_refused(small_model: str) -> None:
    with pytest.raises(ConfigError, match="float16"):
        run(small_model, precision="float16")


def test_an_image_without_blur_does_not_count_for_f(small_model: str) -> None:
    images = noise_and_smooth(4)
    images[2] = dataclasses.replace(images[2], split="val")
    sharp = np.where(images[3].labels == 1, np.uint8(1), np.uint8(0))
    images[3] = dataclasses.replace(images[3], labels=sharp, split="val")
    both = result_of(run(small_model, images=images)).before
    alone = result_of(run(small_model, images=images[:3])).before
    assert both.f_beta == pytest.approx(alone.f_beta)
    assert both.n_images == 2
