"""``semanticblur-core train``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from semanticblur_core.cli._echo import echo
from semanticblur_core.cli._options import (
    PathType,
    device_option,
    mask_polarity_option,
    override,
    precision_option,
    progress_bar,
)
from semanticblur_core.cli._options import (
    say as say_above,
)
from semanticblur_core.cli._stop import Stop

if TYPE_CHECKING:
    from torch import Tensor

    from semanticblur_core.data.datasets import DecodedPairs

BEST = "best.safetensors"
LICENCE = (
    "Weights under BSD-3-Clause as far as their authors can grant it; the photographs they were "
    "trained on are research data sets whose own terms may restrict commercial use."
)


@click.command(name="train")
@click.option(
    "--images",
    type=PathType(file_okay=False, exists=True),
    help="Folder of photographs.",
)
@click.option(
    "--masks",
    type=PathType(file_okay=False, exists=True),
    help="Folder of masks of the same names, 255 = blurred.",
)
@mask_polarity_option
@click.option(
    "--data",
    type=PathType(file_okay=False, exists=True),
    help="Or an annotation store; its items marked val are held out.",
)
@click.option(
    "--output",
    required=True,
    type=PathType(file_okay=False),
    help="Folder for checkpoints, best weights and history.",
)
@click.option(
    "--recipe",
    default="paper",
    show_default=True,
    help="paper, first-256, first-320, first-320-whole, mixed, pretrain, best, or a YAML file.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value of the recipe, for example --set=epochs=5; several times.",
)
@click.option(
    "--network",
    "network_overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the network, for example --network=backbone=resnet34; several times.",
)
@click.option(
    "--val-split",
    default="cuhk-val",
    show_default=True,
    help="Names held out for validation: a packaged list or a text file, one name a line.",
)
@click.option(
    "--sharp",
    type=PathType(file_okay=False, exists=True),
    help="Folder of sharp photographs, for recipes with synthetic defocus; one in eight is held "
    "out.",
)
@click.option(
    "--sharp-masks",
    type=PathType(file_okay=False, exists=True),
    help="Folder of masks of an object in some of them, 255 = object.",
)
@click.option(
    "--sharp-microscopy",
    multiple=True,
    type=PathType(file_okay=False, exists=True),
    help="Folder of sharp microscopy images; several times.",
)
@click.option(
    "--backbone-weights",
    type=PathType(dir_okay=False, exists=True),
    help="safetensors of (part of) torchvision's ImageNet ResNet-50 to start from.",
)
@click.option("--init", help="Packaged model or file of weights to start from.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in OUTPUT.")
@click.option(
    "--checkpoint-every",
    "checkpoint_every_s",
    type=click.FloatRange(0, min_open=True),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="How often the state is written within an epoch.",
)
@click.option("--compile", "compile_model", is_flag=True, help="Train through torch.compile.")
@click.option("--tensorboard", is_flag=True, help="Also write TensorBoard logs to OUTPUT.")
@device_option
@precision_option
def command(
    images: Path | None,
    masks: Path | None,
    mask_polarity: Any,
    data: Path | None,
    output: Path,
    recipe: str,
    overrides: tuple[str, ...],
    network_overrides: tuple[str, ...],
    val_split: str,
    sharp: Path | None,
    sharp_masks: Path | None,
    sharp_microscopy: tuple[Path, ...],
    backbone_weights: Path | None,
    init: str | None,
    resume: bool,
    checkpoint_every_s: float,
    compile_model: bool,
    tensorboard: bool,
    device: str,
    precision: str,
) -> None:
    """Train a network on images and masks.

    Prints a line an epoch; OUTPUT gets best.safetensors (the epoch of lowest validation MAE),
    last.ckpt (to --resume from), history.csv and, with matplotlib, curves.png. Ctrl+C and SIGTERM
    stop after the step that is on, whose state is kept; again, at once. Under `torchrun` several
    GPUs or machines share each batch.
    """
    from semanticblur_core import disk
    from semanticblur_core.config import ModelConfig, TrainConfig
    from semanticblur_core.data.datasets import note_subfolders
    from semanticblur_core.errors import ConfigError
    from semanticblur_core.training.recipes import recipe as find_recipe

    config = find_recipe(recipe)
    values = dict(override(text, config) for text in overrides)
    config = TrainConfig.from_dict(config.to_dict() | values)
    changes = [override(text, ModelConfig(), "--network") for text in network_overrides]
    architecture = ModelConfig.from_dict(dict(changes))
    if changes and (init or resume):
        raise ConfigError("--network: goes with a new network, not with --init and --resume")
    if backbone_weights and architecture.backbone != "resnet50":
        raise ConfigError(f"--backbone-weights: of a ResNet-50, not of {architecture.backbone}")
    if sum(map(bool, (init, backbone_weights, resume))) > 1:
        raise ConfigError("--init, --backbone-weights and --resume: give one of them")
    if sharp_masks and not sharp:
        raise ConfigError("--sharp-masks: goes with --sharp")
    for flag, given, count in (
        ("--sharp", sharp, config.synthetic_photographs),
        ("--sharp-microscopy", sharp_microscopy, config.synthetic_microscopy),
    ):
        if given and not count:
            raise ConfigError(f"{flag}: recipe {recipe} makes none of it")
    for folder in (images, masks):
        if folder and (below := note_subfolders(folder)):
            echo(f"semanticblur-core: {below}", err=True)
    training, held_out = read_data(data, images, masks, mask_polarity, val_split)

    import torch

    from semanticblur_core import __version__, weights
    from semanticblur_core.data.defocus import SharpImages
    from semanticblur_core.device import choose_device, keep_freed_memory
    from semanticblur_core.metrics import Scores
    from semanticblur_core.network import SemanticBlur
    from semanticblur_core.training.checkpoint import (
        load_checkpoint,
        precision_of,
        require_space,
    )
    from semanticblur_core.training.logs import RunLog
    from semanticblur_core.training.loop import (
        HISTORY,
        LAST_CHECKPOINT,
        VALIDATION_PROTOCOL,
        any_process,
        is_first_process,
        is_one_of_several,
        refuse_earlier_run,
        train,
    )

    keep_freed_memory()
    if not resume:
        refuse_earlier_run(output, LAST_CHECKPOINT, BEST, HISTORY)
    say = echo if is_first_process() else _say_nothing
    if is_first_process():
        disk.require_writable(output / BEST)
    state = load_checkpoint(output / LAST_CHECKPOINT) if resume else None
    if state is not None and precision == "auto":
        precision = precision_of(state)
    chosen = choose_device(device, precision)
    torch.manual_seed(config.seed)
    start: dict[str, Any] = {"from": "random initialisation"}
    if init:
        model, info = weights.load(init)
        start = {"from": info.path.name, "sha256": info.sha256, "provenance": info.provenance}
    elif state is not None:
        model = SemanticBlur(ModelConfig.from_dict(state["identity"]["architecture"]))
    else:
        model = SemanticBlur(architecture)
    if backbone_weights:
        n_set = _load_backbone(model, backbone_weights)
        start = {"from": backbone_weights.name, "n_parameters_set": n_set}
    if state is not None:
        start = state["start"] or {"from": "Python"}  # which need not have said
    say(f"recipe {recipe}: {json.dumps(config.to_dict())}")
    say(f"start: {start['from']}, {start.get('n_parameters_set', 'all')} parameters")
    say(f"scores: {VALIDATION_PROTOCOL.describe()}")
    say(f"{len(training)} images to train on, {len(held_out)} to validate; {chosen.reason}")

    if is_first_process():
        require_space(output, sum(each.numel() for each in model.parameters()))
    sources: dict[str, SharpImages] = {}
    if config.synthetic_photographs and sharp:
        sources["photograph"] = SharpImages(_training_part([sharp]), masks=sharp_masks)
    if config.synthetic_microscopy and sharp_microscopy:
        sources["microscopy"] = SharpImages(_training_part(sharp_microscopy), kind="microscopy")
    for kind, source in sources.items():
        say(
            f"synthetic defocus from {len(source)} sharp images ({kind}), "
            f"{len(source.with_mask)} of them with a mask"
        )
        if sharp_masks and kind == "photograph" and not source.with_mask:
            raise ConfigError(
                f"--sharp-masks={sharp_masks}: no mask there is named as a photograph"
            )

    validated_on = val_split if data is None else f"items marked val of {_name_of_data(data)}"

    def save_best(network: SemanticBlur, scores: Scores, epoch: int) -> None:
        provenance = {
            "software": f"napari-semanticblur {__version__}, torch {torch.__version__}",
            "date": datetime.now(UTC).date().isoformat(),
            "recipe": {"name": recipe} | config.to_dict(),
            "epoch": epoch,
            "n_training_images": len(training),
            "data": _name_of_data(data or images),
            "data_sha256": {"training": training.digest, "validation": held_out.digest},
            **({"white_in_masks": mask_polarity} if data is None else {}),
            "validation_split": validated_on,
            "n_sharp_images": {kind: len(source) for kind, source in sources.items()},
            "device": str(chosen.device),
            "precision": str(chosen.dtype).removeprefix("torch."),
            "start": start,
        }
        metrics = scores.to_dict() | {"data": validated_on}
        weights.save(
            output / BEST, network, provenance=provenance, metrics=metrics, licence=LICENCE
        )

    updates = train(
        model,
        training,
        held_out,
        config,
        run_dir=output,
        device=chosen,
        save_best=save_best,
        sharp=sources,
        start=start,
        resume=resume,
        checkpoint_every_s=checkpoint_every_s,
        compile_model=compile_model,
    )
    log = RunLog(output, tensorboard=tensorboard and is_first_process())
    started = time.monotonic()
    first_step = None
    update = None
    stop = Stop(at_steps=True, one_asking_s=1.0 if is_one_of_several() else 0.0)
    with progress_bar() as progress, closing(updates), stop.heeded():
        task = progress.add_task("Training", total=None)
        for update in updates:
            # All processes stop after the same step, whichever of them was asked to.
            stops = update.step < update.total_steps and any_process(stop.is_asked_for)
            if stops:
                updates.close()
                any_process(True)  # until the state is written: who ends first ends all
            if not is_first_process():
                if stops:
                    raise KeyboardInterrupt
                continue
            first_step = update.step - 1 if first_step is None else first_step
            log.add(update)
            progress.update(
                task,
                completed=update.step,
                total=update.total_steps,
                description=f"epoch {update.epoch}/{config.epochs} loss {update.loss:.3f}",
            )
            if update.scores is not None:
                scores = update.scores
                per_step_s = (time.monotonic() - started) / (update.step - first_step)
                left_min = per_step_s * (update.total_steps - update.step) / 60
                say_above(
                    progress,
                    f"epoch {update.epoch}/{config.epochs}: MAE {scores.mae:.4f}, F "
                    f"{scores.f_beta:.4f}, IoU {scores.iou:.4f}, {update.images_per_s:.2f} images/s"
                    f", about {left_min:.0f} min left{', best so far' if update.is_best else ''}",
                )
                log.draw()
            if stops:
                say_above(
                    progress,
                    f"semanticblur-core: stopped at step {update.step} of {update.total_steps}; "
                    "--resume goes on",
                    err=True,
                )
                raise KeyboardInterrupt
    log.close()
    if update is None:
        say(f"{output}: all {config.epochs} epochs were done before")


def _say_nothing(_: str) -> None:
    """What all processes but the first print."""


def read_data(
    data: Path | None, images: Path | None, masks: Path | None, mask_polarity: Any, val_split: str
) -> tuple[DecodedPairs, DecodedPairs]:
    """What to train on and what to validate on."""
    from semanticblur_core.cli._options import read_labelled, refuse_flags
    from semanticblur_core.data.datasets import DecodedPairs, find_pairs, read_split, select
    from semanticblur_core.errors import DataError

    if (data is None) == (images is None) or (images is None) != (masks is None):
        raise click.UsageError("give --data, or both --images and --masks")
    if data is not None:
        refuse_flags(
            "of --images and --masks; a store says it itself", "val_split", "mask_polarity"
        )
        labelled = read_labelled(data, None, None)
        split = [[x for x in labelled if (x.split == "val") == is_val] for is_val in (False, True)]
        if not all(split):
            raise DataError(
                f"{data}: {len(split[1])} of {len(labelled)} labelled images are marked val in its "
                "dataset.json; some must be, and not all: by 'Hold out' in napari, or there by "
                '{"format_version": 1, "items": {"NAME": {"split": "val"}}}'
            )
        return DecodedPairs.from_labels(split[0]), DecodedPairs.from_labels(split[1])
    assert images is not None
    assert masks is not None
    pairs = find_pairs(images, masks)
    try:
        held_out = select(pairs, read_split(val_split))
    except DataError as error:
        raise DataError(f"--val-split={val_split}: {error}; give a list of your own") from error
    names = {pair.name for pair in held_out}
    training = [pair for pair in pairs if pair.name not in names]
    return (
        DecodedPairs(training, mask_polarity=mask_polarity),
        DecodedPairs(held_out, mask_polarity=mask_polarity),
    )


def _name_of_data(folder: Path | None) -> str:
    assert folder is not None
    folder = folder.resolve()
    return folder.parent.name if folder.name == "images" else folder.name


def _training_part(folders: Sequence[Path]) -> list[Path]:
    from semanticblur_core.data.datasets import list_images
    from semanticblur_core.data.defocus import is_held_out
    from semanticblur_core.errors import DataError

    found = [path for folder in folders for path in list_images(folder)]
    kept = [path for path in found if not is_held_out(path.stem)]
    if found and not kept:
        raise DataError(
            f"{folders[0]}: all of its {len(found)} images are among the eighth that is held out; "
            "give more"
        )
    return kept


def read_imagenet(path: Path) -> dict[str, Tensor]:
    """Tensors of a file of ImageNet weights."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from semanticblur_core.errors import WeightsError

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise WeightsError(
            f"{path}: not weights of a ResNet-50 as safetensors: {reason}; of torchvision's .pth, "
            "safetensors.torch.save_file(torch.load(PTH, weights_only=True), FILE) makes it one"
        ) from error


def _load_backbone(model: Any, path: Path) -> int:
    from semanticblur_core.errors import WeightsError
    from semanticblur_core.network.backbones import load_imagenet_resnet50

    try:
        return load_imagenet_resnet50(model.backbone, read_imagenet(path))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise WeightsError(f"{path}: not weights of a ResNet-50: {reason}") from error
