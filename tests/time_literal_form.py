"""Time the shipped network against the equation-by-equation form (not a test; run it by hand).

    python tests/time_literal_form.py [--rounds=5] [--threads=2] [--limit=0.15]

Prints medians on a new 320 x 320 image each round: of the literal and the shipped form in torch,
in float32 and bfloat16, in turn, and of the network as `Detector` runs it, with the back end that
was measured as fastest (``semanticblur-core bench backends`` measures). Ends with exit code 1 if
neither reaches the limit: the shipped form over the literal one in the same precision, `Detector`
over the faster of the literal ones.
"""

import argparse
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "core"))
from reference_network import reference_forward

from semanticblur_core.device import keep_freed_memory
from semanticblur_core.inference.detector import Detector
from semanticblur_core.network import SemanticBlur


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=0.15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # which other runtimes read
    keep_freed_memory()
    literal_times, ratios = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = SemanticBlur().eval()
        shipped_form = model.for_inference(dtype)
        forms = {"literal": partial(reference_forward, model.to(dtype)), "shipped": shipped_form}
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        for i in range(options.rounds + 2):
            image = torch.rand(1, 3, 320, 320).to(dtype)
            for name, form in forms.items():
                start = time.perf_counter()
                with torch.inference_mode():
                    form(image)
                if i >= 2:
                    seconds[name].append(time.perf_counter() - start)
        literal, shipped = (statistics.median(seconds[name]) for name in ("literal", "shipped"))
        literal_times.append(literal)
        ratios.append(shipped / literal)
        print(
            f"{str(dtype).removeprefix('torch.')}: literal {literal * 1e3:.0f} ms, shipped "
            f"{shipped * 1e3:.0f} ms, ratio {ratios[-1]:.3f}"
        )
    # By itself: threads of another runtime may go on spinning for a while.
    detector = Detector(device="cpu", n_images=1000)
    picked_seconds = []
    for i in range(options.rounds + 2):
        images = np.random.default_rng(i).random((1, 320, 320, 3), np.float32)
        start = time.perf_counter()
        detector.engine.run(images)
        if i >= 2:
            picked_seconds.append(time.perf_counter() - start)
    picked = statistics.median(picked_seconds)
    ratios.append(picked / min(literal_times))
    print(
        f"Detector ({detector.backend}, {detector.precision}): {picked * 1e3:.0f} ms, "
        f"ratio {ratios[-1]:.3f}"
    )
    return 0 if min(ratios) <= options.limit else 1


if __name__ == "__main__":
    sys.exit(main())
