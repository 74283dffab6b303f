"""``semanticblur-core bench``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import click

from semanticblur_core.cli._echo import echo
from semanticblur_core.cli._options import (
    ListType,
    PathType,
    SizeType,
    backend_option,
    device_option,
    precision_option,
    progress_bar,
)

_folder = PathType(file_okay=False, exists=True)


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
@click.option(
    "--batch",
    "batch_size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Images at once.",
)
@click.option(
    "--compile", "compiled", is_flag=True, help="Both through torch.compile, on a GPU as one graph."
)
@click.option("--json", "json_path", type=PathType(dir_okay=False, writes=True))
def bench_model(
    size_px: int,
    n_rounds: int,
    n_threads: int,
    precisions: tuple[str, ...],
    device: str,
    batch_size: int,
    compiled: bool,
    json_path: Path | None,
) -> None:
    """Time the whole network against torchvision's bare ResNet-50 backbone.

    Images a second, and floating-point operations a second beside those of a large matrix product,
    in practice the most that the processor does.
    """
    from semanticblur_core import benchmarks, disk
    from semanticblur_core.device import choose_device, keep_freed_memory

    keep_freed_memory()
    chosen = choose_device(device, "float32").device
    measuring = benchmarks.bench_model(
        size_px=size_px,
        n_rounds=n_rounds,
        n_threads=n_threads,
        precisions=precisions,
        device=str(chosen),
        batch_size=batch_size,
        compiled=compiled,
    )
    result = _run(measuring)
    for timing in result["timings"]:
        echo(
            f"{timing['precision']}: network {timing['network_ms']:.0f} ms, bare ResNet-50 "
            f"{timing['backbone_ms']:.0f} ms, ratio {timing['ratio']:.2f} (medians of "
            f"{timing['n_rounds']} rounds in turn, {size_px} x {size_px} px, batch {batch_size}, "
            f"{'compiled' if compiled else 'eager'}, {n_threads} threads, {chosen})\n"
            f"  {timing['network_images_per_s']:.4g} images/s, {timing['share_of_backbone']:.0%} "
            f"of the backbone's {timing['backbone_images_per_s']:.4g}; "
            f"{timing['network_tflops']:.3g} TFLOP/s (backbone {timing['backbone_tflops']:.3g}), "
            f"{timing['share_of_limit']:.0%} of a large matrix product's "
            f"{timing['limit_tflops']:.3g}"
        )
    counts = result["n_parameters"]
    echo(
        f"parameters: {counts['total'] / 1e6:.2f} M in all, {counts['backbone'] / 1e6:.2f} M "
        f"backbone, {counts['channel_attention'] / 1e6:.3f} M channel attention"
    )
    if json_path is not None:
        disk.write_text(json_path, json.dumps(result, indent=1) + "\n")


@command.command(name="backends")
@click.option("--model", default="default", show_default=True, help="As in detect.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu"]),
    default="auto",
    show_default=True,
    help="What detect will be asked for: with a GPU, its time counts for auto and not for cpu.",
)
@click.option("--size", "size_px", type=click.IntRange(64), default=320, show_default=True)
@click.option("--rounds", "n_rounds", type=click.IntRange(3), default=20, show_default=True)
@click.option("--json", "json_path", type=PathType(dir_okay=False, writes=True))
def bench_backends(
    model: str, device: str, size_px: int, n_rounds: int, json_path: Path | None
) -> None:
    """Find out which back end is fastest here; at 320 px `detect` remembers it.

    First each alone, in a process of its own with its start-up; then each in turn with
    torchvision's bare ResNet-50 on the CPU. What is remembered counts for models of the same
    architecture.
    """
    from semanticblur_core import benchmarks_inference, disk, weights
    from semanticblur_core.errors import SemanticBlurError
    from semanticblur_core.inference import choice
    from semanticblur_core.inference.backends import is_exported

    if is_exported(model):
        raise click.UsageError(
            f"--model={model}: weights are compared in every back end, and exported files are made "
            "of them; name the weights"
        )
    echo("Each back end alone, then in turn; compiling takes minutes on slow processors.")
    alone = []
    measuring = choice.measure_backends(model, device=device, size_px=size_px, n_rounds=n_rounds)
    for speed in measuring:
        if isinstance(speed, SemanticBlurError):
            echo(f"{speed}")
            continue
        alone.append(dataclasses.asdict(speed))
        echo(
            f"{speed.backend}: {speed.startup_s:.1f} s to the first map, "
            f"{speed.seconds_per_image * 1e3:.0f} ms for each more ({speed.precision}, "
            f"{speed.device})"
        )
    result = _run(
        benchmarks_inference.bench_backends(size_px=size_px, n_rounds=n_rounds, model=model)
    )
    echo(
        f"In turn with the bare ResNet-50 in bfloat16, {result['n_threads']} threads, "
        f"medians of {n_rounds} rounds:"
    )
    for name, values in result["backends"].items():
        echo(
            f"  {name}: {values['error']}"
            if "error" in values
            else f"  {name}: {values['ms']:.0f} ms in {values['precision']}, backbone "
            f"{values['backbone_ms']:.0f} ms, ratio {values['ratio']:.2f}, maps of photographs "
            f"differ from float32 by {values['mean_difference']:.2g}, at most "
            f"{values['largest_difference']:.2g}"
        )
    picks = {}
    scatter = max((speed["scatter"] for speed in alone), default=0.0)
    if scatter > choice.MOST_SCATTER:
        echo(f"Not remembered: times scattered by {scatter:.0%}; run it on an idle machine")
    elif size_px == choice.REMEMBERED_SIZE_PX:
        info = weights.read_info(weights.resolve(model))
        for n in (1, 10, 100, 1000, 10000):
            picks[n] = choice.pick_backend(info, n, device=device)[0]
        picked = ", ".join(f"{backend} for {n}" for n, backend in picks.items())
        echo(f"Detector takes {picked} images")
    else:
        echo(f"Not remembered: Detector goes by times at {choice.REMEMBERED_SIZE_PX} px")
    if json_path is not None:
        document = {**result, "alone": alone, "picks": picks}
        disk.write_text(json_path, json.dumps(document, indent=1) + "\n")


@command.command(name="image")
@click.option("--megapixels", type=click.FloatRange(0.2, 500), default=24, show_default=True)
@click.option("--size", type=SizeType(), default=320, show_default=True)
@click.option("--rounds", "n_rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--model", default="default", show_default=True, help="As in detect.")
@device_option
@backend_option
@click.option("--json", "json_path", type=PathType(dir_okay=False, writes=True))
def bench_image(
    megapixels: float,
    size: Any,
    n_rounds: int,
    model: str,
    device: str,
    backend: str,
    json_path: Path | None,
) -> None:
    """Time one large photograph, from its JPEG to the PNG of its map, model loaded."""
    from semanticblur_core import benchmarks_inference, disk
    from semanticblur_core.inference.detector import Detector

    detector = Detector(model, device=device, backend=backend)
    result = _run(
        benchmarks_inference.bench_image(
            megapixels=megapixels, n_rounds=n_rounds, detector=detector, size=size
        )
    )
    echo(
        f"{megapixels:g} megapixels, size {size}, {detector.backend} in {detector.precision} on "
        f"{detector.device}, medians of {n_rounds} rounds:"
    )
    for name, seconds in result["seconds"].items():
        echo(f"  {name}: {seconds:.2f} s")
    if result["peak_memory_mib"]:
        echo(f"  at most {result['peak_memory_mib']:.0f} MiB of memory")
    if json_path is not None:
        disk.write_text(json_path, json.dumps(result, indent=1) + "\n")


@command.command(name="batch")
@click.option("--images", "n_images", type=click.IntRange(1), default=100, show_default=True)
@click.option("--model", default="default", show_default=True, help="As in detect.")
@device_option
@backend_option
@click.option("--json", "json_path", type=PathType(dir_okay=False, writes=True))
def bench_batch(
    n_images: int, model: str, device: str, backend: str, json_path: Path | None
) -> None:
    """Time a folder of one-megapixel JPEGs, files read and maps written."""
    from semanticblur_core import benchmarks_inference, disk
    from semanticblur_core.inference.detector import Detector

    detector = Detector(model, device=device, backend=backend, n_images=n_images)
    result = _run(benchmarks_inference.bench_batch(n_images=n_images, detector=detector))
    echo(
        f"{n_images} photographs of 1 megapixel: {result['images_per_s']:.2f} images/s "
        f"({detector.backend} in {detector.precision} on {detector.device})"
    )
    if json_path is not None:
        disk.write_text(json_path, json.dumps(result, indent=1) + "\n")


@command.command(name="train")
@click.option("--images", type=_folder, required=True, help="Folder of photographs.")
@click.option("--masks", type=_folder, required=True, help="Folder of masks, 255 = blurred.")
@click.option("--sharp", type=_folder, help="Sharp photographs, for recipes that want them.")
@click.option("--sharp-microscopy", type=_folder, help="Sharp microscopy, likewise.")
@click.option("--recipe", default="paper", show_default=True, help="As in train.")
@click.option("--pairs", "n_pairs", type=click.IntRange(1), default=256, show_default=True)
@click.option("--rounds", "n_rounds", type=click.IntRange(3), default=10, show_default=True)
@device_option
@precision_option
@click.option("--compile", "compile_model", is_flag=True, help="Train through torch.compile.")
@click.option("--json", "json_path", type=PathType(dir_okay=False, writes=True))
def bench_train(
    images: Path,
    masks: Path,
    sharp: Path | None,
    sharp_microscopy: Path | None,
    recipe: str,
    n_pairs: int,
    n_rounds: int,
    device: str,
    precision: str,
    compile_model: bool,
    json_path: Path | None,
) -> None:
    """Time the loader with a warm cache, a training step, and both together."""
    from semanticblur_core import benchmarks, disk
    from semanticblur_core.data.datasets import DecodedPairs, find_pairs, list_images
    from semanticblur_core.data.defocus import SharpImages
    from semanticblur_core.device import choose_device, keep_freed_memory
    from semanticblur_core.training.recipes import recipe as find_recipe

    keep_freed_memory()
    sources = {}
    if sharp is not None:
        sources["photograph"] = SharpImages(list_images(sharp)[:n_pairs])
    if sharp_microscopy is not None:
        files = list_images(sharp_microscopy)[:n_pairs]
        sources["microscopy"] = SharpImages(files, kind="microscopy")
    measuring = benchmarks.bench_train(
        DecodedPairs(find_pairs(images, masks)[:n_pairs]),
        find_recipe(recipe),
        sharp=sources,
        n_rounds=n_rounds,
        device=choose_device(device, precision),
        compile_model=compile_model,
    )
    result = _run(measuring)
    speed = result["images_per_s"]
    echo(
        f"recipe {recipe}, {result['precision']} on {result['device']}, {result['n_threads']} "
        f"threads, medians of {n_rounds} rounds in turn:\n"
        f"  loader alone {speed['loader']:.1f} images/s, {result['loader_over_model']:.1f} times "
        f"what the model takes\n"
        f"  step on one repeated batch {speed['step']:.2f} images/s\n"
        f"  step on fresh batches {speed['training']:.2f} images/s, "
        f"{result['training_over_step']:.0%} of that"
    )
    if json_path is not None:
        disk.write_text(json_path, json.dumps(result, indent=1) + "\n")


def _run(measuring: Generator[tuple[int, int], None, dict[str, Any]]) -> dict[str, Any]:
    """What a measurement returns, with a progress bar while it goes."""
    with progress_bar() as progress:
        task = progress.add_task("Measuring", total=None)
        while True:
            try:
                done, total = next(measuring)
            except StopIteration as finished:
                result: dict[str, Any] = finished.value
                return result
            progress.update(task, completed=done, total=total)
