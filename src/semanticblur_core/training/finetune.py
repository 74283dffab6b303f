"""Fine-tuning on a few images with partial labels, in about a minute on two CPU cores.

What the frozen part of the backbone says of each view is computed once; the rest is trained on
the labelled pixels alone. Beside them stand generated photographs on which the network is held to
what it said before (Li and Hoiem, Learning without forgetting, TPAMI 2018,
doi:10.1109/TPAMI.2017.2773081), and weights that these depend on move less. The weights that are
kept lie on the line from the base's to those that were learned, as far from the base's as the
number of images allows and other photographs bear (Wortsman and others, Robust fine-tuning of
zero-shot models, CVPR 2022, doi:10.1109/CVPR52688.2022.00780).
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from semanticblur_core import disk, weights
from semanticblur_core.config import FinetuneConfig
from semanticblur_core.data.defocus import Example
from semanticblur_core.data.labels import BLURRED, SHARP, LabelledImage
from semanticblur_core.device import DeviceChoice, choose_device, computes_bfloat16
from semanticblur_core.errors import ConfigError, DataError, TrainingError, WeightsError
from semanticblur_core.inference.detector import Detector
from semanticblur_core.metrics import BlurScorer, Protocol, Scores
from semanticblur_core.network import SemanticBlur
from semanticblur_core.training import photographs
from semanticblur_core.training.recipes import finetune_budget
from semanticblur_core.training.strokes import (
    MOST_VIEWS,
    HeldOut,
    Size,
    View,
    augmented_views,
    hold_out,
    plain_views,
)
from semanticblur_core.training.tuner import (
    Tuner,
    cut,
    held_out_loss,
    inside,
    learning_rate,
    map_drift,
    photograph_error,
    random_window,
    stroke_loss,
)
from semanticblur_core.version import __version__

PROTOCOL = Protocol(
    resolution="the labels' own",
    iou="pooled over labelled pixels, blurred class",
    analysis="labelled pixels only",
)
# F is 0 of an image without anything blurred, however right its map.
_RESULT_PROTOCOL = replace(
    PROTOCOL,
    f_beta="mean over images with blurred labels, binary at map > threshold",
    analysis=f"{PROTOCOL.analysis}, F of images with blurred ones",
)
# Three times what MAE on real photographs rose by in the same runs, see docs/finetune.md.
FORGOTTEN = 0.03
# Places on the line from the base's weights (0) to as far as the number of images allows (1), see
# _train.
_SHARES = (1.0, 0.8, 0.6, 0.45, 0.3, 0.2, 0.12)

# Held-out errors, in training and of the result, that differ by less are as good.
_TIE = 0.002

Phase = Literal["preparing", "training", "done"]


@dataclass(frozen=True)
class FinetuneResult:
    """What came of a run.

    Attributes
    ----------
    path
        File of the new weights, None where none was asked for.
    model
        The name or file that ``--model`` and `Detector` take, None likewise.
    before, after
        Scores of base and new model on the held-out labels (on all labels where ``held_out`` is
        None: too few to hold any out).
    forgetting_before, forgetting_after
        MAE on generated photographs that were not trained on.
    forgetting_first
        The same of the model that a chain of fine-tunings began with.
    held_out
        What was held out, in words.
    held_out_both
        Whether both classes were: else a model that knows no other may look better.
    best_step, n_steps
        Step of the weights that were kept, 0 = the base's own, and steps done.
    """

    path: Path | None
    model: str | None
    before: Scores
    after: Scores
    forgetting_before: float
    forgetting_after: float
    forgetting_first: float
    held_out: str | None
    held_out_both: bool
    best_step: int
    n_steps: int

    @property
    def has_improved(self) -> bool:
        """Whether MAE on the held-out labels fell by more than 0.002.

        Where errors are smaller than 0.04, by more than a twentieth.
        """
        return self.before.mae - self.after.mae > min(_TIE, self.before.mae / 20)

    @property
    def is_better(self) -> bool:
        """Whether it improved on the held-out labels and photographs were not forgotten."""
        return self.has_improved and not self.has_forgotten

    @property
    def has_forgotten(self) -> bool:
        """Whether MAE on generated photographs rose by more than 0.03 since the first model."""
        return self.forgetting_after - self.forgetting_first > FORGOTTEN

    @property
    def is_proven(self) -> bool:
        """Whether it is better on labels of both classes that it did not learn from."""
        return self.is_better and self.held_out_both

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        verdicts = ("is_better", "has_improved", "has_forgotten", "is_proven")
        values = asdict(self) | {name: getattr(self, name) for name in verdicts}
        return values | {"path": None if self.path is None else str(self.path)}


@dataclass(frozen=True)
class FinetuneUpdate:
    """State of a run.

    Attributes
    ----------
    phase
        ``preparing`` (features are computed), ``training``, ``done``.
    step, total_steps
        Pieces of work of this phase.
    loss
        This step's, on the labels; NaN while preparing.
    held_out_loss
        Mean absolute error on held-out labels at the network's size, both classes counting alike;
        only after steps at which it was looked at. Step 0 is the base model.
    photographs
        Mean absolute error on generated photographs, with ``held_out_loss``.
    is_best
        Whether these are the weights that are kept so far: the best of the second half of the run,
        or of the first for as long as the second has none that is better than the base.
    preview
        ``(H, W)`` float32 blur map of the image given as ``preview``, with ``held_out_loss``.
    result
        Only with the phase ``done``.
    """

    phase: Phase
    step: int
    total_steps: int
    loss: float = math.nan
    held_out_loss: float | None = None
    photographs: float | None = None
    is_best: bool = False
    preview: NDArray[np.float32] | None = None
    result: FinetuneResult | None = None


def finetune(
    images: Sequence[LabelledImage],
    *,
    base: str | Path = "default",
    output: str | Path | None = None,
    budget: str | FinetuneConfig = "quick",
    seed: int | None = None,
    size: Size | None = None,
    device: str = "auto",
    precision: str = "auto",
    preview: NDArray[Any] | None = None,
    best_so_far: str | Path | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Generator[FinetuneUpdate]:
    """Teach a model with a few labelled images; close the generator to stop and keep nothing.

    Parameters
    ----------
    images
        Images and what was painted on them; `semanticblur_core.data.store.read_store` reads them
        from an annotation store.
    base
        Model to start from; it stays as it is.
    output
        A name, which becomes the next version of a model of one's own, or a new file
        (``.safetensors``). None writes nothing.
    budget
        ``quick`` (about a minute on two cores), ``thorough``, or every number.
    seed
        Seed of everything drawn; None takes the budget's.
    size
        Side in pixels that images are squashed to, as in `Detector.detect`, in place of the
        budget's ``image_size_px``; or ``native``: windows of the images' own pixels, of that side.
        None takes the budget's, 320 of those with a name.
    device, precision
        See `Detector`; but ``auto`` is bfloat16 where the device has instructions for it, whatever
        a stopwatch says, for the same seed, device and number of threads are to give the same
        weights. What is reported at the end is computed in float32.
    preview
        An image whose map is wanted as training goes on.
    best_so_far
        File that always holds the best weights so far, from the first that beat the base's on: what
        is left if the process is killed.
    should_stop
        Asked after each step; True ends the training, and the best weights so far are kept.

    Yields
    ------
    FinetuneUpdate
        The last one, of the phase ``done``, holds the result. The file is written whether or not
        the model got better: ``result.is_better`` says.

    Raises
    ------
    DataError
        If fewer than two classes are labelled, or an image is too small for native size.
    ConfigError, WeightsError
        If a setting or a name is wrong, or the output exists. These and what is wrong with the
        labels are found at once, before the first step.
    TrainingError
        If the loss stops being finite.
    """
    images = list(images) if isinstance(images, Iterable) else [images]
    for image in images:
        if not isinstance(image, LabelledImage):
            raise DataError(
                f"images: expected what `read_store` returns, or a list of LabelledImage, got "
                f"{image!r:.80}"
            )
    config = finetune_budget(budget)
    if seed is not None:
        config = replace(config, seed=seed)
    if size != "native":
        config = config if size is None else replace(config, image_size_px=size)
        size = config.image_size_px
    target = _target(output)
    for code, word in ((SHARP, "sharp (1)"), (BLURRED, "blurred (2)")):
        if not any((image.labels == code).any() for image in images):
            raise DataError(f"nothing is labelled {word}: paint some of it")
    chosen = choose_device(device, "float32" if precision == "auto" else precision)
    if chosen.dtype == torch.float16:
        raise ConfigError("precision float16: fine-tuning computes in float32 or bfloat16")
    if precision == "auto" and computes_bfloat16(chosen.device):
        chosen = chosen._replace(dtype=torch.bfloat16)
    model, info = weights.load(base)
    if target is not None:
        disk.require_writable(target)
        _require_space(target.parent, 2 * info.size_bytes)
    return _finetune(
        images,
        model,
        info,
        config,
        chosen,
        output=output,
        size=size,
        preview=preview,
        best_so_far=best_so_far,
        should_stop=should_stop,
    )


def _finetune(
    images: Sequence[LabelledImage],
    model: SemanticBlur,
    info: weights.WeightsInfo,
    config: FinetuneConfig,
    chosen: DeviceChoice,
    *,
    output: str | Path | None,
    size: Size,
    preview: NDArray[Any] | None,
    best_so_far: str | Path | None,
    should_stop: Callable[[], bool] | None,
) -> Generator[FinetuneUpdate]:
    """As `finetune`, whose arguments were checked."""
    tuner = Tuner(model, config, chosen)
    split = hold_out(images, config.held_out_share, np.random.default_rng((config.seed, 0)))
    plain = plain_views(images, split, size, config)
    made = augmented_views(
        plain, config.n_views, crops=size != "native", rng=np.random.default_rng((config.seed, 1))
    )
    looked_at = [view for view in plain if (view.held_out > 0).any()]
    looked_at = _some_of_each_class(looked_at, MOST_VIEWS * config.n_views)
    replayed, watched = photographs.replayed(config), photographs.watched(config)
    untouched = photographs.untouched(config)
    spared = range(0, len(replayed), 2) if config.importance_damping else range(0)
    total = len(made) + len(looked_at) + len(replayed) + len(watched) + len(untouched) + len(spared)
    n_done = 0
    for kind, pictures in (
        ("user", [view.image for view in made]),
        ("held out", [view.image for view in looked_at]),
        ("replay", replayed),
        ("watched", [example.image[0] for example in watched]),
        ("untouched", untouched),
    ):
        for picture in pictures:
            tuner.remember(kind, picture)
            n_done += 1
            yield FinetuneUpdate("preparing", n_done, total)
    for kind in ("replay", "untouched"):
        tuner.keep_answers(kind)
    for _ in tuner.spare("replay", spared, np.random.default_rng((config.seed, 3))):
        n_done += 1
        yield FinetuneUpdate("preparing", n_done, total)
    checked = photographs.checked(config)
    base_detector = Detector(
        weights.load(str(info.path))[0], device=str(chosen.device), precision="float32"
    )
    forgetting_before = photographs.error_on(base_detector, checked)
    forgetting_first = _first(info, forgetting_before)

    def save(path: str | Path, metrics: dict[str, Any], *, new: bool = False) -> None:
        start = {"from": info.path.name, "sha256": info.sha256, "provenance": info.provenance}
        provenance = {
            "software": f"napari-semanticblur {__version__}, torch {torch.__version__}",
            "date": datetime.now(UTC).date().isoformat(),
            "recipe": {"name": "finetune", "size": size} | config.to_dict(),
            "n_training_images": len(images),
            "device": str(chosen.device),
            "precision": str(chosen.dtype).removeprefix("torch."),
            "n_threads": torch.get_num_threads(),
            "start": start,
        }
        weights.save(
            path,
            tuner.model,
            provenance=provenance,
            metrics=metrics,
            licence=info.licence,
            new=new,
        )

    update = None
    for update in _train(
        tuner, made, looked_at, watched, preview=preview, size=size, should_stop=should_stop
    ):
        if update.is_best and best_so_far is not None:
            with tuner.best():
                seen = {
                    "step": update.step,
                    "held_out_error": update.held_out_loss,
                    "photographs": update.photographs,
                }
                report = {"held_out": split.how, "forgetting_first": forgetting_first}
                save(best_so_far, {"finetune": {"stopped": seen} | report})
        yield update
    assert update is not None
    n_steps = update.step
    tuner.restore_best()
    detector = Detector(model, device=str(chosen.device), precision="float32")
    before, after = (_score(d, images, split, size) for d in (base_detector, detector))
    result = FinetuneResult(
        path=None,
        model=None,
        before=before,
        after=after,
        forgetting_before=forgetting_before,
        forgetting_after=photographs.error_on(detector, checked),
        forgetting_first=forgetting_first,
        held_out=split.how,
        held_out_both=split.has_both,
        best_step=tuner.best_step,
        n_steps=n_steps,
    )
    # The name is looked up again: another run may have taken the version meanwhile.
    while (target := _target(output, or_beside=True)) is not None:
        name = target.stem if target.parent == weights.models_folder() else str(target)
        result = replace(result, path=target, model=name)
        data = split.how or "the labels that were trained on"
        report = {k: v for k, v in result.to_dict().items() if k not in ("path", "model", "after")}
        with suppress(disk.TakenError):  # then another run took the name meanwhile
            save(target, after.to_dict() | {"data": data, "finetune": report}, new=True)
            break
    yield FinetuneUpdate("done", n_steps, n_steps, result=result)


def _train(
    tuner: Tuner,
    made: Sequence[View],
    looked_at: Sequence[View],
    watched: Sequence[Example],
    *,
    preview: NDArray[Any] | None,
    size: Size,
    should_stop: Callable[[], bool] | None,
) -> Generator[FinetuneUpdate]:
    config = tuner.config
    rng = np.random.default_rng((config.seed, 2))
    targets = [view.training.to(tuner.device)[None] for view in made]
    answers = tuner.answers("replay")

    base_error = best = limit = math.inf
    shares = list(_SHARES)
    # What few images teach reaches too far: F on other planes was best at 0.6 to 0.8 of the way
    # with two images, at the end of it with five.
    furthest = min(1.0, 0.5 + 0.1 * len({view.of for view in made}))

    def look(update: FinetuneUpdate) -> FinetuneUpdate:
        """Measure weights that are as far from the base's as photographs bear; they may be kept."""
        for share in shares:
            with tuner.averaged(furthest * share):
                error = photograph_error(tuner, watched)
                bears = error <= limit and map_drift(tuner, "untouched") <= config.drift_limit
                if not bears and share != shares[-1]:
                    continue
                # What photographs bear changes slowly: the next look begins one place before.
                shares[:] = _SHARES[max(0, _SHARES.index(share) - 1) :]
                update = replace(update, photographs=error, is_best=bears)
                if looked_at:
                    held_out = held_out_loss(tuner, looked_at)
                    is_best = bears and held_out < min(base_error, best + _TIE)
                    update = replace(update, held_out_loss=held_out, is_best=is_best)
                if update.step and update.is_best:
                    tuner.keep_best(update.step)
                if preview is not None:
                    detector = Detector(tuner.model, device=str(tuner.device), precision="float32")
                    update = replace(update, preview=detector.detect(preview, size=size))
                break
        return update

    first = look(FinetuneUpdate("training", 0, config.n_steps))
    assert first.photographs is not None
    limit = first.photographs + config.forgetting_limit
    base_error = best = math.inf if first.held_out_loss is None else first.held_out_loss
    yield replace(first, is_best=False)
    n_without_progress = 0
    for step in range(1, config.n_steps + 1):
        chosen = rng.permutation(len(made))[: config.batch_size].tolist()
        windows = [random_window(config, rng, targets[i]) for i in chosen]
        codes = cut([targets[i] for i in chosen], windows)
        loss = stroke_loss(inside(tuner.logits("user", chosen, windows)), codes)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(f"the loss became {value} at step {step}; a lower rate would do")
        if answers and config.replay_size and config.replay_weight:
            again = rng.permutation(len(answers))[: config.replay_size].tolist()
            windows = [random_window(config, rng) for _ in again]
            held_to = F.binary_cross_entropy_with_logits(
                inside(tuner.logits("replay", again, windows)),
                cut([answers[i] for i in again], windows),
            )
            loss = loss + config.replay_weight * held_to
        tuner.step(loss, learning_rate(step - 1, config))
        update = FinetuneUpdate("training", step, config.n_steps, value)
        stopping = should_stop is not None and should_stop()
        if step % config.validate_every and step < config.n_steps and not stopping:
            yield update
            continue
        # The labels and what is replayed still pull apart in the first half, where a small error on
        # few strokes is chance: the best of it is kept for as long as the second half has none.
        is_late = 2 * step > config.n_steps
        if is_late and 2 * tuner.best_step <= config.n_steps:
            best = base_error
        update = look(update)
        if update.held_out_loss is not None:
            best = min(best, update.held_out_loss) if update.is_best else best
            n_without_progress = n_without_progress + 1 if is_late and not update.is_best else 0
        yield update
        if stopping or n_without_progress >= config.patience:
            return


