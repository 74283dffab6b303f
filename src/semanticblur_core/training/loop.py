"""The training loop: a generator of updates over Lightning Fabric."""

from __future__ import annotations

import copy
import csv
import hashlib
import io as streams
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semanticblur_core import io
from semanticblur_core.config import TrainConfig
from semanticblur_core.data.datasets import DecodedPairs
from semanticblur_core.data.defocus import SharpImages, synthesise
from semanticblur_core.data.transforms import augment, cutmix, normalise
from semanticblur_core.device import DeviceChoice
from semanticblur_core.errors import TrainingError
from semanticblur_core.inference.detector import Detector
from semanticblur_core.losses import blur_loss
from semanticblur_core.metrics import BlurScorer, Protocol, Scores
from semanticblur_core.network import SemanticBlur
from semanticblur_core.training.checkpoint import load_checkpoint, save_checkpoint

LAST_CHECKPOINT = "last.ckpt"
HISTORY = "history.csv"
VALIDATION_PROTOCOL = Protocol(
    analysis="images squashed to 320 x 320, maps brought back by nearest-exact"
)

SaveBest = Callable[[SemanticBlur, Scores, int], None]


@dataclass(frozen=True)
class TrainUpdate:
    """State of a run after one step; ``scores`` only where an epoch has just been validated.

    ``epoch`` counts from 1; ``step`` and ``total_steps`` count over the whole run; ``loss`` is this
    step's; ``images_per_s`` covers the epoch so far, training only.
    """

    epoch: int
    step: int
    total_steps: int
    loss: float
    learning_rate: float
    images_per_s: float
    scores: Scores | None = None
    is_best: bool = False


