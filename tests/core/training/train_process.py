"""A training run of its own process, for tests that kill it or start several.

    python train_process.py IMAGES MASKS RUN SETTINGS [--resume] [--slow]

Writes the last state to RUN/last.ckpt.
"""

import json
import sys
import time
from pathlib import Path

import torch

from semanticblur_core.config import ModelConfig, TrainConfig
from semanticblur_core.data.datasets import DecodedPairs, find_pairs
from semanticblur_core.device import DeviceChoice
from semanticblur_core.network import SemanticBlur
from semanticblur_core.training.loop import train


def main() -> None:
    images, masks, run_dir, settings = sys.argv[1:5]
    torch.set_num_threads(1)
    torch.manual_seed(8)
    pairs = DecodedPairs(find_pairs(Path(images), Path(masks)))
    for update in train(
        SemanticBlur(ModelConfig(backbone="resnet34")),
        pairs,
        DecodedPairs(pairs.pairs[:1]),
        TrainConfig.from_dict(json.loads(settings)),
        run_dir=Path(run_dir),
        device=DeviceChoice(torch.device("cpu"), torch.float32, "test"),
        save_best=lambda *_: None,
        resume="--resume" in sys.argv,
        checkpoint_every_steps=3,
    ):
        print(update.step, flush=True)
        if "--slow" in sys.argv:
            time.sleep(0.5)


if __name__ == "__main__":
    main()
