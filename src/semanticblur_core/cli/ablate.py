"""``semanticblur-core ablate``."""

from __future__ import annotations

import json
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
    say,
)

if TYPE_CHECKING:
    from semanticblur_core.config import TrainConfig
    from semanticblur_core.training.ablation import AblationRow

_folder = PathType(file_okay=False, exists=True)


@click.command(name="ablate")
@click.option("--table", type=click.IntRange(1, 3), required=True, help="Of the paper.")
@click.option("--images", type=_folder, required=True, help="Folder of photographs.")
@click.option("--masks", type=_folder, required=True, help="Folder of masks, 255 = blurred.")
@mask_polarity_option
@click.option(
    "--output",
    type=PathType(file_okay=False),
    required=True,
    help="Folder for the runs; a table that is there goes on.",
)
@click.option("--recipe", default="paper", show_default=True, help="As in train.")
@click.option("--epochs", type=click.IntRange(1), help="Epochs of every variant.  [recipe's]")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As in train; several times."
)
@click.option("--val-split", default="cuhk-val", show_default=True, help="As in train.")
@click.option(
    "--backbone-weights",
    type=PathType(dir_okay=False, exists=True),
    help="ImageNet ResNet-50 to start from, in tables 2 and 3.",
)
@device_option
@precision_option
def command(
    table: int,
    images: Path,
    masks: Path,
    mask_polarity: Any,
    output: Path,
    recipe: str,
    epochs: int | None,
    overrides: tuple[str, ...],
    val_split: str,
    backbone_weights: Path | None,
    device: str,
    precision: str,
) -> None:
    """Train the variants of a table of the paper, all with the same budget.

    Prints what each reached on the validation split beside the published numbers, which are of
    other photographs and of the paper's own budget; writes OUTPUT/tableN.json. A variant that two
    tables share is trained once an OUTPUT.
    """
    from semanticblur_core.config import TrainConfig
    from semanticblur_core.errors import ConfigError
    from semanticblur_core.training.recipes import recipe as find_recipe

    config = find_recipe(recipe)
    values = dict(override(text, config) for text in overrides)
    if epochs is not None:
        values["epochs"] = epochs
    config = TrainConfig.from_dict(config.to_dict() | values)
    if config.synthetic_photographs or config.synthetic_microscopy:
        raise ConfigError(f"recipe {recipe}: the tables are of photographs with masks alone")

    from semanticblur_core import disk
    from semanticblur_core.cli.train import read_data, read_imagenet
    from semanticblur_core.device import choose_device, keep_freed_memory
    from semanticblur_core.training.ablation import PUBLISHED_ON, ablate
    from semanticblur_core.training.loop import VALIDATION_PROTOCOL, count_steps

    keep_freed_memory()
    training, held_out = read_data(None, images, masks, mask_polarity, val_split)
    imagenet = None if backbone_weights is None else read_imagenet(backbone_weights)
    rows: list[AblationRow] = []
    with progress_bar() as progress:
        task = progress.add_task("Training", total=None)
        for update in ablate(
            table,
            training,
            held_out,
            config,
            output=output,
            device=choose_device(device, _resumed_precision(output, precision)),
            imagenet=imagenet,
        ):
            if update.training is not None:
                now = update.training
                progress.update(
                    task,
                    completed=update.index * now.total_steps + now.step,
                    total=update.n_variants * now.total_steps,
                    description=f"{update.name} loss {now.loss:.3f}",
                )
            if update.row is not None:
                rows.append(update.row)
                say(progress, f"{update.name}: MAE {update.row.mae:.4f}")
    n_steps = config.epochs * count_steps(training, config)
    budget = _budget(config, len(training), n_steps, len(held_out))
    echo(f"\ntable {table}; {budget}")
    echo(f"protocol of ours: {VALIDATION_PROTOCOL.describe()}")
    _print(rows, PUBLISHED_ON[table], val_split)
    report = {
        "table": table,
        "budget": config.to_dict(),
        "n_training_images": len(training),
        "validation": val_split,
        "published_on": PUBLISHED_ON[table],
        "rows": [row.to_dict() for row in rows],
    }
    disk.write_text(output / f"table{table}.json", json.dumps(report, indent=1) + "\n")


def _resumed_precision(output: Path, precision: str) -> str:
    """Precision of a run that was interrupted, unless one is asked for."""
    from semanticblur_core.training.checkpoint import load_checkpoint, precision_of

    interrupted = sorted(output.glob("table*-*/last.ckpt"))
    if precision != "auto" or not interrupted:
        return precision
    return precision_of(load_checkpoint(interrupted[0]))


def _budget(config: TrainConfig, n_training: int, n_steps: int, n_held_out: int) -> str:
    n_passes = config.epochs * config.passes_per_epoch
    return (
        f"each variant: {n_passes} epochs of {n_training} images ({n_steps} steps of "
        f"{config.batch_size}, {config.image_size_px} px), one seed ({config.seed}); the paper: "
        f"100 epochs of 604 images (10000 steps of 6, 320 px). Best epoch by MAE on the same "
        f"{n_held_out} images that are scored"
    )


def _print(rows: list[AblationRow], published_on: str, val_split: str) -> None:
    ours = f"ours, {val_split}"
    echo(f"  {'':<26}{ours:^24}{'published, ' + published_on:^24}")
    header = f"{'MAE':>8}{'F-beta':>8}{'IoU':>8}"
    echo(f"  {'':<26}{header}{header}{'M param.':>10}  start")
    for row in rows:
        numbers = "".join(f"{value:8.3f}" for value in (row.mae, row.f_beta, row.iou))
        theirs = "".join(f"{value:8.3f}" for value in row.published)
        echo(f"  {row.name:<26}{numbers}{theirs}{row.n_parameters / 1e6:10.2f}  {row.start}")
    echo("  not comparable by column: other photographs, another budget; compare the rows")
