"""``semanticblur-core eval``."""

from __future__ import annotations

import csv
import io as streams
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from semanticblur_core.cli._echo import echo
from semanticblur_core.cli._options import (
    PathType,
    SizeType,
    device_option,
    flip_option,
    mask_polarity_option,
    method_option,
    progress_bar,
    refuse_clashes,
    refuse_flags,
    refuse_network_flags,
    say,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from semanticblur_core.data.datasets import Pair
    from semanticblur_core.evaluation import Evaluation, Predict

_folder = PathType(file_okay=False)
_file = PathType(dir_okay=False, writes=True)
_polarity = click.Choice(["blur", "sharp"])


_OF_ONNX = ("onnx_input", "onnx_output_kind", "onnx_output")
_OF_TORCH = ("device", "precision", "flip", "size")
# What has no effect beside --data.
_OF_FOLDERS = (
    *("images", "maps", "masks", "split", "map_polarity", "mask_polarity", "map_resize"),
    *("protocol", "positive", "method", "photos", "csv_file", "plots", "compare"),
    *_OF_ONNX,
)


@click.command(name="eval")
@click.option("--images", type=_folder, help="Folder of images: the model finds their blur.")
@click.option("--maps", type=_folder, help="Folder of blur maps of any method, to be scored.")
@click.option("--masks", type=_folder, help="Folder of masks, 255 = blurred.")
@click.option(
    "--data", type=_folder, help="Or an annotation store: the model is scored where it is labelled."
)
@click.option("--split", help="Names to score: cuhk-te1, cuhk-val or a text file, one name a line.")
@click.option("--map-polarity", type=_polarity, help="White in maps is it.  [default: blur]")
@mask_polarity_option
@click.option(
    "--map-resize",
    type=click.Choice(["nearest", "bilinear", "error"]),
    help="Maps of another size than their mask's.  [default: nearest]",
)
@click.option(
    "--protocol",
    type=click.Choice(["dbd", "adaptive-1.5", "adaptive-2", "max-image", "max-mean", "max-pr"]),
    default="dbd",
    show_default=True,
    help="Which F-beta counts.",
)
@click.option(
    "--positive",
    type=_polarity,
    default="blur",
    show_default=True,
    help="The positive class; sharp inverts maps and masks.",
)
@method_option
@click.option("--model", help="Model, for --images.  [default: default]")
@click.option(
    "--size",
    type=SizeType(),
    default=320,
    show_default=True,
    help="Side that images are squashed to (320: the field's protocol), or native, as in detect.",
)
@click.option(
    "--onnx-input",
    type=click.Choice(["imagenet", "unit", "255"]),
    default="imagenet",
    show_default=True,
    help="Pixels that --model=FILE.onnx takes: ImageNet-normalised, 0..1 or 0..255 RGB.",
)
@click.option(
    "--onnx-output-kind",
    type=click.Choice(["probability", "logits"]),
    default="probability",
    show_default=True,
    help="What comes out of it.",
)
@click.option("--onnx-output", help="Name of the output that is the map, if it has several.")
@click.option("--photos", type=_folder, help="Images of the maps, to show in --plots.")
@click.option("--json", "json_file", type=_file, help="Write everything to this file.")
@click.option("--csv", "csv_file", type=_file, help="Write a row an image to this file.")
@click.option("--plots", type=_folder, help="Write the curve and examples to this folder.")
@click.option(
    "--compare",
    type=click.Choice(["table4", "table4:cuhk", "table4:dut", "table4:ctcug", "table4:ebd"]),
    help="Print the result among published ones (table4 alone: cuhk).",
)
@device_option
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What the model computes in.",
)
@flip_option
def command(
    images: Path | None,
    maps: Path | None,
    masks: Path | None,
    data: Path | None,
    split: str | None,
    map_polarity: Any,
    mask_polarity: Any,
    map_resize: Any,
    protocol: Any,
    positive: Any,
    method: str,
    model: str | None,
    size: Any,
    onnx_input: Any,
    onnx_output_kind: Any,
    onnx_output: str | None,
    photos: Path | None,
    json_file: Path | None,
    csv_file: Path | None,
    plots: Path | None,
    compare: str | None,
    device: str,
    precision: str,
    flip: bool,
) -> None:
    """Score blur maps, or a model on images, against masks.

    Files are paired by name stem, maps also as `detect` names them. Every number comes with its
    protocol. Exit code 2 if anything could not be scored; the rest is scored all the same.
    """
    from semanticblur_core import disk, io
    from semanticblur_core.data.datasets import list_images, note_subfolders, read_split, stem_of
    from semanticblur_core.evaluation import Evaluator, evaluate, match, resize_map

    refuse_network_flags(method, "model", "device", "precision", "flip", "size")
    if method != "network" and images is None:
        raise click.UsageError("--method goes with --images")
    if data is not None:
        refuse_flags("is not of --data, which has one protocol and one table", *_OF_FOLDERS)
        _eval_store(data, model or "default", size, device, precision, flip, json_file)
        return
    if (images is None) == (maps is None):
        raise click.UsageError("give --images or --maps, or --data")
    if masks is None:
        raise click.UsageError("give --masks")
    if flip and images is None:
        raise click.UsageError("--flip goes with --images")
    if plots:
        from semanticblur_core.eval_plots import require_matplotlib

        require_matplotlib()
    is_onnx = model is not None and model.lower().endswith(".onnx")
    if is_onnx and model is not None:
        from semanticblur_core.inference.backends import is_own_export

        # What `export` wrote is scored as the model that it is, under the same protocol.
        is_onnx = not is_own_export(Path(model))
    if is_onnx:
        refuse_flags("not of a foreign ONNX file, which is run as it is", *_OF_TORCH)
    else:
        refuse_flags("of a foreign --model=FILE.onnx only", *_OF_ONNX)
    if images is not None and (photos or (not is_onnx and (map_polarity or map_resize))):
        raise click.UsageError("--map-polarity, --map-resize and --photos go with --maps")
    if maps is not None and size != 320:
        raise click.UsageError("--size goes with --images and --data")
    if maps is not None and model:
        raise click.UsageError("--model goes with --images")
    map_polarity = map_polarity or "blur"
    map_resize = map_resize or ("nearest" if maps or is_onnx else "error")
    sources = images or maps
    assert sources is not None
    names = read_split(split) if split else None
    pairs, problems = match(sources, masks, names, maps=maps is not None)
    if below := note_subfolders(sources):
        echo(f"semanticblur-core: {below}", err=True)
    refuse_clashes(
        {"--json": json_file, "--csv": csv_file},
        (path for pair in pairs for path in (pair.image, pair.mask)),
    )
    predict: Predict | None = None
    digest: str | None = None
    described = str(maps)
    analysis = f"maps as given, white = {map_polarity}, other sizes: {map_resize}"
    if images is not None and model is not None and is_onnx:
        from semanticblur_core.inference.onnx import OnnxDetector

        network = OnnxDetector(
            Path(model),
            input_scale=onnx_input,
            output_kind=onnx_output_kind,
            output=onnx_output,
        )

        def predict_onnx(pair: Pair) -> NDArray[np.float32]:
            return network.detect(_read_as_large_as_mask(pair))

        predict, described = predict_onnx, model
        analysis = (
            f"images squashed to {network.width_px} x {network.height_px}, {onnx_input} input, "
            f"{onnx_output_kind} out, white = {map_polarity}, other sizes: {map_resize}"
        )
    elif images is not None and method != "network":
        from semanticblur_core.focus.classical import ClassicalDetector

        classical = ClassicalDetector(method)

        def predict_classical(pair: Pair) -> NDArray[np.float32]:
            return classical.detect(_read_as_large_as_mask(pair))

        predict, described = predict_classical, f"method {method}"
        analysis = f"images at their own size, {classical.reason}"
    elif images is not None:
        predict, analysis, described, digest = _predictor(
            model or "default", size, device, precision, flip
        )
    analysis += f"; masks: white = {mask_polarity}"
    evaluator = Evaluator(protocol, positive=positive, analysis=analysis)
    for problem in problems:
        echo(f"semanticblur-core: {problem}", err=True)
    n_failed = len(problems)
    updates = evaluate(
        pairs,
        evaluator,
        predict=predict,
        map_polarity=map_polarity,
        mask_polarity=mask_polarity,
        map_resize=map_resize,
    )
    with progress_bar() as progress:
        task = progress.add_task("Scoring", total=len(pairs))
        for update in updates:
            progress.update(task, completed=update.n_done)
            if update.problem:
                n_failed += 1
                say(progress, f"semanticblur-core: {update.problem}", err=True)
            if update.note:
                say(progress, f"semanticblur-core: {update.note}", err=True)
    if n_failed == len(problems) + len(pairs):
        echo("semanticblur-core: nothing could be scored", err=True)
        raise SystemExit(2)
    result = evaluator.result()
    if evaluator.largest <= 0.5:
        echo(
            f"semanticblur-core: no map has a value above {evaluator.largest:.3g} of 1, so nothing "
            "is called blurred; integers are divided by the largest value of their type",
            err=True,
        )
    _print_table(result, evaluator.describe(), described)
    if compare:
        _print_comparison(result, compare.partition(":")[2] or "cuhk", described)
    report = result.to_dict() | {"method": described, "n_failed": n_failed, "split": split}
    report |= {"model_sha256": digest} if digest else {}
    if json_file:
        disk.write_text(json_file, json.dumps(report, indent=1) + "\n")
    if csv_file:
        disk.write_text(csv_file, _csv(report["per_image"]))
    if plots:
        from semanticblur_core.eval_plots import write_plots

        def show(pair: Pair) -> NDArray[np.float32]:
            found = predict(pair) if predict else io.read_map(pair.image)
            found = resize_map(found, *io.read_mask(pair.mask).shape, how="nearest")
            return 1 - found if map_polarity == "sharp" else found

        shown = images or photos
        found = {stem_of(path): path for path in list_images(shown)} if shown else {}
        write_plots(
            plots,
            result,
            {pair.name: pair for pair in pairs},
            show,
            mask_is_blur=mask_polarity == "blur",
            images=found,
        )
        echo(f"plots in {plots}")
    if n_failed:
        raise SystemExit(2)


