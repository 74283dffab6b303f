"""``semanticblur-core models``."""

from __future__ import annotations

import json

import click

from semanticblur_core import weights
from semanticblur_core.metrics import Protocol


@click.group(name="models")
def command() -> None:
    """List, describe and verify weights."""


@command.command(name="list")
def list_models() -> None:
    """Packaged models, a line each."""
    for name in weights.PACKAGED:
        info = weights.read_info(weights.resolve(name))
        metrics = info.metrics
        click.echo(
            f"{name}: {info.architecture.backbone}, {info.size_bytes / 1e6:.1f} MB, MAE "
            f"{metrics['mae']:.3f}, F {metrics['f_beta']:.3f}, IoU {metrics['iou']:.3f} on "
            f"{metrics['n_images']} images of {metrics.get('data', 'its validation set')}"
        )
        click.echo(f"  ({Protocol(**metrics['protocol']).describe()})")


@command.command()
@click.argument("name", metavar="NAME|FILE")
def info(name: str) -> None:
    """Everything a file of weights says of itself, as JSON."""
    found = weights.read_info(weights.resolve(name))
    document = {
        "path": str(found.path),
        "size_bytes": found.size_bytes,
        "architecture": found.architecture.to_dict(),
        "metrics": found.metrics,
        "provenance": found.provenance,
        "licence": found.licence,
        "sha256": found.sha256,
    }
    click.echo(json.dumps(document, indent=1))


@command.command()
@click.argument("names", metavar="[NAME|FILE]...", nargs=-1)
def verify(names: tuple[str, ...]) -> None:
    """Check tensors against their sha256; all packaged models unless named."""
    for name in names or tuple(weights.PACKAGED):
        found = weights.verify(name)
        click.echo(f"{name}: whole, sha256 {found.sha256}")
