"""Batches for training, made in threads while the one before is learned from."""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from semanticblur_core.config import TrainConfig
from semanticblur_core.data.datasets import DecodedPairs
from semanticblur_core.data.defocus import SharpImages, defocus_photographs, synthesise
from semanticblur_core.data.transforms import augment, cutmix
from semanticblur_core.device import is_out_of_memory
from semanticblur_core.errors import TrainingError
from semanticblur_core.machine import count_cores

_CPU = torch.device("cpu")
_STREAM_LOCK = threading.Lock()

# Images, targets and what of them is labelled: (N, 3, S, S), (N, 1, S, S) and as much or None.
Batch = tuple[Tensor, Tensor, Tensor | None]


def synthetic_sources(
    config: TrainConfig, sharp: Mapping[str, SharpImages]
) -> list[tuple[SharpImages, int]]:
    """Sources of synthetic images and how many of each batch come from them."""
    wanted = {
        "photograph": config.synthetic_photographs,
        "microscopy": config.synthetic_microscopy,
    }
    for kind, count in wanted.items():
        if count and kind not in sharp:
            raise TrainingError(
                f"the recipe makes {count} of each batch from sharp images ({kind}), and none are "
                "given"
            )
    return [(sharp[kind], count) for kind, count in wanted.items() if count]


def make_batches(
    pairs: DecodedPairs,
    synthetic: Sequence[tuple[SharpImages, int]],
    config: TrainConfig,
    epoch: int,
    *,
    first: int = 0,
    device: torch.device = _CPU,
) -> Iterator[Batch]:
    """Images, targets and what of them is labelled, the next batches made while one is used.

    Each pair draws from a generator of its own, seeded by run, pass and image, so that the data do
    not depend on where a run was interrupted; so do the synthetic images of each batch, and what is
    defocused further of it.

    Threads make them. Where the device is a CUDA GPU what was cut out and resized is recoloured and
    defocused there, and the batches lie there; on the CPU, with a warning, where the GPU has no
    memory left for it.
    """

    def plan() -> Iterator[tuple[int, list[int]]]:
        size, n_passes = config.n_pairs_per_batch, config.passes_per_epoch
        for a_pass in range(epoch * n_passes, (epoch + 1) * n_passes):
            order = np.random.default_rng((config.seed, a_pass)).permutation(len(pairs))
            for i in range(0, len(order) - size + 1, size):
                yield a_pass, order[i : i + size].tolist()

    def make(a_pass: int, indices: Sequence[int]) -> Batch:
        if device.type == "cuda":
            try:
                with _loader_stream(device):
                    return assemble(a_pass, indices, device)
            except RuntimeError as error:
                # Which cuFFT gives for a lack of memory, too.
                if not is_out_of_memory(error) and "CUFFT_INTERNAL_ERROR" not in str(error):
                    raise
            # Outside the handler, which keeps the failed attempt's tensors alive.
        return assemble(a_pass, indices, _CPU)

    def assemble(a_pass: int, indices: Sequence[int], on: torch.device) -> Batch:
        rngs = [np.random.default_rng((config.seed, a_pass, i)) for i in indices]
        images, targets = augment([pairs[i] for i in indices], config, rngs, on)
        # The first index names the batch: every image occurs once in a pass.
        if config.redefocus_share:
            rng = np.random.default_rng((config.seed, a_pass, indices[0], 3))
            images, targets = _redefocus(images, targets, config.redefocus_share, rng)
        partial = targets.shape[1] == 2
        if config.cutmix_share:
            rng = np.random.default_rng((config.seed, a_pass, indices[0], 2))
            images, targets = cutmix(images, targets, share=config.cutmix_share, rng=rng)
        labelled = None
        if partial:
            targets, labelled = targets[:, :1], targets[:, 1:] > 0
        if not synthetic:
            return images, targets, labelled
        rng = np.random.default_rng((config.seed, a_pass, indices[0], 1))
        made = [
            synthesise(
                *(sources, count, config.image_size_px, rng, on),
                sharp_share=config.synthetic_sharp_share,
            )
            for sources, count in synthetic
        ]
        if labelled is None:
            labelled = torch.ones_like(targets, dtype=torch.bool)
        return (
            torch.cat([images, *(example.image for example in made)]),
            torch.cat([targets, *(example.blurred.float() for example in made)]),
            torch.cat([labelled, *(example.labelled for example in made)]),
        )

    planned = islice(plan(), first, None)
    n_workers = n_loader_threads(device)
    with _one_thread_each(device) as prepare, ThreadPoolExecutor(n_workers, "", prepare) as pool:
        pending = deque(pool.submit(make, *given) for given in islice(planned, n_workers))
        while pending:
            ready = pending.popleft()
            pending.extend(pool.submit(make, *given) for given in islice(planned, 1))
            batch = ready.result()
            if device.type == "cuda" and not batch[0].is_cuda:
                _warn_of_cpu(device)
            for tensor in batch:
                if tensor is not None and tensor.is_cuda:
                    # The allocator is to know that another stream reads it.
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
            yield batch


def _redefocus(
    images: Tensor, targets: Tensor, share: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Defocus a share of the images further; the targets say what is labelled then."""
    chosen = np.flatnonzero(rng.random(len(images)) < share)
    if not len(chosen):
        return images, targets
    if targets.shape[1] == 1:
        targets = torch.cat([targets, torch.ones_like(targets)], dim=1)
    index = torch.from_numpy(chosen).to(images.device)
    made, made_targets = defocus_photographs(images[index], targets[index], rng)
    return images.index_copy(0, index, made), targets.index_copy(0, index, made_targets)


@contextmanager
def _one_thread_each(device: torch.device) -> Iterator[Callable[[], None] | None]:
    """What threads that feed a GPU begin with: each computes alone.

    Otherwise each has a team of as many threads as there are cores, for work of milliseconds, and
    the one that launches the training step waits among them for a core.
    """
    if device.type != "cuda":
        yield None
        return
    n_threads = torch.get_num_threads()
    try:
        yield partial(torch.set_num_threads, 1)
    finally:
        torch.set_num_threads(n_threads)  # of threads that begin later


@lru_cache
def _warn_of_cpu(device: torch.device) -> None:
    """Once in a process."""
    warnings.warn(
        f"{device} has no memory left to make batches in: they are made on the CPU, slowly",
        stacklevel=2,
    )


def n_loader_threads(device: torch.device) -> int:
    """Threads that make batches, and so the batches made ahead.

    A GPU is fed by several: on 16 cores training ran a quarter slower with eight than with four.
    Two CPU cores are better spent on the network.
    """
    n_cores = count_cores()
    if device.type == "cuda":
        n_cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return max(1, min(4, n_cores // 2))
    return max(1, min(4, n_cores // 4))


@contextmanager
def _loader_stream(device: torch.device) -> Iterator[None]:
    """Compute beside the training step, not behind it; done at the end."""
    with _STREAM_LOCK:  # the cache lets threads that ask together make one each
        stream = _stream_of(device)
    # Entering the device too: leaving a stream would otherwise select GPU 0 in this thread.
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
        done = stream.record_event()
    done.synchronize()


@lru_cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The one stream of all loaders: memory freed in a stream is used again in that one only."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
