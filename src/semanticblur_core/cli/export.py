"""``semanticblur-core export``."""

from __future__ import annotations

from pathlib import Path

import click

from semanticblur_core.cli._echo import echo
from semanticblur_core.cli._options import PathType


@click.command(name="export")
@click.option(
    "--model",
    default="default",
    show_default=True,
    help="Packaged model, your own, or a file of weights.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["onnx", "bioimageio"]),
    default="onnx",
    show_default=True,
    help="onnx: one file. bioimageio: a folder with description, test arrays and cover.",
)
@click.option(
    "--output",
    required=True,
    type=PathType(),
    help="File (onnx) or new folder (bioimageio).",
)
@click.option("--overwrite", is_flag=True, help="Replace the file.")
def command(model: str, form: str, output: Path, overwrite: bool) -> None:
    """Write a model for use without torch.

    The ONNX file takes RGB images (N, 3, H, W) in 0..1 of any size from 64 x 64 px and gives blur
    maps (N, 1, H, W), 1 = out of focus. It is compared with torch before it is kept.
    """
    from semanticblur_core.errors import SemanticBlurError
    from semanticblur_core.inference import export

    if form == "onnx":
        export.require_onnx_name(output)
    if output.exists() and not (overwrite and form == "onnx"):
        hint = "; --overwrite replaces it" if form == "onnx" else "; name a new folder"
        raise SemanticBlurError(f"{output}: exists already{hint}")
    echo(f"Exporting model {model}, about half a minute ...")
    if form == "onnx":
        difference = export.export_onnx(model, output)
        size = f"{output.stat().st_size / 1e6:.0f} MB, "
    else:
        difference = export.export_bioimageio(model, output)
        size = ""
    echo(f"{output}: {size}opset {export.OPSET}, largest difference from torch {difference:.1g}")
