"""A network that learns from remembered features, and what it is told while it does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semanticblur_core.config import FinetuneConfig
from semanticblur_core.data.defocus import Example
from semanticblur_core.data.labels import BLURRED, SHARP
from semanticblur_core.data.transforms import normalise
from semanticblur_core.device import DeviceChoice
from semanticblur_core.errors import TrainingError
from semanticblur_core.network import SemanticBlur
from semanticblur_core.training.strokes import View

_RIM_PX = 2
_N_BLOCKS = 8
# Above, a whole map with what its derivative needs takes more memory than a step of training.
_LARGEST_WHOLE_PX = 512

Window = tuple[slice, slice]


class Tuner:
    """A network that learns from remembered features, and the best of it so far."""

    def __init__(self, model: SemanticBlur, config: FinetuneConfig, chosen: DeviceChoice) -> None:
        self.model = model.to(chosen.device).eval()
        self.config = config
        self.device = chosen.device
        self.dtype = chosen.dtype
        self._remembered: dict[str, list[list[Tensor]]] = {}
        self._answers: dict[str, list[Tensor]] = {}
        frozen = model.backbone.stages[: config.frozen_stages]
        frozen.requires_grad_(False)
        live = [p for p in model.backbone.parameters() if p.requires_grad]
        inside = {id(p) for p in model.backbone.parameters()}
        rest = [p for p in model.parameters() if id(p) not in inside]
        groups = [{"params": rest, "rate_factor": 1.0}]
        if live:
            groups.append({"params": live, "rate_factor": config.backbone_rate_factor})
        # Adam moves every weight by about its rate, also those that these images say little about
        # and photographs need: at the same gain here it cost three times as much there. What
        # photographs need is damped besides, see `spare`.
        self.optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)
        self._learning = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
        self._base = [p.detach().clone() for p in self._learning]
        self._averaged = [p.detach().clone() for p in self._learning]
        self._n_averaged = 0
        self._factors: list[Tensor] | None = None
        self.best_step = 0
        self._best = self._base

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    @torch.no_grad()
    def remember(self, kind: str, image: Tensor) -> None:
        """Keep what the frozen stages say of ``(3, S, S)``, as float16 to halve the memory."""
        x = normalise(image[None].to(self.device)).contiguous(memory_format=torch.channels_last)
        features = []
        with self._autocast():
            for stage in self.model.backbone.stages[: self.config.frozen_stages]:
                x = stage(x)
                features.append(x.half())
        self._remembered.setdefault(kind, []).append(features or [x])

    @torch.no_grad()
    def keep_answers(self, kind: str) -> None:
        """Keep the maps of now, ``(1, S, S)`` each, for being held to later."""
        n = len(self._remembered.get(kind, ()))
        self._answers[kind] = [torch.sigmoid(self.logits(kind, [i]))[0] for i in range(n)]

    def spare(self, kind: str, indices: Sequence[int], rng: np.random.Generator) -> Iterator[None]:
        """From now on move weights the less, the more the maps of these views depend on them.

        A weight's steps are divided by 1 + d F / mean(F), where d is ``importance_damping`` and F
        the square of the derivative of a map, summed over 8 x 8 blocks with random signs, summed
        over the views; its mean is over the weights outside the backbone. F is a diagonal Fisher
        information (Kirkpatrick and others, Overcoming catastrophic forgetting in neural networks,
        PNAS 2017, doi:10.1073/pnas.1611835114). Yields after each view.
        """
        importance = [torch.zeros_like(p) for p in self._learning]
        is_large = self.config.image_size_px > _LARGEST_WHOLE_PX
        for i in indices:
            windows = [random_window(self.config, rng)] if is_large else None
            signs = torch.from_numpy(rng.choice([-1.0, 1.0], (1, 1, _N_BLOCKS, _N_BLOCKS)))
            blur = torch.sigmoid(self.logits(kind, [i], windows))
            signs = F.interpolate(signs.to(blur), tuple(blur.shape[-2:]), mode="nearest-exact")
            slopes = torch.autograd.grad((blur * signs).mean(), self._learning, allow_unused=True)
            for total, slope in zip(importance, slopes, strict=True):
                if slope is not None:
                    total.addcmul_(slope, slope)
            yield
        head = importance[: len(self.optimizer.param_groups[0]["params"])]
        mean = sum(float(f.sum()) for f in head) / sum(f.numel() for f in head)
        if not math.isfinite(mean):
            raise TrainingError("the derivative of a photograph's map is not finite; try float32")
        if mean > 0:
            damping = self.config.importance_damping / mean
            self._factors = [1 / (1 + damping * f) for f in importance]

    def answers(self, kind: str) -> list[Tensor]:
        """What `keep_answers` kept."""
        return self._answers[kind]

    def logits(
        self, kind: str, indices: Sequence[int], windows: Sequence[Window] | None = None
    ) -> Tensor:
        """``(N, 1, S, S)`` float32 of remembered views, or of windows of them."""
        rows = [self._remembered[kind][i] for i in indices]
        features = [torch.cat(level).float() for level in zip(*rows, strict=True)]
        stages = self.model.backbone.stages
        first = self.config.frozen_stages
        side = self.config.image_size_px
        with self._autocast():
            x = features[-1]
            features = features if first else []
            for stage in stages[first:]:
                x = stage(x)
                features.append(x)
            logits: Tensor = self.model.head(features, side, side, windows=windows).float()
        return logits

    def step(self, loss: Tensor, rate: float) -> None:
        """One step of gradient descent, and of the moving average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._learning, self.config.gradient_clip_norm)
        if self._factors is not None:
            for p, factor in zip(self._learning, self._factors, strict=True):
                if p.grad is not None:
                    p.grad.mul_(factor)
        self.optimizer.step()
        self._n_averaged += 1
        n = self._n_averaged
        decay = min(self.config.ema_decay, n / (n + 5))
        with torch.no_grad():
            torch._foreach_lerp_(self._averaged, self._learning, 1 - decay)

    @contextmanager
    def averaged(self, share: float = 1.0) -> Iterator[None]:
        """The network with the moving average of its weights, for as long as the block lasts.

        Or with weights that are as close to the average as ``share`` says, on the line to the
        base's.
        """
        raw = [p.detach().clone() for p in self._learning]
        with torch.no_grad():
            torch._foreach_copy_(
                self._learning, torch._foreach_lerp(self._base, self._averaged, share)
            )
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._learning, raw)

    def keep_best(self, step: int) -> None:
        """Keep the weights of now as the best so far."""
        self.best_step = step
        self._best = [p.detach().clone() for p in self._learning]

    @contextmanager
    def best(self) -> Iterator[None]:
        """The network with the best weights so far, for as long as the block lasts."""
        raw = [p.detach().clone() for p in self._learning]
        self.restore_best()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._learning, raw)

    def restore_best(self) -> None:
        """Go back to the best so far."""
        with torch.no_grad():
            torch._foreach_copy_(self._learning, self._best)


