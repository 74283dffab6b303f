"""Speed measured on this machine: two things in turn, medians and ratios."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from semanticblur_core.config import TrainConfig
from semanticblur_core.data.datasets import DecodedPairs
from semanticblur_core.data.defocus import SharpImages
from semanticblur_core.device import DeviceChoice
from semanticblur_core.inference.graphed import compile_forward
from semanticblur_core.machine import describe_machine
from semanticblur_core.network import SemanticBlur
from semanticblur_core.training.loader import (
    Batch,
    make_batches,
    n_loader_threads,
    synthetic_sources,
)
from semanticblur_core.training.loop import (
    backward,
    count_steps,
    launch_fabric,
    make_optimizer,
    set_training_mode,
)


@dataclass(frozen=True)
class ModelTiming:
    """Forward times of a batch in one precision, medians.

    ``ratio`` is the network's time over the backbone's, ``share_of_backbone`` its images a second
    as a share of the backbone's. TFLOP/s are 10^12 floating-point operations a second, a
    multiply-add being two; ``limit_tflops`` those of a large matrix product in the same precision,
    and ``share_of_limit`` the network's as a share of it.
    """

    precision: str
    backbone_ms: float
    network_ms: float
    ratio: float
    n_rounds: int
    backbone_images_per_s: float
    network_images_per_s: float
    share_of_backbone: float
    backbone_tflops: float
    network_tflops: float
    limit_tflops: float
    share_of_limit: float


def bench_model(
    *,
    size_px: int,
    n_rounds: int,
    n_threads: int,
    precisions: tuple[str, ...],
    device: str = "cpu",
    batch_size: int = 1,
    compiled: bool = False,
) -> Generator[tuple[int, int], None, dict[str, Any]]:
    """Time the whole network against torchvision's bare ResNet-50 backbone.

    Parameters
    ----------
    size_px
        Side of the square images.
    n_rounds
        Rounds per precision; each times both on one new batch, in alternating order, after three
        rounds of warm-up.
    n_threads
        Threads that torch may use.
    precisions
        Of ``float32`` and ``bfloat16``; the backbone runs in the same.
    device
        Where to run.
    batch_size
        Images at once.
    compiled
        Both as `Detector` compiles (``torch.compile``, on a CUDA GPU as one graph), in the warm-up.

    Yields
    ------
    tuple
        Rounds done and rounds in all.

    Returns
    -------
    dict
        JSON values: machine, settings, a `ModelTiming` for each precision, numbers of parameters,
        10^9 floating-point operations an image.

    Notes
    -----
    The network is as `Detector` runs it (batch normalisations folded), the backbone as torchvision
    gives it: convolutions of ResNet-50 without pooling and classifier. Operations are those of
    convolutions and matrix products, counted by torch as the network is run; nothing else counts.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    network = SemanticBlur().eval()
    warm_up = 3
    total = (n_rounds + warm_up) * len(precisions)
    timings = []
    flops = {
        "backbone": count_flops(bare_backbone(), size_px),
        "network": count_flops(network.for_inference(), size_px),
    }
    try:
        for index, precision in enumerate(precisions):
            dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
            contestants: dict[str, Callable[[Tensor], Tensor]] = {
                "backbone": bare_backbone().to(device, dtype, memory_format=torch.channels_last),  # type: ignore[call-overload]
                "network": network.for_inference(dtype).to(device),
            }
            if compiled:
                contestants = {
                    name: compile_forward(cast(nn.Module, module), torch.device(device))
                    for name, module in contestants.items()
                }
            limit = _matrix_flops_per_s(torch.device(device), dtype)
            seconds: dict[str, list[float]] = {name: [] for name in contestants}
            for i in range(n_rounds + warm_up):
                images = torch.rand(batch_size, 3, size_px, size_px, device=device).to(
                    dtype, memory_format=torch.channels_last
                )
                names = list(contestants)
                for name in names if i % 2 else reversed(names):
                    elapsed = _time_forward(contestants[name], images)
                    if i >= warm_up:
                        seconds[name].append(elapsed)
                yield index * (n_rounds + warm_up) + i + 1, total
            backbone, whole = (statistics.median(seconds[name]) for name in ("backbone", "network"))
            achieved = batch_size * flops["network"] / whole
            timings.append(
                ModelTiming(
                    precision=precision,
                    backbone_ms=backbone * 1e3,
                    network_ms=whole * 1e3,
                    ratio=whole / backbone,
                    n_rounds=n_rounds,
                    backbone_images_per_s=batch_size / backbone,
                    network_images_per_s=batch_size / whole,
                    share_of_backbone=backbone / whole,
                    backbone_tflops=batch_size * flops["backbone"] / backbone / 1e12,
                    network_tflops=achieved / 1e12,
                    limit_tflops=limit / 1e12,
                    share_of_limit=achieved / limit,
                )
            )
    finally:
        torch.set_num_threads(threads_before)
    return {
        "machine": describe_machine(),
        "device": device,
        "size_px": size_px,
        "batch_size": batch_size,
        "compiled": compiled,
        "n_threads": n_threads,
        "gflop_per_image": {name: count / 1e9 for name, count in flops.items()},
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
    compile_model: bool = False,
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
        Rounds, after one of warm-up; each times a few batches and steps of each kind.
    device
        What to compute on.
    compile_model
        As `train` does: through ``torch.compile``, which takes place in the warm-up.

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
    count_steps(pairs, config)
    torch.manual_seed(config.seed)
    model = SemanticBlur().to(memory_format=torch.channels_last)
    fabric = launch_fabric(device, config)
    optimizer = make_optimizer(model, config, device)
    wrapped, optimizer = fabric.setup(torch.compile(model) if compile_model else model, optimizer)
    set_training_mode(model, config)
    synthetic = synthetic_sources(config, sharp)
    n_parts = config.accumulate

    ahead = n_loader_threads(fabric.device)
    # Enough for each thread's turn to come several times; with one thread, a step takes seconds.
    n_loaded, n_steps = 4 * ahead, 1 if ahead == 1 else 4 * ahead

    def batches(epoch: int) -> Generator[Batch]:
        for later in itertools.count(epoch):
            yield from make_batches(pairs, synthetic, config, later, device=fabric.device)

    def load(source: Iterator[Batch], n: int) -> None:
        for _ in itertools.islice(source, n):
            pass

    def learn(source: Iterator[Batch], n: int) -> None:
        nonlocal n_parts
        for batch in itertools.islice(source, n):
            _, n_parts = backward(fabric, wrapped, optimizer, batch, config, n_parts)
            norm = fabric.clip_gradients(
                wrapped, optimizer, max_norm=config.gradient_clip_norm, error_if_nonfinite=False
            )
            float(norm)  # training looks at it, and so waits for it
            optimizer.step()

    with closing(batches(0)) as source:
        repeated = itertools.repeat(next(source))
    seconds: dict[str, list[float]] = {"loader": [], "step": [], "training": []}
    for i in range(n_rounds + 1):
        # Closed, a loader is idle while something else is timed. The first batches of each are not
        # timed: its threads begin together, and finish one after the other only later.
        with closing(batches(i)) as source:
            load(source, ahead)
            loader = _clock(partial(load, source, n_loaded), fabric.device) / n_loaded
        alone = _clock(partial(learn, repeated, n_steps), fabric.device) / n_steps
        with closing(batches(i)) as source:
            learn(source, ahead)
            training = _clock(partial(learn, source, n_steps), fabric.device) / n_steps
        if i:
            for name, taken in zip(seconds, (loader, alone, training), strict=True):
                seconds[name].append(taken)
        yield i + 1, n_rounds + 1
    speed = {name: config.batch_size / statistics.median(s) for name, s in seconds.items()}
    return {
        "machine": describe_machine(),
        "device": str(device.device),
        "precision": str(device.dtype).removeprefix("torch."),
        "compiled": compile_model,
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


def count_flops(module: nn.Module, size_px: int) -> int:
    """Floating-point operations of an image: two for each multiply-add of layers and products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 3, size_px, size_px))
    return int(counter.get_total_flops())


def _matrix_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a large matrix product, the best of ten: the limit of arithmetic in practice."""
    n = 8192 if device.type == "cuda" else 1024
    left, right = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions by default
    try:
        seconds = [_clock(lambda: left @ right, device) for _ in range(12)]
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * n**3 / min(seconds[2:])


@torch.inference_mode()
def _time_forward(forward: Callable[[Tensor], Tensor], images: Tensor) -> float:
    return _clock(lambda: forward(images), images.device)


def _clock(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of an action alone, with nothing under way before and after it."""
    _synchronize(device)
    start = time.perf_counter()
    action()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    """Wait for what a GPU was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
