"""The training loop: a generator of updates over Lightning Fabric."""

from __future__ import annotations

import copy
import csv
import hashlib
import io as streams
import math
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from semanticblur_core import disk
from semanticblur_core.config import TrainConfig
from semanticblur_core.data.datasets import DecodedPairs
from semanticblur_core.data.defocus import SharpImages
from semanticblur_core.data.journal import Lock
from semanticblur_core.data.transforms import normalise
from semanticblur_core.device import DeviceChoice, is_out_of_memory
from semanticblur_core.errors import ConfigError, TrainingError
from semanticblur_core.inference.detector import Detector
from semanticblur_core.losses import LabelCounts, label_counts, unchecked_blur_loss
from semanticblur_core.metrics import BlurScorer, Protocol, Scores
from semanticblur_core.network import SemanticBlur
from semanticblur_core.training.checkpoint import load_checkpoint, save_checkpoint
from semanticblur_core.training.loader import Batch, make_batches, synthetic_sources

LAST_CHECKPOINT = "last.ckpt"
_LOCK_NAME = ".lock"
HISTORY = "history.csv"
VALIDATION_PROTOCOL = Protocol(
    analysis="images squashed to 320 x 320, maps brought back by nearest-exact"
)

# In float16 each step whose gradients overflow halves the loss scale, at first 2^16.
MOST_OVERFLOWS = 50
_LOWER_RATE = "a lower learning rate"

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
    run_dir: str | Path,
    device: DeviceChoice,
    save_best: SaveBest,
    sharp: Mapping[str, SharpImages] | None = None,
    start: dict[str, Any] | None = None,
    resume: bool = False,
    checkpoint_every_s: float = 300.0,
    checkpoint_every_steps: int | None = None,
    compile_model: bool = False,
) -> Generator[TrainUpdate]:
    """Train a network; close the generator to stop, which writes the state to resume from.

    Parameters
    ----------
    model
        Network to start from; trained in place.
    training, validation
        Decoded pairs. The validation set picks the best epoch.
    config
        Recipe.
    run_dir
        Folder of ``last.ckpt`` (full state) and ``history.csv``, of one run at a time.
    device
        What to compute on; bfloat16 and float16 mean mixed precision. In a process that
        ``torchrun`` started it is one of several: each batch is shared among them, the loss is
        divided by the labels of the whole batch, and only the first writes files.
    save_best
        Called with the network, its scores and the epoch whenever the validation MAE fell.
    sharp
        Sharp images by kind, ``photograph`` and ``microscopy``, for the synthetic images of the
        recipe.
    start
        What the network was before (JSON values); kept in the checkpoint.
    resume
        Go on from ``last.ckpt``. On a CPU with the same number of threads the result is that of an
        uninterrupted run, wherever it was interrupted; GPUs are not deterministic.
    checkpoint_every_s, checkpoint_every_steps
        How often the state is written within an epoch; it always is at its end.
    compile_model
        Train through ``torch.compile``.

    Raises
    ------
    ConfigError
        At once, if an argument is of another type.
    TrainingError
        If the folder holds a run that is not to be resumed, or another process trains in it; if
        sharp images that the recipe asks for are missing, the loss or the gradient stops being
        finite, the checkpoint does not fit the settings or the data, a file cannot be written,
        there are fewer images than one batch, or memory does not suffice for a single image.
    """
    for name, value, kind, such_as in (
        ("model", model, SemanticBlur, "SemanticBlur()"),
        ("training", training, DecodedPairs, "DecodedPairs(pairs)"),
        ("validation", validation, DecodedPairs, "DecodedPairs(pairs)"),
        ("config", config, TrainConfig, 'recipe("best")'),
        ("device", device, DeviceChoice, 'choose_device("auto", "auto")'),
    ):
        if not isinstance(value, kind):
            raise ConfigError(
                f"{name}: expected a {kind.__name__}, as {such_as}, got {value!r:.80}"
            )
    if not len(validation):
        raise TrainingError("validation: holds no images, and the best epoch is picked by them")
    for i, name in enumerate(validation.names):
        mask = validation[i][1]
        if len(mask) == 2 and not mask[1].any():
            raise TrainingError(f"validation: nothing of {name} is labelled; leave it out")
    count_steps(training, config)
    run_dir = Path(run_dir)
    if not resume:
        refuse_earlier_run(run_dir, LAST_CHECKPOINT, HISTORY)
    synthetic = synthetic_sources(config, sharp or {})
    updates = _train(
        model,
        training,
        validation,
        config,
        run_dir=run_dir,
        device=device,
        save_best=save_best,
        synthetic=synthetic,
        start=start,
        resume=resume,
        checkpoint_every_s=checkpoint_every_s,
        checkpoint_every_steps=checkpoint_every_steps,
        compile_model=compile_model,
    )
    return _with_own_random_numbers(_alone(updates, run_dir))


