"""Score blur maps of each size of analysis and of tiles on the validation photographs.

    SEMANTICBLUR_DATA=DIR python tests/measure_sizes.py [PRECISION]

Maps are made at each photograph's own resolution (about 640 x 430 px), written, and scored by
`semanticblur-core eval --maps`. Reproduces the table "Which size" of docs/detect.md.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from semanticblur_core import Detector, io
from semanticblur_core.data.datasets import find_pairs, read_split, select

SQUASHED_PX = (320, 448)
TILES_PX = (256, 320, 448, 512, 640)
OVERLAP_PX = 64


def main(data: Path, precision: str) -> None:
    """Print a line for each way of analysis."""
    images, masks = data / "cuhk-tr1" / "images", data / "cuhk-tr1" / "masks"
    pairs = select(find_pairs(images, masks), read_split("cuhk-val"))
    detector = Detector("default", device="cpu", precision=precision, backend="torch")
    ways = [(f"squashed to {side}", {"size": side}) for side in SQUASHED_PX]
    for side in TILES_PX:
        tiles = {"size": "native", "tile_size_px": side, "overlap_px": OVERLAP_PX}
        ways.append((f"native, tiles of {side} px", tiles))
    for way, how in ways:
        with tempfile.TemporaryDirectory() as folder:
            for pair in pairs:
                *_, update = detector.iter_planes(io.read_rgb8(pair.image), "YXS", **how)  # type: ignore[arg-type]
                io.write_npy(Path(folder) / f"{pair.image.stem}.npy", update.blur)
            table = Path(folder) / "eval.json"
            subprocess.run(
                [
                    "semanticblur-core", "eval", f"--maps={folder}", f"--masks={masks}",
                    "--split=cuhk-val", f"--json={table}",
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            found = json.loads(table.read_text())
            figures = {name: round(found[name], 4) for name in ("mae", "f_beta", "iou")}
            print(f"{way}: {figures}, {found['n_images']} photographs", flush=True)


if __name__ == "__main__":
    main(Path(os.environ["SEMANTICBLUR_DATA"]), (sys.argv[1:] or ["bfloat16"])[0])