def _first(info: weights.WeightsInfo, error: float) -> float:
    """Error on generated photographs that a chain of fine-tunings began with."""
    report = info.metrics.get("finetune")
    first = report.get("forgetting_first") if isinstance(report, dict) else None
    return min(error, first) if isinstance(first, float) else error


def _score(
    detector: Detector, images: Sequence[LabelledImage], split: HeldOut, size: Size
) -> Scores:
    """Scores on the held-out labels, or on all where none are."""
    scorer = BlurScorer(_RESULT_PROTOCOL)
    kept = split.held_out if split.how else split.training
    for image, labels in zip(images, kept, strict=True):
        labelled = labels > 0
        if labelled.any():
            blur = detector.detect(image.image, size=size, value_range=image.value_range)
            scorer.add(blur[labelled][None], (labels[labelled] == BLURRED)[None], name=image.name)
    having = [score.f_beta for score in scorer.images if score.tp + score.fn]
    return replace(scorer.result(), f_beta=float(np.mean(having)) if having else 0.0)


def _require_space(folder: Path, n_bytes: int) -> None:
    """Refuse before the training what would fail after it; the best so far needs room too."""
    while not folder.exists():
        folder = folder.parent
    _, _, free = shutil.disk_usage(folder)
    if free < n_bytes:
        raise WeightsError(
            f"{folder}: {free / 1e6:.0f} MB free, and a new model takes {n_bytes / 1e6:.0f} MB "
            "while it is made; make room, or set SEMANTICBLUR_HOME to another disk"
        )


def _some_of_each_class(views: list[View], most: int) -> list[View]:
    """At most so many views, evenly from those with held-out labels of either class."""
    if len(views) <= most:
        return views
    kept: set[int] = set()
    for code in (SHARP, BLURRED):
        having = [i for i, view in enumerate(views) if (view.held_out == code).any()]
        kept.update(having[:: math.ceil(2 * len(having) / most) or 1])
    return [views[i] for i in sorted(kept)]


def _target(output: str | Path | None, *, or_beside: bool = False) -> Path | None:
    """File to write; a name becomes the next version in the folder of models.

    One that exists is refused, or the next free one beside it taken.
    """
    if output is None:
        return None
    text = str(output)
    if not text.endswith(".safetensors") and not isinstance(output, Path):
        return weights.next_version(text)
    path = Path(output)
    if path.exists() and not or_beside:
        raise WeightsError(f"{path}: exists already; give another file, or a name")
    others = (path.with_stem(f"{path.stem}-{i}") for i in itertools.count(2))
    return next(free for free in itertools.chain([path], others) if not free.exists())
