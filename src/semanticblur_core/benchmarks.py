"""Speed measured on this machine: two things in turn, medians and ratios."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from semanticblur_core.config import TrainConfig
from semanticblur_core.data.datasets import DecodedPairs
from semanticblur_core.data.defocus import SharpImages
from semanticblur_core.device import DeviceChoice
from semanticblur_core.machine import describe_machine
from semanticblur_core.network import SemanticBlur
from semanticblur_core.training.loop import (
    Batch,
    backward,
    launch_fabric,
    make_batches,
    synthetic_sources,
)

_LOADED_AT_ONCE = 4


@dataclass(frozen=True)
class ModelTiming:
    """Forward times in one precision; ``ratio`` is network over backbone, of the medians."""

    precision: str
    backbone_ms: float
    network_ms: float
    ratio: float
    n_rounds: int


def bench_model(
    *, size_px: int, n_rounds: int, n_threads: int, precisions: tuple[str, ...], device: str = "cpu"
) -> Generator[tuple[int, int], None, dict[str, Any]]:
    """Time the whole network against torchvision's bare ResNet-50 backbone.

    Parameters
    ----------
    size_px
        Side of the square images.
    n_rounds
        Rounds per precision; each times both on one new image, in alternating order, after three
        rounds of warm-up.
    n_threads
        Threads that torch may use.
    precisions
        Of ``float32`` and ``bfloat16``; the backbone runs in the same.
    device
        Where to run.

    Yields
    ------
    tuple
        Rounds done and rounds in all.

    Returns
    -------
    dict
        JSON values: machine, settings, a `ModelTiming` for each precision, numbers of parameters.

    Notes
    -----
    Batch 1, eager. The network is as `Detector` runs it (batch normalisations folded), the backbone
    as torchvision gives it: convolutions of ResNet-50 without pooling and classifier.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    network = SemanticBlur().eval()
    warm_up = 3
    total = (n_rounds + warm_up) * len(precisions)
    timings = []
    try:
        for index, precision in enumerate(precisions):
            dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
            contestants: dict[str, nn.Module] = {
                "backbone": bare_backbone().to(device, dtype, memory_format=torch.channels_last),  # type: ignore[call-overload]
                "network": network.for_inference(dtype).to(device),
            }
            seconds: dict[str, list[float]] = {name: [] for name in contestants}
            for i in range(n_rounds + warm_up):
                image = torch.rand(1, 3, size_px, size_px, device=device).to(
                    dtype, memory_format=torch.channels_last
                )
                names = list(contestants)
                for name in names if i % 2 else reversed(names):
                    elapsed = _time_forward(contestants[name], image)
                    if i >= warm_up:
                        seconds[name].append(elapsed)
                yield index * (n_rounds + warm_up) + i + 1, total
            backbone, whole = (statistics.median(seconds[name]) for name in ("backbone", "network"))
            timings.append(
                ModelTiming(precision, backbone * 1e3, whole * 1e3, whole / backbone, n_rounds)
            )
    finally:
        torch.set_num_threads(threads_before)
    return {
        "machine": describe_machine(),
        "device": device,
        "size_px": size_px,
        "batch_size": 1,
        "n_threads": n_threads,
        "timings": [asdict(timing) for timing in timings],
        "n_parameters": {
            "total": _n_parameters(network),
            "backbone": _n_parameters(network.backbone),
            "channel_attention": _n_parameters(network.channel_attention),
            "spatial_attention": _n_parameters(network.spatial_attention),
        },
    }


def bench_train(
    pairs: DecodedPairs,
    config: TrainConfig,
    *,
    sharp: Mapping[str, SharpImages],
    n_rounds: int,
    device: DeviceChoice,
) -> Generator[tuple[int, int], None, dict[str, Any]]:
    """Time the loader, a training step on one repeated batch, and both together.

    Parameters
    ----------
    pairs
        Decoded pairs: the warm cache.
    config
        Recipe.
    sharp
        Sharp images by kind, if the recipe makes synthetic ones of them.
    n_rounds
        Batches of each, in turn, after one of warm-up.
    device
        What to compute on.

    Yields
    ------
    tuple
        Rounds done and rounds in all.

    Returns
    -------
    dict
        JSON values: machine, recipe and medians in images a second; ``loader_over_model`` and
        ``training_over_step``, the speed of steps on fresh batches as a share of the same step on
        one repeated batch.
    """
    torch.manual_seed(config.seed)
    model = SemanticBlur().to(memory_format=torch.channels_last)
    fabric = launch_fabric(device, config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    wrapped, optimizer = fabric.setup(model, optimizer)
    model.train()
    synthetic = synthetic_sources(config, sharp)

    def step(batch: Batch) -> None:
        backward(fabric, wrapped, optimizer, batch, config, config.accumulate)
        optimizer.step()

    def endless() -> Iterator[Batch]:
        for epoch in itertools.count():
            yield from make_batches(pairs, synthetic, config, epoch)

    # A source of its own for each: with the other's, a batch would be ready before it is timed.
    alone, together = endless(), endless()
    repeated = next(alone)
    next(together)
    seconds: dict[str, list[float]] = {"loader": [], "step": [], "training": []}
    for i in range(n_rounds + 1):
        actions: dict[str, Callable[[], object]] = {
            "loader": lambda: [next(alone) for _ in range(_LOADED_AT_ONCE)],
            "step": lambda: step(repeated),
            "training": lambda: step(next(together)),
        }
        for name, action in actions.items():
            if name == "loader":
                next(alone)  # which was made while something else was timed
            start = time.perf_counter()
            action()
            if device.device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
        yield i + 1, n_rounds + 1
    alone.close()  # type: ignore[attr-defined]
    together.close()  # type: ignore[attr-defined]
    speed = {name: config.batch_size / statistics.median(s) for name, s in seconds.items()}
    speed["loader"] *= _LOADED_AT_ONCE
    return {
        "machine": describe_machine(),
        "device": str(device.device),
        "precision": str(device.dtype).removeprefix("torch."),
        "n_threads": torch.get_num_threads(),
        "recipe": config.to_dict(),
        "n_rounds": n_rounds,
        "images_per_s": speed,
        "loader_over_model": speed["loader"] / speed["step"],
        "training_over_step": speed["training"] / speed["step"],
    }


def bare_backbone() -> nn.Module:
    """Convolutions of torchvision's ResNet-50, without pooling and classifier."""
    net = models.resnet50()
    return nn.Sequential(
        *(net.conv1, net.bn1, net.relu, net.maxpool),
        *(net.layer1, net.layer2, net.layer3, net.layer4),
    ).eval()


@torch.inference_mode()
def _time_forward(module: nn.Module, image: Tensor) -> float:
    start = time.perf_counter()
    module(image)
    if image.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