def _with_own_random_numbers(updates: Generator[TrainUpdate]) -> Generator[TrainUpdate]:
    """Neither run's nor program's draws from torch's generator of the CPU move the other's."""
    own: torch.Tensor | None = None
    with closing(updates):
        while True:
            programs = torch.get_rng_state()
            if own is not None:
                torch.set_rng_state(own)
            try:
                update = next(updates, None)
            finally:
                own = torch.get_rng_state()
                torch.set_rng_state(programs)
            if update is None:
                return
            try:
                yield update
            except GeneratorExit:  # the state is written with the run's own
                programs = torch.get_rng_state()
                torch.set_rng_state(own)
                try:
                    updates.close()
                finally:
                    torch.set_rng_state(programs)
                raise


def refuse_earlier_run(run_dir: Path, *names: str) -> None:
    """Refuse a folder that holds one of these files.

    Raises
    ------
    TrainingError
        If it does.
    """
    for name in names:
        if (run_dir / name).exists():
            how = "--resume goes on with it" if name == LAST_CHECKPOINT else "without its state"
            raise TrainingError(f"{run_dir / name}: of an earlier run, {how}; give another folder")


def _alone(updates: Generator[TrainUpdate], run_dir: Path) -> Generator[TrainUpdate]:
    """The updates, while no other process trains in the folder."""
    with ExitStack() as resources:
        if is_first_process():
            lock = Lock(run_dir, _LOCK_NAME, what="is being trained in")
            resources.callback(lock.close, delete=True)
        yield from resources.enter_context(closing(updates))


