"""Configuration objects: frozen dataclasses that travel with weights and checkpoints as JSON."""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from semanticblur_core.errors import ConfigError

BackboneName = Literal["vgg16", "resnet34", "resnet50", "efficientnet_b4"]
Schedule = Literal["polynomial", "cosine"]
# Hand-crafted methods that stand beside the networks, see `semanticblur_core.focus.classical`.
Method = Literal["hifst", "lbp", "dbdf"]
Augmentation = Literal["none", "flip", "crop", "colour"]
# Five halvings leave more than one pixel.
MIN_SIZE_PX = 33
# Share of synthetic images that are wholly sharp.
SHARP_SHARE = 0.14
# What an image squashed to that side takes is several GiB.
MAX_SIZE_PX = 4096


def require_choice(name: str, value: object, choices: Any) -> None:
    """Refuse what is none of the values of a ``Literal``.

    Raises
    ------
    ConfigError
        Naming the values.
    """
    if value not in get_args(choices):
        named = ", ".join(map(str, get_args(choices)))
        raise ConfigError(f"{name}: expected one of {named}, got {value!r}")


def require_share(name: str, value: float) -> None:
    """Refuse what is not in 0..1, as a `ConfigError`."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}: expected in [0, 1], got {value}")


class _Config:
    """Dictionary round trip shared by the configuration dataclasses."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from plain JSON values.

        Raises
        ------
        ConfigError
            If a key is unknown or a value is out of range.
        """
        fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - fields)
        if unknown:
            raise ConfigError(
                f"{cls.__name__}: unknown setting {', '.join(unknown)}; known are "
                f"{', '.join(sorted(fields))}"
            )
        return cls(**values)

    def _require_types(self) -> None:
        """Refuse values of another type than the default's; whole numbers are numbers, too.

        Numbers of numpy become Python's own, which JSON takes.
        """
        kinds = {float: numbers.Real, int: numbers.Integral}  # numpy's, too
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value: Any = getattr(self, field.name)
            kind: Any = type(field.default)
            fits = isinstance(value, kinds.get(kind, kind))
            if not fits or (isinstance(value, bool) and kind is not bool):
                wanted = {bool: "true or false", int: "a whole number", float: "a number"}
                raise ConfigError(
                    f"{field.name}: expected {wanted.get(kind, 'text')}, got {value!r}"
                )
            if type(value) not in (int, kind):
                # Of an enumeration's text `str` gives the name of the member.
                plain = str.__str__(value) if kind is str else kind(value)
                object.__setattr__(self, field.name, plain)  # it is frozen

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` reads them back."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]


@dataclass(frozen=True)
class ModelConfig(_Config):
    """Architecture of a SemanticBlur network.

    Parameters
    ----------
    backbone
        Feature extractor, Table 1 of the paper.
    channel_attention, spatial_attention, semantic_enhancement
        Switches of Table 2 (equations 4-6, 7-8 and 10-11).
    output_stride
        Stride of the last stage: 32 keeps the paper's stated resolutions, 16 and 8 replace
        strides by dilation (ResNet-50 only).
    attention_reduction
        Width reduction inside the channel attention's shared MLP.
    semantic_channels
        Width s of the semantic map (equation 10).
    decoder_channels
        Width d of the pyramid (equations 12-13).
    """

    backbone: BackboneName = "resnet50"
    channel_attention: bool = True
    spatial_attention: bool = True
    semantic_enhancement: bool = True
    output_stride: int = 32
    attention_reduction: int = 16
    semantic_channels: int = 80
    decoder_channels: int = 128

    def __post_init__(self) -> None:
        self._require_types()
        require_choice("backbone", self.backbone, BackboneName)
        if self.output_stride not in (8, 16, 32):
            raise ConfigError(f"output_stride: expected 8, 16 or 32, got {self.output_stride}")
        if self.output_stride != 32 and self.backbone != "resnet50":
            raise ConfigError(
                f"output_stride={self.output_stride}: only resnet50 can replace strides by "
                f"dilation, {self.backbone} runs at 32"
            )
        for name in ("attention_reduction", "semantic_channels", "decoder_channels"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name}: expected a whole number of at least 1, got {value!r}")


@dataclass(frozen=True)
class TrainConfig(_Config):
    """Every number of a training run; the defaults are the paper's recipe (section 4.1.1).

    Parameters
    ----------
    epochs, batch_size
        Length of the run and images per step, of all processes together. An incomplete last batch
        of a pass is dropped.
    accumulate
        Parts that each batch is worked through in, for less memory. BatchNorm sees the parts.
    synthetic_photographs, synthetic_microscopy
        How many images of each batch are synthetic defocus, made of sharp photographs and of sharp
        microscopy (`semanticblur_core.data.defocus`); the rest are pairs.
    passes_per_epoch
        Passes over the pairs that make an epoch, at whose end the network is validated and the
        state written. A run is ``epochs`` times as many passes long.
    synthetic_sharp_share
        Share of the synthetic images that are wholly sharp.
    image_size_px
        Side of the square that images are resized (squashed) to.
    learning_rate
        Initial rate of Adam.
    schedule, poly_power
        Rate at step t of T: ``polynomial``, ``learning_rate * (1 - t / T) ** poly_power``, or
        ``cosine``, half a cosine.
    early_rate_factor
        Rate of the backbone's first three stages, those that ImageNet weights fill, as a multiple.
    frozen_stages
        Stages of the backbone, from the image on, that keep their weights and statistics.
    frozen_statistics
        Whether every BatchNorm normalises with the running statistics it started with. Then what
        else is in a batch does not matter: photographs and microscopy do not blur each other's.
    warmup_steps
        Steps over which the rate first rises linearly from zero.
    gradient_clip_norm
        Maximum norm of the whole gradient.
    weight_decay
        L2 penalty of Adam.
    ssim_weight
        lambda in equation 16.
    augmentation
        ``none`` (the paper names none), ``flip`` (left-right), ``crop`` (also crops that are never
        enlarged beyond the photograph's own pixels) or ``colour`` (also gain, gamma, saturation).
    crop_min_side
        Shortest side of a crop as a fraction of the photograph's.
    cutmix_share
        Share of the pairs into which a rectangle of the batch's next pair is pasted, mask and all
        (CutMix, Yun et al., ICCV 2019): what is blurred is a local property, so the label is exact,
        while what the scene shows no longer tells it.
    redefocus_share
        Share of the pairs that are defocused further, all of it, by depth or but for a region, with
        masks to match (`semanticblur_core.data.defocus.defocus_photographs`), to the same end.
    ema_decay
        Decay per step of the exponential moving average of the weights that is validated and
        saved; 0 turns it off.
    seed
        Seed of initialisation, order and augmentation.
    """

    epochs: int = 100
    batch_size: int = 6
    accumulate: int = 1
    synthetic_photographs: int = 0
    synthetic_microscopy: int = 0
    synthetic_sharp_share: float = SHARP_SHARE
    passes_per_epoch: int = 1
    image_size_px: int = 320
    learning_rate: float = 1e-4
    schedule: Schedule = "polynomial"
    poly_power: float = 0.9
    early_rate_factor: float = 1.0
    frozen_stages: int = 0
    frozen_statistics: bool = False
    warmup_steps: int = 0
    gradient_clip_norm: float = 0.5
    weight_decay: float = 0.0
    ssim_weight: float = 0.1
    augmentation: Augmentation = "none"
    crop_min_side: float = 0.6
    cutmix_share: float = 0.0
    redefocus_share: float = 0.0
    ema_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"epochs": 1, "batch_size": 1, "image_size_px": 33, "warmup_steps": 0, "seed": 0}
        lowest |= {"synthetic_photographs": 0, "synthetic_microscopy": 0, "accumulate": 1}
        lowest |= {"passes_per_epoch": 1}
        self._require_types()
        for name, low in lowest.items():
            value = getattr(self, name)
            if not low <= value < 2**63:
                raise ConfigError(f"{name}: expected a whole number of at least {low}, got {value}")
        if self.image_size_px > MAX_SIZE_PX:
            raise ConfigError(
                f"image_size_px: expected at most {MAX_SIZE_PX}, got {self.image_size_px}"
            )
        if self.accumulate > self.batch_size:
            raise ConfigError(
                f"accumulate: expected at most batch_size {self.batch_size}, got {self.accumulate}"
            )
        require_choice("schedule", self.schedule, Schedule)
        if self.n_pairs_per_batch < 1:
            raise ConfigError(
                f"batch_size: {self.batch_size} leaves no place for pairs beside the "
                f"{self.batch_size - self.n_pairs_per_batch} synthetic images of each batch"
            )
        for name in ("learning_rate", "gradient_clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected above 0, got {getattr(self, name)}")
        for name in ("poly_power", "early_rate_factor", "weight_decay", "ssim_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.frozen_stages not in range(5):
            raise ConfigError(f"frozen_stages: expected 0 to 4, got {self.frozen_stages}")
        require_choice("augmentation", self.augmentation, Augmentation)
        if not 0 < self.crop_min_side <= 1:
            raise ConfigError(f"crop_min_side: expected in (0, 1], got {self.crop_min_side}")
        for name in ("cutmix_share", "redefocus_share", "synthetic_sharp_share"):
            require_share(name, getattr(self, name))
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay: expected in [0, 1), got {self.ema_decay}")

    @property
    def n_pairs_per_batch(self) -> int:
        """Images of each batch that are photographs with masks."""
        return self.batch_size - self.synthetic_photographs - self.synthetic_microscopy


@dataclass(frozen=True)
class FinetuneConfig(_Config):
    """Every number of a fine-tuning run; the defaults are the budget ``quick``.

    Parameters
    ----------
    n_steps
        Longest length of the run.
    batch_size
        Views of the user's images in each step.
    n_views
        Views made of them: turned, mirrored, cropped and recoloured copies; more, up to four times
        as many, where there are more images.
    replay_size
        Generated photographs in each step, on which the network is held to what it said before.
    n_replay
        Generated photographs in all.
    replay_weight
        Weight of their loss beside that of the labels.
    importance_damping
        How much less weights move that the maps of those photographs (every second of them) depend
        on; 0 moves all alike.
    frozen_stages
        Stages of the backbone, from the image on, that stay as they are; what they say of each view
        is computed once.
    learning_rate
        Highest rate of gradient descent with momentum 0.9; it falls to zero along half a cosine.
    backbone_rate_factor
        Rate of the stages that are not frozen, as a multiple.
    gradient_clip_norm
        Maximum norm of the whole gradient.
    ema_decay
        Decay per step of the moving average of the weights that is looked at and kept.
    validate_every, patience
        Steps between looks at the held-out labels, and how many looks without progress end the run,
        counted from the half of it on.
    forgetting_limit
        By how much the error on generated photographs may rise: the weights are drawn back towards
        the base's until it rises by no more.
    drift_limit
        By how much, likewise, maps of photographs as they are may differ from the base's in the
        mean.
    held_out_share
        Share of the strokes of each class that is held out.
    image_size_px
        Side of the squares that the network sees.
    window_px
        Side of the window of each square in which the loss is taken in a step.
    seed
        Seed of everything drawn.
    """

    n_steps: int = 60
    batch_size: int = 5
    n_views: int = 30
    replay_size: int = 4
    n_replay: int = 24
    replay_weight: float = 2.0
    importance_damping: float = 1.0
    frozen_stages: int = 4
    learning_rate: float = 0.04
    ema_decay: float = 0.8
    backbone_rate_factor: float = 0.05
    gradient_clip_norm: float = 1.0
    validate_every: int = 6
    patience: int = 4
    forgetting_limit: float = 0.015
    drift_limit: float = 0.06
    held_out_share: float = 0.25
    image_size_px: int = 320
    window_px: int = 144
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"n_steps": 1, "batch_size": 1, "n_views": 1, "replay_size": 0, "n_replay": 0}
        lowest |= {"validate_every": 1, "patience": 1, "image_size_px": 33, "seed": 0}
        lowest |= {"window_px": 16}
        self._require_types()
        for name, low in lowest.items():
            value = getattr(self, name)
            if not low <= value < 2**63:
                raise ConfigError(f"{name}: expected a whole number of at least {low}, got {value}")
        if self.frozen_stages not in range(5):
            raise ConfigError(f"frozen_stages: expected 0 to 4, got {self.frozen_stages}")
        for name in ("learning_rate", "gradient_clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected above 0, got {getattr(self, name)}")
        for name in (
            "replay_weight",
            "importance_damping",
            "backbone_rate_factor",
            "forgetting_limit",
            "drift_limit",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("held_out_share", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected in [0, 1), got {getattr(self, name)}")