def train(
    model: SemanticBlur,
    training: DecodedPairs,
    validation: DecodedPairs,
    config: TrainConfig,
    *,
    run_dir: Path,
    device: DeviceChoice,
    save_best: SaveBest,
    sharp: Mapping[str, SharpImages] | None = None,
    start: dict[str, Any] | None = None,
    resume: bool = False,
) -> Generator[TrainUpdate]:
    """Train a network; close the generator to stop.

    Parameters
    ----------
    model
        Network to start from; trained in place.
    training, validation
        Decoded pairs. The validation set picks the best epoch.
    config
        Recipe.
    run_dir
        Folder of ``last.ckpt`` (full state, after every epoch) and ``history.csv``.
    device
        What to compute on; bfloat16 means mixed precision.
    save_best
        Called with the network, its scores and the epoch whenever the validation MAE fell.
    sharp
        Sharp images by kind, ``photograph`` and ``microscopy``, for the synthetic images of the
        recipe.
    start
        What the network was before (JSON values); kept in the checkpoint.
    resume
        Go on from ``last.ckpt``. On a CPU with the same number of threads the result is that of an
        uninterrupted run; GPUs are not deterministic.

    Raises
    ------
    TrainingError
        If sharp images that the recipe asks for are missing, the loss or the gradient stops being
        finite, the checkpoint does not fit the settings or
        the data, a file cannot be written, or there are fewer images than one batch.
    """
    from lightning_fabric import Fabric

    steps_per_epoch = len(training) // config.n_pairs_per_batch
    if steps_per_epoch == 0:
        raise TrainingError(
            f"{len(training)} training images are fewer than the {config.n_pairs_per_batch} of one "
            "batch"
        )
    synthetic = _synthetic_sources(config, sharp or {})
    total_steps = steps_per_epoch * config.epochs
    fabric = Fabric(
        accelerator=device.device.type,
        devices=[device.device.index or 0] if device.device.type == "cuda" else 1,
        precision="bf16-mixed" if device.dtype == torch.bfloat16 else "32-true",
    )
    torch.manual_seed(config.seed)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(_parameter_groups(model, config), weight_decay=config.weight_decay)
    wrapped, optimizer = fabric.setup(model, optimizer)
    averaged = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else None
    identity: dict[str, Any] = {
        "config": config.to_dict(),
        "architecture": model.config.to_dict(),
        "images": _names_digest(training, validation, synthetic),
        "computed on": f"{device.device.type}, {device.dtype}",
    }
    first_epoch, best_mae = 0, math.inf
    history: list[dict[str, str]] = []
    if resume:
        state = _restore(run_dir, model, averaged, optimizer, identity)
        first_epoch, best_mae = int(state["epoch"]), float(state["best_mae"])
        history, start = state["history"], state["start"]

    for epoch in range(first_epoch, config.epochs):
        _set_training_mode(model, config)
        started = time.perf_counter()
        loss_sum = 0.0
        update: TrainUpdate | None = None
        batches = _batches(training, synthetic, config, epoch)
        for i, (images, targets, labelled) in enumerate(batches):
            step = epoch * steps_per_epoch + i
            rate = learning_rate(step, total_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_factor"]
            images, targets = images.to(fabric.device), targets.to(fabric.device)
            labelled = None if labelled is None else labelled.to(fabric.device)
            optimizer.zero_grad()
            logits = wrapped(normalise(images))
            loss = blur_loss(
                logits, targets, labelled=labelled, ssim_weight=config.ssim_weight
            ).total
            value = float(loss.detach())
            _require_finite("loss", value, step, run_dir)
            fabric.backward(loss)
            norm = fabric.clip_gradients(
                wrapped, optimizer, max_norm=config.gradient_clip_norm, error_if_nonfinite=False
            )
            assert norm is not None
            _require_finite("gradient's norm", float(norm), step, run_dir)
            optimizer.step()
            if averaged is not None:
                _average(averaged, model, config.ema_decay, step)
            loss_sum += value
            speed = (i + 1) * config.batch_size / (time.perf_counter() - started)
            update = TrainUpdate(epoch + 1, step + 1, total_steps, value, rate, speed)
            if i + 1 < steps_per_epoch:
                yield update
        assert update is not None
        candidate = averaged if averaged is not None else model
        scores = validate(candidate, validation, device)
        is_best = scores.mae < best_mae
        if is_best:
            best_mae = scores.mae
            save_best(candidate, scores, epoch + 1)
        done = replace(update, scores=scores, is_best=is_best)
        history.append(_history_row(done, loss_sum / steps_per_epoch))
        save_checkpoint(
            run_dir / LAST_CHECKPOINT,
            {
                "identity": identity,
                "start": start,
                "history": history,
                "model": model.state_dict(),
                "averaged": averaged.state_dict() if averaged is not None else None,
                "optimizer": optimizer.state_dict(),
                "torch_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if device.device.type == "cuda" else [],
                "epoch": epoch + 1,
                "best_mae": best_mae,
            },
        )
        _write_history(run_dir / HISTORY, history)
        yield done


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then polynomial decay to zero (``poly_power`` 0.9 in the paper)."""
    rate: float = config.learning_rate * (1 - step / total_steps) ** config.poly_power
    if step < config.warmup_steps:
        rate *= (step + 1) / (config.warmup_steps + 1)
    return rate


def _parameter_groups(model: SemanticBlur, config: TrainConfig) -> list[dict[str, Any]]:
    """Early stages of the backbone at their own rate; frozen stages in no group."""
    stages = list(model.backbone.stages)
    for stage in stages[: config.frozen_stages]:
        stage.requires_grad_(False)
    early = [p for stage in stages[:3] for p in stage.parameters() if p.requires_grad]
    known = {id(p) for p in early}
    late = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = ((early, config.early_rate_factor), (late, 1.0))
    return [
        {"params": parameters, "rate_factor": factor, "lr": config.learning_rate * factor}
        for parameters, factor in groups
        if parameters
    ]


def _set_training_mode(model: SemanticBlur, config: TrainConfig) -> None:
    """Training mode, but for the statistics that stay as they are."""
    model.train()
    for stage in model.backbone.stages[: config.frozen_stages]:
        stage.eval()
    if config.frozen_statistics:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()


def validate(model: SemanticBlur, pairs: DecodedPairs, device: DeviceChoice) -> Scores:
    """Scores under the protocol of `semanticblur_core.metrics`, in float32."""
    detector = Detector(model, device=str(device.device), precision="float32")
    scorer = BlurScorer(VALIDATION_PROTOCOL)
    for index, pair in enumerate(pairs.pairs):
        image, mask = pairs[index]
        rgb = image.permute(1, 2, 0).numpy()
        [blur] = detector.detect_tensors([rgb], upsampling="nearest-exact")
        scorer.add_tensor(blur, mask[0].to(blur.device) > 127, name=pair.name)
    return scorer.result()


def _synthetic_sources(
    config: TrainConfig, sharp: Mapping[str, SharpImages]
) -> list[tuple[SharpImages, int]]:
    """Sources of synthetic images and how many of each batch come from them."""
    wanted = {
        "photograph": config.synthetic_photographs,
        "microscopy": config.synthetic_microscopy,
    }
    for kind, count in wanted.items():
        if count and kind not in sharp:
            raise TrainingError(
                f"the recipe makes {count} of each batch from sharp images ({kind}), and none are "
                "given"
            )
    return [(sharp[kind], count) for kind, count in wanted.items() if count]


def _batches(
    pairs: DecodedPairs,
    synthetic: Sequence[tuple[SharpImages, int]],
    config: TrainConfig,
    epoch: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Images, targets and what of them is labelled, the next batch made while one is used.

    Each example draws from a generator of its own, seeded by run, epoch and image, so that the data
    do not depend on where a run was interrupted; so do the synthetic images of each batch.
    """
    order = np.random.default_rng((config.seed, epoch)).permutation(len(pairs))

    def make(indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        examples = [
            augment(*pairs[i], config, np.random.default_rng((config.seed, epoch, i)))
            for i in indices
        ]
        images, targets = (torch.stack(tensors) for tensors in zip(*examples, strict=True))
        # The first index names the batch: every image occurs once in an epoch.
        if config.cutmix_share:
            rng = np.random.default_rng((config.seed, epoch, indices[0], 2))
            images, targets = cutmix(images, targets, share=config.cutmix_share, rng=rng)
        if not synthetic:
            return images, targets, None
        rng = np.random.default_rng((config.seed, epoch, indices[0], 1))
        made = [synthesise(s, count, config.image_size_px, rng) for s, count in synthetic]
        labelled = torch.ones_like(targets, dtype=torch.bool)
        return (
            torch.cat([images, *(example.image for example in made)]),
            torch.cat([targets, *(example.blurred.float() for example in made)]),
            torch.cat([labelled, *(example.labelled for example in made)]),
        )

    size = config.n_pairs_per_batch
    batches = [order[i : i + size].tolist() for i in range(0, len(order) - size + 1, size)]
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(make, batches[0])
        for following in [*batches[1:], None]:
            ready = pending
            if following is not None:
                pending = pool.submit(make, following)
            yield ready.result()


@torch.no_grad()
def _average(averaged: SemanticBlur, model: SemanticBlur, decay: float, step: int) -> None:
    """Exponential moving average of parameters and running statistics, faster at the start."""
    decay = min(decay, (1 + step) / (10 + step))
    ours, theirs = averaged.state_dict(), model.state_dict()
    floating = [k for k, tensor in ours.items() if tensor.is_floating_point()]
    torch._foreach_lerp_([ours[k] for k in floating], [theirs[k] for k in floating], 1 - decay)


def _names_digest(
    training: DecodedPairs,
    validation: DecodedPairs,
    synthetic: Sequence[tuple[SharpImages, int]],
) -> str:
    """sha256 of the names of the images trained on and held out, in order."""
    names = [[pair.name for pair in pairs.pairs] for pairs in (training, validation)]
    for source, _ in synthetic:
        stems = [path.stem for path in source.paths]
        names += [[source.kind, *stems], [stems[i] for i in source.with_mask]]
    return hashlib.sha256(repr(names).encode()).hexdigest()


def _require_finite(what: str, value: float, step: int, run_dir: Path) -> None:
    if math.isfinite(value):
        return
    path = run_dir / LAST_CHECKPOINT
    kept = f"; the state of the last whole epoch is kept in {path}" if path.exists() else ""
    raise TrainingError(
        f"the {what} became {value} at step {step + 1}{kept}; a lower learning rate would do"
    )


def _restore(
    run_dir: Path,
    model: SemanticBlur,
    averaged: SemanticBlur | None,
    optimizer: Any,
    identity: dict[str, Any],
) -> dict[str, Any]:
    path = run_dir / LAST_CHECKPOINT
    state = load_checkpoint(path)
    differing = []
    for key, mine in identity.items():
        theirs = state["identity"].get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            differing += sorted(k for k in mine | theirs if mine.get(k) != theirs.get(k))
        elif theirs != mine:
            differing.append(key)
    if differing:
        raise TrainingError(
            f"{path}: was made with other settings ({', '.join(differing)}); resume with the "
            "same ones, or start a run in another folder"
        )
    model.load_state_dict(state["model"])
    if averaged is not None:
        averaged.load_state_dict(state["averaged"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state


def _history_row(update: TrainUpdate, mean_loss: float) -> dict[str, str]:
    assert update.scores is not None
    return {
        "epoch": str(update.epoch),
        "step": str(update.step),
        "mean_loss": f"{mean_loss:.5f}",
        "learning_rate": f"{update.learning_rate:.3e}",
        "images_per_s": f"{update.images_per_s:.3f}",
        "val_mae": f"{update.scores.mae:.5f}",
        "val_f_beta": f"{update.scores.f_beta:.5f}",
        "val_iou": f"{update.scores.iou:.5f}",
    }


def _write_history(path: Path, rows: list[dict[str, str]]) -> None:
    text = streams.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    io.write_text(path, text.getvalue())
