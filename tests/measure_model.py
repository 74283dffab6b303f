"""Print the figures of the model card for a model, from the research data.

    SEMANTICBLUR_DATA=DIR python tests/measure_model.py [MODEL ...]

Float32 on the CPU. Sharp images are those held out from training (`is_held_out`). `cuhk-val` is
measured by `semanticblur-core eval`.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.filters import sobel
from skimage.morphology import dilation, disk

from semanticblur_core import Detector, io
from semanticblur_core.data.datasets import list_images
from semanticblur_core.data.defocus import GAMMA, SharpImages, defocus, is_held_out, synthesise
from semanticblur_core.data.squash import squash

SIZE_PX = 320
# Of the sharp photographs held out, those in which more than a twentieth of the picture is out of
# focus, and those where that is doubtful: judged by a vision-language model that was shown the
# photographs alone.
SOFT = """
    bsds_105027 bsds_113044 bsds_130066 bsds_134035 bsds_157055 bsds_196015 bsds_226033
    bsds_279005 bsds_335088 bsds_42078 bsds_69040 ecssd_0022 ecssd_0060 ecssd_0171
    ecssd_0261 ecssd_0275 ecssd_0364 ecssd_0403 ecssd_0417 ecssd_0469 ecssd_0519
    ecssd_0586 ecssd_0609 ecssd_0815 ecssd_0904 ecssd_0927
"""
DOUBTFUL = """
    bsds_108082 bsds_181091 bsds_45077 ecssd_0048 ecssd_0057 ecssd_0095 ecssd_0110
    ecssd_0223 ecssd_0237 ecssd_0385 ecssd_0391 ecssd_0512 ecssd_0525 ecssd_0550
    ecssd_0578 ecssd_0602 ecssd_0689 ecssd_0707 ecssd_0751 ecssd_0787 ecssd_0798
    ecssd_0843 ecssd_0860 ecssd_0946
"""


def squashed(path: Path) -> NDArray[np.uint8]:
    """The photograph at the network's size."""
    return np.round(squash(io.read_rgb8(path), SIZE_PX, SIZE_PX) * 255).astype(np.uint8)


def defocused(image: NDArray[np.uint8], radius_px: float) -> NDArray[np.uint8]:
    """The whole of a sharp photograph out of focus."""
    linear = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255) ** GAMMA
    blurred, _ = defocus(linear, torch.full((1, 1, *image.shape[:2]), radius_px))
    stored = blurred.clamp(0, 1) ** (1 / GAMMA) * 255
    return stored[0].permute(1, 2, 0).round().byte().numpy()


def content(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where a plane holds something: near gradients in the upper fifth."""
    grey = image.mean(axis=2)
    edges = sobel(grey)
    return dilation(edges > np.quantile(edges, 0.8), disk(5))


def measure(model: str, data: Path) -> None:
    """Print a line a figure."""
    detector = Detector(model, device="cpu", precision="float32")
    print(f"{model}: {detector.info.sha256[:12] if detector.info else ''}")
    held_out = [p for p in list_images(data / "sharp" / "images") if is_held_out(p.stem)]
    images = [squashed(path) for path in held_out]
    sharp = {
        path.stem: float(detector.detect(image).mean())
        for path, image in zip(held_out, images, strict=True)
    }
    print(f"  {len(sharp)} sharp photographs, mean blur: {np.mean(list(sharp.values())):.3f}")
    soft, doubtful = SOFT.split(), DOUBTFUL.split()
    for what, names in {
        "out of focus in part": soft,
        "doubtful": doubtful,
        "the rest": sharp.keys() - {*soft, *doubtful},
    }.items():
        blur = [sharp[name] for name in names]
        print(f"    {what}, {len(blur)} of them: {np.mean(blur):.3f}")
    for radius in (2.0, 4.0, 8.0):
        blur = [float(detector.detect(defocused(image, radius)).mean()) for image in images]
        print(f"  the same defocused by {radius:g} px, mean blur: {np.mean(blur):.3f}")

    contradictions = []
    for near in sorted((data / "pairs-lytro").glob("*-A.jpg")):
        far = near.with_name(near.name.replace("-A", "-B"))
        a, b = (detector.detect(io.read_image(path)) > 0.5 for path in (near, far))
        contradictions.append(float(np.abs(a.astype(int) + b - 1).mean()))
    print(f"  {len(contradictions)} Lytro pairs, mean |a + b - 1|: {np.mean(contradictions):.3f}")

    folder = data / "microscopy"
    planes = {}
    for path in list_images(folder / "smear-stack"):
        image = io.read_rgb8(path)
        planes[int(path.stem.removeprefix("z"))] = float(
            detector.detect(image)[content(image)].mean()
        )
    text = ", ".join(f"{z:+d} {value:.2f}" for z, value in sorted(planes.items()))
    print(f"  smear stack, mean blur of content by plane: {text}")
    for name in ("bbbc006-sharp", "bbbc006-z00-defocused"):
        values = [
            float(detector.detect(io.read_image(p)).mean()) for p in list_images(folder / name)
        ]
        print(f"  {name}, mean blur: {min(values):.3f} to {max(values):.3f} ({len(values)} tiles)")
    for name in ("nuclei-sharp", "blood-sharp"):
        files = [p for p in list_images(folder / name) if is_held_out(p.stem)]
        sources, rng = SharpImages(files, kind="microscopy"), np.random.default_rng(0)
        errors = []
        for _ in range(60):
            made = synthesise(sources, 1, SIZE_PX, rng)
            image = (made.image[0].permute(1, 2, 0) * 255).round().byte().numpy()
            error = np.abs(detector.detect(image) - made.blurred[0, 0].numpy())
            labelled = made.labelled[0, 0].numpy()
            if labelled.any():
                errors.append(float(error[labelled].mean()))
        print(
            f"  synthetic defocus of {len(files)} held-out {name}: MAE {np.mean(errors):.3f} "
            f"over {len(errors)} images, where labelled"
        )


if __name__ == "__main__":
    torch.set_num_threads(2)
    for name in sys.argv[1:] or ["default"]:
        measure(name, Path(os.environ["SEMANTICBLUR_DATA"]))