def _eval_store(
    data: Path,
    model: str,
    size: Any,
    device: str,
    precision: str,
    flip: bool,
    json_file: Path | None,
) -> None:
    """Score a model on the labelled pixels of an annotation store."""
    from semanticblur_core import disk
    from semanticblur_core.data.labels import BLURRED
    from semanticblur_core.data.store import AnnotationStore
    from semanticblur_core.errors import DataError
    from semanticblur_core.evaluation import ONE_FAILED
    from semanticblur_core.inference.detector import Detector
    from semanticblur_core.metrics import BlurScorer
    from semanticblur_core.training.finetune import PROTOCOL

    store = AnnotationStore(data)
    problems: list[str] = []
    items = store.items(problems.append)
    own = [path for item in items for path in (item.image, item.labels)]
    refuse_clashes({"--json": json_file}, [data / "dataset.json", *own])
    detector = Detector(model, device=device, precision=precision, flip=flip, backend="torch")
    how = f"{_sized(size)}, maps brought back {detector.upsampling}"
    where = f"{detector.precision} on {detector.device}"
    protocol = replace(PROTOCOL, analysis=f"{PROTOCOL.analysis}; images {how}; {where}")
    scorer = BlurScorer(protocol)
    for problem in problems:
        echo(f"semanticblur-core: {problem}", err=True)
    with progress_bar() as progress:
        for item in progress.track(items, description="Scoring"):
            try:
                images = store.read(item)
                maps = [
                    detector.detect(i.image, size=size, value_range=i.value_range) for i in images
                ]
            except ONE_FAILED as error:
                reason = str(error) or "out of memory"
                is_named = reason.startswith(str(data))
                problems.append(reason if is_named else f"{item.image}: {reason}")
                say(progress, f"semanticblur-core: {problems[-1]}", err=True)
                continue
            for image, blur in zip(images, maps, strict=True):
                labelled = image.labels > 0
                truth = image.labels[labelled] == BLURRED
                scorer.add(blur[labelled][None], truth[None], name=image.name)
    if not scorer.images:
        found = "nothing could be scored" if problems else "nothing in it is labelled yet"
        raise DataError(f"{data}: {found}")
    scores = scorer.result()
    echo(f"model {model}: {scores.n_images} images of {data}")
    echo(f"protocol: {protocol.describe()}")
    for name, value in (("MAE", scores.mae), ("F-beta", scores.f_beta), ("IoU", scores.iou)):
        echo(f"  {name:<28}{value:.4f}")
    if json_file:
        rows = [score.to_dict() for score in scorer.images]
        report = scores.to_dict() | {"method": f"model {model}", "per_image": rows}
        report |= {"n_failed": len(problems), "model_sha256": detector.sha256}
        disk.write_text(json_file, json.dumps(report, indent=1) + "\n")
    if problems:
        raise SystemExit(2)


