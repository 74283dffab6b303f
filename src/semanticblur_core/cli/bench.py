"""``semanticblur-core bench``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from semanticblur_core.cli._options import ListType, device_option, progress_bar


@click.group(name="bench")
def command() -> None:
    """Measure speed on this machine."""


@command.command(name="model")
@click.option("--size", "size_px", type=click.IntRange(33), default=320, show_default=True)
@click.option("--rounds", "n_rounds", type=click.IntRange(3), default=30, show_default=True)
@click.option("--threads", "n_threads", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--precision",
    "precisions",
    type=ListType(("float32", "bfloat16")),
    default="float32,bfloat16",
    show_default=True,
)
@device_option
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False))
def bench_model(
    size_px: int,
    n_rounds: int,
    n_threads: int,
    precisions: tuple[str, ...],
    device: str,
    json_path: Path | None,
) -> None:
    """Time the whole network against torchvision's bare ResNet-50 backbone."""
    from semanticblur_core import benchmarks, io
    from semanticblur_core.device import choose_device, keep_freed_memory

    keep_freed_memory()
    chosen = choose_device(device, "float32").device
    measuring = benchmarks.bench_model(
        size_px=size_px,
        n_rounds=n_rounds,
        n_threads=n_threads,
        precisions=precisions,
        device=str(chosen),
    )
    with progress_bar() as progress:
        task = progress.add_task("Measuring", total=None)
        while True:
            try:
                done, total = next(measuring)
            except StopIteration as finished:
                result = finished.value
                break
            progress.update(task, completed=done, total=total)
    for timing in result["timings"]:
        click.echo(
            f"{timing['precision']}: network {timing['network_ms']:.0f} ms, bare ResNet-50 "
            f"{timing['backbone_ms']:.0f} ms, ratio {timing['ratio']:.2f} (medians of "
            f"{timing['n_rounds']} rounds in turn, {size_px} x {size_px} px, batch 1, "
            f"{n_threads} threads, {chosen})"
        )
    counts = result["n_parameters"]
    click.echo(
        f"parameters: {counts['total'] / 1e6:.2f} M in all, {counts['backbone'] / 1e6:.2f} M "
        f"backbone, {counts['channel_attention'] / 1e6:.3f} M channel attention"
    )
    if json_path is not None:
        io.write_text(json_path, json.dumps(result, indent=1) + "\n")
