"""``semanticblur-core data``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from semanticblur_core.cli._echo import echo
from semanticblur_core.cli._options import (
    PathType,
    mask_polarity_option,
    progress_bar,
    refuse_clashes,
)

_folder = PathType(file_okay=False)
_N_LISTED = 5


@click.group(name="data")
def command() -> None:
    """Look through data sets of images and masks."""


@command.command(name="check")
@click.argument("folder", type=_folder)
@click.option("--images", type=_folder, help="Folder of images, if it is not found by itself.")
@click.option("--masks", type=_folder, help="Folder of masks.")
@mask_polarity_option
@click.option(
    "--json",
    "json_file",
    type=PathType(dir_okay=False, writes=True),
    help="Write the report to this file.",
)
def check(
    folder: Path,
    images: Path | None,
    masks: Path | None,
    mask_polarity: Any,
    json_file: Path | None,
) -> None:
    """Say what FOLDER holds: counts, sizes, blurred share, duplicates, unreadable files.

    Of an annotation store: what is labelled of each image.

    Exit code 2 if anything is wrong with the files.
    """
    import statistics

    from semanticblur_core import disk
    from semanticblur_core.data.check import check_data, find_folders
    from semanticblur_core.data.store import is_store

    if images is None and masks is None and is_store(folder):
        _check_store(folder, json_file)
        return
    if (images is None) != (masks is None):
        raise click.UsageError("give both --images and --masks, or neither")
    if images is None or masks is None:
        images, masks = find_folders(folder)
    read = (path for root in (images, masks) if root.is_dir() for path in root.iterdir())
    refuse_clashes({"--json": json_file}, read)
    report = None
    with progress_bar() as progress:
        task = progress.add_task("Checking", total=None)
        for state in check_data(images, masks, mask_polarity=mask_polarity):
            n_done, n_total, report = state
            progress.update(task, completed=n_done, total=n_total)
    assert report is not None
    echo(f"images: {images}\nmasks: {masks}")
    known = report.known_set or "none that is known here by its number"
    echo(f"pairs: {report.n_pairs}; known set: {known}")
    common = ", ".join(f"{size} ({count})" for size, count in report.sizes.most_common(_N_LISTED))
    echo(f"sizes: {common}{', ...' if len(report.sizes) > _N_LISTED else ''}")
    echo(f"polarity in force: white = {mask_polarity}")
    if report.blurred_fraction:
        shares = list(report.blurred_fraction.values())
        echo(
            f"blurred: mean {statistics.mean(shares):.1%}, from {min(shares):.1%} to "
            f"{max(shares):.1%}; {len(report.one_class)} masks of one class"
        )
    echo(f"duplicates: {len(report.duplicates)} groups of images that look the same")
    for group in report.duplicates[:_N_LISTED]:
        echo(f"  {', '.join(group)}")
    if json_file:
        disk.write_text(json_file, json.dumps(report.to_dict(), indent=1) + "\n")
    for problem in report.problems:
        echo(f"semanticblur-core: {problem}", err=True)
    if report.problems:
        raise SystemExit(2)


def _check_store(folder: Path, json_file: Path | None) -> None:
    from semanticblur_core import disk
    from semanticblur_core.data.store import check_store

    refuse_clashes({"--json": json_file}, folder.rglob("*"))
    rows, problems = check_store(folder)
    echo(f"annotation store: {folder}\nlabelled images: {len(rows)}")
    for row in rows:
        size = " x ".join(map(str, row["shape"]))
        split = f", {row['split']}" if row["split"] else ""
        echo(
            f"  {row['name']}: {size} px, sharp {row['sharp']:.2%}, blurred "
            f"{row['blurred']:.2%}{split}"
        )
    if json_file:
        report = {"store": str(folder), "items": rows, "problems": problems}
        disk.write_text(json_file, json.dumps(report, indent=1) + "\n")
    for problem in problems:
        echo(f"semanticblur-core: {problem}", err=True)
    if problems:
        raise SystemExit(2)
