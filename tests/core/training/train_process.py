"""A training run of its own process, for tests that kill it or start several.

    python train_process.py IMAGES MASKS RUN SETTINGS [--resume] [--slow] [--stop]

Writes the last state to RUN/last.ckpt. With --stop the second process asks for an end after two
steps.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from semanticblur_core.config import ModelConfig, TrainConfig
from semanticblur_core.data.datasets import DecodedPairs, find_pairs
from semanticblur_core.device import DeviceChoice
from semanticblur_core.network import SemanticBlur
from semanticblur_core.training.loop import any_process, train


def main() -> None:
    images, masks, run_dir, settings = sys.argv[1:5]
    torch.set_num_threads(1)
    torch.manual_seed(8)
    pairs = DecodedPairs(find_pairs(Path(images), Path(masks)))
    updates = train(
        SemanticBlur(ModelConfig(backbone="resnet34")),
        pairs,
        DecodedPairs(pairs.pairs[:1]),
        TrainConfig.from_dict(json.loads(settings)),
        run_dir=Path(run_dir),
        device=DeviceChoice(torch.device("cpu"), torch.float32, "test"),
        save_best=lambda *_: None,
        resume="--resume" in sys.argv,
        checkpoint_every_steps=3,
    )
    for update in updates:
        print(update.step, flush=True)
        if "--stop" in sys.argv and any_process(update.step == 2 and os.environ["RANK"] == "1"):
            updates.close()
            break
        if "--slow" in sys.argv:
            time.sleep(0.5)


if __name__ == "__main__":
    main()
