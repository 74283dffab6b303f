"""The paper's ablation tables: what is varied, what was published, and one run a row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from semanticblur_core import disk, weights
from semanticblur_core.config import BackboneName, ModelConfig, TrainConfig
from semanticblur_core.data.datasets import DecodedPairs
from semanticblur_core.device import DeviceChoice
from semanticblur_core.errors import TrainingError
from semanticblur_core.metrics import Scores
from semanticblur_core.network import SemanticBlur
from semanticblur_core.network.backbones import load_imagenet_resnet50
from semanticblur_core.training.checkpoint import load_checkpoint
from semanticblur_core.training.loop import (
    LAST_CHECKPOINT,
    SaveBest,
    TrainUpdate,
    is_one_of_several,
    train,
)

RESULT = "result.json"
BEST = "best.json"
BEST_WEIGHTS = "best.safetensors"


@dataclass(frozen=True)
class Variant:
    """A row of a table: its name, what it changes, and the published MAE, F-beta and IoU."""

    name: str
    model: ModelConfig
    training: dict[str, Any]
    published: tuple[float, float, float]


def _backbone(name: BackboneName, label: str, published: tuple[float, float, float]) -> Variant:
    return Variant(label, ModelConfig(backbone=name), {}, published)


def _attention(
    label: str, published: tuple[float, float, float], *, channel: bool, spatial: bool, full: bool
) -> Variant:
    config = ModelConfig(
        channel_attention=channel, spatial_attention=spatial, semantic_enhancement=full
    )
    return Variant(label, config, {}, published)


def _lambda(label: str, weight: float, published: tuple[float, float, float]) -> Variant:
    return Variant(label, ModelConfig(), {"ssim_weight": weight}, published)


# Published: MAE, F-beta, IoU on CUHK-TE (tables 1 and 2) and on DUT (table 3).
TABLES: dict[int, tuple[Variant, ...]] = {
    1: (
        _backbone("vgg16", "VGG-16", (0.052, 0.921, 0.891)),
        _backbone("resnet34", "ResNet-34", (0.043, 0.957, 0.932)),
        _backbone("resnet50", "ResNet-50", (0.039, 0.969, 0.951)),
        _backbone("efficientnet_b4", "EfficientNet-B4", (0.041, 0.961, 0.938)),
    ),
    2: (
        _attention("Baseline", (0.058, 0.891, 0.863), channel=False, spatial=False, full=False),
        _attention(
            "+ Channel Attention", (0.049, 0.924, 0.902), channel=True, spatial=False, full=False
        ),
        _attention(
            "+ Spatial Attention", (0.043, 0.951, 0.928), channel=True, spatial=True, full=False
        ),
        _attention(
            "+ Semantic Enhancement", (0.039, 0.969, 0.951), channel=True, spatial=True, full=True
        ),
    ),
    3: (
        _lambda("BCE only", 0.0, (0.078, 0.915, 0.871)),
        _lambda("BCE + SSIM, 0.05", 0.05, (0.071, 0.928, 0.889)),
        _lambda("BCE + SSIM, 0.1", 0.1, (0.067, 0.942, 0.909)),
        _lambda("BCE + SSIM, 0.2", 0.2, (0.069, 0.938, 0.904)),
        _lambda("BCE + SSIM, 0.3", 0.3, (0.073, 0.931, 0.896)),
    ),
}
PUBLISHED_ON = {1: "CUHK-TE", 2: "CUHK-TE", 3: "DUT"}


@dataclass(frozen=True)
class AblationRow:
    """What a variant reached: scores of its best epoch, and the last one's for comparison."""

    name: str
    published: tuple[float, float, float]
    mae: float
    f_beta: float
    iou: float
    best_epoch: int
    last_mae: float
    n_parameters: int
    start: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class AblationUpdate:
    """State of a table: variant ``index`` of ``n_variants``; ``row`` when it is done."""

    name: str
    index: int
    n_variants: int
    training: TrainUpdate | None = None
    row: AblationRow | None = None