def random_window(
    config: FinetuneConfig, rng: np.random.Generator, codes: Tensor | None = None
) -> Window:
    """A random window; around a random labelled pixel if codes ``(1, S, S)`` are given."""
    full = config.image_size_px
    side = min(full, config.window_px)
    corner = rng.integers(0, full - side + 1, 2)
    if codes is not None and bool(codes.any()):
        places = codes[0].nonzero()
        place = places[int(rng.integers(len(places)))].cpu().numpy()
        corner = np.clip(place - rng.integers(side // 4, side - side // 4, 2), 0, full - side)
    top, left = (int(v) for v in corner)
    return slice(top, top + side), slice(left, left + side)


def inside(logits: Tensor) -> Tensor:
    """Without the rim, which in a window is not what it is in the whole."""
    return logits[..., _RIM_PX:-_RIM_PX, _RIM_PX:-_RIM_PX]


def cut(maps: Sequence[Tensor], windows: Sequence[Window]) -> Tensor:
    """The inside of a window of each ``(1, S, S)``: ``(N, 1, s, s)``."""
    return inside(torch.stack([m[:, w[0], w[1]] for m, w in zip(maps, windows, strict=True)]))


def learning_rate(step: int, config: FinetuneConfig) -> float:
    """Half a cosine after a short rise."""
    warm = min(1.0, (step + 1) / 5)
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.n_steps))


def stroke_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy where labelled; each class that occurs counts alike, however much of it."""
    losses = []
    for code, target in ((SHARP, 0.0), (BLURRED, 1.0)):
        chosen = logits[codes == code]
        if chosen.numel():
            aim = torch.full_like(chosen, target)
            losses.append(F.binary_cross_entropy_with_logits(chosen, aim))
    return torch.stack(losses).mean() if losses else logits.sum() * 0


@torch.no_grad()
def held_out_loss(tuner: Tuner, looked_at: Sequence[View]) -> float:
    """Mean absolute error on held-out labels; each class counts alike."""
    errors: dict[int, list[Tensor]] = {SHARP: [], BLURRED: []}
    for i, view in enumerate(looked_at):
        blur = torch.sigmoid(tuner.logits("held out", [i]))[0, 0].cpu()
        errors[SHARP].append(blur[view.held_out == SHARP])
        errors[BLURRED].append(1 - blur[view.held_out == BLURRED])
    means = [torch.cat(parts).mean() for parts in errors.values() if any(len(p) for p in parts)]
    return float(torch.stack(means).mean())


@torch.no_grad()
def photograph_error(tuner: Tuner, watched: Sequence[Example]) -> float:
    """MAE where the truth of generated photographs is known."""
    errors = []
    for i, example in enumerate(watched):
        labelled = example.labelled[0, 0]
        if labelled.any():
            blur = torch.sigmoid(tuner.logits("watched", [i]))[0, 0].cpu()
            gap = (blur - example.blurred[0, 0].float()).abs()
            errors.append(float(gap[labelled].mean()))
    return float(np.mean(errors))


@torch.no_grad()
def map_drift(tuner: Tuner, kind: str) -> float:
    """Mean absolute difference of the maps from what `Tuner.keep_answers` kept."""
    gaps = [
        float((torch.sigmoid(tuner.logits(kind, [i]))[0] - answer).abs().mean())
        for i, answer in enumerate(tuner.answers(kind))
    ]
    return float(np.mean(gaps))