def _train(
    model: SemanticBlur,
    training: DecodedPairs,
    validation: DecodedPairs,
    config: TrainConfig,
    *,
    run_dir: Path,
    device: DeviceChoice,
    save_best: SaveBest,
    synthetic: Sequence[tuple[SharpImages, int]],
    start: dict[str, Any] | None,
    resume: bool,
    checkpoint_every_s: float,
    checkpoint_every_steps: int | None,
    compile_model: bool,
) -> Generator[TrainUpdate]:
    """As `train`, whose arguments were checked."""
    steps_per_epoch = count_steps(training, config)
    total_steps = steps_per_epoch * config.epochs
    fabric = launch_fabric(device, config)
    device = device._replace(device=fabric.device)
    torch.manual_seed(config.seed)
    model.to(memory_format=torch.channels_last)
    if fabric.world_size > 1 and device.device.type == "cuda" and not config.frozen_statistics:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    optimizer = make_optimizer(model, config, device)
    wrapped, optimizer = fabric.setup(torch.compile(model) if compile_model else model, optimizer)
    averaged = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else None
    identity: dict[str, Any] = {
        "config": config.to_dict(),
        "architecture": model.config.to_dict(),
        "images": _digest(training, validation, synthetic),
        "computed on": f"{device.device.type}, {device.dtype}",
    }
    if is_first_process():
        for part in disk.left_behind(run_dir / LAST_CHECKPOINT):  # of a run that was killed
            disk.remove_if_stale(part)
    first_epoch, first_batch, loss_sum, best_mae = 0, 0, 0.0, math.inf
    history: list[dict[str, str]] = []
    if resume:
        state = _restore(run_dir, model, averaged, optimizer, identity)
        fabric.strategy.precision.load_state_dict(state.get("precision", {}))
        first_epoch, best_mae = int(state["epoch"]), float(state["best_mae"])
        first_batch, loss_sum = int(state.get("batch", 0)), float(state.get("loss_sum", 0.0))
        history, start = state["history"], state["start"]
        if history and is_first_process():  # a run may have been killed just before
            _write_history(run_dir / HISTORY, history)
    average = None if averaged is None else _averaging(averaged, model, config.ema_decay)
    n_parts, n_overflows = config.accumulate, 0

    def write_state(epoch: int, batch: int) -> None:
        if not fabric.is_global_zero:
            return
        cuda = device.device.type == "cuda"
        save_checkpoint(
            run_dir / LAST_CHECKPOINT,
            {
                "identity": identity,
                "start": start,
                "history": history,
                "model": model.state_dict(),
                "averaged": averaged.state_dict() if averaged is not None else None,
                "optimizer": optimizer.state_dict(),
                "precision": fabric.strategy.precision.state_dict(),
                "torch_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if cuda else [],
                "epoch": epoch,
                "batch": batch,
                "loss_sum": loss_sum,
                "best_mae": best_mae,
            },
        )

    for epoch in range(first_epoch, config.epochs):
        set_training_mode(model, config)
        started = written = time.perf_counter()
        update: TrainUpdate | None = None
        batches = make_batches(
            training, synthetic, config, epoch, first=first_batch, device=device.device
        )
        for i, batch in enumerate(batches, start=first_batch):
            step = epoch * steps_per_epoch + i
            rate = learning_rate(step, total_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_factor"]
            value, n_parts = backward(fabric, wrapped, optimizer, batch, config, n_parts)
            _require_finite("loss", value, step, run_dir)
            norm = fabric.clip_gradients(
                wrapped, optimizer, max_norm=config.gradient_clip_norm, error_if_nonfinite=False
            )
            assert norm is not None
            n_overflows = 0 if math.isfinite(norm) else n_overflows + 1
            if device.dtype != torch.float16:
                _require_finite("gradient's norm", float(norm), step, run_dir)
            elif n_overflows == MOST_OVERFLOWS:  # the loss scale is found by a few
                what = f"gradient's norm of {n_overflows} steps in a row"
                _require_finite(what, float(norm), step, run_dir, "float32 or " + _LOWER_RATE)
            optimizer.step()
            if average is not None:
                average(step)
            loss_sum += value
            seconds = time.perf_counter() - started
            speed = (i + 1 - first_batch) * config.batch_size / seconds
            update = TrainUpdate(epoch + 1, step + 1, total_steps, value, rate, speed)
            if i + 1 < steps_per_epoch:
                due = time.perf_counter() - written > checkpoint_every_s
                if due or (checkpoint_every_steps and (i + 1) % checkpoint_every_steps == 0):
                    write_state(epoch, i + 1)
                    written = time.perf_counter()
                try:
                    yield update
                except GeneratorExit:
                    write_state(epoch, i + 1)
                    raise
        assert update is not None
        candidate = averaged if averaged is not None else model
        scores = None
        if fabric.is_global_zero:
            scores = validate(candidate, validation, device)
        scores = fabric.broadcast(scores)
        assert scores is not None
        is_best = scores.mae < best_mae
        if is_best:
            best_mae = scores.mae
            if fabric.is_global_zero:
                save_best(candidate, scores, epoch + 1)
        done = replace(update, scores=scores, is_best=is_best)
        history.append(_history_row(done, loss_sum / steps_per_epoch))
        first_batch, loss_sum = 0, 0.0
        write_state(epoch + 1, 0)
        if fabric.is_global_zero:
            _write_history(run_dir / HISTORY, history)
        yield done


def count_steps(pairs: DecodedPairs, config: TrainConfig) -> int:
    """Steps of an epoch.

    Raises
    ------
    TrainingError
        If there are fewer pairs than one batch takes.
    """
    n_steps = len(pairs) // config.n_pairs_per_batch * config.passes_per_epoch
    if n_steps == 0:
        raise TrainingError(
            f"{len(pairs)} training images are fewer than the {config.n_pairs_per_batch} of one "
            "batch"
        )
    return n_steps


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then polynomial (power 0.9 in the paper) or cosine decay to zero."""
    done = step / total_steps
    if config.schedule == "cosine":
        rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    else:
        rate = config.learning_rate * (1 - done) ** config.poly_power
    if step < config.warmup_steps:
        rate *= (step + 1) / (config.warmup_steps + 1)
    return rate


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes; always without ``torchrun``."""
    return not is_one_of_several() or int(os.environ["RANK"]) == 0


def is_one_of_several() -> bool:
    """Whether ``torchrun`` started this process."""
    return torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()


def any_process(asked: bool) -> bool:
    """Whether any process of a run that has begun says so; all of them have to ask."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return asked
    on_gpu = torch.distributed.get_backend() == "nccl"
    flag = torch.tensor(int(asked), device=torch.cuda.current_device() if on_gpu else "cpu")
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def launch_fabric(device: DeviceChoice, config: TrainConfig) -> Any:
    """Fabric for this process: alone, or one of those that ``torchrun`` started."""
    from lightning_fabric import Fabric

    precisions = {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}
    kind = device.device.type
    keywords: dict[str, Any] = {"devices": [device.device.index or 0] if kind == "cuda" else 1}
    if is_one_of_several():
        n_local = int(os.environ["LOCAL_WORLD_SIZE"])
        n_all = int(os.environ["WORLD_SIZE"])
        if n_all > config.batch_size:
            raise TrainingError(
                f"{n_all} processes share batches of {config.batch_size} images; "
                f"--set=batch_size={n_all} or more is needed"
            )
        keywords = {"devices": n_local, "num_nodes": n_all // n_local, "strategy": "ddp"}
    fabric = Fabric(
        accelerator=kind,
        precision=precisions.get(device.dtype, "32-true"),
        **keywords,
    )
    fabric.launch()
    return fabric


def backward(
    fabric: Any,
    wrapped: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
    n_parts: int,
) -> tuple[float, int]:
    """Gradient of the whole batch, worked through in parts; halved when memory runs out.

    Returns
    -------
    tuple
        The whole batch's loss, and the number of parts that it and those to come are worked in.
    """
    n_processes = fabric.world_size
    counts = LabelCounts(*(c.to(fabric.device) for c in label_counts(batch[1], batch[2])))
    mine = [
        None if tensor is None else torch.tensor_split(tensor, n_processes)[fabric.global_rank]
        for tensor in batch
    ]
    assert mine[0] is not None
    # As many parts in each process: where one had fewer, another would wait for its BatchNorm.
    n_images = max(1, len(batch[0]) // n_processes)
    while True:
        optimizer.zero_grad()
        try:
            losses: list[torch.Tensor] = []
            n_parts = min(n_parts, n_images)
            parts = [
                [None] * n_parts if tensor is None else torch.tensor_split(tensor, n_parts)
                for tensor in mine
            ]
            for k, (images, targets, labelled) in enumerate(zip(*parts, strict=True)):
                assert images is not None
                assert targets is not None
                images, targets = images.to(fabric.device), targets.to(fabric.device)
                labelled = None if labelled is None else labelled.to(fabric.device)
                waits = n_processes > 1 and k + 1 < n_parts
                with fabric.no_backward_sync(wrapped) if waits else nullcontext():
                    loss = unchecked_blur_loss(
                        wrapped(normalise(images)),
                        targets,
                        labelled=labelled,
                        ssim_weight=config.ssim_weight,
                        counts=counts,
                    ).total
                    # Gradients are averaged over processes, and are to be summed.
                    fabric.backward(loss * n_processes)
                losses.append(loss.detach())
            total = sum(torch.stack(losses).tolist())  # once: each number read waits for a GPU
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Other processes would wait for this one's gradients for ever.
            if n_processes > 1 or n_parts >= n_images:
                raise TrainingError(
                    f"out of memory with {math.ceil(n_images / n_parts)} images at once; a larger "
                    "accumulate, or a smaller image_size_px, would do"
                ) from error
        else:
            if n_processes > 1:
                total = float(fabric.all_reduce(torch.tensor(total), reduce_op="sum"))
            return total, n_parts
        # Outside the handler, which keeps the failed attempt's tensors alive.
        n_parts = min(2 * n_parts, n_images)
        if fabric.device.type == "cuda":
            torch.cuda.empty_cache()


def make_optimizer(
    model: SemanticBlur, config: TrainConfig, device: DeviceChoice
) -> torch.optim.Adam:
    """Adam, on a CUDA GPU in one kernel but for float16, with which Fabric could not clip then."""
    fused = device.device.type == "cuda" and device.dtype != torch.float16
    return torch.optim.Adam(
        parameter_groups(model, config),
        weight_decay=config.weight_decay,
        fused=True if fused else None,
    )


def parameter_groups(model: SemanticBlur, config: TrainConfig) -> list[dict[str, Any]]:
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


def set_training_mode(model: SemanticBlur, config: TrainConfig) -> None:
    """Training mode, but for the statistics that stay as they are."""
    model.train()
    for stage in model.backbone.stages[: config.frozen_stages]:
        stage.eval()
    if config.frozen_statistics:
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()


def validate(model: SemanticBlur, pairs: DecodedPairs, device: DeviceChoice) -> Scores:
    """Scores under the protocol of `semanticblur_core.metrics`, in float32.

    Of images that are labelled in part, on the labelled pixels.
    """
    detector = Detector(model, device=str(device.device), precision="float32")
    scorer = BlurScorer(VALIDATION_PROTOCOL)
    for index, name in enumerate(pairs.names):
        image, mask = pairs[index]
        rgb = image.permute(1, 2, 0).numpy()
        [blur] = detector.detect_tensors([rgb], upsampling="nearest-exact")
        mask = mask.to(blur.device) > 127
        blurred = mask[0]
        if len(mask) == 2:
            blur, blurred = blur[mask[1]][None], blurred[mask[1]][None]
        scorer.add_tensor(blur, blurred, name=name)
    return scorer.result()


def _averaging(averaged: SemanticBlur, model: SemanticBlur, decay: float) -> Callable[[int], None]:
    """Exponential moving average of parameters and running statistics, faster at the start.

    To be called with each step, while both networks keep their tensors.
    """
    given = model.state_dict()
    ours = {k: tensor for k, tensor in averaged.state_dict().items() if tensor.is_floating_point()}
    kept, theirs = list(ours.values()), [given[k] for k in ours]

    @torch.no_grad()
    def average(step: int) -> None:
        torch._foreach_lerp_(kept, theirs, 1 - min(decay, (1 + step) / (10 + step)))

    return average


def _digest(
    training: DecodedPairs,
    validation: DecodedPairs,
    synthetic: Sequence[tuple[SharpImages, int]],
) -> str:
    """sha256 of the images trained on and held out with their labels; of sharp ones, the names."""
    names = [[pairs.digest] for pairs in (training, validation)]
    for source, _ in synthetic:
        stems = [path.stem for path in source.paths]
        names += [[source.kind, *stems], [stems[i] for i in source.with_mask]]
    return hashlib.sha256(repr(names).encode()).hexdigest()


def _require_finite(
    what: str, value: float, step: int, run_dir: Path, remedy: str = _LOWER_RATE
) -> None:
    if math.isfinite(value):
        return
    path = run_dir / LAST_CHECKPOINT
    kept = f"; an earlier state is kept in {path}" if path.exists() else ""
    raise TrainingError(f"the {what} became {value} at step {step + 1}{kept}; {remedy} would do")


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
        if key == "config":
            # Settings that came later have their default in older checkpoints.
            theirs = TrainConfig().to_dict() | theirs
        if isinstance(mine, dict) and isinstance(theirs, dict):
            differing += sorted(k for k in mine | theirs if mine.get(k) != theirs.get(k))
        elif theirs != mine:
            differing.append(key)
    if differing:
        raise TrainingError(
            f"{path}: was made with other settings ({', '.join(differing)}); resume with the "
            "same ones, or start a run in another folder"
            + ("; images are those, their masks, polarity and split" * ("images" in differing))
        )
    model.load_state_dict(state["model"])
    if averaged is not None:
        averaged.load_state_dict(state["averaged"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])
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
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    disk.write_text(path, text.getvalue())
