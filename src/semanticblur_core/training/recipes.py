"""Training recipes as data: every number in sight."""

from __future__ import annotations

from semanticblur_core.config import FinetuneConfig, TrainConfig
from semanticblur_core.errors import ConfigError

RECIPES: dict[str, TrainConfig] = {
    # Section 4.1.1 of the paper, which names no augmentation.
    "paper": TrainConfig(),
    # Stages for two CPU cores: fewer pixels first, whose crops show blur at the scale at which the
    # second stage sees it, then the paper's size. The model card says which the weights used.
    "first-256": TrainConfig(
        epochs=12,
        image_size_px=256,
        learning_rate=2e-4,
        warmup_steps=50,
        augmentation="colour",
        ema_decay=0.995,
    ),
    "first-320": TrainConfig(
        epochs=15,
        image_size_px=320,
        learning_rate=1.5e-4,
        warmup_steps=20,
        augmentation="crop",
        crop_min_side=0.8,
        ema_decay=0.995,
        seed=1,
    ),
    # Whole frames: where in the frame things lie says much about what is in focus.
    "first-320-whole": TrainConfig(
        epochs=8,
        image_size_px=320,
        learning_rate=1.5e-4,
        warmup_steps=20,
        augmentation="flip",
        ema_decay=0.99,
        seed=2,
    ),
    # Half of each batch is synthetic defocus, where the truth is exact and what an image shows says
    # little about what is in focus: wholly sharp, wholly blurred, and microscopy among it.
    "mixed": TrainConfig(
        epochs=9,
        batch_size=8,
        synthetic_photographs=3,
        synthetic_microscopy=1,
        learning_rate=1.5e-4,
        warmup_steps=20,
        augmentation="colour",
        crop_min_side=0.7,
        ema_decay=0.997,
        seed=3,
    ),
}


def recipe(name: str) -> TrainConfig:
    """Recipe of that name.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r}: expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


BUDGETS: dict[str, FinetuneConfig] = {
    "quick": FinetuneConfig(),
    "thorough": FinetuneConfig(
        n_steps=200, n_views=96, n_replay=48, frozen_stages=3, validate_every=10, patience=6
    ),
}


def finetune_budget(budget: str | FinetuneConfig) -> FinetuneConfig:
    """Numbers of a budget's name; numbers as they are.

    Raises
    ------
    ConfigError
        If there is no such budget.
    """
    if isinstance(budget, FinetuneConfig):
        return budget
    if budget not in BUDGETS:
        raise ConfigError(f"budget {budget!r}: expected one of {', '.join(BUDGETS)}")
    return BUDGETS[budget]