def _sized(size: Any) -> str:
    return "in tiles at their own size" if size == "native" else f"squashed to {size} x {size}"


def _predictor(
    model: str, size: Any, device: str, precision: str, flip: bool
) -> tuple[Predict, str, str, str | None]:
    """Function from a pair to its map, under the protocol of the field."""
    from semanticblur_core import weights
    from semanticblur_core.inference.backends import is_exported
    from semanticblur_core.inference.detector import Detector

    exported = is_exported(model)
    backend: Literal["auto", "torch"] = "auto" if exported else "torch"
    detector = Detector(model, device=device, precision=precision, flip=flip, backend=backend)

    def predict(pair: Pair) -> NDArray[np.float32]:
        image = _read_as_large_as_mask(pair)
        return detector.detect(image, size=size, upsampling="nearest-exact")

    name = f"model {model}" + ("" if exported else f" ({weights.resolve(model).name})")
    analysis = f"images {_sized(size)}, maps brought back by nearest-exact"
    analysis += f"; {detector.precision} on {detector.device}"
    analysis += "; averaged with the mirrored image's" if flip else ""
    return predict, analysis, name, detector.sha256


def _read_as_large_as_mask(pair: Pair) -> NDArray[Any]:
    from semanticblur_core import io
    from semanticblur_core.errors import DataError

    image = io.read_image(pair.image)
    shape = io.read_mask(pair.mask).shape
    if image.shape[:2] != shape:
        raise DataError(
            f"{pair.image}: image of {image.shape[0]} x {image.shape[1]} px for a mask of "
            f"{shape[0]} x {shape[1]} px"
        )
    return image