def ablate(
    table: int,
    training: DecodedPairs,
    validation: DecodedPairs,
    config: TrainConfig,
    *,
    output: Path,
    device: DeviceChoice,
    imagenet: dict[str, torch.Tensor] | None = None,
) -> Generator[AblationUpdate]:
    """Train every variant of a table with the same budget; run again, it goes on.

    A variant that another table in the same folder already trained with these settings is not
    trained again.

    Parameters
    ----------
    table
        1 (backbones), 2 (attention) or 3 (weight of SSIM).
    training, validation
        Decoded pairs.
    config
        Recipe of all variants, but for what the table varies.
    output
        Folder with a run's folder a variant, in which the weights of its best epoch are.
    device
        What to compute on.
    imagenet
        Tensors of torchvision's ResNet-50, whole or in part. In table 1 they are not used: the
        other backbones would start from nothing.

    Yields
    ------
    AblationUpdate

    Raises
    ------
    TrainingError
        As in `train`; also when the folder holds a variant of other settings.
    """
    if is_one_of_several():
        raise TrainingError("ablate trains in one process; start it without torchrun")
    variants = TABLES[table]
    from_imagenet = imagenet if table != 1 else None
    start = "random initialisation" if from_imagenet is None else "ImageNet, in part"
    initial = "" if from_imagenet is None else weights.digest(from_imagenet)
    for index, variant in enumerate(variants):
        run_dir = output / f"table{table}-{index + 1}"
        varied = replace(config, **variant.training)
        key = _key(varied, variant.model, initial, device, training, validation)
        row = _finished(run_dir / RESULT, key)
        if row is None:
            run_dir.mkdir(parents=True, exist_ok=True)
            row = _trained_for_another_row(output, key, variant)
            if row is None:
                torch.manual_seed(varied.seed)
                model = SemanticBlur(variant.model)
                if from_imagenet is not None:
                    load_imagenet_resnet50(model.backbone, from_imagenet)
                last: TrainUpdate | None = None
                for update in train(
                    model,
                    training,
                    validation,
                    varied,
                    run_dir=run_dir,
                    device=device,
                    save_best=_keeper(run_dir, varied, variant, start),
                    start={"from": start},
                    resume=(run_dir / LAST_CHECKPOINT).exists(),
                ):
                    last = update if update.scores is not None else last
                    yield AblationUpdate(variant.name, index, len(variants), update)
                epoch, scores = _best_of(run_dir)
                row = AblationRow(
                    name=variant.name,
                    published=variant.published,
                    mae=scores["mae"],
                    f_beta=scores["f_beta"],
                    iou=scores["iou"],
                    best_epoch=epoch,
                    last_mae=last.scores.mae if last and last.scores else _last_mae(run_dir),
                    n_parameters=sum(p.numel() for p in model.parameters()),
                    start=start,
                )
            disk.write_text(run_dir / RESULT, json.dumps({"key": key, "row": row.to_dict()}) + "\n")
            # A finished run is never resumed, and its state is by far its largest file.
            (run_dir / LAST_CHECKPOINT).unlink(missing_ok=True)
        yield AblationUpdate(variant.name, index, len(variants), row=row)


def _keeper(run_dir: Path, config: TrainConfig, variant: Variant, start: str) -> SaveBest:
    def keep(model: SemanticBlur, scores: Scores, epoch: int) -> None:
        weights.save(
            run_dir / BEST_WEIGHTS,
            model,
            provenance={"variant": variant.name, "recipe": config.to_dict(), "start": start},
            metrics=scores.to_dict(),
            licence="whatever the data's owners allow",
        )
        values = {"epoch": epoch, "scores": scores.to_dict()}
        disk.write_text(run_dir / BEST, json.dumps(values) + "\n")

    return keep


def _last_mae(run_dir: Path) -> float:
    """Of a run that was over when it was taken up again."""
    return float(load_checkpoint(run_dir / LAST_CHECKPOINT)["history"][-1]["val_mae"])


def _best_of(run_dir: Path) -> tuple[int, dict[str, Any]]:
    values = json.loads((run_dir / BEST).read_text(encoding="utf-8"))
    return values["epoch"], values["scores"]


def _key(
    config: TrainConfig,
    model: ModelConfig,
    initial: str,
    device: DeviceChoice,
    training: DecodedPairs,
    validation: DecodedPairs,
) -> str:
    """Digest of what a variant's result depends on."""
    data = [training.digest, validation.digest]
    computed_on = [device.device.type, str(device.dtype)]
    # A setting that comes later is to leave the digest of earlier results as it is.
    usual = TrainConfig().to_dict()
    settings = {name: value for name, value in config.to_dict().items() if value != usual[name]}
    values = [settings, model.to_dict(), initial, computed_on, data]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _trained_for_another_row(output: Path, key: str, variant: Variant) -> AblationRow | None:
    """The row of a variant from one of the same settings: the whole network is in every table."""
    for path in sorted(output.glob(f"table*-*/{RESULT}")):
        try:
            theirs, row = _read_result(path)
        except TrainingError:  # what is damaged there stops the table that it belongs to
            continue
        if theirs == key:
            return replace(row, name=variant.name, published=variant.published)
    return None


def _read_result(path: Path) -> tuple[str, AblationRow]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        row = dict(values["row"])
        return values["key"], AblationRow(**(row | {"published": tuple(row["published"])}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path}: damaged ({error}); delete it to train again") from error


def _finished(path: Path, key: str) -> AblationRow | None:
    """The row of a variant that is finished."""
    if not path.exists():
        return None
    theirs, found = _read_result(path)
    if theirs != key:
        raise TrainingError(
            f"{path}: was made with other settings or images; go on with the same, or start in "
            "another folder"
        )
    return found
