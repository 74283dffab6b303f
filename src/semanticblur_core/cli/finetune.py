"""``semanticblur-core finetune``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from semanticblur_core.cli._echo import echo
from semanticblur_core.cli._options import (
    PathType,
    SizeType,
    device_option,
    mask_polarity_option,
    progress_bar,
    read_labelled,
    say,
)
from semanticblur_core.cli._stop import Stop

if TYPE_CHECKING:
    from semanticblur_core.data.labels import LabelledImage
    from semanticblur_core.training.finetune import FinetuneResult

_folder = PathType(file_okay=False)


@click.command(name="finetune")
@click.option("--data", type=_folder, help="Annotation store: images/ and labels/ in it.")
@click.option("--images", type=_folder, help="Or a folder of images,")
@click.option("--masks", type=_folder, help="and one of their masks, 255 = blurred.")
@mask_polarity_option
@click.option("--base", default="default", show_default=True, help="Model to start from.")
@click.option(
    "--output",
    required=True,
    metavar="NAME|FILE",
    help="Name of a model of your own (a new version of it), or a new .safetensors file.",
)
@click.option(
    "--budget",
    type=click.Choice(["quick", "thorough"]),
    default="quick",
    show_default=True,
    help="About a minute on two cores, or several.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a number of the budget, for example --set=n_steps=20; several times.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--size",
    type=SizeType(),
    default="320",
    show_default=True,
    help="Side that images are squashed to, or native: as in detect.",
)
@device_option
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="auto: bfloat16 where the processor or GPU has instructions for it.",
)
@click.option(
    "--json",
    "json_file",
    type=PathType(dir_okay=False, writes=True),
    help="Write the table to this file.",
)
@click.option(
    "--events",
    type=_folder,
    help="For programs: what happens as lines of JSON; reads pause and resume, and ends with its "
    "input; previews and the best weights so far go to this folder.",
)
def command(
    data: Path | None,
    images: Path | None,
    masks: Path | None,
    mask_polarity: Any,
    base: str,
    output: str,
    budget: str,
    overrides: tuple[str, ...],
    seed: int,
    size: Any,
    device: str,
    precision: str,
    json_file: Path | None,
    events: Path | None,
) -> None:
    """Teach a model with a few labelled images.

    Part of the labels is held out and scored before and after. Exit code 1 if the new model is not
    better there, or forgot photographs; it is written all the same, and never made the default.
    Ctrl+C and SIGTERM end the training and keep the best so far (exit code 130); again, they keep
    nothing.
    """
    from semanticblur_core import weights
    from semanticblur_core.cli._options import override
    from semanticblur_core.config import FinetuneConfig
    from semanticblur_core.training.recipes import finetune_budget

    config = finetune_budget(budget)
    values = dict(override(text, config) for text in overrides)
    if "seed" in values:
        raise click.UsageError("--set=seed: --seed says it")
    if size != "native" and values.setdefault("image_size_px", size) != size:
        raise click.UsageError("--set=image_size_px: --size says it, but for native windows")
    config = FinetuneConfig.from_dict(config.to_dict() | values | {"seed": seed})
    if not output.endswith(".safetensors"):
        weights.next_version(output)  # refuses what is no name, before anything is read
    labelled = read_labelled(data, images, masks, mask_polarity)

    from semanticblur_core import disk
    from semanticblur_core.device import keep_freed_memory
    from semanticblur_core.training.finetune import finetune

    keep_freed_memory()
    if events is not None:
        _report(
            events,
            labelled,
            base=base,
            output=output,
            budget=config,
            size=size,
            device=device,
            precision=precision,
        )
        return
    share = sum(int((image.labels > 0).sum()) for image in labelled)
    share_text = f"{share / sum(image.labels.size for image in labelled):.1%}"
    echo(f"{len(labelled)} images, {share_text} of their pixels labelled")
    echo(f"budget {budget}: {json.dumps(config.to_dict())}")
    update = None
    stop = Stop(at_steps=True)
    with progress_bar() as progress, stop.heeded():
        task = progress.add_task("Preparing", total=None)
        for update in finetune(
            labelled,
            base=base,
            output=output,
            budget=config,
            size=size,
            device=device,
            precision=precision,
            should_stop=lambda: stop.is_asked_for,
        ):
            text = {"preparing": "Preparing", "done": "Done"}.get(update.phase, "")
            progress.update(
                task,
                completed=update.step,
                total=update.total_steps,
                description=text or f"loss {update.loss:.3f}",
            )
            if update.held_out_loss is not None:
                best = ", best so far" if update.is_best else ""
                loss = f"loss {update.loss:.3f}, " if update.step else ""
                say(
                    progress,
                    f"step {update.step}/{update.total_steps}: {loss}held-out error "
                    f"{update.held_out_loss:.3f}{best}",
                )
    assert update is not None
    assert update.result is not None
    _print(update.result)
    if json_file:
        disk.write_text(json_file, json.dumps(update.result.to_dict(), indent=1) + "\n")
    if stop.is_asked_for:
        echo("semanticblur-core: stopped; the best so far is kept", err=True)
        raise SystemExit(130)
    if not update.result.is_better:
        raise SystemExit(1)


def _report(folder: Path, labelled: list[LabelledImage], **settings: Any) -> None:
    """Train for another program that shows it."""
    from semanticblur_core.training.background import Channel
    from semanticblur_core.training.finetune import finetune

    channel = Channel(folder)
    for update in finetune(
        labelled, preview=channel.preview(), best_so_far=channel.best_so_far, **settings
    ):
        if not channel.say(update):
            return


def _print(result: FinetuneResult) -> None:
    held_out = result.held_out or "NONE: too few strokes, so these are the ones trained on"
    echo(f"held out: {held_out}\nprotocol: {result.after.protocol.describe()}")
    echo(f"  {'':<24}{'before':>8}{'after':>8}")
    for name, key in (("MAE", "mae"), ("F-beta", "f_beta"), ("IoU", "iou")):
        before, after = (getattr(scores, key) for scores in (result.before, result.after))
        echo(f"  {name:<24}{before:8.4f}{after:8.4f}")
    echo(
        f"  {'MAE, generated photos':<24}{result.forgetting_before:8.4f}"
        f"{result.forgetting_after:8.4f}"
    )
    if not result.has_improved:
        echo("NOT better than before on these labels, by 0.002 or more; keep the base model")
    elif result.has_forgotten:
        echo("photographs were FORGOTTEN in part; use it for images like yours only")
    echo(f"{result.path}: use it as --model={shlex.quote(result.model or str(result.path))}")
