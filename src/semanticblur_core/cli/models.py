"""``semanticblur-core models``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from semanticblur_core import weights
from semanticblur_core.cli._echo import echo
from semanticblur_core.metrics import Protocol


@click.group(name="models")
def command() -> None:
    """List, describe and verify weights."""


@command.command(name="list")
def list_models() -> None:
    """Packaged models and your own, a line each."""
    for name in weights.PACKAGED:
        info = weights.read_info(weights.resolve(name))
        metrics = info.metrics
        echo(
            f"{name}: {info.architecture.backbone}, {info.size_bytes / 1e6:.1f} MB, MAE "
            f"{metrics['mae']:.3f}, F {metrics['f_beta']:.3f}, IoU {metrics['iou']:.3f} on "
            f"{metrics['n_images']} images of {metrics.get('data', 'its validation set')}"
        )
        echo(f"  ({Protocol(**metrics['protocol']).describe()})")
    for name in weights.own_models():
        for path in weights.model_versions(name):
            echo(f"{path.stem}: {_describe_own(path)}")


def _describe_own(path: Path) -> str:
    from semanticblur_core.errors import WeightsError

    try:
        info = weights.read_info(path)
    except WeightsError as error:
        return f"UNREADABLE: {error}"
    start = info.provenance.get("start")
    start = start.get("from", "nothing known") if isinstance(start, dict) else "nothing known"
    mae = info.metrics.get("mae")
    score = (
        "" if not isinstance(mae, int | float) else f", MAE {mae:.3f} on {info.metrics.get('data')}"
    )
    return f"{info.size_bytes / 1e6:.1f} MB, from {start}{score}"


@command.command()
@click.argument("name")
@click.argument("new_name")
def rename(name: str, new_name: str) -> None:
    """Rename a model of your own, all its versions."""
    weights.rename_model(name, new_name)
    echo(f"{new_name}: was {name}")


@command.command()
@click.argument("name", metavar="NAME|NAME@VERSION")
def delete(name: str) -> None:
    """Delete a model of your own, or one version of it."""
    weights.delete_model(name)
    echo(f"{name}: deleted")


@command.command()
@click.argument("name", metavar="NAME|FILE")
def info(name: str) -> None:
    """Everything a file of weights, or an exported .onnx, says of itself, as JSON."""
    echo(json.dumps(_told_by_export(name) or _told_by_weights(name), indent=1))


def _told_by_weights(name: str) -> dict[str, Any]:
    found = weights.read_info(weights.resolve(name))
    return {
        "path": str(found.path),
        "size_bytes": found.size_bytes,
        "architecture": found.architecture.to_dict(),
        "metrics": found.metrics,
        "provenance": found.provenance,
        "licence": found.licence,
        "sha256": found.sha256,
    }


def _told_by_export(name: str) -> dict[str, Any] | None:
    from semanticblur_core.inference.backends import is_exported, open_exported

    if not is_exported(name):
        return None
    found = open_exported(Path(name)).info
    return {"path": name, "size_bytes": Path(name).stat().st_size} | found.metadata


@command.command()
@click.argument("names", metavar="[NAME|FILE]...", nargs=-1)
def verify(names: tuple[str, ...]) -> None:
    """Check tensors against their sha256; all packaged models unless named."""
    for name in names or tuple(weights.PACKAGED):
        found = weights.verify(name)
        echo(f"{name}: whole, sha256 {found.sha256}")
