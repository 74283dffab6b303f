"""Training recipes as data: every number in sight."""

from __future__ import annotations

from pathlib import Path

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
    # Nearly all synthetic: what blur looks like, before the photographs that there are few of.
    "pretrain": TrainConfig(
        epochs=10,
        batch_size=8,
        synthetic_photographs=5,
        synthetic_microscopy=1,
        learning_rate=2e-4,
        schedule="cosine",
        warmup_steps=50,
        augmentation="colour",
        ema_decay=0.998,
        seed=5,
    ),
    # The recipe to go on with: other scenes pasted in against learning photographs by heart, and
    # BatchNorm as the start left it. What it gave so far is in docs/experiments.md.
    "best": TrainConfig(
        epochs=20,
        batch_size=8,
        synthetic_photographs=2,
        synthetic_microscopy=1,
        learning_rate=1.2e-4,
        warmup_steps=20,
        augmentation="colour",
        crop_min_side=0.6,
        cutmix_share=0.5,
        frozen_stages=1,
        frozen_statistics=True,
        ema_decay=0.998,
        seed=7,
    ),
}


def recipe(name: str) -> TrainConfig:
    """Recipe of that name, or of a YAML file (``.yaml`` or ``.yml``).

    The file is a mapping of `TrainConfig`'s fields; what it leaves out is as in the recipe that
    its key ``recipe`` names (``paper`` where it names none).

    Raises
    ------
    ConfigError
        If there is none, or the file is not such a mapping.
    """
    return _find(name, ())


def _find(name: str, above: tuple[Path, ...]) -> TrainConfig:
    """A recipe, named in the files ``above``."""
    if name.lower().endswith((".yaml", ".yml")):
        # One that a file names lies beside it.
        return _recipe_from_file(above[-1].parent / name if above else Path(name), above)
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r}: expected one of {', '.join(RECIPES)}, or a YAML file")
    return RECIPES[name]


def _recipe_from_file(path: Path, above: tuple[Path, ...]) -> TrainConfig:
    import yaml

    path = path.resolve()
    if path in above:
        raise ConfigError(f"{path}: is a recipe made of itself")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: expected a mapping of settings, such as epochs: 20")
    name = values.pop("recipe", "paper")
    if not isinstance(name, str):
        raise ConfigError(f"{path}: recipe: expected a name, got a {type(name).__name__}")
    base = _find(name, (*above, path))
    fields = base.to_dict()
    for key, value in values.items():
        expected = type(fields.get(key))
        # 1e-4 is text in YAML, and 1 a whole number.
        if expected is float and isinstance(value, int | str) and not isinstance(value, bool):
            try:
                values[key] = float(value)
            except (ValueError, OverflowError):
                raise ConfigError(f"{path}: {key}: expected a number, got {value!s:.80}") from None
        elif key in fields and type(value) is not expected:
            raise ConfigError(f"{path}: {key}: expected {expected.__name__}, got {_shown(value)}")
    try:
        return TrainConfig.from_dict(fields | values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _shown(value: object) -> str:
    """For people; of lists and mappings, which may hold one another a million times, the kind."""
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else f"{value!r:.80}"


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
    if not isinstance(budget, str) or budget not in BUDGETS:
        raise ConfigError(f"budget {budget!r}: expected one of {', '.join(BUDGETS)}")
    return BUDGETS[budget]