def _print_table(result: Evaluation, protocol: str, method: str) -> None:
    echo(f"{method}: {result.n_images} images")
    echo(f"protocol: {protocol}")
    if result.protocol["resized"]:
        echo(f"{result.protocol['resized']} maps were brought to their mask's size")
    rows = {"MAE": result.mae, "F-beta": result.f_beta, "IoU": result.iou}
    rows |= {name.replace("_", " "): value for name, value in result.wider.items()}
    for name, value in rows.items():
        echo(f"  {name:<28}{value:.4f}")


def _print_comparison(result: Evaluation, data_set: str, method: str) -> None:
    from semanticblur_core.published import rows

    table: list[tuple[float, str]] = []

    def line(name: str, values: tuple[float, float, float], origin: str) -> tuple[float, str]:
        mae, f_beta, iou = values
        return mae, f"  {name:<28}{mae:8.3f}{f_beta:8.3f}{iou:8.3f}  {origin}"

    for name, values in rows(data_set):
        if values is not None:
            table.append(line(name, values, "quoted"))
    mine = (result.mae, result.f_beta, result.iou)
    origin = f"measured here, {result.n_images} images: {method}"
    name, positive = result.protocol["name"], result.protocol["positive_class"]
    if (name, positive) != ("dbd", "blur"):
        origin += f" (NOT comparable: protocol {name}, {positive} positive)"
    table.append(line("this result", mine, origin))
    missing = [name for name, values in rows(data_set) if values is None]
    echo(f"\n  {data_set.upper() + ', by MAE':<28}{'MAE':>8}{'F-beta':>8}{'IoU':>8}")
    for _, text in sorted(table):
        echo(text)
    if missing:
        echo(f"  no figures published: {', '.join(missing)}")
    echo("  quoted: from the papers, each under its own protocol")


def _csv(rows: list[dict[str, Any]]) -> str:
    text = streams.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
